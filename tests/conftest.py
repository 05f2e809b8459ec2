"""One torch thread per test process: pytest-xdist fills the cores, and sums come out the same on every machine."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this file
# Where a machine forbids it, each of the hundreds of processes that tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
NAS = Path(__file__).parent / "nas"

# Families whose blocks are those of another but for what their adapter says. Every invariant holds of them in
# tests/supernets in minutes; what searches, methods and stages make of them is among the slow tests.
LIKE_OTHERS = {"swinv2", "beit", "relpos", "cait"}


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow whatever tests/nas asks of such a family."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if NAS in item.path.parents and any(isinstance(v, str) and v in LIKE_OTHERS for v in params.values()):
            item.add_marker("slow")
