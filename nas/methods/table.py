"""The methods' trainings, by the methods' names: which searchers and which options go with which."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, replace
from typing import Any, TypeVar

from nas.machine.ranges import as_given, flag
from nas.methods.an import ANTraining
from nas.methods.dan import DANTraining
from nas.methods.free import FreeTraining
from nas.methods.joint import JointTraining
from nas.methods.kcr import KCRTraining
from nas.methods.method import MethodTraining
from nas.methods.uvc import UVCTraining
from nas.prices.options import BAND
from nas.searchers.options import LogitOptions, MixtureOptions, SearchOptions
from nas.searchers.searcher import Searcher
from nas.searchers.table import SEARCHERS
from search_spaces.errors import UserError
from search_spaces.registry import METHODS, Space

S = TypeVar("S", bound=SearchOptions)
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
        raise UserError(f"--searcher {name}: {space.name} is searched by {alternatives(allowed)}")
    return SEARCHERS[name]


def check_searcher(options: SearchOptions, space: Space) -> None:
    """Refuse options, as they were given, that belong to other searchers, or to a training that there is none of."""
    searcher, training = searcher_of(options, space), training_of(space)
    if options.start is not None and not searcher.starts:
        names = alternatives([name for name, each in SEARCHERS.items() if each.starts])
        raise UserError(
            f"--start {options.start} is of a search by {names}; {space.name} is searched by {searcher.name}"
        )
    if options.stage_gates is not None and not training.narrows and MixtureOptions in searcher.owned(space.method):
        words = as_given("stage_gates", options.stage_gates)
        raise UserError(f"{words}: {space.name} narrows no stage by factors; leave it out")
    if options.band != BAND and not searcher.banded:
        words = f"{space.name} is searched by {searcher.name}, which has no band"
        raise UserError(f"--band {options.band}: {words}; leave it out")
    for record in foreign_to(searcher, space):
        if given := given_of(record, options):
            owners = [name for name, each in SEARCHERS.items() if record in each.owned(space.method)]
            names = alternatives([name for name in owners if name in training.searchers] or owners)
            raise UserError(
                f"{as_typed(given[0], options)} goes with a search by {names}; {space.name} is searched by"
                f" {searcher.name}"
            )
    if searcher.untrained:
        given = [field for record in (LogitOptions, *training.trained) for field in given_of(record, options)]
        if given:
            raise UserError(
                f"{as_typed(given[0], options)} goes with a search that trains; one by {searcher.name} does not"
            )


def foreign_to(searcher: Searcher, space: Space) -> list[type]:
    """Records of options that only other searchers read in a space."""
    records = dict.fromkeys(record for each in SEARCHERS.values() for record in each.owned(space.method))
    return [record for record in records if record not in searcher.owned(space.method)]


def with_searcher(options: S, space: Space) -> S:
    """The searcher's own defaults filled in."""
    defaults = searcher_of(options, space).defaults_of(options)
    return replace(options, **{name: v for name, v in defaults.items() if getattr(options, name) is None})


def without_foreign(options: S, space: Space) -> S:
    """The same without what the space's defaults have filled in for other searchers, or for a training."""
    searcher, training = searcher_of(options, space), training_of(space)
    of_training = (LogitOptions, *training.trained) if searcher.untrained else ()
    records = [*foreign_to(searcher, space), *of_training]
    return replace(options, **{f.name: default_of(f) for record in records for f in given_of(record, options)})


# What is so where nothing is given: config.yaml says it of runs of any method that began when these were defaults.
AS_EVER: Mapping[str, Any] = {"adjoined": True, "selection": "topk"}


def check_owned(options: Any, space: Space, shared: tuple[type, ...] = ()) -> None:
    """Refuse options that belong to other methods. shared: records that anybody's may be in this stage."""
    own = (*training_of(space).options, *shared)
    for record in dict.fromkeys(record for training in TRAININGS.values() for record in training.options):
        given = given_of(record, options)
        if given and record not in own:
            names = [name for name, training in TRAININGS.items() if record in training.options]
            raise UserError(f"{as_typed(given[0], options)} goes with {in_words(names)}; the space is {space.name}")
    if getattr(options, "fractions", None) is not None and "--fractions" not in space.method.offers:
        names = [name for name, method in METHODS.items() if "--fractions" in method.offers]
        raise UserError(f"--fractions goes with {in_words(names)}; the space is {space.name}")


def given_of(record: type, options: Any) -> list["Field[Any]"]:
    """The options of a record that are not as they are when nothing is given, said or not (`AS_EVER`)."""
    values = {f.name: getattr(options, f.name, default_of(f)) for f in fields(record)}
    return [f for f in fields(record) if values[f.name] not in (default_of(f), AS_EVER.get(f.name, default_of(f)))]


def alternatives(names: Sequence[str]) -> str:
    """Names of which one is to be taken."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def in_words(methods: Sequence[str]) -> str:
    """Methods by their names, after the word."""
    return f"method{'s' if len(methods) > 1 else ''} {' and '.join(methods)}"


def default_of(field: "Field[Any]") -> Any:
    """What an option is when it is not given."""
    return None if field.default is MISSING else field.default


def as_typed(field: "Field[Any]", options: Any) -> str:
    """An option as it was typed: --no-prune, --skip halves, --eta-kc."""
    value = getattr(options, field.name)
    return as_given(field.name, value) if isinstance(value, bool | str) else flag(field.name)
