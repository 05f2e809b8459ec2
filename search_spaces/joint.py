"""Joint: a compression factor and a channel fraction for every block (section 2.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from search_spaces.kcr import KEPT, channel_count, kept_channels
from search_spaces.method import Candidate, Picks, Settings, alpha_candidates
from search_spaces.slices import BlockShape, BlockSlice, prefix_slice


class Joint:
    """DAN's alpha, and within the channels that it leaves KCR's count, as a fraction of them."""

    name = "joint"
    choice_names: tuple[str, ...] = ("alpha", "fraction")
    kept_names: tuple[str, ...] = (KEPT,)

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        alphas, dropped = alpha_candidates(shape, settings)
        streams = [prefix_slice(shape, int(alpha), settings.width).stream for alpha in alphas]
        fractions: dict[tuple[int, ...], float] = {}  # the counts that a fraction stands for -> the fraction
        for fraction in sorted(set(settings.fractions or ()), reverse=True):
            same = fractions.setdefault(tuple(channel_count(s, fraction) for s in streams), fraction)
            if same != fraction:
                dropped.append(f"fraction {fraction:g} left out (at every alpha it keeps what {same:g} keeps)")
        return {"alpha": alphas, "fraction": tuple(fractions.values())}, dropped

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        prefix = prefix_slice(shape, int(picks["alpha"]), settings.width)
        count = channel_count(prefix.stream, float(picks["fraction"]))
        return replace(prefix, mlp_stream=kept_channels(count, prefix.stream, kept))
