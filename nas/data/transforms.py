"""From a decoded image to a tensor: timm's transforms, at magnitudes that the installed Pillow takes too."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from search_spaces.errors import UserError, reason


@dataclass(frozen=True)
class LoaderSpec:
    """How images become batches. Names and defaults are those of timm's train.py."""

    batch_size: int  # of one rank
    input_size: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"  # of evaluation
    crop_pct: float = 0.875  # of the evaluation's centre crop
    workers: int = 0
    no_aug: bool = False  # resize and centre crop only
    aa: str | None = None  # AutoAugment, RandAugment or AugMix policy; replaces colour jitter
    hflip: float = 0.5
    vflip: float = 0.0
    scale: tuple[float, float] = (0.08, 1.0)  # area of the random resized crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # and its aspect
    color_jitter: float | None = 0.4
    train_crop_mode: str | None = None  # rrc, rkrc or rkrr
    train_interpolation: str = "random"
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    aug_repeats: int = 0  # repeated augmentation: versions of an image in a global batch
    drop_last: bool = True  # leave out an epoch's last, incomplete global batch
    exif: bool = True  # turn images as their EXIF data says

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.workers < 0 or self.aug_repeats < 0:
            raise UserError(
                f"batch size {self.batch_size}, workers {self.workers}, aug repeats {self.aug_repeats}: "
                "must be at least 1, 0 and 0"
            )
        if self.input_size[0] not in (1, 3):
            raise UserError(f"the network reads {self.input_size[0]} channels; images have 3, or 1 made grey")

    def stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the input's channels, (C,) each."""
        from timm.data.loader import adapt_to_chs

        return adapt_to_chs(self.mean, self.input_size[0]), adapt_to_chs(self.std, self.input_size[0])


class TransformError(Exception):
    """A step of a transform failed on an image. The message says which step, and why."""


class Transform:
    """timm's transform of an RGB image: to bytes (C, H, W), or to normalised floats.

    doing: what it is for, as a message about it says. Raises UserError when made of a malformed augmentation,
    TransformError when a step fails on an image.
    """

    def __init__(self, spec: LoaderSpec, is_training: bool, as_bytes: bool) -> None:
        self.doing = "augmenting" if is_training and not spec.no_aug else "preparing"
        grey = [_to_grey] if spec.input_size[0] == 1 else []
        self.steps: list[Callable[[Any], Any]] = [*grey, *_timms(spec, is_training, as_bytes).transforms]
        for op in policy_ops(self.steps):
            _mend(op)

    def __call__(self, image: Image.Image) -> Tensor:
        made: Any = image
        for step in self.steps:
            try:
                made = step(made)
            except Exception as error:
                name = getattr(step, "__name__", type(step).__name__)
                raise TransformError(f"{name}: {type(error).__name__}: {reason(error)}") from error
        return made  # type: ignore[no-any-return]


def _timms(spec: LoaderSpec, is_training: bool, as_bytes: bool) -> Any:
    from timm.data import create_transform

    mean, std = spec.stats()
    try:
        return create_transform(
            spec.input_size,
            is_training=is_training,
            no_aug=spec.no_aug,
            scale=spec.scale,
            ratio=spec.ratio,
            train_crop_mode=spec.train_crop_mode,
            hflip=spec.hflip,
            vflip=spec.vflip,
            color_jitter=spec.color_jitter or None,  # a jitter of 0 does nothing, slowly
            auto_augment=spec.aa,
            interpolation=spec.train_interpolation if is_training else spec.interpolation,
            mean=mean,
            std=std,
            crop_pct=spec.crop_pct,
            re_prob=spec.reprob,
            re_mode=spec.remode,
            re_count=spec.recount,
            use_prefetcher=as_bytes,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"timm refuses this augmentation ({type(error).__name__}: {error}): aa {spec.aa}, "
            f"remode {spec.remode}, interpolation {spec.train_interpolation} and {spec.interpolation}"
        ) from error


def policy_ops(steps: list[Callable[[Any], Any]]) -> Iterator[Any]:
    """Every AugmentOp of the AutoAugment, RandAugment and AugMix policies among a transform's steps."""
    from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment

    for step in steps:
        if isinstance(step, AutoAugment):
            for ops in step.policy:
                yield from ops
        elif isinstance(step, RandAugment | AugMixAugment):
            yield from step.ops


def _mend(op: Any) -> None:
    """Let an op of timm's do the least it can where the policy asks for less than that."""
    from timm.data import auto_augment

    if op.aug_fn is auto_augment.posterize:
        op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's posterize, keeping at least one bit.

    The strongest magnitudes ask for 0 bits (with mmax above 10 for fewer). Pillow refuses that from 13 on, and made
    a black image of it before; one bit is the fewest that every version keeps.
    """
    from timm.data import auto_augment

    return auto_augment.posterize(image, max(1, bits_to_keep), **options)  # type: ignore[no-any-return]


def _to_grey(image: Image.Image) -> Image.Image:
    return image.convert("L")
