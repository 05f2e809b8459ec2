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
from nas.data import LoaderSpec, eval_loader, mixup_fn, train_loader
from nas.datasets import DataSpec, Splits, open_splits
from nas.loop import seed_everything
from nas.losses import cross_entropy
from search_spaces.errors import UserError
from search_spaces.method import FRACTIONS, Settings
from search_spaces.registry import Space
from search_spaces.space import SearchSpace, make_space
from supernets.importance import magnitude_scores, orders_of, permute, taylor_pass
from supernets.supernet import Supernet

TAYLOR_BATCHES = 8


def check_common(config: Common) -> None:
    """Refuse option values that no run can use."""
    for name in ("epochs", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1")
    for name in ("lr", "weight_decay", "mixup", "cutmix", "warmup_epochs", "warmup_lr", "min_lr"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected 0 or more")
    for name in ("val_fraction", "smoothing", "reprob", "drop_path", "hflip"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1 and not (name == "hflip" and value == 1):
            raise UserError(f"--{name.replace('_', '-')} {value}; expected a share from 0 to below 1")


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
    return device


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


def open_data(config: Common, space: Space) -> Splits:
    """The dataset's three parts."""
    return open_splits(
        DataSpec(
            dataset=dataset_of(config),
            data_dir=None if config.data_dir is None else str(config.data_dir),
            val_fraction=config.val_fraction,
            class_map=config.class_map,
            download=config.download,
        )
    )


def dataset_of(config: Common) -> str:
    """The dataset's name; the embedded digits unless something else is asked for."""
    return config.dataset or ("digits" if config.data_dir is None else "folder")


@dataclass(frozen=True)
class Loaders:
    """Batches of a run. val is None when nothing is held out."""

    train: Any
    val: Any
    test: Any
    arch: Any
    mixup: Any


def make_loaders(config: Common, splits: Splits, supernet: Supernet, device: torch.device) -> Loaders:
    """timm's transforms and loaders for the backbone's input size, mean and interpolation."""
    from timm.data import resolve_data_config

    size = supernet.adapter.input_size
    data = resolve_data_config({"input_size": size}, model=supernet.backbone)
    embedded = dataset_of(config) == "digits"
    spec = LoaderSpec(
        batch_size=config.batch_size or 64,
        input_size=size,
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        crop_pct=1.0 if size[1] <= 64 else data["crop_pct"],
        workers=config.workers if config.workers is not None else (0 if embedded else min(4, os.cpu_count() or 1)),
        aa=None if config.aa in (None, "none") else config.aa,
        hflip=0.5 if config.hflip is None else config.hflip,
        scale=config.scale or (0.08, 1.0),
        color_jitter=0.4 if config.color_jitter is None else config.color_jitter,
        reprob=config.reprob or 0.0,
        remode=config.remode or "pixel",
    )
    make_train = partial(train_loader, spec=spec, seed=config.seed, device=device)
    make_eval = partial(eval_loader, spec=spec, device=device)
    mixup = mixup_fn(splits.num_classes, config.mixup or 0.0, config.cutmix or 0.0, smoothing=config.smoothing or 0.0)
    return Loaders(
        train=make_train(splits.train),
        val=None if splits.val is None else make_eval(splits.val),
        test=make_eval(splits.test),
        arch=None if splits.val is None else make_train(splits.val),
        mixup=mixup,
    )


def make_optimizer(config: Common, backbone: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser on the backbone, its no_weight_decay names respected."""
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(  # type: ignore[no-any-return]
            backbone,
            opt=config.opt or "adamw",
            lr=config.lr,
            weight_decay=config.weight_decay or 0.0,
            momentum=config.momentum,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--opt {config.opt}: timm cannot make this optimiser ({error})") from None


def make_scheduler(config: Common, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Any:
    """timm's schedule, stepped at every update; None for a constant rate."""
    from timm.scheduler import create_scheduler_v2

    if config.sched in (None, "none"):
        return None
    assert config.epochs is not None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            min_lr=config.min_lr or 0.0,
            warmup_lr=1e-6 if config.warmup_lr is None else config.warmup_lr,
            warmup_epochs=min(config.warmup_epochs or 0, max(config.epochs - 1, 0)),
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"--sched {config.sched}: timm cannot make this schedule ({error})") from None
    if scheduler is None:
        raise UserError(f"--sched {config.sched}; expected cosine, step, multistep, plateau, poly, tanh or none")
    return scheduler


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
            scores = taylor_pass(supernet, batches, cross_entropy)
        orders = orders_of(scores)
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
