"""Where a search by gradient begins from trained weights under a budget: at the solution by importance (section 2.10).

The solution is made likely: each of its candidates has probability 0.6, the others less the farther they are from it.
How far is a matter of score: what an option loses, and what it costs at the price at which E[F] is the budget; for a
stage's width how much of its stream lies between. A solution by halves is measured; one by blocks is that of the
program over Taylor scores, or over magnitudes where the classifier is new. The multiplier of the budget begins at what
the solution loses for each share of the price that it saves: KL(large || solution as cut) / (1 - F/F_full).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.machine.distributed import on_main
from nas.machine.files import write_json
from nas.prices.relaxation import Costs, Floats, relaxed
from nas.prices.selection import cost_band, select
from nas.searchers.gradient import Gradient, Solution
from nas.searchers.importance import TAYLOR_IMAGES, Importance
from nas.searchers.losses import slice_losses, tails
from nas.searchers.searcher import Run
from nas.searchers.supernet_search import Search
from nas.training.calibration import calibration_images, to_score
from nas.training.state import CHECKPOINT
from search_spaces.errors import UserError
from search_spaces.method import Candidate, Picks
from supernets.importance import magnitude_scores, taylor_pass
from supernets.supernet import Supernet

START = "start.json"
LIKELY = 0.6  # of a candidate of the solution
FARTHEST = 20.0  # nats that the logit of another may lie below it
BY_RANK = 1e-2  # of the largest distance, from the first candidate to the last: no two are equally far
FACTOR = 4.0  # of the shadow price, within which that is sought at which E[F] is the budget
LEAST_SAVED = 1e-2  # of the price, lest what is saved be divided by next to nothing
PRICED_IMAGES = 256  # on which the price is found


@dataclass(frozen=True)
class Together:
    """Choices whose candidates are weighed together: those of a block, or of one of its halves.

    losses, costs (options,). places: by a choice's label the place of its candidate in every option, (options,); own:
    in the solution; sizes: how many candidates.
    """

    losses: Floats
    costs: Costs
    places: Mapping[str, NDArray[np.int64]]
    own: Mapping[str, int]
    sizes: Mapping[str, int]

    def distances(self, price: float) -> dict[str, Floats]:
        """How far each candidate is from the solution's own, (candidates,): it is as good as its best option."""
        values, found = self.losses + price * self.costs, {}
        for label, places in self.places.items():
            best = np.full(self.sizes[label], np.inf)
            np.minimum.at(best, places, values)
            found[label] = apart(np.maximum(best - best[self.own[label]], 0.0), self.own[label])
        return found


@dataclass(frozen=True)
class Found:
    """A solution: its picks. price: of a unit of cost at its margin. stages: distances of the stages' widths."""

    picks: Sequence[Picks]
    price: float
    together: Sequence[Together]
    stages: Mapping[str, Floats]

    def probabilities(self, price: float) -> dict[str, list[float]]:
        """Of every choice's candidates, by its label."""
        distances = dict(self.stages)
        for each in self.together:
            distances |= each.distances(price)
        return {label: likely(own) for label, own in distances.items()}


def to_begin(run: Run, objective: Search) -> Gradient | None:
    """The objective, where it is to begin at a solution. UserError where that is asked for and cannot be."""
    start, trained = run.options.start, run.prepared.start.given()
    able = isinstance(objective, Gradient) and objective.may_begin
    if start == "importance" and not able:
        raise UserError(f"--start importance: {run.question.priced.space.name} chooses no widths; leave it out")
    if start == "importance" and not trained:
        raise UserError(
            "--start importance asks what trained weights can do without; give --checkpoint or --pretrained"
        )
    if start == "uniform" or not isinstance(objective, Gradient) or not able or not trained:
        return None
    return None if run.question.budget is None else objective


def begin(run: Run, objective: Gradient) -> None:
    """Put the objective where the solution is likely; start.json has it, and a resume reads that."""
    options, prepared = run.options, run.prepared
    path = prepared.folder / START
    if options.resume and on_main(path.is_file):
        objective.begin(Solution(**on_main(lambda: json.loads(path.read_text()))))
        return
    if options.resume and on_main((prepared.folder / CHECKPOINT).is_file):
        return  # it began without
    found = by_halves(run) if run.question.priced.space.method.halves else on_main(lambda: by_blocks(run))
    objective.to(prepared.device)

    def priced() -> Solution:
        probabilities = at_budget(objective, found)
        images = calibration_images(options, prepared, min(PRICED_IMAGES, prepared.plan.images))
        prepared.supernet.eval()
        whole = objective.costs.whole / objective.costs.full
        lost, saved = objective.divergence(found.picks, (x for x, _ in images)), whole - objective.share(found.picks)
        solution = Solution(found.picks, probabilities, lost / max(saved, LEAST_SAVED))
        write_json(path, asdict(solution))
        return solution

    objective.begin(on_main(priced))
    print(words(objective))


@torch.no_grad()
def at_budget(objective: Gradient, found: Found) -> dict[str, list[float]]:
    """Probabilities at the price at which E[F] is the budget, or the nearest, within FACTOR of the solution's own."""

    def above(price: float) -> bool:
        objective.choices.begin(found.probabilities(price))
        return float(objective.expected_fraction()) > (objective.budget or 0.0)

    low, high = found.price / FACTOR, found.price * FACTOR
    for _ in range(20):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if above(middle) else (low, middle)
    probabilities = found.probabilities(high)
    objective.choices.begin(probabilities)
    return probabilities


@torch.no_grad()
def words(objective: Gradient) -> str:
    """Where the search begins, in one line."""
    costs = objective.costs
    return (
        f"the search begins at the solution by importance, {LIKELY:.0%} of every choice: expected"
        f" {float(objective.expected_fraction()):.4f} of the {costs.price.words}, budget {objective.budget:.4g},"
        f" price {float(objective.multiplier):.3g} nats"
    )


def apart(distances: Floats, own: int) -> Floats:
    """Distances of candidates from their own one, the largest about 1; of equally far ones the nearer in rank is."""
    if len(distances) == 1:
        return np.zeros(1)
    ranks = np.abs(np.arange(len(distances)) - own) / (len(distances) - 1)
    return distances / (float(distances.max()) or 1.0) + BY_RANK * ranks


def likely(distances: Floats) -> list[float]:
    """Probabilities (candidates,) that fall exponentially with the distance from the one at 0, which has LIKELY."""
    low, high = 0.0, 1.0
    while len(distances) > 1 and _share(high * distances) < LIKELY:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share(middle * distances) < LIKELY else (low, middle)
    p = np.exp(-np.minimum(high * distances, FARTHEST))
    shares: list[float] = (p / p.sum()).tolist()
    return shares


def _share(nats: Floats) -> float:
    """The probability of the candidate at 0 nats."""
    return 1 / float(np.exp(-nats).sum())


def by_halves(run: Run) -> Found:
    """The solution of the searcher by importance, the price that of its program."""
    program, best = Importance().solution(run)
    halves, point, space = program.halves, best.point, run.question.priced.space
    totals, costs = program.totals(point), program.costs(point)
    limit = cost_band(halves.priced.full, program.budget)[1] - halves.outer(point.widths)
    together = []
    for half, (losses, cost) in enumerate(zip(totals, costs, strict=True)):
        block, options = half // 2, [option.picks for option in halves.options(half)]
        labels = {name: space.label(block, name) for name in halves.choices(half)}
        together.append(weighed(labels, space.candidates[block], options, (losses, cost), best.picks[block]))
    (choice,) = space.method.stage_choices
    lost, stages = stream_lost(run.prepared.supernet, {}), {}
    for stage, width in enumerate(point.widths):
        block = halves.priced.blocks_of(stage)[0]
        candidates = [int(w) for w in space.candidates[block][choice]]
        between = np.abs(lost[stage][candidates] - lost[stage][width])
        stages[space.label(block, choice)] = apart(between, candidates.index(width))
    return Found(best.picks, price_of(costs, totals, limit), together, stages)


def by_blocks(run: Run) -> Found:
    """The best of the exact program over what every option of a block leaves out."""
    priced, budget, supernet = run.question.priced, run.question.budget, run.prepared.supernet
    assert budget is not None
    scores, space = unit_scores(run), priced.space
    slices = [[option.slice for option in options] for options in priced.options]
    lost = stream_lost(supernet, scores)
    losses = slice_losses(supernet.adapter.block_names, supernet.shapes, slices, scores, lost)
    costs = [np.array([option.cost for option in options]) for options in priced.options]
    problem = priced.scored([(-each).tolist() for each in losses])
    chosen = select(problem, priced.full, budget, run.question.band)
    picks = [options[k].picks for options, k in zip(priced.options, chosen.picks, strict=True)]
    together = []
    for block, options in enumerate(priced.options):
        labels = {name: space.label(block, name) for name in space.candidates[block]}
        each = [option.picks for option in options]
        together.append(weighed(labels, space.candidates[block], each, (losses[block], costs[block]), picks[block]))
    outer = problem.outer.at(problem.stage_widths(chosen.picks))
    limit = cost_band(priced.full, budget)[1] - outer
    return Found(picks, price_of(costs, losses, limit), together, {})


def weighed(
    labels: Mapping[str, str],
    candidates: Mapping[str, Sequence[Candidate]],
    options: Sequence[Picks],
    values: tuple[Floats, Costs],
    taken: Picks,
) -> Together:
    """Choices, by their names, whose options have these losses and costs, one of which is taken."""
    own = {name: candidates[name].index(taken[name]) for name in labels}
    places = {name: np.array([candidates[name].index(option[name]) for option in options]) for name in labels}
    sizes = {label: len(candidates[name]) for name, label in labels.items()}
    by_label = {label: places[name] for name, label in labels.items()}
    return Together(*values, by_label, {label: own[name] for name, label in labels.items()}, sizes)


def price_of(costs: Sequence[Costs], losses: Sequence[Floats], limit: float) -> float:
    """Loss per unit of cost at the margin of a program that has a solution."""
    found = relaxed(costs, losses, limit)
    assert found is not None
    return found.price


def stream_lost(supernet: Supernet, scores: Mapping[str, Tensor]) -> dict[int, Floats]:
    """Of each stage the share of its stream beyond the first w channels: (E + 1,).

    Of the energy where the stream is rotated, of the scores where it is not, of the channels where there are none.
    """
    found = {}
    energy = {} if supernet.basis is None else supernet.basis.energy
    for shape in supernet.shapes:
        if shape.stage not in found:
            each = energy.get(shape.stage, scores.get(f"stream.{shape.stage}", torch.ones(shape.embed_dim)))
            lost = tails(each)
            found[shape.stage] = lost / max(lost[0], math.ulp(0.0))
    return found


def unit_scores(run: Run) -> dict[str, Tensor]:
    """Of heads, neurons and the stream's channels, by name as in importance.py."""
    options, prepared = run.options, run.prepared
    if prepared.fresh_classifier and options.supernet is None:
        return magnitude_scores(prepared.supernet)
    images = calibration_images(options, prepared, min(TAYLOR_IMAGES, prepared.plan.images))
    batches, loss = to_score(prepared.supernet, images, prepared.plan.labels, options.seed)
    return taylor_pass(prepared.supernet, batches, loss)
