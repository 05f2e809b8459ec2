"""timm's SwinTransformer as a backbone: shifted windows, relative positions, patch merging."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from supernets.adapter import OuterAxis, refuse
from supernets.axes import HeadWidths, Params
from supernets.compact_block import SkippedBlock
from supernets.compact_swin import CompactWindowAttention, CompactWindowBlock
from supernets.flops import NetworkCosts, PerWidth
from supernets.layers import by_width, linear, norm, stem_norm
from supernets.relative import relative_bias
from supernets.rotated import StemLayer
from supernets.timm_block import TimmBlockAdapter, check_compact, check_norm, has_attn, has_mlp, num_params, shape_of

# W windows of one image, T tokens of a window; other letters as in layers.py


def attend_windows(
    attn: Any,
    bias_HTT: Tensor,
    heads: HeadWidths,
    qkv: Tensor,
    mask_WTT: Tensor | None,
    norm_qk: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """q, k and v of windows (B*W, T, 2HD + V) and the bias of relative positions -> (B*W, T, V).

    Fused attention takes the bias and the shift mask as one (W, H, T, T) mask that is broadcast over images;
    timm's own fused path expands it to every image of the batch. norm_qk: before the products.
    """
    B, T, _ = qkv.shape

    def attend(q: Tensor, k: Tensor, v: Tensor, index: Any) -> Tensor:  # (B*W, H, T, D), v (B*W, H, T, V)
        bias, h = bias_HTT[index].unsqueeze(0), q.shape[1]
        if attn.fused_attn:
            dropout_p = attn.attn_drop.p if attn.training else 0.0
            if mask_WTT is not None:
                W = mask_WTT.shape[0]
                bias = (bias + mask_WTT.unsqueeze(1)).flatten(0, 1).unsqueeze(0)  # (1, W*H, T, T)
                q, k, v = (t.reshape(B // W, W * h, T, -1) for t in (q, k, v))
            bias = bias.to(q.dtype)
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=attn.scale)
            return x.reshape(B, h, T, -1)
        scores = (q * attn.scale) @ k.transpose(-2, -1) + bias
        if mask_WTT is not None:
            W = mask_WTT.shape[0]
            scores = scores.view(-1, W, h, T, T) + mask_WTT[None, :, None]
            scores = scores.view(-1, h, T, T)
        return attn.attn_drop(attn.softmax(scores)) @ v  # type: ignore[no-any-return]

    return by_width(qkv, heads, attend, norm_qk)


def window_attention(attn: Any, params: Params, heads: HeadWidths, x_BTS: Tensor, mask_WTT: Tensor | None) -> Tensor:
    """timm's WindowAttention on sliced parameters: (B*W, T, S) -> (B*W, T, S); without its projection V instead."""
    qkv = linear(params, "attn.qkv", x_BTS)
    bias_HTT = relative_bias(params["attn.relative_position_bias_table"], attn.relative_position_index)
    x = attend_windows(attn, bias_HTT, heads, qkv, mask_WTT)
    return attn.proj_drop(linear(params, "attn.proj", x))  # type: ignore[no-any-return]


class FusedWindowAttention(WindowAttention):  # type: ignore[misc]
    """timm's WindowAttention with fused attention on and its mask broadcast over the batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = HeadWidths(self.num_heads, self.head_dim, self.head_dim)
        bias_HTT = relative_bias(self.relative_position_bias_table, self.relative_position_index)
        x = attend_windows(self, bias_HTT, heads, self.qkv(x), mask)
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


def placed(block: Any) -> Any:
    """What knows the windows of a block with attention: the block itself, or a compact network's attention."""
    return block.attn if isinstance(block.attn, CompactWindowAttention) else block


def windowed(block: Any, x: Tensor, attend: Any) -> Tensor:
    """timm's SwinTransformerBlock._attn around `attend`: roll, pad, partition, attend, and back.

    block: what knows the windows (`placed`). (B, H, W, S) -> (B, H, W, what attend gives of each token).
    """
    _, H, W, S = x.shape
    shift_h, shift_w = block.shift_size
    win_h, win_w = block.window_size
    if shift_h or shift_w:
        x = torch.roll(x, shifts=(-shift_h, -shift_w), dims=(1, 2))
    x = F.pad(x, (0, 0, 0, -W % win_w, 0, -H % win_h))
    Hp, Wp = x.shape[1:3]
    windows = window_partition(x, block.window_size).view(-1, win_h * win_w, S)
    windows = attend(windows, block.attn_mask)
    x = window_reverse(windows.unflatten(1, (win_h, win_w)), block.window_size, Hp, Wp)[:, :H, :W]
    return torch.roll(x, shifts=(shift_h, shift_w), dims=(1, 2)) if shift_h or shift_w else x


def quadrants(x: Tensor) -> Tensor:
    """(B, H, W, S) -> (B, H/2, W/2, 4*S), odd maps padded: what patch merging reads."""
    B, H, W, S = x.shape
    x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
    H, W = H + H % 2, W + W % 2
    return x.reshape(B, H // 2, 2, W // 2, 2, S).permute(0, 1, 3, 4, 2, 5).flatten(3)


class SwinAdapter(TimmBlockAdapter):
    """SwinTransformer as blocks, stem, patch merging and classifier. Turns fused attention on."""

    compact_block = CompactWindowBlock
    block_type: type[nn.Module] = SwinTransformerBlock
    timm_attention: Any = WindowAttention
    fused_attention: Any = FusedWindowAttention

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        self._check(backbone)
        self.input_size = (backbone.patch_embed.proj.in_channels, *backbone.patch_embed.img_size)
        names, shapes, costs = [], [], []
        for s, stage in enumerate(backbone.layers):
            H, W = stage.output_resolution
            for i, block in enumerate(stage.blocks):
                attn: Any = block.attn if has_attn(block) else None
                if type(attn) is self.timm_attention:
                    head_dim = attn.proj.in_features // attn.num_heads
                    attn.__class__ = self.fused_attention
                    attn.fused_attn, attn.head_dim = True, head_dim
                win_h, win_w = (1, 1) if attn is None else placed(block).window_size
                padded = (H + -H % win_h) * (W + -W % win_w)
                shifted = attn is not None and any(placed(block).shift_size)
                names.append(f"layers.{s}.blocks.{i}")
                shapes.append(shape_of(s, block.dim, block))
                counted = self.block_costs(block, shapes[-1], padded, win_h * win_w, H * W)
                costs.append(replace(counted, shifted=shifted))
        self.block_names, self.shapes = tuple(names), tuple(shapes)
        dims = [stage.blocks[0].dim for stage in backbone.layers]
        merges = [stage.downsample for stage in backbone.layers[1:]]
        merged_tokens = [stage.output_resolution[0] * stage.output_resolution[1] for stage in backbone.layers[1:]]
        self._describe_stem()
        self.outer_norms = {f"layers.{s}.downsample.norm": self.merging_norm(s) for s in range(1, len(dims))}
        norms_per = [0] * len(dims)  # parameters of mergings' norms by channel of each stage
        for name, (_, s) in self.outer_norms.items():
            norms_per[s] += num_params(backbone.get_submodule(name), dims[s])
        self.outer_axes = self._axes()
        self.outer_norms |= {"norm": ("S", len(dims) - 1)}
        if self.stem_layer is None and not isinstance(backbone.patch_embed.norm, nn.Identity):
            self.outer_norms |= {"patch_embed.norm": ("S", 0)}
        embed, fc = backbone.patch_embed, backbone.head.fc
        stem = [n for n, axes in self.outer_axes.items() if n.startswith("patch_embed.") and ("S", 0) in axes]
        classes = fc.out_features
        self.classifiers = ("head.fc",)
        self.outer_readers = {
            name: (f"{name.removesuffix('norm')}reduction",)
            for name, (letters, _) in self.outer_norms.items()
            if letters == "4S"
        } | {"norm": self.classifiers}
        if backbone.global_pool not in ("avg", "fast", "fastavg"):
            self.unrotated = {
                len(dims) - 1: f"global_pool={backbone.global_pool} takes maxima over tokens, channel by channel"
            }
        network = NetworkCosts(
            blocks=tuple(costs),
            flops=PerWidth(
                constant=0,
                first=embed.num_patches * embed.proj.weight[0].numel(),
                last=classes,
                merge_pair=tuple(4 * tokens for tokens in merged_tokens),
                merge_in=(0,) * len(merges),
            ),
            params=PerWidth(
                constant=classes,
                first=sum(backbone.get_parameter(name).numel() for name in stem) // dims[0],
                last=classes + num_params(backbone.norm, dims[-1]) + norms_per[-1],
                merge_pair=(4,) * len(merges),
                merge_in=tuple(norms_per[:-1]),
            ),
        )
        self.costs = self.stream_costs(self.with_stem_layer(network))

    def _describe_stem(self) -> None:
        embed = self.backbone.patch_embed
        if not isinstance(embed.norm, nn.Identity):
            self.stem_tokens, self.before_stem = embed.num_patches, ("patch_embed.proj.",)
            if isinstance(embed.norm, StemLayer):
                self.stem_layer = "patch_embed.norm"
            else:
                self.stem_norm = "patch_embed.norm"

    def merging_norm(self, stage: int) -> tuple[str, int]:
        """What the norm of the patch merging before a stage is over: letters as in axes.py and whose stream."""
        return "4S", stage - 1

    def _axes(self) -> dict[str, tuple[OuterAxis, ...]]:
        swin = self.backbone
        last = len(swin.layers) - 1
        axes: dict[str, tuple[OuterAxis, ...]] = {}
        for name, p in swin.patch_embed.named_parameters():  # proj (E, C, p, p) and (E,); norm (E,)
            whole = self.stem_layer is not None and not name.startswith("norm.linear.")
            axes[f"patch_embed.{name}"] = (None if whole else ("S", 0), *([None] * (p.dim() - 1)))
        for s in range(1, last + 1):
            for name, p in swin.layers[s].downsample.named_parameters():  # norm (4 E,); reduction (E', 4 E)
                own = (self.merging_norm(s),) if p.dim() == 1 else (("S", s), ("4S", s - 1))
                axes[f"layers.{s}.downsample.{name}"] = own
        for name, _ in swin.norm.named_parameters():
            axes[f"norm.{name}"] = (("S", last),)
        for name, p in swin.head.named_parameters():  # weight (classes, E), bias (classes,)
            axes[f"head.{name}"] = (None, ("S", last)) if p.dim() == 2 else (None,)
        return axes

    def _check(self, backbone: Any) -> None:
        if type(backbone.patch_embed) is not PatchEmbed:
            raise refuse(backbone, type(backbone.patch_embed).__name__, "use timm's PatchEmbed")
        if getattr(backbone, "dynamic_img_size", False) or not backbone.patch_embed.strict_img_size:
            raise refuse(backbone, "strict_img_size=False", "give the size with img_size=")
        if backbone.head.global_pool.feat_mult() != 1:
            raise refuse(backbone, f"global_pool={backbone.global_pool}", "use global_pool=avg or max")
        if not backbone.global_pool:
            raise refuse(backbone, "a network without pooling", "use global_pool=avg or max")
        if not isinstance(backbone.head.fc, nn.Linear):
            raise refuse(backbone, "a network without classifier", "use num_classes > 0")
        if not all(len(stage.blocks) for stage in backbone.layers):
            raise refuse(backbone, "a stage without blocks", "use depths of 1 or more")
        check_norm(backbone, backbone.norm, "norm")
        for s, stage in enumerate(backbone.layers):
            for i, block in enumerate(stage.blocks):
                if type(block) not in (self.block_type, self.compact_block, SkippedBlock):
                    known = self.block_type.__name__
                    raise refuse(backbone, f"block type {type(block).__name__}", f"use {known}")
                check_compact(backbone, block, f"layers.{s}.blocks.{i}", block.dim)
                if has_attn(block):
                    check_norm(backbone, block.norm1, "norm1")
                if has_mlp(block):
                    check_norm(backbone, block.norm2, "norm2")

    def stem(self, params: Params, images: Tensor) -> Tensor:
        embed = self.backbone.patch_embed
        weight, bias = params["patch_embed.proj.weight"], params["patch_embed.proj.bias"]
        x = F.conv2d(images, weight, bias, stride=embed.proj.stride).permute(0, 2, 3, 1)  # (B, h, w, S)
        return stem_norm(embed.norm, params, "patch_embed.norm", x)

    def enter_stage(self, stage: int, params: Params, x: Tensor) -> Tensor:
        merge, x = self.backbone.layers[stage].downsample, quadrants(x)
        x = norm(merge.norm, params, f"layers.{stage}.downsample.norm", x)
        return linear(params, f"layers.{stage}.downsample.reduction", x)

    def attend(self, block: Any, params: Params, heads: HeadWidths, x: Tensor) -> Tensor:
        return windowed(placed(block), x, partial(window_attention, block.attn, params, heads))

    def pads_after_norm(self, block: Any) -> bool:
        if not has_attn(block):
            return False
        (H, W), (win_h, win_w) = placed(block).input_resolution, placed(block).window_size
        return bool(H % win_h or W % win_w)

    def compact_attention(self, block: Any, heads: HeadWidths) -> nn.Module:
        block.attn.num_heads = heads.number
        return CompactWindowAttention(block, heads)

    def pool(self, params: Params, x: Tensor) -> Tensor:
        x = norm(self.backbone.norm, params, "norm", x)
        return self.backbone.head.global_pool(x)  # type: ignore[no-any-return]

    def classify(self, params: Params, features: Tensor) -> Tensor:
        features = self.backbone.head.drop(features)
        return F.linear(features, params["head.fc.weight"], params["head.fc.bias"])

    def resize(self, stage_widths: tuple[int, ...]) -> None:
        swin = self.backbone
        swin.embed_dim = stage_widths[0]
        swin.num_features = swin.head_hidden_size = swin.head.in_features = stage_widths[-1]
        swin.head.num_features = stage_widths[-1]
        for stage, info, w in zip(swin.layers, swin.feature_info, stage_widths, strict=True):
            info["num_chs"] = w
            for block in stage.blocks:
                block.dim = w
