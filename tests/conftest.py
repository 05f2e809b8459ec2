"""One torch thread per test process: pytest-xdist fills the cores, and sums come out the same on every machine."""

import os
import sys
from collections import defaultdict
from itertools import chain
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this file
# Where a machine forbids it, each of the hundreds of processes that tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Families whose blocks are those of another but for what their adapter says. What it says is held to the invariants by
# these files in minutes; all else that is asked of every family is, of these, among the slow tests.
LIKE_OTHERS = {"swinv2", "beit", "relpos", "cait"}
HELD_TO_INVARIANTS = {"test_invariants.py", "test_backbones.py", "test_biased_vit.py"}

# Files whose tests are of everything with everything else (family, cut, basis, ...). Of each test the fast ones are a
# diagonal, on which every family, every cut and every basis is at least once; the rest is among the slow.
DIAGONAL = {"test_backbones.py", "test_choices.py", "test_kcr.py", "test_lost.py", "test_refit.py", "test_rounds.py"}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is asked of such a family elsewhere, and what is off the diagonal."""
    tests: dict[tuple[Any, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        parts = chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in params.values())
        alike = any(isinstance(part, str) and part in LIKE_OTHERS for part in parts)
        if alike and item.path.name not in HELD_TO_INVARIANTS:
            item.add_marker("slow")
        if params and item.path.name in DIAGONAL:
            tests[item.path, getattr(item, "originalname", item.name)].append(item)
    for group in tests.values():
        for item in off_the_diagonal(group):
            item.add_marker("slow")


def off_the_diagonal(items: list[Any]) -> list[Any]:
    """Of one test's items those that are not needed for each parameter to have each of its values once."""
    names = [item.callspec._idlist for item in items]  # what each of its @parametrize calls a value
    values = [list(dict.fromkeys(column)) for column in zip(*names, strict=True)]
    longest = max(len(column) for column in values)
    diagonal = {tuple(column[t % len(column)] for column in values) for t in range(longest)}
    return [item for item, name in zip(items, names, strict=True) if tuple(name) not in diagonal]
