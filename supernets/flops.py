"""Multiply-accumulates and parameters of a slice, in closed form and in whole numbers.

FLOPs are MACs of one image as executed: convolutions, linear layers and attention products (section 1). Norms,
softmax, activations and biases are not counted, as in the ViT literature and in torch's own counter.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, count, identity_slice, narrows_stream
from supernets.axes import BlockAxes, HeadWidths, Params, head_widths, unit_sizes

Products = tuple[tuple[int, str], ...]  # the sum of each number times how many units of its letters are kept


@dataclass(frozen=True)
class BlockCosts:
    """What a block costs besides its slice.

    attn_tokens: tokens that qkv, attention and projection run on (Swin pads after norm1). attended: T, tokens
    each of them attends to. mlp_tokens: tokens of the MLP. attn_weights, mlp_weights: entries of each half's weight
    matrices, which are its MACs per token; attn_params, mlp_params: entries of all its parameters. Letters as in
    axes.py, but Q and V for the channels of q and of v in all heads. norm_after_gate: a norm, or what mixes heads,
    stands behind the gates of heads or neurons, so that nested slices in one gated pass are not their sum. shifted:
    whether attention's windows are, which costs no MAC but time. attn_once: MACs of an image that no width of stream or
    head changes (Swin V2's network of position biases, which runs once a batch and is counted with every image; what
    mixes CaiT's heads). pads_heads: whether heads of one width run padded (`by_width`, layers.py).
    """

    attn_tokens: int
    attended: int
    mlp_tokens: int
    attn_weights: Products
    mlp_weights: Products
    attn_params: Products
    mlp_params: Products
    norm_after_gate: bool
    shifted: bool = False
    attn_once: Products = ()
    pads_heads: bool = True


def block_costs(
    params: Params,
    axes: BlockAxes,
    shape: BlockShape,
    *,
    attn_tokens: int,
    attended: int,
    mlp_tokens: int,
    norm_after_gate: bool,
) -> BlockCosts:
    """The costs of a block from the axes of its parameters."""
    attn, mlp = ([name for name in params if name in half.axes] for half in (axes.attn, axes.mlp))
    matrices = {*axes.attn.readers, *axes.attn.writers, *axes.mlp.readers, *axes.mlp.writers}

    def entries(names: Iterable[str]) -> Products:
        total: Counter[str] = Counter()
        for name in names:
            dims = zip(axes[name], params[name].shape, strict=True)
            for parts in product(*(_kept_size(letters, size, shape).items() for letters, size in dims)):
                total["".join(sorted(unit for unit, _ in parts))] += math.prod(number for _, number in parts)
        return tuple((number, units) for units, number in total.items())

    return BlockCosts(
        attn_tokens=attn_tokens,
        attended=attended,
        mlp_tokens=mlp_tokens,
        attn_weights=entries(name for name in attn if name in matrices),
        mlp_weights=entries(name for name in mlp if name in matrices),
        attn_params=entries(attn),
        mlp_params=entries(mlp),
        norm_after_gate=norm_after_gate,
    )


def _kept_size(letters: str, size: int, shape: BlockShape) -> dict[str, int]:
    """How long a sliced axis is: unit -> number, the sum of each number times the kept units. "": none."""
    if letters == "3HD":
        return {"Q": 2, "V": 1}
    if letters in ("HD", "HV"):
        return {"Q" if letters == "HD" else "V": 1}
    if letters == ".":
        return {"": size}
    sizes = unit_sizes(shape)
    (unit,) = (letter for letter in letters if letter in "SRHDPM")
    return {unit: math.prod(sizes[letter] for letter in letters if letter != unit)}


def _kept_units(shape: BlockShape, kept: BlockSlice) -> dict[str, int]:
    heads = head_widths(kept, shape)
    units = {"S": kept.stream, "R": kept.num_mlp_stream(), "M": count(kept.hidden)}
    units |= {"H": heads.number, "D": heads.qk, "P": heads.qk // shape.qk_unit}
    return units | {"Q": heads.number * heads.qk, "V": heads.v_total}


def _sum(products: Products, kept: Mapping[str, int]) -> int:
    total = 0
    for number, units in products:
        for unit in units:
            number *= kept[unit]
        total += number
    return total


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

    @property
    def num_stages(self) -> int:
        """Of the network; mergings stand between them."""
        return 1 + len(self.merge_pair)

    def per_channel(self, stage: int) -> int:
        """What each channel of a stage costs in stem, merging and classifier."""
        first, last = self.first * (stage == 0), self.last * (stage == len(self.merge_pair))
        return first + last + (self.merge_in[stage] if stage < len(self.merge_pair) else 0)

    def of_stage(self, stage: int, width: int) -> int:
        """What a stage's width costs by itself."""
        return self.per_channel(stage) * width

    def of_merging(self, stage: int, width: int, after: int) -> int:
        """What the widths of a stage and of the next one cost together, in the merging between them."""
        return self.merge_pair[stage] * width * after

    def at(self, widths: Sequence[int]) -> int:
        """The cost at the given stage widths."""
        total = self.constant + self.first * widths[0] + self.last * widths[-1]
        for s, (pair, single) in enumerate(zip(self.merge_pair, self.merge_in, strict=True)):
            total += pair * widths[s] * widths[s + 1] + single * widths[s]
        return total


@dataclass(frozen=True)
class StreamCosts:
    """What a stage costs more where its stream is cut in a rotated basis (section 2.7): (constant, per channel).

    A stem that ends in a norm runs whole and is followed by a linear layer to the stage's channels.
    """

    flops: tuple[int, int] = (0, 0)
    params: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class NetworkCosts:
    """All that FLOPs and parameters of a network depend on besides its slices. streams: rotated stages.

    spared: FLOPs and parameters of layers that compact networks have and the network itself has not.
    """

    blocks: tuple[BlockCosts, ...]
    flops: PerWidth
    params: PerWidth
    streams: Mapping[int, StreamCosts] = field(default_factory=dict)
    spared: tuple[int, int] = (0, 0)

    def outer_flops(self) -> PerWidth:
        """FLOPs outside the blocks, every rotated stage being cut."""
        return _charged(self.flops, [costs.flops for costs in self.streams.values()])

    def outer_params(self) -> PerWidth:
        """Parameters outside the blocks, every rotated stage being cut."""
        return _charged(self.params, [costs.params for costs in self.streams.values()])


def _charged(per: PerWidth, added: Sequence[tuple[int, int]]) -> PerWidth:
    """A cost with those of stems added, which only the first stage has."""
    constant, first = (sum(each[i] for each in added) for i in (0, 1))
    return replace(per, constant=per.constant + constant, first=per.first + first)


def block_flops(shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
    """MACs of one block at a slice: every weight on every token, and q k^T and the scores times v in attention."""
    units, total = _kept_units(shape, kept), 0
    if kept.attn:
        attention = costs.attended * attention_channels(head_widths(kept, shape), costs.pads_heads)
        total += costs.attn_tokens * (_sum(costs.attn_weights, units) + attention) + _sum(costs.attn_once, units)
    if kept.mlp:
        total += costs.mlp_tokens * _sum(costs.mlp_weights, units)
    return total


def block_params(shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
    """Parameters of one block at a slice, equal to sum(p.numel()) of the compact block."""
    units = _kept_units(shape, kept)
    attn, mlp = _sum(costs.attn_params, units) * kept.attn, _sum(costs.mlp_params, units) * kept.mlp
    return attn + mlp


def attention_channels(heads: HeadWidths, padded: bool = True) -> int:
    """Channels of all heads in q k^T and in the scores times v, as they run: padded to one width where heads are even.

    Source: `by_width` (layers.py).
    """
    if isinstance(heads.v, int) and padded:
        return 2 * heads.number * max(heads.qk, heads.v)
    return heads.number * heads.qk + heads.v_total


@dataclass(frozen=True)
class UnitFlops:
    """MACs of one unit of a whole block: a channel of V in one head, a neuron."""

    v_channel: int
    neuron: int


def unit_flops(shape: BlockShape, costs: BlockCosts) -> UnitFlops:
    """What a block's MACs lose with one unit of each kind; they are linear in the number of each."""
    whole = identity_slice(shape)
    v = (tuple(range(shape.v_dim)),) * (shape.num_heads - 1) + (tuple(range(shape.v_dim - 1)),)
    less = replace(whole, v_channels=v), replace(whole, hidden=shape.hidden - 1)
    full = block_flops(shape, costs, whole)
    return UnitFlops(*(full - block_flops(shape, costs, kept) for kept in less))


def whole_stages(shapes: Sequence[BlockShape], subnet: NetworkSlice) -> set[int]:
    """Stages of whose stream no block leaves a channel out; a compact network has them in timm's own coordinates."""
    whole = {shape.stage for shape in shapes if subnet.stage_widths[shape.stage] == shape.embed_dim}
    return whole - {s.stage for s, kept in zip(shapes, subnet.blocks, strict=True) if narrows_stream(s, kept)}


def _cut_streams(
    shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice
) -> list[tuple[StreamCosts, int]]:
    """What each rotated stage that a subnet cuts costs more, and its width."""
    cut = costs.streams.keys() - whole_stages(shapes, subnet)
    return [(costs.streams[stage], subnet.stage_widths[stage]) for stage in cut]


def network_flops(shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
    """MACs of one image through a subnet: blocks, stem, merging and classifier."""
    blocks = zip(shapes, costs.blocks, subnet.blocks, strict=True)
    total = sum(block_flops(*block) for block in blocks) + costs.flops.at(subnet.stage_widths)
    return total + sum(c.flops[0] + c.flops[1] * width for c, width in _cut_streams(shapes, costs, subnet))


def network_params(shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
    """Parameters of the compact network of a subnet."""
    blocks = zip(shapes, costs.blocks, subnet.blocks, strict=True)
    total = sum(block_params(*block) for block in blocks) + costs.params.at(subnet.stage_widths)
    return total + sum(c.params[0] + c.params[1] * width for c, width in _cut_streams(shapes, costs, subnet))
