"""The norms outside the blocks, where channels of the stream exist in part."""

from typing import Any

import pytest
import torch
from timm.layers import RmsNorm
from torch import nn

from supernets.layers import norm

GATE = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def norms() -> dict[str, Any]:
    return {
        "layer norm": nn.LayerNorm(6),
        "without weight and bias": nn.LayerNorm(6, elementwise_affine=False),
        "RMS norm": RmsNorm(6),
        "none": nn.Identity(),
    }


@pytest.mark.parametrize("kind", norms())
def test_a_gated_norm_is_the_norm_of_what_exists(kind: str) -> None:
    torch.manual_seed(0)
    module = norms()[kind].double()
    params = {f"norm.{name}": torch.randn_like(p) for name, p in module.named_parameters()}
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    kept = GATE.bool()
    expected = torch.zeros_like(x)
    expected[..., kept] = norm(module, {name: p[kept] for name, p in params.items()}, "norm", x[..., kept])
    if kind == "none":
        expected = x
    torch.testing.assert_close(norm(module, params | {"norm.gate": GATE}, "norm", x), expected)
    ones = norm(module, params | {"norm.gate": torch.ones(6)}, "norm", x)
    torch.testing.assert_close(ones, norm(module, params, "norm", x))


@pytest.mark.parametrize("kind", ["layer norm", "RMS norm"])
def test_a_gated_norm_keeps_the_type(kind: str) -> None:
    module = norms()[kind]
    params = {f"norm.{name}": p for name, p in module.named_parameters()}
    x = torch.randn(2, 3, 6).bfloat16()
    half = {name: p.bfloat16() for name, p in params.items()}
    assert norm(module, half | {"norm.gate": GATE.float()}, "norm", x).dtype == torch.bfloat16


def test_a_half_there_channel_counts_half() -> None:
    x = torch.tensor([[3.0, -1.0, 7.0]])
    gate = torch.tensor([1.0, 0.5, 0.0])
    mean = (3.0 - 0.5) / 1.5
    var = ((3.0 - mean) ** 2 + 0.5 * (-1.0 - mean) ** 2) / 1.5
    expected = torch.tensor([[(3.0 - mean), 0.5 * (-1.0 - mean), 0.0]]) / (var + 1e-5) ** 0.5
    found = norm(nn.LayerNorm(3, elementwise_affine=False), {"norm.gate": gate}, "norm", x)
    torch.testing.assert_close(found, expected)
