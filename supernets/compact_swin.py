"""Swin's windowed attention as the compact network runs it: on a fixed input size, with as few copies as can be.

timm rolls twice per dimension, pads, partitions, copies q, k and v so that the shift mask can be broadcast over
images, merges and rolls back. Here the roll, the padding and the partition are one gather of tokens, and their
reverse is another. B images, N = H*W tokens, W windows, T tokens of a window, S stream, h heads, D and V their widths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernets.elastic import join_heads


class CompactWindowAttention(nn.Module):
    """timm's WindowAttention with the shift and the partition around it. Children keep timm's names.

    Plain windows are gathered as (B*W, T). Shifted ones as (B, T, W): then q, k and v, each projected on its own, are
    views of shape (B, W*h, T, D), to which one mask of (1, W*h, T, T) applies, and the output is a view as well.
    """

    qkv: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor
    attn_mask: Tensor | None
    gather: Tensor | None
    scatter: Tensor | None

    def __init__(self, block: Any) -> None:
        """block: timm's SwinTransformerBlock, already cut, whose parameters are taken over."""
        super().__init__()
        attn = block.attn
        for name, child in attn.named_children():
            if name != "softmax":
                setattr(self, name, child)
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.num_heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, attn.scale
        self.window_size = block.window_size  # read by timm where it resizes tables
        self.window_area = block.window_size[0] * block.window_size[1]
        for name, buffer in (
            ("relative_position_index", attn.relative_position_index),
            ("attn_mask", block.attn_mask),
            *zip(("gather", "scatter"), _gathers(block), strict=True),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.num_windows = block.attn_mask.shape[0] if block.attn_mask is not None else 0
        H, W = block.input_resolution
        self.padded = H % block.window_size[0] != 0 or W % block.window_size[1] != 0
        self._bias: tuple[Tensor, Any, Tensor] | None = None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Relative positions, and the mask of shifted windows: (1, h, T, T) or (1, W*h, T, T)."""
        T, table = self.window_area, self.relative_position_bias_table
        bias = table[self.relative_position_index.view(-1)].view(T, T, self.num_heads).permute(2, 0, 1)
        if self.attn_mask is not None:
            bias = (bias + self.attn_mask.unsqueeze(1)).flatten(0, 1)
        return bias.unsqueeze(0).to(dtype).contiguous()

    def _cached_bias(self, dtype: torch.dtype) -> Tensor:
        """`bias`, computed again only when the table has changed; kept only where nothing is being differentiated."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.bias(dtype)
        table = self.relative_position_bias_table
        key = (table.data_ptr(), table._version, dtype)
        if self._bias is None or self._bias[0] is not table or self._bias[1] != key:
            self._bias = table, key, self.bias(dtype)
        return self._bias[2]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, S) -> (B, H, W, S)."""
        B, h, T, shape = x.shape[0], self.num_heads, self.window_area, x.shape
        x = x.flatten(1, 2)
        if self.gather is not None:
            if self.padded:
                x = F.pad(x, (0, 0, 0, 1))  # the token of zeros that every padded place reads
            x = x.index_select(1, self.gather)  # (B, W*T, S) or, shifted, (B, T*W, S)
        rows = [h * self.head_dim, h * self.head_dim, self.proj.in_features]
        if self.attn_mask is None:
            parts = F.linear(x, self.qkv.weight, self.qkv.bias).view(-1, T, sum(rows)).split(rows, dim=-1)
            q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in parts)  # (B*W, h, T, D)
        else:
            weights = self.qkv.weight.split(rows)
            biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.split(rows)
            parts = tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
            q, k, v = (t.view(B, T, self.num_windows * h, -1).transpose(1, 2) for t in parts)  # (B, W*h, T, D)
        dropout_p = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._cached_bias(q.dtype), dropout_p=dropout_p, scale=self.scale
        )
        x = join_heads(x).reshape(B, -1, rows[2])  # (B, W*T, h*V) or (B, T*W, h*V)
        x = self.proj_drop(self.proj(x))
        if self.scatter is not None:
            x = x.index_select(1, self.scatter)
        return x.view(shape)


def _gathers(block: Any) -> tuple[Tensor | None, Tensor | None]:
    """Token of the image at each place of the windows, N where padded; and the place of each token. None: the same."""
    (H, W), (win_h, win_w), (shift_h, shift_w) = block.input_resolution, block.window_size, block.shift_size
    tokens = torch.arange(H * W).view(H, W).roll((-shift_h, -shift_w), (0, 1))
    tokens = F.pad(tokens, (0, -W % win_w, 0, -H % win_h), value=H * W)
    windows = tokens.unflatten(1, (-1, win_w)).unflatten(0, (-1, win_h)).transpose(1, 2).flatten(0, 1).flatten(1)
    order = (windows if block.attn_mask is None else windows.t()).flatten()  # (W, T) or (T, W)
    if torch.equal(order, torch.arange(H * W)):
        return None, None
    device = block.attn.relative_position_index.device
    places = torch.empty(H * W + 1, dtype=torch.long).index_copy(0, order, torch.arange(order.numel()))
    return order.to(device), places[: H * W].to(device)
