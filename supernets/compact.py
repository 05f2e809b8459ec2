"""The compact network: a subnet cut out into small dense tensors, in plain PyTorch.

It is the backbone's own timm model with smaller layers under the same names, so timm's forward,
forward_features and forward_intermediates work on it. Only a block whose slice is narrower than its stage, or
not a prefix, gets a forward of its own (compact_block.py), and every block of a Swin (compact_swin.py).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice
from supernets.adapter import Adapter
from supernets.axes import head_widths
from supernets.compact_block import CompactBlock, SkippedBlock
from supernets.coordinates import compact_parameters, settle_norms
from supernets.families import adapter_for
from supernets.feature_head import feature_head


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace one parameter by an independent copy of `value` and bring its layer's sizes up to date."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    old = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(value.detach().clone().contiguous(), requires_grad=old.requires_grad))
    if leaf != "weight":
        return
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = value.shape
    elif isinstance(owner, nn.Conv2d):
        owner.out_channels = value.shape[0]
    elif hasattr(owner, "normalized_shape"):
        owner.normalized_shape = tuple(value.shape)


def shrink(model: nn.Module, subnet: NetworkSlice) -> nn.Module:
    """Cut a timm model down to a subnet, in place: its weights, its sizes and its attributes. Returns it.

    model: rotated or not (section 2.7), or a compact network itself, which becomes a smaller one. The compact network's
    norms are timm's either way, but for stages whose blocks work on different prefixes of a rotated stream.
    """
    adapter = adapter_for(model)
    with torch.no_grad():
        values = compact_parameters(adapter, subnet)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    settle_norms(adapter, subnet)
    default = next(iter(dtypes.values()))
    for name, value in values.items():
        assign(model, name, value.to(dtypes.get(name, default)))
    for name, shape, kept in zip(adapter.block_names, adapter.shapes, subnet.blocks, strict=True):
        _shrink_block(adapter, name, shape, kept, subnet.stage_widths[shape.stage])
    adapter.resize(subnet.stage_widths)
    head = feature_head(model)
    if head is not None:
        head[1].added = False
    return model


def _shrink_block(adapter: Adapter, name: str, shape: BlockShape, kept: BlockSlice, stage_width: int) -> None:
    parent, _, leaf = name.rpartition(".")
    owner: nn.Module = adapter.backbone.get_submodule(parent)
    if not kept.attn and not kept.mlp:
        setattr(owner, leaf, SkippedBlock())  # the others keep their names
        return
    block: Any = adapter.backbone.get_submodule(name)
    as_it_is = kept.attn and kept.mlp and kept.mlp_stream is None and kept.stream == stage_width
    as_it_is = as_it_is and not isinstance(block, CompactBlock)
    if kept.attn:
        attn = adapter.compact_attention(block, head_widths(kept, shape))
        as_it_is = as_it_is and attn is block.attn
        block.attn = attn
    if not as_it_is:
        setattr(owner, leaf, adapter.compact_block(block, adapter.block_axes, kept))


def cut(backbone: nn.Module, subnet: NetworkSlice) -> nn.Module:
    """The compact network of a subnet: its own copies of the weights, independent of the backbone."""
    return shrink(copy.deepcopy(backbone), subnet)
