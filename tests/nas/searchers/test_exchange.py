"""The exact program over halves against every architecture, and the local search whose moves follow the scores."""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from nas.prices.halves import Halves
from nas.prices.selection import reachable_range
from nas.searchers.exchange import (
    EQUAL,
    Point,
    Program,
    Proposal,
    exchange,
    first_point,
    half_weighed,
    moves,
    nearest,
    part_weighed,
    wider,
)
from nas.searchers.importance import first_proposal
from nas.searchers.losses import PARTS, losses_of
from search_spaces.errors import UserError
from search_spaces.slices import network_slice
from tests.nas.free import bounded, free_costs, tiny_supernet
from tests.nas.searchers.test_losses import tables
from tests.nas.small import FAMILIES, small_supernet

over_tiny = pytest.mark.parametrize("family", ["vit", "swin"])
over_prices = pytest.mark.parametrize("price", ["flops", "params", "latency"])


def program_over(halves: Halves, share: float, seed: int = 0, scale: float = 1.0) -> Program:
    """Losses drawn; the budget so far from the least that can be reached to the whole."""
    low, full = reachable_range(halves.priced.uniform())[0], halves.priced.full
    return Program(halves, losses_of(halves, *tables(halves, seed, scale)), (low + share * (full - low)) / full)


def tiny_program(family: str, price: str, share: float, seed: int = 0, scale: float = 1.0) -> Program:
    return program_over(Halves(free_costs(tiny_supernet(family), price, granularity=8)), share, seed, scale)


def small_program(share: float = 0.5, family: str = "swin", price: str = "flops") -> Program:
    return program_over(Halves(free_costs(small_supernet(family), price, granularity=2)), share)


def price_of(program: Program, proposal: Proposal) -> int:
    """That of the whole network, by its slices."""
    priced = program.halves.priced
    space = priced.space
    subnet = network_slice(space.shapes, space.block_slices(proposal.picks))
    return priced.price.network(space.shapes, priced.network, subnet)


def brute_force(program: Program, point: Point) -> float:
    """Least weighed loss of all architectures of these stage widths within the budget and every other limit."""
    halves = program.halves
    most = [program.budget * halves.priced.full, *(bound.most for bound in halves.priced.bounds)]
    prices = [
        (each, limit - each.outer(point.widths)) for each, limit in zip([halves, *halves.others], most, strict=True)
    ]
    costs = [[each.costs(half, point.widths[halves.stage(half)]) for half in range(len(halves))] for each, _ in prices]
    total = [functools.reduce(np.add.outer, rows) for rows in [program.totals(point), *costs]]
    fits = np.all([cost <= limit for cost, (_, limit) in zip(total[1:], prices, strict=True)], axis=0)
    return float(np.where(fits, total[0], math.inf).min())


def weighed(program: Program, proposal: Proposal, point: Point) -> float:
    """What a proposal loses as a point weighs it."""
    halves, total = program.halves, 0.0
    weights = {part: math.exp(point.of_part.get(part, 0.0)) for part in PARTS}
    for half in range(len(halves)):
        names = halves.space.method.halves[half % 2]
        own = {name: proposal.picks[half // 2][name] for name in names}
        (k,) = (k for k, option in enumerate(halves.options(half)) if dict(option.picks) == own)
        total += float(program.losses.total(half, weights)[k]) * math.exp(point.of_half.get(half, 0.0))
    return total


@over_tiny
@over_prices
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_10_the_programs_optimum_is_that_of_every_architecture(family: str, price: str, share: float) -> None:
    """At stage widths and weights; less price and less loss is better, so no band holds it."""
    program = tiny_program(family, price, share, seed=int(10 * share))
    halves, rng, solved = program.halves, np.random.default_rng(0), 0
    stages = range(1 + halves.space.shapes[-1].stage)
    for widths in itertools.product(*(halves.widths(stage)[::2] for stage in stages)):
        by_part = dict(zip(PARTS, rng.normal(size=4).tolist(), strict=True)) if sum(widths) % 16 else {}
        by_half = {half: float(rng.normal()) for half in range(0, len(halves), 3)} if by_part else {}
        point = Point(widths, by_part, by_half)
        expected, found = brute_force(program, point), program.solve(point)
        assert (found is None) == (expected == math.inf)
        if found is None:
            continue
        solved += 1
        assert found.point == point and found.picks[0]["stream"] == widths[0]
        assert weighed(program, found, point) == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert found.loss == pytest.approx(weighed(program, found, Point(widths)))
        assert price_of(program, found) <= program.budget * halves.priced.full
    assert solved


@over_tiny
def test_10_with_two_limits_the_optimum_is_that_of_every_architecture_within_both(family: str) -> None:
    """Milliseconds beside FLOPs, and parameters beside both."""
    supernet, bound = tiny_supernet(family), 0
    for seed, shares in enumerate([dict(flops=0.6), dict(flops=0.8, params=0.5), dict(params=0.35)]):
        costs = bounded(free_costs(supernet, "latency", granularity=8), supernet, **shares)
        program = program_over(Halves(costs), 0.6, seed)
        stages = range(1 + costs.space.shapes[-1].stage)
        for widths in itertools.product(*(program.halves.widths(stage)[1::2] for stage in stages)):
            point = Point(widths)
            expected, found = brute_force(program, point), program.solve(point)
            alone = replace(costs, bounds=())
            one = Program(Halves(alone), program.losses, program.budget).solve(point)
            assert (found is None) == (expected == math.inf)
            if found is None:
                continue
            assert weighed(program, found, point) == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert price_of(program, found) <= program.budget * costs.full
            subnet = network_slice(costs.space.shapes, costs.space.block_slices(found.picks))
            assert costs.within_bounds(subnet)
            bound += one is None or one.picks != found.picks
    assert bound, "no limit made a difference"


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e9])
def test_the_unit_of_the_losses_does_not_matter(scale: float) -> None:
    """A network that is sure of itself loses little, in nats; that is no reason to think all widths alike."""
    for share in (0.4, 0.8):
        own, other = tiny_program("vit", "flops", share), tiny_program("vit", "flops", share, scale=scale)
        point = Point((24,))
        first, second = own.solve(point), other.solve(point)
        assert first is not None and second is not None
        assert first.picks == second.picks and second.loss == pytest.approx(scale * first.loss)


def test_where_nothing_is_lost_the_answer_is_one_within_the_budget() -> None:
    program = tiny_program("vit", "flops", 0.5, scale=0.0)
    found = first_proposal(program)
    assert found.loss == 0 and price_of(program, found) <= program.budget * program.halves.priced.full


@over_prices
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_10_no_proposal_on_the_way_is_above_the_budget(family: str, price: str, share: float) -> None:
    program = small_program(share, family, price)
    seen: list[Proposal] = []

    def measure(proposal: Proposal) -> float:
        seen.append(proposal)
        return proposal.loss

    exchange(program, first_proposal(program), measure, 4)
    assert 2 < len(seen) <= 4  # of a CaiT's at 0.1 no more are to be had
    assert all(price_of(program, proposal) <= program.budget * program.halves.priced.full for proposal in seen)


# Where it begins, and its moves


def test_the_first_widths_follow_the_budget() -> None:
    halves = small_program().halves
    assert first_point(halves, 1.0).widths == (16, 32)
    assert first_point(halves, 0.5).widths == (12, 24)  # of 16 and 32 times 0.76
    assert first_point(halves, 1e-9).widths == (4, 8)  # a quarter
    assert nearest([8, 16, 24], 12) == 8


def test_where_the_first_widths_do_not_fit_the_nearest_that_do_are_taken() -> None:
    whole = tiny_program("vit", "flops", 1.0)
    halves, full = whole.halves, whole.halves.priced.full
    empty = {width: halves.outer((width,)) for width in halves.widths(0)}  # all halves removed
    tight = Program(halves, whole.losses, (empty[16] + 1) / full)
    first = first_point(halves, tight.budget)
    tight = Program(halves, whole.losses, (empty[first.widths[0]] - 1) / full)
    assert first_point(halves, tight.budget) == first and tight.solve(first) is None
    found = first_proposal(tight)
    assert found.point.widths == (first.widths[0] - 8,) and price_of(tight, found) <= tight.budget * full
    with pytest.raises(UserError, match="no architecture of the narrowest stages is within the budget"):
        first_proposal(Program(halves, whole.losses, (empty[8] - 1) / full))


def test_a_move_widens_by_a_step_at_least_and_never_leaves_the_candidates() -> None:
    halves = small_program().halves
    point = Point((8, 16))
    assert wider(halves, point, stages=[0, 1], share=0.125).widths == (10, 20)
    assert wider(halves, point, stages=[1], share=-1e-6).widths == (8, 14)
    assert wider(halves, point, stages=[0], share=99).widths == (16, 16)
    assert wider(halves, Point((16, 8)), stages=[0], share=0.1).widths == (16, 8)
    assert wider(halves, Point((16, 8)), stages=[1], share=-0.1).widths == (16, 8)
    there_and_back = part_weighed(part_weighed(point, "qk", 0.7), "qk", -0.7)
    assert there_and_back.of_part == {"qk": 0.0} and point.of_part == {}
    assert half_weighed(half_weighed(point, 3, 0.5), 3, 0.5).of_half == {3: 1.0}


def test_a_round_of_moves_goes_each_way_in_every_stage_part_and_half() -> None:
    program = small_program()
    halves = program.halves
    found = list(moves(halves, program.losses, 2.0))
    assert len(found) == 2 * (3 + len(PARTS) + len(halves))  # both stages, and each
    points = [move(Point((8, 16))) for move in found]
    assert len({repr(point) for point in points}) == len(points)
    assert [point.widths for point in points[:6]] == [(10, 20), (6, 12), (10, 16), (6, 16), (8, 20), (8, 12)]
    order = [next(iter(point.of_half)) for point in points[6 + 2 * len(PARTS) :: 2]]
    most = [float(program.losses.total(half, EQUAL).max()) for half in order]
    assert sorted(order) == list(range(len(halves))) and most == sorted(most, reverse=True)


# What it finds


class Measure:
    """A measure of picks alone, and how often it was asked."""

    def __init__(self, value: Callable[[Proposal], float]) -> None:
        self.value, self.asked, self.values = value, list[str](), list[float]()

    def __call__(self, proposal: Proposal) -> float:
        self.asked.append(proposal.key())
        self.values.append(self.value(proposal))
        return self.values[-1]


def truth(program: Program, seed: int = 1) -> Callable[[Proposal], float]:
    """What is really lost: the parts weigh otherwise than the program believes, and stage widths cost something."""
    rng = np.random.default_rng(seed)
    real = Point((0,), dict(zip(PARTS, rng.normal(size=4).tolist(), strict=True)), {1: 1.0})
    whole = [halves[-1] for halves in (program.halves.widths(0), program.halves.widths(1))]

    def value(proposal: Proposal) -> float:
        narrow = sum((1 - w / of) ** 2 for w, of in zip(proposal.point.widths, whole, strict=True))
        return weighed(program, proposal, real) + 5 * narrow

    return value


def test_exchange_finds_better_and_measures_nothing_twice() -> None:
    program = small_program(0.3)
    start, measure = first_proposal(program), Measure(truth(program))
    best = exchange(program, start, measure, 8)
    assert measure.asked[0] == start.key() and len(measure.asked) == 8
    assert len(set(measure.asked)) == len(measure.asked)
    assert best.value == min(measure.values) < 0.95 * measure.values[0]
    assert best.proposal.key() == measure.asked[measure.values.index(best.value)]


def test_the_same_measure_gives_the_same_way() -> None:
    ways = []
    for _ in range(2):
        program = small_program(0.3)
        measure = Measure(truth(program))
        exchange(program, first_proposal(program), measure, 8)
        ways.append((measure.asked, measure.values))
    assert ways[0] == ways[1]


@pytest.mark.parametrize("evals", [1, 2, 7])
def test_so_many_measurements_and_no_more(evals: int) -> None:
    program = small_program(0.3)
    measure = Measure(truth(program))
    best = exchange(program, first_proposal(program), measure, evals)
    assert len(measure.asked) == evals and best.value == min(measure.values)


@pytest.mark.slow
def test_it_ends_where_no_move_helps() -> None:
    program = tiny_program("vit", "flops", 0.5)
    measure = Measure(lambda proposal: proposal.loss)
    best = exchange(program, first_proposal(program), measure, 10**6)
    assert len(measure.asked) < 500 and best.value == min(measure.values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_measured_is_never_the_best(value: float) -> None:
    program = small_program(0.3)
    values = iter([1.0, value, 0.5, value, 0.7] + [value] * 9)
    measure = Measure(lambda _: next(values))
    assert exchange(program, first_proposal(program), measure, 7).value == 0.5
    values = iter([value, 2.0, value, 3.0] + [value] * 9)
    assert exchange(program, first_proposal(program), Measure(lambda _: next(values)), 7).value == 2.0


def test_a_proposal_is_known_by_its_picks_alone() -> None:
    program = small_program(0.3)
    found = program.solve(Point((12, 24)))
    assert found is not None and json.loads(found.key()) == [dict(pick) for pick in found.picks]
    other = Proposal(Point((12, 24), {"qk": 1.0}), found.picks, 0.0)
    assert other.key() == found.key()
