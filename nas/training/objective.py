"""What the one training loop minimises: a module from a batch to the terms of the loss."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """Where in the run a step stands. t: steps done over all steps. number: steps done."""

    t: float
    number: int
    total: int
