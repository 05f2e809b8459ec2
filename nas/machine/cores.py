"""What of this machine is a process's own."""

import os


def usable_cores() -> int:
    """How many cores this process may use: of a shared machine its own, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
