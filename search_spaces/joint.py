"""Joint: a compression factor and a channel fraction for every block (section 2.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from search_spaces.channels import KEPT, KERNEL, NANO_KERNEL, channel_count, kept_channels
from search_spaces.defaults import Defaults
from search_spaces.method import Candidate, Method, Picks, Settings, alpha_candidates, whole
from search_spaces.slices import BlockShape, BlockSlice, prefix_slice


class Joint(Method):
    """A factor, and within the channels that it leaves a count, as a fraction of them."""

    name = "joint"
    choice_names = ("alpha", "fraction")
    kept_names = (KEPT,)
    offers = "--alphas and --fractions"
    defaults = Defaults(training=KERNEL)
    nano_defaults = Defaults(training=NANO_KERNEL)

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
        prefix = prefix_slice(shape, whole(picks, "alpha", 1), settings.width)
        if not 0 < picks["fraction"] <= 1:
            raise ValueError(f"fraction {picks['fraction']:g} is no share above 0 and at most 1")
        count = channel_count(prefix.stream, picks["fraction"])
        return replace(prefix, mlp_stream=kept_channels(count, prefix.stream, kept))
