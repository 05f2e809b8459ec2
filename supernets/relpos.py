"""timm's VisionTransformerRelPos as a backbone: positions by a small network or a table. One stage.

A block has norms before its halves (RelPosBlock) or at their end (ResPostRelPosBlock), whose stream then keeps the
network's own channels, in an order (section 2.7).
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import RelPosBias, RelPosMlp
from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBlock, ResPostRelPosBlock
from torch import Tensor, nn

from search_spaces.slices import BlockShape
from supernets.adapter import refuse
from supernets.axes import BlockAxes, HeadWidths, Params
from supernets.biased_vit import BiasedVitAdapter, CompactBiasedAttention, joined_attention
from supernets.compact_block import CompactBlock, CompactLateBlock
from supernets.flops import BlockCosts
from supernets.layers import linear
from supernets.relative import relative_bias
from supernets.timm_block import ATTENTION, MLP, has_attn, with_norms_late

OWN = "attn.rel_pos"
REL_POS_ATTENTION = replace(
    ATTENTION,
    axes=dict(ATTENTION.axes)
    | {
        f"{OWN}.relative_position_bias_table": (".", "H"),
        f"{OWN}.mlp.fc1.weight": (".", "."),  # (hidden, 2)
        f"{OWN}.mlp.fc1.bias": (".",),
        f"{OWN}.mlp.fc2.weight": ("H", "."),  # (H, hidden)
        f"{OWN}.mlp.fc2.bias": ("H",),
    },
)


def position_bias(rel_pos: Any, params: Params) -> Tensor:
    """The bias (H, N, N) of a block's RelPosBias or RelPosMlp on its sliced parameters."""
    index = rel_pos.relative_position_index.view(rel_pos.bias_shape[:2])
    if isinstance(rel_pos, RelPosBias):
        return relative_bias(params[f"{OWN}.relative_position_bias_table"], index)
    net, prefix = rel_pos.mlp, rel_pos.prefix_tokens
    hidden = net.drop1(net.act(linear(params, f"{OWN}.mlp.fc1", rel_pos.rel_coords_log)))
    table = linear(params, f"{OWN}.mlp.fc2", hidden)  # (2 h - 1, 2 w - 1, H)
    bias = rel_pos.bias_act(relative_bias(table.flatten(0, -2), index))
    bias = bias if rel_pos.bias_gain is None else rel_pos.bias_gain * bias
    return F.pad(bias, [prefix, 0, prefix, 0]) if prefix else bias


def network_flops(rel_pos: Any) -> tuple[int, int]:
    """MACs of the network of a RelPosMlp, (whatever its heads, for each head); none of a table."""
    if isinstance(rel_pos, RelPosBias):
        return 0, 0
    offsets, (hidden, inputs) = rel_pos.rel_coords_log[..., 0].numel(), rel_pos.mlp.fc1.weight.shape
    return offsets * hidden * inputs, offsets * hidden


class ExportedRelPosAttention(RelPosAttention):  # type: ignore[misc]
    """timm's RelPosAttention, which torch.export can write."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(B, N, E) -> (B, N, E). shared_rel_pos: (1, H, N, N)."""
        if self.training or not torch.compiler.is_exporting():
            return super().forward(x, shared_rel_pos)  # type: ignore[no-any-return]
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        return joined_attention(self, self.qkv(x), bias)


class CompactRelPosAttention(CompactBiasedAttention):
    """timm's RelPosAttention whose heads were cut."""

    rel_pos: Any

    def __init__(self, attn: Any, heads: HeadWidths) -> None:
        super().__init__(attn, heads)
        self.has_own = hasattr(self, "rel_pos")
        if not self.has_own:
            self.rel_pos = None  # all blocks read one
            return
        self.rel_pos.bias_shape = (*self.rel_pos.bias_shape[:2], heads.number)
        if hasattr(self.rel_pos, "num_heads"):
            self.rel_pos.num_heads = heads.number

    def bias_parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.rel_pos.parameters())

    def position_bias(self) -> Tensor:
        return self.rel_pos(0)  # type: ignore[no-any-return]  # called, it adds its bias to what it is given

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, N, S) -> (B, N, S). shared_rel_pos: (1, H, N, N), of as many heads as the backbone has."""
        return self.attend(x, shared_rel_pos)


class RelPosAdapter(BiasedVitAdapter):
    """VisionTransformerRelPos as blocks, stem and classifier."""

    block_axes = BlockAxes(REL_POS_ATTENTION, MLP)
    block_types = (RelPosBlock, CompactBlock)
    attention_types = (RelPosAttention, ExportedRelPosAttention, CompactRelPosAttention)
    exported = ExportedRelPosAttention
    plain_attention = "use timm's RelPosAttention"
    shared = "shared_rel_pos"

    def __init__(self, backbone: Any) -> None:
        if any(isinstance(block, ResPostRelPosBlock | CompactLateBlock) for block in backbone.blocks):
            self.block_axes, self.compact_block = with_norms_late(BlockAxes(REL_POS_ATTENTION, MLP)), CompactLateBlock
            self.block_types = (ResPostRelPosBlock, CompactLateBlock)
        super().__init__(backbone)

    def _check(self, backbone: Any) -> None:
        super()._check(backbone)
        own = [block.attn.rel_pos for block in backbone.blocks if has_attn(block)]
        for found in {type(rel_pos) for rel_pos in (backbone.shared_rel_pos, *own)}:
            if found not in (RelPosBias, RelPosMlp, type(None)):
                raise refuse(backbone, found.__name__, "use timm's RelPosBias or RelPosMlp")

    def stem(self, params: Params, images: Tensor) -> Tensor:
        return self.embed(params, images)

    def own_bias(self, block: Any, params: Params) -> Tensor | None:
        return None if block.attn.rel_pos is None else position_bias(block.attn.rel_pos, params).contiguous()

    def shared_bias(self) -> Tensor:
        return self.backbone.shared_rel_pos.get_bias()[0]  # type: ignore[no-any-return]

    def shared_flops(self) -> int:
        once, by_head = network_flops(self.backbone.shared_rel_pos)
        return once + by_head * self.backbone.shared_rel_pos.bias_shape[2]  # type: ignore[no-any-return]

    def block_costs(
        self, block: nn.Module, shape: BlockShape, attn_tokens: int, attended: int, mlp_tokens: int
    ) -> BlockCosts:
        costs = super().block_costs(block, shape, attn_tokens, attended, mlp_tokens)
        rel_pos: Any = block.attn.rel_pos if shape.attn else None  # type: ignore[union-attr]
        if rel_pos is None:
            return costs
        once, by_head = network_flops(rel_pos)
        return replace(costs, attn_once=((once, ""), (by_head, "H")))

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        return CompactRelPosAttention(block.attn, heads)
