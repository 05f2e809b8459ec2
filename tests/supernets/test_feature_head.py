"""Networks without classifier, of every family: the invariants, with features in the place of logits."""

import copy
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice, network_slice, prefix_slice
from supernets.basis import rewrite, timm_state
from supernets.calibration import Metric, Wanted, calibrate, drawn_directions
from supernets.compact import cut
from supernets.feature_head import FeatureHead, feature_head
from supernets.refit import refit, written
from supernets.streams import fixed_streams
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet
from tests.oracle import randomise
from tests.strategies import images, random_basis


def network(family: str, **options: Any) -> nn.Module:
    return randomise(FAMILIES[family](num_classes=0, **options), 0).double().eval()


def half(supernet: Supernet, width: str = "stream") -> NetworkSlice:
    return network_slice(supernet.shapes, [prefix_slice(shape, 2, width) for shape in supernet.shapes])


def macs(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).to("meta").requires_grad_(False)(x[:1].to("meta"))
    return counter.get_total_flops() // 2


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max() / b.detach().abs().max()) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_large_network_is_timms_own(family: str) -> None:
    own = network(family)
    x = images(own).double()
    expected, supernet = own(x), Supernet(copy.deepcopy(own)).eval()
    large, identity = supernet(x)
    assert torch.equal(large, identity) and close(large, expected, 1e-14)
    assert expected.shape == (len(x), supernet.shapes[-1].embed_dim)
    assert supernet.params() == sum(p.numel() for p in own.parameters()) and supernet.flops() == macs(own, x)
    assert timm_state(supernet).keys() == own.state_dict().keys()


@pytest.mark.parametrize("family", ["vit", "eva"])
def test_with_attention_pooling_features_are_as_many_too(family: str) -> None:
    own = network(family, global_pool="map").requires_grad_(False)  # torch's counter trips over timm's expanded query
    x, supernet = images(own).double(), Supernet(copy.deepcopy(own)).eval()
    assert close(supernet.large(x), own(x), 1e-14)
    assert supernet.params() == sum(p.numel() for p in own.parameters()) and supernet.flops() == macs(own, x)
    rewrite(supernet, random_basis(supernet, 0))
    again = network(family, global_pool="map")
    again.load_state_dict(timm_state(supernet))
    assert close(again(x), own(x))
    subnet = half(supernet)
    compact = cut(supernet.backbone, subnet).eval()
    assert close(compact(x), supernet.small(x, subnet)) and compact(x).shape == own(x).shape
    assert supernet.params(subnet) == sum(p.numel() for p in compact.parameters())
    assert supernet.flops(subnet) == macs(compact, x)


@pytest.mark.parametrize("width", ["stream", "inner"])
@pytest.mark.parametrize("basis", ["own", "rotated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compact_network_gives_as_many_features(family: str, basis: str, width: str) -> None:
    supernet = small_supernet(family, basis=basis, num_classes=0)
    subnet, x = half(supernet, width), images(supernet.backbone).double()
    compact = cut(supernet.backbone, subnet).eval()
    small = supernet.small(x, subnet)
    assert close(compact(x), small, 1e-9) and small.shape == supernet.large(x).shape
    found = feature_head(compact)
    assert found is not None and not found[1].added and found[1].in_features == subnet.stage_widths[-1]
    assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
    assert macs(compact, x) == supernet.flops(subnet)
    again = Supernet(copy.deepcopy(compact))  # another round: the layer is the network's own by now
    assert (again.params(), again.flops()) == (supernet.params(subnet), supernet.flops(subnet))
    assert set(timm_state(again)) == set(compact.state_dict())


@pytest.mark.parametrize("ordered", [False, True], ids=["rotated", "ordered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_basis_is_taken_back_and_put_in_again(family: str, ordered: bool) -> None:
    own = network(family)
    x = images(own).double()
    supernet = Supernet(copy.deepcopy(own)).eval()
    basis = random_basis(supernet, 3)
    if ordered:
        orders = {f"stream.{s.stage}": torch.randperm(s.embed_dim).tolist() for s in supernet.shapes}
        basis = type(basis)(orders=orders)
    rewrite(supernet, basis)
    assert close(supernet.large(x), own(x))
    back = network(family)
    back.load_state_dict(timm_state(supernet))
    assert close(back(x), own(x))
    twice = Supernet(back).eval()
    rewrite(twice, basis, again=True)
    assert close(twice.small(x, half(twice)), supernet.small(x, half(supernet)))


def test_a_trained_layer_is_not_lost_in_silence() -> None:
    supernet = small_supernet("vit", num_classes=0)
    with torch.no_grad():
        supernet.backbone.head.weight[0, 1] = 1.0  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="head was trained"):
        timm_state(supernet)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_refit_brings_the_features_nearer(family: str) -> None:
    supernet = small_supernet(family, basis="rotated", num_classes=0)
    size = supernet.adapter.input_size
    x = torch.randn(64, *size, generator=torch.Generator().manual_seed(0)).double()
    subnet, expected = half(supernet), supernet.large(x)
    before = (supernet.small(x, subnet) - expected).detach().square().sum()
    values = refit(supernet, subnet, x.split(16))
    assert any(isinstance(supernet.backbone.get_submodule(n.rpartition(".")[0]), FeatureHead) for n in values)
    with written(supernet, subnet, values):
        after = (supernet.small(x, subnet) - expected).detach().square().sum()
    assert float(after) < 0.7 * float(before)


def test_the_metric_is_that_of_the_features_error() -> None:
    """E[<J d, e>^2] = |J d|^2: to second order, half the squared error that a change d of what a half adds makes."""
    supernet = small_supernet("vit", num_classes=0)
    metric, x = Metric(supernet, 0), images(supernet.backbone).double()[:1]
    for _ in range(400):
        metric.large(x)
    name = supernet.adapter.block_names[-1]
    block: Any = supernet.backbone.get_submodule(name)
    shift = 1e-4 * torch.randn(supernet.shapes[-1].embed_dim, generator=torch.Generator().manual_seed(1)).double()
    added: list[float] = []
    tokens = supernet.large(x).new_zeros(supernet.adapter.costs.blocks[-1].mlp_tokens)
    for token in range(len(tokens)):  # each by itself, as the metric has them

        def hook(_: Any, __: Any, y: Tensor, token: int = token) -> Tensor:
            y = y.clone()
            y[:, token] += shift
            return y

        handle = block.drop_path2.register_forward_hook(hook)
        moved = supernet.large(x)
        handle.remove()
        added.append(float((moved - supernet.large(x)).square().sum().detach()) / 2)
    root = metric.root(name, 1)
    assert float((root @ shift).square().sum()) == pytest.approx(sum(added) / 1, rel=0.25)


def test_directions_are_drawn_by_their_seed() -> None:
    f = torch.zeros(3, 5)
    first, second = (drawn_directions(f, torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(first, second) and not torch.equal(first, drawn_directions(f, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_basis_is_found_without_labels(family: str) -> None:
    supernet = small_supernet(family, num_classes=0)
    size = supernet.adapter.input_size
    x = torch.randn(48, *size, generator=torch.Generator().manual_seed(0)).double()
    stages = frozenset(shape.stage for shape in supernet.shapes) - fixed_streams(supernet.adapter).keys()
    expected = supernet.large(x[:4])
    basis = calibrate(supernet, x.split(16), Wanted(stages, inside=True, error_order=True, gradient_images=32))
    assert basis.lost and all(bool((lost >= 0).all()) for lost in basis.lost.values())
    rewrite(supernet, basis)
    assert close(supernet.large(x[:4]), expected, 1e-9)


def test_two_heads_without_classifiers_are_refused() -> None:
    with pytest.raises(UserError, match="two heads without classifiers"):
        Supernet(VisionTransformerDistilled(img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=0))
