"""The terms of the loss over an epoch, left on the device until somebody reads them."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor

from nas.training.objective import Step
from search_spaces.errors import UserError

READ_EVERY = 20  # steps of an accelerator, whose numbers are waited for; a CPU's are there at once


class Diverged(UserError):
    """A term of the loss is not finite."""


class Meter:
    """Sums of the terms of this process over an epoch's steps.

    sums: of so many steps, as far as they have been read. every: how many readings wait for each other. failure: what
    is to be raised, once a term that is not finite has been read.
    """

    def __init__(self, device: torch.device, sums: Mapping[str, float] | None = None, steps: int = 0) -> None:
        self.every = 1 if device.type == "cpu" else READ_EVERY
        self.sums, self.steps = dict(sums or {}), steps
        self.failure: Diverged | None = None
        self._waiting: list[tuple[Step, tuple[str, ...], Tensor, bool]] = []

    def add(self, step: Step, batches: Sequence[Mapping[str, Tensor]], counted: bool = True) -> None:
        """The terms of each of a step's batches. Not counted: only looked at, whether they are finite."""
        names = tuple(batches[0])
        values = torch.stack([torch.stack([b[name].detach().double() for name in names]) for b in batches])
        self._waiting.append((step, names, values, counted))
        if len(self._waiting) >= self.every:
            self.read()

    def read(self) -> None:
        """Wait for what has not been read."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        numbers = iter(torch.cat([values.flatten() for _, _, values, _ in waiting]).tolist())  # one synchronisation
        for step, names, values, counted in waiting:
            batches = len(values)
            terms = dict.fromkeys(names, 0.0)
            for name, value in islice(zip(cycle(names), numbers, strict=False), values.numel()):
                if not math.isfinite(value) and self.failure is None:
                    self.failure = diverged(name, value, step)
                terms[name] += value / batches
            if counted:
                self.steps += 1
                for name, value in terms.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value


def diverged(name: str, value: float, step: Step) -> Diverged:
    """The error that names the term and the step."""
    return Diverged(
        f"the {name} term of the loss is {value} at step {step.number + 1} of {step.total};"
        " the last checkpoint is kept; lower --lr or set --clip-grad"
    )
