"""Spaces of free widths over small supernets, and all architectures of the tiniest."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from nas.prices.costs import Bound, PricedSpace, priced
from nas.prices.latency import Latency
from nas.prices.price import Price
from nas.prices.table import PRICES
from search_spaces.free import Free
from search_spaces.method import Picks, Settings
from search_spaces.slices import network_slice
from search_spaces.space import make_space
from supernets.supernet import Supernet
from tests.nas.prices.drawn_table import drawn_table
from tests.oracle import randomise


def free_costs(supernet: Supernet, price: str = "flops", **settings: Any) -> PricedSpace:
    """The space over a supernet, of the finest widths unless it is told otherwise, priced."""
    space = make_space("small-free", Free(), Settings(**{"granularity": 1} | settings), supernet.shapes)
    return priced(space, supernet.adapter.costs, price_over(supernet, price))


def price_over(supernet: Supernet, name: str) -> Price:
    """The price of a name; latency by a table that is drawn."""
    return Latency(drawn_table(supernet)) if name == "latency" else PRICES[name]


def bounded(costs: PricedSpace, supernet: Supernet, **shares: float) -> PricedSpace:
    """The same under limits of other prices, each a share of the whole."""
    bounds = []
    for name, share in shares.items():
        other = priced(costs.space, costs.network, price_over(supernet, name))
        bounds.append(Bound(other, int(share * other.full), f"{share:g} of the {name}"))
    return replace(costs, bounds=tuple(bounds))


def tiny_supernet(family: str) -> Supernet:
    """So few widths, at a granularity of 8, that all architectures can be listed."""
    net: Any
    if family == "vit":
        net = VisionTransformer(
            img_size=32, patch_size=16, num_classes=5, embed_dim=32, depth=2, num_heads=2, mlp_ratio=0.5
        )
    else:
        net = SwinTransformer(
            img_size=20, embed_dim=16, depths=(1, 1), num_heads=(1, 2), window_size=3, mlp_ratio=0.5, num_classes=5
        )
    return Supernet(randomise(net, 0)).double().eval()


def architectures(costs: PricedSpace) -> Iterator[tuple[list[Picks], int]]:
    """Every architecture and its exact price."""
    space, (of_stage,) = costs.space, costs.space.method.stage_choices
    stages = range(1 + space.shapes[-1].stage)
    widths = [space.candidates[costs.blocks_of(stage)[0]][of_stage] for stage in stages]
    others = [
        [dict(zip(own, taken, strict=True)) for taken in itertools.product(*(block[name] for name in own))]
        for block in space.candidates
        for own in [[name for name in block if name != of_stage]]
    ]
    for streams in itertools.product(*widths):
        for blocks in itertools.product(*others):
            picks = [{of_stage: streams[s.stage]} | each for s, each in zip(space.shapes, blocks, strict=True)]
            subnet = network_slice(space.shapes, space.block_slices(picks))
            yield picks, costs.price.network(space.shapes, costs.network, subnet)
