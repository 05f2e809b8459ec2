"""Every way to take a half, and that halves add up to the network's price (section 2.9)."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest

from nas.prices.halves import Halves
from search_spaces.slices import NetworkSlice, identity_slice, network_slice
from supernets.flops import whole_stages
from supernets.supernet import Supernet
from tests.nas.free import free_costs
from tests.nas.small import FAMILIES, MIXED, small_supernet

over_families = pytest.mark.parametrize("family", FAMILIES)
over_prices = pytest.mark.parametrize("price", ["flops", "params"])
SETTINGS: dict[str, dict[str, Any]] = {
    "finest": dict(granularity=1),
    "coarse": dict(granularity=8),
    "some of it left alone": dict(granularity=2, keep_blocks=(0,), fixed=("heads", "v")),
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit", {}),
    "vit, norms and no bias": ("vit", dict(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, qkv_bias=False)),
    "swin": ("swin", {}),
    "swin, three stages": ("swin", dict(img_size=44, depths=(1, 2, 1), num_heads=(2, 4, 8), embed_dim=8)),
    "t2t": ("t2t", {}),
    "eva": ("eva", {}),
    "eva, mixed": ("eva", MIXED),
    "cait": ("cait", {}),
    "beit": ("beit", dict(scale_mlp=True)),
    "relpos": ("relpos", {}),
    "relpos, one network": ("relpos", dict(shared_rel_pos=True)),
    "eva, fused, norms inside": ("eva", dict(qkv_fused=True, scale_mlp=True, scale_attn_inner=True, qk_norm=True)),
}


def counted(supernet: Supernet, price: str, subnet: NetworkSlice) -> int:
    """The supernet's own count, itself checked against torch (invariant 3)."""
    return {"flops": supernet.flops, "params": supernet.params}[price](subnet)


def some(halves: Halves, seed: int) -> tuple[tuple[int, ...], list[int]]:
    """Stage widths and an option of every half, drawn; in one of three, halves are likely to be removed."""
    draw = random.Random(seed)
    stages = 1 + halves.space.shapes[-1].stage
    widths = tuple(draw.choice(halves.widths(stage)) for stage in range(stages))
    options = []
    for half in range(len(halves)):
        removed = [k for k, o in enumerate(halves.options(half)) if not o.slice.attn and not o.slice.mlp]
        gone = seed % 3 == 0 and removed and draw.random() < 0.5
        options.append(removed[0] if gone else draw.randrange(len(halves.options(half))))
    return widths, options


@pytest.mark.parametrize("network", NETWORKS)
@over_prices
@pytest.mark.parametrize("settings", SETTINGS)
def test_halves_and_what_lies_outside_them_are_the_network_exactly(network: str, price: str, settings: str) -> None:
    family, options = NETWORKS[network]
    supernet = small_supernet(family, **options)
    priced = free_costs(supernet, price, **SETTINGS[settings])
    halves, space = Halves(priced), priced.space
    assert len(halves) == 2 * len(supernet.shapes)
    for seed in range(12):
        widths, chosen = some(halves, seed)
        picks = space.validated(halves.picks(widths, chosen))
        subnet = network_slice(supernet.shapes, space.block_slices(picks))
        assert subnet.stage_widths == widths
        total = halves.outer(widths) + sum(
            int(halves.costs(half, widths[halves.stage(half)])[option]) for half, option in enumerate(chosen)
        )
        assert total == priced.price.network(space.shapes, priced.network, subnet) == counted(supernet, price, subnet)
        one = halves.problem(widths, [[option] for option in chosen], [[0.0] * (o + 1) for o in chosen])
        assert one.cost([0] * len(halves)) == total


@over_families
@over_prices
def test_in_a_rotated_basis_too_unless_the_first_stage_turns_out_whole(family: str, price: str) -> None:
    supernet = small_supernet(family, basis="rotated")
    priced = free_costs(supernet, price)
    halves, space = Halves(priced), priced.space
    stem = supernet.adapter.stem_norm is not None
    seen = set()
    for seed in range(12):
        widths, chosen = some(halves, seed)
        widths = (halves.widths(0)[-1], *widths[1:]) if seed % 4 == 0 else widths
        subnet = network_slice(supernet.shapes, space.block_slices(halves.picks(widths, chosen)))
        total = halves.outer(widths) + sum(
            int(halves.costs(half, widths[halves.stage(half)])[option]) for half, option in enumerate(chosen)
        )
        whole = stem and 0 in whole_stages(supernet.shapes, subnet)
        seen.add(whole)
        assert (total > counted(supernet, price, subnet)) == whole and total >= counted(supernet, price, subnet)
    assert seen == {True, False} or not stem


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_options_of_a_half_are_all_its_slices_each_once_and_the_whole_first(network: str, settings: str) -> None:
    family, options = NETWORKS[network]
    halves = Halves(free_costs(small_supernet(family, **options), **SETTINGS[settings]))
    space, method = halves.space, halves.space.method
    for half in range(len(halves)):
        shape, attention = space.shapes[half // 2], half % 2 == 0
        own = [option.slice for option in halves.options(half)]
        assert len(set(own)) == len(own)
        assert own[0] == replace(identity_slice(shape), **{"mlp" if attention else "attn": False})
        assert all(kept.stream == shape.embed_dim for kept in own)
        assert all(not (kept.mlp if attention else kept.attn) for kept in own)
        names = method.halves[half % 2]
        for option in halves.options(half):  # its picks are its slice
            assert tuple(option.picks) == names
            picks = [method.whole(s) for s in space.shapes]  # type: ignore[attr-defined]
            picks[half // 2] |= option.picks
            kept = space.block_slices(picks)[half // 2]
            there = kept.attn if attention else kept.mlp
            assert there == (option.slice.attn or option.slice.mlp)
            if there:
                assert replace(kept, **{"mlp" if attention else "attn": False}) == option.slice
        candidates = [space.candidates[half // 2][name] for name in names]
        removed = 0 in candidates[0]
        rest = [c for c in candidates[0] if c]
        assert len(own) == removed + len(list(itertools.product(rest, *candidates[1:])))


@over_prices
def test_what_is_removed_costs_nothing_and_the_whole_the_most(price: str) -> None:
    halves = Halves(free_costs(small_supernet("swin"), price))
    for half in range(len(halves)):
        for width in halves.widths(halves.stage(half)):
            costs = halves.costs(half, width)
            removed = [not o.slice.attn and not o.slice.mlp for o in halves.options(half)]
            assert (costs[removed] == 0).all() and (costs[[not gone for gone in removed]] > 0).all()
            assert int(costs.argmax()) == 0


def test_a_choice_that_no_half_makes_is_the_stages() -> None:
    halves = Halves(free_costs(small_supernet("swin"), granularity=8))
    assert halves.widths(0) == (8, 16) and halves.widths(1) == (8, 16, 24, 32)
    assert [halves.stage(half) for half in range(len(halves))] == [0, 0, 0, 0, 1, 1]
    picks = halves.picks((8, 24), [0] * 6)
    assert [pick["stream"] for pick in picks] == [8, 8, 24]
    fixed = Halves(free_costs(small_supernet("swin"), fixed=("stream",), keep_blocks=(1,)))
    assert fixed.widths(0) == (16,) and len(fixed.options(2)) == len(fixed.options(3)) == 1
