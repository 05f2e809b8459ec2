"""Multiply-accumulates and parameters of a slice, in closed form and in whole numbers.

FLOPs are MACs of one image as executed: convolutions, linear layers and attention products (section 1). Norms,
softmax, activations and biases are not counted, as in the ViT literature and in torch's own counter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, count
from supernets.axes import num_heads, v_widths


@dataclass(frozen=True)
class BlockCosts:
    """Facts of one block that its slice does not hold.

    attn_tokens: tokens that qkv, attention and projection run on (Swin pads after norm1). attended: T, tokens
    each of them attends to. mlp_tokens: tokens of the MLP. fixed_params: parameters that no slice changes (q/k
    norms). The rest counts parameters per kept unit beyond the weight matrices.
    """

    attn_tokens: int
    attended: int
    mlp_tokens: int
    qkv_bias: int  # 0 or 1, as are the next three
    proj_bias: int
    fc1_bias: int
    fc2_bias: int
    table_rows: int = 0  # rows of the relative-position table, one column per head
    norm_params: int = 2  # parameters per channel of norm1, and of norm2
    attn_norm: int = 0  # per channel of the attention's output (scale_attn_norm)
    mlp_norm: int = 0  # per hidden neuron (scale_mlp_norm)
    layer_scale: int = 0  # per channel, for each half
    fixed_params: int = 0


@dataclass(frozen=True)
class PerWidth:
    """A cost that is affine in stage widths: constant + first*w_0 + last*w_last + merging terms.

    merge_pair[s] multiplies w_s * w_(s+1), merge_in[s] multiplies w_s.
    """

    constant: int
    first: int
    last: int
    merge_pair: tuple[int, ...] = ()
    merge_in: tuple[int, ...] = ()

    def at(self, widths: Sequence[int]) -> int:
        """The cost at the given stage widths."""
        total = self.constant + self.first * widths[0] + self.last * widths[-1]
        for s, (pair, single) in enumerate(zip(self.merge_pair, self.merge_in, strict=True)):
            total += pair * widths[s] * widths[s + 1] + single * widths[s]
        return total


@dataclass(frozen=True)
class NetworkCosts:
    """All that FLOPs and parameters of a network depend on besides its slices."""

    blocks: tuple[BlockCosts, ...]
    flops: PerWidth
    params: PerWidth


def block_flops(shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
    """MACs of one block at a slice."""
    total = 0
    if kept.attn:
        h, d, v = num_heads(kept), shape.head_dim, sum(v_widths(kept, shape))
        linear = kept.stream * (2 * h * d + v) + v * kept.stream
        products = costs.attended * (h * d + v)
        total += costs.attn_tokens * (linear + products)
    if kept.mlp:
        total += costs.mlp_tokens * 2 * kept.num_mlp_stream() * count(kept.hidden)
    return total


def block_params(shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
    """Parameters of one block at a slice, equal to sum(p.numel()) of the compact block."""
    total = 0
    if kept.attn:
        s, h, d, v = kept.stream, num_heads(kept), shape.head_dim, sum(v_widths(kept, shape))
        total += (2 * h * d + v) * (s + costs.qkv_bias) + s * (v + costs.proj_bias)
        total += costs.norm_params * s + costs.attn_norm * v + costs.layer_scale * s
        total += costs.table_rows * h + costs.fixed_params
    if kept.mlp:
        r, m = kept.num_mlp_stream(), count(kept.hidden)
        total += m * (r + costs.fc1_bias) + r * (m + costs.fc2_bias)
        total += costs.norm_params * kept.stream + costs.mlp_norm * m + costs.layer_scale * r
    return total


def network_flops(shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
    """MACs of one image through a subnet: blocks, stem, merging and classifier."""
    blocks = zip(shapes, costs.blocks, subnet.blocks, strict=True)
    return sum(block_flops(*block) for block in blocks) + costs.flops.at(subnet.stage_widths)


def network_params(shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
    """Parameters of the compact network of a subnet."""
    blocks = zip(shapes, costs.blocks, subnet.blocks, strict=True)
    return sum(block_params(*block) for block in blocks) + costs.params.at(subnet.stage_widths)
