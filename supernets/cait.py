"""timm's Cait as a backbone: talking heads, LayerScale, and class attention behind the blocks. One stage.

Talking heads mix their scores before the softmax (`proj_l`) and after it (`proj_w`), so that head h is three things: a
product of q and k, a softmax, and a map over v. A head goes as all three, with its rows and columns of both mixings:
what is left mixes what is left. It is what zeros in its q, k and v, in its rows and columns and in those of the
projection give: its product is zero in every other head's scores, and its softmax has no weight in their maps.

Class attention (`blocks_token_only`) stays whole inside, as attention pooling does: it reads and writes the kept
channels. Letters as in layers.py.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed
from timm.models.cait import ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from torch import Tensor, nn

from search_spaces.slices import BlockShape
from supernets.adapter import OuterAxis, refuse
from supernets.axes import BlockAxes, HalfAxes, HeadWidths, Params
from supernets.compact_block import SkippedBlock
from supernets.compact_eva import CompactEvaBlock
from supernets.flops import BlockCosts, NetworkCosts, PerWidth
from supernets.layers import join_heads, linear, mlp, norm
from supernets.timm_block import (
    ATTENTION,
    MLP,
    NarrowAttention,
    TimmBlockAdapter,
    check_compact,
    check_norm,
    has_attn,
    has_mlp,
    shape_of,
)

MIXED = {f"attn.{name}.{leaf}": ("H",) * n for name in ("proj_l", "proj_w") for leaf, n in (("weight", 2), ("bias", 1))}
TALKING = HalfAxes(
    axes=dict(ATTENTION.axes) | MIXED | {"gamma_1": ("S",)}, outputs=("gamma_1", "attn.proj"), norm="norm1"
)
SCALED_MLP = replace(MLP, axes=dict(MLP.axes) | {"gamma_2": ("R",)}, outputs=("gamma_2", "mlp.fc2"))
READERS = {"norm1": ("attn.q", "attn.k", "attn.v"), "norm2": ("mlp.fc1",)}  # of class attention, by their norm
WRITERS = {"gamma_1": "attn.proj", "gamma_2": "mlp.fc2"}  # by their LayerScale


def talking_attention(
    attn: Any, heads: HeadWidths, qkv: Tensor, mix_l: Callable[[Tensor], Tensor], mix_w: Callable[[Tensor], Tensor]
) -> Tensor:
    """q, k and v (B, N, 2HD + V) -> (B, N, V), before the projection. mix_l, mix_w: (..., H) -> (..., H)."""
    h, D = heads.number, heads.qk
    if heads.v == D:  # one permute of the whole, as timm does
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, h, D).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = qkv.split([h * D, h * D, heads.v_total], dim=-1)
        q, k = (t.unflatten(-1, (h, D)).transpose(1, 2) for t in (q, k))
    scores = (q * attn.scale) @ k.transpose(-2, -1)  # (B, H, N, N)
    maps = mix_l(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
    maps = attn.attn_drop(mix_w(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    if not isinstance(heads.v, int):
        return torch.cat([maps[:, i] @ part for i, part in enumerate(v.split(list(heads.v), dim=-1))], dim=-1)
    return join_heads(maps @ (v if heads.v == D else v.unflatten(-1, (h, heads.v)).transpose(1, 2)))


class CompactTalkingAttention(NarrowAttention):
    """timm's TalkingHeadAttn whose heads were cut. Children keep timm's names."""

    proj_l: Any
    proj_w: Any

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, S) -> (B, N, S)."""
        x = talking_attention(self, self.heads, self.qkv(x), self.proj_l, self.proj_w)
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class TalkingBlock(LayerScaleBlock):  # type: ignore[misc]
    """timm's, whose halves pass a stochastic depth each, as in its other blocks."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, S) -> (B, N, S)."""
        x = x + self.drop_path1(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path2(self.gamma_2 * self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


def adopt(block: Any) -> None:
    """One of timm's blocks as such a one, in place."""
    block.__class__ = TalkingBlock
    block.drop_path1, block.drop_path2 = block.drop_path, copy.deepcopy(block.drop_path)
    del block.drop_path
    block.attn.head_dim = block.attn.proj.in_features // block.attn.num_heads


def class_attention(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, E) of the class token, k and v (B, 1 + N, E) of all -> (B, 1, E)."""
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q.unsqueeze(1), k, v))
    if attn.fused_attn:
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:
        x = attn.attn_drop(((q * attn.scale) @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
    return x.transpose(1, 2).flatten(2)


class WholeClassAttn(ClassAttn):  # type: ignore[misc]
    """timm's, whose heads need not be as wide together as the tokens that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + N, S) -> (B, 1, S)."""
        x = class_attention(self, self.q(x[:, 0]), self.k(x), self.v(x))
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


class CaitAdapter(TimmBlockAdapter):
    """Cait as blocks, stem and classifier; class attention belongs to its pooling."""

    block_axes = BlockAxes(TALKING, SCALED_MLP)
    layer_scales = ("gamma_1", "gamma_2")
    compact_block = CompactEvaBlock

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self._check(backbone)
        for block in backbone.blocks:
            if type(block) is LayerScaleBlock:
                adopt(block)
        for block in backbone.blocks_token_only:
            block.attn.__class__ = WholeClassAttn
        E, embed = backbone.embed_dim, backbone.patch_embed
        self.input_size = (embed.proj.in_channels, *embed.img_size)
        self.block_names = tuple(f"blocks.{i}" for i in range(len(backbone.blocks)))
        self.class_names = tuple(f"blocks_token_only.{i}" for i in range(len(backbone.blocks_token_only)))
        self.shapes = tuple(shape_of(0, E, block) for block in backbone.blocks)
        self.classifiers = ("head",)
        each = [(name, norm, layers) for name in self.class_names for norm, layers in READERS.items()]
        self.outer_readers = {f"{name}.{norm}": tuple(f"{name}.{layer}" for layer in ls) for name, norm, ls in each}
        self.outer_readers |= {"norm": self.classifiers}
        self.outer_norms = dict.fromkeys(self.outer_readers, ("S", 0))
        self.outer_scalings = {
            f"{name}.{gamma}": tuple(f"{name}.{layer}.{leaf}" for leaf in ("weight", "bias"))
            for name in self.class_names
            for gamma, layer in WRITERS.items()
        }
        outside = {name: p for name, p in backbone.named_parameters() if not name.startswith("blocks.")}
        self.outer_axes = {name: self._axes(name, p.dim()) for name, p in outside.items()}
        widths = {name: p.numel() for name, p in outside.items() if ("S", 0) in self.outer_axes[name]}
        N, classes = embed.num_patches, backbone.head.out_features
        costs = NetworkCosts(
            blocks=tuple(self.block_costs(b, s, N, N, N) for b, s in zip(backbone.blocks, self.shapes, strict=True)),
            flops=replace(self._class_flops(1 + N, classes), first=N * embed.proj.weight[0].numel()),
            params=PerWidth(
                constant=sum(p.numel() for name, p in outside.items() if name not in widths),
                first=sum(widths.values()) // E - classes,
                last=classes,
            ),
        )
        self.costs = self.stream_costs(costs)

    def _axes(self, name: str, dims: int) -> tuple[OuterAxis, ...]:
        if name in ("cls_token", "pos_embed"):  # (1, n, E)
            return None, None, ("S", 0)
        if name.rpartition(".")[0] in {layer for layers in self.outer_readers.values() for layer in layers}:
            return (None, ("S", 0))[:dims]  # weight (units, E) and bias (units,), of the classifier too
        return (("S", 0), *([None] * (dims - 1)))  # patch_embed.proj (E, C, p, p); writers (E, units); (E,)

    def _class_flops(self, tokens: int, classes: int) -> PerWidth:
        """Class attention over so many tokens, its MLPs and the classifier."""
        constant, last = 0, classes
        for block in self.backbone.blocks_token_only:
            inner, hidden = block.attn.q.out_features, block.mlp.fc1.out_features
            constant += 2 * tokens * inner
            last += 2 * inner + 2 * tokens * inner + 2 * hidden
        return PerWidth(constant, first=0, last=last)

    def block_costs(
        self, block: nn.Module, shape: BlockShape, attn_tokens: int, attended: int, mlp_tokens: int
    ) -> BlockCosts:
        costs = super().block_costs(block, shape, attn_tokens, attended, mlp_tokens)
        mixed = ((2 * attn_tokens * attended, "HH"),) if shape.attn else ()
        return replace(costs, attn_once=mixed, norm_after_gate=True, pads_heads=False)

    def _check(self, backbone: Any) -> None:
        embed = backbone.patch_embed
        if type(embed) is not PatchEmbed or not isinstance(embed.norm, nn.Identity):
            raise refuse(backbone, type(embed).__name__, "use timm's PatchEmbed without norm")
        if not backbone.global_pool:
            raise refuse(backbone, "a network without pooling", "use global_pool=token or avg")
        if not len(backbone.blocks) or not backbone.blocks_token_only:
            raise refuse(backbone, "a network without blocks, or without class attention", "use depths of 1 or more")
        check_norm(backbone, backbone.norm, "norm")
        for i, block in enumerate(backbone.blocks):
            if type(block) not in (LayerScaleBlock, TalkingBlock, CompactEvaBlock, SkippedBlock):
                raise refuse(backbone, f"block type {type(block).__name__}", "use timm's LayerScaleBlock")
            check_compact(backbone, block, f"blocks.{i}", backbone.embed_dim)
            if has_attn(block) and type(block.attn) not in (TalkingHeadAttn, CompactTalkingAttention):
                raise refuse(backbone, type(block.attn).__name__, "use timm's TalkingHeadAttn")
        for block in backbone.blocks_token_only:
            if (type(block), type(block.attn)) not in (
                (LayerScaleBlockClassAttn, ClassAttn),
                (LayerScaleBlockClassAttn, WholeClassAttn),
            ):
                raise refuse(backbone, f"block type {type(block).__name__}", "use timm's class attention")
        for block in (*backbone.blocks, *backbone.blocks_token_only):
            if has_mlp(block) and type(block.mlp) is not Mlp:
                raise refuse(backbone, f"MLP type {type(block.mlp).__name__}", "use timm's Mlp")
            for where in (*(["norm1"] if has_attn(block) else []), *(["norm2"] if has_mlp(block) else [])):
                check_norm(backbone, block.get_submodule(where), where)

    def stem(self, params: Params, images: Tensor) -> Tensor:
        cait, proj = self.backbone, self.backbone.patch_embed.proj
        x = F.conv2d(images, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"], stride=proj.stride)
        return cait.pos_drop(x.flatten(2).transpose(1, 2) + params["pos_embed"])  # type: ignore[no-any-return]

    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        raise AssertionError("a Cait has one stage")

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        def mix(name: str) -> Callable[[Tensor], Tensor]:
            return lambda scores: linear(params, f"attn.{name}", scores)

        x = talking_attention(block.attn, heads, linear(params, "attn.qkv", x), mix("proj_l"), mix("proj_w"))
        return block.attn.proj_drop(linear(params, "attn.proj", x))  # type: ignore[no-any-return]

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        attn = block.attn
        attn.num_heads = heads.number
        whole = heads.qk == heads.v == attn.head_dim and heads.v_total == attn.qkv.in_features
        return attn if whole and type(attn) is TalkingHeadAttn else CompactTalkingAttention(attn, heads)

    def _class_token(self, params: Params, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The class token (B, 1, w) after class attention over x, and what every layer there reads."""
        cls = params["cls_token"].expand(x.shape[0], -1, -1)
        read: dict[str, Tensor] = {}
        for name, block in zip(self.class_names, self.backbone.blocks_token_only, strict=True):
            own = {leaf.removeprefix(f"{name}."): p for leaf, p in params.items() if leaf.startswith(f"{name}.")}
            h = norm(block.norm1, own, "norm1", torch.cat((cls, x), dim=1))
            read |= {f"{name}.attn.q": h[:, 0], f"{name}.attn.k": h, f"{name}.attn.v": h}
            y = class_attention(
                block.attn, *(linear(own, layer, read[f"{name}.{layer}"]) for layer in READERS["norm1"])
            )
            y = block.attn.proj_drop(linear(own, "attn.proj", y))
            cls = cls + block.drop_path(own["gamma_1"] * y)
            read[f"{name}.mlp.fc1"] = h = norm(block.norm2, own, "norm2", cls)
            cls = cls + block.drop_path(own["gamma_2"] * mlp(block.mlp, own, h))
        return cls, read

    def pool_reads(self, params: Params, x: Tensor) -> Mapping[str, Tensor]:
        return self._class_token(params, x)[1]

    def pool(self, params: Params, x: Tensor) -> Tensor:
        x = torch.cat((self._class_token(params, x)[0], x), dim=1)
        x = norm(self.backbone.norm, params, "norm", x)
        return x[:, 1:].mean(dim=1) if self.backbone.global_pool == "avg" else x[:, 0]

    def classify(self, params: Params, features: Tensor) -> Tensor:
        features = self.backbone.head_drop(features)
        return F.linear(features, params["head.weight"], params["head.bias"])

    def resize(self, stage_widths: tuple[int, ...]) -> None:
        cait, (w,) = self.backbone, stage_widths
        cait.embed_dim = cait.num_features = cait.head_hidden_size = w
        for info in cait.feature_info:
            info["num_chs"] = w
