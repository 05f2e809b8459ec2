"""A run's images: the data set's three parts as batches, by the options."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from nas.data.augmentation import in_effect
from nas.data.datasets import DataSpec, Splits, open_splits
from nas.data.images import Images
from nas.data.listing import few
from nas.data.loader import eval_loader, mixup_fn, train_loader
from nas.data.options import DataOptions
from nas.data.split_names import held_out_words
from nas.data.transforms import LoaderSpec
from nas.machine.cores import usable_cores
from nas.machine.distributed import gather, rank, world_size
from search_spaces.errors import UserError
from supernets.supernet import Supernet

CALIBRATION_BATCH = 32  # whatever the run's own, so that a basis is the same for every number of processes


def open_data(options: DataOptions) -> Splits:
    """The dataset's three parts. Prints what a user is to be told of its files."""
    splits = open_splits(
        DataSpec(
            dataset=options.dataset_name(),
            data_dir=None if options.data_dir is None else str(options.data_dir),
            val_fraction=options.val_fraction,
            train_split=options.train_split,
            test_split=options.val_split,
            class_map=options.class_map,
            num_classes=(options.num_classes or None) if options.labels else None,
            download=options.download,
            labels=options.labels,
        )
    )
    for line in splits.remarks:
        print(line)
    return splits


@dataclass(frozen=True)
class Batching:
    """How batches are drawn. smoothing: of labels that mixup mixes. held_out: draw from the held-out part as well.

    apart: of the training images in the order of calibration so many, the first, are not trained on; a stream's are.
    trains: whether epochs are to come; where none are, the images need not make one batch.
    """

    size: int
    seed: int
    smoothing: float = 0.0
    held_out: bool = False
    apart: int = 0
    trains: bool = True


@dataclass(frozen=True)
class Loaders:
    """Batches of a run. val is None when nothing is held out, arch unless the held-out part trains the choices.

    calibration: of a seed, training images prepared as in evaluation, in the order that it draws; all in every process.

    deciding: of a seed, the held-out images likewise; None where nothing is held out.

    reported, held_out: what the images of test and of val are, in words.
    """

    train: Any
    val: Any
    test: Any
    arch: Any
    calibration: Callable[[int], Any]
    mixup: Any
    reported: str
    held_out: str
    deciding: Callable[[int], Any] | None = None

    def stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation that images are normalised with, (C, 1, 1) each, in [0, 1]."""
        mean, std = self.test.stats
        return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def unreadable(self) -> dict[str, str]:
        """The images that could not be read in the run so far, with the reason. {file: error}"""
        loaders = [loader for loader in (self.train, self.val, self.test, self.arch) if loader is not None]
        return {name: error for loader in loaders for name, error in loader.corrupt.files.items()}


def loader_spec(
    options: DataOptions, backbone: nn.Module, size: tuple[int, int, int], batch_size: int = 64
) -> LoaderSpec:
    """How images become batches for a backbone that reads (C, H, W): by its own timm configuration, and the options."""
    from timm.data import resolve_data_config

    own: dict[str, Any] = {name: getattr(options, name) for name in ("interpolation", "mean", "std")}
    for name in ("mean", "std"):
        if own[name] is not None and len(own[name]) not in (1, size[0]):
            raise UserError(f"--{name} has {len(own[name])} numbers; the network reads {size[0]} channels")
    data = resolve_data_config({"input_size": size} | own, model=backbone)
    embedded, augmented = options.dataset_name() == "digits", in_effect(options)
    return LoaderSpec(
        batch_size=batch_size,
        input_size=size,
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=options.crop_pct or (1.0 if max(size[1:]) <= 64 else data["crop_pct"]),
        workers=options.workers if options.workers is not None else (0 if embedded else min(4, usable_cores())),
        aa=augmented["aa"],
        no_aug=options.no_aug,
        hflip=augmented["hflip"],
        vflip=options.vflip,
        scale=augmented["scale"],
        ratio=options.ratio,
        train_crop_mode=options.train_crop_mode,
        train_interpolation=options.train_interpolation,
        color_jitter=augmented["color_jitter"],
        reprob=augmented["reprob"],
        remode=options.remode or "pixel",
        recount=options.recount,
        aug_repeats=options.aug_repeats,
        exif=options.exif,
    )


def make_loaders(
    options: DataOptions,
    batching: Batching,
    splits: Splits,
    supernet: Supernet,
    device: torch.device,
    seen_by: str | None = None,
) -> Loaders:
    """timm's transforms and loaders for the backbone's input size, mean and interpolation.

    seen_by: the weights that may have been trained on what is held out here, in words.
    """
    spec = loader_spec(options, supernet.backbone, supernet.adapter.input_size, batching.size)
    as_evaluated = replace(spec, batch_size=CALIBRATION_BATCH)
    shard: dict[str, Any] = {"spec": spec, "device": device, "rank": rank(), "world_size": world_size()}
    trained = shard | {"spec": spec if batching.trains else replace(spec, drop_last=False)}
    mixup = mixup_fn(
        max(splits.num_classes, 1),
        options.mixup or 0.0,
        options.cutmix or 0.0,
        options.cutmix_minmax,
        prob=1.0 if options.mixup_prob is None else options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        smoothing=batching.smoothing,
    )
    return Loaders(
        train=train_loader(without_first(splits.train, batching), seed=batching.seed, **trained),
        val=None if splits.val is None else eval_loader(splits.val, **shard),
        test=eval_loader(splits.test, **shard),
        arch=train_loader(splits.val, seed=batching.seed, **shard) if batching.held_out else None,
        calibration=lambda seed: eval_loader(shuffled(splits.train, seed), as_evaluated, device),
        mixup=mixup,
        reported=splits.reported,
        held_out=held_out_words(seen_by),
        deciding=None
        if splits.val is None
        else lambda seed: eval_loader(shuffled(splits.val, seed), as_evaluated, device),
    )


def shuffled(dataset: Any, seed: int) -> Any:
    """The same images in an order drawn from the seed; a stream as it comes."""
    if not isinstance(dataset, Images):
        return dataset
    order = np.random.default_rng(seed).permutation(len(dataset))
    return Images(dataset.source, dataset.indices[order])


def without_first(dataset: Any, batching: Batching) -> Any:
    """The training images that are trained on, in their own order."""
    if not batching.apart or not isinstance(dataset, Images):
        return dataset
    return Images(dataset.source, np.sort(shuffled(dataset, batching.seed).indices[batching.apart :]))


def data_line(options: DataOptions, splits: Splits, loaders: Loaders, trains: bool) -> str:
    """Which images do what in a run. trains: whether epochs are to come, between which held-out images decide."""
    words = [f"{'trains on' if trains else 'reads'} {loaders.train.num_images:,} images"]
    what = "decides on" if trains else "measures on"
    words += [] if loaders.val is None else [f"{what} {loaders.val.num_images:,} {loaders.held_out}"]
    words += [f"reports on the {loaders.reported} ({loaders.test.num_images:,} images)"]
    labels = f"{splits.num_classes} classes" if splits.num_classes else "without labels"
    return f"{options.dataset_name()}, {labels}: {', '.join(words)}"


def report_unreadable(loaders: Loaders) -> int:
    """Say how many images could not be read, and name a few."""
    files = {name: error for found in gather(loaders.unreadable()) for name, error in found.items()}
    if files:
        print(f"{len(files)} images could not be read and were left out: {few(list(files))} (each is in the log)")
    return len(files)
