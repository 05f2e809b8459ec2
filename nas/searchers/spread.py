"""Candidates measured beside each other by workers of Ray (--ray-address). The judge, its weights and its images go to
every worker once. What workers cannot do, for they are gone, is done here.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from nas.searchers.judge import Judge
from search_spaces.slices import NetworkSlice

Answer = tuple[float, float]  # a candidate's value, and the seconds that it took


class Worker:
    """A process of Ray with a judge of its own. threads: of torch; bit for bit the values of so many threads."""

    def __init__(self, judge: Judge, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.judge = judge.to(torch.device(device))

    def timed(self, subnet: NetworkSlice) -> Answer:
        """As the judge's."""
        return self.judge.timed(subnet)


class Spread:
    """Workers on every core of the cluster that is joined, `threads` for each, or on every GPU where the search runs on
    one.

    Candidates are added, and taken in any order; whatever is taken was measured once.
    """

    def __init__(self, judge: Judge, threads: int, device: torch.device) -> None:
        import ray

        self.judge = judge
        self.waiting: deque[tuple[str, NetworkSlice]] = deque()
        self.running: dict[Any, tuple[Any, str, NetworkSlice]] = {}  # by what Ray will answer: who, what
        self.done: dict[str, Answer] = {}
        has, on_gpu = ray.cluster_resources(), device.type == "cuda"
        number = int(has.get("GPU", 0) if on_gpu else has.get("CPU", 0) // threads)
        make = ray.remote(num_cpus=0 if on_gpu else threads, num_gpus=int(on_gpu))(Worker)
        shared = ray.put(judge.to(torch.device("cpu")))
        self.workers: list[Any] = [make.remote(shared, threads, device.type) for _ in range(number)]
        print(f"candidates are measured by {number} worker{'s' * (number != 1)} of Ray")

    def add(self, subnets: Mapping[str, NetworkSlice]) -> None:
        """Have these measured, by their names."""
        self.waiting.extend(subnets.items())
        self._hand_out()

    def take(self, name: str) -> Answer | None:
        """What was added under that name, once it is measured; None where it was not added."""
        if name not in self.done and name not in self._names():
            return None
        while name not in self.done:
            if self.running:
                self._wait()
            else:
                other, subnet = self.waiting.popleft()
                self.done[other] = self.judge.timed(subnet)
        return self.done.pop(name)

    def _names(self) -> set[str]:
        return {name for name, _ in self.waiting} | {name for _, name, _ in self.running.values()}

    def _hand_out(self) -> None:
        busy = [worker for worker, _, _ in self.running.values()]
        for worker in self.workers:
            if self.waiting and worker not in busy:
                name, subnet = self.waiting.popleft()
                self.running[worker.timed.remote(subnet)] = worker, name, subnet

    def _wait(self) -> None:
        """For the next answer; a worker that died gives its candidate back."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        (ready, *_), _ = ray.wait(list(self.running), num_returns=1)
        worker, name, subnet = self.running.pop(ready)
        try:
            self.done[name] = ray.get(ready)
        except RayTaskError:  # the judge's own, as here
            raise
        except RayError:
            self.workers.remove(worker)
            self.waiting.appendleft((name, subnet))
            left = len(self.workers)
            print(
                f"a worker of Ray is gone, {left} left" if left else "Ray's workers are gone: the search goes on here"
            )
        self._hand_out()
