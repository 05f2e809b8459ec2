"""Rotary embeddings: what a head keeps of q and k are pairs that turn together, spread over axes and speeds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.eva import Eva
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nas.training.optim import compile_forwards
from search_spaces.slices import identity_slice, network_slice, prefix_slice
from supernets.axes import head_widths, slice_block
from supernets.compact import cut
from supernets.compact_block import SkippedBlock
from supernets.compact_eva import CompactEvaAttention
from supernets.eva import pair_order
from supernets.supernet import Supernet
from tests.oracle import randomise
from tests.strategies import images
from tests.supernets.test_invariants import relative

over_layouts = pytest.mark.parametrize("half", [False, True], ids=["neighbours", "half a head apart"])


def eva(**options: Any) -> Supernet:
    """Heads of 16 channels, eight pairs, four of each axis; float64."""
    return Supernet(randomise(plain_eva(**options), 0)).double().eval()


def plain_eva(**options: Any) -> Eva:
    own: dict[str, Any] = dict(img_size=(32, 48), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return Eva(**own | dict(use_rot_pos_emb=True, mlp_ratio=2) | options)


@over_layouts
def test_any_first_pairs_are_of_both_axes_and_of_all_speeds(half: bool) -> None:
    order = pair_order(16, half)
    assert sorted(order) == list(range(16))
    pairs = [{*order[i : i + 2]} for i in range(0, 16, 2)]
    assert all(max(pair) - min(pair) == (8 if half else 1) for pair in pairs)
    numbers = [min(pair) // (1 if half else 2) for pair in pairs]  # those of one axis, then those of the other
    assert numbers == [0, 4, 2, 6, 1, 5, 3, 7]


@over_layouts
@pytest.mark.parametrize("width", [2, 6, 16])
def test_attention_sees_the_products_of_the_pairs_that_are_left(half: bool, width: int) -> None:
    """A pair is a complex number, turned by the angle of its axis and speed; the class token's is not turned."""
    supernet = eva(rope_rotate_half=half, qkv_fused=False, depth=1)
    block: Any = supernet.backbone.blocks[0]
    (shape,), attn = supernet.shapes, block.attn
    kept = replace(identity_slice(shape), qk=width)
    x = torch.randn(1, 25, 32, generator=torch.Generator().manual_seed(1)).double()

    bands = supernet.backbone.rope.bands
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    angles = torch.cat([rows.reshape(-1, 1) * bands, columns.reshape(-1, 1) * bands], 1)  # (24, 8)
    turns = torch.cat([torch.ones(1, 8), torch.polar(torch.ones(24, 8), angles.float())]).to(torch.complex128)

    def pairs(t: Tensor) -> Tensor:  # (25, 2 heads, 8)
        t = t[0].unflatten(-1, (2, 2, 8) if half else (2, 8, 2))
        return torch.complex(t[:, :, 0], t[:, :, 1]) if half else torch.view_as_complex(t.contiguous())

    q, k = pairs(attn.q_proj(x)), pairs(attn.k_proj(x))
    chosen = [0, 4, 2, 6, 1, 5, 3, 7][: width // 2]
    q, k = (torch.where(torch.tensor([i in chosen for i in range(8)]), t * turns[:, None], 0) for t in (q, k))
    scores = torch.einsum("nhp,mhp->hnm", q, k.conj()).real / 4
    v = attn.v_proj(x)[0].unflatten(-1, (2, 16))
    mixed = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1)
    expected = attn.proj(mixed)

    adapter: Any = supernet.adapter
    sliced = slice_block(adapter.block_parameters(block), adapter.block_axes, shape, kept)
    seen = adapter.attend(block, sliced, head_widths(kept, shape), x)[0]
    assert relative(expected, seen) < 1e-6  # the angles are float32


def test_a_width_that_parts_a_pair_is_no_width() -> None:
    (shape, *_) = eva().shapes
    with pytest.raises(ValueError, match="width 3; rotary embeddings keep 2 channels together"):
        shape.qk_kept(3)


@pytest.mark.parametrize("options", [dict(dynamic_img_size=True), dict(rope_type="mrope"), dict()], ids=str)
def test_positions_follow_the_network_to_another_precision(options: dict[str, Any]) -> None:
    supernet, x = eva(**options), images(eva().backbone)
    assert torch.equal(*supernet(x))
    supernet.float()
    assert torch.equal(*supernet(x.float()))


@pytest.mark.parametrize("fused", [True, False])
def test_only_what_timms_cannot_serve_has_an_attention_of_its_own(fused: bool) -> None:
    """It serves fewer heads where the stream is as wide as all are; a fused qkv with biases it never calls."""
    supernet, x = eva(depth=4, qkv_fused=fused), images(eva().backbone)
    own = identity_slice(supernet.shapes[0])
    blocks = [
        replace(own, stream=16, heads=1),
        replace(own, stream=16, heads=2),
        replace(own, stream=16, heads=1, qk=8),
        replace(own, stream=16, attn=False, mlp=False),
    ]
    subnet = network_slice(supernet.shapes, blocks)
    compact: Any = cut(supernet.backbone, subnet)
    found = [type(block.attn) is CompactEvaAttention for block in compact.blocks[:3]]
    assert found == [fused, True, True] and type(compact.blocks[3]) is SkippedBlock
    assert relative(supernet.small(x, subnet), compact.eval()(x)) < 1e-12
    features = compact.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert [f.shape for f in features] == [(2, 16, 4, 6)] * 2


AUGMENTED = dict(rope_shift_coords=0.2, rope_jitter_coords=1.5, rope_rescale_coords=2.0)
over_ropes = pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="cat"),
        dict(rope_type="dinov3", dynamic_img_size=True),
        dict(rope_type="mrope"),
        dict(rope_type="mixed"),
        dict(rope_type="mixed", dynamic_img_size=True),
    ],
    ids=str,
)


@over_ropes
def test_large_and_small_network_of_a_step_see_one_draw_of_augmented_coordinates(rope: dict[str, Any]) -> None:
    supernet = eva(**rope, **AUGMENTED)
    x, other = images(supernet.backbone), images(supernet.backbone, seed=1)
    subnet = network_slice(supernet.shapes, [prefix_slice(shape, 2, "stream") for shape in supernet.shapes])
    plain, plain_small = supernet(x, subnet)
    supernet.train()
    large, small = supernet(x)
    assert torch.equal(large, small) and not torch.equal(large, plain)
    first, second = supernet.small(x, subnet), supernet.small(x.clone(), subnet)
    assert not torch.equal(first, plain_small) and not torch.equal(first, second)  # another batch, another draw
    supernet.large(other)
    assert not torch.equal(supernet.large(x), large)
    assert not torch.equal(supernet.backbone(x), supernet.backbone(x))  # outside a step as timm's
    assert torch.equal(supernet.eval().large(x), plain)


@over_ropes
def test_a_compact_network_trains_with_timms_augmentation(rope: dict[str, Any]) -> None:
    supernet = eva(**rope, **AUGMENTED)
    x, timms = images(supernet.backbone), randomise(plain_eva(**rope, **AUGMENTED), 0).double().train()
    supernet.train()(x)
    seen = []
    for network in (timms, supernet.backbone, cut(supernet.backbone, supernet.identity()).train()):
        torch.manual_seed(0)
        seen.append(network(x))
    assert torch.equal(seen[0], seen[1]) and relative(seen[0], seen[2]) < 1e-12


@over_ropes
def test_a_pass_that_is_computed_again_sees_the_draw_that_it_saw(rope: dict[str, Any]) -> None:
    supernet = eva(**rope, **AUGMENTED).train()
    x, subnet = images(supernet.backbone), supernet.identity()
    found = []
    for small in (supernet.small, lambda *args: checkpoint(supernet.small, *args, use_reentrant=False)):
        supernet.zero_grad()
        (supernet.large(x) - 2 * small(x, subnet)).square().sum().backward()
        found.append([p.grad.clone() for p in supernet.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@over_ropes
def test_compiled_passes_see_one_draw(rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="eager", fullgraph=True))
    supernet = eva(**rope, **AUGMENTED).train()
    compile_forwards(supernet)
    batches = [images(supernet.backbone, seed=seed) for seed in range(3)]
    found = [supernet(x) for x in (*batches, batches[0].clone())]
    assert all(relative(large, small) < 1e-12 for large, small in found)
    assert relative(found[0][0], found[3][0]) > 1e-3
