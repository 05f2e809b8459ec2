"""Selection under a budget (section 2.6): never above, the best in the band, always the same one."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, OptimizeResult

from nas.prices import selection
from nas.prices.price import Outside
from nas.prices.selection import (
    KnapsackItem,
    Limit,
    Selection,
    SelectionProblem,
    check_budget,
    finalists,
    reachable_range,
    select,
)
from search_spaces.errors import UserError
from supernets.flops import PerWidth


def architectures(problem: SelectionProblem) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(block)) for block in problem.blocks))


def widths_by_hand(problem: SelectionProblem, picks: tuple[int, ...]) -> tuple[int, ...]:
    chosen = [block[pick] for block, pick in zip(problem.blocks, picks, strict=True)]
    return problem.fixed_widths or tuple(
        max(c.width for c, s in zip(chosen, problem.stages, strict=True) if s == stage)
        for stage in sorted(set(problem.stages))
    )


def flops_by_hand(problem: SelectionProblem, picks: tuple[int, ...]) -> int:
    chosen = [block[pick] for block, pick in zip(problem.blocks, picks, strict=True)]
    return sum(c.cost for c in chosen) + outside_by_hand(problem.outer, widths_by_hand(problem, picks))


def limit_by_hand(problem: SelectionProblem, limit: Limit, picks: tuple[int, ...]) -> int:
    blocks = sum(costs[pick] for costs, pick in zip(limit.costs, picks, strict=True))
    return blocks + outside_by_hand(limit.outer, widths_by_hand(problem, picks))


def outside_by_hand(outer: Outside, widths: tuple[int, ...]) -> int:
    if isinstance(outer, Steps):
        return (
            outer.constant
            + sum(outer.terms[0][s, w] for s, w in enumerate(widths))
            + sum(outer.terms[1][s, v, w] for s, (v, w) in enumerate(itertools.pairwise(widths)))
        )
    assert isinstance(outer, PerWidth)
    total = outer.constant + outer.first * widths[0] + outer.last * widths[-1]
    for merge, pair in zip(outer.merge_pair, itertools.pairwise(widths), strict=True):
        total += merge * math.prod(pair)
    return total + sum(m * w for m, w in zip(outer.merge_in, widths, strict=False))


@dataclass(frozen=True)
class Steps:
    """An outer cost that is no formula: a number for every width of a stage, and for every pair of neighbours."""

    constant: int
    num_stages: int
    terms: tuple[dict[tuple[int, int], int], dict[tuple[int, int, int], int]]

    def of_stage(self, stage: int, width: int) -> int:
        return self.terms[0][stage, width]

    def of_merging(self, stage: int, width: int, after: int) -> int:
        return self.terms[1][stage, width, after]

    def at(self, widths: Sequence[int]) -> int:
        return outside_by_hand(self, tuple(widths))


def brute_force(problem: SelectionProblem, full: int, budget: float, band: float) -> Selection | None:
    """Every architecture, in lexicographic order, so that the first of the best is the rule's."""

    def score(picks: tuple[int, ...]) -> int:  # whole steps of 1e-6, as the ties are defined
        return sum(round(block[pick].score * 1e6) for block, pick in zip(problem.blocks, picks, strict=True))

    fit = [
        p
        for p in architectures(problem)
        if all(limit_by_hand(problem, each, p) <= each.most for each in problem.limits)
    ]
    below = [p for p in fit if flops_by_hand(problem, p) <= Fraction(str(budget)) * full]
    if not below:
        return None
    low = (Fraction(str(budget)) - Fraction(str(band))) * full
    inside = [p for p in below if flops_by_hand(problem, p) >= low]
    best = max(inside or below, key=score)  # max keeps the first of equals
    return Selection(best, flops_by_hand(problem, best), in_band=bool(inside))


@st.composite
def problems(draw: st.DrawFn) -> SelectionProblem:
    """Up to three stages and six blocks; widths that differ as in `stream` or agree as in `inner`."""
    num_blocks = draw(st.integers(2, 6))
    num_stages = draw(st.integers(1, min(3, num_blocks)))
    extra = draw(st.lists(st.integers(0, num_stages - 1), min_size=num_blocks - num_stages, max_size=6))
    stages = tuple(sorted([*range(num_stages), *extra[: num_blocks - num_stages]]))
    stream = draw(st.booleans())
    large = draw(st.sampled_from([1, 1_000_003]))  # MACs of toys, and MACs that share no factor
    scores = st.sampled_from([0.0, -0.5, -1.0]) if draw(st.booleans()) else st.integers(-9000, 0).map(milli)
    blocks = []
    for stage in stages:
        full = 24 << stage
        alphas = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))  # repeats allowed
        blocks.append(
            tuple(
                KnapsackItem(
                    cost=draw(st.integers(0, 40)) * large + draw(st.integers(0, 9)),
                    width=full // alpha if stream else full,
                    score=draw(scores),
                )
                for alpha in alphas
            )
        )
    cost = st.integers(0, 3).map(lambda value: value * large)
    return SelectionProblem(
        blocks=tuple(blocks),
        stages=stages,
        outer=PerWidth(
            constant=draw(cost),
            first=draw(cost),
            merge_pair=tuple(draw(st.integers(0, 2)) for _ in range(num_stages - 1)),
            last=draw(cost),
            merge_in=tuple(draw(cost) for _ in range(num_stages - 1)),
        ),
        fixed_widths=tuple(24 << s for s in range(num_stages)) if draw(st.booleans()) else None,
    )


@st.composite
def any_outside(draw: st.DrawFn, problem: SelectionProblem) -> Steps:
    """A number for every width and every pair of them."""
    stages = range(problem.stages[-1] + 1)
    found = [
        sorted({c.width for block, s in zip(problem.blocks, problem.stages, strict=True) if s == stage for c in block})
        for stage in stages
    ]
    if problem.fixed_widths is not None:
        found = [[width] for width in problem.fixed_widths]
    cost = st.integers(-3, 12)
    return Steps(
        draw(cost),
        len(stages),
        (
            {(stage, w): draw(cost) for stage in stages for w in found[stage]},
            {(stage, v, w): draw(cost) for stage in stages[:-1] for v in found[stage] for w in found[stage + 1]},
        ),
    )


@st.composite
def limited(draw: st.DrawFn) -> SelectionProblem:
    """A problem whose outer cost may be any, with one or two limits of other prices."""
    problem = draw(problems())
    limits = []
    for _ in range(draw(st.integers(0, 2))):
        costs = tuple(tuple(draw(st.integers(0, 20)) for _ in block) for block in problem.blocks)
        outer = draw(any_outside(problem))
        limits.append(Limit(costs, outer, draw(st.integers(0, 20 * len(costs)))))
    outer = draw(any_outside(problem)) if draw(st.booleans()) else problem.outer
    return replace(problem, outer=outer, limits=tuple(limits))


def assert_the_optimum(problem: SelectionProblem, full: int, budget: float, band: float) -> None:
    """What brute force finds, or a refusal where that finds nothing."""
    expected = brute_force(problem, full, budget, band)
    if expected is None:
        with pytest.raises(UserError, match="cannot be met"):
            select(problem, full, budget, band)
    else:
        assert select(problem, full, budget, band) == expected


@settings(max_examples=150, deadline=None)
@given(limited(), st.sampled_from([0.35, 0.5, 0.9, 1.0]), st.sampled_from([0.02, 0.2]))
def test_several_prices_and_outer_costs_that_are_no_formula(
    problem: SelectionProblem, budget: float, band: float
) -> None:
    full = max(1, *(flops_by_hand(problem, picks) for picks in architectures(problem)))
    assert_the_optimum(problem, full, budget, band)


def milli(value: int) -> float:
    return value / 1000


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([0.2, 0.35, 0.5, 0.7, 0.9, 1.0]), st.sampled_from([0.02, 0.001, 0.2]))
def test_selection_is_the_brute_force_optimum(problem: SelectionProblem, budget: float, band: float) -> None:
    full = max(flops_by_hand(problem, picks) for picks in architectures(problem)) or 1
    assert_the_optimum(problem, full, budget, band)


UNSOLVED_WITH_PRESOLVE = SelectionProblem(  # scipy 1.17's HiGHS answers "Solve error"
    blocks=(
        (KnapsackItem(0, 24, 0.0), KnapsackItem(0, 24, 0.0), KnapsackItem(0, 24, 0.0), KnapsackItem(16, 12, 0.0)),
        (KnapsackItem(14, 24, 0.0), KnapsackItem(0, 24, 0.0), KnapsackItem(10, 12, 0.0)),
    ),
    stages=(0, 0),
    outer=PerWidth(0, 0, 0),
)


INFEASIBLE_WITH_PRESOLVE = SelectionProblem(  # says HiGHS of a band that holds just the cost of (1, 0, 0, 1, 1, 0)
    blocks=(
        (KnapsackItem(0, 24, 0.0), KnapsackItem(0, 12, -0.5)),
        (KnapsackItem(10000031, 24, 0.0), KnapsackItem(0, 24, 0.0), KnapsackItem(32000096, 12, -0.5)),
        (
            KnapsackItem(29000088, 24, -1.0),
            KnapsackItem(0, 24, 0.0),
            KnapsackItem(1000003, 24, 0.0),
            KnapsackItem(1000003, 12, 0.0),
        ),
        (
            KnapsackItem(27000081, 24, -0.5),
            KnapsackItem(20000060, 24, 0.0),
            KnapsackItem(1000003, 24, 0.0),
            KnapsackItem(0, 12, -0.5),
        ),
        (
            KnapsackItem(0, 24, 0.0),
            KnapsackItem(3000009, 24, 0.0),
            KnapsackItem(25000075, 24, 0.0),
            KnapsackItem(0, 12, 0.0),
        ),
        (KnapsackItem(0, 12, 0.0),),
    ),
    stages=(0,) * 6,
    outer=PerWidth(0, 0, last=2000006),
)


def test_a_band_that_the_solver_takes_for_empty_is_looked_at_again() -> None:
    target = flops_by_hand(INFEASIBLE_WITH_PRESOLVE, (1, 0, 0, 1, 1, 0))
    assert select(INFEASIBLE_WITH_PRESOLVE, target, 1.0, 0.0) == brute_force(INFEASIBLE_WITH_PRESOLVE, target, 1.0, 0.0)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from([0.35, 0.6, 1.0]), st.sampled_from([0.02, 0.2]))
@example(UNSOLVED_WITH_PRESOLVE, 0.6, 0.02)
def test_finalists_are_the_brute_force_optimum_of_each_combination_of_stage_widths(
    problem: SelectionProblem, budget: float, band: float
) -> None:
    full = max(flops_by_hand(problem, picks) for picks in architectures(problem)) or 1
    expected = brute_force(problem, full, budget, band)
    if expected is None:
        return

    def score(picks: tuple[int, ...]) -> int:
        return sum(round(block[pick].score * 1e6) for block, pick in zip(problem.blocks, picks, strict=True))

    low = (Fraction(str(budget)) - Fraction(str(band))) * full if expected.in_band else 0
    best: dict[tuple[int, ...], int] = {}
    for picks in architectures(problem):
        if low <= flops_by_hand(problem, picks) <= Fraction(str(budget)) * full:
            widths = problem.stage_widths(picks)
            best[widths] = max(best.get(widths, score(picks)), score(picks))
    found = finalists(problem, full, budget, band, most=1000)
    scores = [score(f.picks) for f in found]
    assert {problem.stage_widths(f.picks): value for f, value in zip(found, scores, strict=True)} == best
    assert len(found) == len(best) and scores == sorted(scores, reverse=True)
    assert found[0] == select(problem, full, budget, band) == expected
    assert finalists(problem, full, budget, band, most=2) == found[:2]


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_a_band_of_one_mac_finds_exactly_that_many(problem: SelectionProblem, data: st.DataObject) -> None:
    """The tightest band: budget exactly one architecture's FLOPs, so one MAC of slack would be seen."""
    target = flops_by_hand(problem, data.draw(st.sampled_from(sorted(architectures(problem)))))
    if target:
        assert select(problem, target, 1.0, 0.0) == brute_force(problem, target, 1.0, 0.0)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_reachable_range_and_flops_are_exact(problem: SelectionProblem) -> None:
    flops = [flops_by_hand(problem, picks) for picks in architectures(problem)]
    assert [problem.cost(picks) for picks in architectures(problem)] == flops
    assert reachable_range(problem) == (min(flops), max(flops))


def swin_b(scores: list[list[float]]) -> SelectionProblem:
    """Stream-width DAN on Swin-B at 224 px: A = (1, 2, 4, 8) where it divides the heads 4, 8, 16, 32."""
    stages = (0,) * 2 + (1,) * 2 + (2,) * 18 + (3,) * 2
    blocks = []
    for stage, row in zip(stages, scores, strict=True):
        tokens = 56 * 56 >> 2 * stage
        widths = [(128 << stage) // alpha for alpha in ((1, 2, 4, 8) if stage else (1, 2, 4))]
        block = [  # qkv, projection and MLP; windows of 49 tokens
            KnapsackItem(tokens * (12 * e * e + 2 * 49 * e), e, score)
            for e, score in zip(widths, row[: len(widths)], strict=True)
        ]
        blocks.append(tuple(block))
    merging = tuple(4 * (56 * 56 >> 2 * stage) for stage in (1, 2, 3))  # four neighbours onto one token
    return SelectionProblem(tuple(blocks), stages, PerWidth(0, 56 * 56 * 48, 1000, merging, (0,) * len(merging)))


FULL = swin_b([[0.0] * 4] * 24).cost([0] * 24)


def logits(seed: int) -> list[list[float]]:
    values = [math.sin(1 + seed * 97 + i) * 3 for i in range(96)]
    rows = [values[i : i + 4] for i in range(0, 96, 4)]
    return [[v - math.log(sum(map(math.exp, row))) for v in row] for row in rows]


def test_swin_b_costs_what_the_literature_says() -> None:
    gflops = FULL / 1e9
    assert gflops == pytest.approx(15.43, abs=0.02)
    low, high = reachable_range(swin_b(logits(0)))
    assert high == FULL
    assert low == swin_b(logits(0)).cost([2, 2] + [3] * 22)


def best_score_by_table(problem: SelectionProblem, low: int, high: int) -> float:
    """The best total score in the band: every reachable (width, MACs), stage by stage. Shares no code."""
    outer = problem.outer
    assert isinstance(outer, PerWidth)
    states = {(0, outer.constant): 0.0}  # (width of the last stage, MACs so far) -> best score
    for stage in range(max(problem.stages) + 1):
        inside = {(0, 0): 0.0}
        for block in (b for b, s in zip(problem.blocks, problem.stages, strict=True) if s == stage):
            grown: dict[tuple[int, int], float] = {}
            for ((width, macs), score), c in itertools.product(inside.items(), block):
                key = max(width, c.width), macs + c.cost
                grown[key] = max(grown.get(key, -math.inf), score + c.score)
            inside = grown
        joined: dict[tuple[int, int], float] = {}
        for (before, macs), score in states.items():
            for (width, own), gained in inside.items():
                into = outer.merge_pair[stage - 1] * before if stage else outer.first
                total = macs + own + into * width
                if stage == max(problem.stages):
                    total += outer.last * width
                if total <= high:
                    key = width, total
                    joined[key] = max(joined.get(key, -math.inf), score + gained)
        states = joined
    return max(score for (_, macs), score in states.items() if macs >= low)


@pytest.mark.parametrize("budget", [0.12, 0.451])
def test_swin_b_gets_the_best_architecture_of_its_band(budget: float) -> None:
    problem = swin_b(logits(1))
    found = select(problem, FULL, budget)
    low, high = (math.floor(Fraction(str(b)) * FULL) for b in (round(budget - 0.02, 3), budget))
    assert found.in_band
    assert low < found.cost <= high
    assert found.cost == flops_by_hand(problem, found.picks)
    score = sum(block[pick].score for block, pick in zip(problem.blocks, found.picks, strict=True))
    assert score == pytest.approx(best_score_by_table(problem, low + 1, high), abs=24e-6)


def test_one_mac_over_is_refused_even_where_the_solver_would_let_it_through() -> None:
    """MACs of 1e12 that share no factor: a MAC is below the solver's tolerance, so the integers decide."""
    big = 10**12
    better = (KnapsackItem(big + 1, 1, 0.0), KnapsackItem(big - 1, 1, -1.0), KnapsackItem(7, 1, -50.0))
    problem = SelectionProblem((better,) * 3, (0, 0, 0), PerWidth(0, 0, 0))
    found = select(problem, 3 * big, 1.0)
    assert found == Selection((0, 1, 1), 3 * big - 1, in_band=True)


def test_a_proposal_outside_the_integers_is_forbidden_and_the_next_best_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A solver whose tolerance is huge proposes the best score whatever it costs, until that is forbidden."""
    solve = scipy.optimize.milp
    rejected: list[bool] = []

    def lenient(cost: object, *, constraints: LinearConstraint, **kwargs: object) -> OptimizeResult:
        loose = np.array(constraints.ub)
        loose[2] += 3  # the band's row, after one row per block
        result = solve(cost, constraints=LinearConstraint(constraints.A, constraints.lb, loose), **kwargs)
        if result.x is not None:
            rejected.append(bool(np.dot([5, 4, 1, 5, 4, 1], np.round(result.x)) > 7))
        return result

    block = (KnapsackItem(5, 1, 0.0), KnapsackItem(4, 1, -1.0), KnapsackItem(1, 1, -2.0))
    problem = SelectionProblem((block, block), (0, 0), PerWidth(0, 0, 0), fixed_widths=(1,))
    expected = brute_force(problem, 10, 0.7, 0.5)
    monkeypatch.setattr(selection, "milp", lenient)
    assert select(problem, 10, 0.7, 0.5) == expected
    assert any(rejected)


def test_equal_scores_go_to_the_first_in_order_and_the_same_one_every_time() -> None:
    """Before a search has learnt anything every architecture scores the same; the rule alone decides."""
    problem = swin_b([[-math.log(4)] * 4] * 24)
    found = select(problem, FULL, 0.5)
    assert found == select(problem, FULL, 0.5)
    for block in range(24):  # no earlier candidate would do with whatever may follow
        for pick in range(found.picks[block]):
            head = [*found.picks[:block], pick]
            fixed = [(b[head[i]],) if i < len(head) else b for i, b in enumerate(problem.blocks)]
            outer = replace(problem.outer, last=1000)  # type: ignore[type-var]
            with_head = replace(problem, blocks=tuple(fixed), outer=outer)
            with contextlib.suppress(UserError):  # not even below the budget
                assert not select(with_head, FULL, 0.5).in_band


def test_scores_far_apart_are_still_told_apart() -> None:
    """Logits that ran away: one block's spread is huge, another's decides."""
    problem = SelectionProblem(
        (
            (KnapsackItem(4, 1, 0.0), KnapsackItem(1, 1, -20_000.0)),
            (KnapsackItem(4, 1, -0.7), KnapsackItem(3, 1, -0.6), KnapsackItem(1, 1, -9.0)),
        ),
        (0, 0),
        PerWidth(0, 0, 0),
    )
    assert select(problem, 8, 1.0, 0.5).picks == (0, 1)


def test_an_empty_band_takes_the_best_below_it_and_says_so() -> None:
    block = (KnapsackItem(60, 1, -0.1), KnapsackItem(20, 1, -1.0), KnapsackItem(10, 1, -3.0))
    problem = SelectionProblem((block,), (0,), PerWidth(0, 0, 0))
    assert select(problem, 100, 0.5) == Selection((1,), 20, in_band=False)
    assert select(problem, 100, 0.6) == Selection((0,), 60, in_band=True)


def test_a_narrower_stage_does_not_pay_for_width_it_lacks_to_reach_the_band(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stem MACs could lift F into the band if a stage might be wider than its widest pick; it may not.

    The program knows that by itself, without forbidding 2**8 too narrow architectures one by one.
    """
    solve, programs = scipy.optimize.milp, itertools.count()

    def counting(*args: object, **kwargs: object) -> OptimizeResult:
        next(programs)
        return solve(*args, **kwargs)

    monkeypatch.setattr(selection, "milp", counting)
    narrow = KnapsackItem(10, 1, -0.1)
    problem = SelectionProblem(((KnapsackItem(10, 8, -9.0), narrow, narrow),) * 8, (0,) * 8, PerWidth(0, 10, 0))
    found = select(problem, 160, 1.0, 0.02)  # 8 * 10 + 10 * 8 = 160, but 90 when all are narrow
    assert found == Selection((0,) + (1,) * 7, 160, in_band=True)
    assert next(programs) < 10


def test_a_budget_is_read_as_the_decimal_the_user_typed() -> None:
    problem = SelectionProblem(((KnapsackItem(3, 1, 0.0), KnapsackItem(1, 1, -1.0)),), (0,), PerWidth(0, 0, 0))
    assert select(problem, 10, 0.3).cost == 3  # the double 0.3 lies below 3/10


def test_an_unreachable_budget_is_refused_with_the_range() -> None:
    problem = swin_b(logits(0))
    with pytest.raises(UserError, match=r"budget 0\.01 .*0\.15.* reaches 0\.0\d+ to 1\.0000") as error:
        check_budget(problem, FULL, 0.01)
    assert "\n" not in str(error.value)
    named = float(str(error.value).rsplit(" ", 1)[1])
    check_budget(problem, FULL, named)  # what the message asks for works
    with pytest.raises(UserError, match="cannot be met"):
        select(problem, FULL, 0.01)
    for nonsense in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(UserError, match="expected a fraction"):
            select(problem, FULL, nonsense)


def test_a_malformed_problem_is_refused() -> None:
    block = (KnapsackItem(1, 1, 0.0),)
    with pytest.raises(ValueError, match="rise from 0"):
        SelectionProblem((block, block), (0, 2), PerWidth(0, 0, 0, (1, 1), (0, 0)))
    with pytest.raises(ValueError, match="patch mergings"):
        SelectionProblem((block, block), (0, 1), PerWidth(0, 0, 0))
    with pytest.raises(ValueError, match="not finite"):
        SelectionProblem(((KnapsackItem(1, 1, -math.inf),),), (0,), PerWidth(0, 0, 0))
