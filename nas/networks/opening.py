"""A backbone opened: on the meta device, for shapes and costs, and with the weights that it starts from."""

from collections.abc import Sequence
from typing import Any

import torch

from nas.config import Common, parse_key_values
from nas.data.datasets import Splits
from nas.networks.backbone import Start, build, check_family, starting_backbone
from search_spaces.method import FRACTIONS, Settings
from search_spaces.registry import Space
from search_spaces.space import SearchSpace, make_space
from supernets.supernet import Supernet


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
