"""Prices of a search space: expected ones against every architecture enumerated, selected ones exactly."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from nas.prices.costs import PricedSpace, joint_probability
from nas.prices.table import PRICES
from search_spaces.slices import network_slice
from supernets.flops import block_flops
from supernets.supernet import Supernet
from tests.nas.small import hard_draw, small_costs, small_supernet, soft_draw, soft_etas

SPACES = {
    "vit": ("vit", {}),
    "t2t": ("t2t", {}),
    "swin-2": ("swin", {}),
    "swin-3": ("swin", dict(img_size=44, depths=(1, 2, 1), num_heads=(2, 4, 8), embed_dim=8, window_size=3)),
}
over_spaces = pytest.mark.parametrize("name", SPACES)
over_widths = pytest.mark.parametrize(
    ("width", "full"), [("stream", False), ("stream", True), ("inner", False)], ids=["stream", "stream-full", "inner"]
)


over_prices = pytest.mark.parametrize("price", ["flops", "params"])


def priced(name: str, width: str, full: bool, price: str = "flops") -> tuple[Supernet, PricedSpace]:
    family, kwargs = SPACES[name]
    supernet = small_supernet(family, **kwargs)
    return supernet, small_costs(supernet, width, full_stage_width=full, price=PRICES[price])


def architectures(costs: PricedSpace) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(options)) for options in costs.options))


def exact(supernet: Supernet, costs: PricedSpace, picks: Sequence[int]) -> int:
    """The price by the supernet's own count of the subnet, itself checked against torch (invariant 3)."""
    blocks = [options[k].slice for options, k in zip(costs.options, picks, strict=True)]
    subnet = network_slice(supernet.shapes, blocks, costs.full_stage_width)
    return {"flops": supernet.flops, "params": supernet.params}[costs.price.name](subnet)


def enumerated(supernet: Supernet, costs: PricedSpace, draw: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """sum over architectures of P(architecture) * F(architecture)."""
    return torch.stack(
        [
            math.prod((block["alpha"][k] for block, k in zip(draw, picks, strict=True)), start=torch.tensor(1.0))
            * float(exact(supernet, costs, picks))
            for picks in architectures(costs)
        ]
    ).sum()


@over_prices
@over_spaces
@over_widths
def test_the_expected_price_is_that_of_every_architecture(name: str, width: str, full: bool, price: str) -> None:
    supernet, costs = priced(name, width, full, price)
    assert 8 <= costs.space.size() <= 400
    for seed in range(2):
        etas = soft_etas(costs, seed)
        expected = costs.expected(soft_draw(etas))
        by_hand = enumerated(supernet, costs, soft_draw(etas))
        assert float(expected.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-12)
        for a, b in zip(torch.autograd.grad(expected, etas), torch.autograd.grad(by_hand, etas), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * costs.full)
            assert a.abs().max() > 0


@over_spaces
def test_a_channel_exists_where_a_pick_of_its_stage_is_wider(name: str) -> None:
    supernet, costs = priced(name, "stream", False)
    draw = soft_draw(soft_etas(costs, 3))
    by_hand = [torch.zeros(width) for width in supernet.identity().stage_widths]
    for picks in architectures(costs):
        p = math.prod(float(block["alpha"][k]) for block, k in zip(draw, picks, strict=True))
        blocks = [options[k].slice for options, k in zip(costs.options, picks, strict=True)]
        for exists, width in zip(by_hand, network_slice(supernet.shapes, blocks).stage_widths, strict=True):
            exists[:width] += p
    gates = costs.stage_gates(draw)
    assert gates is not None and all(gate.requires_grad for gate in gates)
    for gate, exists in zip(gates, by_hand, strict=True):
        torch.testing.assert_close(gate.detach(), exists, rtol=1e-4, atol=1e-6)
    assert any(0.01 < float(gate[-1]) < 0.99 for gate in gates)


@over_spaces
@over_widths
def test_gradient_of_expected_flops_is_the_finite_difference(name: str, width: str, full: bool) -> None:
    _, costs = priced(name, width, full)

    def fraction(*etas: Tensor) -> Tensor:
        return costs.expected(soft_draw(etas)) / costs.full

    assert torch.autograd.gradcheck(fraction, soft_etas(costs, 5), eps=1e-5, atol=1e-9, rtol=1e-6)


@over_prices
@over_spaces
@over_widths
def test_the_selection_problem_counts_as_the_supernet_does(name: str, width: str, full: bool, price: str) -> None:
    supernet, costs = priced(name, width, full, price)
    problem = costs.problem(soft_draw(soft_etas(costs, 1)))
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        picks = [int(torch.randint(len(o), (), generator=generator)) for o in costs.options]
        assert problem.cost(picks) == exact(supernet, costs, picks)
    assert problem.cost([0] * len(costs.options)) == costs.full  # alpha 1 everywhere


@over_spaces
def test_scores_of_the_selection_problem_are_log_probabilities(name: str) -> None:
    _, costs = priced(name, "stream", False)
    etas = soft_etas(costs, 1)
    for block, eta in zip(costs.problem(soft_draw(etas)).blocks, etas, strict=True):
        assert [c.score for c in block] == pytest.approx(eta.log_softmax(0).tolist(), rel=1e-12)
    never = [{"alpha": torch.nn.functional.one_hot(torch.tensor(0), len(o)).double()} for o in costs.options]
    assert all(math.isfinite(c.score) for block in costs.problem(never).blocks for c in block)


@over_spaces
@over_widths
def test_penalty_of_one_hot_weights_is_the_sum_of_the_blocks(name: str, width: str, full: bool) -> None:
    supernet, costs = priced(name, width, full)
    picks = costs.space.random(3)
    slices = costs.space.block_slices(picks)
    blocks = zip(supernet.shapes, supernet.adapter.costs.blocks, slices, strict=True)
    assert float(costs.blocks_cost(hard_draw(costs, picks)).detach()) == sum(block_flops(*block) for block in blocks)


def test_options_of_a_block_with_two_choices_are_their_product_in_order() -> None:
    p, q = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.3, 0.2])
    joint = joint_probability({"a": p, "b": q}, {"a": (1, 2), "b": (1, 2, 3)})
    assert joint.tolist() == pytest.approx([a * b for a in p.tolist() for b in q.tolist()])
