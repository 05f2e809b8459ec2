"""Architectures of every price: exact prices, never above the one that was drawn, all of them, the same for a step."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.random import RandomState

from nas.prices.costs import PricedSpace, priced
from nas.prices.flops import FLOPS
from nas.searchers.anywhere import Anywhere
from search_spaces.method import Settings
from search_spaces.registry import METHODS
from search_spaces.space import make_space
from supernets.supernet import Supernet
from tests.nas.free import free_costs, tiny_supernet
from tests.nas.searchers.test_repair import all_of, network_of
from tests.nas.small import small_supernet

SPACES = [f"{family}, {method}" for method in ("dan", "kcr", "joint", "free") for family in ("vit", "swin")]
FRACTIONS = (1.0, 0.75, 0.5, 0.25)


def costs_of(method: str, family: str) -> tuple[Supernet, PricedSpace]:
    if method == "free":
        supernet = tiny_supernet(family)
        return supernet, free_costs(supernet, granularity=8)
    supernet = small_supernet(family)
    space = make_space(f"{family}-{method}", METHODS[method], Settings("stream", None, FRACTIONS), supernet.shapes)
    return supernet, priced(space, supernet.adapter.costs, FLOPS)


def space_of(words: str, seed: int = 0) -> tuple[Supernet, Anywhere]:
    """A supernet and the draws over its space: "vit, dan"."""
    family, method = words.split(", ")
    supernet, costs = costs_of(method, family)
    return supernet, Anywhere(costs, seed)


@pytest.fixture(params=SPACES)
def anywhere(request: pytest.FixtureRequest) -> Anywhere:
    return space_of(request.param)[1]


class Remembered(RandomState):
    """Keeps what it has drawn uniformly."""

    drawn: list[float]

    def uniform(self, *args: Any) -> Any:
        self.drawn = [*getattr(self, "drawn", []), super().uniform(*args)]
        return self.drawn[-1]


def test_the_smallest_is_the_cheapest_of_all(anywhere: Anywhere) -> None:
    prices = [price for _, price in all_of(anywhere.priced)]
    assert anywhere.price(anywhere.smallest()) == anywhere.range[0] == min(prices)
    assert anywhere.range[1] == max(prices)


def test_no_draw_costs_more_than_the_price_that_was_drawn_and_none_of_its_line_is_nearer(anywhere: Anywhere) -> None:
    known = {str(network_of(anywhere.priced, picks)) for picks, _ in all_of(anywhere.priced)}
    for seed in range(40):
        random = Remembered(seed)
        subnet = anywhere.one(random)
        assert anywhere.price(subnet) <= random.drawn[0]
        blocks = [s if s.attn else replace(s, heads=0, qk=None, v_channels=None) for s in subnet.blocks]
        assert str(blocks) in known


def test_draws_are_of_all_prices_and_of_all_candidates(anywhere: Anywhere) -> None:
    low, high = anywhere.range
    random = RandomState(0)
    subnets = [anywhere.one(random) for _ in range(300)]
    shares = np.array([(anywhere.price(subnet) - low) / (high - low) for subnet in subnets])
    assert (shares < 0.3).mean() > 0.1 and (shares > 0.7).mean() > 0.1
    for i in range(len(anywhere.priced.space.shapes)):
        assert len(Counter(str(subnet.blocks[i]) for subnet in subnets)) > 1
    for label, options in anywhere.candidates.items():
        assert len(options) == len(anywhere.choices[label].values)


def test_8_seed_and_step_alone_decide(anywhere: Anywhere) -> None:
    first = [anywhere.drawn(number, 2) for number in range(6)]
    again = Anywhere(anywhere.priced, 0)
    assert [again.drawn(number, 2) for number in reversed(range(6))] == first[::-1]
    assert len({str(subnet) for pair in first for subnet in pair}) > 3
    assert [Anywhere(anywhere.priced, 1).drawn(number, 2) for number in range(6)] != first
    assert again.drawn(0, 4)[:2] == first[0]
