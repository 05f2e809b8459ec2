"""Talking heads: a head goes with its rows and columns of what mixes heads; class attention stays whole inside."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.cait import Cait, TalkingHeadAttn
from torch import Tensor

from search_spaces.slices import BlockSlice, identity_slice, network_slice, prefix_slice
from supernets.axes import head_widths, slice_block
from supernets.cait import CompactTalkingAttention
from supernets.compact import cut
from supernets.elastic import BlockMixture, Term
from supernets.supernet import Supernet
from tests.oracle import randomise
from tests.strategies import images
from tests.supernets.test_invariants import relative


def cait(**options: Any) -> Supernet:
    """Four heads of eight channels; float64."""
    own: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    return Supernet(randomise(Cait(**own | dict(mlp_ratio=2) | options), 0)).double().eval()


def tokens(supernet: Supernet) -> Tensor:
    return torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("heads", [(0, 2), (3,), (0, 1, 2, 3)])
def test_a_head_goes_as_product_as_softmax_and_as_map(heads: tuple[int, ...]) -> None:
    supernet = cait()
    block: Any = supernet.backbone.blocks[0]
    shape, attn, x = supernet.shapes[0], block.attn, tokens(supernet)
    q, k, v = attn.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)  # (B, N, 4, 8)
    products = torch.einsum("bnhd,bmhd->bhnm", q, k) / 8**0.5
    softmaxes = {
        o: sum(attn.proj_l.weight[o, h] * products[:, h] for h in heads).add(attn.proj_l.bias[o]).softmax(-1)
        for o in heads
    }
    maps = {p: sum(attn.proj_w.weight[p, o] * softmaxes[o] for o in heads) + attn.proj_w.bias[p] for p in heads}
    by_head = attn.proj.weight.unflatten(1, (4, 8))  # (E, 4, 8)
    expected = sum(maps[p] @ v[:, :, p] @ by_head[:, p].T for p in heads) + attn.proj.bias

    adapter: Any = supernet.adapter
    kept = replace(identity_slice(shape), heads=heads)
    sliced = slice_block(adapter.block_parameters(block), adapter.block_axes, shape, kept)
    assert relative(expected, adapter.attend(block, sliced, head_widths(kept, shape), x)) < 1e-12


def test_heads_of_gate_zero_are_heard_by_no_other() -> None:
    supernet, x = cait(), images(cait().backbone)
    shape, heads = supernet.shapes[0], (0, 3)
    gate = torch.zeros(4).double().index_fill(0, torch.tensor(heads), 1.0)
    subnet = network_slice(supernet.shapes, [replace(identity_slice(shape), heads=heads)] * 2)
    gated = BlockMixture((Term(identity_slice(shape), head_gate=gate),))
    assert relative(supernet.small(x, subnet), supernet.small(x, [gated] * 2)) < 1e-12


def test_stochastic_depth_is_timms_in_a_compact_network() -> None:
    supernet = cait(drop_path_rate=0.5)
    x = images(supernet.backbone, batch=16)
    kept = replace(identity_slice(supernet.shapes[0]), qk=4)
    compact = cut(supernet.backbone, network_slice(supernet.shapes, [kept] * 2)).train()
    expected, seen = compact.eval()(x), compact.train()(x)
    assert relative(expected, seen) > 1e-3
    supernet.train()
    torch.manual_seed(0)
    large = supernet.large(x)
    torch.manual_seed(0)
    assert torch.equal(large, supernet.small(x, supernet.identity()))


def test_timms_attention_serves_where_heads_are_as_wide_together_as_the_stream() -> None:
    supernet, x = cait(depth=4), images(cait().backbone)
    own = identity_slice(supernet.shapes[0])
    blocks: list[BlockSlice] = [prefix_slice(supernet.shapes[0], 2, "stream")]
    blocks += [replace(own, stream=16, **more) for more in (dict(heads=2, qk=4), dict(heads=1), dict(heads=4))]
    subnet = network_slice(supernet.shapes, blocks)
    compact: Any = cut(supernet.backbone, subnet).eval()
    found = [type(block.attn) for block in compact.blocks]
    assert found == [TalkingHeadAttn, *[CompactTalkingAttention] * 3]
    assert relative(supernet.small(x, subnet), compact(x)) < 1e-12
    (token, *_) = compact.blocks_token_only
    assert token.attn.k.weight.shape == (32, 16) and token.attn.proj.weight.shape == (16, 32)
    assert compact.forward_intermediates(x, indices=[3], intermediates_only=True)[0].shape == (2, 16, 4, 4)
