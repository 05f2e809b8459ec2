"""The best architecture that fits a budget: exact selection by integer programming (section 2.6).

One binary x per (block, candidate). Stage widths are maxima over a stage's picks and patch merging depends on
neighbouring widths, so a unit flow runs through a layered graph of nodes (stage, width) which, with its edges, carries
the costs of stem, merging and classifier. Every price has a row of its own (section 2.13). The solver works in floats
and only proposes: what counts is checked in integers, and a proposal that fails is forbidden and the program solved
again.

Ties. Scores are compared in whole steps of 1e-6, about what float32 logits resolve, so that "equal" means
equal and not the order of a sum. Among architectures of equal score the lexicographically smallest picks win:
the first block takes the earliest candidate of its list that it can, then the second block, and so on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from nas.prices.flops import FLOPS
from nas.prices.options import BAND
from nas.prices.price import Outside, Price
from search_spaces.errors import UserError

SCORE_STEP = 1e-6
ROW_LIMIT = 1e5  # largest coefficient handed to HiGHS, whose tolerances (1e-7 to 1e-6) are absolute
RADIX_LIMIT = 4096  # largest lexicographic weight of one program: an exact order well inside those tolerances


@dataclass(frozen=True)
class KnapsackItem:
    """One way to take one block: what a knapsack may pack.

    cost: of the block. width: stream channels it reads and writes. score: its log softmax(eta).
    """

    cost: int
    width: int
    score: float


@dataclass(frozen=True)
class Limit:
    """Another price that may not be above `most`. costs: of every item of every block; outer: outside the blocks.

    words: of the limit, as they are typed.
    """

    costs: tuple[tuple[int, ...], ...]
    outer: Outside
    most: int
    words: str = "another limit"

    def cost(self, picks: Sequence[int], widths: Sequence[int]) -> int:
        """Of the whole network when block b takes item picks[b], at its stage widths; exact."""
        return sum(block[pick] for block, pick in zip(self.costs, picks, strict=True)) + self.outer.at(widths)


@dataclass(frozen=True)
class SelectionProblem:
    """What a selection needs to know: every block's candidates and what the stage widths cost.

    stages: the stage of each block, non-decreasing from 0. outer: the cost of stem, merging and classifier.
    fixed_widths: the stage widths, where they do not follow the picks (`--stage-width full`).
    whole: the price of the network itself, where one of the architectures is that. Its cost here may be above it: a
    rotated stage counts as cut (section 2.7).
    limits: of other prices.
    """

    blocks: tuple[tuple[KnapsackItem, ...], ...]
    stages: tuple[int, ...]
    outer: Outside
    fixed_widths: tuple[int, ...] | None = None
    whole: int | None = None
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks or not all(self.blocks) or len(self.blocks) != len(self.stages):
            raise ValueError(f"{len(self.blocks)} blocks, one of them empty, or {len(self.stages)} stages")
        if list(self.stages) != sorted(self.stages) or set(self.stages) != set(range(self.num_stages)):
            raise ValueError(f"stages must rise from 0 without a gap: {self.stages}")
        if any(outer.num_stages != self.num_stages for outer in (self.outer, *(each.outer for each in self.limits))):
            raise ValueError(f"{self.outer.num_stages - 1} patch mergings for {self.num_stages} stages")
        if any([len(row) for row in each.costs] != [len(block) for block in self.blocks] for each in self.limits):
            raise ValueError("a limit does not price every item")
        if self.fixed_widths is not None and len(self.fixed_widths) != self.num_stages:
            raise ValueError(f"{len(self.fixed_widths)} fixed widths for {self.num_stages} stages")
        if not all(math.isfinite(candidate.score) for block in self.blocks for candidate in block):
            raise ValueError("a candidate's score is not finite")

    @property
    def num_stages(self) -> int:
        return self.stages[-1] + 1

    def stage_widths(self, picks: Sequence[int]) -> tuple[int, ...]:
        """Stream channels that exist in each stage: the widest pick, or the fixed widths."""
        if self.fixed_widths is not None:
            return self.fixed_widths
        widths = [0] * self.num_stages
        for stage, block, pick in zip(self.stages, self.blocks, picks, strict=True):
            widths[stage] = max(widths[stage], block[pick].width)
        return tuple(widths)

    def cost(self, picks: Sequence[int]) -> int:
        """Of the whole network when block b takes item picks[b]; exact."""
        total = sum(block[pick].cost for block, pick in zip(self.blocks, picks, strict=True))
        return total + self.outer.at(self.stage_widths(picks))

    def within_limits(self, picks: Sequence[int]) -> bool:
        """Whether every other price is within its limit; exact."""
        widths = self.stage_widths(picks) if self.limits else ()
        return all(limit.cost(picks, widths) <= limit.most for limit in self.limits)


@dataclass(frozen=True)
class Selection:
    """The chosen item of each block, the network's exact cost, and whether it lies in the band asked for."""

    picks: tuple[int, ...]
    cost: int
    in_band: bool


def reachable_range(problem: SelectionProblem) -> tuple[int, int]:
    """The least and the most that any architecture costs, be it within the limits of other prices or not.

    Exactly: a shortest path through stage widths.
    """
    return _extreme(problem, 1), -_extreme(problem, -1)


def check_budget(problem: SelectionProblem, full: int, budget: float, price: Price = FLOPS) -> None:
    """Refuse a budget that nothing can meet; cheap, so that a search can ask before it trains.

    full: the backbone's price. budget: a fraction of it. Raises UserError.
    """
    if not 0 < budget <= 1:
        raise UserError(f"budget {budget:g}: expected a fraction of the backbone's {price.words}, above 0, at most 1")
    low, high = reachable_range(problem)
    if problem.whole is not None:
        high = min(high, problem.whole)  # no budget asks for more than the network
    if low > _exact(budget) * full:
        smallest = math.ceil(Fraction(low, full) * 10_000) / 10_000  # up: what we name must work
        raise UserError(
            f"budget {budget:g} ({budget * full / price.scale:.4g} {price.unit}) cannot be met: this search space "
            f"reaches {smallest:.4f} to {high / full:.4f} of the backbone "
            f"({low / price.scale:.4g} to {high / price.scale:.4g} {price.unit}); ask for at least {smallest:.4f}"
        )
    if problem.limits and not reachable(problem, cost_band(full, budget)[1]):
        raise not_together(problem, budget, price)


def not_together(problem: SelectionProblem, budget: float, price: Price) -> UserError:
    """The error where a budget and the limits of other prices leave nothing."""
    also = " and ".join(limit.words for limit in problem.limits)
    return UserError(
        f"budget {budget:g} of the {price.words} cannot be met together with {also}: no architecture of this search"
        " space is within all of them; allow more"
    )


def reachable(problem: SelectionProblem, most: int) -> bool:
    """Whether some architecture costs no more and is within every limit of other prices."""
    least = reachable_range(problem)[0]
    if not problem.limits or least > most:
        return least <= most
    return _Program(problem, least, most).any()


def select(problem: SelectionProblem, full: int, budget: float, band: float = BAND) -> Selection:
    """The architecture of highest total score with (budget - band) * full <= F <= budget * full.

    If none lies in the band, the best with F <= budget * full, and in_band is False. Never above.
    full: the backbone's price. Budget and band are read as the decimals they print as: 0.3 of 10
    is 3. Ties go by the rule at the top of this file. Raises UserError when every architecture is above the
    budget, with the range that can be reached.
    """
    return finalists(problem, full, budget, band, most=1)[0]


def finalists(
    problem: SelectionProblem, full: int, budget: float, band: float = BAND, most: int = 16
) -> list[Selection]:
    """The best architecture of each combination of stage widths, highest score first, at most `most` of them.

    Arguments, band and errors as in `select`; all lie in the band, or none does. A score is a sum over blocks and
    knows nothing of what a narrower stage does to the whole network: these are what is worth measuring.
    """
    check_budget(replace(problem, limits=()), full, budget)
    low, high = cost_band(full, budget, band)
    for floor in (low, 0):
        found: list[Selection] = []
        while len(found) < most:
            picks = _Program(problem, floor, high, [problem.stage_widths(s.picks) for s in found]).best()
            if picks is None:
                break
            cost = problem.cost(picks)
            found.append(Selection(picks, cost, in_band=cost >= low))
            if problem.fixed_widths is not None:
                break
        if found:
            return found
    if problem.limits:
        raise not_together(problem, budget, FLOPS)
    raise RuntimeError("the solver found no architecture although the budget can be reached")


def cost_band(full: int, budget: float, band: float = BAND) -> tuple[int, int]:
    """The least and the most from (budget - band) to budget, as fractions of the backbone's price."""
    return math.ceil((_exact(budget) - _exact(band)) * full), math.floor(_exact(budget) * full)


def _exact(fraction: float) -> Fraction:
    return Fraction(repr(float(fraction)))


def _nodes(problem: SelectionProblem, stage: int) -> list[int]:
    """The widths a stage can have: candidates' widths that no block's narrowest candidate exceeds."""
    if problem.fixed_widths is not None:
        return [problem.fixed_widths[stage]]
    blocks = [block for block, s in zip(problem.blocks, problem.stages, strict=True) if s == stage]
    narrowest = max(min(candidate.width for candidate in block) for block in blocks)
    return sorted({c.width for block in blocks for c in block if c.width >= narrowest})


def _extreme(problem: SelectionProblem, sign: int) -> int:
    """The least sign * F over all architectures, in integers."""
    outer = problem.outer

    def blocks_at(stage: int, width: int) -> int:
        blocks = [block for block, s in zip(problem.blocks, problem.stages, strict=True) if s == stage]
        if problem.fixed_widths is not None:
            return sum(min(sign * c.cost for c in block) for block in blocks)
        total, extra = 0, []  # extra: what it costs that this block is the one as wide as the stage
        for block in blocks:
            least = min(sign * c.cost for c in block if c.width <= width)
            extra += [sign * c.cost - least for c in block if c.width == width]
            total += least
        return total + min(extra)

    costs = {  # width of the current stage -> least cost up to and including its blocks
        w: sign * outer.of_stage(0, w) + blocks_at(0, w) for w in _nodes(problem, 0)
    }
    for stage in range(1, problem.num_stages):
        costs = {
            w: blocks_at(stage, w)
            + sign * outer.of_stage(stage, w)
            + min(cost + sign * outer.of_merging(stage - 1, v, w) for v, cost in costs.items())
            for w in _nodes(problem, stage)
        }
    return sign * outer.constant + min(costs.values())


@dataclass
class _Row:
    """One price in the program, low <= F <= high (None: no least). costs: of every variable, as they are added."""

    outer: Outside
    low: int | None
    high: int
    costs: list[int] = field(default_factory=list)


class _Program:
    """The integer program of one band low <= F <= high, and the architectures it has been forbidden.

    Variables: first x per (block, candidate), then a flow per (stage, width) and a flow per pair of widths of
    neighbouring stages. Only x needs to be integer: it forces the flow.
    """

    def __init__(self, problem: SelectionProblem, low: int, high: int, without: Sequence[tuple[int, ...]] = ()) -> None:
        """without: combinations of stage widths that are not to be taken, where widths follow the picks."""
        self.problem, self.low, self.high = problem, low, high
        sizes = [len(block) for block in problem.blocks]
        self.first = [sum(sizes[:b]) for b in range(len(sizes))]  # index of each block's first x
        self.num_x = sum(sizes)
        self.scores = self._integer_scores()
        bounds = [(limit.outer, None, limit.most) for limit in problem.limits]
        self.prices = [_Row(*each) for each in [(problem.outer, low, high), *bounds]]
        self.prices[0].costs = [c.cost for block in problem.blocks for c in block]
        for price, limit in zip(self.prices[1:], problem.limits, strict=True):
            price.costs = [cost for block in limit.costs for cost in block]
        self.size = self.num_x  # variables; grows by the flow
        self.rows: list[tuple[dict[int, float], float, float]] = []  # coefficients, lower and upper bound
        for first, size in zip(self.first, sizes, strict=True):
            self.rows.append((dict.fromkeys(range(first, first + size), 1.0), 1, 1))
        if problem.fixed_widths is None:
            self._add_flow(without)
        for price in self.prices:
            fixed = problem.fixed_widths
            self._add_band(price, price.outer.constant if fixed is None else price.outer.at(fixed))

    def any(self) -> bool:
        """Whether there is an architecture in the band."""
        return self._solve([0] * self.num_x) is not None

    def best(self) -> tuple[int, ...] | None:
        """The picks of highest score in the band, ties by the fixed rule; None if the band is empty."""
        picks = self._solve(self.scores)
        if picks is None:
            return None
        rows = len(self.rows)
        while True:  # is there another as good? Usually not, and the proof takes one more program
            self.rows[rows:] = [self._all_but(picks)]
            other = self._solve(self.scores)
            if other is None or self._score(other) < self._score(picks):
                return picks
            if self._score(other) == self._score(picks):
                break
            picks = other  # the solver's gap had hidden a better one
        self.rows[rows:] = [self._at_least(self._score(picks))]
        return self._first_in_order()

    def _first_in_order(self) -> tuple[int, ...]:
        """The lexicographically smallest picks the rows allow, a few blocks at a time."""
        sizes = [len(block) for block in self.problem.blocks]
        start = 0
        while True:
            stop, radix = start + 1, 1  # as many blocks as one exact order holds
            while stop < len(sizes) and radix * math.prod(sizes[start : stop + 1]) <= RADIX_LIMIT:
                stop += 1
            order = [0] * self.num_x
            for b in reversed(range(start, stop)):
                for pick in range(sizes[b]):
                    order[self.first[b] + pick] = -radix * pick
                radix *= sizes[b]
            picks = self._solve(order)
            if picks is None:
                raise RuntimeError("the solver lost the best architecture while ordering its equals")
            if stop == len(sizes):
                return picks
            self.rows += [({self.first[b] + picks[b]: 1.0}, 1, 1) for b in range(start, stop)]
            start = stop

    def _solve(self, gains: Sequence[int]) -> tuple[int, ...] | None:
        """Picks that maximise the sum of gains (one per x) under the rows; None if there are none."""
        size = self.size
        cost: NDArray[np.float64] = np.zeros(size)
        cost[: self.num_x] = -np.array(gains, dtype=np.float64) * _scale(gains)
        integrality = (np.arange(size) < self.num_x).astype(int)
        forbidden: list[tuple[dict[int, float], float, float]] = []
        while True:
            rows = self.rows + forbidden
            entries = [(r, column, value) for r, row in enumerate(rows) for column, value in row[0].items()]
            r, columns, values = zip(*entries, strict=True)
            matrix = csr_array((values, (r, columns)), shape=(len(rows), size))
            result = _milp(
                cost, integrality, LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows])
            )
            if result.status == 2:
                return None
            if result.x is None or result.status != 0:
                raise RuntimeError(f"the integer program was not solved: {result.message}")
            picks = tuple(
                int(np.argmax(result.x[first : first + len(block)]))
                for first, block in zip(self.first, self.problem.blocks, strict=True)
            )
            if self.low <= self.problem.cost(picks) <= self.high and self.problem.within_limits(picks):
                return picks
            forbidden.append(self._all_but(picks))  # within the solver's tolerance, not within the band

    def _score(self, picks: Sequence[int]) -> int:
        return sum(self.scores[first + pick] for first, pick in zip(self.first, picks, strict=True))

    def _integer_scores(self) -> list[int]:
        """Each candidate's score below its block's best, in whole steps."""
        blocks = [[c.score for c in block] for block in self.problem.blocks]
        spread = max(max(scores) - min(scores) for scores in blocks)
        step = max(SCORE_STEP, spread * 1e-9)  # logits that ran away: what the solver can still resolve
        return [round((score - max(scores)) / step) for scores in blocks for score in scores]

    def _all_but(self, picks: Sequence[int]) -> tuple[dict[int, float], float, float]:
        """The row that forbids exactly these picks."""
        chosen = [first + pick for first, pick in zip(self.first, picks, strict=True)]
        return dict.fromkeys(chosen, 1.0), 0, len(chosen) - 1

    def _at_least(self, score: int) -> tuple[dict[int, float], float, float]:
        scale = _scale(self.scores)
        row = {column: value * scale for column, value in enumerate(self.scores) if value}
        return row or {0: 0.0}, (score - 0.5) * scale, math.inf

    def _add_band(self, price: "_Row", base: int) -> None:
        """The row of one price; base: what it costs whatever is picked."""
        # Costs share large factors (tokens, head widths); divided out, the row is often small integers. The
        # half step on either side keeps the solver from losing an architecture exactly on the budget.
        factor = math.gcd(*price.costs) or 1
        steps = [cost // factor for cost in price.costs]
        scale = _scale(steps)
        row = {column: value * scale for column, value in enumerate(steps) if value}
        least = -math.inf if price.low is None else -((base - price.low) // factor)
        most = (price.high - base) // factor
        self.rows.append((row or {0: 0.0}, (least - 0.5) * scale, (most + 0.5) * scale))

    def _add_flow(self, without: Sequence[tuple[int, ...]]) -> None:
        problem = self.problem
        nodes: list[dict[int, int]] = []  # per stage, width -> index of its flow
        for stage in range(problem.num_stages):
            possible = _nodes(problem, stage)
            nodes.append({w: self.size + i for i, w in enumerate(possible)})
            self.size += len(possible)
            for price in self.prices:
                price.costs += [price.outer.of_stage(stage, w) for w in possible]
            self.rows.append((dict.fromkeys(nodes[-1].values(), 1.0), 1, 1))
        for widths in without:
            taken = [nodes[stage][width] for stage, width in enumerate(widths)]
            self.rows.append((dict.fromkeys(taken, 1.0), 0, len(taken) - 1))
        for stage in range(problem.num_stages - 1):
            left = {w: ({node: -1.0}, 0.0, 0.0) for w, node in nodes[stage].items()}
            right = {w: ({node: -1.0}, 0.0, 0.0) for w, node in nodes[stage + 1].items()}
            for v in left:
                for w in right:
                    left[v][0][self.size] = right[w][0][self.size] = 1.0
                    self.size += 1
                    for price in self.prices:
                        price.costs.append(price.outer.of_merging(stage, v, w))
            self.rows += [*left.values(), *right.values()]
        widest: list[dict[int, dict[int, float]]] = [{w: {n: -1.0} for w, n in at.items()} for at in nodes]
        for first, block, stage in zip(self.first, problem.blocks, problem.stages, strict=True):
            for i, candidate in enumerate(block):
                if candidate.width in widest[stage]:
                    widest[stage][candidate.width][first + i] = 1.0
            for width in nodes[stage]:  # a pick wider than this needs a stage wider than this
                wider = {first + i: 1.0 for i, c in enumerate(block) if c.width > width}
                flow = {node: -1.0 for w, node in nodes[stage].items() if w > width}
                if wider:
                    self.rows.append((wider | flow, -math.inf, 0))
        for at in widest:  # a stage is no wider than its widest pick, which the band's lower end would like
            self.rows += [(row, 0, math.inf) for row in at.values()]


def _milp(cost: NDArray[np.float64], integrality: NDArray[np.int_], constraints: LinearConstraint) -> Any:
    """HiGHS on variables in [0, 1]. What its presolve gives up (status 4) or takes for infeasible (2) goes without:
    both were seen of small feasible programs.
    """
    for presolve in (True, False):
        options = {"mip_rel_gap": 0, "presolve": presolve}
        result = milp(cost, integrality=integrality, bounds=Bounds(0, 1), constraints=constraints, options=options)
        if result.status not in (2, 4):
            break
    return result


def _scale(values: Sequence[int]) -> float:
    """The factor that brings integer coefficients into the solver's range."""
    return min(1.0, ROW_LIMIT / max(1, *map(abs, values)))
