"""The compact Swin's own attention: timm's function, gradients included, and a cache that never goes stale."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from supernets.compact import cut
from supernets.compact_swin import CompactWindowAttention
from supernets.supernet import Supernet
from tests.oracle import randomise

over_kinds = pytest.mark.parametrize("kind", [SwinTransformer, SwinTransformerV2], ids=lambda kind: kind.__name__)


def swin(img_size: int, kind: Any = SwinTransformer) -> nn.Module:
    options: dict[str, Any] = dict(
        img_size=img_size, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
    )
    return randomise(kind(**options), 0).double().eval()


@pytest.mark.parametrize("img_size", [32, 36, 60])  # whole windows; padded; a map as small as its window
@over_kinds
def test_it_is_timms_attention_with_its_gradients(kind: Any, img_size: int) -> None:
    supernet = Supernet(swin(img_size, kind))
    compact = cut(supernet.backbone, supernet.identity()).eval()
    assert sum(isinstance(m, CompactWindowAttention) for m in compact.modules()) == 4
    x = torch.randn(3, 3, img_size, img_size, dtype=torch.float64)
    grads = []
    for network in (supernet.backbone, compact):
        logits = network(x)
        logits.square().sum().backward()
        grads.append([logits.detach(), *(p.grad for _, p in sorted(network.named_parameters()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@over_kinds
def test_the_cached_bias_follows_the_table(kind: Any) -> None:
    supernet = Supernet(swin(36, kind))
    compact: Any = cut(supernet.backbone, supernet.identity()).eval()
    x = torch.randn(2, 3, 36, 36, dtype=torch.float64)

    def check() -> None:
        expected = compact(x).detach()  # with gradients on, nothing is cached
        with torch.inference_mode():
            first = compact(x)
        with torch.no_grad():
            second = compact(x)
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(second, expected, rtol=0, atol=1e-12)

    check()
    before = compact(x).detach()
    optimizer = torch.optim.SGD(compact.parameters(), lr=0.1)
    compact(x).sum().backward()
    optimizer.step()
    check()
    assert not torch.allclose(before, compact(x))
    compact.load_state_dict({k: v + 0.1 for k, v in compact.state_dict().items()})
    check()
    compact.load_state_dict({k: v + 0.1 for k, v in compact.state_dict().items()}, assign=True)
    check()
    for p in compact.parameters():
        p.data = p.data * 0.9
    check()
    compact = copy.deepcopy(compact)
    for p in compact.parameters():
        with torch.no_grad():
            p.add_(0.05)
    check()


def fresh(compact: Any, x: Tensor) -> Tensor:
    """The logits of a copy, which has nothing cached."""
    copied = copy.deepcopy(compact)
    assert all(m._bias is None for m in copied.modules() if isinstance(m, CompactWindowAttention))
    with torch.no_grad():
        return copied(x)


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
def test_the_cached_bias_follows_the_precision(first: str) -> None:
    supernet = Supernet(swin(36).float())
    compact: Any = cut(supernet.backbone, supernet.identity()).eval()
    x = torch.randn(2, 3, 36, 36)
    second = {"float32": "bfloat16", "bfloat16": "float32"}[first]
    with torch.no_grad():
        for name in (first, second, first):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                assert torch.equal(compact(x), fresh(compact, x))
                for m in compact.modules():
                    if isinstance(m, CompactWindowAttention):
                        assert m._cached_bias(getattr(torch, name)).dtype == getattr(torch, name)
        for name in (first, second, first):
            compact, x = compact.to(getattr(torch, name)), x.to(getattr(torch, name))
            assert compact(x).dtype == getattr(torch, name) and torch.equal(compact(x), fresh(compact, x))


def test_the_cached_bias_is_not_taken_for_that_of_a_table_at_the_same_address() -> None:
    supernet = Supernet(swin(36).float())
    compact: Any = cut(supernet.backbone, supernet.identity()).eval()
    x = torch.randn(2, 3, 36, 36)
    for _ in range(20):
        with torch.no_grad():
            compact(x)
        compact = compact.bfloat16().float()  # the first table's memory is free when the third is made
        for p in compact.parameters():
            p.data = p.data + 0.01
        with torch.no_grad():
            assert torch.equal(compact(x), fresh(compact, x))


def test_a_copy_and_a_network_made_in_inference_mode_cache_for_themselves() -> None:
    supernet = Supernet(swin(36).float())
    compact: Any = cut(supernet.backbone, supernet.identity()).eval()
    x = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        for updates in range(6):
            for p in compact.parameters():
                p.add_(0.01)
            compact(x)
            copied = copy.deepcopy(compact)
            for _ in range(updates):
                for p in copied.parameters():
                    p.add_(0.01)
            assert torch.equal(copied(x), fresh(copied, x))
    with torch.inference_mode():
        made = cut(supernet.backbone, supernet.identity()).eval()
        assert torch.equal(made(x), made(x))


@over_kinds
@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(
    "size",
    [dict(img_size=(44, 28)), dict(img_size=64, window_size=8), dict(window_size=3), dict(img_size=32)],
    ids=lambda size: "-".join(size),
)
def test_it_takes_another_input_size_as_timm_does(size: dict[str, Any], skipped: bool, kind: Any) -> None:
    """Cut and then resized it is the resized network cut; back again, the tables are as large as they were."""
    large = swin(36, kind)
    subnet = Supernet(large).identity()
    if skipped:
        subnet = replace(subnet, blocks=(replace(subnet.blocks[0], attn=False, mlp=False), *subnet.blocks[1:]))
    compact: Any = cut(large, subnet).eval()
    resized: Any = copy.deepcopy(large)
    resized.set_input_size(**size)
    expected = cut(resized, subnet).eval()
    compact.set_input_size(**size)
    x = torch.randn(2, 3, *resized.patch_embed.img_size, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(compact(x), expected(x))
    compact.set_input_size(img_size=36, window_size=4)
    assert compact(torch.randn(1, 3, 36, 36, dtype=torch.float64)).isfinite().all()
    tables = [
        [p.shape for name, p in net.named_parameters() if "table" in name] for net in (compact, cut(large, subnet))
    ]
    assert tables[0] == tables[1]
