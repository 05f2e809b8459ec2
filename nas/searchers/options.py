"""The options of what may be chosen, and of how an architecture is found."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

from nas.machine.ranges import at_least_one, not_negative
from nas.objectives.options import LossOptions
from nas.prices.options import PriceOptions
from nas.training.options import LoopOptions
from search_spaces.errors import UserError


@dataclass(frozen=True)
class SpaceOptions:
    """Which space, and which candidates it offers."""

    space: str | None = None
    """<backbone>-<method>[-nano]; --list-spaces shows all. auto-<method>: of the family of --model. By default that of
    the embedded digits (docs/options.md), with --arch the free widths of that run's family"""
    arch: Path | None = None
    """another round: the folder of a finished run, whose compact network is compressed further in free widths; a budget
    stays a share of the timm model's own FLOPs. Model, classes and images are that run's unless given (docs/free.md)"""
    list_spaces: bool = False
    """print every space and stop"""
    verbose: bool = False
    """with --list-spaces: the defaults of both stages too, and what --recipe published sets"""
    width: Literal["stream", "inner"] = "stream"
    """what a compression factor narrows (docs/method.md)"""
    alphas: tuple[int, ...] | None = None
    """candidate compression factors"""
    fractions: tuple[float, ...] | None = None
    """candidate shares of the channels that an MLP reads and writes (1, 3/4, 1/2, 1/4)"""
    alpha: int | None = None
    """one compression factor for every block, where the space searches none"""

    def check_listing(self) -> None:
        """Refuse a flag that nothing reads."""
        if self.verbose and not self.list_spaces:
            raise UserError("--verbose goes with --list-spaces; leave it out")


@dataclass(frozen=True)
class FreeOptions:
    """Which widths a space of free widths offers."""

    granularity: int | None = None
    """of free widths: what they are multiples of (8; in the -nano spaces 1)"""
    keep_block: tuple[int, ...] = ()
    """of free widths: blocks that stay whole but for their stream, counted from 0"""
    fix: tuple[str, ...] = ()
    """of free widths: choices that stay whole in every block: stream, heads, qk, v or hidden"""


@dataclass(frozen=True)
class DecideOptions:
    """A search that measures candidates."""

    decide: Literal["kl", "top1", "loss", "score"] = "kl"
    """candidates are measured by KL to the large network, by top-1, by cross-entropy, or (by importance) not at all"""


@dataclass(frozen=True)
class FrontOptions:
    """A search that can answer for several budgets at once."""

    front: tuple[float, ...] = ()
    """several budgets instead of one: the best architecture at each, from one search (docs/searchers.md)"""

    def check_front(self) -> None:
        """Refuse budgets that are none, and the same one twice."""
        for budget in self.front:
            if not 0 < budget <= 1:
                raise UserError(f"--front {budget:g}; expected fractions of the backbone's price, 0 < B <= 1")
            if self.front.count(budget) > 1:
                raise UserError(f"--front names {budget:g} more than once; give every budget once")


F = TypeVar("F", bound="SearchOptions")


def one_front(options: F) -> F:
    """The budgets of a front in order, in place of the space's own --budget. UserError where both were given."""
    if not options.front:
        return options
    if options.budget:
        raise UserError("--front is several budgets, --budget is one; give one of them")
    return replace(options, front=tuple(sorted(options.front)), budget=0.0)


@dataclass(frozen=True)
class SupernetOptions:
    """A search that compares architectures in a supernet, which may be trained for all of them before."""

    supernet: str | None = None
    """of a search that compares architectures: train the supernet first, for --epochs. sandwich: each step the largest
    network by the labels, the smallest and some drawn ones by the largest's prediction (docs/searchers.md)"""
    subnets: int | None = None
    """of --supernet sandwich: architectures that are drawn in a step (2)"""


@dataclass(frozen=True)
class RandomOptions:
    """A search at random."""

    candidates: int | None = None
    """of a search at random: architectures that are drawn and measured at each budget (64)"""


@dataclass(frozen=True)
class EvolutionOptions:
    """A search by evolution."""

    population: int | None = None
    """of a search by evolution: architectures of the first generation, and children of every other one (32)"""
    generations: int | None = None
    """of a search by evolution: generations after the first (7)"""
    mutate: float | None = None
    """of a search by evolution: the probability that a mutation draws a choice anew (0.1)"""


@dataclass(frozen=True)
class SpreadOptions:
    """A search whose candidates do not wait for one another."""

    ray_address: str | None = None
    """a running Ray cluster (auto, or HOST:PORT) over which a sweep's trials are spread, or the candidates of a search
    at random or by evolution; local: one that is started on this machine's loopback, as by a sweep it is by default"""


@dataclass(frozen=True)
class ImportanceOptions:
    """A search by importance: seconds, and no training."""

    score: Literal["error", "taylor"] = "error"
    """of a search by importance: a unit is worth the error that a refit leaves without it, or what Taylor says"""
    evals: int | None = None
    """of a search by importance: candidates that are refitted and measured, of 1 none (1; in the -nano spaces 12)"""


@dataclass(frozen=True)
class SearcherOptions:
    """What every search takes."""

    searcher: str | None = None
    """how the architecture is found: gradient, importance, evolution, random, uniform or minimax, of which a space
    allows some; by default as its method does it (docs/searchers.md)"""
    start: Literal["importance", "uniform"] | None = None
    """of a search by gradient: begin where the solution by importance is likely, or with every candidate alike; by
    default the former from trained weights under a budget, where widths are chosen. Of one by evolution: with that
    solution in the first generation (default), or at random"""


@dataclass(frozen=True)
class LogitOptions:
    """A search that trains what it chooses by."""

    arch_lr: float | None = None
    """Adam's rate for the architecture logits, times lambda(t) where factors are chosen (docs/method.md); of a minimax
    search that of its gates' SGD, as of the published run's length"""
    arch_data: Literal["train", "val"] = "train"
    """train the logits on the weights' own batches, or alternate with the held-out part"""


@dataclass(frozen=True)
class MixtureOptions:
    """A search by gradient: what its mixture of candidates feels, and how fast it becomes a choice (section 2.2)."""

    tau: tuple[float, ...] | None = None
    """of a search by gradient: temperature of the Gumbel-softmax, constant, or from the first number to the second by
    a constant factor a step (5 0.1)"""
    arch_pace: Literal["lambda", "constant"] | None = None
    """of a search by gradient: multiply the rate of the architecture logits (and of a budget's multiplier) by
    lambda(t), or not; by default the former where factors or free widths are chosen adjoined (docs/method.md)"""
    stage_gates: bool | None = None
    """of a search by gradient for factors: let the mixture feel how wide its stages will be, or run it at full stage
    width (true)"""

    def check_mixture(self) -> None:
        """Refuse temperatures that no search can use."""
        if self.tau is not None and (len(self.tau) not in (1, 2) or min(self.tau) <= 0):
            given = " ".join(f"{each:g}" for each in self.tau)
            raise UserError(f"--tau {given}; expected one temperature above 0, or two: the first and the last")


@dataclass(frozen=True)
class SelectionOptions:
    """A search for how many channels to keep."""

    selection: Literal["topk", "bernoulli"] | None = None
    """of channels: choose a count and keep those of highest score (topk, the default), or let every channel be drawn
    by itself"""


@dataclass(frozen=True)
class ScoreOptions:
    """A search for which channels to keep, by their scores."""

    flops_weight: float | None = None
    """weight w of E[F]/F_full under --no-adjoined (0.2)"""
    mask_warmup: float | None = None
    """of a search for channels: share of its steps in which every channel is kept and nothing is chosen yet (0)"""


@dataclass(frozen=True)
class GateOptions:
    """A minimax search: what may be removed, and what its gates skip."""

    prune: bool = True
    """of a minimax search: remove heads, channels and neurons; by --no-prune nothing but what --skip skips"""
    skip: Literal["block", "attention", "mlp", "halves", "none"] = "block"
    """what a gate of a minimax search skips: a block, its attention, its MLP, each half by a gate of its own, or
    nothing"""


@dataclass(frozen=True)
class MinimaxOptions:
    """A minimax search: where its paper and its authors' code differ, and what this toolkit adds (docs/uvc.md)."""

    gate_average: Literal["mean", "ramp"] | None = None
    """of a minimax search: gates step on the mean of a window's gradients (default), or on the mean of each times its
    place in the window, from 0"""
    gate_flops: Literal["decided", "drawn"] | None = None
    """of a minimax search: its constraint counts blocks by the gates as they would be decided now (default), or as
    the step has drawn them"""
    damping: float | None = None
    """of a minimax search: what counts and gates pay for FLOPs is the multiplier plus so much of the violation (3)"""
    reference_steps: int | None = None
    """of a minimax search: learning steps of the run that its step sizes are those of, and are scaled from (62500)"""

    def check_minimax(self) -> None:
        """Refuse values that no search can use."""
        not_negative(self, "damping")
        at_least_one(self, "reference_steps")


# A dataclass lists the fields of its last base first.
@dataclass(frozen=True)
class SearchOptions(
    SearcherOptions,
    MixtureOptions,
    LogitOptions,
    FrontOptions,
    PriceOptions,
    ImportanceOptions,
    DecideOptions,
    SupernetOptions,
    SpreadOptions,
    EvolutionOptions,
    RandomOptions,
    MinimaxOptions,
    GateOptions,
    ScoreOptions,
    SelectionOptions,
    FreeOptions,
    SpaceOptions,
    LossOptions,
    LoopOptions,
):
    """All that a search reads."""
