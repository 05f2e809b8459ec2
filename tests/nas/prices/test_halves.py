"""What free widths are expected to cost: against every architecture of a tiny space (section 2.9)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from nas.prices.costs import PricedSpace
from nas.prices.flops import Flops
from nas.prices.halves import Halves, PricedHalves
from nas.prices.price import Outside, Price
from nas.prices.relaxation import relaxed
from nas.prices.table import PRICES
from nas.searchers.choices import ChoiceLogits
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth
from tests.nas.free import architectures, free_costs, tiny_supernet
from tests.nas.small import small_supernet

over_tiny = pytest.mark.parametrize("family", ["vit", "swin"])


def logits_of(costs: PricedSpace, seed: int) -> ChoiceLogits:
    logits, generator = ChoiceLogits(costs.space).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for eta in logits.eta:
            eta.copy_(torch.randn(len(eta), generator=generator))
    return logits


@pytest.mark.parametrize("price", ["flops", "params", "steps", "latency"])
@over_tiny
def test_the_expected_price_is_that_of_every_architecture(
    family: str, price: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRICES, "steps", Steps())
    costs = PricedHalves.of(free_costs(tiny_supernet(family), price, granularity=8))
    logits = logits_of(costs, 0)
    probabilities = logits.probabilities()
    every = list(architectures(costs))
    joint = torch.ones(len(every), dtype=torch.float64)
    for (i, *_), name in logits.once():
        candidates = costs.space.candidates[i][name]
        joint = joint * probabilities[i][name][[candidates.index(picks[i][name]) for picks, _ in every]]
    assert float(joint.detach().sum()) == pytest.approx(1.0, rel=1e-12)
    total = joint @ torch.tensor([float(cost) for _, cost in every], dtype=torch.float64)
    expected = costs.expected(probabilities)
    assert float(expected.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    eta = list(logits.eta)
    found = torch.autograd.grad(expected, eta, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(total, eta), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * costs.full)
        assert a.abs().max() > 0


@pytest.mark.parametrize("price", ["flops", "params"])
@pytest.mark.parametrize("family", ["vit", "swin", "t2t"])
def test_a_half_costs_the_same_more_with_each_channel(family: str, price: str) -> None:
    halves = Halves(free_costs(small_supernet(family), price))
    for half in range(len(halves)):
        constant, per_channel = halves.affine(half)
        for width in halves.widths(halves.stage(half)):
            assert (constant + per_channel * width == halves.costs(half, width)).all()


class Steps(Flops):
    """A price in steps of its widths, whose outer part is no formula either."""

    name, affine = "steps", False

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        return super().block(shape, costs, replace(kept, stream=12 * -(-kept.stream // 12)))

    def outer(self, costs: NetworkCosts) -> Outside:
        return RoundedUp(costs.flops)

    def network(self, shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
        return Price.network(self, shapes, costs, subnet)


@dataclass(frozen=True)
class RoundedUp:
    """Stage widths count as the next multiple of 12."""

    per: PerWidth

    @property
    def constant(self) -> int:
        return self.per.constant

    @property
    def num_stages(self) -> int:
        return self.per.num_stages

    def of_stage(self, stage: int, width: int) -> int:
        return self.per.of_stage(stage, 12 * -(-width // 12))

    def of_merging(self, stage: int, width: int, after: int) -> int:
        return self.per.of_merging(stage, *(12 * -(-w // 12) for w in (width, after)))

    def at(self, widths: Sequence[int]) -> int:
        return self.per.at([12 * -(-w // 12) for w in widths])


@over_tiny
def test_a_channel_exists_where_the_stage_is_wider(family: str) -> None:
    costs = PricedHalves.of(free_costs(tiny_supernet(family), granularity=8))
    logits = logits_of(costs, 1)
    gates = costs.stage_gates(logits.probabilities())
    assert gates is not None
    for stage, gate in enumerate(gates):
        block = costs.blocks_of(stage)[0]
        p, widths = logits.probabilities()[block]["stream"].tolist(), costs.space.candidates[block]["stream"]
        by_hand = [sum(q for q, w in zip(p, widths, strict=True) if w > c) for c in range(len(gate))]
        assert gate.tolist() == pytest.approx(by_hand, abs=1e-6) and gate.requires_grad
    fixed = PricedHalves.of(free_costs(tiny_supernet(family), granularity=8, fixed=("stream",)))
    assert fixed.stage_gates(logits_of(fixed, 1).probabilities()) is None


def test_the_relaxation_bounds_the_best_choice_and_prices_the_limit() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        costs = [torch.randint(0, 20, (4,), generator=generator).numpy() for _ in range(3)]
        losses = [torch.rand(4, generator=generator, dtype=torch.float64).numpy() for _ in range(3)]
        limit = int(torch.randint(0, 50, (), generator=generator))
        every = [
            (costs[0][i] + costs[1][j] + costs[2][k], losses[0][i] + losses[1][j] + losses[2][k])
            for i in range(4)
            for j in range(4)
            for k in range(4)
        ]
        best = min((loss for cost, loss in every if cost <= limit), default=math.inf)
        found = relaxed(costs, losses, limit)
        assert (found is None) == (best == math.inf)
        if found is not None:
            assert found.loss <= best + 1e-9
            assert min(loss + found.price * (cost - limit) for cost, loss in every) == pytest.approx(found.loss)
            more = relaxed(costs, losses, limit + 1)
            assert more is not None and more.loss <= found.loss + 1e-9 and more.price <= found.price + 1e-9
