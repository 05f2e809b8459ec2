"""timm's Beit (BEiT, BEiT v2) as a backbone: tables of relative positions. One stage."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from timm.models.beit import Attention, Block
from torch import Tensor, nn

from supernets.axes import BlockAxes, HeadWidths, Params
from supernets.biased_vit import BiasedVitAdapter, CompactBiasedAttention
from supernets.compact_eva import CompactEvaBlock
from supernets.eva import EVA_ATTENTION, EVA_MLP
from supernets.layers import fused_qkv, joined_bias
from supernets.relative import relative_bias

BEIT_ATTENTION = replace(EVA_ATTENTION, parted_biases={"attn.qkv.weight": ("attn.q_bias", None, "attn.v_bias")})


class CompactBeitAttention(CompactBiasedAttention):
    """timm's Attention of a Beit whose heads were cut; its biases stand apart, and its layer is called all the same."""

    q_bias: nn.Parameter
    v_bias: nn.Parameter
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor
    k_bias = None  # timm's zeros

    set_window_size = Attention.set_window_size
    _init_buffers = Attention._init_buffers

    def __init__(self, attn: Any, heads: HeadWidths) -> None:
        super().__init__(attn, heads)
        self.window_size = attn.window_size
        self.has_own = self.window_size is not None
        if self.has_own:
            self.register_buffer("relative_position_index", attn.relative_position_index, persistent=False)

    def bias_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.relative_position_bias_table,)

    def position_bias(self) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.relative_position_index).unsqueeze(0)

    def projected(self, x: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(x)
        return qkv + joined_bias(self.q_bias, self.v_bias) if hasattr(self, "q_bias") else qkv

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(B, N, S) -> (B, N, S). shared_rel_pos_bias: (H, N, N), of as many heads as the backbone has."""
        return self.attend(x, shared_rel_pos_bias)


class BeitAdapter(BiasedVitAdapter):
    """Beit as blocks, stem and classifier."""

    block_axes = BlockAxes(BEIT_ATTENTION, EVA_MLP)
    block_types = (Block, CompactEvaBlock)
    attention_types = (Attention, CompactBeitAttention)
    plain_attention = "use timm's Attention of Beit"
    layer_scales = ("gamma_1", "gamma_2")
    compact_block = CompactEvaBlock
    shared = "rel_pos_bias"

    def stem(self, params: Params, images: Tensor) -> Tensor:
        return self.backbone.pos_drop(self.embed(params, images))  # type: ignore[no-any-return]

    def shared_bias(self) -> Tensor:
        return self.backbone.rel_pos_bias()  # type: ignore[no-any-return]

    def own_bias(self, block: Any, params: Params) -> Tensor | None:
        table = params.get("attn.relative_position_bias_table")
        return None if table is None else relative_bias(table, block.attn.relative_position_index).contiguous()

    def watch_qkv(self, block: Any, see: Callable[[Tensor], None]) -> Callable[[], None]:
        params = self.block_parameters(block)
        return block.attn.register_forward_pre_hook(lambda _, inputs: see(fused_qkv(params, inputs[0]))).remove  # type: ignore[no-any-return]

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        return CompactBeitAttention(block.attn, heads)
