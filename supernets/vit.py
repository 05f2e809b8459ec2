"""timm's VisionTransformer (ViT, DeiT, two-headed distilled DeiT) as a backbone. One stage."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from search_spaces.slices import BlockShape
from supernets.adapter import OuterAxis, refuse
from supernets.attention_pool import adopt, pool_flops, pool_params, pooled
from supernets.axes import HeadWidths, Params
from supernets.compact_block import CompactBlock, CompactLateBlock, SkippedBlock
from supernets.flops import NetworkCosts, PerWidth
from supernets.layers import attention, norm, stem_norm
from supernets.rotated import StemLayer
from supernets.timm_block import (
    NarrowAttention,
    TimmBlockAdapter,
    check_compact,
    check_norm,
    has_attn,
    has_mlp,
    shape_of,
    with_norms_late,
    with_packed_gates,
)

STREAM_VECTORS = ("cls_token", "dist_token", "reg_token", "pos_embed")  # (1, n, E)
POOL = "attn_pool"


class VitAdapter(TimmBlockAdapter):
    """VisionTransformer and VisionTransformerDistilled as blocks, stem and classifier.

    With dynamic_img_size the supernet runs at the size that the network was built for, which is that of its costs.
    """

    block_types: tuple[type[nn.Module], ...] = (Block, CompactBlock)
    late_types: tuple[type[nn.Module], ...] = (ResPostBlock, CompactLateBlock)  # whose norms end the halves
    attention_types: tuple[type[nn.Module], ...] = (Attention, NarrowAttention)
    plain_attention = "use timm's plain Attention"
    of_blocks: tuple[str, ...] = ("blocks.",)  # first letters of the parameters that blocks have

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self.attn_pool = adopt(backbone, POOL)
        if any(type(block) in self.late_types for block in backbone.blocks):
            self.block_types, self.compact_block = self.late_types, CompactLateBlock
            self.block_axes = with_norms_late(self.block_axes)
        self._check(backbone)
        embed = backbone.patch_embed
        self.input_size = (embed.proj.in_channels, *embed.img_size)
        num_patches = embed.num_patches
        num_tokens = num_patches + backbone.num_prefix_tokens
        self.block_names = tuple(f"blocks.{i}" for i in range(len(backbone.blocks)))
        self.shapes = tuple(self.block_shape(block) for block in backbone.blocks)
        self.block_axes = replace(self.block_axes, mlp=with_packed_gates(self.block_axes.mlp, backbone.blocks))
        self.classifiers = tuple(name for name in ("head", "head_dist") if getattr(backbone, name, None) is not None)
        self._describe_streams(num_tokens)
        self.outer_axes = {
            name: self._axes(name, p.dim())
            for name, p in backbone.named_parameters()
            if not name.startswith(self.of_blocks)
        }
        norms = ("patch_embed.norm", "norm_pre", "norm", "fc_norm")
        self.outer_norms = {name: ("S", 0) for name in norms if not self._is_whole(f"{name}.")}
        E = self.width
        sliced = [name for name, axes in self.outer_axes.items() if ("S", 0) in axes]
        per_patch = embed.proj.weight[0].numel()
        flops, params = self._last_costs(num_tokens)
        costs = NetworkCosts(
            blocks=tuple(
                self.block_costs(block, shape, num_tokens, num_tokens, num_tokens)
                for block, shape in zip(backbone.blocks, self.shapes, strict=True)
            ),
            flops=replace(flops, first=num_patches * per_patch),
            params=replace(
                params, first=sum(backbone.get_parameter(name).numel() for name in sliced) // E - params.last
            ),
        )
        self.costs = self.stream_costs(self.with_stem_layer(costs))

    def norm_at(self, name: str) -> nn.Module:
        """A norm outside the blocks by its name in a ViT; nothing where the class has none by that name."""
        return getattr(self.backbone, name, None) or nn.Identity()

    @property
    def width(self) -> int:
        """Channels of the stream. A compact network with attention pooling has `embed_dim` features, and fewer."""
        width: int = self.backbone.embed_dim if self.attn_pool is None else self.attn_pool.kv.in_features
        return width

    def block_shape(self, block: Any) -> BlockShape:
        """The facts of a block."""
        return shape_of(0, self.width, block)

    def _last_costs(self, num_tokens: int) -> tuple[PerWidth, PerWidth]:
        """FLOPs and parameters of pooling and classifiers."""
        layers = [self.backbone.get_submodule(name) for name in self.classifiers]
        classes, biases = sum(c.out_features for c in layers), sum(c.bias.numel() for c in layers)
        if self.attn_pool is None:
            return PerWidth(0, first=0, last=classes), PerWidth(biases, first=0, last=classes)
        whole = [p for name, p in self.backbone.named_parameters() if name.startswith("fc_norm.")]
        flops, params = pool_flops(self.attn_pool, num_tokens - self._unpooled()), pool_params(self.attn_pool)
        weights = sum(c.weight.numel() for c in layers)
        return (
            replace(flops, constant=flops.constant + weights),
            replace(params, constant=params.constant + weights + biases + sum(p.numel() for p in whole)),
        )

    def _unpooled(self) -> int:
        """First tokens that attention pooling does not read."""
        return 0 if getattr(self.backbone, "pool_include_prefix", True) else self.backbone.num_prefix_tokens

    def _describe_streams(self, num_tokens: int) -> None:
        vit = self.backbone
        norms = ("norm", "fc_norm") if self.attn_pool is None else ("norm",)
        last = next((n for n in norms if not isinstance(self.norm_at(n), nn.Identity)), None)
        if last is not None:
            self.outer_readers = {last: self.classifiers if self.attn_pool is None else (f"{POOL}.kv",)}
        stem = None
        if not isinstance(self.norm_at("norm_pre"), nn.Identity):
            stem, self.stem_tokens = "norm_pre", num_tokens
            self.before_stem = ("patch_embed.", *STREAM_VECTORS)
        elif not isinstance(vit.patch_embed.norm, nn.Identity):
            stem, self.stem_tokens = "patch_embed.norm", vit.patch_embed.num_patches
            self.before_stem = ("patch_embed.proj.",)
        if stem is not None and isinstance(vit.get_submodule(stem), StemLayer):
            self.stem_layer = stem
        else:
            self.stem_norm = stem
        if last is None and self.attn_pool is not None:
            self.unrotated = {0: "attention pooling reads the stream without a norm"}
        elif last is None:
            self.unrotated = {0: "the classifier reads the stream without a norm (final_norm=False)"}
        elif vit.global_pool in ("max", "avgmax"):
            self.unrotated = {0: f"global_pool={vit.global_pool} takes maxima over tokens, channel by channel"}

    def _is_whole(self, name: str) -> bool:
        """Whether an outer parameter is not sliced.

        It lies before the layer that ends a compact network's stem, or behind what attention pooling reads.
        """
        if self.stem_layer is not None and name.startswith((*self.before_stem, f"{self.stem_layer}.norm.")):
            return True
        behind = (f"{POOL}.", "fc_norm.", *self.classifiers)
        return self.attn_pool is not None and name.startswith(behind) and name != f"{POOL}.kv.weight"

    def _axes(self, name: str, dims: int) -> tuple[OuterAxis, ...]:
        if self._is_whole(name):
            return (None,) * dims
        if name == f"{POOL}.kv.weight":  # (2 E, S)
            return None, ("S", 0)
        if name in STREAM_VECTORS:  # (1, n, E)
            return None, None, ("S", 0)
        if name.startswith(self.classifiers):  # weight (classes, E), bias (classes,)
            return (None, ("S", 0)) if dims == 2 else (None,)
        return (("S", 0), *([None] * (dims - 1)))  # patch_embed.proj (E, C, p, p) and (E,); norms (E,)

    def _check(self, backbone: Any) -> None:
        if type(backbone.patch_embed) is not PatchEmbed:
            raise refuse(backbone, type(backbone.patch_embed).__name__, "use timm's PatchEmbed")
        if backbone.patch_embed.dynamic_img_pad:
            raise refuse(backbone, "dynamic_img_pad", "give the size with img_size=")
        if backbone.global_pool == "":
            raise refuse(backbone, "a network without pooling", "use global_pool=avg or token")
        if not isinstance(backbone.head, nn.Linear):
            raise refuse(backbone, "two heads without classifiers", "use num_classes > 0, or the model of one head")
        if not len(backbone.blocks):
            raise refuse(backbone, "a network without blocks", "use a depth of 1 or more")
        for where in ("norm", "fc_norm", "norm_pre"):
            check_norm(backbone, self.norm_at(where), where)
        for i, block in enumerate(backbone.blocks):
            if isinstance(block, SkippedBlock):
                continue
            if type(block) not in self.block_types:
                own = self.block_types[0].__name__
                raise refuse(backbone, f"block type {type(block).__name__}", f"use timm's {own} throughout")
            check_compact(backbone, block, f"blocks.{i}", self.width)
            attn = block.attn if has_attn(block) else None
            if attn is not None and (type(attn) not in self.attention_types or getattr(attn, "gate", None) is not None):
                known = type(attn) in self.attention_types
                raise refuse(backbone, "gated attention" if known else type(attn).__name__, self.plain_attention)
            if has_mlp(block) and type(block.mlp) not in (Mlp, GluMlp, SwiGLU):
                raise refuse(backbone, f"MLP type {type(block.mlp).__name__}", "use timm's Mlp, GluMlp or SwiGLU")
            attention_norms = ("norm1", "attn.q_norm", "attn.k_norm") if attn is not None else ()
            there = dict(block.named_modules())
            for where in (*attention_norms, *(("norm2",) if has_mlp(block) else ())):
                if where in there:
                    check_norm(backbone, there[where], where)

    def embed(self, params: Params, images: Tensor) -> Tensor:
        """Patches, the tokens before them and the positions of all, (B, N, w)."""
        vit, embed = self.backbone, self.backbone.patch_embed
        weight, bias = params["patch_embed.proj.weight"], params.get("patch_embed.proj.bias")
        x = F.conv2d(images, weight, bias, stride=embed.proj.stride)  # (B, w, h, w)
        x = stem_norm(embed.norm, params, "patch_embed.norm", x.flatten(2).transpose(1, 2))  # (B, N, w)
        prefix = [
            params[name].expand(x.shape[0], -1, -1)
            for name in ("cls_token", "dist_token", "reg_token")
            if name in params
        ]
        before = getattr(vit, "no_embed_class", False)  # positions are the patches' alone
        if "pos_embed" in params and before:
            x = x + params["pos_embed"]
        x = self.join(prefix, x)
        return x if "pos_embed" not in params or before else x + params["pos_embed"]

    def join(self, prefix: list[Tensor], x: Tensor) -> Tensor:
        """The tokens before the patches, and these."""
        positions = self.backbone.pos_embed is not None
        return x if positions and not prefix else torch.cat([*prefix, x], dim=1)  # timm's own strides: they order sums

    def stem(self, params: Params, images: Tensor) -> Tensor:
        vit, x = self.backbone, self.embed(params, images)
        x = vit.pos_drop(x) if "pos_embed" in params else x
        return stem_norm(vit.norm_pre, params, "norm_pre", vit.patch_drop(x))

    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        raise AssertionError("a ViT has one stage")

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        return attention(block.attn, params, heads, x)

    def pool(self, params: Params, x: Tensor) -> Tensor:
        """(B, N, w) -> (B, w); for the two-headed DeiT (B, 2, w), class and distillation token."""
        vit = self.backbone
        x = norm(vit.norm, params, "norm", x)
        if "head_dist" in self.classifiers:
            return x[:, :2]
        if self.attn_pool is None:
            return norm(vit.fc_norm, params, "fc_norm", vit.pool(x))
        return norm(vit.fc_norm, params, "fc_norm", pooled(self.attn_pool, params, POOL, x[:, self._unpooled() :]))

    def classify(self, params: Params, features: Tensor) -> Tensor:
        features = self.backbone.head_drop(features)
        if "head_dist" in self.classifiers:  # inference averages the two heads, and so does adjoined training
            logits = F.linear(features[:, 0], params["head.weight"], params["head.bias"])
            dist = F.linear(features[:, 1], params["head_dist.weight"], params["head_dist.bias"])
            return (logits + dist) / 2
        return F.linear(features, params["head.weight"], params["head.bias"])

    def resize(self, stage_widths: tuple[int, ...]) -> None:
        vit, (w,) = self.backbone, stage_widths
        vit.num_features = w
        if (
            self.attn_pool is None
        ):  # otherwise a classifier, as timm's reset_classifier makes it, reads as much as before
            vit.embed_dim = vit.head_hidden_size = w
        for info in vit.feature_info:
            info["num_chs"] = w
