"""Which axis of which parameter is a head, a hidden neuron or a stream channel; slicing by that table.

timm gives the parameters of a block the same names in every family, so one table serves them all. An axis
is a string of letters, outermost factor first:

    S stream channel          H head          M hidden neuron of the MLP
    R stream channel that the MLP reads or writes (a subset of the block's S)
    D channel inside a head   3 q, k and v    4 the quadrants that patch merging concatenates
    . nothing that a slice keeps or drops

What is kept of a fused axis is kept in each part: qkv rows are (3, H, D), merging columns are (4, S).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, Kept, count

BLOCK_AXES: Mapping[str, tuple[str, ...]] = {
    "norm1.weight": ("S",),
    "norm1.bias": ("S",),
    "attn.qkv.weight": ("3HD", "S"),
    "attn.qkv.bias": ("3HD",),
    "attn.q_norm.weight": (".",),
    "attn.q_norm.bias": (".",),
    "attn.k_norm.weight": (".",),
    "attn.k_norm.bias": (".",),
    "attn.relative_position_bias_table": (".", "H"),
    "attn.norm.weight": ("HD",),
    "attn.norm.bias": ("HD",),
    "attn.proj.weight": ("S", "HD"),
    "attn.proj.bias": ("S",),
    "ls1.gamma": ("S",),
    "norm2.weight": ("S",),
    "norm2.bias": ("S",),
    "mlp.fc1.weight": ("M", "R"),
    "mlp.fc1.bias": ("M",),
    "mlp.norm.weight": ("M",),
    "mlp.norm.bias": ("M",),
    "mlp.fc2.weight": ("R", "M"),
    "mlp.fc2.bias": ("R",),
    "ls2.gamma": ("R",),
}


def take(t: Tensor, dim: int, kept: Kept) -> Tensor:
    """Keep a prefix (a view) or a list of indices (a gather) of one axis."""
    if isinstance(kept, int):
        return t if t.shape[dim] == kept else t.narrow(dim, 0, kept)
    return t.index_select(dim, torch.tensor(kept, device=t.device))


def take_axis(t: Tensor, dim: int, letters: str, kept: Mapping[str, Kept], sizes: Mapping[str, int]) -> Tensor:
    """Keep kept[letter] of each factor of one (possibly fused) axis; factors without an entry stay whole."""
    if not any(letter in kept for letter in letters):
        return t
    if len(letters) == 1:
        return take(t, dim, kept[letters])
    factors = [sizes[letter] for letter in letters]
    if all(letter not in kept or kept[letter] == size for letter, size in zip(letters, factors, strict=True)):
        return t
    t = t.unflatten(dim, factors)
    for offset, letter in enumerate(letters):
        if letter in kept:
            t = take(t, dim + offset, kept[letter])
    return t.flatten(dim, dim + len(letters) - 1)


def v_rows(shape: BlockShape, kept: BlockSlice) -> list[int]:
    """Rows of V (and columns of the output projection) that are kept, head by head: flat indices into (H, D)."""
    assert kept.v_channels is not None
    heads = range(kept.heads) if isinstance(kept.heads, int) else kept.heads
    return [h * shape.head_dim + c for h, channels in zip(heads, kept.v_channels, strict=True) for c in channels]


def slice_block(params: Mapping[str, Tensor], shape: BlockShape, kept: BlockSlice) -> dict[str, Tensor]:
    """A block's parameters under their own names, cut to a slice.

    params: the block's parameters, full size. Returns views where the slice is a prefix and gathers where it
    is not; gradients flow back either way. Half-blocks that the slice skips are left out. With v_channels,
    qkv rows are (q: h*D, k: h*D, v: V) and the projection reads V channels, head by head, none of them padding.
    """
    mlp_stream = kept.stream if kept.mlp_stream is None else kept.mlp_stream
    keep: dict[str, Kept] = {"S": kept.stream, "R": mlp_stream, "H": kept.heads, "M": kept.hidden}
    sizes = {"3": 3, "H": shape.num_heads, "D": shape.head_dim}
    sliced: dict[str, Tensor] = {}
    for name, t in params.items():
        half_kept = kept.mlp if name.startswith(("norm2", "mlp", "ls2")) else kept.attn
        if not half_kept:
            continue
        axes = BLOCK_AXES[name]
        if kept.v_channels is not None and "HD" in axes[-1]:
            t = _slice_uneven(t, axes, shape, kept)
            axes = tuple("." if "HD" in letters else letters for letters in axes)
        elif kept.v_channels is not None and "HD" in axes[0]:
            t = _slice_uneven(t, axes, shape, kept)
            axes = (".", *axes[1:])
        for dim, letters in enumerate(axes):
            t = take_axis(t, dim, letters, keep, sizes)
        sliced[name] = t
    return sliced


def _slice_uneven(t: Tensor, axes: tuple[str, ...], shape: BlockShape, kept: BlockSlice) -> Tensor:
    """The fused qkv rows, or the projection's columns, of a block whose heads keep different V channels."""
    rows = torch.tensor(v_rows(shape, kept), device=t.device)
    if axes[0] != "3HD":
        return t.index_select(len(axes) - 1, rows)
    t = t.unflatten(0, (3, shape.num_heads * shape.head_dim))
    qk = take(t[:2].unflatten(1, (shape.num_heads, shape.head_dim)), 1, kept.heads).flatten(0, 2)
    return torch.cat([qk, t[2].index_select(0, rows)])


class _Prefixes(torch.autograd.Function):
    """Prefix blocks of one parameter, for several slices at once.

    Backward adds every gradient into one buffer. A narrow() each would give a zero-padded gradient of the whole
    parameter per slice, which at small batches costs as much as the products themselves.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, cuts: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.cuts = t.shape, cuts
        return tuple(_corner(t, cut) for cut in cuts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        widest = max(range(len(grads)), key=lambda i: grads[i].numel())
        if grads[widest].shape == ctx.shape:
            total = grads[widest].clone(memory_format=torch.contiguous_format)
        else:
            total = grads[widest].new_zeros(ctx.shape)
            _corner(total, ctx.cuts[widest]).add_(grads[widest])
        for i, grad in enumerate(grads):
            if i != widest:
                _corner(total, ctx.cuts[i]).add_(grad)
        return total, None


def _corner(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """The first sizes[d] entries of every dimension d: a view."""
    for dim, size in enumerate(sizes):
        t = t.narrow(dim, 0, size)
    return t


def _is_prefix(kept: BlockSlice) -> bool:
    whole = kept.attn and kept.mlp and kept.v_channels is None
    return whole and all(isinstance(k, int | None) for k in (kept.heads, kept.hidden, kept.mlp_stream))


def slice_block_each(
    params: Mapping[str, Tensor], shape: BlockShape, kept: Sequence[BlockSlice]
) -> list[dict[str, Tensor]]:
    """`slice_block` for several slices of one block; one gradient buffer per parameter where all are prefixes."""
    if len(kept) == 1 or not all(_is_prefix(k) for k in kept):
        return [slice_block(params, shape, k) for k in kept]
    sizes = {"3": 3, "H": shape.num_heads, "D": shape.head_dim}
    sliced: list[dict[str, Tensor]] = [{} for _ in kept]
    for name, t in params.items():
        axes = BLOCK_AXES[name]
        factors = [[sizes.get(letter, t.shape[dim]) for letter in letters] for dim, letters in enumerate(axes)]
        cuts = []
        for k in kept:
            keep = {"S": k.stream, "R": k.num_mlp_stream(), "H": count(k.heads), "M": count(k.hidden)}
            cuts.append(
                tuple(
                    keep.get(letter, size)
                    for letters, row in zip(axes, factors, strict=True)
                    for letter, size in zip(letters, row, strict=True)
                )
            )
        parts = _Prefixes.apply(t.view([size for row in factors for size in row]), tuple(cuts))
        for target, part, cut in zip(sliced, parts, cuts, strict=True):
            target[name] = part.reshape(_fused(cut, factors))
    return sliced


def _fused(cut: tuple[int, ...], factors: list[list[int]]) -> list[int]:
    """The shape of a cut after its factors are multiplied back into axes."""
    shape, place = [], 0
    for row in factors:
        size = 1
        for _ in row:
            size *= cut[place]
            place += 1
        shape.append(size)
    return shape


def block_parameters(block: nn.Module) -> dict[str, Tensor]:
    """A block's parameters by name; raises KeyError's cause early when the table lacks one."""
    params: dict[str, Tensor] = dict(block.named_parameters())
    unknown = sorted(set(params) - set(BLOCK_AXES))
    if unknown:
        raise KeyError(f"parameters that no axis table names: {', '.join(unknown)}")
    return params


def v_widths(kept: BlockSlice, shape: BlockShape) -> tuple[int, ...]:
    """Channels of V in each kept head."""
    if kept.v_channels is None:
        return (shape.head_dim,) * count(kept.heads)
    return tuple(map(len, kept.v_channels))


def num_heads(kept: BlockSlice) -> int:
    """Kept heads; 0 when attention is skipped."""
    return count(kept.heads) if kept.attn else 0
