"""A run's images: the data set's three parts as batches, by the options."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nas.config import Common
from nas.data.datasets import DataSpec, Splits, open_splits
from nas.data.folders import few
from nas.data.loader import eval_loader, mixup_fn, train_loader
from nas.data.split_names import held_out_words
from nas.data.transforms import LoaderSpec
from nas.machine.distributed import gather, rank, world_size
from search_spaces.errors import UserError
from supernets.supernet import Supernet


def open_data(config: Common) -> Splits:
    """The dataset's three parts."""
    return open_splits(
        DataSpec(
            dataset=dataset_of(config),
            data_dir=None if config.data_dir is None else str(config.data_dir),
            val_fraction=config.val_fraction,
            train_split=config.train_split,
            test_split=config.val_split,
            class_map=config.class_map,
            num_classes=config.num_classes,
            download=config.download,
        )
    )


def dataset_of(config: Common) -> str:
    """The dataset's name; the embedded digits unless something else is asked for."""
    return config.dataset or ("digits" if config.data_dir is None else "folder")


@dataclass(frozen=True)
class Loaders:
    """Batches of a run. val is None when nothing is held out, arch unless the held-out part trains the choices.

    reported, held_out: what the images of test and of val are, in words.
    """

    train: Any
    val: Any
    test: Any
    arch: Any
    mixup: Any
    reported: str
    held_out: str

    def stats(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation that images are normalised with, (C, 1, 1) each, in [0, 1]."""
        mean, std = self.test.stats
        return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def unreadable(self) -> dict[str, str]:
        """The images that could not be read in the run so far, with the reason. {file: error}"""
        loaders = [loader for loader in (self.train, self.val, self.test, self.arch) if loader is not None]
        return {name: error for loader in loaders for name, error in loader.corrupt.files.items()}


def loader_spec(config: Common, backbone: nn.Module, size: tuple[int, int, int]) -> LoaderSpec:
    """How images become batches for a backbone that reads (C, H, W): by its own timm configuration, and the options."""
    from timm.data import resolve_data_config

    own: dict[str, Any] = {name: getattr(config, name) for name in ("interpolation", "mean", "std")}
    for name in ("mean", "std"):
        if own[name] is not None and len(own[name]) not in (1, size[0]):
            raise UserError(f"--{name} has {len(own[name])} numbers; the network reads {size[0]} channels")
    data = resolve_data_config({"input_size": size} | own, model=backbone)
    embedded = dataset_of(config) == "digits"
    return LoaderSpec(
        batch_size=config.batch_size or 64,
        input_size=size,
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=config.crop_pct or (1.0 if size[1] <= 64 else data["crop_pct"]),
        workers=config.workers if config.workers is not None else (0 if embedded else min(4, os.cpu_count() or 1)),
        aa=None if config.aa in (None, "none") else config.aa,
        no_aug=config.no_aug,
        hflip=0.5 if config.hflip is None else config.hflip,
        vflip=config.vflip,
        scale=config.scale or (0.08, 1.0),
        ratio=config.ratio,
        train_interpolation=config.train_interpolation,
        color_jitter=0.4 if config.color_jitter is None else config.color_jitter,
        reprob=config.reprob or 0.0,
        remode=config.remode or "pixel",
        recount=config.recount,
        aug_repeats=config.aug_repeats,
    )


def make_loaders(
    config: Common,
    splits: Splits,
    supernet: Supernet,
    device: torch.device,
    arch_data: str = "train",
    seen_by: str | None = None,
) -> Loaders:
    """timm's transforms and loaders for the backbone's input size, mean and interpolation.

    arch_data "val" asks for training batches of the held-out part too, for the architecture parameters. seen_by: the
    weights that may have been trained on what is held out here, in words.
    """
    spec = loader_spec(config, supernet.backbone, supernet.adapter.input_size)
    make_train = partial(train_loader, spec=spec, seed=config.seed, device=device, rank=rank(), world_size=world_size())
    make_eval = partial(eval_loader, spec=spec, device=device, rank=rank(), world_size=world_size())
    mixup = mixup_fn(
        splits.num_classes,
        config.mixup or 0.0,
        config.cutmix or 0.0,
        config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        smoothing=config.smoothing or 0.0,
    )
    return Loaders(
        train=make_train(splits.train),
        val=None if splits.val is None else make_eval(splits.val),
        test=make_eval(splits.test),
        arch=make_train(splits.val) if arch_data == "val" else None,
        mixup=mixup,
        reported=splits.reported,
        held_out=held_out_words(seen_by),
    )


def data_line(config: Common, splits: Splits, loaders: Loaders) -> str:
    """Which images do what in a run."""
    words = [f"trains on {loaders.train.num_images:,} images"]
    words += [] if loaders.val is None else [f"decides on {loaders.val.num_images:,} {loaders.held_out}"]
    words += [f"reports on the {loaders.reported} ({loaders.test.num_images:,} images)"]
    return f"{dataset_of(config)}, {splits.num_classes} classes: {', '.join(words)}"


def report_unreadable(loaders: Loaders) -> int:
    """Say how many images could not be read, and name a few."""
    files = {name: error for found in gather(loaders.unreadable()) for name, error in found.items()}
    if files:
        print(f"{len(files)} images could not be read and were left out: {few(list(files))} (each is in the log)")
    return len(files)
