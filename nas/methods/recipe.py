"""--recipe published: a method as its authors ran it (section 2.15)."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from nas.machine.ranges import as_given, number_words
from nas.methods.options import RecipeOptions
from nas.prices.options import LIMITS
from search_spaces.defaults import SCALE
from search_spaces.errors import UserError
from search_spaces.registry import Space

R = TypeVar("R", bound=RecipeOptions)
Stage = Literal["search", "retrain"]


def published(space: Space, stage: Stage) -> dict[str, Any]:
    """The table of a stage: {option: what the authors ran}. UserError where nobody published the space's method.

    A -nano space is no network of anybody's, so that what belongs to a network's size and a run's length stays its own.
    """
    if space.published is None:
        raise UserError(f"--recipe published: nothing published uses {space.name}; leave it out")
    table = dict(space.published.training)
    table |= dict(space.published.search if stage == "search" else space.published.retrain)
    return {name: value for name, value in table.items() if not (space.nano and name in SCALE)}


def with_recipe(options: R, space: Space, stage: Stage) -> R:
    """The options with the published table filled in where it is asked for.

    UserError names a flag that contradicts it. Of SCALE a flag counts before the table (`departures`).
    """
    if options.recipe != "published":
        return options
    table, chosen = _applied(options, space, stage), {}
    for name, value in table.items():
        given = getattr(options, name)
        if given == _default(options, name):
            chosen[name] = value
        elif given != value and name not in SCALE:
            raise UserError(
                f"{as_given(name, given)}: --recipe published sets {as_given(name, value)} for {space.name};"
                " leave one of them out"
            )
    for name in ("augment", "no_aug"):
        if "aa" in table and (given := getattr(options, name, None)):
            raise UserError(
                f"{as_given(name, given)}: --recipe published sets the augmentation of {space.name};"
                " leave one of them out"
            )
    return replace(options, **chosen)


def departures(options: RecipeOptions, space: Space, stage: Stage) -> dict[str, Any]:
    """What a run by the published recipe does otherwise, which it may: {option: what was published}."""
    if options.recipe != "published":
        return {}
    table = _applied(options, space, stage)
    found = {name: value for name, value in table.items() if name in SCALE and getattr(options, name) != value}
    limits = [name for name in LIMITS if getattr(options, name, None) is not None]
    if limits:
        found = {name: value for name, value in found.items() if name != "budget"}
        found |= dict.fromkeys(limits, table.get("budget") or "none")
    return found


def recipe_lines(options: RecipeOptions, space: Space, stage: Stage) -> tuple[str, ...]:
    """What --recipe published has set, and what the run does otherwise, in words."""
    if options.recipe != "published":
        return ()
    other = departures(options, space, stage)
    said = [as_given(name, value) for name, value in _applied(options, space, stage).items() if name not in other]
    own = f"; {space.name} keeps its own length, rate and batch" if space.nano else ""
    lines = [f"--recipe published sets {' '.join(said)}{own}"]
    if other:
        words = (
            f"{as_given(name, getattr(options, name, None))} (published: {number_words(v)})"
            for name, v in other.items()
        )
        lines.append(f"other than published: {', '.join(words)}")
    return tuple(lines)


def _applied(options: RecipeOptions, space: Space, stage: Stage) -> Mapping[str, Any]:
    """The part of the table that a run's options have; an architecture stands in the basis that its search gave it."""
    names = {field.name for field in fields(options)} - ({"basis"} if getattr(options, "arch", None) else set())
    return {name: value for name, value in published(space, stage).items() if name in names}


def _default(options: RecipeOptions, name: str) -> Any:
    return next(field.default for field in fields(options) if field.name == name)
