"""The searcher by importance (section 2.10): what units are worth, an exact program, a few measurements, no training.

Every candidate is refitted on some images and measured on others, which nothing else in the search looks at.
"""

import csv
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.machine.distributed import on_main
from nas.machine.files import write_csv
from nas.machine.timing import timed
from nas.prices.halves import Halves
from nas.searchers.exchange import Program, Proposal, exchange, first_point
from nas.searchers.losses import losses_of
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Answer, Question, Run, Searcher
from nas.training.basis import find_basis
from nas.training.calibration import calibration_images, deciding_images, drawn
from nas.training.losses import cross_entropy
from nas.training.prepared import Prepared
from nas.training.refit import counted
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice, network_slice
from search_spaces.space import SearchSpace
from supernets.importance import taylor_lost, taylor_pass
from supernets.refit import refit, written

CANDIDATES = "candidates.csv"
REFITTED = 512  # images on which a candidate is refitted
TAYLOR_IMAGES = 1024


class Importance(Searcher):
    """Half by half what is lost, the exact program at a few stage widths and weights, the best by measurement."""

    name = "importance"

    def check(self, options: SearchOptions, question: Question) -> None:
        if options.epochs:
            raise UserError(f"--epochs {options.epochs}: a search by importance trains nothing; leave it out")
        if not question.priced.space.method.halves:
            raise UserError(f"--searcher {self.name}: {question.priced.space.name} does not choose by halves")
        super().check(options, question)

    def search(self, run: Run) -> Answer:
        question = run.question
        assert question.budget is not None
        check_images(run.options, run.prepared)
        seconds: dict[str, float] = {}
        with timed(seconds, "basis"):
            standing = find_basis(run.options, run.prepared)
        with timed(seconds, "candidates"):
            _, best = self.solution(run)
        space, picks = question.priced.space, [dict(pick) for pick in best.picks]
        subnet = network_slice(space.shapes, space.block_slices(picks))
        price = question.priced.network_cost(subnet)
        in_band = price >= (question.budget - question.band) * question.priced.full
        kept: list[dict[str, list[int]]] = [{} for _ in picks]
        return Answer(picks, kept, in_band, standing, found={"loss": best.loss}, seconds=seconds)

    def solution(self, run: Run) -> tuple[Program, Proposal]:
        """The best that was found, and the program that it solves at its point. The network stands in its basis."""
        options, question, prepared = run.options, run.question, run.prepared
        assert question.budget is not None
        check_images(options, prepared)
        halves = Halves(question.priced)
        losses = losses_of(halves, prepared.supernet.adapter.block_names, lost_of(options, prepared))
        program = Program(halves, losses, question.budget)
        return program, on_main(lambda: self._best(options, program, prepared))

    def _best(self, options: SearchOptions, program: Program, prepared: Prepared) -> Proposal:
        start = first_proposal(program)
        if options.decide == "score":
            return start
        assert options.evals is not None
        with counted("candidates", options.evals) as advance:
            measure = Measure(options, program.halves.space, prepared, advance)
            found = exchange(program, start, measure, options.evals)
        print(words(measure.table.values(), options.decide))
        return found.proposal


def check_images(options: SearchOptions, prepared: Prepared) -> None:
    """Refuse decisions for which no image is left."""
    if options.decide != "score" and not prepared.plan.deciding:
        raise UserError(
            f"--decide {options.decide}: of {prepared.plan.images} training images none can be left to decide by; give"
            " more, or take --decide score"
        )


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


class Table:
    """candidates.csv: every candidate that was measured. A resumed search reads what it has measured already."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if resume and path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
        self.known = {row["picks"]: float(row["value"]) for row in self.rows}

    def add(self, value: float, picks: str, facts: Mapping[str, Any]) -> None:
        """A candidate measured just now."""
        self.rows.append({"candidate": len(self.rows) + 1, "value": value, **facts, "picks": picks})
        self.known[picks] = value
        write_csv(self.path, self.rows)

    def values(self) -> list[float]:
        """What was measured, in order."""
        return list(self.known.values())


class Measure:
    """How far a candidate's prediction is from the large network's: nats of KL(large || candidate), or missed top-1 %.

    On images that neither calibrate nor refit; refitted before, on others.
    """

    def __init__(
        self, options: SearchOptions, space: SearchSpace, prepared: Prepared, advance: Callable[[], None]
    ) -> None:
        self.options, self.space, self.prepared, self.advance = options, space, prepared, advance
        self.table = Table(prepared.folder / CANDIDATES, options.resume)
        self.images: Images | None = None

    def __call__(self, proposal: Proposal) -> float:
        picks = proposal.key()
        if picks not in self.table.known:
            subnet = network_slice(self.space.shapes, self.space.block_slices(proposal.picks))
            start = time.perf_counter()
            value = self._value(subnet)
            facts = {
                "measured": self.options.decide,
                "loss": proposal.loss,
                "gflops": self.prepared.supernet.flops(subnet) / 1e9,
                "stage_widths": " ".join(map(str, proposal.point.widths)),
                "seconds": round(time.perf_counter() - start, 2),
            }
            self.table.add(value, picks, facts)
        self.advance()
        return self.table.known[picks]

    @torch.no_grad()
    def _value(self, subnet: NetworkSlice) -> float:
        supernet = self.prepared.supernet.eval()
        if self.images is None:
            self.images = images_of(self.options, self.prepared)
        total, seen, refitting = 0.0, 0, self.images.refitting
        with written(supernet, subnet, refit(supernet, subnet, refitting) if refitting else {}):
            for images, labels, expected in self.images.deciding:
                q = supernet.small(images, subnet).float()
                if self.options.decide == "top1":
                    total += 100 * float((q.argmax(1) != labels).sum())
                else:
                    total += float(F.kl_div(q.log_softmax(1), expected, log_target=True, reduction="sum"))
                seen += len(images)
        return total / seen


@dataclass(frozen=True)
class Images:
    """refitting: batches (B, C, H, W). deciding: batches, their labels, and the large network's log-probabilities."""

    refitting: Sequence[Tensor]
    deciding: Sequence[tuple[Tensor, Tensor, Tensor]]


def images_of(options: SearchOptions, prepared: Prepared) -> Images:
    """Those of a run, kept in memory."""
    count = min(REFITTED, prepared.plan.images, options.refit_images)
    return Images(
        [images for images, _ in calibration_images(options, prepared, count)],
        [
            (images, labels, prepared.supernet.large(images).float().log_softmax(1))
            for images, labels in deciding_images(options, prepared)
        ],
    )


def lost_of(options: SearchOptions, prepared: Prepared) -> Mapping[str, Tensor]:
    """What is lost with the first units alone, by name: of the basis, or by Taylor."""
    supernet = prepared.supernet
    if options.score == "error":
        return supernet.basis.lost  # type: ignore[no-any-return]
    images = calibration_images(options, prepared, min(TAYLOR_IMAGES, prepared.plan.images))
    batches = [(x, labels if options.labels else drawn(supernet, x, options.seed)) for x, labels in images]
    return taylor_lost(supernet, taylor_pass(supernet, batches, cross_entropy, inside=True))


def words(values: Sequence[float], decide: str) -> str:
    """What was measured, in one line."""
    unit = " % missed" if decide == "top1" else " nats from the large network's prediction"
    return f"{len(values)} candidates refitted and measured: {values[0]:.4g}{unit} at first, {min(values):.4g} at best"
