"""KCR: how many, and which, stream channels the MLP of a block reads and writes (section 2.3).

The method of "Compression of Vision Transformer by Reduction of Kernel Complexity" (KCR-Transformer). Attention
and both norms keep the whole stream; the channels that the MLP leaves out pass by on the residual.
"""

from collections.abc import Mapping, Sequence

from search_spaces.channels import KEPT, KERNEL, NANO_KERNEL, STEP, channel_count, kept_channels
from search_spaces.defaults import CROP_AND_FLIP, Defaults
from search_spaces.method import Candidate, Method, Picks, Settings, whole
from search_spaces.slices import BlockShape, BlockSlice


class KCR(Method):
    """Per block a choice of how many channels; which ones follows from their scores (nas/searchers/channels.py)."""

    name = "kcr"
    choice_names = ("channels",)
    kept_names = (KEPT,)
    counted = choice_names
    offers = "--fractions"
    # The published recipe (section 2.3), whose batch of 4 x 64 is 64 on each of four devices; five epochs of warm-up
    # are timm's own.
    defaults = Defaults(
        training=dict(
            KERNEL,
            lr=1e-4, min_lr=1e-5, warmup_lr=1e-4, warmup_epochs=5, sched="cosine", weight_decay=0.01, batch_size=64,
            aa="rand-m9-mstd0.5", reprob=0.2, mixup=0.0, cutmix=0.0, amp=True,
        ),
        search=dict(selection="topk"),
        retrain=dict(epochs=300, model_ema=True, model_ema_decay=0.9995),
    )  # fmt: skip
    # Stage 2 is the authors' own command, of which the warm-up's 5 epochs are timm's; of stage 1 see docs/fidelity.md.
    published = Defaults(
        training=dict(
            CROP_AND_FLIP, opt="adamw", pretrained=True, lr=1e-4, min_lr=1e-5, warmup_lr=1e-4, warmup_epochs=5,
            sched="cosine", weight_decay=0.01, batch_size=64, aa="rand-m9-mstd0.5", reprob=0.2, remode="pixel",
            mixup=0.0, cutmix=0.0, smoothing=0.1, drop_path=0.0, amp=True, adjoined=False,
        ),
        search=dict(
            searcher="gradient", basis="none", selection="bernoulli", flops_weight=0.2, mask_warmup=0.3, eta_kc=0.0,
            budget=0.0,
        ),
        retrain=dict(
            epochs=300, train="adjoined", result="last", model_ema=True, model_ema_decay=0.9995,
            model_ema_warmup=False,
        ),
    )  # fmt: skip
    # A quarter of the channels leaves attention whole: 0.55 to 0.68 of the FLOPs is the least it reaches.
    nano_defaults = Defaults(training=NANO_KERNEL, search=dict(selection="topk", budget=0.75))

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        E = shape.embed_dim
        if settings.fractions is None:
            counts = {*range(STEP, E + 1, STEP), E}
        else:
            counts = {channel_count(E, fraction) for fraction in settings.fractions}
        return {"channels": tuple(sorted(counts, reverse=True))}, []

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        channels = kept_channels(whole(picks, "channels", 1), shape.embed_dim, kept)
        return BlockSlice(shape.embed_dim, shape.num_heads, shape.hidden, mlp_stream=channels)
