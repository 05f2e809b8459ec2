"""constraints.txt and [tool.uv] of pyproject.toml are one list, and it pins everything the project names."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def test_both_lists_agree() -> None:
    assert PROJECT["tool"]["uv"]["constraint-dependencies"] == PINS
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+(rc\d+)?", pin) for pin in PINS)


def test_every_dependency_is_pinned() -> None:
    named = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    names = {re.match(r"[A-Za-z0-9-]+", requirement).group().lower() for requirement in named}
    assert names <= {pin.partition("==")[0] for pin in PINS}
