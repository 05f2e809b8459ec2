"""Options that were published or measured for a method or a family, and the one rule by which they combine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """Options of both stages (training) or of one: {option: value}, by their names in nas/config.py."""

    training: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Any] = field(default_factory=dict)


def combined(*parts: Defaults) -> Defaults:
    """Option by option the last part that has one: everybody's first, then the family's, then the method's."""
    joined = Defaults()
    for part in parts:
        joined = Defaults(
            dict(joined.training) | dict(part.training),
            dict(joined.search) | dict(part.search),
            dict(joined.retrain) | dict(part.retrain),
        )
    return joined


IMAGES = dict(calibration_images=2048, refit_images=2048)

# The backbone authors' augmentation (Swin and DeiT share it); 100 epochs of search on ImageNet-100, 50 on ImageNet.
AUTHORS = dict(aa="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, remode="pixel")
EVERYBODY = Defaults(
    training=dict(
        AUTHORS, opt="adamw", pretrained=True, sched="none", warmup_epochs=0, weight_decay=0.05, drop_path=0.1,
        **IMAGES,
    ),
    search=dict(epochs=100, arch_lr=1e-3),
    retrain=dict(epochs=50, train="adjoined", result="last"),
)  # fmt: skip

# From scratch on a few thousand small images, in minutes on two cores. The rate stays up during the search: nothing
# has to settle before the retrain, which starts from there.
EVERYBODY_NANO = Defaults(
    training=dict(
        pretrained=False, dataset="digits", opt="adamw", lr=2e-3, weight_decay=0.05, batch_size=64, sched="cosine",
        warmup_epochs=2, aa=None, mixup=0.0, cutmix=0.0, smoothing=0.1, reprob=0.0, hflip=0.0, color_jitter=0.0,
        scale=(0.8, 1.0), drop_path=0.0, **IMAGES,
    ),
    search=dict(epochs=15, sched="none", lr=1e-3, arch_lr=2e-2, budget=0.5),
    retrain=dict(epochs=30, warmup_epochs=1, train="adjoined", result="last"),
)  # fmt: skip

# Of a published recipe, what belongs to a network's size, a run's length and its machine: a flag may say otherwise.
SCALE = (
    "pretrained", "epochs", "batch_size", "lr", "min_lr", "warmup_lr", "warmup_epochs", "budget", "alphas", "amp",
    "model_ema_decay", "model_ema_warmup",
)  # fmt: skip

CROP_AND_FLIP = dict(hflip=0.5, scale=(0.08, 1.0))

# What the thesis ran (sections 2.1 and 2.2); rates and batches are the families'.
ADJOINED_PUBLISHED = Defaults(
    training=dict(
        AUTHORS, **CROP_AND_FLIP, opt="adamw", pretrained=True, sched="none", warmup_epochs=0, weight_decay=0.05,
        drop_path=0.1,
    ),
    search=dict(basis="none"),
    retrain=dict(
        basis="none", epochs=50, train="adjoined", result="last", kl_schedule="thesis", small_ce=0.0,
        adjoined_teacher="current",
    ),
)  # fmt: skip
