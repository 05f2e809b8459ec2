"""Invariant 4: importance order leaves the large network's function unchanged, and puts the best first."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from search_spaces.errors import UserError
from supernets.importance import (
    fixed_orders,
    magnitude_scores,
    orders_of,
    permute,
    taylor_lost,
    taylor_pass,
    taylor_scores,
)
from supernets.supernet import Supernet
from tests.strategies import BACKBONES, images, swin_backbones
from tests.supernets.test_invariants import few, over_families, relative


def random_orders(supernet: Supernet, seed: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    scores, stay = magnitude_scores(supernet), fixed_orders(supernet)
    return {n: torch.randperm(len(s), generator=generator).tolist() for n, s in scores.items() if n not in stay}


@over_families
@given(data=st.data(), seed=st.integers(0, 1000))
@few
def test_4_any_order_leaves_the_function_unchanged(family: str, data: st.DataObject, seed: int) -> None:
    backbone = data.draw(BACKBONES[family]()).double()
    supernet = Supernet(backbone).eval()
    x = images(backbone)
    before = supernet.large(x)
    orders = random_orders(supernet, seed)
    shapes = supernet.shapes
    assert len(orders) == shapes[-1].stage + 1 + (1 if supernet.adapter.heads_stay else 2) * len(shapes)
    permute(supernet, orders)
    assert relative(before, supernet.large(x)) < 1e-12


@over_families
@given(data=st.data())
@few
def test_order_sorts_every_group_by_its_own_score(family: str, data: st.DataObject) -> None:
    supernet = Supernet(data.draw(BACKBONES[family]())).eval()
    permute(supernet, orders_of(magnitude_scores(supernet), supernet))
    for name, scores in magnitude_scores(supernet).items():
        assert name in fixed_orders(supernet) or torch.all(scores[:-1] >= scores[1:] - 1e-9 * scores[:-1].abs()), name


@given(backbone=swin_backbones())
@few
def test_magnitude_of_a_head_is_the_sum_over_timms_reshape(backbone: nn.Module) -> None:
    supernet = Supernet(copy.deepcopy(backbone))
    block = backbone.layers[1].blocks[0]
    H = block.attn.num_heads
    qkv = block.attn.qkv.weight.double().square().reshape(3, H, -1, block.dim).sum((0, 2, 3))
    proj = block.attn.proj.weight.double().square().reshape(block.dim, H, -1).sum((0, 2))
    table = block.attn.relative_position_bias_table.double().square().sum(0)
    expected = qkv + proj + table
    if block.attn.qkv.bias is not None:
        expected = expected + block.attn.qkv.bias.double().square().reshape(3, H, -1).sum((0, 2))
    assert torch.allclose(magnitude_scores(supernet)["layers.1.blocks.0.heads"], expected)


def test_taylor_scores_are_weight_times_gradient_and_leave_no_gradients() -> None:
    import timm

    torch.manual_seed(0)
    backbone = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=3
    )
    supernet = Supernet(backbone)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    loss = nn.functional.cross_entropy
    scores = taylor_pass(supernet, [(x, y), (x, y)], loss)
    assert all(p.grad is None for p in supernet.parameters())
    supernet.eval()
    loss(supernet.large(x), y).backward()
    fc1, fc2 = backbone.blocks[0].mlp.fc1, backbone.blocks[0].mlp.fc2
    expected = (fc1.weight * fc1.weight.grad).abs().sum(1) + (fc1.bias * fc1.bias.grad).abs()
    expected = expected + (fc2.weight * fc2.weight.grad).abs().sum(0)
    assert torch.allclose(scores["blocks.0.hidden"].float(), 2 * expected, rtol=1e-4)
    assert torch.allclose(taylor_scores(supernet)["blocks.0.hidden"].float(), expected, rtol=1e-4)


@over_families
@given(data=st.data())
@few
def test_inside_a_head_count_readers_and_writers_of_its_channels(family: str, data: st.DataObject) -> None:
    """Rows of q and k, with their norms; of v, with the columns of the projection and the norm before it."""
    backbone = data.draw(BACKBONES[family]())
    supernet = Supernet(backbone).eval()
    x = images(backbone, 4)
    scores = taylor_pass(supernet, [(x, torch.zeros(4, dtype=torch.long))], nn.functional.cross_entropy, inside=True)
    nn.functional.cross_entropy(supernet.large(x), torch.zeros(4, dtype=torch.long)).backward()
    lost = taylor_lost(supernet, scores)
    adapter = supernet.adapter
    for name, shape, block in zip(adapter.block_names, supernet.shapes, adapter.blocks(), strict=True):
        H, d = shape.num_heads, shape.head_dim

        def of(leaf: str, *sizes: int, block: nn.Module = block) -> torch.Tensor:
            p = dict(block.named_parameters()).get(leaf)
            if p is None:
                return torch.zeros(sizes, dtype=torch.float64)
            assert p.grad is not None
            return (p * p.grad).abs().detach().double().reshape(*sizes)

        qkv = of("attn.qkv.weight", 3, H, d, shape.embed_dim).sum(-1) + of("attn.qkv.bias", 3, H, d)
        for i, part in enumerate("qkv"):  # Eva's
            qkv[i] += of(f"attn.{part}_proj.weight", H, d, shape.embed_dim).sum(-1)
            qkv[i] += of(f"attn.{part}_proj.bias", H, d) + of(f"attn.{part}_bias", H, d)
        normed = sum(of(f"attn.{part}_norm.{leaf}", d) for part in "qk" for leaf in ("weight", "bias"))
        after = of("attn.proj.weight", shape.embed_dim, H, d).sum(0)
        after = after + sum(of(f"attn.norm.{leaf}", H, d) for leaf in ("weight", "bias"))
        expected = {"qk": qkv[:2].sum((0, 1)) + normed, "v": (qkv[2] + after).sum(0)}
        for part, score in expected.items():
            assert torch.allclose(scores[f"{name}.{part}"], score, rtol=1e-4), part
        for part, units in (("heads", H), ("qk", d), ("hidden", shape.hidden)):
            tails = lost[f"{name}.{part}"]
            own = scores[f"{name}.{part}"]
            own = own[list(shape.qk_order)] if part == "qk" and shape.qk_order else own
            assert tails.shape == (units + 1,) and tails[-1] == 0 and torch.allclose(-tails.diff(), own)
        of_v = lost[f"{name}.v"]
        assert of_v.shape == (H, d + 1) and torch.allclose(-of_v.sum(0).diff(), scores[f"{name}.v"])
        assert torch.equal(of_v, of_v[:1].expand(H, -1))


@pytest.mark.parametrize("training", [True, False])
def test_taylor_pass_runs_in_eval_mode_and_restores_the_mode(training: bool) -> None:
    torch.manual_seed(0)
    drops = dict(drop_path_rate=0.5, proj_drop_rate=0.5, drop_rate=0.5)
    backbone = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3, **drops
    )  # in training every pass would be another
    supernet = Supernet(backbone).eval()
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    nn.functional.cross_entropy(supernet.large(x), y).backward()
    expected = taylor_scores(supernet)
    supernet.train(training)
    scores = taylor_pass(supernet, [(x, y)], nn.functional.cross_entropy)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    assert all(module.training == training for module in supernet.modules())


def test_orders_of_another_network_are_refused() -> None:
    import timm

    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(UserError, match=r"stream\.0.*3 units.*16"):
        permute(Supernet(backbone), {"stream.0": [2, 0, 1]})
