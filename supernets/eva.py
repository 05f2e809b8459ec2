"""timm's Eva (EVA, EVA-02, DINOv3, Perception Encoder, ViTs with rotary embeddings) as a backbone. One stage."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from search_spaces.slices import BlockShape
from supernets.adapter import refuse
from supernets.axes import BlockAxes, HalfAxes, HeadWidths, Params
from supernets.compact_block import CompactLateBlock
from supernets.compact_eva import (
    CompactEvaAttention,
    CompactEvaBlock,
    Projected,
    turned_attention,
    turns_of,
)
from supernets.layers import fused_qkv, linear, norm, stem_norm
from supernets.rotary import FREQS, MixedTurns, adopt
from supernets.timm_block import ATTENTION, MLP, has_attn, heads_of, shape_of
from supernets.vit import VitAdapter

EVA_ATTENTION = HalfAxes(
    axes=dict(ATTENTION.axes)
    | {
        "attn.q_bias": ("HD",),
        "attn.v_bias": ("HV",),
        "attn.q_proj.weight": ("HD", "S"),
        "attn.q_proj.bias": ("HD",),
        "attn.k_proj.weight": ("HD", "S"),
        "attn.k_proj.bias": ("HD",),
        "attn.v_proj.weight": ("HV", "S"),
        "attn.v_proj.bias": ("HV",),
        "gamma_1": ("S",),
        FREQS: (".", "H", "P"),
    },
    outputs=("gamma_1", "attn.proj"),
    late_norms=ATTENTION.late_norms,
    norm=ATTENTION.norm,
    keys=("attn.k_proj.weight", "attn.k_proj.bias"),
)
EVA_MLP = replace(MLP, axes=dict(MLP.axes) | {"gamma_2": ("R",)}, outputs=("gamma_2", "mlp.fc2"))


def pair_order(head_dim: int, halves: bool) -> tuple[int, ...]:
    """The channels of a head in the order in which narrower ones keep them: pairs that turn together, spread out.

    timm has the pairs of one axis of the image after those of the other, each from the fastest to the slowest. By the
    reversed bits of a pair's number any first few are of both axes and of all speeds alike. halves: the two of a pair
    are half a head apart, and not neighbours.
    """
    pairs = head_dim // 2
    bits = (pairs - 1).bit_length()
    spread = sorted(range(pairs), key=lambda pair: f"{pair:0{bits}b}"[::-1])
    return tuple(c for p in spread for c in ((p, p + pairs) if halves else (2 * p, 2 * p + 1)))


class EvaAdapter(VitAdapter):
    """Eva as blocks, stem and classifier. Its blocks are given the sines and cosines of every position."""

    block_axes = BlockAxes(EVA_ATTENTION, EVA_MLP)
    block_types = (EvaBlock, CompactEvaBlock)
    late_types = (EvaBlockPostNorm, CompactLateBlock)
    attention_types = (EvaAttention, AttentionRope, CompactEvaAttention)
    plain_attention = "use timm's EvaAttention or AttentionRope"
    layer_scales = ("gamma_1", "gamma_2")
    compact_block = CompactEvaBlock
    of_blocks = ("blocks.", "rope.")

    def __init__(self, backbone: Any) -> None:
        self.mixed = isinstance(adopt(backbone.rope), MixedTurns)
        super().__init__(backbone)
        fused = [block.attn.qkv for block in backbone.blocks if has_attn(block) and is_fused(block.attn)]
        if any(qkv.bias is None for qkv in fused):
            parted = {"attn.qkv.weight": ("attn.q_bias", None, "attn.v_bias")}
            self.block_axes = replace(self.block_axes, attn=replace(self.block_axes.attn, parted_biases=parted))
        self._turns: tuple[Any, Tensor] | None = None  # of one device and precision
        self._drawn: tuple[Any, int, Tensor] | None = None  # for which images, as they were, which draw

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows of no images."""
        return self.__dict__ | {"_drawn": None}

    def one_draw(self, images: Tensor) -> AbstractContextManager[None]:
        rope = self.backbone.rope
        if not getattr(rope, "aug_active", False) or not rope.training or torch.compiler.is_compiling():
            return nullcontext()  # what compiles a pass calls this before
        if self._drawn is None or self._drawn[0]() is not images or self._drawn[1] != images._version:
            draw = rope.drawn(self.backbone.patch_embed.grid_size)
            self._drawn = weakref.ref(images), images._version, draw
        return rope.holding(self._drawn[2])  # type: ignore[no-any-return]

    def block_shape(self, block: Any) -> BlockShape:
        if self.backbone.rope is None:
            return super().block_shape(block)
        shape = shape_of(0, self.width, block, unit=2)
        if not shape.attn:
            return shape
        order = pair_order(block.attn.head_dim, block.attn.rotate_half)[: shape.head_dim]
        places = {channel: place for place, channel in enumerate(sorted(order))}  # of those that a cut head has
        return replace(shape, qk_order=tuple(places[channel] for channel in order))

    def _check(self, backbone: Any) -> None:
        super()._check(backbone)
        if not isinstance(backbone.norm, nn.Identity) and not isinstance(backbone.fc_norm, nn.Identity):
            raise refuse(backbone, "a norm before pooling and one after it", "use one of the two")
        if backbone.patch_drop is not None:
            raise refuse(backbone, "patch_drop_rate", "leave it out")
        for block in filter(has_attn, backbone.blocks):
            if getattr(block.attn, "num_kv_heads", block.attn.num_heads) != block.attn.num_heads:
                raise refuse(backbone, "grouped queries (num_kv_heads)", "use as many heads of k and v as of q")

    def block_parameters(self, block: nn.Module) -> dict[str, Tensor]:
        params = super().block_parameters(block)
        if self.mixed and has_attn(block):
            rope = self.backbone.rope
            params[FREQS] = rope.of_block(rope.freqs, self._index(block))
        return params

    def block_parameter(self, block: nn.Module, name: str) -> nn.Parameter:
        if name == FREQS:
            return self.backbone.rope.parameter_of(self._index(block))  # type: ignore[no-any-return]
        return super().block_parameter(block, name)

    def _index(self, block: nn.Module) -> int:
        return next(i for i, other in enumerate(self.backbone.blocks) if other is block)

    def joined(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.mixed:
            return values
        names = [f"{name}.{FREQS}" for name in self.block_names]
        parts = [values[name] for name in names if name in values]
        others = {name: value for name, value in values.items() if name not in names}
        return others | {FREQS: self.backbone.rope.joined(parts, len(names))}

    def join(self, prefix: list[Tensor], x: Tensor) -> Tensor:
        return super().join(prefix, x) if prefix else x  # a copy has other strides, and what follows sums otherwise

    def stem(self, params: Params, images: Tensor) -> Tensor:
        eva = self.backbone
        return stem_norm(eva.norm_pre, params, "norm_pre", eva.pos_drop(self.embed(params, images)))

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        attn, rope = block.attn, self._rope(params)
        channels = turned_channels(attn, heads)
        if rope is not None and channels is not None and not self.mixed:
            rope = turns_of(rope, torch.tensor(channels, device=rope.device))

        def norm_qk(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return norm(attn.q_norm, params, "attn.q_norm", q), norm(attn.k_norm, params, "attn.k_norm", k)

        x = turned_attention(attn, heads, projected(params, x), rope, norm_qk)
        x = norm(attn.norm, params, "attn.norm", x)
        return attn.proj_drop(linear(params, "attn.proj", x))  # type: ignore[no-any-return]

    def _rope(self, params: Params) -> Tensor | None:
        """Sines and cosines of all positions, as timm's forward makes them: (P, 2d), of all channels that heads have.

        Where the frequencies are a block's own, of the heads and channels that are kept: (H, P, 2D).
        """
        eva, rope = self.backbone, self.backbone.rope
        if rope is None:
            return None
        if self.mixed:
            return rope.turns(params[FREQS], eva.patch_embed.grid_size)  # type: ignore[no-any-return]
        if getattr(rope, "held", None) is not None:
            return rope.held  # type: ignore[no-any-return]
        if hasattr(rope, "feat_shape") and not eva.dynamic_img_size:
            return rope.get_embed()  # type: ignore[no-any-return]
        buffer = next(rope.buffers())
        if self._turns is None or self._turns[0] != (buffer.device, buffer.dtype):
            with torch.inference_mode(False):
                self._turns = (buffer.device, buffer.dtype), rope.get_embed(shape=eva.patch_embed.grid_size)
        return self._turns[1]

    def head_parts(self, block: Any) -> dict[str, str]:
        taken = super().head_parts(block)
        if self.backbone.rope is not None:
            taken["qk"] = "q and k are turned by position inside the head (rotary embedding)"
        return taken

    def watch_qkv(self, block: Any, see: Callable[[Tensor], None]) -> Callable[[], None]:
        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            found = projected(self.block_parameters(block), inputs[0])
            see(found if isinstance(found, Tensor) else torch.cat(found, dim=-1))

        return block.attn.register_forward_pre_hook(hook).remove  # type: ignore[no-any-return]

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        attn = block.attn
        if self.mixed:  # each head has turns of its own, those of its channels alone
            heads = replace(heads, qk_channels=None)
        if isinstance(attn, CompactEvaAttention):
            return CompactEvaAttention(attn, replace(heads, qk_channels=turned_channels(attn, heads)))
        width, stream = heads.number * attn.head_dim, (attn.qkv or attn.q_proj).in_features
        # timm's own wants heads as wide together as the stream, and takes the weight of a biased qkv without calling it
        own = type(attn) is EvaAttention and (width != stream or (attn.qkv is not None and attn.q_bias is not None))
        if heads.qk != attn.head_dim or heads.v != attn.head_dim or own:
            return CompactEvaAttention(attn, heads)
        attn.num_heads = heads.number
        if type(attn) is AttentionRope:
            attn.num_kv_heads, attn.attn_dim, attn.kv_dim = heads.number, width, width
        elif attn.k_bias is not None:
            attn.k_bias = attn.k_bias[:width].clone()
        return attn  # type: ignore[no-any-return]

    def resize(self, stage_widths: tuple[int, ...]) -> None:
        super().resize(stage_widths)
        if self.mixed:
            heads = [heads_of(block.attn) if has_attn(block) else None for block in self.backbone.blocks]
            self.backbone.rope.sizes = tuple((0, 0) if h is None else (h.number, h.qk // 2) for h in heads)


def is_fused(attn: Any) -> bool:
    """Whether q, k and v are one layer."""
    return getattr(attn, "qkv", None) is not None


def turned_channels(attn: Any, heads: HeadWidths) -> tuple[int, ...] | None:
    """Which of the backbone's channels of a head those of q and k are; None: all of them.

    attn: the backbone's, or a compact network's, which has some of them itself.
    """
    own = attn.heads.qk_channels if isinstance(attn, CompactEvaAttention) else None
    if own is None or heads.qk_channels is None:
        return own if heads.qk_channels is None else heads.qk_channels
    return tuple(own[channel] for channel in heads.qk_channels)


def projected(params: Params, x: Tensor) -> Projected:
    """q, k and v of normed tokens, fused or each by itself, with the biases that they have."""
    if "attn.qkv.weight" not in params:
        q, k, v = (linear(params, f"attn.{name}_proj", x) for name in "qkv")
        return q, k, v
    return fused_qkv(params, x)
