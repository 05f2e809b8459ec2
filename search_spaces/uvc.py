"""UVC: heads, channels inside heads, neurons, and whether a block is there at all (section 2.5).

The method of "Unified Visual Transformer Compression" (ICLR 2022). The residual stream keeps all its channels.
"""

from collections.abc import Mapping, Sequence

from search_spaces.defaults import CROP_AND_FLIP, Defaults
from search_spaces.method import Candidate, Method, Picks, Settings, whole
from search_spaces.slices import BlockShape, BlockSlice
from search_spaces.units import KEPT_HIDDEN, KEPT_V

GATES_LR = 0.01  # a tenth of the published rate, at which gates do nearly all of the work (docs/uvc.md)


class UVC(Method):
    """Per block the number of heads, of V's channels in all of them, and of neurons; 0: that half is skipped.

    Which ones follows from the norms of their weights: kept_v are flat indices into V's (H, d), kept_hidden are
    neurons. Q and K keep their shape inside a kept head.
    """

    name = "uvc"
    choice_names = ("heads", "v_channels", "hidden")
    kept_names = (KEPT_V, KEPT_HIDDEN)
    listed = False
    models = {"deit": "deit_tiny_patch16_224"}  # noqa: RUF012
    without = {  # noqa: RUF012
        **dict.fromkeys(
            ("swinv2", "relpos"), "a head costs its network of positions too, which UVC's count of MACs has no term for"
        ),
        "cait": "a head costs its part of what mixes all heads, which UVC's count of MACs has no term for",
    }
    # The published recipe (section 2.5); warm-up, search and retrain in epochs.
    defaults = Defaults(
        training=dict(
            lr=1e-4, weight_decay=0.05, sched="cosine", warmup_epochs=5, batch_size=256, importance="none",
            distill_weight=0.1,
        ),
        search=dict(epochs=30, arch_lr=GATES_LR, budget=0.5),
        retrain=dict(epochs=120),
    )  # fmt: skip
    nano_defaults = Defaults(training=dict(importance="none", distill_weight=0.1), search=dict(arch_lr=GATES_LR))
    # As the authors' code and its log of DeiT-Tiny have it: 5,005 steps an epoch, 25 epochs of them after the warm-up.
    published = Defaults(
        training=dict(
            CROP_AND_FLIP, opt="adamw", pretrained=True, sched="cosine", warmup_epochs=5, weight_decay=0.05,
            batch_size=256, clip_grad=1.0, clip_mode="norm", drop_path=0.0, aa="none", color_jitter=0.0, reprob=0.0,
            mixup=0.8, cutmix=1.0, mixup_prob=0.8, mixup_switch_prob=0.5, smoothing=0.1, distill="soft",
            distill_weight=0.1, distill_temperature=1.0, distill_reduction="mean",
        ),
        search=dict(
            searcher="minimax", basis="none", prune=True, skip="block", epochs=30, lr=1e-4, arch_lr=0.1, budget=0.5,
            gate_average="ramp", gate_flops="drawn", damping=0.0, reference_steps=125_125,
        ),
        retrain=dict(epochs=120, train="distill", result="last", lr=5e-5, min_lr=1e-5, warmup_lr=1e-6),
    )  # fmt: skip

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        sizes = (shape.num_heads, shape.num_heads * shape.head_dim, shape.hidden)
        return {n: tuple(range(size, -1, -1)) for n, size in zip(self.choice_names, sizes, strict=True)}, []

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        heads, channels, hidden = (whole(picks, name) for name in self.choice_names)
        if not heads <= channels <= heads * shape.head_dim:
            raise ValueError(f"v_channels {channels} in heads {heads} of {shape.head_dim}")
        if hidden > shape.hidden:
            raise ValueError(f"hidden {hidden} of {shape.hidden}")
        v = _ascending(KEPT_V, channels, shape.num_heads * shape.head_dim, kept, _spread(heads, channels, shape))
        neurons = _ascending(KEPT_HIDDEN, hidden, shape.hidden, kept, tuple(range(hidden)))
        by_head: dict[int, list[int]] = {}
        for index in v:
            by_head.setdefault(index // shape.head_dim, []).append(index % shape.head_dim)
        if len(by_head) != heads:
            raise ValueError(f"{KEPT_V} lies in {len(by_head)} heads, the choice is {heads}")
        all_of_v = channels == heads * shape.head_dim
        return BlockSlice(
            stream=shape.embed_dim,
            heads=_prefix(tuple(by_head)) if heads else shape.num_heads,
            hidden=_prefix(neurons) if hidden else shape.hidden,
            v_channels=None if all_of_v else tuple(map(tuple, by_head.values())),
            attn=heads > 0,
            mlp=hidden > 0,
        )


def _spread(heads: int, channels: int, shape: BlockShape) -> tuple[int, ...]:
    """The first channels of the first heads, as evenly as they go: what a count costs before scores are known."""
    widths = [channels // heads + (h < channels % heads) for h in range(heads)]
    return tuple(h * shape.head_dim + c for h, width in enumerate(widths) for c in range(width))


def _prefix(indices: tuple[int, ...]) -> int | tuple[int, ...]:
    return len(indices) if indices == tuple(range(len(indices))) else indices


def _ascending(
    name: str, count: int, size: int, kept: Mapping[str, Sequence[int]], default: tuple[int, ...]
) -> tuple[int, ...]:
    """The indices given under a name, or else the default. ValueError unless `count` ascending ones below `size`."""
    if not 0 <= count <= size:
        raise ValueError(f"{count} of {size} for {name}")
    indices = tuple(kept[name]) if name in kept else default
    if len(indices) != count:
        raise ValueError(f"{name} holds {len(indices)} indices, the choice is {count}")
    if list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
        raise ValueError(f"{name} must rise and lie from 0 to {size - 1}")
    return indices
