"""Draws repaired to the budget: the nearest architecture in the band, the same for the same seed, never above."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from nas.prices.costs import PricedSpace
from nas.prices.selection import cost_band
from nas.searchers.measure import key_of, subnet_of
from nas.searchers.repair import FARTHEST, Repair
from search_spaces.method import Picks
from search_spaces.slices import BlockSlice
from tests.nas.free import architectures, free_costs, tiny_supernet
from tests.nas.small import small_costs, small_supernet

BUDGETS = (0.35, 0.5, 0.8)


def factors(family: str) -> PricedSpace:
    return small_costs(small_supernet(family), "stream")


def free(family: str) -> PricedSpace:
    return free_costs(tiny_supernet(family), granularity=8)


SPACES = {f"{family}, {make.__name__}": (make, family) for family in ("vit", "swin") for make in (factors, free)}


@pytest.fixture(params=SPACES)
def priced(request: pytest.FixtureRequest) -> PricedSpace:
    make, family = SPACES[request.param]
    return make(family)


def all_of(priced: PricedSpace) -> Iterator[tuple[list[Picks], int]]:
    """Every architecture and its exact price."""
    if priced.space.method.halves:
        yield from architectures(priced)
        return
    for taken in itertools.product(*priced.options):
        picks = [option.picks for option in taken]
        yield picks, priced.network_cost(subnet_of(priced, picks))


def network_of(priced: PricedSpace, picks: list[Picks]) -> list[BlockSlice]:
    """Every block's slice; what an attention that is skipped would keep is of no account."""
    return [s if s.attn else replace(s, heads=0, qk=None, v_channels=None) for s in subnet_of(priced, picks).blocks]


def at_the_edge(priced: PricedSpace) -> float:
    """A budget that some architecture uses up to the last unit."""
    prices = sorted(price for _, price in all_of(priced))
    return prices[int(0.7 * len(prices))] / priced.full


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_10_no_draw_ends_above_its_budget(budget: float, priced: PricedSpace) -> None:
    low, high = cost_band(priced.full, budget)
    reached = any(low <= price <= high for _, price in all_of(priced))
    repair, found = Repair(priced, budget, seed=0), set()
    for _ in range(20):
        picks = repair.near(repair.draw())
        priced.space.validated(picks)
        price = priced.network_cost(subnet_of(priced, picks))
        assert price <= high and (price >= low) == reached
        found.add(key_of(picks))
    assert len(found) > 1 or sum(low <= price <= high for _, price in all_of(priced)) == 1


@pytest.mark.slow
def test_8_the_same_seed_draws_the_same(priced: PricedSpace) -> None:
    def drawn(seed: int, budget: float) -> list[str]:
        repair = Repair(priced, budget, seed)
        return [key_of(repair.near(repair.draw())) for _ in range(6)]

    assert drawn(1, 0.5) == drawn(1, 0.5)
    assert drawn(1, 0.5) != drawn(2, 0.5)


def test_an_architecture_in_the_band_stays_as_it_is(priced: PricedSpace) -> None:
    budget = at_the_edge(priced)
    low, high = cost_band(priced.full, budget)
    inside = [picks for picks, price in all_of(priced) if low <= price <= high]
    repair = Repair(priced, budget, seed=0)
    for picks in inside[:: max(1, len(inside) // 8)]:
        near = repair.near(repair.sample_of(picks))
        assert network_of(priced, near) == network_of(priced, picks)


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_no_architecture_in_the_band_is_nearer(family: str) -> None:
    """Against all of them, at the weights of the distances that the draw had."""
    priced = factors(family)
    low, high = cost_band(priced.full, 0.5)
    every = list(all_of(priced))
    inside = [picks for picks, price in every if low <= price <= high] or [p for p, price in every if price <= high]
    assert len(inside) > 2
    repair, weights = Repair(priced, 0.5, seed=3), np.random.RandomState()
    for _ in range(10):
        sample = repair.draw()
        weights.set_state(repair.random.get_state())
        weight = {label: FARTHEST * weights.uniform(0.5, 1.5) for label in repair.choices}

        def distance(picks: list[Picks], sample: dict[str, float] = sample, weight: dict[str, float] = weight) -> float:
            total = 0.0
            for label, own in repair.sample_of(picks).items():
                values = list(repair.choices[label].values)
                places = abs(values.index(own) - values.index(sample[label]))
                total += weight[label] * places / max(len(values) - 1, 1)
            return total

        assert distance(repair.near(sample)) == pytest.approx(min(map(distance, inside)), abs=1e-5)


@pytest.mark.slow
def test_nothing_new_is_made_where_all_is_known(priced: PricedSpace) -> None:
    repair = Repair(priced, 0.5, seed=0)
    sample = repair.draw()
    known = {key_of(repair.near(sample)) for _ in range(40)}
    assert repair.new(lambda: sample, known) is None or len(known) > 1
