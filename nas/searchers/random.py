"""The search at random (section 2.12): what no other search may fall below."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from nas.machine.ranges import at_least_one
from nas.searchers.measure import Ruler, key_of
from nas.searchers.measured import Explorer, Measured
from nas.searchers.options import RandomOptions, SearchOptions, SpreadOptions
from nas.searchers.repair import Repair
from nas.searchers.searcher import Question, Run
from search_spaces.method import Method, Picks


class Random(Measured):
    """Architectures drawn by nni.mutable and repaired to the budget, each measured, the best taken."""

    name: ClassVar[str] = "random"
    untrained: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"epochs": 0, "candidates": 64}

    def owned(self, method: Method) -> tuple[type, ...]:
        return (*super().owned(method), RandomOptions, SpreadOptions)

    def check(self, options: SearchOptions, question: Question) -> None:
        at_least_one(options, "candidates")
        super().check(options, question)

    def most(self, options: SearchOptions) -> int:
        assert options.candidates is not None
        return options.candidates

    def explorers(self, run: Run, budgets: Sequence[float]) -> Sequence[Explorer]:
        priced, options = run.question.priced, run.options
        return [
            partial(drawn_and_measured, Repair(priced, budget, options.seed), self.most(options)) for budget in budgets
        ]


def drawn_and_measured(repair: Repair, most: int, measure: Ruler, facts: Mapping[str, Any]) -> None:
    """So many architectures, each measured once; fewer where the budget leaves fewer."""
    drawn: dict[str, Sequence[Picks]] = {}
    while len(drawn) < most:
        picks = repair.new(repair.draw, drawn.keys())
        if picks is None:
            print(f"no more than {len(drawn)} architectures were found at budget {repair.budget:.4g}")
            break
        drawn[key_of(picks)] = picks
    measure.ahead([*drawn.values()])
    for each in drawn.values():
        measure(each, facts)
