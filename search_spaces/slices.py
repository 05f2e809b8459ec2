"""The slice: which heads, channels and hidden neurons of a block a subnet keeps.

The one vocabulary into which every method's choice translates, and the only thing that elastic forward,
FLOPs, importance order and the cutter read. Plain frozen data: no torch, no nni.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Kept = int | tuple[int, ...]  # an int n keeps the first n; a tuple keeps these indices, ascending


def count(kept: Kept) -> int:
    """How many are kept."""
    return kept if isinstance(kept, int) else len(kept)


@dataclass(frozen=True)
class BlockShape:
    """The facts of one backbone block that choices and slices need.

    head_dim: channels of q and k in a head; v_dim: of v, as many where it is 0. attn, mlp: False where the block has no
    such half, as one of a compact network whose half was removed; units of a missing half are of no account.
    qk_order: the channels of q and k inside a head in the order in which they are kept, qk_unit of them always
    together: pairs that a rotary embedding turns. Empty: as they stand, each by itself.
    """

    stage: int
    embed_dim: int  # E, width of the residual stream
    num_heads: int  # H
    head_dim: int  # d
    hidden: int  # M, hidden neurons of the MLP
    qk_order: tuple[int, ...] = ()
    qk_unit: int = 1
    v_dim: int = 0
    attn: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_dim", self.v_dim or self.head_dim)
        if min(self.embed_dim, self.num_heads, self.head_dim, self.v_dim, self.hidden) < 1 or self.stage < 0:
            raise ValueError(f"not a block: {self}")
        if self.qk_order and sorted(self.qk_order) != list(range(self.head_dim)):
            raise ValueError(f"not an order of {self.head_dim} channels: {self.qk_order}")

    def qk_kept(self, width: int) -> Kept:
        """The channels of q and k that a head of that width keeps. ValueError where it would part some."""
        if width % self.qk_unit:
            raise ValueError(f"q and k of width {width}; rotary embeddings keep {self.qk_unit} channels together")
        return tuple(sorted(self.qk_order[:width])) if self.qk_order else width


@dataclass(frozen=True)
class BlockSlice:
    """What one block of a subnet keeps.

    stream: the block reads and writes the first `stream` channels of the residual stream; both norms are
        taken over exactly these. The others pass by.
    heads, hidden: kept heads and kept hidden neurons of the MLP.
    mlp_stream: the channels, among the first `stream`, that the MLP reads (after the norm over all of
        `stream`) and writes. None: all of them. (section 2.3)
    qk: the first so many channels of Q and of K in every kept head, in the block's order (`BlockShape.qk_order`); the
        scale stays that of all of them. None: all of them. (section 2.9)
    v_channels: the kept channels of V and of the output projection: the first so many in every kept head (section
        2.9), or for each kept head its own, one or more (section 2.5). None: all of them.
    attn, mlp: False when the half-block is skipped altogether.
    """

    stream: int
    heads: Kept
    hidden: Kept
    mlp_stream: Kept | None = None
    qk: int | None = None
    v_channels: int | tuple[tuple[int, ...], ...] | None = None
    attn: bool = True
    mlp: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.v_channels, tuple) and len(self.v_channels) != count(self.heads):
            raise ValueError(f"{len(self.v_channels)} lists of V channels for {count(self.heads)} kept heads")
        if isinstance(self.mlp_stream, tuple) and any(c >= self.stream for c in self.mlp_stream):
            raise ValueError(f"the MLP keeps channels outside the first {self.stream}: {self.mlp_stream}")

    def num_mlp_stream(self) -> int:
        """How many channels the MLP reads and writes."""
        return self.stream if self.mlp_stream is None else count(self.mlp_stream)


def identity_slice(shape: BlockShape) -> BlockSlice:
    """The slice that keeps everything: the backbone's own block."""
    return BlockSlice(
        stream=shape.embed_dim, heads=shape.num_heads, hidden=shape.hidden, attn=shape.attn, mlp=shape.mlp
    )


def narrows_stream(shape: BlockShape, kept: BlockSlice) -> bool:
    """Whether a block leaves a channel of the stream out, in both of its halves or in its MLP."""
    return kept.stream < shape.embed_dim or kept.mlp_stream is not None


def prefix_slice(shape: BlockShape, alpha: int, width: str) -> BlockSlice:
    """The first 1/alpha of a block's heads and neurons and, for width "stream", of its channels.

    Section 2.1, equations (3.2) and (3.3). alpha must divide the block's heads, channels and neurons.
    """
    for name, size in (("heads", shape.num_heads), ("channels", shape.embed_dim), ("neurons", shape.hidden)):
        if size % alpha and not (name == "channels" and width == "inner"):
            raise ValueError(f"alpha {alpha} does not divide the block's {size} {name}")
    stream = shape.embed_dim // alpha if width == "stream" else shape.embed_dim
    return BlockSlice(stream=stream, heads=shape.num_heads // alpha, hidden=shape.hidden // alpha)


@dataclass(frozen=True)
class NetworkSlice:
    """A whole subnet: one slice per block and, per stage, how many stream channels exist at all."""

    blocks: tuple[BlockSlice, ...]
    stage_widths: tuple[int, ...]


def network_slice(
    shapes: Sequence[BlockShape], blocks: Sequence[BlockSlice], full_stage_width: bool = False
) -> NetworkSlice:
    """Gather block slices into a subnet; a stage is as wide as its widest slice, or all of E if asked."""
    if len(shapes) != len(blocks):
        raise ValueError(f"{len(blocks)} slices for {len(shapes)} blocks")
    widths = [0] * (1 + max(shape.stage for shape in shapes))
    for shape, kept in zip(shapes, blocks, strict=True):
        widths[shape.stage] = max(widths[shape.stage], shape.embed_dim if full_stage_width else kept.stream)
    return NetworkSlice(tuple(blocks), tuple(widths))
