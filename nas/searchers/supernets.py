"""The ways to train a supernet before architectures are compared in it (section 2.12), by their names."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nas.machine.ranges import as_given, at_least_one
from nas.objectives.sandwich import Sandwich
from nas.prices.costs import PricedSpace
from nas.searchers.anywhere import Anywhere
from nas.searchers.measure import CANDIDATES
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Run
from nas.training.loop import fit
from nas.training.make import make_training
from nas.training.objective import Objective
from nas.training.state import settle
from search_spaces.errors import UserError
from supernets.supernet import Supernet

SUBNETS = 2  # drawn in a step
SCHED = "cosine"  # at a rate that stays what it is, the large network is lost (docs/searchers.md)


def sandwich(options: SearchOptions, priced: PricedSpace, supernet: Supernet) -> Sandwich:
    """The largest, the smallest, and some of any price between."""
    anywhere = Anywhere(priced, options.seed)
    drawn = partial(anywhere.drawn, count=options.subnets or SUBNETS)
    return Sandwich(supernet, anywhere.smallest(), drawn, options.smoothing or 0.0)


SUPERNETS: dict[str, Callable[[SearchOptions, PricedSpace, Supernet], Objective]] = {"sandwich": sandwich}


def defaults_with(options: SearchOptions, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A searcher's defaults; where it trains a supernet, the epochs are the space's own, and the rate ends at zero."""
    if options.supernet is None:
        return dict(defaults)
    return {name: value for name, value in defaults.items() if name != "epochs"} | {"subnets": SUBNETS, "sched": SCHED}


def check_supernet(options: SearchOptions) -> None:
    """Refuse a supernet's training of another name, or without epochs, and what belongs to one where there is none."""
    if options.supernet is None:
        if options.subnets is not None:
            raise UserError(f"--subnets {options.subnets} goes with {ways()}; give that, too")
        return
    if options.supernet not in SUPERNETS:
        raise UserError(f"--supernet {options.supernet}; expected {' or '.join(SUPERNETS)}")
    at_least_one(options, "subnets")
    given = as_given("supernet", options.supernet)
    if not options.epochs:
        raise UserError(f"{given} trains for --epochs; give --epochs 1 or more, or leave {given} out")
    if options.detach_teacher:
        raise UserError(
            f"--detach-teacher: {given} never lets a gradient into the network that is followed; leave it out"
        )
    if options.compile:
        raise UserError(f"--compile: {given} trains other networks in every step, each would be compiled; leave it out")


def ways() -> str:
    """The options that ask for one, as they are typed."""
    return " or ".join(as_given("supernet", name) for name in SUPERNETS)


def trained_supernet(run: Run) -> tuple[str, ...]:
    """Train the supernet, in the basis in which it stands, where that is asked for: the names of what was trained."""
    options, prepared = run.options, run.prepared
    if options.supernet is None:
        return ()
    objective = SUPERNETS[options.supernet](options, run.question.priced, prepared.supernet)
    training = make_training(options, objective, prepared)

    def on_epoch(row: Mapping[str, Any]) -> None:
        (prepared.folder / CANDIDATES).unlink(missing_ok=True)  # of a shorter run's weights, if there are any
        if run.on_epoch is not None:
            run.on_epoch(row)

    fit(training, options.resume, "supernet", on_epoch)
    settle(training, best=False)
    prepared.supernet.eval()
    return tuple(objective.networks())
