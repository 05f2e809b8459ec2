"""docs/backbones.md, row by row: what is supported is exact when it is cut, what is not is refused by its name."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    DiffAttention,
    GatedMlp,
    GluMlp,
    HybridEmbed,
    LayerNorm,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
)
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.errors import UserError
from search_spaces.slices import network_slice, prefix_slice
from supernets.compact import cut
from supernets.elastic import BlockMixture, Term
from supernets.supernet import Supernet
from supernets.t2t_vit import T2TViT
from tests.oracle import oracle_logits, randomise
from tests.strategies import images

Build = Callable[..., Any]
VIT = dict(img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=5, mlp_ratio=2)
SWIN = dict(
    img_size=32, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=5, drop_path_rate=0.0
)
T2T = dict(
    img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=5, token_dim=8, drop_path_rate=0.0, token_drop_rate=0.0
)
ROPE = dict(use_rot_pos_emb=True)
SHARED = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
CLASS = dict(class_token=True, global_pool="token")
LATE = dict(block_fn=ResPostRelPosBlock)
TABLES = dict(use_abs_pos_emb=False, use_rel_pos_bias=True)
DINOV3 = dict(
    rope_type="dinov3", rope_rotate_half=True, use_abs_pos_emb=False, init_values=1.0, num_reg_tokens=2,
    dynamic_img_size=True, use_fc_norm=False,
)  # fmt: skip
BARE = partial(LayerNorm, affine=False)
HYBRID = partial(HybridEmbed, backbone=nn.Conv2d(3, 8, 1))
AVG = dict(class_token=False, global_pool="avg")
MAP = dict(class_token=False, global_pool="map")
PE = dict(attn_type="rope", use_pre_transformer_norm=True, rope_grid_indexing="xy", global_pool="map")
build: dict[str, Build] = {
    "vit": partial(VisionTransformer, **VIT),
    "distilled": partial(VisionTransformerDistilled, **VIT),
    "swin": partial(SwinTransformer, **SWIN),
    "swinv2": partial(SwinTransformerV2, **SWIN),
    "t2t": partial(T2TViT, **T2T),
    "eva": partial(Eva, **VIT | ROPE),
    "cait": partial(Cait, **VIT),
    "beit": partial(Beit, **VIT | TABLES),
    "relpos": partial(VisionTransformerRelPos, **VIT | dict(rel_pos_dim=8)),
}


def gated() -> nn.Module:
    """A ViT with timm's gated attention, which its constructor does not make."""
    vit = build["vit"]()
    for block in vit.blocks:
        block.attn = Attention(32, num_heads=4, qkv_bias=True, gated=True)
    return vit  # type: ignore[no-any-return]


def pooling(**options: Any) -> nn.Module:
    """A ViT with attention pooling that its constructor does not make."""
    vit = build["vit"](global_pool="map", class_token=False)
    vit.attn_pool = AttentionPoolLatent(32, num_heads=4, **options)
    return vit  # type: ignore[no-any-return]


# words of the row in docs/backbones.md, class, its arguments
SUPPORTED: list[tuple[str, str, dict[str, Any]]] = [
    ('`global_pool="token"`', "vit", {}),
    ('`global_pool="avg"`, `"max"`, `"avgmax"`', "vit", AVG),
    ('`global_pool="avg"`, `"max"`, `"avgmax"`', "vit", AVG | {"global_pool": "max"}),
    ('`global_pool="avg"`, `"max"`, `"avgmax"`', "vit", {"global_pool": "avgmax"}),
    ("`pool_include_prefix`", "vit", {"global_pool": "avg", "pool_include_prefix": True}),
    ("`fc_norm`", "vit", {"fc_norm": True}),
    ("`fc_norm`", "vit", AVG | {"fc_norm": False}),
    ("`final_norm=False`", "vit", {"final_norm": False, "fc_norm": False}),
    ("`pre_norm`", "vit", {"pre_norm": True}),
    ("`embed_norm_layer`", "vit", {"embed_norm_layer": LayerNorm}),
    ("`embed_norm_layer`", "vit", {"embed_norm_layer": LayerNorm, "pre_norm": True}),
    ("`init_values`", "vit", {"init_values": 1.0}),
    ("`qk_norm`", "vit", {"qk_norm": True}),
    ("`scale_attn_norm`, `scale_mlp_norm`", "vit", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    ("`reg_tokens`", "vit", {"reg_tokens": 2}),
    ("`no_embed_class`", "vit", {"no_embed_class": True, "reg_tokens": 2}),
    ('`pos_embed="none"`', "vit", {"pos_embed": "none"}),
    ('`norm_layer="rmsnorm"`', "vit", {"norm_layer": "rmsnorm", "qk_norm": True}),
    ("`act_layer`", "vit", {"act_layer": "relu"}),
    ("`qkv_bias=False`, `proj_bias=False`", "vit", {"qkv_bias": False, "proj_bias": False}),
    ("`in_chans`", "vit", {"in_chans": 1}),
    ("images that are not square", "vit", {"img_size": (32, 48)}),
    ("`patch_drop_rate`", "vit", {"patch_drop_rate": 0.5, "drop_rate": 0.1, "attn_drop_rate": 0.1}),
    ("`VisionTransformerDistilled`", "distilled", {}),
    ("feature maps that are no multiple of the window", "swin", {"img_size": 36}),
    ("odd feature maps before patch merging", "swin", {"img_size": 44}),
    ("windows larger than the feature map", "swin", {"window_size": 9}),
    ("`always_partition`", "swin", {"window_size": 9, "always_partition": True}),
    ("`window_size` as a pair", "swin", {"window_size": (4, 2)}),
    ("`head_dim`", "swin", {"head_dim": 16}),
    ("`qkv_bias=False`", "swin", {"qkv_bias": False}),
    ('`global_pool="avg"`, `"max"`, `"avgmax"`', "swin", {"global_pool": "max"}),
    ('`global_pool="avg"`, `"max"`, `"avgmax"`', "swin", {"global_pool": "avgmax"}),
    ("`norm_layer=RmsNorm`", "swin", {"norm_layer": RmsNorm}),
    ('`tokens_type="performer"` or `"transformer"`', "t2t", {}),
    ('`tokens_type="performer"` or `"transformer"`', "t2t", {"tokens_type": "transformer"}),
    ("`qk_scale`", "t2t", {"qk_scale": 0.5}),
    ("`qkv_bias`", "t2t", {"qkv_bias": True}),
    ("`token_dim`", "t2t", {"token_dim": 16}),
]

SUPPORTED += [
    *(
        (words, "swinv2", options)
        for words, options in (
            ("cosine attention, biases of positions by a network, norms after the halves and after merging", {}),
            ("feature maps that are no multiple of the window", {"img_size": 36}),
            ("odd feature maps before patch merging", {"img_size": 44}),
            ("windows larger than the feature map", {"window_size": 9}),
            ("`always_partition`", {"window_size": 9, "always_partition": True}),
            ("`window_size` as a pair", {"window_size": ((4, 2), (2, 4))}),
            (
                "`window_size` by stage, `pretrained_window_sizes`",
                {"window_size": [4, 2], "pretrained_window_sizes": (8, 6)},
            ),
            ("`qkv_bias=False`", {"qkv_bias": False}),
            ('`global_pool="avg"`, `"max"`, `"avgmax"`', {"global_pool": "avgmax"}),
            ("`num_classes=0`", {"num_classes": 0}),
        )
    ),
    *(("`num_classes=0`", family, {"num_classes": 0}) for family in ("vit", "swin", "t2t", "eva", "beit", "relpos")),
    ("`num_classes=0`", "vit", AVG | {"num_classes": 0, "fc_norm": False}),
    ("`dynamic_img_size`", "vit", {"dynamic_img_size": True}),
    ("`SwiGLU`, `SwiGLUPacked`, `GluMlp`", "vit", {"mlp_layer": SwiGLU, "scale_mlp_norm": True}),
    ("`SwiGLU`, `SwiGLUPacked`, `GluMlp`", "vit", {"mlp_layer": SwiGLUPacked, "init_values": 1.0}),
    ("`SwiGLU`, `SwiGLUPacked`, `GluMlp`", "vit", {"mlp_layer": GluMlp}),
    *(('`global_pool="map"`', family, {"global_pool": "map"}) for family in ("vit", "eva")),
    *(('`global_pool="map"`', family, {"global_pool": "map", "num_classes": 0}) for family in ("vit", "eva")),
    ('`global_pool="map"`', "vit", MAP | {"mlp_layer": GluMlp, "norm_layer": "rmsnorm"}),
    ('`global_pool="map"`', "vit", MAP | {"fc_norm": True}),
    ('`global_pool="map"`', "vit", {"global_pool": "map", "pool_include_prefix": True, "reg_tokens": 1}),
    ('`global_pool="map"`', "eva", PE | {"attn_pool_num_heads": 8, "attn_pool_mlp_ratio": 3.0}),
    ("EVA", "eva", {"use_rot_pos_emb": False}),
    ("EVA", "eva", {"use_rot_pos_emb": False, "global_pool": "token"}),
    ("EVA-02", "eva", {"swiglu_mlp": True, "ref_feat_shape": (16, 16)}),
    ("EVA-02", "eva", {"swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False}),
    (
        "`scale_attn_inner`",
        "eva",
        {"swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False},
    ),
    ("DINOv3", "eva", DINOV3 | {"qkv_bias": False}),
    ("DINOv3", "eva", DINOV3 | {"swiglu_mlp": True, "swiglu_align_to": 8}),
    ("Perception Encoder", "eva", PE),
    ("Perception Encoder", "eva", PE | {"global_pool": "avg"}),
    (
        "Perception Encoder",
        "eva",
        {
            "attn_type": "rope",
            "use_pre_transformer_norm": True,
            "use_post_transformer_norm": False,
            "use_fc_norm": False,
        },
    ),
    ('`attn_type="rope"`', "eva", {"attn_type": "rope", "global_pool": "token", "init_values": 1.0}),
    ("`qk_norm`", "eva", {"qk_norm": True}),
    ("`attn_only_layer_scale`", "eva", {"init_values": 1.0, "attn_only_layer_scale": True}),
    ("`class_token=False`", "eva", {"class_token": False}),
    ('`rope_type="mrope"`', "eva", {"rope_type": "mrope"}),
    *(
        ('`rope_type="mixed"`', "eva", {"rope_type": "mixed", "use_abs_pos_emb": False} | more)
        for more in ({}, {"attn_type": "rope", "rope_grid_indexing": "xy", "dynamic_img_size": True})
    ),
    ("`ResPostBlock`", "vit", {"block_fn": ResPostBlock, "qk_norm": True}),
    ("`ResPostBlock`", "vit", {"block_fn": ResPostBlock, "scale_attn_norm": True, "mlp_layer": GluMlp}),
    ("`use_post_norm`", "eva", {"use_post_norm": True, "qkv_fused": False, "init_values": 1.0}),
    ("`use_post_norm`", "eva", {"use_post_norm": True, "swiglu_mlp": True, "rope_type": "mixed"}),
    ("`rope_rescale_coords`", "eva", DINOV3 | {"rope_shift_coords": 0.1, "rope_rescale_coords": 2.0}),
    ('`global_pool="avg"`, `"max"`, `"avgmax"`', "eva", {"global_pool": "avgmax"}),
    *(
        (words, "beit", options)
        for words, options in (
            ("`use_rel_pos_bias`", {"init_values": 0.1}),
            ("`use_rel_pos_bias`", {"img_size": (32, 48), "drop_rate": 0.1, "attn_drop_rate": 0.1}),
            ("`use_abs_pos_emb`", {"use_abs_pos_emb": True}),
            ("`use_abs_pos_emb`", {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "pos_drop_rate": 0.1}),
            ('`global_pool="avg"` or `"token"`', {"global_pool": "token"}),
            ("`use_fc_norm`", {"use_fc_norm": False}),
            ("`use_fc_norm`", {"global_pool": "token", "use_fc_norm": True}),
            ("`swiglu_mlp`, `scale_mlp`", {"swiglu_mlp": True, "scale_mlp": True, "init_values": 0.1}),
            ("`swiglu_mlp`, `scale_mlp`", {"scale_mlp": True}),
            ("`qkv_bias`", {"qkv_bias": False}),
            ("`norm_layer=RmsNorm`", {"norm_layer": RmsNorm}),
            ("`in_chans`", {"in_chans": 1}),
            ("`use_shared_rel_pos_bias`", SHARED),
            ("`use_shared_rel_pos_bias`", SHARED | {"use_rel_pos_bias": True, "qkv_bias": False}),
        )
    ),
    *(
        (words, "relpos", options)
        for words, options in (
            ('`rel_pos_type="mlp"`', {}),
            ('`rel_pos_type="mlp"`', {"rel_pos_type": "mlp-swin", "img_size": (32, 48)}),
            ('`rel_pos_type="bias"`', {"rel_pos_type": "bias"}),
            ("`shared_rel_pos`", {"shared_rel_pos": True}),
            ("`shared_rel_pos`", {"shared_rel_pos": True, "rel_pos_type": "bias", **CLASS}),
            ("`class_token`", CLASS),
            ("`class_token`", {"class_token": True, "rel_pos_type": "bias", "fc_norm": True}),
            ("`ResPostRelPosBlock`", LATE),
            ("`ResPostRelPosBlock`", LATE | CLASS | {"shared_rel_pos": True, "qk_norm": True}),
            ("`fc_norm`", {"fc_norm": True}),
            ("`init_values`", {"init_values": None}),
            ("`qk_norm`", {"qk_norm": True}),
            ("`qkv_bias=False`", {"qkv_bias": False, "drop_rate": 0.1, "attn_drop_rate": 0.1}),
            ("`act_layer`", {"act_layer": nn.ReLU, "norm_layer": RmsNorm}),
            ("`in_chans`", {"in_chans": 1}),
        )
    ),
]
SUPPORTED += [
    ("talking heads (`TalkingHeadAttn`), LayerScale, class attention", "cait", {}),
    ("talking heads (`TalkingHeadAttn`), LayerScale, class attention", "cait", {"depth_token_only": 1, "depth": 1}),
    ('`global_pool="token"`, `"avg"`', "cait", {"global_pool": "avg"}),
    ("`qkv_bias=False`", "cait", {"qkv_bias": False, "img_size": (32, 48), "in_chans": 1}),
    ("`num_classes=0`", "cait", {"num_classes": 0}),
]
# words of the row, what the message names, and how the network is made
REFUSED: list[tuple[str, str, Build]] = [
    ("`dynamic_img_pad`", "dynamic_img_pad", partial(build["vit"], dynamic_img_pad=True)),
    ('`global_pool="prr"`', "AttentionPoolPrr", partial(build["vit"], global_pool="prr")),
    ("attention pooling with positions of its own", "pos_embed", partial(pooling, pos_embed="abs", feat_size=4)),
    ("attention pooling that leaves several tokens", "several tokens", partial(pooling, pool_type="")),
    ('`global_pool=""`', "without pooling", partial(build["vit"], global_pool="")),
    ("`VisionTransformerDistilled` with `num_classes=0`", "two heads", partial(build["distilled"], num_classes=0)),
    ("`ParallelScalingBlock`", "ParallelScalingBlock", partial(build["vit"], block_fn=ParallelScalingBlock)),
    ("`ParallelThingsBlock`", "ParallelThingsBlock", partial(build["vit"], block_fn=ParallelThingsBlock)),
    (
        "`DiffParallelScalingBlock`",
        "DiffParallelScalingBlock",
        partial(build["vit"], block_fn=DiffParallelScalingBlock),
    ),
    ("other MLPs", "MLP type GatedMlp", partial(build["vit"], mlp_layer=GatedMlp)),
    ("differential attention", "DiffAttention", partial(build["vit"], attn_layer=DiffAttention)),
    ("gated attention", "gated attention", gated),
    ('`norm_layer="simplenorm"`', "SimpleNorm", partial(build["vit"], norm_layer="simplenorm")),
    ("a stem other than `PatchEmbed`", "HybridEmbed", partial(build["vit"], embed_layer=HYBRID)),
    ("`strict_img_size=False`, `dynamic_img_size`", "strict_img_size", partial(build["swin"], strict_img_size=False)),
    ("`strict_img_size=False`, `dynamic_img_size`", "strict_img_size", partial(build["swin"], dynamic_img_size=True)),
    ("`strict_img_size=False`, `dynamic_img_size`", "strict_img_size", partial(build["swinv2"], strict_img_size=False)),
    ('`global_pool="catavgmax"`', "catavgmax", partial(build["swin"], global_pool="catavgmax")),
    ('`global_pool=""`', "without pooling", partial(build["swin"], global_pool="")),
    ("`global_pool` other than the class token", "global_pool", partial(build["t2t"], global_pool="avg")),
    (
        "`num_kv_heads`",
        "num_kv_heads",
        partial(build["eva"], attn_type="rope", qkv_fused=False, num_kv_heads=2),
    ),
    *(('`global_pool=""`', "without pooling", partial(build[name], global_pool="")) for name in ("beit", "relpos")),
    ("a stem other than `PatchEmbed`", "HybridEmbed", partial(build["relpos"], embed_layer=HYBRID)),
    ("`patch_drop_rate`", "patch_drop_rate", partial(build["eva"], patch_drop_rate=0.5)),
    (
        "a norm before pooling and one after it",
        "a norm before pooling",
        partial(build["eva"], use_fc_norm=True, use_post_transformer_norm=True),
    ),
    ('`global_pool=""`', "without pooling", partial(build["cait"], global_pool="")),
    (
        "`attn_block`, `attn_block_token_only`",
        "Attention",
        partial(build["cait"], attn_block=lambda dim, **kwargs: Attention(dim, num_heads=4)),
    ),
    *(
        (f"`{cls}`", cls, partial(timm.create_model, name, **options))
        for cls, name, options in (
            ("SwinTransformerV2Cr", "swinv2_cr_tiny_224", {}),
            ("NaFlexVit", "naflexvit_base_patch16_gap", {}),
        )
    ),
]
DOCS = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()


@pytest.mark.parametrize("width", ["stream", "inner"])
@pytest.mark.parametrize(("family", "options"), [row[1:] for row in SUPPORTED], ids=str)
def test_supported(family: str, options: dict[str, Any], width: str) -> None:
    backbone = randomise(build[family](**options), 1).eval()
    supernet = Supernet(backbone).eval()
    channels, height, side = supernet.adapter.input_size
    x = torch.randn(2, channels, height, side, generator=torch.Generator().manual_seed(0))
    large, same = supernet(x)
    assert torch.equal(large, same)
    subnet = network_slice(supernet.shapes, [prefix_slice(shape, 2, width) for shape in supernet.shapes])
    compact = cut(backbone, subnet).eval()
    small = supernet.small(x, subnet)
    assert float((compact(x) - small).abs().max() / small.abs().max()) <= 1e-5
    assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet) < supernet.params()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compact.to("meta").requires_grad_(False)(x[:1].to("meta"))
    assert counter.get_total_flops() == 2 * supernet.flops(subnet) < 2 * supernet.flops()
    double = Supernet(backbone.double()).eval()
    whole = [BlockMixture((Term(kept),)) for kept in subnet.blocks]  # all of the stream, of which the gates leave w
    embed_dims = double.identity().stage_widths
    gates = [(torch.arange(e) < w).float() for e, w in zip(embed_dims, subnet.stage_widths, strict=True)]
    expected = double.small(x.double(), subnet)
    assert float((double.small(x.double(), whole, gates) - expected).abs().max() / expected.abs().max()) < 1e-9
    if channels == 3:
        x = images(backbone).double()
        logits = double.small(x, subnet)
        assert float((oracle_logits(backbone, subnet, x) - logits).abs().max() / logits.abs().max()) < 1e-9


@pytest.mark.parametrize(("feature", "make"), [row[1:] for row in REFUSED], ids=[row[1] for row in REFUSED])
def test_refused_by_name(feature: str, make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError, match=feature):
        Supernet(make())


@pytest.mark.parametrize("words", sorted({row[0] for row in SUPPORTED + REFUSED}))
def test_the_table_has_the_row(words: str) -> None:
    assert re.search(rf"^\|.*{re.escape(words)}", DOCS, re.MULTILINE), f"docs/backbones.md has no row of {words}"
