"""Mixtures of subnets in one block: terms, their gates, the stream's prefixes, residuals. Nothing of it is stored.

What the halves of a block compute is the family's to say (adapter.py).
Shape letters: E stream, S slice of it, R channels the MLP reads and writes, H kept heads, M kept hidden neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search_spaces.slices import BlockShape, BlockSlice
from supernets.adapter import Adapter
from supernets.axes import BlockAxes, Params, head_widths, slice_block_each


@dataclass(frozen=True)
class Term:
    """One candidate of a block, or several nested ones in a single gated pass.

    slice: what the term computes. weight (): multiplies its output (g_i of equation 3.5).
    head_gate (H,), hidden_gate (M,): multiply the outputs of kept heads and the activations of kept neurons.
    channel_gate (R,): multiplies the MLP's input and output channels (section 2.3).
    Gates are folded into the weights that follow, so a gated pass costs one plain pass.
    """

    slice: BlockSlice
    weight: Tensor | None = None
    head_gate: Tensor | None = None
    hidden_gate: Tensor | None = None
    channel_gate: Tensor | None = None


@dataclass(frozen=True)
class BlockMixture:
    """What one block of the small path computes: the sum of its terms, and how much of it is taken.

    keep (): g_1 of a two-way gate (section 2.5), x <- g_1 * block(x) + g_0 * x. None: always kept.
    """

    terms: tuple[Term, ...]
    keep: Tensor | None = None


class _ReadPrefixes(torch.autograd.Function):
    """x_E -> its prefixes; backward adds the gradients into one buffer instead of one zero-padded each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return tuple(x.narrow(-1, 0, w) for w in widths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        widest = max(range(len(grads)), key=lambda i: grads[i].shape[-1])
        if grads[widest].shape == ctx.shape:
            total = grads[widest].clone()
        else:
            total = grads[widest].new_zeros(ctx.shape)
            total.narrow(-1, 0, grads[widest].shape[-1]).add_(grads[widest])
        for i, grad in enumerate(grads):
            if i != widest:
                total.narrow(-1, 0, grad.shape[-1]).add_(grad)
        return total, None


class _AddPrefixes(torch.autograd.Function):
    """x_E plus zero-padded y_S for each y; backward hands each y a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *ys: Tensor) -> Tensor:
        ctx.widths = [y.shape[-1] for y in ys]
        out = x.clone()
        for y in ys:
            out.narrow(-1, 0, y.shape[-1]).add_(y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad, *(grad.narrow(-1, 0, w) for w in ctx.widths))


def read_prefixes(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """The first w channels of x for each w."""
    if all(w == x.shape[-1] for w in widths):
        return (x,) * len(widths)
    return _ReadPrefixes.apply(x, tuple(widths))  # type: ignore[no-any-return]


def add_prefixes(x: Tensor, ys: Sequence[Tensor]) -> Tensor:
    """x with each y added to its first channels."""
    if len(ys) == 1 and ys[0].shape[-1] == x.shape[-1]:
        return x + ys[0]
    return _AddPrefixes.apply(x, *ys)  # type: ignore[no-any-return]


def gated(params: Params, axes: BlockAxes, shape: BlockShape, term: Term) -> dict[str, Tensor]:
    """Fold a term's weight and gates into its parameters.

    Scaling a weight by g costs its size; scaling the activations would cost tokens x channels, and their
    gradient would need them kept. Where a norm takes what the MLP writes, the channel gate is the norm's
    (`name.gate`, layers.py), which then normalises over what exists.
    """
    scaled = dict(params)

    def scale(name: str, by: Tensor) -> None:
        if name in scaled:
            scaled[name] = scaled[name] * by

    if term.head_gate is not None:
        v = head_widths(term.slice, shape).v
        widths = v if isinstance(v, int) else torch.tensor(v, device=term.head_gate.device)
        for name in axes.attn.writers:
            scale(name, term.head_gate.repeat_interleave(widths))
    if term.hidden_gate is not None:
        for name in axes.mlp.writers:
            scale(name, term.hidden_gate)
    if term.channel_gate is not None:
        for name in axes.mlp.readers:
            scale(name, term.channel_gate)
        norms = axes.mlp.output_norms
        scaled |= {f"{norm}.gate": term.channel_gate for norm in norms}
        for name in axes.mlp.writers if not norms else ():
            scale(name, term.channel_gate[:, None])
            scale(f"{name.removesuffix('weight')}bias", term.channel_gate)
    if term.weight is not None:
        for half, there in ((axes.attn, term.slice.attn), (axes.mlp, term.slice.mlp)):
            for name in half.output(params) if there else ():
                scale(name, term.weight)
    return scaled


Half = Callable[[Any, BlockShape, Params, BlockSlice, Tensor], Tensor]


def mixed_block(adapter: Adapter, block: Any, shape: BlockShape, mixture: BlockMixture, x: Tensor) -> Tensor:
    """One block of the small path, equation (3.5): z' = z + sum_i g_i MSA_i(LN z); out = z' + sum_i g_i MLP_i(LN z').

    x: (B, N, E) or (B, H, W, E), E the stage's width. The halves in the family's own order of norm and projection.
    One stochastic-depth draw per half-block is shared by all its terms.
    """
    terms, axes = mixture.terms, adapter.block_axes
    each = slice_block_each(adapter.block_parameters(block), axes, shape, [t.slice for t in terms])
    sliced = [(t.slice, gated(p, axes, shape, t)) for p, t in zip(each, terms, strict=True)]

    def add(half: Half, drop_path: Any, there: list[tuple[BlockSlice, dict[str, Tensor]]], x: Tensor) -> Tensor:
        prefixes = read_prefixes(x, [kept.stream for kept, _ in there])
        ys = [half(block, shape, p, kept, x_S) for (kept, p), x_S in zip(there, prefixes, strict=True)]
        return add_prefixes(x, drop_together(drop_path, ys)) if ys else x

    z = add(adapter.attention_half, block.drop_path1, [pair for pair in sliced if pair[0].attn], x)
    out = add(adapter.mlp_half, block.drop_path2, [pair for pair in sliced if pair[0].mlp], z)
    return out if mixture.keep is None else torch.lerp(x, out, mixture.keep.to(x.dtype))


def drop_together(drop_path: Any, ys: Sequence[Tensor]) -> list[Tensor]:
    """Stochastic depth (timm's DropPath) with a single draw per image for all of ys."""
    if not getattr(drop_path, "drop_prob", 0.0) or not drop_path.training:
        return list(ys)
    mask = drop_path(ys[0].new_ones((ys[0].shape[0],) + (1,) * (ys[0].dim() - 1)))
    return [y * mask for y in ys]
