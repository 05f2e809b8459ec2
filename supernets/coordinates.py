"""The parameters of a compact network, from those of a backbone whose streams stand in a rotated basis (section 2.7).

A stage of a compact network has its stream in one of three coordinates:

    own      timm's: no block leaves a channel out, and the rotation is undone
    plain    narrower, and the same for all of its blocks: the live directions are laid into the channels by an isometry
             orthogonal to (1, ..., 1), in which timm's own norm computes what the supernet's did
    prefix   blocks work on different prefixes, or on subsets: the rotated channels as they are, under RMS norms

But in prefix coordinates, norms' weights and LayerScale go into the matrices beside them, as they do when a backbone is
rotated. What a norm adds goes into its readers' biases, or stays the norm's where they have none.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_spaces.slices import NetworkSlice
from supernets.adapter import Adapter
from supernets.axes import slice_block
from supernets.flops import whole_stages
from supernets.rotated import STREAMS, StemLayer, StemNorm, StreamNorm, replace_module
from supernets.streams import Reading, readings, scalings, stage_is_centred, stream_axes

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Coordinates:
    """Those of one rotated stage. matrix (w, w): from the rotated channels, float64; None: the channels themselves."""

    width: int
    own: bool
    matrix: Tensor | None

    def change(self, t: Tensor, dim: int, quadrants: bool = False) -> Tensor:
        """A parameter whose axis `dim` is the stream, or four tokens of it side by side."""
        if self.matrix is None:
            return t
        moved = t.double().movedim(dim, -1)
        if quadrants:
            moved = (moved.unflatten(-1, (4, self.width)) @ self.matrix.T).flatten(-2)
        else:
            moved = moved @ self.matrix.T
        return moved.movedim(-1, dim)


def isometry(width: int) -> Tensor:
    """(w, w) orthogonal, float64, whose first column is constant: the reflection that moves the first axis there."""
    normal = torch.full((width,), -1 / math.sqrt(width), dtype=torch.float64)
    normal[0] += 1
    length = torch.linalg.vector_norm(normal)
    unit = normal / length if width > 1 else normal
    return torch.eye(width, dtype=torch.float64) - 2 * torch.outer(unit, unit)


def coordinates(adapter: Adapter, subnet: NetworkSlice) -> dict[int, Coordinates]:
    """Of every rotated stage."""
    whole, found = whole_stages(adapter.shapes, subnet), {}
    for stage, rotation in adapter.streams.items():
        width = subnet.stage_widths[stage]
        blocks = [kept for shape, kept in zip(adapter.shapes, subnet.blocks, strict=True) if shape.stage == stage]
        matrix = None
        if stage in whole:
            matrix = rotation.double().T
        elif all(kept.stream == width and kept.mlp_stream is None for kept in blocks):
            plain = isometry(width) if stage_is_centred(adapter, stage) else torch.eye(width, dtype=torch.float64)
            matrix = plain.to(rotation.device)
        found[stage] = Coordinates(width, stage in whole, matrix)
    return found


def compact_parameters(adapter: Adapter, subnet: NetworkSlice) -> Tensors:
    """Every parameter of the compact network by its name, in the coordinates of its stages."""
    values = adapter.outer(subnet.stage_widths)
    for name, block, shape, kept in zip(
        adapter.block_names, adapter.blocks(), adapter.shapes, subnet.blocks, strict=True
    ):
        own = slice_block(adapter.block_parameters(block), adapter.block_axes, shape, kept)
        values |= {f"{name}.{leaf}": value for leaf, value in own.items()}
    values = adapter.joined(values)
    where = coordinates(adapter, subnet)
    if not where:
        return values  # timm's names and coordinates
    norms: Tensors = {}
    for reading in readings(adapter):
        if reading.stage in where and any(name in values for name in reading.matrices):
            norms |= _fold_norm(adapter, reading, where[reading.stage], values)
    for scaling in scalings(adapter):
        at = where.get(scaling.stage)
        if at is not None and at.matrix is not None and scaling.gamma in values:
            gamma = values[scaling.gamma]
            for name in scaling.writers:
                values[name] = values[name].double() * (gamma if values[name].dim() == 1 else gamma[:, None])
            values[scaling.gamma] = torch.ones_like(gamma)
    axes = stream_axes(adapter)
    if adapter.stem_norm is not None:
        axes[f"{adapter.stem_norm}.rotation"] = {0: ("S", 0)}
    for name, dims in axes.items():
        for dim, (letters, stage) in dims.items():
            if name in values and stage in where:
                values[name] = where[stage].change(values[name], dim, letters == "4S")
    values |= norms
    if 0 in where and adapter.stem_norm is not None:
        values = _stem_names(adapter.stem_norm, values, where[0].own)
    return values


def _fold_norm(adapter: Adapter, reading: Reading, at: Coordinates, values: Tensors) -> Tensors:
    """Fold a norm's weight, and its scale over a slice, into its readers, in `values`; returns what the norm becomes.

    Its bias goes into those of the readers where they have one and read nothing else; in timm's own coordinates it
    stays, so that it can be taken up again. In prefix coordinates only the scale goes, into the norm's weight.
    """
    module, name = adapter.backbone.get_submodule(reading.norm), f"{reading.norm}.weight"
    assert isinstance(module, StreamNorm)
    weight, bias = values[name].double(), values.get(f"{reading.norm}.bias")
    weight = weight * math.sqrt(len(module.weight) / len(weight))
    if at.matrix is None:
        return {name: weight} | ({} if bias is None else {f"{reading.norm}.bias": bias})
    norm = {name: torch.ones_like(weight)}
    if bias is not None and not at.own and reading.folded and all(b in values for b in reading.biases):
        for matrix, reader in zip(reading.matrices, reading.biases, strict=True):
            values[reader] = values[reader].double() + values[matrix].double() @ bias.double()
        norm[f"{reading.norm}.bias"] = torch.zeros_like(weight)
    elif bias is not None:
        norm[f"{reading.norm}.bias"] = at.change(bias.double() / weight, 0, reading.quadrants)
    for matrix in reading.matrices:
        values[matrix] = values[matrix].double() * weight
    return norm


def settle_norms(adapter: Adapter, subnet: NetworkSlice) -> None:
    """Put the norms of the compact network in place of those of the rotated backbone, and take its rotations away.

    Their parameters are of no account yet, but for which are frozen: those of `compact_parameters` follow, those of a
    stem's layer among them, which is trained where the norm before it is.
    """
    model, where = adapter.backbone, coordinates(adapter, subnet)
    for reading in readings(adapter):
        module = model.get_submodule(reading.norm)
        if reading.stage in where and isinstance(module, StreamNorm):
            kept = None if reading.block is None else subnet.blocks[reading.block]
            width = subnet.stage_widths[reading.stage] if kept is None else kept.stream
            plain = module.plain(4 * width if reading.quadrants else width)
            replace_module(
                model,
                reading.norm,
                plain if where[reading.stage].matrix is not None else StreamNorm(plain, reading.quadrants),
            )
    if 0 in where and adapter.stem_norm is not None:
        stem = model.get_submodule(adapter.stem_norm)
        assert isinstance(stem, StemNorm)
        norm = stem.plain()
        if not where[0].own:
            layer = nn.Linear(stem.rotation.shape[1], where[0].width, bias=False).to(stem.rotation)
            norm = StemLayer(norm, layer.requires_grad_(stem.weight.requires_grad))
        replace_module(model, adapter.stem_norm, norm)
    if hasattr(model, STREAMS):
        delattr(model, STREAMS)


def _stem_names(stem: str, values: Tensors, own: bool) -> Tensors:
    """The values with those of a stem's norm under the names of its layer; without a rotation where it is undone."""
    renamed = {}
    for name, value in values.items():
        if name == f"{stem}.rotation":
            if not own:
                renamed[f"{stem}.linear.weight"] = value
        elif name.startswith(f"{stem}.") and not own:
            renamed[f"{stem}.norm.{name.removeprefix(f'{stem}.')}"] = value
        else:
            renamed[name] = value
    return renamed
