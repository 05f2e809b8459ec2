"""The search by gradient over widths that are chosen each by itself (section 2.9)."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.prices.costs import PricedSpace, Probabilities
from nas.prices.halves import Costs, Halves, PricedHalves
from nas.prices.options import BAND
from nas.prices.relaxation import Floats, Relaxed, relaxed
from nas.prices.selection import Selection, cost_band, reachable, select
from nas.searchers.choices import nested_mixture
from nas.searchers.gradient import Gradient
from nas.searchers.supernet_search import Draw
from search_spaces.method import Picks
from search_spaces.slices import BlockSlice
from supernets.elastic import BlockMixture
from supernets.supernet import Supernet

PROMISING = 64  # combinations of stage widths whose relaxation is solved
LOOKED_AT = 4096  # the likeliest, among which those are that some architecture within the budget has


class NestedGradient(Gradient):
    """All candidates of a block in one gated pass; the exact program half by half."""

    costs: PricedHalves

    def __init__(self, supernet: Supernet, costs: PricedSpace, **options: Any) -> None:
        """options: those of Search."""
        super().__init__(supernet, PricedHalves.of(costs), **options)
        self.widest = [widest(costs, block) for block in range(len(supernet.shapes))]

    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        return [
            nested_mixture(kept, candidates, g)
            for kept, candidates, g in zip(self.widest, self.costs.space.candidates, draw, strict=True)
        ]

    @torch.no_grad()
    def _best(self, most: int) -> list[tuple[list[Picks], Selection | None]]:
        if self.budget is None:
            return [(self.choices.argmax(), None)]
        likelihood = Likelihood(self.costs.halves, self.choices.probabilities())
        return [*likelihood.best(self.budget, most, self.band)]


def widest(costs: PricedSpace, block: int) -> BlockSlice:
    """The slice that contains those of all candidates of a block."""
    space = costs.space
    picks = {name: max(options) for name, options in space.candidates[block].items()}
    return space.method.block_slice(space.shapes[block], space.settings, picks, {})


class Likelihood:
    """The log-probability of architectures, and the likeliest within a budget.

    scores: of each half's options, (options,). Where several combinations are the same option, as all of a half that is
    removed, the likeliest of them counts: having fewer choices left makes nothing likelier.
    """

    def __init__(self, halves: Halves, probabilities: Probabilities) -> None:
        self.halves = halves
        logs = [{name: log(p) for name, p in block.items()} for block in probabilities]
        (choice,) = halves.space.method.stage_choices
        self.stages: list[dict[int, float]] = []
        for stage in range(1 + halves.space.shapes[-1].stage):
            block = halves.priced.blocks_of(stage)[0]
            widths = map(int, halves.space.candidates[block][choice])
            self.stages.append(dict(zip(widths, logs[block][choice].tolist(), strict=True)))
        self.scores = [self._scores(half, logs[half // 2]) for half in range(len(halves))]

    def _scores(self, half: int, logs: Mapping[str, Floats]) -> Floats:
        joint = np.zeros(1)
        for name in self.halves.choices(half):
            joint = np.add.outer(joint, logs[name]).ravel()
        scores = np.full(len(self.halves.options(half)), -np.inf)
        np.maximum.at(scores, self.halves.option_of(half), joint)
        return scores

    def best(self, budget: float, most: int, band: float = BAND) -> list[tuple[list[Picks], Selection]]:
        """The likeliest within the budget at each of several combinations of stage widths, likeliest first.

        Solved exactly in the order of their relaxations, until no other of them can be among so many. All lie in the
        band of `select`, or none does.
        """
        low, high = cost_band(self.halves.priced.full, budget, band)
        for floor in (low, 0):
            found: list[tuple[float, list[Picks], Selection]] = []
            for bound, widths in self._promising(floor, high):
                if len(found) >= most and found[most - 1][0] >= bound:
                    break
                solved = self._solved(budget, widths, floor, band)
                found += [solved] if solved is not None and solved[2].cost >= floor else []
                found.sort(key=lambda each: -each[0])
            if found:
                break
        return [(picks, selection) for _, picks, selection in found[:most]]

    def near(self, budget: float) -> list[Picks]:
        """The likeliest at the likeliest combination of stage widths that has any in the band, else below it."""
        low, high = cost_band(self.halves.priced.full, budget)
        for floor in (low, 0):
            for widths in self._combinations():
                if self._relaxed(widths, floor, high) is not None:
                    solved = self._solved(budget, widths, floor, BAND)
                    if solved is not None and solved[2].cost >= floor:
                        return solved[1]
        raise RuntimeError("no architecture was found although the budget can be reached")

    def _combinations(self) -> Iterator[tuple[int, ...]]:
        """Stage widths, the likeliest first, so many; then the narrowest."""
        narrowest = tuple(self.halves.widths(stage)[0] for stage in range(len(self.stages)))
        return chain(islice(likeliest(self.stages), LOOKED_AT), [narrowest])

    def _promising(self, low: int, high: int) -> list[tuple[float, tuple[int, ...]]]:
        """Combinations of stage widths and the most that the score of one of such a price can be, highest first.

        The bound lets the limits of other prices be: it is still one.
        """
        found: dict[tuple[int, ...], float] = {}
        for widths in self._combinations():
            bound = self._relaxed(widths, low, high)
            if bound is not None:
                found[widths] = self._of_widths(widths) - bound.loss
            if len(found) == PROMISING:
                break
        return sorted(((bound, widths) for widths, bound in found.items()), reverse=True)

    def _of_widths(self, widths: Sequence[int]) -> float:
        return sum(stage[width] for stage, width in zip(self.stages, widths, strict=True))

    def _costs(self, widths: Sequence[int]) -> list[Costs]:
        halves = self.halves
        return [halves.costs(half, widths[halves.stage(half)]) for half in range(len(halves))]

    def _relaxed(self, widths: Sequence[int], low: int, high: int) -> Relaxed | None:
        """None where no architecture of these stage widths is within the band, or within the limits."""
        if not self.halves.may_fit(widths):
            return None
        outer = self.halves.outer(widths)
        return relaxed(self._costs(widths), [-scores for scores in self.scores], high - outer, low - outer)

    def _solved(
        self, budget: float, widths: tuple[int, ...], floor: int, band: float
    ) -> tuple[float, list[Picks], Selection] | None:
        """The likeliest at these stage widths, among few options: those that no better one can have are left out.

        None where the limits of several prices leave no architecture.
        """
        halves, full = self.halves, self.halves.priced.full
        high, costs = cost_band(full, budget)[1], self._costs(widths)
        relaxation = self._relaxed(widths, floor, high)
        assert relaxation is not None
        excess = [relaxation.excess(c, -scores) for c, scores in zip(costs, self.scores, strict=True)]
        widest, within = max(float(each.max()) for each in excess), 1.0
        while True:
            offered = [np.flatnonzero(each <= within).tolist() for each in excess]
            problem, gap = halves.problem(widths, offered, self.scores), 2 * within
            if reachable(problem, high):
                chosen = select(problem, full, budget, band)
                options = tuple(offered[half][pick] for half, pick in enumerate(chosen.picks))
                score = float(sum(self.scores[half][option] for half, option in enumerate(options)))
                if chosen.cost >= floor:
                    gap = -score - relaxation.loss
                if gap <= within or within >= widest:
                    found = Selection(options, chosen.cost, chosen.in_band)
                    return self._of_widths(widths) + score, halves.picks(widths, options), found
            elif within >= widest:
                return None
            within = max(gap, 2 * within)


def log(p: Tensor) -> Floats:
    """Log-probabilities, finite ones."""
    found: Floats = p.detach().double().clamp_min(1e-300).log().cpu().numpy()
    return found


def likeliest(stages: Sequence[Mapping[int, float]]) -> Iterator[tuple[int, ...]]:
    """Combinations of one width of each stage by falling sum of their scores; of equals the narrower first."""
    rows = [[width for _, width in sorted((-score, width) for width, score in stage.items())] for stage in stages]

    def entry(places: tuple[int, ...]) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
        widths = tuple(row[k] for row, k in zip(rows, places, strict=True))
        return -math.fsum(stage[w] for stage, w in zip(stages, widths, strict=True)), widths, places

    heap, seen = [entry((0,) * len(rows))], {(0,) * len(rows)}
    while heap:
        _, widths, places = heapq.heappop(heap)
        yield widths
        for stage, row in enumerate(rows):
            further = (*places[:stage], places[stage] + 1, *places[stage + 1 :])
            if further[stage] < len(row) and further not in seen:
                seen.add(further)
                heapq.heappush(heap, entry(further))
