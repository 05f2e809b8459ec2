"""Attention over q and k that a rotary embedding turns, and the modules that a compact Eva needs (section 2.7).

Shape letters as in layers.py; P tokens with a position, after those without one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from supernets.axes import HeadWidths
from supernets.compact_block import CompactBlock
from supernets.layers import by_width, joined_bias

Projected = Tensor | tuple[Tensor, Tensor, Tensor]  # q, k and v, fused or each by itself


def turns_of(rope: Tensor, channels: Tensor) -> Tensor:
    """The sines and cosines (P, 2d), side by side, of some channels of a head."""
    return rope.index_select(-1, torch.cat([channels, channels + rope.shape[-1] // 2]))


def turned_attention(
    attn: Any,
    heads: HeadWidths,
    qkv: Projected,
    rope: Tensor | None,
    norm_qk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    **masks: Any,
) -> Tensor:
    """q, k and v of an EvaAttention or AttentionRope -> (B, N, V), before its inner norm and projection.

    rope: sines and cosines of the channels that the heads have (P, 2D). masks: attn_mask and is_causal, as timm's.
    """
    dtype = (qkv if isinstance(qkv, Tensor) else qkv[2]).dtype
    scale = None if heads.qk == attn.head_dim else attn.scale

    def turn(x_BHND: Tensor) -> Tensor:
        if rope is None:
            return x_BHND
        first = attn.num_prefix_tokens
        turned = apply_rot_embed_cat(x_BHND[:, :, first:], rope, half=attn.rotate_half)
        return torch.cat([x_BHND[:, :, :first], turned], dim=2).to(dtype)

    def prepare(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = norm_qk(q, k)
        return turn(q), turn(k)

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
        if attn.fused_attn:
            dropout_p = attn.attn_drop.p if attn.training else 0.0
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale, **masks)
        return attn.attn_drop(((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v  # type: ignore[no-any-return]

    return by_width(qkv, heads, attend, prepare)


class CompactEvaAttention(nn.Module):
    """timm's EvaAttention or AttentionRope whose heads were cut. Children and biases keep timm's names."""

    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: nn.Parameter
    v_bias: nn.Parameter
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    proj: Any
    proj_drop: Any
    channels: Tensor | None

    def __init__(self, attn: Any, heads: HeadWidths) -> None:
        """attn: already cut, timm's or one of these, whose parameters are taken over.

        Its head_dim and scale are the backbone's, however narrow its heads.
        """
        super().__init__()
        for name, child in attn.named_children():
            setattr(self, name, child)
        for name, p in attn.named_parameters(recurse=False):
            self.register_parameter(name, p)
        self.heads, self.num_heads, self.head_dim, self.scale = heads, heads.number, attn.head_dim, attn.scale
        self.num_prefix_tokens, self.rotate_half, self.fused_attn = attn.num_prefix_tokens, attn.rotate_half, True
        channels = None if heads.qk_channels is None else torch.tensor(heads.qk_channels, device=_device(attn))
        self.register_buffer("channels", channels, persistent=False)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, N, S) -> (B, N, S). rope: (P, 2d), of the backbone's whole heads."""
        if rope is not None and self.channels is not None:
            rope = turns_of(rope, self.channels)

        def norm_qk(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return self.q_norm(q), self.k_norm(k)

        qkv = self._projected(x)
        x = turned_attention(self, self.heads, qkv, rope, norm_qk, attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(self.norm(x)))  # type: ignore[no-any-return]

    def _projected(self, x: Tensor) -> Projected:
        if not hasattr(self, "qkv"):
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        qkv: Tensor = self.qkv(x)
        return qkv + joined_bias(self.q_bias, self.v_bias) if hasattr(self, "q_bias") else qkv


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


class CompactEvaBlock(CompactBlock):
    """A block of an Eva, a Beit or a CaiT, whose LayerScales are bare parameters."""

    gamma_1: nn.Parameter
    gamma_2: nn.Parameter

    def attention_half(self, z: Tensor, **given: Any) -> Tensor:
        y = super().attention_half(z, **given)
        return self.gamma_1 * y if hasattr(self, "gamma_1") else y

    def mlp_half(self, z: Tensor) -> Tensor:
        y = super().mlp_half(z)
        return self.gamma_2 * y if hasattr(self, "gamma_2") else y
