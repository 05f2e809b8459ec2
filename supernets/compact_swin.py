"""Swin's windowed attention as the compact network runs it: on a fixed input size, with as few copies as can be.

timm rolls twice per dimension, pads, partitions, copies the shift mask for every image, merges and rolls back. Here
the roll, the padding and the partition are one gather of tokens, and their reverse is another. B images, N = H*W
tokens, W windows, T tokens of a window, S stream, h heads, D and V their widths.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from supernets.axes import HeadWidths
from supernets.compact_block import CompactBlock, not_scriptable
from supernets.layers import by_width, join_heads, padded
from supernets.relative import CachedBias, relative_bias


class CompactWindowAttention(CachedBias):
    """timm's WindowAttention with the shift and the partition around it. Children keep timm's names.

    Plain windows are gathered as (B*W, T). Shifted ones as (B, T, W): then q, k and v become (B, W*h, T, D), one copy
    each, one mask of (1, W*h, T, T) applies to all images, and the output is a view. Heads whose V differ in width
    (section 2.5) run grouped by width, over windows gathered as (B*W, T).
    """

    qkv: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor
    fused_attn = True
    attn_mask: Tensor | None
    gather: Tensor | None
    scatter: Tensor | None

    # timm's, of the block and of its attention, over the attributes that they know by these names
    _calc_window_shift = SwinTransformerBlock._calc_window_shift
    get_attn_mask = SwinTransformerBlock.get_attn_mask
    set_window_size = WindowAttention.set_window_size
    __prepare_scriptable__ = not_scriptable

    def __init__(self, block: Any, heads: HeadWidths) -> None:
        """block: timm's SwinTransformerBlock or one that has such attention, cut, whose parameters are taken over."""
        super().__init__()
        attn = block.attn
        block = attn if isinstance(attn, CompactWindowAttention) else block
        for name, child in attn.named_children():
            if name != "softmax":
                setattr(self, name, child)
        for name, p in attn.named_parameters(recurse=False):
            self.register_parameter(name, p)
        self.num_heads, self.head_dim, self.scale = heads.number, heads.qk, attn.scale
        self.v_widths = None if isinstance(heads.v, int) else heads.v
        self.input_resolution, self.always_partition = block.input_resolution, block.always_partition
        self.window_size, self.window_area = block.window_size, block.window_area
        self.shift_size, self.target_shift_size = block.shift_size, block.target_shift_size
        self.register_buffer("relative_position_index", attn.relative_position_index, persistent=False)
        self._place_windows(block.attn_mask)

    @property
    def heads(self) -> HeadWidths:
        """As the layers are now: a pruner that cuts them sets num_heads and head_dim, as in timm's attention."""
        return HeadWidths(self.num_heads, self.head_dim, self.v_widths or self.proj.in_features // self.num_heads)

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """timm's block method: another feature map and window; the table of relative positions is interpolated."""
        self.input_resolution = feat_size
        if always_partition is not None:
            self.always_partition = always_partition
        window_size, self.shift_size = self._calc_window_shift(window_size)
        self.set_window_size(window_size)
        like = self.proj.weight
        self._place_windows(self.get_attn_mask(device=like.device, dtype=like.dtype))

    def _place_windows(self, mask: Tensor | None) -> None:
        """What follows from the feature map and its windows. mask (W, T, T): of shifted windows."""
        by_token = mask is not None and self.v_widths is None  # windows are gathered (T, W)
        gather, scatter = _gathers(self, by_token)
        for name, buffer in (("attn_mask", mask), ("gather", gather), ("scatter", scatter)):
            self.register_buffer(name, buffer, persistent=False)
        self.num_windows = 0 if mask is None else mask.shape[0]
        (H, W), (win_h, win_w) = self.input_resolution, self.window_size
        self.padded = H % win_h != 0 or W % win_w != 0
        self._bias = None

    def bias_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.relative_position_bias_table,)

    def position_bias(self) -> Tensor:
        """(h, T, T)."""
        return relative_bias(self.relative_position_bias_table, self.relative_position_index)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Relative positions, and the mask of shifted windows: (1, h, T, T) or (1, W*h, T, T)."""
        bias = self.position_bias()
        if self.attn_mask is not None:
            bias = (bias + self.attn_mask.unsqueeze(1)).flatten(0, 1)
        return bias.unsqueeze(0).to(dtype).contiguous()

    def projected(self, x: Tensor) -> Tensor:
        """(..., S) -> q, k and v of all heads (..., 2hD + hV)."""
        return self.qkv(x)  # type: ignore[no-any-return]

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (B*W, h, T, D) or (B, W*h, T, D), heads of a window side by side, as their products are taken."""
        return q, k

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, S) -> (B, H, W, S)."""
        shape, x, heads = x.shape, x.flatten(1, 2), self.heads
        if self.gather is not None:
            if self.padded:
                x = F.pad(x, (0, 0, 0, 1))  # the token of zeros that every padded place reads
            x = x.index_select(1, self.gather)  # (B, W*T, S) or, shifted, (B, T*W, S)
        qkv = self.projected(x)  # (B, W*T, 2hD + hV) or (B, T*W, 2hD + hV)
        x = self._even_heads(qkv, heads) if heads.even else self._uneven_heads(qkv, heads)  # (B, W*T, hV), (B, T*W, hV)
        x = self.proj_drop(self.proj(x))
        if self.scatter is not None:
            x = x.index_select(1, self.scatter)
        return x.view(shape)

    def _even_heads(self, qkv: Tensor, heads: HeadWidths) -> Tensor:
        B, h, T, W = qkv.shape[0], heads.number, self.window_area, self.num_windows
        rows = [h * heads.qk, h * heads.qk, heads.v_total]
        if self.attn_mask is None:
            parts = qkv.view(-1, T, sum(rows)).split(rows, dim=-1)
            q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in parts)  # (B*W, h, T, D)
        else:
            parts = qkv.split(rows, dim=-1)
            q, k, v = (t.reshape(B, T, W * h, -1).transpose(1, 2) for t in parts)  # (B, W*h, T, D)
        x = self._attend(*padded(*self.prepared(q, k), v), self._cached_bias(q.dtype))
        return join_heads(x[..., : v.shape[-1]]).reshape(B, -1, rows[2])

    def _uneven_heads(self, qkv: Tensor, heads: HeadWidths) -> Tensor:
        B, T, W = qkv.shape[0], self.window_area, self.num_windows
        bias = self._cached_bias(qkv.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor, index: Any) -> Tensor:  # (B*W, g, T, D), v (B*W, g, T, V)
            if self.attn_mask is None:
                return self._attend(q, k, v, bias[:, index])
            masked = bias.unflatten(1, (W, self.num_heads))[:, :, index].flatten(1, 2)
            g = q.shape[1]
            q, k, v = (t.reshape(B, W * g, T, -1) for t in (q, k, v))
            return self._attend(q, k, v, masked).reshape(B * W, g, T, -1)

        return by_width(qkv.view(-1, T, qkv.shape[-1]), heads, attend, self.prepared).reshape(B, -1, heads.v_total)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        dropout_p = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=self.scale)


class CompactWindowBlock(CompactBlock):
    """A block of a compact Swin, whose input size can be changed as timm's can."""

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """timm's, on the attention."""
        if self.has_attn:
            self.attn.set_input_size(feat_size, window_size, always_partition)


def _gathers(attn: Any, by_token: bool) -> tuple[Tensor | None, Tensor | None]:
    """Token of the image at each place of the windows, N where padded; and the place of each token. None: the same."""
    (H, W), (win_h, win_w), (shift_h, shift_w) = attn.input_resolution, attn.window_size, attn.shift_size
    here = partial(torch.arange, device="cpu")  # their values decide, also where the network lies on the meta device
    tokens = here(H * W).view(H, W).roll((-shift_h, -shift_w), (0, 1))
    tokens = F.pad(tokens, (0, -W % win_w, 0, -H % win_h), value=H * W)
    windows = tokens.unflatten(1, (-1, win_w)).unflatten(0, (-1, win_h)).transpose(1, 2).flatten(0, 1).flatten(1)
    order = (windows.t() if by_token else windows).flatten()  # (T, W) or (W, T)
    if torch.equal(order, here(H * W)):
        return None, None
    device = attn.relative_position_index.device
    places = here(H * W + 1).index_copy(0, order, here(order.numel()))
    return order.to(device), places[: H * W].to(device)
