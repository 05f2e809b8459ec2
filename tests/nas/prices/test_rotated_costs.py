"""Prices where streams are rotated (section 2.7): a stem's layer counts, and no result is above its budget."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nas.prices.costs import PricedSpace
from nas.prices.selection import check_budget, reachable_range, select
from nas.prices.table import PRICES
from nas.searchers.uniform import smallest_alpha
from search_spaces.an import AN
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.slices import NetworkSlice, network_slice
from search_spaces.space import make_space
from supernets.basis import install_stages
from supernets.compact import cut
from supernets.flops import whole_stages
from supernets.supernet import Supernet
from tests.nas.small import hard_draw, small_costs, small_supernet
from tests.strategies import images

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # those with a stem norm, and two without
    "swin": ("swin", {}),
    "vit, pre_norm": ("vit", {"pre_norm": True}),
    "vit": ("vit", {}),
    "t2t": ("t2t", {}),
}
over_networks = pytest.mark.parametrize("name", NETWORKS)
over_prices = pytest.mark.parametrize("price", ["flops", "params"])


def rotated(name: str, price: str = "flops") -> tuple[Supernet, PricedSpace]:
    """A small network all of whose streams are rotated, and DAN's space over it in stream width."""
    family, options = NETWORKS[name]
    supernet = small_supernet(family, basis="rotated", **options)
    return supernet, small_costs(supernet, "stream", price=PRICES[price])


def subnet_of(supernet: Supernet, costs: PricedSpace, picks: Sequence[int]) -> NetworkSlice:
    return network_slice(supernet.shapes, [options[k].slice for options, k in zip(costs.options, picks, strict=True)])


def exact(supernet: Supernet, costs: PricedSpace, subnet: NetworkSlice) -> int:
    """The supernet's own count, itself checked against torch (invariant 3)."""
    return {"flops": supernet.flops, "params": supernet.params}[costs.price.name](subnet)


@over_networks
@over_prices
def test_what_is_selected_never_costs_more_than_was_believed(name: str, price: str) -> None:
    """Every architecture; only one that leaves the first stage whole costs less, by the stem's layer."""
    supernet, costs = rotated(name, price)
    problem, shapes = costs.uniform(), supernet.shapes
    for picks in itertools.product(*(range(len(options)) for options in costs.options)):
        subnet = subnet_of(supernet, costs, picks)
        price_of = exact(supernet, costs, subnet)
        assert costs.price.network(shapes, costs.network, subnet) == price_of
        believed = problem.cost(picks)
        draw = hard_draw(costs, [costs.options[b][k].picks for b, k in enumerate(picks)])
        assert round(float(costs.expected(draw).detach())) == believed
        if 0 in whole_stages(shapes, subnet) and supernet.adapter.stem_norm is not None:
            assert believed > price_of
        else:
            assert believed == price_of
    assert costs.full == exact(supernet, costs, supernet.identity())
    own = small_supernet(*NETWORKS[name][:1], **NETWORKS[name][1])
    assert costs.full == exact(own, costs, own.identity())  # of the backbone as it is


@over_networks
@over_prices
def test_no_result_is_above_its_budget(name: str, price: str) -> None:
    supernet, costs = rotated(name, price)
    problem = costs.uniform()
    least = (1 + 1e-9) * reachable_range(problem)[0] / costs.full
    for step in range(12):
        budget = least + (1 - least) * step / 11
        selection = select(problem, costs.full, budget)
        subnet = subnet_of(supernet, costs, selection.picks)
        assert exact(supernet, costs, subnet) <= budget * costs.full


@over_networks
@over_prices
def test_a_budget_out_of_reach_is_told_of_a_range_up_to_the_backbone(name: str, price: str) -> None:
    """Its own price, though as a cut it would cost its stem's layer more; where it is no candidate, what there is."""
    supernet, costs = rotated(name, price)
    high = f"{costs.full / costs.price.scale:.4g} {costs.price.unit}"
    with pytest.raises(UserError, match=rf" to 1\.0000 of the backbone \(\S+ to {re.escape(high)}\)"):
        check_budget(costs.uniform(), costs.full, 1e-4, costs.price)
    narrower = small_costs(supernet, "stream", (2, 4), price=costs.price)
    most = reachable_range(narrower.uniform())[1]
    assert most < costs.full
    with pytest.raises(UserError, match=f" to {most / costs.full:.4f} of the backbone"):
        check_budget(narrower.uniform(), costs.full, 1e-4, costs.price)


@over_networks
def test_the_largest_uniform_factor_that_fits_is_priced_exactly(name: str) -> None:
    """At budget 1 the backbone itself, though as a cut it would cost its stem's layer more."""
    supernet, costs = rotated(name)
    space = make_space("small-an", AN(), Settings(width="stream"), supernet.shapes)
    an = PricedSpace(space, costs.network, costs.price, costs.options, costs.full, costs.full, False)
    assert smallest_alpha(an, 1.0) == 1
    half = network_slice(supernet.shapes, space.block_slices([{"alpha": 2}] * len(supernet.shapes)))
    share = exact(supernet, costs, half) / costs.full
    assert smallest_alpha(an, share) == 2
    assert smallest_alpha(an, share - 1e-9) > 2


@over_networks
def test_the_compact_network_has_that_price(name: str) -> None:
    supernet, costs = rotated(name)
    x = images(supernet.backbone)
    every = list(itertools.product(*(range(len(options)) for options in costs.options)))
    for picks in every[:: max(1, len(every) // 8)]:
        subnet = subnet_of(supernet, costs, picks)
        compact = cut(supernet.backbone, subnet)
        assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            compact.to("meta").requires_grad_(False)(x[:1].to("meta"))
        assert counter.get_total_flops() == 2 * supernet.flops(subnet)


@over_networks
def test_structure_alone_has_the_same_costs(name: str) -> None:
    """On the meta device, before any rotation is known."""
    family, options = NETWORKS[name]
    supernet, _ = rotated(name)
    bare = Supernet(small_supernet(family, **options).backbone.to("meta"))
    install_stages(bare, tuple(supernet.adapter.streams))
    assert bare.adapter.costs == supernet.adapter.costs
    assert all(q.is_meta for q in bare.adapter.streams.values())
