"""A block of the compact network where timm's own will not do: its slice is narrower than its stage, or no prefix."""

from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.slices import BlockSlice
from supernets.axes import BlockAxes


def not_scriptable(module: nn.Module) -> nn.Module:
    """What torch.jit.script asks a module for: a UserError, before its compiler fails on code it cannot read."""
    raise UserError(
        f"{type(module).__name__} is no TorchScript; export the compact network: python -m nas.export FOLDER writes"
        " ONNX and a torch.export program (docs/export.md)"
    )


class NoAttention:
    """What timm asks for in the attention of a block, where it changes the input size and the block has none."""

    rel_pos = None

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """There is no bias of positions."""


class SkippedBlock(nn.Identity):
    """In place of a block that is skipped whole: its input, whatever else blocks are handed."""

    attn = NoAttention()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
    ) -> Tensor:
        return x

    def set_input_size(self, *size: Any, **sizes: Any) -> None:
        """A skipped Swin block has no windows."""


class CompactBlock(nn.Module):
    """A block that reads and writes part of the stream, in timm's pre-norm order. Children keep the backbone's names.

    stream: leading channels it works on. mlp_index: those its MLP works on, None for the first mlp_stream.
    A family of another order overrides `attention_half` and `mlp_half`.
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

    __prepare_scriptable__ = not_scriptable

    def __init__(self, block: nn.Module, axes: BlockAxes, kept: BlockSlice) -> None:
        super().__init__()
        self.stream = kept.stream
        self.has_attn, self.has_mlp = kept.attn, kept.mlp
        for name, child in block.named_children():
            params = [f"{name}.{leaf}" for leaf, _ in child.named_parameters()]
            if not params or any(axes.has(param, kept) for param in params):
                setattr(self, name, child)
        for name, p in block.named_parameters(recurse=False):
            if axes.has(name, kept):
                self.register_parameter(name, p)
        if not kept.attn:
            self.attn = NoAttention()
        self.mlp_stream = kept.num_mlp_stream()
        index = None if isinstance(kept.mlp_stream, int | None) else torch.tensor(kept.mlp_stream)
        self.register_buffer("mlp_index", index, persistent=False)

    def attention_half(self, z: Tensor, **given: Any) -> Tensor:
        """What attention adds to the slice: (..., S) -> (..., S). given: what blocks are handed, as masks."""
        y: Tensor = self.attn(self.norm1(z), **given)
        return self.ls1(y) if hasattr(self, "ls1") else y

    def mlp_half(self, z: Tensor) -> Tensor:
        """What the MLP adds to the channels that it writes: (..., S) -> (..., R)."""
        y: Tensor = self.mlp(self.mlp_channels(self.norm2(z)))
        return self.ls2(y) if hasattr(self, "ls2") else y

    def mlp_channels(self, h: Tensor) -> Tensor:
        """(..., S) -> (..., R): the channels of mlp_index, or the first mlp_stream."""
        index = self.mlp_index
        if index is None:
            return h[..., : self.mlp_stream]
        if torch.compiler.is_compiling():
            return h.index_select(-1, index)
        return h.gather(-1, index.expand(*h.shape[:-1], -1))  # on a CPU a tenth of index_select's time

    def _add_mlp(self, z: Tensor) -> Tensor:
        y, index, R = self.drop_path2(self.mlp_half(z)), self.mlp_index, self.mlp_stream
        if index is not None:
            return z.index_add(-1, index, y.to(z.dtype))
        return z + y if z.shape[-1] == R else torch.cat([z[..., :R] + y, z[..., R:]], dim=-1)

    def forward(self, x: Tensor, **given: Any) -> Tensor:  # (B, N, E), Swin's (B, H, W, E)
        s = self.stream
        z = x[..., :s]
        if self.has_attn:
            z = z + self.drop_path1(self.attention_half(z, **given))
        if self.has_mlp:
            z = self._add_mlp(z)
        return z if s == x.shape[-1] else torch.cat([z, x[..., s:]], dim=-1)


class CompactLateBlock(CompactBlock):
    """A block whose norms end its halves."""

    def attention_half(self, z: Tensor, **given: Any) -> Tensor:
        return self.norm1(self.attn(z, **given))  # type: ignore[no-any-return]

    def mlp_half(self, z: Tensor) -> Tensor:
        return self.norm2(self.mlp(self.mlp_channels(z)))  # type: ignore[no-any-return]
