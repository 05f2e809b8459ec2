"""Hypothesis strategies: small random backbones of each family, and random subnets of them.

Everything is drawn small enough for a forward pass to take a millisecond or two, and odd enough to reach the
paths that full-size networks seldom show: padded windows, odd feature maps, images that are not square.
"""

import copy
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import torch
from timm.layers import LayerNorm, RmsNorm
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from search_spaces.slices import BlockShape, BlockSlice, Kept, NetworkSlice, network_slice, prefix_slice
from supernets.basis import Basis
from supernets.feature_head import with_feature_head
from supernets.streams import fixed_streams, stage_is_centred
from supernets.supernet import Supernet
from supernets.t2t_vit import T2TViT
from tests.oracle import blocks_of, embed_dim_of, oracle_logits, randomise, turning_pairs

SEEDS = st.integers(0, 2**16)
MIN_STREAM = 4  # a norm over fewer channels is ill-conditioned, over one it is a constant


@st.composite
def vit_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm ViT or two-headed distilled DeiT with random features and weights, in eval mode."""
    num_heads = draw(st.sampled_from([2, 3, 4, 6]))
    embed_dim = num_heads * draw(st.sampled_from([4, 8]))
    options: dict[str, Any] = {
        "img_size": draw(st.sampled_from([32, 48, (32, 48), 64])),
        "patch_size": 16,
        "num_classes": draw(st.integers(2, 7)),
        "embed_dim": embed_dim,
        "depth": draw(st.integers(1, 3)),
        "num_heads": num_heads,
        "mlp_ratio": draw(st.sampled_from([1, 2, 4])),
        "qkv_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "scale_attn_norm": draw(st.booleans()),
        "scale_mlp_norm": draw(st.booleans()),
        "proj_bias": draw(st.booleans()),
        "init_values": draw(st.sampled_from([None, 1.0])),
        "pre_norm": draw(st.booleans()),
        "no_embed_class": draw(st.booleans()),
        "norm_layer": draw(st.sampled_from(["layernorm", "rmsnorm"])),
    }
    if draw(st.integers(0, 3)) == 0:
        model: nn.Module = VisionTransformerDistilled(**options | {"no_embed_class": False})
    else:
        class_token = draw(st.booleans())
        model = VisionTransformer(
            **options,
            class_token=class_token,
            global_pool=draw(st.sampled_from(["avg", "token", "map"] if class_token else ["avg", "map"])),
            pool_include_prefix=draw(st.booleans()),
            fc_norm=draw(st.sampled_from([None, True, False])),
            reg_tokens=draw(st.sampled_from([0, 2])),
            pos_embed=draw(st.sampled_from(["learn", "none"])),
            block_fn=draw(st.sampled_from([Block, Block, ResPostBlock])),
        )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def swin_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm SwinTransformer of two or three stages, randomised, in eval mode.

    At patch size 4 the maps are 8 to 15 patches wide: some are odd before a merging, some are not a multiple
    of the window, and in the last stage the window may be larger than the map.
    """
    stages = draw(st.integers(2, 3))
    head_dim = draw(st.sampled_from([4, 8]))
    num_heads = draw(st.sampled_from([(2, 4, 4), (4, 4, 8), (3, 6, 12), (4, 8, 16)]))
    model = SwinTransformer(
        img_size=draw(st.sampled_from([32, 36, 44, (36, 52), 60])),
        num_classes=draw(st.integers(2, 7)),
        embed_dim=num_heads[0] * head_dim,
        depths=draw(st.tuples(*[st.integers(1, 2)] * stages)),
        num_heads=num_heads[:stages],
        window_size=draw(st.sampled_from([2, 3, 4, 7])),
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        qkv_bias=draw(st.booleans()),
    )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def swinv2_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm SwinTransformerV2 of two or three stages, randomised, in eval mode; maps as in `swin_backbones`."""
    stages = draw(st.integers(2, 3))
    head_dim = draw(st.sampled_from([4, 8]))
    num_heads = draw(st.sampled_from([(2, 4, 4), (4, 4, 8), (3, 6, 12)]))
    window = draw(st.sampled_from([2, 3, 4, 7]))
    model = SwinTransformerV2(
        img_size=draw(st.sampled_from([32, 36, 44, (36, 52), 60])),
        num_classes=draw(st.integers(2, 7)),
        embed_dim=num_heads[0] * head_dim,
        depths=draw(st.tuples(*[st.integers(1, 2)] * stages)),
        num_heads=num_heads[:stages],
        window_size=draw(st.sampled_from([window, (window, 2, 4)[:stages] if stages == 3 else window])),
        pretrained_window_sizes=draw(st.sampled_from([(0, 0, 0), (6, 6, 3)])),
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        qkv_bias=draw(st.booleans()),
    )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def t2t_backbones(draw: st.DrawFn) -> nn.Module:
    """A T2TViT with Performer or transformer tokens, randomised, in eval mode; some grids are odd."""
    num_heads = draw(st.sampled_from([2, 3, 4, 6]))
    model = T2TViT(
        img_size=draw(st.sampled_from([(32, 32), (36, 36), (36, 52), (64, 64)])),
        num_classes=draw(st.integers(2, 7)),
        embed_dim=num_heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=num_heads,
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        qkv_bias=draw(st.booleans()),
        tokens_type=draw(st.sampled_from(["performer", "transformer"])),
        token_dim=8,
    )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def eva_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm Eva with the features of EVA, EVA-02, DINOv3, Perception Encoder and ViTs with rotary embeddings."""
    num_heads = draw(st.sampled_from([2, 3, 4]))
    class_token, positions, after = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(["norm", "fc", ""]))
    late = draw(st.integers(0, 4)) == 0
    rope = draw(st.sampled_from(["cat", "cat", "dinov3", "mrope", "mixed", ""]))
    model = Eva(
        img_size=draw(st.sampled_from([32, 48, (32, 48)])),
        patch_size=16,
        num_classes=draw(st.integers(2, 7)),
        global_pool=draw(st.sampled_from(["avg", "token", "map"] if class_token else ["avg", "map"])),
        attn_pool_num_heads=num_heads * draw(st.sampled_from([1, 2])),
        attn_pool_mlp_ratio=draw(st.sampled_from([None, 3])),
        embed_dim=num_heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=num_heads,
        qkv_bias=draw(st.booleans()),
        qkv_fused=draw(st.booleans()),
        qk_norm=not late and draw(st.booleans()),
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        swiglu_mlp=draw(st.booleans()),
        swiglu_align_to=draw(st.sampled_from([0, 12])),
        scale_mlp=draw(st.booleans()),
        scale_attn_inner=draw(st.booleans()),
        attn_type=draw(st.sampled_from(["eva", "rope"])),
        norm_layer=draw(st.sampled_from([LayerNorm, RmsNorm])),
        init_values=draw(st.sampled_from([None, 1.0])),
        attn_only_layer_scale=not late and draw(st.booleans()),
        use_post_norm=late,
        class_token=class_token,
        num_reg_tokens=draw(st.sampled_from([0, 2])),
        no_embed_class=draw(st.booleans()),
        use_abs_pos_emb=positions or not rope,
        use_rot_pos_emb=bool(rope),
        rope_type=rope,
        rope_grid_indexing="ij" if rope == "mrope" else draw(st.sampled_from(["ij", "xy"])),
        rope_rotate_half=rope != "mixed" and draw(st.booleans()),
        rope_temperature=100.0,
        use_pre_transformer_norm=draw(st.booleans()),
        use_post_transformer_norm=after == "norm",
        use_fc_norm=after == "fc",
    )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def cait_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm Cait, talking heads and class attention, randomised, in eval mode."""
    num_heads = draw(st.sampled_from([2, 3, 4, 6]))
    model = Cait(
        img_size=draw(st.sampled_from([32, 48, (32, 48)])),
        patch_size=16,
        num_classes=draw(st.integers(2, 7)),
        global_pool=draw(st.sampled_from(["token", "token", "avg"])),
        embed_dim=num_heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=num_heads,
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        qkv_bias=draw(st.booleans()),
        depth_token_only=draw(st.integers(1, 2)),
        mlp_ratio_token_only=draw(st.sampled_from([1, 3])),
    )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def beit_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm Beit with random features and weights, in eval mode."""
    num_heads = draw(st.sampled_from([2, 3, 4]))
    model = Beit(
        img_size=draw(st.sampled_from([32, 48, (32, 48)])),
        patch_size=16,
        num_classes=draw(st.integers(2, 7)),
        global_pool=draw(st.sampled_from(["avg", "token"])),
        embed_dim=num_heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=num_heads,
        qkv_bias=draw(st.booleans()),
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        swiglu_mlp=draw(st.booleans()),
        scale_mlp=draw(st.booleans()),
        norm_layer=draw(st.sampled_from([LayerNorm, RmsNorm])),
        init_values=draw(st.sampled_from([None, 1.0])),
        use_abs_pos_emb=draw(st.booleans()),
        use_rel_pos_bias=draw(st.booleans()),
        use_shared_rel_pos_bias=draw(st.booleans()),
        use_fc_norm=draw(st.sampled_from([None, True, False])),
    )
    return randomise(model, draw(SEEDS)).eval()


@st.composite
def relpos_backbones(draw: st.DrawFn) -> nn.Module:
    """A timm VisionTransformerRelPos with random features and weights, in eval mode."""
    num_heads = draw(st.sampled_from([2, 3, 4]))
    class_token = draw(st.booleans())
    model = VisionTransformerRelPos(
        img_size=draw(st.sampled_from([32, 48, (32, 48)])),
        patch_size=16,
        num_classes=draw(st.integers(2, 7)),
        global_pool=draw(st.sampled_from(["avg", "token"])) if class_token else "avg",
        embed_dim=num_heads * draw(st.sampled_from([4, 8])),
        depth=draw(st.integers(1, 3)),
        num_heads=num_heads,
        mlp_ratio=draw(st.sampled_from([1, 2, 4])),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        init_values=draw(st.sampled_from([None, 1.0])),
        class_token=class_token,
        fc_norm=draw(st.booleans()),
        rel_pos_type=draw(st.sampled_from(["mlp", "mlp-swin", "bias"])),
        rel_pos_dim=draw(st.sampled_from([None, 16])),
        shared_rel_pos=draw(st.booleans()),
        block_fn=draw(st.sampled_from([RelPosBlock, ResPostRelPosBlock])),
    )
    return randomise(model, draw(SEEDS)).eval()


BACKBONES = {
    "vit": vit_backbones,
    "swin": swin_backbones,
    "swinv2": swinv2_backbones,
    "t2t": t2t_backbones,
    "eva": eva_backbones,
    "cait": cait_backbones,
    "beit": beit_backbones,
    "relpos": relpos_backbones,
}


def images(backbone: Any, batch: int = 2, seed: int = 0) -> Tensor:
    """(batch, 3, H, W) normal noise of the size, dtype and device that the backbone expects."""
    parameter = next(backbone.parameters())
    stem = backbone.tokens_to_token if isinstance(backbone, T2TViT) else backbone.patch_embed
    noise = torch.randn(batch, 3, *stem.img_size, generator=torch.Generator().manual_seed(seed))
    return noise.to(parameter)


def block_shapes(backbone: nn.Module) -> list[BlockShape]:
    """The facts of every block, read off its own linear layers."""
    return [
        BlockShape(
            stage=stage,
            embed_dim=embed_dim_of(block),
            num_heads=block.attn.num_heads,
            head_dim=block.attn.proj.in_features // block.attn.num_heads,
            hidden=block.mlp.fc2.in_features,
            qk_unit=2 if turning_pairs(backbone) else 1,
        )
        for stage, _, block in blocks_of(backbone)
    ]


def qk_width(shape: BlockShape, about: int) -> int:
    """A width of q and k that a block allows, of those up to `about` the widest."""
    return max(about // shape.qk_unit, 1) * shape.qk_unit


def alphas(shape: BlockShape, width: str) -> list[int]:
    """Compression factors that a block allows: divisors of its heads, neurons and, in "stream", channels."""
    sizes = [shape.num_heads, shape.hidden] + [shape.embed_dim] * (width == "stream")
    return [alpha for alpha in range(1, shape.num_heads + 1) if not any(size % alpha for size in sizes)]


@st.composite
def prefix_slices(draw: st.DrawFn, shapes: Sequence[BlockShape], width: str) -> NetworkSlice:
    """AN and DAN: a factor per block (AN: one for all of them); width is "stream" or "inner".

    Stage widths are the widest slice, all of E or, to test more than any method asks for, in between.
    """
    common = set.intersection(*(set(alphas(shape, width)) for shape in shapes))
    if draw(st.booleans()):
        chosen = [draw(st.sampled_from(sorted(common)))] * len(shapes)
    else:
        chosen = [draw(st.sampled_from(alphas(shape, width))) for shape in shapes]
    blocks = [prefix_slice(shape, alpha, width) for shape, alpha in zip(shapes, chosen, strict=True)]
    return _with_stage_widths(draw, shapes, blocks)


@st.composite
def general_slices(draw: st.DrawFn, shapes: Sequence[BlockShape]) -> NetworkSlice:
    """Everything a slice can say at once: kept indices, MLP channels, V channels and skipped halves."""
    return _with_stage_widths(draw, shapes, [draw(_general_blocks(shape)) for shape in shapes])


@st.composite
def _general_blocks(draw: st.DrawFn, shape: BlockShape) -> BlockSlice:
    stream = draw(st.integers(min(MIN_STREAM, shape.embed_dim), shape.embed_dim))
    heads = draw(_kept(shape.num_heads))
    num_heads = heads if isinstance(heads, int) else len(heads)
    return BlockSlice(
        stream=stream,
        heads=heads,
        hidden=draw(_kept(shape.hidden)),
        mlp_stream=draw(st.none() | _kept(stream)),
        qk=draw(st.none() | st.integers(1, shape.head_dim).map(lambda width: qk_width(shape, width))),
        v_channels=draw(
            st.none() | st.integers(1, shape.head_dim) | st.tuples(*[_indices(shape.head_dim)] * num_heads)
        ),
        attn=draw(st.integers(0, 4)) > 0,
        mlp=draw(st.integers(0, 4)) > 0,
    )


def _kept(size: int) -> st.SearchStrategy[Kept]:
    return st.integers(1, size) | _indices(size)


@st.composite
def _indices(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """A non-empty ascending choice among range(size), by a seeded shuffle: cheap for many neurons too."""
    kept = draw(st.integers(1, size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(draw(SEEDS)))
    return tuple(sorted(order[:kept].tolist()))


def _with_stage_widths(draw: st.DrawFn, shapes: Sequence[BlockShape], blocks: Sequence[BlockSlice]) -> NetworkSlice:
    narrow, full = (network_slice(shapes, blocks, full).stage_widths for full in (False, True))
    kind = draw(st.sampled_from(["narrow", "full", "between"]))
    if kind == "between":
        between = tuple(draw(st.integers(low, high)) for low, high in zip(narrow, full, strict=True))
        return NetworkSlice(tuple(blocks), between)
    return NetworkSlice(tuple(blocks), narrow if kind == "narrow" else full)


def random_basis(net: Supernet, seed: int) -> Basis:
    """All that a basis of the network can hold, at random: every stream, q, k and v that can be rotated is."""
    generator = torch.Generator().manual_seed(seed)
    fixed = fixed_streams(net.adapter)
    streams: dict[int, Tensor] = {}
    energy: dict[int, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {"qk": {}, "v": {}}
    orders: dict[str, list[int]] = {}
    for stage, size in {shape.stage: shape.embed_dim for shape in net.shapes}.items():
        if stage in fixed:
            orders[f"stream.{stage}"] = torch.randperm(size, generator=generator).tolist()
        else:
            streams[stage] = rotation(size, stage_is_centred(net.adapter, stage), generator)
            energy[stage] = torch.rand(size, generator=generator, dtype=torch.float64)
    for name, block, shape in zip(net.adapter.block_names, net.adapter.blocks(), net.shapes, strict=True):
        against = net.adapter.head_parts(block) if shape.attn else heads
        for (part, matrices), width in zip(heads.items(), (shape.head_dim, shape.v_dim), strict=True):
            if part not in against:
                if part == "qk" and net.adapter.cosine_qk(block):
                    each = [rotation(width, False, generator) for _ in range(shape.num_heads)]
                    matrices[name] = torch.stack(each)
                else:
                    matrices[name] = well_conditioned(shape.num_heads, width, generator)
        if shape.attn and not net.adapter.heads_stay:
            orders[f"{name}.heads"] = torch.randperm(shape.num_heads, generator=generator).tolist()
        if shape.mlp:
            orders[f"{name}.hidden"] = torch.randperm(shape.hidden, generator=generator).tolist()
    return Basis(streams, energy, heads["qk"], heads["v"], orders)


def rotation(size: int, centred: bool, generator: torch.Generator) -> Tensor:
    """(size, size) orthogonal, float64; the first row is constant where centred."""
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if centred:
        columns[:, 0] = 1
    rows = torch.linalg.qr(columns)[0].T
    return (rows * rows[0, 0].sign()).contiguous()


def well_conditioned(number: int, size: int, generator: torch.Generator) -> Tensor:
    """(number, size, size) float64, of singular values between 1/2 and 2."""
    noise = torch.randn(2, number, size, size, generator=generator, dtype=torch.float64)
    left, right = torch.linalg.qr(noise)[0]
    scales = 2 ** (2 * torch.rand(number, size, 1, generator=generator, dtype=torch.float64) - 1)
    return left @ (scales * right)


def disturb(model: nn.Module, seed: int, by: float = 0.05) -> None:
    """Move every parameter by noise, in place, as a training would; buffers stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn(p.shape, generator=generator).to(p))


def expected_logits(backbone: nn.Module, net: Supernet, subnet: NetworkSlice, x: Tensor) -> Tensor:
    """The oracle's, in the basis of the network. backbone: timm's own, of any weights."""
    backbone = copy.deepcopy(backbone)
    with_feature_head(backbone)  # where it has no classifier
    backbone.load_state_dict(net.backbone.state_dict())
    return oracle_logits(backbone, subnet, x, None if net.basis is None else net.basis.streams)
