"""The names of log.csv's columns."""

import re
from collections.abc import Iterable


def held_out(columns: Iterable[object], measure: str) -> dict[str, str]:
    """{network: column} of those that hold what networks are worth on the held-out part, by a measure (top1)."""
    found = (re.fullmatch(f"held_out_(.*)_{measure}", str(column)) for column in columns)
    return {match[1]: match[0] for match in found if match}
