"""Searches that compare measured architectures of a supernet, as it came or trained for them before (section 2.12).

The basis is found once, and one ruler serves every budget: what was measured on the way to one counts for all others.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from nas.machine.cluster import cluster
from nas.machine.distributed import is_main, on_main
from nas.machine.progress import counted
from nas.machine.timing import timed
from nas.prices.selection import check_budget, cost_band
from nas.searchers.measure import Candidate, Measure, Ruler, check_images, first_kept
from nas.searchers.options import DecideOptions, FrontOptions, SearchOptions, SupernetOptions
from nas.searchers.searcher import Answer, Question, Run, Searcher
from nas.searchers.supernets import check_supernet, defaults_with, trained_supernet, ways
from nas.training.basis import Standing, find_basis
from search_spaces.errors import UserError
from search_spaces.method import Method

Explorer = Callable[[Ruler, Mapping[str, Any]], object]  # the ruler, and what candidates.csv says of all candidates


class Measured(Searcher):
    """The best of what is measured, at one budget or at each of several."""

    measures: ClassVar[bool] = True
    may_score: ClassVar[bool] = False  # whether --decide score, which measures nothing, gives an answer

    def owned(self, method: Method) -> tuple[type, ...]:
        return DecideOptions, FrontOptions, SupernetOptions

    def defaults_of(self, options: SearchOptions) -> Mapping[str, Any]:
        return defaults_with(options, self.defaults)

    def check(self, options: SearchOptions, question: Question) -> None:
        check_supernet(options)
        if options.epochs and options.supernet is None:
            raise UserError(
                f"--epochs {options.epochs}: a search by {self.name} trains nothing; leave it out, or train the"
                f" supernet first ({ways()})"
            )
        if question.budget is None:
            raise UserError(f"--searcher {self.name} searches within a budget; give --budget, --gflops or --front")
        if not self.may_score and options.decide == "score":
            raise UserError("--decide score is of a search by importance; take --decide kl, top1 or loss")
        priced = question.priced
        for budget in options.front:
            check_budget(priced.uniform(), priced.full, budget, priced.price)
        super().check(options, question)

    def search(self, run: Run) -> Answer:
        assert run.question.budget is not None
        return self.front(run, [run.question.budget])[0]

    def front(self, run: Run, budgets: Sequence[float]) -> list[Answer]:
        """The best that was measured at each budget, from one basis and one ruler."""
        if self.compares(run.options):
            check_images(run.options, run.prepared, self.may_score)
        seconds: dict[str, float] = {}
        with cluster(run.options.ray_address if is_main() else None):
            with timed(seconds, "basis"):
                standing = find_basis(run.options, run.prepared)
            with timed(seconds, "supernet"):
                trained = trained_supernet(run)
            with timed(seconds, "candidates"):
                candidates = on_main(lambda: self.explored(run, budgets))
        return [
            replace(self.answer(run, budget, candidate, standing), seconds=seconds, trained=trained)
            for budget, candidate in zip(budgets, candidates, strict=True)
        ]

    def explored(self, run: Run, budgets: Sequence[float]) -> list[Candidate]:
        """The best at each budget, by process 0."""
        options, question = run.options, run.question
        with counted("candidates", self.most(options) * len(budgets)) as advance:
            measure = Measure(options, question.priced, run.prepared, advance)
            for budget, explore in zip(budgets, self.explorers(run, budgets), strict=True):
                explore(measure, {"budget": budget} if len(budgets) > 1 else {})
        print(measure.words())
        return [measure.best(cost_band(question.priced.full, budget)[1]) for budget in budgets]

    def compares(self, options: SearchOptions) -> bool:
        """Whether candidates are measured."""
        return options.decide != "score"

    @abstractmethod
    def most(self, options: SearchOptions) -> int:
        """How many candidates are measured at a budget, at most."""

    @abstractmethod
    def explorers(self, run: Run, budgets: Sequence[float]) -> Sequence[Explorer]:
        """What measures candidates at each budget."""

    def found(self, candidate: Candidate) -> dict[str, Any]:
        """What arch.json says of the result."""
        return {"value": finite(candidate.value)}

    def answer(self, run: Run, budget: float, candidate: Candidate, standing: Standing) -> Answer:
        """A candidate as the answer at a budget."""
        priced, picks = run.question.priced, [dict(pick) for pick in candidate.picks]
        in_band = candidate.price >= cost_band(priced.full, budget, run.question.band)[0]
        found, kept = self.found(candidate), first_kept(priced, picks)
        return Answer(picks, kept, in_band, standing, found, finite(candidate.value))


def finite(value: float) -> float | None:
    """What a file can hold of a measurement."""
    return value if math.isfinite(value) else None
