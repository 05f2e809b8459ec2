"""The searcher by importance (section 2.10): what units are worth, an exact program, a few measurements, no training.

Every candidate is refitted on some images and measured on others, which nothing else in the search looks at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from nas.machine.distributed import on_main
from nas.machine.progress import counted
from nas.prices.costs import PricedSpace
from nas.prices.halves import Halves
from nas.searchers.exchange import Program, Proposal, exchange, first_point
from nas.searchers.losses import losses_of
from nas.searchers.measure import Candidate, Measure, Ruler, check_images, subnet_of
from nas.searchers.measured import Explorer, Measured
from nas.searchers.options import ImportanceOptions, SearchOptions
from nas.searchers.searcher import Question, Run
from nas.training.basis import lost_as_it_stands
from nas.training.calibration import calibration_images, to_score
from nas.training.prepared import Prepared
from search_spaces.errors import UserError
from search_spaces.method import Method
from supernets.importance import taylor_lost, taylor_pass

TAYLOR_IMAGES = 1024


class Importance(Measured):
    """Half by half what is lost, the exact program at a few stage widths and weights, the best by measurement."""

    name: ClassVar[str] = "importance"
    may_score: ClassVar[bool] = True

    def owned(self, method: Method) -> tuple[type, ...]:
        return (*super().owned(method), *((ImportanceOptions,) if method.halves else ()))

    def check(self, options: SearchOptions, question: Question) -> None:
        if not question.priced.space.method.halves:
            raise UserError(f"--searcher {self.name}: {question.priced.space.name} does not choose by halves")
        super().check(options, question)

    def explored(self, run: Run, budgets: Sequence[float]) -> list[Candidate]:
        if self.compares(run.options):
            return super().explored(run, budgets)
        proposals = [first_proposal(program) for program in programs_at(run, budgets)]
        return [unmeasured(run.question.priced, proposal) for proposal in proposals]

    def compares(self, options: SearchOptions) -> bool:
        """Whether candidates are measured: one alone has nothing to be compared with."""
        return super().compares(options) and self.most(options) > 1

    def most(self, options: SearchOptions) -> int:
        assert options.evals is not None
        return options.evals

    def explorers(self, run: Run, budgets: Sequence[float]) -> Sequence[Explorer]:
        return [partial(explored_by, program, self.most(run.options)) for program in programs_at(run, budgets)]

    def found(self, candidate: Candidate) -> dict[str, Any]:
        return {"loss": candidate.facts["loss"]}

    def solution(self, run: Run) -> tuple[Program, Proposal]:
        """The best that was found, and the program that it solves at its point. The network stands in its basis."""
        options, question = run.options, run.question
        assert question.budget is not None
        if self.compares(options):
            check_images(options, run.prepared)
        (program,) = programs_at(run, [question.budget])

        def best() -> Proposal:
            if not self.compares(options):
                return first_proposal(program)
            with counted("candidates", self.most(options)) as advance:
                measure = Measure(options, question.priced, run.prepared, advance)
                found = explored_by(program, self.most(options), measure, {})
            print(measure.words())
            return found

        return program, on_main(best)


def programs_at(run: Run, budgets: Sequence[float]) -> list[Program]:
    """The exact program at each budget, all over one scoring."""
    halves, supernet = Halves(run.question.priced), run.prepared.supernet
    losses = losses_of(halves, supernet.adapter.block_names, lost_of(run.options, run.prepared))
    return [Program(halves, losses, budget) for budget in budgets]


def explored_by(program: Program, evals: int, measure: Ruler, facts: Mapping[str, Any]) -> Proposal:
    """The best of so many measurements."""
    found = exchange(program, first_proposal(program), lambda p: measure(p.picks, {**facts, "loss": p.loss}), evals)
    return found.proposal


def unmeasured(priced: PricedSpace, proposal: Proposal) -> Candidate:
    """A proposal that is taken as it is."""
    price = priced.network_cost(subnet_of(priced, proposal.picks))
    return Candidate(proposal.picks, math.nan, price, {"loss": proposal.loss})


def first_proposal(program: Program) -> Proposal:
    """The program's answer at the guessed stage widths, or at the nearest that the budget allows."""
    halves, point = program.halves, first_point(program.halves, program.budget)
    while True:
        proposal = program.solve(point)
        if proposal is not None:
            return proposal
        narrower = tuple(
            max((w for w in halves.widths(stage) if w < width), default=width)
            for stage, width in enumerate(point.widths)
        )
        if narrower == point.widths:
            raise UserError("no architecture of the narrowest stages is within the budget; ask for more")
        point = replace(point, widths=narrower)


def lost_of(options: SearchOptions, prepared: Prepared) -> Mapping[str, Tensor]:
    """What is lost with the first units alone, by name: of the basis, of the weights as they are now, or by Taylor."""
    supernet = prepared.supernet
    if options.score == "error":
        if options.supernet is not None:  # what was found with the basis is of other weights
            return lost_as_it_stands(options, prepared)
        return supernet.basis.lost  # type: ignore[no-any-return]
    images = calibration_images(options, prepared, min(TAYLOR_IMAGES, prepared.plan.images))
    batches, loss = to_score(supernet, images, prepared.plan.labels, options.seed)
    return taylor_lost(supernet, taylor_pass(supernet, batches, loss, inside=True))
