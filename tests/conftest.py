"""One torch thread per test process: pytest-xdist fills the cores, and sums come out the same on every machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, which is after this file
