"""Option values that no run can use, refused by their range. None is an option that was not given."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from search_spaces.errors import UserError


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def as_given(name: str, value: Any) -> str:
    """An option with its value as they are typed: --no-exif, --scale 0.5 1."""
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {number_words(value)}"


def number_words(value: Any) -> str:
    """An option's value as it is typed; several with blanks between them."""
    if isinstance(value, tuple | list):
        return " ".join(map(number_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def at_least_one(options: Any, *names: str) -> None:
    """Whole numbers from 1."""
    _check(options, names, lambda v: v >= 1, "at least 1")


def not_negative(options: Any, *names: str) -> None:
    """Numbers from 0."""
    _check(options, names, lambda v: v >= 0, "0 or more")


def positive(options: Any, *names: str) -> None:
    """Numbers above 0."""
    _check(options, names, lambda v: v > 0, "more than 0")


def finite(options: Any) -> None:
    """Every number among the options of a record: none may be NaN or infinite."""
    for field in fields(options):
        value = getattr(options, field.name)
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise UserError(f"{flag(field.name)} {each}; expected a finite number")


def share(options: Any, *names: str) -> None:
    """Shares of a whole that leave some of it."""
    _check(options, names, lambda v: 0 <= v < 1, "a share from 0 to below 1")


def probability(options: Any, *names: str) -> None:
    """Probabilities."""
    _check(options, names, lambda v: 0 <= v <= 1, "a probability from 0 to 1")


def interval(options: Any, *names: str) -> None:
    """Pairs of a low and a high end."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value[0] <= value[1]:
            raise UserError(f"{flag(name)} {value[0]} {value[1]}; expected two numbers, 0 < low <= high")


def _check(options: Any, names: tuple[str, ...], fits: Callable[[Any], bool], words: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not fits(value):
            raise UserError(f"{flag(name)} {value}; expected {words}")
