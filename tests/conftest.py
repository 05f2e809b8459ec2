"""One torch thread per test process: pytest-xdist fills the cores, and sums come out the same on every machine."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this file
# Where a machine forbids it, each of the hundreds of processes that tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
