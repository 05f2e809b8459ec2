"""Mixtures of subnets in one block: terms, their gates, the stream's prefixes, residuals. Nothing of it is stored.

What the halves of a block compute is the family's to say (adapter.py).
Shape letters: E stream, S slice of it, R channels the MLP reads and writes, H kept heads, M kept hidden neurons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice
from supernets.adapter import Adapter
from supernets.axes import BlockAxes, Params, head_widths, slice_block_each


@dataclass(frozen=True)
class Term:
    """One candidate of a block, or several nested ones in a single gated pass.

    slice: what the term computes. weight (): multiplies its output (g_i of equation 3.5).
    head_gate (H,), hidden_gate (M,): multiply the outputs of kept heads and the activations of kept neurons.
    channel_gate (R,): multiplies the MLP's input and output channels (section 2.3).
    qk_gate (D,), v_gate (V,): inside every head, multiply the products that q k^T sums over, and the channels of v; the
    former in the order in which the block keeps them.
    stream_gate (S,): how much of each channel of the stream exists: both norms are over that, and what the halves add
    is multiplied by it. attn_there, mlp_there (): how much of a half exists; multiply what it adds whatever its heads
    or neurons give (section 2.9).
    Gates are folded into the weights, so a gated pass costs one plain pass; of channels that are normalised, into the
    norm, which is then over what exists.
    """

    slice: BlockSlice
    weight: Tensor | None = None
    head_gate: Tensor | None = None
    hidden_gate: Tensor | None = None
    channel_gate: Tensor | None = None
    qk_gate: Tensor | None = None
    v_gate: Tensor | None = None
    stream_gate: Tensor | None = None
    attn_there: Tensor | None = None
    mlp_there: Tensor | None = None


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


def gated(
    params: Params, axes: BlockAxes, shape: BlockShape, term: Term, norms: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Fold a term's weight and gates into its parameters.

    Scaling a weight by g costs its size; scaling the activations would cost tokens x channels, and their
    gradient would need them kept. Where a norm takes what is gated, the gate is the norm's (`name.gate`, layers.py),
    which then normalises over what exists. norms: those over units that the block has (`unit_norms`).
    """
    scaled = dict(params)

    def scale(name: str, by: Tensor) -> None:
        if name in scaled:
            scaled[name] = scaled[name] * by

    def scale_rows(name: str, by: Tensor) -> None:
        if name in scaled:
            scale(name, by if scaled[name].dim() == 1 else by[:, None])

    def normed(units: str, gate: Tensor) -> bool:
        """Whether norms take these units; they get the gate."""
        found = {f"{norm}.gate": gate for norm, over in norms.items() if over == units}
        scaled.update(found)
        return bool(found)

    of_v = _v_gate(term, shape)
    of_qk = _qk_gate(term, shape)
    if of_qk is not None and not normed("D", of_qk):
        widths = head_widths(term.slice, shape)
        of_q = of_qk.repeat(widths.number)
        for name, letters in axes.attn.axes.items():
            if letters[0] == "3HD":
                scale_rows(name, torch.cat([of_q, torch.ones_like(of_q), of_q.new_ones(widths.v_total)]))
            elif letters[0] == "HD" and name not in axes.attn.keys:
                scale_rows(name, of_q)
    for units, gate, half in (("HV", of_v, axes.attn), ("M", term.hidden_gate, axes.mlp)):
        if gate is not None and not normed(units, gate):
            for name in half.writers:
                scale(name, gate)
    for name in axes.attn.mixers if term.head_gate is not None else ():
        assert term.head_gate is not None
        scale(name, term.head_gate)  # what it takes from heads that do not exist
    if term.channel_gate is not None:
        for name in axes.mlp.readers:
            scale(name, term.channel_gate)
        late = axes.mlp.output_norms
        scaled |= {f"{norm}.gate": term.channel_gate for norm in late}
        for name in axes.mlp.writers if not late else ():
            scale(name, term.channel_gate[:, None])
            scale(f"{name.removesuffix('weight')}bias", term.channel_gate)
    for half, there, gate in (
        (axes.attn, term.slice.attn, term.attn_there),
        (axes.mlp, term.slice.mlp, term.mlp_there),
    ):
        if gate is not None:
            for name in half.writers:
                scale(f"{name.removesuffix('weight')}bias", gate)
            for norm in half.output_norms:
                scale(f"{norm}.weight", gate)
                scale(f"{norm}.bias", gate)
        if term.stream_gate is not None:
            over_stream = (*half.output_norms, *([] if half.norm is None else [half.norm]))
            scaled |= {f"{norm}.gate": term.stream_gate for norm in over_stream}
            for name in half.output(params) if there and not half.output_norms else ():
                scale_rows(name, term.stream_gate)
        if term.weight is not None:
            for name in half.output(params) if there else ():
                scale(name, term.weight)
    return scaled


def _qk_gate(term: Term, shape: BlockShape) -> Tensor | None:
    """The gate of every channel of q and k that the slice keeps, as they stand in it, (D,)."""
    if term.qk_gate is None or not shape.qk_order:
        return term.qk_gate
    kept = shape.qk_order[: len(term.qk_gate)]
    return term.qk_gate[torch.tensor(kept, device=term.qk_gate.device).argsort()]


def _v_gate(term: Term, shape: BlockShape) -> Tensor | None:
    """The gate of every channel of v of every kept head, (V,)."""
    if term.head_gate is None and term.v_gate is None:
        return None
    widths = head_widths(term.slice, shape)
    if term.head_gate is None:
        assert term.v_gate is not None
        return term.v_gate.repeat(widths.number)
    if term.v_gate is None:
        v = widths.v if isinstance(widths.v, int) else torch.tensor(widths.v, device=term.head_gate.device)
        return term.head_gate.repeat_interleave(v)
    return torch.outer(term.head_gate, term.v_gate).flatten()


def norms_over_units(block: nn.Module, axes: BlockAxes) -> dict[str, str]:
    """The norms behind gates that a block has, and the letters of what they are over."""
    there = {name for name, module in block.named_modules() if not isinstance(module, nn.Identity)}
    both = {**axes.attn.unit_norms, **axes.mlp.unit_norms}
    return {name: over for name, over in both.items() if name in there}


Half = Callable[[Any, BlockShape, Params, BlockSlice, Tensor], Tensor]


def mixed_block(adapter: Adapter, block: Any, shape: BlockShape, mixture: BlockMixture, x: Tensor) -> Tensor:
    """One block of the small path, equation (3.5): z' = z + sum_i g_i MSA_i(LN z); out = z' + sum_i g_i MLP_i(LN z').

    x: (B, N, E) or (B, H, W, E), E the stage's width. The halves in the family's own order of norm and projection.
    One stochastic-depth draw per half-block is shared by all its terms.
    """
    terms, axes = mixture.terms, adapter.block_axes
    if not shape.attn and not shape.mlp:
        return x
    each = slice_block_each(adapter.block_parameters(block), axes, shape, [t.slice for t in terms])
    norms = norms_over_units(block, axes)
    sliced = [(t.slice, gated(p, axes, shape, t, norms)) for p, t in zip(each, terms, strict=True)]

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
