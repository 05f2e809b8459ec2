"""timm's layers as functions of sliced parameters: norms, attention, MLP, LayerScale. They store no slice.

Shape letters: B images (times windows in Swin), N tokens, S slice of the stream, R channels the MLP reads and writes,
H kept heads, D head width, V channels of V in a head (without an H beside it, in all of them).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from timm.layers.fast_norm import rms_norm
from torch import Tensor, nn

from search_spaces.slices import Kept, count
from supernets.axes import Params
from supernets.rotated import StemNorm, StreamNorm


def norm(module: nn.Module, params: Params, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the channels of x alone, with the sliced weight and bias `name.*`.

    With `name.gate` (w,), how much of each channel exists, mean and variance are over what exists, and so is the
    result: a gate of ones and zeros gives the norm of the channels of gate one, and zero elsewhere.
    """
    if isinstance(module, nn.Identity):
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


def stem_norm(module: nn.Module, params: Params, name: str, x: Tensor) -> Tensor:
    """A norm whose output is the stream: over the slice, or over all of x and then into a rotated slice."""
    if isinstance(module, StemNorm):
        return module.sliced(x, params[f"{name}.rotation"])
    return norm(module, params, name, x)


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


def layer_scale(params: Params, name: str, y: Tensor) -> Tensor:
    """timm's LayerScale, where the block has one."""
    return y * params[name] if name in params else y


def on_channels(half: Callable[[Tensor], Tensor], x_S: Tensor, kept: Kept | None) -> Tensor:
    """What a half gives for the kept channels of its input, (..., S), and zero in the others. None: all are kept."""
    if kept is None:
        return half(x_S)
    index = torch.arange(count(kept), device=x_S.device)
    if not isinstance(kept, int):
        index = torch.tensor(kept, device=x_S.device)
    y_R = half(x_S.index_select(-1, index))
    return torch.zeros_like(x_S, dtype=y_R.dtype).index_copy(-1, index, y_R)
