"""The compact network: a subnet cut out into small dense tensors, in plain PyTorch.

It is the backbone's own timm model with smaller layers under the same names, so timm's forward,
forward_features and forward_intermediates work on it. Only a block whose slice is narrower than its stage, or
not a prefix, gets a forward of its own, and every block of a Swin (compact_swin.py).
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice
from supernets.adapter import adapter_for
from supernets.axes import block_parameters, num_heads, num_v, slice_block
from supernets.compact_swin import CompactWindowAttention
from supernets.elastic import split_heads


class CompactBlock(nn.Module):
    """A block that reads and writes part of the stream. Children keep the backbone's names.

    stream: leading channels it works on. mlp_index: those its MLP works on, None for the first mlp_stream.
    """

    norm1: Any
    attn: Any
    norm2: Any
    mlp: Any
    ls1: Any
    ls2: Any
    drop_path1: Any
    drop_path2: Any
    mlp_index: Tensor | None

    def __init__(self, block: Any, kept: BlockSlice) -> None:
        super().__init__()
        self.stream = kept.stream
        self.has_attn, self.has_mlp = kept.attn, kept.mlp
        for name, child in block.named_children():
            half_kept = kept.mlp if name.startswith(("norm2", "mlp", "ls2", "drop_path2")) else kept.attn
            if half_kept:
                setattr(self, name, child)
        self.mlp_stream = kept.num_mlp_stream()
        index = None if isinstance(kept.mlp_stream, int | None) else torch.tensor(kept.mlp_stream)
        self.register_buffer("mlp_index", index, persistent=False)

    def _mlp(self, z: Tensor) -> Tensor:
        """z plus the MLP of its channels of mlp_index, or of its first mlp_stream."""
        h, index = self.norm2(z), self.mlp_index
        if index is None:
            h = h[..., : self.mlp_stream]
        elif torch.compiler.is_compiling():
            h = h.index_select(-1, index)
        else:  # on a CPU a tenth of index_select's time
            h = h.gather(-1, index.expand(*h.shape[:-1], -1))
        y = self.mlp(h)
        y = self.drop_path2(self.ls2(y) if hasattr(self, "ls2") else y)
        if index is not None:
            return z.index_add(-1, index, y.to(z.dtype))
        R = self.mlp_stream
        return z + y if z.shape[-1] == R else torch.cat([z[..., :R] + y, z[..., R:]], dim=-1)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, E), Swin's (B, H, W, E)
        s = self.stream
        z = x[..., :s]
        if self.has_attn:
            y = self.attn(self.norm1(z))
            z = z + self.drop_path1(self.ls1(y) if hasattr(self, "ls1") else y)
        if self.has_mlp:
            z = self._mlp(z)
        return z if s == x.shape[-1] else torch.cat([z, x[..., s:]], dim=-1)


class UnevenAttention(nn.Module):
    """timm's Attention whose V is narrower than its Q and K (UVC, section 2.5)."""

    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    proj: Any
    proj_drop: Any

    def __init__(self, attn: Any) -> None:
        super().__init__()
        for name, child in attn.named_children():
            setattr(self, name, child)
        self.num_heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, attn.scale

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = split_heads(self.qkv(x), self.num_heads, self.head_dim)  # (B, H, N, D), v (B, H, N, V)
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = nn.functional.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, dropout_p=dropout_p, scale=self.scale
        )
        x = self.norm(x.transpose(1, 2).reshape(B, N, -1))
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


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
    """Cut a timm model down to a subnet, in place: its weights, its sizes and its attributes. Returns it."""
    adapter = adapter_for(model)
    for name, value in adapter.outer(subnet.stage_widths).items():
        assign(model, name, value)
    for name, shape, kept in zip(adapter.block_names, adapter.shapes, subnet.blocks, strict=True):
        _shrink_block(model, name, shape, kept, subnet.stage_widths[shape.stage])
    adapter.resize(subnet.stage_widths)
    return model


def _shrink_block(model: nn.Module, name: str, shape: BlockShape, kept: BlockSlice, stage_width: int) -> None:
    block: Any = model.get_submodule(name)
    for param, value in slice_block(block_parameters(block), shape, kept).items():
        assign(block, param, value)
    if kept.attn:
        attn = block.attn
        attn.num_heads = num_heads(kept)
        attn.attn_dim, attn.dim = num_heads(kept) * num_v(kept, shape), kept.stream
        if hasattr(attn, "window_size"):
            block.attn = CompactWindowAttention(block)
        elif num_v(kept, shape) != shape.head_dim:
            block.attn = UnevenAttention(attn)
    whole = kept.attn and kept.mlp and kept.mlp_stream is None
    whole = whole and not isinstance(block.attn, UnevenAttention | CompactWindowAttention)
    if kept.stream != stage_width or not whole:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, CompactBlock(block, kept))


def cut(backbone: nn.Module, subnet: NetworkSlice) -> nn.Module:
    """The compact network of a subnet: its own copies of the weights, independent of the backbone."""
    return shrink(copy.deepcopy(backbone), subnet)
