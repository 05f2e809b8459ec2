"""How many threads a run on a CPU takes: as many as make it fastest beside what else runs on the machine.

OpenMP's threads spin while they wait for each other. Where another program takes one of the cores, a small network is
faster on one thread than on all (docs/training.md has figures), and in a container that may use two of 64 cores torch
begins with 64 threads.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import TypeVar

import torch

from nas.machine.launch import launched
from nas.machine.options import MachineOptions

M = TypeVar("M", bound=MachineOptions)
AFFORDABLE = 0.5  # seconds of a step on one thread, of which a few are taken
REPEATS = 3
WORSE = 1.2  # times the fastest: more threads are not tried then, and a trial is given up
ALIKE = 1.05  # times the fastest: fewer threads do as well
Work = Callable[[int], object]  # a step of so many images


def with_threads(options: M, device: torch.device, work: Work, images: int) -> M:
    """The options with the threads that a run is to take, set in torch and said; untouched where they are given.

    Given are they by --threads, by OMP_NUM_THREADS (so do torchrun and Ray) and by the run that is resumed, whose sums
    would come out in another order. images: of a batch.
    """
    given = options.threads is not None or "OMP_NUM_THREADS" in os.environ or launched()
    most = torch.get_num_threads()
    if given or device.type != "cpu" or most == 1:
        return options
    torch.set_num_threads(1)
    seconds = timed_by_threads(work, affordable(work, images), most)
    best = min(threads for threads, each in seconds.items() if each <= ALIKE * min(seconds.values()))
    torch.set_num_threads(best)
    others = ", ".join(f"{each:.2g} s with {threads}" for threads, each in seconds.items() if threads != best)
    print(f"threads: {best} of {most}; a step takes {seconds[best]:.2g} s, {others} (--threads)")
    return replace(options, threads=best)


def affordable(work: Work, images: int) -> int:
    """How many images, of those of a batch, a step may have that is repeated a few times."""
    work(1)  # what is only slow at first
    return max(1, min(images, int(AFFORDABLE / seconds_of(work, 1))))


def timed_by_threads(work: Work, images: int, most: int) -> dict[int, float]:
    """Median seconds of a step by its threads: one, and then up to all, each twice as many, while more do no harm."""
    found: dict[int, float] = {}
    for threads in sorted({max(1, most // 2**k) for k in range(most.bit_length())}):
        torch.set_num_threads(threads)
        work(images)  # threads that are new
        seconds: list[float] = []
        while len(seconds) < REPEATS and sum(seconds) <= REPEATS * WORSE * min(found.values(), default=float("inf")):
            seconds.append(seconds_of(work, images))
        found[threads] = median(seconds)
        if found[threads] > WORSE * min(found.values()):
            break
    return found


def seconds_of(work: Work, images: int) -> float:
    """Of one step."""
    start = time.perf_counter()
    work(images)
    return time.perf_counter() - start
