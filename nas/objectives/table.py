"""The ways to train in stage 2, by their names on the command line."""

from collections.abc import Callable
from dataclasses import dataclass

from nas.objectives.adjoined import Adjoined
from nas.objectives.distill import Distilled
from nas.objectives.features import Features
from nas.objectives.members import Members
from nas.objectives.options import StageTwoOptions
from nas.objectives.plain import Plain
from nas.objectives.teacher import Teacher
from nas.training.objective import Objective
from search_spaces.errors import UserError
from supernets.supernet import Supernet

Make = Callable[[StageTwoOptions, Supernet, Members, Teacher | None], Objective]


@dataclass(frozen=True)
class Kind:
    """make: the objective. small: whether a small network is trained and cut; teacher: whether it learns from one.

    labels: whether it reads them, and needs a classifier. tokens: whether it can match the original network's.
    """

    name: str
    make: Make
    small: bool = True
    teacher: bool = False
    labels: bool = True
    tokens: bool = False


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("adjoined", Adjoined.of),
        Kind("plain", Plain.of, small=False),
        Kind("distill", Distilled.of, teacher=True, tokens=True),
        Kind("features", Features.of, teacher=True, labels=False, tokens=True),
    )
}


UNLABELLED = next(kind.name for kind in KINDS.values() if not kind.labels)  # where nothing was asked for


def kind_of(name: str) -> Kind:
    """The way to train of that name; UserError names those there are."""
    if name not in KINDS:
        raise UserError(f"--train {name}; expected {', '.join(KINDS)}")
    return KINDS[name]
