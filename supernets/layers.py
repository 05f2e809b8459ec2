"""timm's layers as functions of sliced parameters: norms, attention, MLPs, LayerScale. They store no slice.

Shape letters: B images (times windows in Swin), N tokens, S slice of the stream, R channels the MLP reads and writes,
H kept heads, D head width, V channels of V in a head (without an H beside it, in all of them).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, RmsNorm, SwiGLU
from timm.layers.norm import rms_norm  # torch's own where there is one, as in RmsNorm
from torch import Tensor, nn

from search_spaces.slices import Kept, count
from supernets.axes import HeadWidths, Params
from supernets.rotated import StemLayer, StemNorm, StreamNorm


def norm(module: nn.Module | None, params: Params, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the channels of x alone, with the sliced weight and bias `name.*`; None: x itself.

    With `name.gate` (w,), how much of each channel exists, mean and variance are over what exists, and so is the
    result: a gate of ones and zeros gives the norm of the channels of gate one, and zero elsewhere.
    """
    if module is None or isinstance(module, nn.Identity):
        return x
    weight = params.get(f"{name}.weight")
    if isinstance(module, StreamNorm):
        assert weight is not None
        return module.sliced(x, weight, params.get(f"{name}.bias"), params.get(f"{name}.gate"))
    if f"{name}.gate" in params:
        return _gated_norm(module, weight, params.get(f"{name}.bias"), params[f"{name}.gate"], x)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], weight, params.get(f"{name}.bias"), module.eps)
    if isinstance(module, RmsNorm):
        return rms_norm(x, list(x.shape[-1:]), weight, module.eps)  # type: ignore[no-any-return]
    raise TypeError(f"norm layer {type(module).__name__} is not supported; adapters refuse it first")


def late_norm(module: nn.Module, params: Params, name: str, x: Tensor) -> Tensor:
    """A norm at the end of a half or a merging; x itself where its parameters are left out, as what it would read."""
    return norm(module, params, name, x) if f"{name}.weight" in params else x


def stem_norm(module: nn.Module, params: Params, name: str, x: Tensor) -> Tensor:
    """A norm whose output is the stream: over the slice, or over all of x and then into a rotated slice.

    Of a compact network, whose rotation is a layer by now, that layer's rows are what is sliced.
    """
    if isinstance(module, StemLayer):
        x = norm(module.get_submodule("norm"), params, f"{name}.norm", x)
        return linear(params, f"{name}.linear", x)
    if isinstance(module, StemNorm):
        return module.sliced(x, params[f"{name}.rotation"])
    return norm(module, params, name, x)


def _gated_norm(module: Any, weight: Tensor | None, bias: Tensor | None, gate: Tensor, x: Tensor) -> Tensor:
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    gate = gate.to(y.dtype)
    share = gate / gate.sum().clamp_min(torch.finfo(gate.dtype).tiny)  # nothing exists where a half is removed
    if isinstance(module, nn.LayerNorm):
        y = y - (y * share).sum(-1, keepdim=True)
    y = y * torch.rsqrt((y.square() * share).sum(-1, keepdim=True) + module.eps)
    y = y * (gate if weight is None else weight * gate)
    return (y if bias is None else y + bias * gate).to(x.dtype)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, V), as attention leaves it -> (B, N, H*V)."""
    x = x.transpose(1, 2)
    if torch.compiler.is_exporting():  # fused attention's output is contiguous here, that of its decomposition is not
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(2)


def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With zeros at the end of the last axis, up to the wider of q and v."""
    more = q.shape[-1] - v.shape[-1]
    if more > 0:
        v = F.pad(v, (0, more))
    elif more < 0:
        q, k = F.pad(q, (0, -more)), F.pad(k, (0, -more))
    return q, k, v


def by_width(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    heads: HeadWidths,
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor],
    norm_qk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """(B, N, 2HD + V), or q, k and v each (B, N, .), -> (B, N, V): attention of every head at its own widths.

    attend: q, k (B, h, N, D), v (B, h, N, w) and an index of those h heads -> (B, h, N, w). norm_qk: before it. Even
    heads run together, what is narrower padded: fused kernels want one width, and others take two to three times as
    long. Heads whose V differ (section 2.5) run with those of their own width, without padding.
    """
    h, D = heads.number, heads.qk
    if not isinstance(qkv, Tensor):
        q, k = (t.unflatten(-1, (h, D)).transpose(1, 2) for t in qkv[:2])
        v = qkv[2].unflatten(-1, (h, D)).transpose(1, 2) if heads.v == D else qkv[2]
    elif heads.v == D:  # one permute of the whole, as timm does
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, h, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        qk, v = qkv.split([2 * h * D, heads.v_total], dim=-1)
        q, k = qk.unflatten(-1, (2, h, D)).permute(2, 0, 3, 1, 4).unbind(0)
    if norm_qk is not None:
        q, k = norm_qk(q, k)
    if heads.v == D:
        return join_heads(attend(q, k, v, slice(None)))
    if isinstance(heads.v, int):
        v = v.unflatten(-1, (h, heads.v)).transpose(1, 2)
        return join_heads(attend(*padded(q, k, v), slice(None))[..., : heads.v])
    parts = list(v.split(list(heads.v), dim=-1))
    for width in sorted(set(heads.v)):
        alike = [i for i, w in enumerate(heads.v) if w == width]
        x = attend(q[:, alike], k[:, alike], torch.stack([parts[i] for i in alike], dim=1), alike)
        for i, part in zip(alike, x.unbind(1), strict=True):
            parts[i] = part
    return torch.cat(parts, dim=-1)


def linear(params: Params, name: str, x: Tensor) -> Tensor:
    """A linear layer `name.*` on its sliced parameters; x itself where they are left out, as what it would read."""
    weight = params.get(f"{name}.weight")
    return x if weight is None else F.linear(x, weight, params.get(f"{name}.bias"))


def joined_bias(q: Tensor, v: Tensor) -> Tensor:
    """The bias of fused q, k and v, of which k has none."""
    return torch.cat([q, torch.zeros_like(q), v])


def fused_qkv(params: Params, x: Tensor) -> Tensor:
    """q, k and v (B, N, 2HD + V) of a slice, with the biases that they have: in one, of q and v apart, or none."""
    if "attn.q_bias" not in params:
        return linear(params, "attn.qkv", x)
    return F.linear(x, params["attn.qkv.weight"], joined_bias(params["attn.q_bias"], params["attn.v_bias"]))


def attention(
    attn: Any,
    params: Params,
    heads: HeadWidths,
    x_BNS: Tensor,
    scale: float | None = None,
    bias_HNN: Tensor | None = None,
) -> Tensor:
    """timm's Attention on sliced parameters. Returns (B, N, S); without its projection (B, N, V).

    scale: of q k^T; by default that of heads as wide as the backbone's. bias_HNN: of the kept heads, added to it.
    """
    if scale is None and attn.scale != heads.qk**-0.5:
        scale = attn.scale

    def attend(q_BHND: Tensor, k_BHND: Tensor, v_BHNV: Tensor, index: Any) -> Tensor:
        bias = None if bias_HNN is None else bias_HNN[index].unsqueeze(0).to(q_BHND.dtype)
        if attn.fused_attn:
            dropout_p = attn.attn_drop.p if attn.training else 0.0
            return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHNV, bias, dropout_p=dropout_p, scale=scale)
        scores = (q_BHND * attn.scale) @ k_BHND.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return attn.attn_drop(scores.softmax(dim=-1)) @ v_BHNV  # type: ignore[no-any-return]

    def inner(name: str, x: Tensor) -> Tensor:
        return norm(getattr(attn, name, None), params, f"attn.{name}", x)

    x = by_width(fused_qkv(params, x_BNS), heads, attend, lambda q, k: (inner("q_norm", q), inner("k_norm", k)))
    return attn.proj_drop(linear(params, "attn.proj", inner("norm", x)))  # type: ignore[no-any-return]


def mlp(module: Any, params: Params, x: Tensor) -> Tensor:
    """timm's Mlp, GluMlp or SwiGLU on sliced parameters: (..., R) -> (..., R); without its second layer (..., M)."""
    if isinstance(module, SwiGLU):
        x = module.act(linear(params, "mlp.fc1_g", x)) * linear(params, "mlp.fc1_x", x)
    elif isinstance(module, GluMlp):
        first, second = linear(params, "mlp.fc1", x).chunk(2, dim=-1)
        x = first * module.act(second) if module.gate_last else module.act(first) * second
    else:
        x = module.act(linear(params, "mlp.fc1", x))
    x = norm(module.norm, params, "mlp.norm", module.drop1(x))
    return module.drop2(linear(params, "mlp.fc2", x))  # type: ignore[no-any-return]


def layer_scale(params: Params, name: str, y: Tensor) -> Tensor:
    """timm's LayerScale, where the block has one."""
    return y * params[name] if name in params else y


def on_channels(half: Callable[[Tensor], Tensor], x_S: Tensor, kept: Kept | None, writes: bool = True) -> Tensor:
    """What a half gives for the kept channels of its input, (..., S), and zero in the others. None: all are kept.

    writes: whether it gives channels at all; otherwise its result is returned as it is.
    """
    if kept is None:
        return half(x_S)
    index = torch.arange(count(kept), device=x_S.device)
    if not isinstance(kept, int):
        index = torch.tensor(kept, device=x_S.device)
    y_R = half(x_S.index_select(-1, index))
    if not writes:
        return y_R
    return torch.zeros_like(x_S, dtype=y_R.dtype).index_copy(-1, index, y_R)
