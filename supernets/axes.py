"""Which axis of which parameter is a head, a hidden neuron or a stream channel; slicing by that.

A family's adapter has the table of its blocks. An axis is a string of letters, outermost factor first:

    S stream channel          H head          M hidden neuron of the MLP
    R stream channel that the MLP reads or writes (a subset of the block's S)
    D channel of q and k inside a head        V channel of v, and of the attention's output, inside a head
    P so many neighbouring channels of q and k that only go together (`BlockShape.qk_unit`), inside a head
    2, 3, 4 so many parts side by side: both projections of a GLU; q, k and v; patch merging's quadrants
    . nothing that a slice keeps or drops

What is kept of a fused axis is kept in each part: merging columns are (4, S). qkv rows, 3HD, are q's (H, D), k's (H, D)
and v's (H, V), as wide in a backbone of timm's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, Kept, count

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class HalfAxes:
    """The parameters of a family's attention or MLP half, by their names in the block.

    axes: letters of each dimension of every parameter that the half may have.
    outputs: modules or bare parameters, last first, in which what the half adds is linear; LayerScale before the
    projection. A norm at the half's end stands here, too, and the projection after it, if its half can do without each
    (`Adapter.attention_half`): then a refit fits the projection to what the norm reads.
    late_norms: norms that what the heads or neurons give passes through, be they inside the half or at its end.
    norm: the one norm through which the half reads the stream; None where it reads it as it is.
    keys: parameters of k alone, where q, k and v are not fused.
    parted_biases: readers whose bias stands in parts of its own: their names in the order of the reader's rows, None
    for rows without one.
    normalised: modules that normalise units themselves, without parameters, and the letters of these.

    What follows from these is found once, as plain fields, which torch.compile can look up:

    readers, writers: matrices from the stream to the half's units, and back.
    output_norms: norms over the channels that the half writes.
    unit_norms: norms over channels of q and k, heads or neurons, and the letters of that axis: they stand behind gates.
    by_output: the parameters of each module of `outputs`.
    mixers: matrices from heads to heads.
    """

    axes: Mapping[str, tuple[str, ...]]
    outputs: tuple[str, ...]
    late_norms: tuple[str, ...] = ()
    norm: str | None = None
    keys: tuple[str, ...] = ()
    parted_biases: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    normalised: Mapping[str, str] = field(default_factory=dict)
    readers: tuple[str, ...] = field(init=False)
    writers: tuple[str, ...] = field(init=False)
    output_norms: tuple[str, ...] = field(init=False)
    unit_norms: Mapping[str, str] = field(init=False)
    by_output: tuple[tuple[str, ...], ...] = field(init=False)
    mixers: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        two = {name: axes for name, axes in self.axes.items() if len(axes) == 2}
        units = {name.removesuffix(".weight"): axes for name, axes in self.axes.items() if name.endswith(".weight")}
        found: dict[str, Any] = {
            "readers": tuple(name for name, axes in two.items() if axes[1] in ("S", "R")),
            "writers": tuple(name for name, axes in two.items() if axes[0] in ("S", "R")),
            "output_norms": tuple(n for n in self.late_norms if self.axes[f"{n}.weight"][0] in ("S", "R")),
            "unit_norms": {name: a[0] for name, a in units.items() if len(a) == 1 and a[0] in ("D", "HV", "M")}
            | dict(self.normalised),
            "mixers": tuple(name for name, axes in two.items() if axes == ("H", "H")),
            "by_output": tuple(tuple(n for n in self.axes if within(n, (module,))) for module in self.outputs),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def biases(self, matrix: str) -> tuple[str | None, ...]:
        """The names that a reader's bias has, in the order of its rows; there or not, None: not."""
        return self.parted_biases.get(matrix, (f"{matrix.removesuffix('weight')}bias",))

    @property
    def writer(self) -> str:
        """The module of the matrix that what a half adds is linear in; or, of a half that ends in a norm, that norm."""
        return self.outputs[-1]

    @property
    def scales(self) -> tuple[str, ...]:
        """LayerScale, where there may be any."""
        return tuple(name for name in self.outputs[:-1] if name not in self.late_norms)

    def output(self, params: Params) -> list[str]:
        """The parameters that scale what the half adds: those of the first module of `outputs` that the block has."""
        for names in self.by_output:
            found = [name for name in names if name in params]
            if found:
                return found
        raise KeyError(f"no parameters in any of {', '.join(self.outputs)}")


@dataclass(frozen=True)
class BlockAxes:
    """Both halves of a family's blocks."""

    attn: HalfAxes
    mlp: HalfAxes

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self.attn.axes[name] if name in self.attn.axes else self.mlp.axes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.attn.axes or name in self.mlp.axes

    def has(self, name: str, kept: BlockSlice) -> bool:
        """Whether a slice has the half that a parameter belongs to."""
        return kept.attn if name in self.attn.axes else kept.mlp


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter is one of these, or of one of these modules."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def layer_of(block: nn.Module, matrices: Iterable[str]) -> Any:
    """The linear layer of the one matrix of these that the block has."""
    (name,) = (n for n in matrices if n in dict(block.named_parameters()))
    return block.get_submodule(name.removesuffix(".weight"))


def unit_sizes(shape: BlockShape) -> dict[str, int]:
    """The size of every letter's factor in a block; '.' is as large as its parameter says."""
    E, d = shape.embed_dim, shape.head_dim
    units = {"S": E, "R": E, "H": shape.num_heads, "D": d, "P": d // shape.qk_unit, "V": shape.v_dim, "M": shape.hidden}
    return units | {"2": 2, "3": 3}


def qkv_rows(shape: BlockShape) -> list[int]:
    """How many rows of a fused qkv are q's, k's and v's."""
    H, d = shape.num_heads, shape.head_dim
    return [H * d, H * d, H * shape.v_dim]


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


@dataclass(frozen=True)
class HeadWidths:
    """The kept heads of a block. qk: channels of q and k in each; v: of v in each, or one number per head.

    qk_channels: those of q and k where they are not the first; kept: which heads, where they are not.
    """

    number: int
    qk: int
    v: int | tuple[int, ...]
    qk_channels: tuple[int, ...] | None = None
    kept: tuple[int, ...] | None = None

    @property
    def even(self) -> bool:
        """Whether all run together, q, k and v padded to one width; heads of their own widths run by width."""
        return isinstance(self.v, int)

    @property
    def v_total(self) -> int:
        """Channels of v in all heads together."""
        return self.number * self.v if isinstance(self.v, int) else sum(self.v)


def head_widths(kept: BlockSlice, shape: BlockShape) -> HeadWidths:
    """How wide the kept heads are."""
    v = shape.v_dim if kept.v_channels is None else kept.v_channels
    widths = v if isinstance(v, int) else tuple(map(len, v))
    which = None if isinstance(kept.heads, int) else kept.heads
    if kept.qk is None:
        return HeadWidths(count(kept.heads), shape.head_dim, widths, kept=which)
    channels = shape.qk_kept(kept.qk)
    return HeadWidths(count(kept.heads), kept.qk, widths, None if isinstance(channels, int) else channels, which)


def v_rows(shape: BlockShape, kept: BlockSlice) -> list[int]:
    """Rows of V (and columns of the output projection) that are kept, head by head: flat indices into (H, V)."""
    assert isinstance(kept.v_channels, tuple)
    heads = range(kept.heads) if isinstance(kept.heads, int) else kept.heads
    return [h * shape.v_dim + c for h, channels in zip(heads, kept.v_channels, strict=True) for c in channels]


def slice_block(params: Params, axes: BlockAxes, shape: BlockShape, kept: BlockSlice) -> dict[str, Tensor]:
    """A block's parameters under their own names, cut to a slice.

    params: the block's parameters, full size. Returns views where the slice is a prefix and gathers where it
    is not; gradients flow back either way. Half-blocks that the slice skips are left out. qkv rows are
    (q: h*D, k: h*D, v: V) and the projection reads V channels, head by head, none of them padding.
    """
    mlp_stream = kept.stream if kept.mlp_stream is None else kept.mlp_stream
    keep: dict[str, Kept] = {"S": kept.stream, "R": mlp_stream, "H": kept.heads, "M": kept.hidden}
    if kept.qk is not None:
        keep["D"] = channels = shape.qk_kept(kept.qk)
        unit = shape.qk_unit
        keep["P"] = channels // unit if isinstance(channels, int) else tuple(c // unit for c in channels[::unit])
    if isinstance(kept.v_channels, int):
        keep["V"] = kept.v_channels
    sizes = unit_sizes(shape)
    sliced: dict[str, Tensor] = {}
    for name, t in params.items():
        if not axes.has(name, kept):
            continue
        for dim, letters in enumerate(axes[name]):
            if letters == "HV" and isinstance(kept.v_channels, tuple):
                t = t.index_select(dim, torch.tensor(v_rows(shape, kept), device=t.device))
            elif letters == "3HD" and ((kept.qk, kept.v_channels) != (None, None) or shape.v_dim != shape.head_dim):
                t = _take_qkv(t, dim, shape, kept)
            else:
                t = take_axis(t, dim, letters, keep, sizes)
        sliced[name] = t
    return sliced


def _take_qkv(t: Tensor, dim: int, shape: BlockShape, kept: BlockSlice) -> Tensor:
    """The axis of fused q, k and v of a block whose kept heads are narrower than they were."""
    q, k, v = (part.unflatten(dim, (shape.num_heads, -1)) for part in t.split(qkv_rows(shape), dim))
    channels = shape.head_dim if kept.qk is None else shape.qk_kept(kept.qk)
    parts = [take(take(part, dim, kept.heads), dim + 1, channels).flatten(dim, dim + 1) for part in (q, k)]
    if isinstance(kept.v_channels, tuple):
        rows = torch.tensor(v_rows(shape, kept), device=t.device)
        parts.append(v.flatten(dim, dim + 1).index_select(dim, rows))
    else:
        width = shape.v_dim if kept.v_channels is None else kept.v_channels
        parts.append(take(take(v, dim, kept.heads), dim + 1, width).flatten(dim, dim + 1))
    return torch.cat(parts, dim)


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
    whole = kept.attn and kept.mlp and kept.qk is None and kept.v_channels is None
    return whole and all(isinstance(k, int | None) for k in (kept.heads, kept.hidden, kept.mlp_stream))


def slice_block_each(
    params: Params, axes: BlockAxes, shape: BlockShape, kept: Sequence[BlockSlice]
) -> list[dict[str, Tensor]]:
    """`slice_block` for several slices of one block; one gradient buffer per parameter where all are prefixes."""
    if len(kept) == 1 or not all(_is_prefix(k) for k in kept) or shape.v_dim != shape.head_dim:
        return [slice_block(params, axes, shape, k) for k in kept]
    sizes = unit_sizes(shape)
    sliced: list[dict[str, Tensor]] = [{} for _ in kept]
    for name, t in params.items():
        factors = [[sizes.get(letter, t.shape[dim]) for letter in letters] for dim, letters in enumerate(axes[name])]
        cuts = []
        for k in kept:
            keep = {"S": k.stream, "R": k.num_mlp_stream(), "H": count(k.heads), "M": count(k.hidden)}
            cuts.append(
                tuple(
                    keep.get(letter, size)
                    for letters, row in zip(axes[name], factors, strict=True)
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


def num_heads(kept: BlockSlice) -> int:
    """Kept heads; 0 when attention is skipped."""
    return count(kept.heads) if kept.attn else 0
