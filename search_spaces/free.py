"""Free: every width of every block by itself, the stream's of every stage (section 2.9)."""

import math
from collections.abc import Mapping, Sequence

from search_spaces.defaults import Defaults
from search_spaces.method import Candidate, Method, Picks, Settings, whole
from search_spaces.slices import BlockShape, BlockSlice

HIDDEN_STEPS = 32
NARROWEST = 4  # a stage keeps at least this fraction's part of its channels


class Free(Method):
    """Channels of the stream, one number for all blocks of a stage; in a block heads, q and k, v, and hidden neurons.

    All are prefixes, of a network that was rewritten first (section 2.7). No heads, or no neurons: that half is
    skipped, and a half that the block has not stays so. Attention's scale stays that of the backbone's heads.
    """

    name = "free"
    choice_names = ("stream", "heads", "qk", "v", "hidden")
    stage_choices = ("stream",)
    counted = choice_names
    halves = (("heads", "qk", "v"), ("hidden",))
    listed = False
    offers = "--granularity, --keep-block and --fix"
    # Minutes and no training, in which images of the refit bring more than candidates do (docs/free.md). What stage 2
    # has to begin with is worth more than what a step of usual size leaves of it.
    defaults = Defaults(
        training=dict(
            aa=None, mixup=0.0, cutmix=0.0, smoothing=0.0, reprob=0.0, color_jitter=0.0, scale=(0.5, 1.0),
            drop_path=0.0, calibration_images=512, refit_images=4096,
        ),
        search=dict(epochs=0, budget=0.5, evals=1),
        retrain=dict(epochs=20, train="distill", result="best", sched="cosine", warmup_epochs=1),
    )  # fmt: skip
    nano_defaults = Defaults(
        training=dict(smoothing=0.0),
        search=dict(epochs=0, granularity=1, evals=12),
        retrain=dict(train="distill", result="best"),
    )

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        step, E, d, M = settings.granularity, shape.embed_dim, shape.head_dim, shape.hidden
        whole = self.whole(shape)
        halves = zip(self.halves, (shape.attn, shape.mlp), strict=True)
        missing = [name for names, there in halves if not there for name in names]
        hidden = {min(M, step * round(k * M / HIDDEN_STEPS / step)) for k in range(HIDDEN_STEPS + 1)}
        found: dict[str, set[int]] = {
            "stream": multiples(step, -(-E // NARROWEST), E),
            "heads": set(range(shape.num_heads + 1)),
            "qk": multiples(math.lcm(step, shape.qk_unit), 1, d),
            "v": multiples(step, 1, shape.v_dim),
            "hidden": hidden | {0, M},
        }
        return {
            name: (whole[name],) if name in (*settings.fixed, *missing) else tuple(sorted(options, reverse=True))
            for name, options in found.items()
        }, []

    def whole(self, shape: BlockShape) -> dict[str, Candidate]:
        """The backbone's own block; of a half that it has not, no heads or no neurons."""
        return {
            "stream": shape.embed_dim,
            "heads": shape.num_heads * shape.attn,
            "qk": shape.head_dim,
            "v": shape.v_dim,
            "hidden": shape.hidden * shape.mlp,
        }

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        for name, most in self.whole(shape).items():
            if whole(picks, name, 0 if name in ("heads", "hidden") else 1) > most:
                raise ValueError(f"{name} {picks[name]:g} of {most}")
        stream, heads, qk, v, hidden = (int(picks[name]) for name in self.choice_names)
        if qk % shape.qk_unit:
            raise ValueError(f"qk {qk}, no multiple of the {shape.qk_unit} channels that turn together")
        return BlockSlice(
            stream=stream,
            heads=heads or shape.num_heads,
            hidden=hidden or shape.hidden,
            qk=None if qk == shape.head_dim else qk,
            v_channels=None if v == shape.v_dim else v,
            attn=heads > 0,
            mlp=hidden > 0,
        )


def multiples(step: int, low: int, high: int) -> set[int]:
    """The multiples of a step from low to high, and high itself."""
    return {*range(step * -(-low // step), high + 1, step), high}
