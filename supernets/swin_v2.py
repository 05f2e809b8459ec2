"""timm's SwinTransformerV2 as a backbone: cosine attention, positions by a small network, norms after the halves.

A half adds norm(half(z)), and patch merging ends in its norm, too: the weight of a norm stands between what a layer
writes and the stream, so the stream keeps the network's own channels, in an order (section 2.7). Inside the heads v may
be changed by any matrix, q and k by one rotation for both, which leaves their cosines as they are.

Letters as in layers.py and swin.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from torch import Tensor, nn

from search_spaces.slices import BlockShape
from supernets.axes import BlockAxes, HalfAxes, HeadWidths, Params
from supernets.compact_block import CompactLateBlock
from supernets.compact_swin import CompactWindowAttention, CompactWindowBlock
from supernets.flops import BlockCosts
from supernets.layers import fused_qkv, joined_bias, late_norm, linear
from supernets.relative import relative_bias
from supernets.swin import SwinAdapter, attend_windows, placed, quadrants, windowed
from supernets.timm_block import ATTENTION, MLP, has_attn, with_norms_late

LARGEST = math.log(100)  # of timm's logit_scale
LEAST = 1e-12  # length of q and k, F.normalize's

COSINE_ATTENTION = HalfAxes(
    axes=dict(ATTENTION.axes)
    | {
        "attn.q_bias": ("HD",),
        "attn.v_bias": ("HV",),
        "attn.logit_scale": ("H", ".", "."),
        "attn.cpb_mlp.0.weight": (".", "."),  # (512, 2)
        "attn.cpb_mlp.0.bias": (".",),
        "attn.cpb_mlp.2.weight": ("H", "."),  # (H, 512)
    },
    outputs=ATTENTION.outputs,
    parted_biases={"attn.qkv.weight": ("attn.q_bias", None, "attn.v_bias")},
    normalised={"attn": "D"},
)


def unit_qk(q: Tensor, k: Tensor, logit_scale: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q and k (B, h, T, D) such that their products are the scores: cosines times a factor of the head.

    logit_scale: (h, 1, 1), timm's logarithm. gate (D,): how much of each channel exists; lengths are over that.
    """
    if gate is None:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    else:
        lengths = [(t.square() * gate).sum(-1, keepdim=True).clamp_min(LEAST**2).sqrt() for t in (q, k)]
        q, k = q * gate / lengths[0], k / lengths[1]
    return q * logit_scale.clamp(max=LARGEST).exp(), k


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """What the network of positions gives for every offset (2 h - 1, 2 w - 1, H) -> the bias (H, T, T)."""
    return 16 * relative_bias(table.flatten(0, -2), index).sigmoid()


class FusedCosineAttention(WindowAttention):  # type: ignore[misc]
    """timm's WindowAttention of Swin V2 in fused attention, with its mask broadcast over the batch."""

    scale, fused_attn = 1.0, True  # the scores' factor is in q

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B*W, T, S) -> (B*W, T, S)."""
        heads = HeadWidths(self.num_heads, self.head_dim, self.head_dim)
        bias = None if self.q_bias is None else joined_bias(self.q_bias, self.v_bias)
        qkv = F.linear(x, self.qkv.weight, bias)
        positions = position_bias(self.cpb_mlp(self.relative_coords_table), self.relative_position_index)
        norm_qk = partial(unit_qk, logit_scale=self.logit_scale)
        return self.proj_drop(self.proj(attend_windows(self, positions, heads, qkv, mask, norm_qk)))  # type: ignore[no-any-return]


def cosine_attention(attn: Any, params: Params, heads: HeadWidths, x_BTS: Tensor, mask_WTT: Tensor | None) -> Tensor:
    """The same on sliced parameters; without its projection (B*W, T, V)."""
    table = linear(params, "attn.cpb_mlp.2", F.relu(linear(params, "attn.cpb_mlp.0", attn.relative_coords_table)))
    positions = position_bias(table, attn.relative_position_index)
    norm_qk = partial(unit_qk, logit_scale=params["attn.logit_scale"], gate=params.get("attn.gate"))
    x = attend_windows(attn, positions, heads, fused_qkv(params, x_BTS), mask_WTT, norm_qk)
    return attn.proj_drop(linear(params, "attn.proj", x))  # type: ignore[no-any-return]


class CompactCosineAttention(CompactWindowAttention):
    """Cosine attention of a compact network. Children and parameters keep timm's names."""

    cpb_mlp: Any
    logit_scale: nn.Parameter
    q_bias: nn.Parameter
    v_bias: nn.Parameter
    relative_coords_table: Tensor

    _make_pair_wise_relative_positions = WindowAttention._make_pair_wise_relative_positions

    def __init__(self, block: Any, heads: HeadWidths) -> None:
        """block: timm's SwinTransformerV2Block or one that has such attention, cut."""
        attn = block.attn
        super().__init__(block, heads)
        self.pretrained_window_size = attn.pretrained_window_size
        self.register_buffer("relative_coords_table", attn.relative_coords_table, persistent=False)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """timm's; the positions of another window are the network's to find."""
        WindowAttention.set_window_size(self, window_size)
        self.window_area = self.window_size[0] * self.window_size[1]

    def bias_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.cpb_mlp.parameters())

    def position_bias(self) -> Tensor:
        return position_bias(self.cpb_mlp(self.relative_coords_table), self.relative_position_index)

    def projected(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        return qkv + joined_bias(self.q_bias, self.v_bias) if hasattr(self, "q_bias") else qkv

    def prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        windows = q.shape[1] // self.num_heads
        return unit_qk(q, k, self.logit_scale.repeat(windows, 1, 1))


class CompactLateWindowBlock(CompactLateBlock, CompactWindowBlock):
    """A block of a compact Swin V2."""


class SwinV2Adapter(SwinAdapter):
    """SwinTransformerV2 as blocks, stem, patch merging and classifier. Turns fused attention on."""

    block_axes = with_norms_late(BlockAxes(COSINE_ATTENTION, MLP))
    compact_block = CompactLateWindowBlock
    block_type = SwinTransformerV2Block
    timm_attention = WindowAttention
    fused_attention = FusedCosineAttention

    def _describe_stem(self) -> None:
        """Its norm is over the slice: no stream is rotated."""

    def merging_norm(self, stage: int) -> tuple[str, int]:
        return "S", stage

    def merging(self, stage: int) -> tuple[str, str | None]:
        return f"layers.{stage}.downsample.reduction", f"layers.{stage}.downsample.norm"

    def block_costs(
        self, block: nn.Module, shape: BlockShape, attn_tokens: int, attended: int, mlp_tokens: int
    ) -> BlockCosts:
        costs = super().block_costs(block, shape, attn_tokens, attended, mlp_tokens)
        if not shape.attn:
            return costs
        attn: Any = block.attn
        (hidden, inputs), offsets = attn.cpb_mlp[0].weight.shape, attn.relative_coords_table[..., 0].numel()
        return replace(costs, attn_once=((offsets * hidden * inputs, ""), (offsets * hidden, "H")))

    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        name = f"layers.{stage}.downsample"
        x = linear(params, f"{name}.reduction", quadrants(x))
        return late_norm(self.backbone.layers[stage].downsample.norm, params, f"{name}.norm", x)

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        return windowed(placed(block), x, partial(cosine_attention, block.attn, params, heads))

    def cosine_qk(self, block: Any) -> bool:
        return has_attn(block)

    def watch_qkv(self, block: Any, see: Callable[[Tensor], None]) -> Callable[[], None]:
        attn = block.attn
        if isinstance(attn, CompactCosineAttention):  # its windows are gathered inside
            bias = joined_bias(attn.q_bias, attn.v_bias) if hasattr(attn, "q_bias") else 0
            return attn.qkv.register_forward_hook(lambda _, __, qkv: see(qkv + bias)).remove  # type: ignore[no-any-return]
        params = self.block_parameters(block)
        return attn.register_forward_pre_hook(lambda _, inputs: see(fused_qkv(params, inputs[0]))).remove  # type: ignore[no-any-return]

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        block.attn.num_heads = heads.number
        return CompactCosineAttention(block, heads)
