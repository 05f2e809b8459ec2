"""Invariants 0 to 4 of the design over every family and width, on networks and subnets drawn at random."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.slices import NetworkSlice
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.oracle import oracle_logits
from tests.strategies import (
    BACKBONES,
    block_shapes,
    general_slices,
    images,
    prefix_slices,
)

over_families = pytest.mark.parametrize("family", BACKBONES)
over_widths = pytest.mark.parametrize("kind", ["stream", "inner", "general"])
few = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def draw_subnet(data: st.DataObject, backbone: nn.Module, kind: str) -> NetworkSlice:
    shapes = block_shapes(backbone)
    subnet: NetworkSlice = data.draw(general_slices(shapes) if kind == "general" else prefix_slices(shapes, kind))
    return subnet


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max())


@over_families
@given(data=st.data())
@few
def test_1_identity_is_the_backbone_to_the_bit(family: str, data: st.DataObject) -> None:
    backbone = data.draw(BACKBONES[family]())
    supernet = Supernet(backbone).eval()
    x = images(backbone)
    large, small = supernet(x)
    assert torch.equal(large, small)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
@given(data=st.data())
@few
def test_1_fused_window_attention_is_timms_own(family: str, data: st.DataObject) -> None:
    backbone = data.draw(BACKBONES[family]())
    x = images(backbone)
    ours = Supernet(copy.deepcopy(backbone)).eval().large(x)
    assert relative(backbone(x), ours) < 1e-5


@over_families
@over_widths
@given(data=st.data())
@few
def test_0_and_2_subnet_is_the_oracle_and_compact_is_the_subnet(family: str, kind: str, data: st.DataObject) -> None:
    backbone = data.draw(BACKBONES[family]())
    subnet = draw_subnet(data, backbone, kind)
    x = images(backbone)
    supernet = Supernet(copy.deepcopy(backbone)).eval()
    logits = supernet.small(x, subnet)
    assert relative(logits, cut(supernet.backbone, subnet).eval()(x)) <= 1e-5
    double = Supernet(copy.deepcopy(backbone).double()).eval()
    expected = oracle_logits(backbone.double(), subnet, x.double())
    assert relative(expected, double.small(x.double(), subnet)) < 1e-9


@over_families
@over_widths
@given(data=st.data())
@few
def test_3_flops_and_parameters_are_exact(family: str, kind: str, data: st.DataObject) -> None:
    backbone = data.draw(BACKBONES[family]())
    supernet = Supernet(backbone)
    subnet = draw_subnet(data, backbone, kind)
    compact = cut(backbone, subnet).eval()
    assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compact.to("meta").requires_grad_(False)(images(backbone, batch=1).to("meta"))
    assert counter.get_total_flops() == 2 * supernet.flops(subnet)


@over_families
@given(data=st.data())
@few
def test_6_large_and_small_share_their_parameters(family: str, data: st.DataObject) -> None:
    backbone = data.draw(BACKBONES[family]())
    supernet = Supernet(backbone)
    assert {id(p) for p in supernet.parameters()} == {id(p) for p in backbone.parameters()}
    subnet = draw_subnet(data, backbone, "stream")
    x = images(backbone)
    supernet.eval()
    with torch.no_grad():
        before = supernet(x, subnet)
        supernet.small(x, subnet)
    optimizer = torch.optim.SGD([p for p in supernet.parameters() if p.requires_grad], lr=0.1)
    supernet.small(x, subnet).square().sum().backward()  # the gradient comes through the small network alone
    optimizer.step()
    after = supernet(x, subnet)
    assert not torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@over_families
@over_widths
@given(data=st.data())
@few
def test_compact_keeps_the_backbones_names(family: str, kind: str, data: st.DataObject) -> None:
    backbone = data.draw(BACKBONES[family]())
    subnet = draw_subnet(data, backbone, kind)
    compact = cut(backbone, subnet)
    assert set(compact.state_dict()) <= set(backbone.state_dict())
    assert not any(p.data_ptr() == q.data_ptr() for p in compact.parameters() for q in backbone.parameters())
