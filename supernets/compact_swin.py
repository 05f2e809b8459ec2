"""Swin's windowed attention as the compact network runs it: on a fixed input size, with as few copies as can be.

timm rolls twice per dimension, pads, partitions, copies q, k and v so that the shift mask can be broadcast over
images, merges and rolls back. Here the roll, the padding and the partition are one gather of tokens, and their
reverse is another. B images, N = H*W tokens, W windows, T tokens of a window, S stream, h heads, D and V their widths.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernets.axes import HeadWidths
from supernets.layers import by_width, join_heads, padded


class CompactWindowAttention(nn.Module):
    """timm's WindowAttention with the shift and the partition around it. Children keep timm's names.

    Plain windows are gathered as (B*W, T). Shifted ones as (B, T, W): then q, k and v, each projected on its own, are
    views of shape (B, W*h, T, D), to which one mask of (1, W*h, T, T) applies, and the output is a view as well.
    Heads whose V differ in width (section 2.5) run grouped by width, over windows gathered as (B*W, T).
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

    def __init__(self, block: Any, heads: HeadWidths) -> None:
        """block: timm's SwinTransformerBlock, already cut, whose parameters are taken over."""
        super().__init__()
        attn = block.attn
        for name, child in attn.named_children():
            if name != "softmax":
                setattr(self, name, child)
        self.relative_position_bias_table = attn.relative_position_bias_table
        self.num_heads, self.head_dim, self.scale = heads.number, heads.qk, attn.scale
        self.heads = heads
        by_token = block.attn_mask is not None and heads.even  # windows are gathered (T, W)
        self.window_size = block.window_size  # read by timm where it resizes tables
        self.window_area = block.window_size[0] * block.window_size[1]
        for name, buffer in (
            ("relative_position_index", attn.relative_position_index),
            ("attn_mask", block.attn_mask),
            *zip(("gather", "scatter"), _gathers(block, by_token), strict=True),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.num_windows = block.attn_mask.shape[0] if block.attn_mask is not None else 0
        H, W = block.input_resolution
        self.padded = H % block.window_size[0] != 0 or W % block.window_size[1] != 0
        self._bias: tuple[nn.Parameter, Tensor, Any, Tensor] | None = None  # table, its memory, key, bias

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Relative positions, and the mask of shifted windows: (1, h, T, T) or (1, W*h, T, T)."""
        T, table = self.window_area, self.relative_position_bias_table
        bias = table[self.relative_position_index.view(-1)].view(T, T, self.num_heads).permute(2, 0, 1)
        if self.attn_mask is not None:
            bias = (bias + self.attn_mask.unsqueeze(1)).flatten(0, 1)
        return bias.unsqueeze(0).to(dtype).contiguous()

    def _cached_bias(self, dtype: torch.dtype) -> Tensor:
        """`bias`, computed again only when the table has changed; kept only where nothing is being differentiated.

        A change in place through `.data` goes unnoticed, as it does in autograd.
        """
        table = self.relative_position_bias_table
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or table.is_inference():
            return self.bias(dtype)
        cached, key = self._bias, (table.data_ptr(), table._version, dtype)
        if cached is None or cached[0] is not table or cached[2] != key:
            memory = table.detach()  # as long as it is held, no other table comes to lie at this address
            self._bias = cached = table, memory, key, self.bias(dtype)
        return cached[3]

    def __getstate__(self) -> dict[str, Any]:
        """A copy's table counts its versions anew: it starts without a cached bias."""
        return self.__dict__ | {"_bias": None}

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, S) -> (B, H, W, S)."""
        shape, x = x.shape, x.flatten(1, 2)
        if self.gather is not None:
            if self.padded:
                x = F.pad(x, (0, 0, 0, 1))  # the token of zeros that every padded place reads
            x = x.index_select(1, self.gather)  # (B, W*T, S) or, shifted, (B, T*W, S)
        x = self._even_heads(x) if self.heads.even else self._uneven_heads(x)  # (B, W*T, h*V) or (B, T*W, h*V)
        x = self.proj_drop(self.proj(x))
        if self.scatter is not None:
            x = x.index_select(1, self.scatter)
        return x.view(shape)

    def _even_heads(self, x: Tensor) -> Tensor:
        B, h, T = x.shape[0], self.num_heads, self.window_area
        rows = [h * self.head_dim, h * self.head_dim, self.proj.in_features]
        if self.attn_mask is None:
            parts = F.linear(x, self.qkv.weight, self.qkv.bias).view(-1, T, sum(rows)).split(rows, dim=-1)
            q, k, v = (t.unflatten(-1, (h, -1)).transpose(1, 2) for t in parts)  # (B*W, h, T, D)
        else:
            weights = self.qkv.weight.split(rows)
            biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.split(rows)
            parts = tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
            q, k, v = (t.view(B, T, self.num_windows * h, -1).transpose(1, 2) for t in parts)  # (B, W*h, T, D)
        x = self._attend(*padded(q, k, v), self._cached_bias(q.dtype))
        return join_heads(x[..., : v.shape[-1]]).reshape(B, -1, rows[2])

    def _uneven_heads(self, x: Tensor) -> Tensor:
        B, T, W = x.shape[0], self.window_area, self.num_windows

        def attend(q: Tensor, k: Tensor, v: Tensor, index: Any) -> Tensor:  # (B*W, g, T, D), v (B*W, g, T, V)
            bias = self._cached_bias(q.dtype)
            if self.attn_mask is None:
                return self._attend(q, k, v, bias[:, index])
            bias = bias.unflatten(1, (W, self.num_heads))[:, :, index].flatten(1, 2)
            heads = q.shape[1]
            q, k, v = (t.reshape(B, W * heads, T, -1) for t in (q, k, v))
            return self._attend(q, k, v, bias).reshape(B * W, heads, T, -1)

        qkv = self.qkv(x).view(-1, T, self.qkv.out_features)
        return by_width(qkv, self.heads, attend).reshape(B, -1, self.proj.in_features)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        dropout_p = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=self.scale)


def _gathers(block: Any, by_token: bool) -> tuple[Tensor | None, Tensor | None]:
    """Token of the image at each place of the windows, N where padded; and the place of each token. None: the same."""
    (H, W), (win_h, win_w), (shift_h, shift_w) = block.input_resolution, block.window_size, block.shift_size
    tokens = torch.arange(H * W).view(H, W).roll((-shift_h, -shift_w), (0, 1))
    tokens = F.pad(tokens, (0, -W % win_w, 0, -H % win_h), value=H * W)
    windows = tokens.unflatten(1, (-1, win_w)).unflatten(0, (-1, win_h)).transpose(1, 2).flatten(0, 1).flatten(1)
    order = (windows.t() if by_token else windows).flatten()  # (T, W) or (W, T)
    if torch.equal(order, torch.arange(H * W)):
        return None, None
    device = block.attn.relative_position_index.device
    places = torch.empty(H * W + 1, dtype=torch.long).index_copy(0, order, torch.arange(order.numel()))
    return order.to(device), places[: H * W].to(device)
