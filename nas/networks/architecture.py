"""An architecture and its network: made of one candidate per choice and block, and read back as slices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nas.machine.distributed import is_main
from nas.networks.basis_file import streams_of
from search_spaces.architecture import Architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.method import Picks, Settings, picks_of
from search_spaces.registry import METHODS, get_space
from search_spaces.slices import BlockShape, NetworkSlice, network_slice
from search_spaces.space import block_slices
from supernets.basis import install_stages
from supernets.compact import shrink
from supernets.supernet import Supernet


def architecture_of(
    supernet: Supernet,
    space: str,
    model: str,
    model_kwargs: Mapping[str, Any],
    picks: Sequence[Picks],
    width: str = "stream",
    kept: Sequence[Mapping[str, Sequence[int]]] | None = None,
    full_stage_width: bool = False,
) -> Architecture:
    """The architecture of one candidate per choice and block; stages as wide as their widest slice, unless asked.

    space: whose method the choices are of. model, model_kwargs: arguments of timm.create_model that make the
    supernet's backbone again. picks: {"alpha": 2} per block, in order. kept: where the method keeps no prefix, the
    indices per block, {"kept_channels": [0, 3, ...]}. Raises UserError when they do not fit.
    """
    method = get_space(space).method
    indices = kept if kept is not None else [{} for _ in picks]
    blocks = block_slices(space, method, Settings(width=width), supernet.shapes, picks, indices)
    subnet = network_slice(supernet.shapes, blocks, full_stage_width)
    entries = tuple(dict(pick) | {k: list(v) for k, v in own.items()} for pick, own in zip(picks, indices, strict=True))
    return Architecture(
        space=space,
        method=method.name,
        model=model,
        model_kwargs=model_kwargs,
        input_size=supernet.adapter.input_size,
        num_classes=int(supernet.backbone.num_classes),  # type: ignore[arg-type]
        width=width,
        stage_widths=subnet.stage_widths,
        blocks=entries,
        flops=supernet.flops(subnet),
        params=supernet.params(subnet),
        backbone_flops=supernet.flops(),
        backbone_params=supernet.params(),
    )


def write_architecture(arch: Architecture, folder: Path) -> None:
    """arch.json, by the process that writes."""
    if is_main():
        save_architecture(arch, folder / "arch.json")


def slices_of(arch: Architecture, shapes: tuple[BlockShape, ...]) -> NetworkSlice:
    """The subnet that an arch.json describes, over a backbone's blocks. UserError when they do not fit."""
    if arch.method not in METHODS:
        raise UserError(f"arch.json: unknown method {arch.method!r}; expected one of {', '.join(METHODS)}")
    method = METHODS[arch.method]
    for i, block in enumerate(arch.blocks):
        for name in method.choice_names:
            if name not in block:
                raise UserError(f"arch.json: field 'blocks[{i}].{name}' is missing; {arch.method} chooses it")
        for name in method.kept_names:
            if not isinstance(block.get(name), list):
                raise UserError(f"arch.json: field 'blocks[{i}].{name}' is missing; expected the indices kept")
    kept = [{k: v for k, v in block.items() if isinstance(v, list)} for block in arch.blocks]
    blocks = block_slices(
        arch.space,
        method,
        Settings(width=arch.width),
        shapes,
        [picks_of(block, method.choice_names) for block in arch.blocks],
        kept,
    )
    _check_stage_widths(arch, shapes, [b.stream for b in blocks])
    return NetworkSlice(tuple(blocks), arch.stage_widths)


def cut_down(backbone: nn.Module, arch: Architecture) -> nn.Module:
    """A timm model cut down to an architecture, in place: the modules of its compact network. Returns it."""
    supernet = Supernet(backbone)
    install_stages(supernet, streams_of(arch.basis))
    return shrink(supernet.backbone, slices_of(arch, supernet.shapes))


def _check_stage_widths(arch: Architecture, shapes: tuple[BlockShape, ...], streams: list[int]) -> None:
    stages = 1 + max(shape.stage for shape in shapes)
    if len(arch.stage_widths) != stages:
        raise UserError(
            f"arch.json: field 'stage_widths' has {len(arch.stage_widths)} entries, {arch.model} has {stages}"
        )
    for stage, width in enumerate(arch.stage_widths):
        blocks = [i for i, shape in enumerate(shapes) if shape.stage == stage]
        low, high = max(streams[i] for i in blocks), shapes[blocks[0]].embed_dim
        if not low <= width <= high:
            raise UserError(f"arch.json: field 'stage_widths[{stage}]' is {width}; expected {low} to {high}")
