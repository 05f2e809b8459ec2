"""Section 2.9: q and k, and v, of widths of their own in every kept head: the oracle's function, and FLOPs."""

from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, find, settings
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.slices import BlockSlice, NetworkSlice, identity_slice, network_slice
from supernets.axes import head_widths
from supernets.compact import cut
from supernets.flops import attention_channels, block_flops, block_params
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet
from tests.oracle import oracle_logits, randomise
from tests.strategies import block_shapes, general_slices, images, qk_width, vit_backbones
from tests.supernets.test_invariants import relative

over_families = pytest.mark.parametrize("family", FAMILIES)
WIDTHS = [(4, 4), (4, 1), (1, 4), (2, 3), (3, 2), (1, 1)]  # of q and k, and of v, in heads of 4 channels


def at(supernet: Supernet, qk: int, v: Any, **others: Any) -> NetworkSlice:
    """Both widths in every block."""
    blocks = [
        replace(identity_slice(shape), qk=qk_width(shape, qk), v_channels=v, **others) for shape in supernet.shapes
    ]
    return network_slice(supernet.shapes, blocks)


def counted(model: nn.Module, x: Tensor) -> int:
    """MACs of one image, by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta").requires_grad_(False)(x[:1].to("meta"))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@over_families
@pytest.mark.parametrize(("qk", "v"), WIDTHS)
def test_what_runs_padded_is_counted_padded(family: str, qk: int, v: int) -> None:
    """Of q·k and of the scores times v, both at the wider of the two."""
    supernet = small_supernet(family)
    qk = qk_width(supernet.shapes[0], qk)
    subnet, x = at(supernet, qk, v), images(supernet.backbone)
    assert supernet.flops(subnet) == counted(cut(supernet.backbone, subnet), x)
    for shape, costs in zip(supernet.shapes, supernet.adapter.costs.blocks, strict=True):
        E, H = shape.embed_dim, shape.num_heads
        kept = BlockSlice(E, H - 1, shape.hidden, qk=qk, v_channels=v, mlp=False)
        tokens, attended = costs.attn_tokens, costs.attended
        linear = (H - 1) * (2 * qk + v) * E + (H - 1) * v * E
        once = sum(macs * (H - 1) ** len(axes) for macs, axes in costs.attn_once)  # positions, what mixes heads
        channels = (H - 1) * (2 * max(qk, v) if costs.pads_heads else qk + v)
        assert block_flops(shape, costs, kept) == tokens * (linear + attended * channels) + once
        assert attention_channels(head_widths(kept, shape), costs.pads_heads) == channels


@over_families
def test_heads_of_their_own_widths_run_and_count_without_padding(family: str) -> None:
    supernet = small_supernet(family)
    shapes = supernet.shapes
    uneven = [tuple(tuple(range(1 + h % 3)) for h in range(shape.num_heads)) for shape in shapes]
    blocks = [replace(identity_slice(s), qk=2, v_channels=v) for s, v in zip(shapes, uneven, strict=True)]
    subnet, x = network_slice(shapes, blocks), images(supernet.backbone)
    assert supernet.flops(subnet) == counted(cut(supernet.backbone, subnet), x)
    widths = head_widths(blocks[0], shapes[0])
    assert attention_channels(widths) == 2 * shapes[0].num_heads + sum(map(len, uneven[0]))


@over_families
def test_a_half_that_is_removed_costs_nothing(family: str) -> None:
    supernet = small_supernet(family)
    x = images(supernet.backbone)
    for attn, mlp in ((False, True), (True, False), (False, False)):
        subnet = at(supernet, 2, 3, attn=attn, mlp=mlp)
        compact = cut(supernet.backbone, subnet)
        assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
        assert supernet.flops(subnet) == counted(compact, x)
        kinds = {name.split(".")[-2] for name in compact.state_dict() if "blocks." in name and "rel_pos" not in name}
        assert ("proj" in kinds) == attn and ("fc2" in kinds) == mlp
        for shape, costs, kept in zip(supernet.shapes, supernet.adapter.costs.blocks, subnet.blocks, strict=True):
            if not attn and not mlp:
                assert block_flops(shape, costs, kept) == block_params(shape, costs, kept) == 0


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("qk", [1, 2, 3, 4])
@pytest.mark.parametrize("v", [3, ((0, 2), (1,), (0, 1, 2, 3))], ids=["even", "uneven"])
def test_0_norms_of_q_and_k_are_over_the_channels_that_are_left(norm: str, qk: int, v: Any) -> None:
    options: dict[str, Any] = dict(qk_norm=True, norm_layer=norm, scale_attn_norm=True)
    backbone = randomise(
        VisionTransformer(img_size=32, patch_size=16, num_classes=5, embed_dim=12, depth=2, num_heads=3, **options), 0
    )
    backbone = backbone.double().eval()
    supernet = Supernet(backbone)
    subnet, x = at(supernet, qk, v), images(backbone)
    expected = oracle_logits(backbone, subnet, x)
    assert relative(expected, supernet.small(x, subnet)) < 1e-12
    assert relative(expected, cut(backbone, subnet).eval()(x)) < 1e-12
    narrower = relative(expected, supernet.small(x, at(supernet, 4, v)))
    assert (narrower > 1e-6) == (qk < 4)


def narrow_under_norms(pair: tuple[Any, NetworkSlice], uneven: bool) -> bool:
    """Whether some block has norms of q and k, fewer channels of both, and v head by head or in all heads alike."""
    backbone, subnet = pair
    if isinstance(backbone.blocks[0].attn.q_norm, nn.Identity):
        return False
    d = block_shapes(backbone)[0].head_dim
    narrow = [kept for kept in subnet.blocks if kept.attn and kept.qk is not None and kept.qk < d]
    return any(isinstance(kept.v_channels, tuple) == uneven for kept in narrow)


@pytest.mark.parametrize("uneven", [True, False])
def test_the_invariants_draw_them(uneven: bool) -> None:
    pairs = vit_backbones().flatmap(lambda b: st.tuples(st.just(b), general_slices(block_shapes(b))))
    once = settings(phases=(Phase.generate,), suppress_health_check=list(HealthCheck), database=None, deadline=None)
    find(pairs, partial(narrow_under_norms, uneven=uneven), settings=once)


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize(("qk", "v"), [(2, 3), (3, 1)])
def test_2_shifted_and_padded_windows_of_narrow_heads(qk: int, v: int, qkv_bias: bool) -> None:
    """Both ways in which a compact Swin gathers its windows."""
    options: dict[str, Any] = dict(img_size=36, embed_dim=12, depths=(2, 2), num_heads=(3, 6), window_size=4)
    backbone = randomise(SwinTransformer(num_classes=5, mlp_ratio=2, qkv_bias=qkv_bias, **options), 1).double().eval()
    supernet = Supernet(backbone)
    assert any(block.attn_mask is not None for block in supernet.adapter.blocks())
    x = images(backbone)
    for subnet in (at(supernet, qk, v), at(supernet, qk, v, heads=2), at(supernet, qk, v, stream=8)):
        expected = oracle_logits(backbone, subnet, x)
        assert relative(expected, supernet.small(x, subnet)) < 1e-12
        assert relative(expected, cut(backbone, subnet).eval()(x)) < 1e-12
