"""One torch thread per test process: pytest-xdist fills the cores, and sums come out the same on every machine."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this file
# Where a machine forbids it, each of the hundreds of processes that tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Families whose blocks are those of another but for what their adapter says. What it says is held to the invariants by
# these files in minutes; all else that is asked of every family is, of these, among the slow tests.
LIKE_OTHERS = {"swinv2", "beit", "relpos", "cait"}
HELD_TO_INVARIANTS = {"test_invariants.py", "test_backbones.py", "test_biased_vit.py"}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what is asked of such a family elsewhere."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        alike = any(isinstance(value, str) and value in LIKE_OTHERS for value in params.values())
        if alike and item.path.name not in HELD_TO_INVARIANTS:
            item.add_marker("slow")
