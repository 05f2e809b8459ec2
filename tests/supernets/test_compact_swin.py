"""The compact Swin's own attention: timm's function, gradients included, and a cache that never goes stale."""

import copy
from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from supernets.compact import cut
from supernets.compact_swin import CompactWindowAttention
from supernets.supernet import Supernet
from tests.oracle import randomise


def swin(img_size: int) -> nn.Module:
    options: dict[str, Any] = dict(
        img_size=img_size, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
    )
    return randomise(SwinTransformer(**options), 0).double().eval()


@pytest.mark.parametrize("img_size", [32, 36, 60])  # whole windows; padded; a map as small as its window
def test_it_is_timms_attention_with_its_gradients(img_size: int) -> None:
    supernet = Supernet(swin(img_size))
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


def test_the_cached_bias_follows_the_table() -> None:
    supernet = Supernet(swin(36))
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
    compact, x = compact.float(), x.float()
    with torch.no_grad():
        assert compact(x).dtype == torch.float32
