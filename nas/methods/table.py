"""The methods' trainings, by the methods' names: which searchers and which options go with which."""

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from nas.machine.ranges import flag
from nas.methods.an import ANTraining
from nas.methods.dan import DANTraining
from nas.methods.free import FreeTraining
from nas.methods.joint import JointTraining
from nas.methods.kcr import KCRTraining
from nas.methods.method import MethodTraining
from nas.methods.uvc import UVCTraining
from nas.prices.options import BAND
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Searcher
from nas.searchers.table import SEARCHERS
from search_spaces.errors import UserError
from search_spaces.registry import METHODS, Space

TRAININGS: dict[str, MethodTraining] = {
    "an": ANTraining(),
    "dan": DANTraining(),
    "kcr": KCRTraining(),
    "joint": JointTraining(),
    "uvc": UVCTraining(),
    "free": FreeTraining(),
}


def training_of(space: Space) -> MethodTraining:
    """What its method adds; a method without a line of its own trains by gradient, adjoined."""
    return TRAININGS.get(space.method.name, MethodTraining())


def searcher_of(options: SearchOptions, space: Space) -> Searcher:
    """--searcher, or the method's own. UserError names those that it allows."""
    allowed = training_of(space).searchers
    name = options.searcher or allowed[0]
    if name not in allowed:
        raise UserError(f"--searcher {name}: {space.name} is searched by {' or '.join(allowed)}")
    searcher = SEARCHERS[name]
    if options.start is not None and not searcher.starts:
        raise UserError(f"--start {options.start} is of a search by gradient; {space.name} is searched by {name}")
    if options.band != BAND and not searcher.banded:
        raise UserError(f"--band {options.band}: {space.name} is searched by {name}, which has no band; leave it out")
    return searcher


def check_owned(options: Any, space: Space, shared: tuple[type, ...] = ()) -> None:
    """Refuse options that belong to other methods. shared: records that anybody's may be in this stage."""
    own = (*training_of(space).options, *shared)
    for record in dict.fromkeys(record for training in TRAININGS.values() for record in training.options):
        given = [f for f in fields(record) if getattr(options, f.name, default_of(f)) != default_of(f)]
        if given and record not in own:
            names = [name for name, training in TRAININGS.items() if record in training.options]
            raise UserError(f"{as_typed(given[0], options)} goes with {in_words(names)}; the space is {space.name}")
    if getattr(options, "fractions", None) is not None and "--fractions" not in space.method.offers:
        names = [name for name, method in METHODS.items() if "--fractions" in method.offers]
        raise UserError(f"--fractions goes with {in_words(names)}; the space is {space.name}")


def in_words(methods: Sequence[str]) -> str:
    """Methods by their names, after the word."""
    return f"method{'s' if len(methods) > 1 else ''} {' and '.join(methods)}"


def default_of(field: "Field[Any]") -> Any:
    """What an option is when it is not given."""
    return None if field.default is MISSING else field.default


def as_typed(field: "Field[Any]", options: Any) -> str:
    """An option as it was typed: --no-prune, --skip halves, --eta-kc."""
    value = getattr(options, field.name)
    if isinstance(value, bool):
        return flag(field.name) if value else flag(f"no_{field.name}")
    return f"{flag(field.name)} {value}" if isinstance(value, str) else flag(field.name)
