"""A backbone opened: on the meta device, for shapes and costs, and with the weights that it starts from."""

from collections.abc import Sequence
from typing import Any

import torch

from nas.networks.architecture import cut_down
from nas.networks.backbone import Start, TimmModel, build, check_family, starting_backbone
from nas.networks.key_values import parse_key_values
from nas.networks.options import NetworkOptions
from nas.networks.sources import source_of
from search_spaces.registry import Space
from supernets.supernet import Supernet


def model_of(options: NetworkOptions, space: Space) -> TimmModel:
    """The space's own model unless --model names another: one of timm's, or that of a folder or of the Hub."""
    source, given = source_of(options.model), parse_key_values(options.model_kwargs)
    if source is not None:
        return TimmModel(source.name, source.kwargs | given)
    own = dict(space.model_kwargs) if options.model is None else {}
    return TimmModel(options.model or space.model, own | given)


def start_of(options: NetworkOptions, seed: int) -> Start:
    """Where the weights start; those of a folder or of the Hub where --model names one."""
    checkpoint, pretrained = options.checkpoint, bool(options.pretrained)
    source = source_of(options.model) if pretrained and checkpoint is None else None
    if source is not None:
        checkpoint = source.folder
    return Start(pretrained and checkpoint is None, checkpoint, seed)


def meta_supernet(model: TimmModel, num_classes: int, space: Space) -> Supernet:
    """The supernet on the meta device: shapes and costs without weights, in a moment."""
    with torch.device("meta"):
        backbone = build(model.name, model.kwargs, num_classes=num_classes)
        check_family(backbone, space.family, model.name)
        return Supernet(backbone if model.cut is None else cut_down(backbone, model.cut))


def started_supernet(
    model: TimmModel,
    num_classes: int,
    start: Start,
    space: Space,
    class_names: Sequence[str] | None = None,
    drop_path: float | None = None,
) -> tuple[Supernet, list[str], bool]:
    """The supernet with its starting weights, what is worth saying about them, and whether the classifier is new."""
    arguments: tuple[Any, ...] = (model.name, model.kwargs, num_classes, start, class_names, drop_path, model.cut)
    backbone, lines, fresh = starting_backbone(*arguments)
    check_family(backbone, space.family, model.name)
    return Supernet(backbone), lines, fresh
