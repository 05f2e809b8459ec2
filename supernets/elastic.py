"""Elastic half-blocks: functions of (parameters, slice), never of stored state.

Shape letters: B images (times windows in Swin), N tokens, E stream, S slice of the stream, R channels the MLP
reads and writes, H kept heads, D head width, V channels of V in a head (without an H beside it, in all of them),
M kept hidden neurons.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from timm.layers.fast_norm import rms_norm
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, count
from supernets.axes import slice_block_each, v_widths

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One candidate of a block, or several nested ones in a single gated pass.

    slice: what the term computes. weight (): multiplies its output (DAN's g_i, equation 3.5).
    head_gate (H,), hidden_gate (M,): multiply the outputs of kept heads and the activations of kept neurons.
    channel_gate (R,): multiplies the MLP's input and output channels (KCR's mask).
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

    keep (): g_1 of UVC's two-way gate (section 2.5), x <- g_1 * block(x) + g_0 * x. None: always kept.
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


def norm(module: nn.Module, params: Params, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the channels of x alone, with the sliced weight and bias `name.*`.

    With `name.gate` (w,), how much of each channel exists, mean and variance are over what exists, and so is the
    result: a gate of ones and zeros gives the norm of the channels of gate one, and zero elsewhere.
    """
    if isinstance(module, nn.Identity):
        return x
    weight = params.get(f"{name}.weight")
    if f"{name}.gate" in params:
        return _gated_norm(module, weight, params.get(f"{name}.bias"), params[f"{name}.gate"], x)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], weight, params.get(f"{name}.bias"), module.eps)
    if isinstance(module, RmsNorm):
        return rms_norm(x, list(x.shape[-1:]), weight, module.eps)  # type: ignore[no-any-return]
    raise TypeError(f"norm layer {type(module).__name__} is not supported; adapters refuse it first")


def _gated_norm(module: Any, weight: Tensor | None, bias: Tensor | None, gate: Tensor, x: Tensor) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    gate = gate.to(y.dtype)
    share = gate / gate.sum()
    if isinstance(module, nn.LayerNorm):
        y = y - (y * share).sum(-1, keepdim=True)
    y = y * torch.rsqrt((y.square() * share).sum(-1, keepdim=True) + module.eps)
    y = y * (gate if weight is None else weight * gate)
    return (y if bias is None else y + bias * gate).to(x.dtype)


def split_heads(qkv: Tensor, widths: Sequence[int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 2HD + V) -> q, k (B, H, N, D) and v (B, N, V). widths: channels of V in each head."""
    heads = len(widths)
    qk, v = qkv.split([2 * heads * head_dim, sum(widths)], dim=-1)
    q, k = qk.unflatten(-1, (2, heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, V), as attention leaves it -> (B, N, H*V)."""
    x = x.transpose(1, 2)
    if torch.compiler.is_exporting():  # fused attention's output is contiguous here, that of its decomposition is not
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


def by_width(
    qkv: Tensor, widths: Sequence[int], head_dim: int, attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
) -> Tensor:
    """(B, N, 2HD + V) -> (B, N, V): heads whose V has the same width run together, without padding (section 2.5).

    attend: q, k (B, h, N, D), v (B, h, N, w) and an index of those h heads -> (B, h, N, w).
    """
    B, N, _ = qkv.shape
    if all(w == head_dim for w in widths):  # one permute of the whole, as timm does
        q, k, v = qkv.reshape(B, N, 3, len(widths), head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return join_heads(attend(q, k, v, slice(None)))
    q, k, v = split_heads(qkv, widths, head_dim)
    if len(set(widths)) == 1:
        v = v.unflatten(-1, (len(widths), -1)).transpose(1, 2)
        return join_heads(attend(q, k, v, slice(None)))
    parts = list(v.split(list(widths), dim=-1))
    for width in sorted(set(widths)):
        heads = [h for h, w in enumerate(widths) if w == width]
        x = attend(q[:, heads], k[:, heads], torch.stack([parts[h] for h in heads], dim=1), heads)
        for h, part in zip(heads, x.unbind(1), strict=True):
            parts[h] = part
    return torch.cat(parts, dim=-1)


def attention(attn: Any, params: Params, widths: Sequence[int], x_BNS: Tensor, scale: float | None = None) -> Tensor:
    """timm's Attention on sliced parameters, widths: channels of V in each kept head. Returns (B, N, S)."""

    def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHNV: Tensor, _: Any) -> Tensor:
        q_BHND, k_BHND = attn.q_norm(q_BHND), attn.k_norm(k_BHND)
        if attn.fused_attn:
            dropout_p = attn.attn_drop.p if attn.training else 0.0
            return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHNV, dropout_p=dropout_p, scale=scale)
        scores = (q_BHND * attn.scale) @ k_BHND.transpose(-2, -1)
        return attn.attn_drop(scores.softmax(dim=-1)) @ v_BHNV  # type: ignore[no-any-return]

    qkv = F.linear(x_BNS, params["attn.qkv.weight"], params.get("attn.qkv.bias"))
    x = by_width(qkv, widths, attn.head_dim, attend)
    x = norm(attn.norm, params, "attn.norm", x)
    x = F.linear(x, params["attn.proj.weight"], params.get("attn.proj.bias"))
    return attn.proj_drop(x)  # type: ignore[no-any-return]


def mlp(module: Any, params: Params, x: Tensor) -> Tensor:
    """timm's Mlp on sliced parameters: (..., R) -> (..., R)."""
    x = F.linear(x, params["mlp.fc1.weight"], params.get("mlp.fc1.bias"))
    x = module.drop1(module.act(x))
    x = norm(module.norm, params, "mlp.norm", x)
    return module.drop2(F.linear(x, params["mlp.fc2.weight"], params.get("mlp.fc2.bias")))  # type: ignore[no-any-return]


def gated(params: dict[str, Tensor], term: Term, shape: BlockShape) -> dict[str, Tensor]:
    """Fold a term's weight and gates into its parameters.

    Scaling a weight by g costs its size; scaling the activations would cost tokens x channels, and their
    gradient would need them kept.
    """
    scaled = dict(params)

    def scale(name: str, by: Tensor) -> None:
        if name in scaled:
            scaled[name] = scaled[name] * by

    if term.head_gate is not None:
        widths = torch.tensor(v_widths(term.slice, shape), device=term.head_gate.device)
        scale("attn.proj.weight", term.head_gate.repeat_interleave(widths))
    if term.hidden_gate is not None:
        scale("mlp.fc2.weight", term.hidden_gate)
    if term.channel_gate is not None:
        scale("mlp.fc1.weight", term.channel_gate)
        scale("mlp.fc2.weight", term.channel_gate[:, None])
        scale("mlp.fc2.bias", term.channel_gate)
    if term.weight is not None:
        for half, layer_scale in (("attn.proj", "ls1.gamma"), ("mlp.fc2", "ls2.gamma")):
            for name in [layer_scale] if layer_scale in scaled else [f"{half}.weight", f"{half}.bias"]:
                scale(name, term.weight)
    return scaled


def layer_scale(params: Params, name: str, y: Tensor) -> Tensor:
    """timm's LayerScale, where the block has one."""
    return y * params[name] if name in params else y


Attend = Callable[[Params, Sequence[int], Tensor], Tensor]


def mixed_block(
    block: Any, params: Params, shape: BlockShape, mixture: BlockMixture, attend: Attend, x: Tensor
) -> Tensor:
    """One block of the small path, equation (3.5): z' = z + sum_i g_i MSA_i(LN z); out = z' + sum_i g_i MLP_i(LN z').

    x: (B, N, E) or (B, H, W, E), E the stage's width. attend: the family's attention, from the normed slice to
    the slice. One stochastic-depth draw per half-block is shared by all its terms.
    """
    terms = mixture.terms
    each = slice_block_each(params, shape, [t.slice for t in terms])
    sliced = [gated(p, t, shape) for p, t in zip(each, terms, strict=True)]
    attn_terms = [(t.slice, p) for t, p in zip(terms, sliced, strict=True) if t.slice.attn]
    mlp_terms = [(t.slice, p) for t, p in zip(terms, sliced, strict=True) if t.slice.mlp]

    z = x
    ys = []
    for (kept, p), z_S in zip(attn_terms, read_prefixes(x, [s.stream for s, _ in attn_terms]), strict=True):
        y_S = attend(p, v_widths(kept, shape), norm(block.norm1, p, "norm1", z_S))
        ys.append(layer_scale(p, "ls1.gamma", y_S))
    if ys:
        z = add_prefixes(x, drop_together(block.drop_path1, ys))

    ys = []
    out = z
    for (kept, p), z_S in zip(mlp_terms, read_prefixes(z, [s.stream for s, _ in mlp_terms]), strict=True):
        h_S = norm(block.norm2, p, "norm2", z_S)
        if kept.mlp_stream is None:
            ys.append(layer_scale(p, "ls2.gamma", mlp(block.mlp, p, h_S)))
            continue
        index = torch.arange(count(kept.mlp_stream), device=x.device)
        if not isinstance(kept.mlp_stream, int):
            index = torch.tensor(kept.mlp_stream, device=x.device)
        y_R = layer_scale(p, "ls2.gamma", mlp(block.mlp, p, h_S.index_select(-1, index)))
        ys.append(torch.zeros_like(z_S, dtype=y_R.dtype).index_copy(-1, index, y_R))
    if ys:
        out = add_prefixes(z, drop_together(block.drop_path2, ys))
    return out if mixture.keep is None else torch.lerp(x, out, mixture.keep.to(x.dtype))


def drop_together(drop_path: Any, ys: Sequence[Tensor]) -> list[Tensor]:
    """Stochastic depth (timm's DropPath) with a single draw per image for all of ys."""
    if not getattr(drop_path, "drop_prob", 0.0) or not drop_path.training:
        return list(ys)
    mask = drop_path(ys[0].new_ones((ys[0].shape[0],) + (1,) * (ys[0].dim() - 1)))
    return [y * mask for y in ys]
