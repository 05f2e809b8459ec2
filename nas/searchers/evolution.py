"""The search by evolution (section 2.12): mutation and crossover on the labels of nni.mutable, every child measured.

Parents are the best quarter that was measured so far. A child takes every choice from one of two parents, or is one
parent with a few choices drawn anew, likelier near than far; then it is repaired to the budget as a draw is. Nothing
but the seed and what was measured decides what comes next, so that a resumed search repeats its way along
candidates.csv and goes on where that ends.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from nas.machine.ranges import at_least_one
from nas.searchers.importance import Importance
from nas.searchers.measure import Ruler, key_of
from nas.searchers.measured import Explorer, Measured
from nas.searchers.options import EvolutionOptions, ImportanceOptions, SearchOptions, SpreadOptions
from nas.searchers.repair import Repair, Sample
from nas.searchers.searcher import Question, Run
from nas.searchers.start import by_blocks
from search_spaces.errors import UserError
from search_spaces.method import Candidate, Method, Picks

PARENTS = 0.25  # of all that were measured
NEAR = 1 / 8  # of a choice's list: how far a mutation goes, by its exponential


class Evolution(Measured):
    """Generations of architectures within the budget, beginning with the solution by importance."""

    name: ClassVar[str] = "evolution"
    starts: ClassVar[bool] = True
    untrained: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "epochs": 0, "start": "importance", "population": 32, "generations": 7, "mutate": 0.1,
    }  # fmt: skip

    def owned(self, method: Method) -> tuple[type, ...]:
        return (
            *super().owned(method),
            EvolutionOptions,
            SpreadOptions,
            *((ImportanceOptions,) if method.halves else ()),
        )

    def check(self, options: SearchOptions, question: Question) -> None:
        at_least_one(options, "generations")
        if options.population is not None and options.population < 2:
            raise UserError(f"--population {options.population}; expected at least 2, for children have two parents")
        if options.mutate is not None and not 0 < options.mutate <= 1:
            raise UserError(f"--mutate {options.mutate}; expected a probability above 0, at most 1")
        super().check(options, question)

    def most(self, options: SearchOptions) -> int:
        assert options.population is not None and options.generations is not None
        return options.population * (1 + options.generations)

    def explorers(self, run: Run, budgets: Sequence[float]) -> Sequence[Explorer]:
        priced, options = run.question.priced, run.options
        return [
            partial(evolved, Repair(priced, budget, options.seed), options, start)
            for budget, start in zip(budgets, starts_of(run, budgets), strict=True)
        ]


def starts_of(run: Run, budgets: Sequence[float]) -> Sequence[Explorer]:
    """What measures the solution by importance at each budget, or nothing."""
    options, question = run.options, run.question
    if options.start != "importance":
        return [lambda measure, facts: None for _ in budgets]
    if question.priced.space.method.halves:
        evals = min(options.evals or 1, options.population or 1)
        return Importance().explorers(replace(run, options=replace(options, evals=evals)), budgets)
    asked = [replace(run, question=replace(question, budget=budget)) for budget in budgets]
    return [partial(one, by_blocks(each).picks) for each in asked]


def one(picks: Sequence[Picks], measure: Ruler, facts: Mapping[str, Any]) -> None:
    """Measure one architecture."""
    measure(picks, facts)


def evolved(repair: Repair, options: SearchOptions, start: Explorer, measure: Ruler, facts: Mapping[str, Any]) -> None:
    """The generations of one budget; candidates.csv says of every candidate where it came from."""
    assert options.population is not None and options.generations is not None and options.mutate is not None
    herd = Herd(repair, measure, options.mutate)
    start(herd, {**facts, "generation": 0, "origin": "importance"})
    for generation in range(1 + options.generations):
        children = herd.children("random" if generation == 0 else None, options.population * (1 + generation))
        measure.ahead([picks for picks, _ in children.values()])
        for picks, origin in children.values():
            herd(picks, {**facts, "generation": generation, "origin": origin})
        if len(herd.measured) < options.population * (1 + generation):
            print(f"no more than {len(herd.measured)} architectures were found at budget {repair.budget:.4g}")
            return


class Herd:
    """What was measured at one budget, and the children that come of it."""

    def __init__(self, repair: Repair, measure: Ruler, mutate: float) -> None:
        self.repair, self.measure, self.mutate = repair, measure, mutate
        self.measured: dict[str, tuple[float, Sequence[Picks]]] = {}

    def __call__(self, picks: Sequence[Picks], facts: Mapping[str, Any]) -> float:
        value = self.measure(picks, facts)
        self.measured[key_of(picks)] = value, picks
        return value

    def ahead(self, candidates: Sequence[Sequence[Picks]]) -> None:
        self.measure.ahead(candidates)

    def children(self, origin: str | None, number: int) -> dict[str, tuple[Sequence[Picks], str]]:
        """A generation, by its picks: as many as are new until `number` are known, and where each comes from.

        origin: None: of the best in turn by crossover and by mutation.
        """
        parents, born = self.parents(), dict[str, tuple[Sequence[Picks], str]]()
        while (known := len(self.measured) + len(born)) < number:
            way = origin or ("crossover", "mutation")[known % 2]
            picks = self.repair.new(partial(self.child, way, parents), self.measured.keys() | born.keys())
            if picks is None:
                break
            born[key_of(picks)] = picks, way
        return born

    def parents(self) -> list[Sample]:
        """The best, by the labels of their choices; of equals the first."""
        ranked = sorted(self.measured.values(), key=lambda each: each[0])
        return [self.repair.sample_of(picks) for _, picks in ranked[: max(2, math.ceil(PARENTS * len(ranked)))]]

    def child(self, origin: str, parents: Sequence[Sample]) -> Sample:
        """A draw, as yet without a price."""
        random = self.repair.random
        if origin == "random":
            return self.repair.draw()
        mother, father = (parents[random.randint(len(parents))] for _ in range(2))
        if origin == "mutation":
            return self.mutation(mother)
        return {label: (mother, father)[random.randint(2)][label] for label in mother}

    def mutation(self, parent: Sample) -> Sample:
        """A parent, some of its choices drawn anew by nni.mutable, its own candidates left out."""
        random, child = self.repair.random, dict(parent)
        for label, choice in self.repair.choices.items():
            if len(choice.values) > 1 and random.uniform() < self.mutate:
                drawn: dict[str, Candidate] = {}
                near(choice, parent[label]).random(drawn, random)
                child |= drawn
        return child


def near(choice: Any, own: Candidate) -> Any:
    """nni's Categorical of the same label, its own candidate never drawn, others the likelier the nearer they are."""
    from nni.mutable import Categorical

    places = np.arange(len(choice.values))
    weights = np.exp(-np.abs(places - choice.values.index(own)) / max(1.0, NEAR * len(places)))
    weights[choice.values.index(own)] = 0.0
    return Categorical(choice.values, weights=(weights / weights.sum()).tolist(), label=choice.label)
