"""A backbone opened: on the meta device, for shapes and costs, and with the weights that it starts from."""

from collections.abc import Sequence
from typing import Any

import timm

from nas.networks.architecture import cut_down
from nas.networks.backbone import Start, TimmModel, build, check_family, on_meta, starting_backbone
from nas.networks.key_values import parse_key_values
from nas.networks.options import NetworkOptions
from nas.networks.sources import source_of
from search_spaces.errors import UserError
from search_spaces.registry import AUTO, Space
from supernets.families import adapter_for, families_of
from supernets.supernet import Supernet


def model_of(options: NetworkOptions, space: Space) -> TimmModel:
    """The space's own model unless --model names another: one of timm's, or that of a folder or of the Hub."""
    if options.model is not None:
        return named_model(options.model, options.model_kwargs)
    return TimmModel(space.model, dict(space.model_kwargs) | parse_key_values(options.model_kwargs))


def named_model(name: str, model_kwargs: tuple[str, ...]) -> TimmModel:
    """What --model and --model-kwargs name."""
    source, given = source_of(name), parse_key_values(model_kwargs)
    return TimmModel(name, given) if source is None else TimmModel(source.name, source.kwargs | given)


def settled_space(space: str, options: NetworkOptions) -> str:
    """`auto-METHOD` as that method's space of the family that --model is of; another name as it is.

    UserError where no model is named, or no family takes it.
    """
    if not space.startswith(AUTO):
        return space
    if options.model is None:
        raise UserError(f"--space {space} is a space of the family of --model; name a model, or a family's space")
    model = named_model(options.model, options.model_kwargs)
    with on_meta():
        backbone = build(model.name, model.kwargs, num_classes=1)
    adapter_for(backbone)  # or it is refused by name
    families = families_of(backbone)
    module = timm.model_entrypoint(model.name).__module__.rpartition(".")[2]  # DeiT's networks are of ViT's class
    return f"{module if module in families else families[0]}-{space.removeprefix(AUTO)}"


def start_of(options: NetworkOptions, seed: int) -> Start:
    """Where the weights start; those of a folder or of the Hub where --model names one."""
    checkpoint, pretrained = options.checkpoint, bool(options.pretrained)
    source = source_of(options.model) if pretrained and checkpoint is None else None
    if source is not None:
        checkpoint = source.folder
    return Start(pretrained and checkpoint is None, checkpoint, seed)


def meta_supernet(model: TimmModel, num_classes: int, space: Space) -> Supernet:
    """The supernet on the meta device: shapes and costs without weights, in a moment."""
    with on_meta():
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
