"""Tokens of the original network in the channels that a small one keeps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from nas.objectives.features import Features, relative_error
from nas.objectives.teacher import Teacher
from nas.objectives.tokens import Tokens, kept_channels
from nas.training.objective import Step
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice, network_slice, prefix_slice
from supernets.basis import Basis, rewrite
from supernets.importance import magnitude_scores, orders_of, permute
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet
from tests.oracle import randomise
from tests.strategies import random_basis

STEP = Step(0.0, 0, 1)


def frozen(network: Any) -> Teacher:
    one, none = torch.ones(1, 1, 1).double(), torch.zeros(1, 1, 1).double()
    return Teacher("original", copy.deepcopy(network), 0, 0, one, none)


def pair(family: str, kind: str, num_classes: int) -> tuple[Supernet, Teacher, Tensor]:
    """A supernet in a basis, sorted or as it is, and the network as it was."""
    supernet = Supernet(randomise(FAMILIES[family](num_classes=num_classes), 0)).double().eval()
    teacher = frozen(supernet.backbone)
    if kind == "rotated":
        rewrite(supernet, random_basis(supernet, 1))
    elif kind == "ordered":
        rewrite(supernet, Basis(orders=orders_of(magnitude_scores(supernet))))
    elif kind == "sorted":
        supernet.sorted = orders_of(magnitude_scores(supernet))
        permute(supernet, supernet.sorted)
    x = torch.randn(3, *supernet.adapter.input_size, generator=torch.Generator().manual_seed(0)).double()
    return supernet, teacher, x


def subnet_of(supernet: Supernet, alpha: int = 2) -> NetworkSlice:
    return network_slice(supernet.shapes, [prefix_slice(shape, alpha, "stream") for shape in supernet.shapes])


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("kind", ["own", "rotated", "ordered", "sorted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_network_lacks_nothing(family: str, kind: str, num_classes: int) -> None:
    """In every basis the tokens of the network itself are those of the original, in the kept channels."""
    if kind == "sorted" and not num_classes:
        pytest.skip("without a classifier an order is part of a basis")
    supernet, teacher, x = pair(family, kind, num_classes)
    blocks = range(len(supernet.shapes))
    objective = Features(supernet, supernet.identity(), teacher, blocks=tuple(blocks)).eval()
    terms = objective(x, torch.zeros(3), STEP)
    assert set(terms) == {"tokens", "distill" if num_classes else "features"}
    assert all(float(term) == pytest.approx(0, abs=1e-9) for term in terms.values())
    assert set(objective.state_dict()) == {f"supernet.{name}" for name in supernet.state_dict()}  # no teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_are_those_of_the_kept_channels(family: str) -> None:
    """Beside the rotated large network's own stream: the supernet's after the same block."""
    supernet, teacher, x = pair(family, "rotated", 0)
    subnet, last = subnet_of(supernet), len(supernet.shapes) - 1
    tokens = Tokens(supernet, subnet, teacher, (0,))
    tokens.expected(x)
    _, small = supernet.small_with_streams(x, subnet, tokens.after)
    _, large = supernet.small_with_streams(x, supernet.identity(), tokens.after)
    terms = []
    for block in (0, last):
        w = small[block].shape[-1]
        assert w == subnet.stage_widths[supernet.shapes[block].stage]
        first = 1 if supernet.shapes[block].stage in supernet.adapter.streams else 0  # of a rotated one, it is the mean
        target = large[block][..., first:w]
        lacking = small[block][..., first:w] - target
        terms.append((lacking.square().sum(-1) / target.square().sum(-1)).mean())
    found = tokens.error(supernet, small)
    assert float(found) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_weights_of_the_small_network_alone_are_trained() -> None:
    supernet, teacher, x = pair("vit", "rotated", 0)
    before = {n: p.clone() for n, p in teacher.network.named_parameters()}
    objective = Features(supernet, subnet_of(supernet), teacher, weight=0.5)
    sum(objective(x, torch.zeros(3), STEP).values()).backward()  # type: ignore[union-attr]
    head: Any = supernet.backbone.head
    assert float(head.weight.grad[:, : subnet_of(supernet).stage_widths[0]].abs().sum()) > 0
    assert float(head.weight.grad[:, subnet_of(supernet).stage_widths[0] :].abs().sum()) == 0
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in teacher.network.named_parameters())


def test_held_out_error_is_the_loss_itself() -> None:
    supernet, teacher, x = pair("vit", "rotated", 0)
    objective = Features(supernet, subnet_of(supernet), teacher).eval()
    whole = sum(float(v) for v in objective(x, torch.zeros(3), STEP).values())
    found = objective.held_out([(x[:2], torch.zeros(2)), (x[2:], torch.zeros(1))])
    assert found["subnet_error"] == pytest.approx(whole, rel=1e-5)


def test_dropped_patches_are_refused() -> None:
    supernet = small_supernet("vit", patch_drop_rate=0.5)
    with pytest.raises(UserError, match="patch_drop_rate"):
        Tokens(supernet, subnet_of(supernet), frozen(supernet.backbone))


def test_relative_error() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert float(relative_error(a, a + torch.tensor([0.0, 1.0]))) == pytest.approx((1 / 25 + 1 / 4) / 2)


def test_a_stream_of_one_channel_keeps_it() -> None:
    supernet, _, _ = pair("vit", "rotated", 0)
    assert kept_channels(supernet, 0, 1).of_large(torch.ones(2, 24).double()).shape == (2, 1)
