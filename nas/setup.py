"""From options to the pieces of a run: device, data, supernet, space, optimisers."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.backbone import Start, build, check_family, starting_backbone
from nas.checkpoint import write_text
from nas.config import Common, parse_key_values
from nas.data import eval_loader, mixup_fn, train_loader
from nas.datasets import DataSpec, Splits, open_splits
from nas.distributed import gather, is_main, local_device, mean_gradients, on_main, rank, world_size
from nas.folders import few
from nas.loop import seed_everything
from nas.losses import cross_entropy
from nas.split_names import held_out_words
from nas.tensorboard import writer_class
from nas.transforms import LoaderSpec
from search_spaces.errors import UserError
from search_spaces.method import FRACTIONS, Settings
from search_spaces.registry import Space
from search_spaces.space import SearchSpace, make_space
from supernets.importance import magnitude_scores, orders_of, permute, taylor_pass
from supernets.supernet import Supernet

TAYLOR_BATCHES = 8


def check_common(config: Common) -> None:
    """Refuse option values that no run can use."""
    for name in ("epochs", "batch_size", "grad_accum_steps", "recount", "num_classes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1")
    rates = ("lr", "weight_decay", "min_lr", "warmup_lr", "opt_eps")
    counts = ("warmup_epochs", "cooldown_epochs", "keep", "aug_repeats")
    for name in (*rates, *counts, "mixup", "cutmix"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected 0 or more")
    for name in ("val_fraction", "smoothing", "reprob", "drop_path"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected a share from 0 to below 1")
    for name in ("hflip", "vflip", "mixup_prob", "mixup_switch_prob"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected a probability from 0 to 1")
    for name in ("decay_epochs", "decay_rate", "layer_decay", "clip_grad", "crop_pct"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected more than 0")
    for name in ("ratio", "scale", "cutmix_minmax"):
        value = getattr(config, name)
        if value is not None and not 0 < value[0] <= value[1]:
            raise UserError(f"--{name.replace('_', '-')} {value[0]} {value[1]}; expected two numbers, 0 < low <= high")
    mixes = bool(config.mixup or config.cutmix or config.cutmix_minmax)
    if mixes and (config.batch_size or 64) % 2:
        raise UserError(f"--batch-size {config.batch_size}: mixup pairs the images of a batch; give an even number")
    if config.tensorboard:
        writer_class()


def pick_device(config: Common) -> torch.device:
    """The device, with torch's threads set when asked."""
    if config.threads is not None:
        if config.threads < 1:
            raise UserError(f"--threads {config.threads}; expected at least 1")
        torch.set_num_threads(config.threads)
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}; expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu")
    return local_device(device)


def model_of(config: Common, space: Space) -> tuple[str, dict[str, Any]]:
    """timm name and constructor arguments: the space's own unless --model names another."""
    own = dict(space.model_kwargs) if config.model is None else {}
    return config.model or space.model, own | parse_key_values(config.model_kwargs)


def meta_supernet(model: str, model_kwargs: dict[str, Any], num_classes: int, space: Space) -> Supernet:
    """The supernet on the meta device: shapes and costs without weights, in a moment."""
    with torch.device("meta"):
        backbone = build(model, model_kwargs, num_classes=num_classes)
    check_family(backbone, space.family, model)
    return Supernet(backbone)


def search_space(
    space: Space,
    supernet: Supernet,
    width: str,
    alphas: Sequence[int] | None,
    fractions: tuple[float, ...] | None = FRACTIONS,
) -> SearchSpace:
    """The space over a supernet's blocks. fractions: as in Settings."""
    settings = Settings(width, tuple(alphas) if alphas is not None else space.alphas, fractions)
    return make_space(space.name, space.method, settings, supernet.shapes)


def start_of(config: Common) -> Start:
    """Where the weights start."""
    return Start(bool(config.pretrained) and config.checkpoint is None, config.checkpoint, config.seed)


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


def amp_dtype(config: Common, device: torch.device) -> torch.dtype | None:
    """The autocast type; None for float32."""
    if not config.amp:
        return None
    if config.amp_dtype == "float16" and device.type != "cuda":
        raise UserError(f"--amp-dtype float16 needs CUDA (device is {device}); use bfloat16")
    return torch.bfloat16 if config.amp_dtype == "bfloat16" else torch.float16


def make_supernet(
    arguments: tuple[str, dict[str, Any]],
    splits: Splits,
    start: Start,
    space: Space,
    drop_path: float | None,
    device: torch.device,
) -> tuple[Supernet, list[str], bool]:
    """The supernet of a (model, model_kwargs) with its starting weights, on the device.

    Also what is worth saying about the weights, and whether the classifier is new.
    """
    backbone, lines, fresh = starting_backbone(*arguments, splits.num_classes, start, splits.class_names, drop_path)
    check_family(backbone, space.family, arguments[0])
    return Supernet(backbone).to(device), lines, fresh


def report_unreadable(loaders: Loaders) -> int:
    """Say how many images could not be read, and name a few."""
    files = {name: error for found in gather(loaders.unreadable()) for name, error in found.items()}
    if files:
        print(f"{len(files)} images could not be read and were left out: {few(list(files))} (each is in the log)")
    return len(files)


def order_by_importance(
    config: Common,
    supernet: Supernet,
    loader: Any,
    device: torch.device,
    *,
    trained: bool,
    fresh_classifier: bool,
) -> dict[str, list[int]]:
    """Sort the supernet in place (section 2.7) and return the permutation; empty when there is none.

    The order is written down before it is applied: a resume loads it and never computes it again.
    """
    kind = config.importance
    if kind is None:
        kind = "none" if not trained else "magnitude" if fresh_classifier else "taylor"
    if kind == "none":
        return {}
    assert config.output is not None
    path = config.output / "permutation.json"
    if config.resume and path.is_file():
        orders: dict[str, list[int]] = json.loads(path.read_text())
    else:
        if kind == "magnitude":
            scores = magnitude_scores(supernet)
        else:
            seed_everything(config.seed, -1)
            loader.set_epoch(0)
            batches = [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, TAYLOR_BATCHES)]
            scores = taylor_pass(supernet, batches, cross_entropy, mean_gradients)
        orders = on_main(lambda: orders_of(scores))
        if is_main():
            write_text(path, json.dumps(orders))
    permute(supernet, orders)
    print(f"heads, neurons and channels sorted by importance ({kind})")
    return orders


def results_path(folder: Path) -> str:
    """A path as the user may type it."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)
