"""Who reads a stage's stream through which norm, who writes it, what scales it: by the full names of the parameters.

Derived from an adapter's axes, once for all families. The rotation of a backbone (basis.py) and the coordinates of a
compact network (coordinates.py) go by it.
"""

from dataclasses import dataclass

from torch import nn

from supernets.adapter import Adapter
from supernets.axes import within
from supernets.rotated import centred

Axes = dict[str, dict[int, tuple[str, int]]]  # parameter -> dimension -> letters and stage of the stream that it is


@dataclass(frozen=True)
class Reading:
    """A norm and the matrices that read the stream through it.

    norm: its module. matrices: of the readers; biases: their names, there or not. quadrants: patch merging reads four
    tokens side by side. folded: whether what the norm adds goes into the readers' biases; where tokens of zeros come
    between norm and reader it cannot. block: index of the block, None outside.
    """

    stage: int
    norm: str
    matrices: tuple[str, ...]
    quadrants: bool = False
    folded: bool = True
    block: int | None = None

    @property
    def biases(self) -> tuple[str, ...]:
        """The names of the readers' biases, where each has one that is its own."""
        return tuple(f"{name.removesuffix('weight')}bias" for name in self.matrices)


@dataclass(frozen=True)
class Scaling:
    """LayerScale: gamma, one per channel, and the parameters before it whose channels it multiplies."""

    stage: int
    gamma: str
    writers: tuple[str, ...]


def readings(adapter: Adapter) -> list[Reading]:
    """Every norm that reads a stream, blocks first."""
    found = []
    for i, (name, shape, block) in enumerate(zip(adapter.block_names, adapter.shapes, adapter.blocks(), strict=True)):
        there = dict(block.named_parameters())
        for half in (adapter.block_axes.attn, adapter.block_axes.mlp):
            matrices = tuple(f"{name}.{matrix}" for matrix in half.readers if matrix in there)
            if half.norm is not None and matrices:
                padded = half is adapter.block_axes.attn and adapter.pads_after_norm(block)
                found.append(Reading(shape.stage, f"{name}.{half.norm}", matrices, folded=not padded, block=i))
    for norm, readers in adapter.outer_readers.items():
        letters, stage = adapter.outer_norms[norm]
        found.append(Reading(stage, norm, tuple(f"{reader}.weight" for reader in readers), letters == "4S"))
    return found


def scalings(adapter: Adapter) -> list[Scaling]:
    """Every LayerScale."""
    found = []
    for name, shape, block in zip(adapter.block_names, adapter.shapes, adapter.blocks(), strict=True):
        there = dict(block.named_parameters())
        for half in (adapter.block_axes.attn, adapter.block_axes.mlp):
            gammas = [n for n in there if within(n, half.scales)]
            written = tuple(f"{name}.{n}" for n in there if within(n, (half.writer,)))
            found += [Scaling(shape.stage, f"{name}.{gamma}", written) for gamma in gammas]
    last = adapter.shapes[-1].stage
    return found + [Scaling(last, gamma, written) for gamma, written in adapter.outer_scalings.items()]


def stream_axes(adapter: Adapter) -> Axes:
    """Every axis that is a stream, but for norms that read it, LayerScale, and what precedes a stem's norm."""
    read = {f"{reading.norm}." for reading in readings(adapter)}
    left_out = (*read, *(scaling.gamma for scaling in scalings(adapter)))
    axes: Axes = {}

    def add(name: str, dim: int, letters: str, stage: int) -> None:
        if not name.startswith(left_out):
            axes.setdefault(name, {})[dim] = (letters, stage)

    before = () if adapter.stem_norm is None else (*adapter.before_stem, f"{adapter.stem_norm}.")
    for name, of in adapter.outer_axes.items():
        for dim, axis in enumerate(of):
            if axis is not None and not (before and name.startswith(before)):
                add(name, dim, *axis)
    for name, shape, block in zip(adapter.block_names, adapter.shapes, adapter.blocks(), strict=True):
        for param in adapter.block_parameters(block):
            for dim, letters in enumerate(adapter.block_axes[param]):
                if letters in ("S", "R"):
                    add(f"{name}.{param}", dim, letters, shape.stage)
    return axes


def fixed_streams(adapter: Adapter) -> dict[int, str]:
    """Stages whose stream cannot be rotated without changing the function, and why (docs/backbones.md)."""
    fixed, model = dict(adapter.unrotated), adapter.backbone
    stages = range(1 + max(shape.stage for shape in adapter.shapes))
    halves = (adapter.block_axes.attn, adapter.block_axes.mlp)
    for stage in stages:
        norms = [model.get_submodule(r.norm) for r in readings(adapter) if r.stage == stage]
        if any(half.norm is None for half in halves) or not adapter.outer_readers:
            fixed.setdefault(stage, "blocks do not read the stream through a norm of their own")
        elif any(isinstance(norm, nn.Identity) for norm in norms):
            fixed.setdefault(stage, "something reads the stream without a norm")
        elif len({centred(norm) for norm in norms}) > 1:
            fixed.setdefault(stage, "some of its norms take the mean away and some do not")
    return fixed


def stage_is_centred(adapter: Adapter, stage: int) -> bool:
    """Whether the norms that read a stage's stream take its mean away."""
    return all(centred(adapter.backbone.get_submodule(r.norm)) for r in readings(adapter) if r.stage == stage)


def first_read(adapter: Adapter, stage: int, width: int) -> int:
    """The first of a stage's leading channels that anything reads: where the mean is taken away, a rotated 0 is it."""
    rotated = adapter.streams.get(stage) is not None
    return int(rotated and width > 1 and stage_is_centred(adapter, stage))
