"""A local search whose moves follow the scores (section 2.10): stage widths, and how much each part's loss counts.

A point names the widths of the stages and a weight of every part of every half's loss; the exact program makes an
architecture of it that fills the budget. So a move takes width off where losses weigh less now and puts it where they
weigh more, over the whole network at once and never above the budget.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from nas.prices.halves import Costs, Halves
from nas.prices.selection import select
from nas.searchers.losses import PARTS, Floats, Losses, undominated
from search_spaces.errors import UserError
from search_spaces.method import Picks

FIRST_FACTOR = 2.0  # of a weight; and of a stage's width the first step's reciprocal share of the whole
EQUAL = dict.fromkeys(PARTS, 1.0)
SPREAD = 1e3  # of losses in the program, whose scores are told apart by steps of 1e-6 (selection.py)
NARROW = 0.4  # a stage's width is guessed as the budget to this power of the whole


@dataclass(frozen=True)
class Point:
    """widths: of the stages. of_part, of_half: logarithms of weights, where they are not 0."""

    widths: tuple[int, ...]
    of_part: Mapping[str, float] = field(default_factory=dict)
    of_half: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """An architecture: the option of each half. loss: what they lose together, unweighted."""

    point: Point
    picks: tuple[Picks, ...]
    loss: float

    def key(self) -> str:
        """What tells it from others: its picks, as JSON."""
        return json.dumps(self.picks)


class Program:
    """The exact program of section 2.6 over halves: least loss within the budget, at a point."""

    def __init__(self, halves: Halves, losses: Losses, budget: float) -> None:
        self.halves, self.losses, self.budget = halves, losses, budget
        self.plain = [losses.total(half, EQUAL) for half in range(len(halves))]

    def totals(self, point: Point) -> list[Floats]:
        """What the options of each half lose as a point weighs it: (options,)."""
        weights = {part: math.exp(point.of_part.get(part, 0.0)) for part in PARTS}
        return [
            self.losses.total(half, weights) * math.exp(point.of_half.get(half, 0.0))
            for half in range(len(self.halves))
        ]

    def costs(self, point: Point) -> list[Costs]:
        """What the options of each half cost at a point's stage widths: (options,)."""
        return [self.halves.costs(half, point.widths[self.halves.stage(half)]) for half in range(len(self.halves))]

    def others(self, point: Point) -> list[list[Costs]]:
        """Of each half what its options cost by the other prices that have a limit: (options,) each."""
        halves = self.halves
        widths = [point.widths[halves.stage(half)] for half in range(len(halves))]
        return [[other.costs(half, width) for other in halves.others] for half, width in enumerate(widths)]

    def solve(self, point: Point) -> Proposal | None:
        """None where no architecture of these stage widths is within the budget."""
        halves, totals, costs = self.halves, self.totals(point), self.costs(point)
        offered = [undominated(*each) for each in zip(costs, totals, self.others(point), strict=True)]
        unit = max(float(total.max()) for total in totals) / SPREAD or 1.0  # in whatever unit, its digits count
        problem = halves.problem(point.widths, offered, [-total / unit for total in totals])
        try:  # least loss, be the budget used up or not
            chosen = select(problem, halves.priced.full, self.budget, band=self.budget)
        except UserError:
            return None
        options = [offered[half][pick] for half, pick in enumerate(chosen.picks)]
        loss = float(sum(self.plain[half][option] for half, option in enumerate(options)))
        return Proposal(point, tuple(halves.picks(point.widths, options)), loss)


def first_point(halves: Halves, budget: float) -> Point:
    """All stages narrowed alike, by what was best on trained networks: the budget to the power 0.4.

    The budget as a share of the network whose stages they are.
    """
    widths, budget = [], budget * halves.priced.full / halves.priced.whole
    for stage in range(1 + halves.space.shapes[-1].stage):
        candidates = halves.widths(stage)
        widths.append(nearest(candidates, candidates[-1] * budget**NARROW))
    return Point(tuple(widths))


def nearest(widths: Sequence[int], aim: float) -> int:
    """The one of these widths that is nearest; of two the first."""
    return min(widths, key=lambda width: abs(width - aim))


def wider(halves: Halves, point: Point, *, stages: Sequence[int], share: float) -> Point:
    """A point with some stages widened by a share of their whole width, by a step at least; negative: narrowed."""
    widths = list(point.widths)
    for stage in stages:
        candidates = halves.widths(stage)
        aim = widths[stage] + share * candidates[-1]
        there = [w for w in candidates if (w - widths[stage]) * share > 0]
        if there:
            widths[stage] = nearest(there, aim)
    return replace(point, widths=tuple(widths))


Move = Callable[[Point], Point]


def moves(halves: Halves, losses: Losses, factor: float) -> Iterator[Move]:
    """One round of moves: stage widths, all and each; parts; halves, those that lose most first. Each way and back."""
    stages, share = range(1 + halves.space.shapes[-1].stage), (factor - 1) / 8
    for group in ([list(stages)] if len(stages) > 1 else []) + [[stage] for stage in stages]:
        for sign in (share, -share):
            yield partial(wider, halves, stages=group, share=sign)
    for part in PARTS:
        for step in (math.log(factor), -math.log(factor)):
            yield partial(part_weighed, part=part, step=step)
    most = sorted(range(len(halves)), key=lambda half: -float(losses.total(half, EQUAL).max()))
    for half in most:
        for step in (math.log(factor), -math.log(factor)):
            yield partial(half_weighed, half=half, step=step)


def part_weighed(point: Point, part: str, step: float) -> Point:
    """A point at which a part's loss counts more, by the step's exponential."""
    return replace(point, of_part={**point.of_part, part: point.of_part.get(part, 0.0) + step})


def half_weighed(point: Point, half: int, step: float) -> Point:
    """A point at which a half's loss counts more, by the step's exponential."""
    return replace(point, of_half={**point.of_half, half: point.of_half.get(half, 0.0) + step})


@dataclass(frozen=True)
class Measured:
    """A proposal and what measuring it gave: less is better."""

    proposal: Proposal
    value: float


def exchange(program: Program, start: Proposal, measure: Callable[[Proposal], float], evals: int) -> Measured:
    """The best that was measured, after so many measurements or when no move helps any more.

    A move that helped is made again; after a round in which none did, its factor shrinks to its square root. An
    architecture is measured once.
    """

    def measured(proposal: Proposal) -> Measured:
        value = measure(proposal)
        return Measured(proposal, math.inf if math.isnan(value) else value)

    best, left, factor = measured(start), evals - 1, FIRST_FACTOR
    seen = {start.key()}
    while factor > 1.05:
        helped = False
        for move in moves(program.halves, program.losses, factor):
            while left > 0:
                proposal = program.solve(move(best.proposal.point))
                if proposal is None or proposal.key() in seen:
                    break
                seen.add(proposal.key())
                found, left = measured(proposal), left - 1
                if found.value >= best.value:
                    break
                best, helped = found, True
        if left == 0:
            break
        factor = factor if helped else math.sqrt(factor)
    return best
