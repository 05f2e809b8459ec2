"""What the one training loop minimises: a module from a batch to the terms of the loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from supernets.supernet import Supernet


@dataclass(frozen=True)
class Step:
    """Where in the run a step stands. t: steps done over all steps. number: steps done.

    counted: whether its batch is one of the training set that is passed over, so that an objective may add it up; not
    so a held-out batch for the architecture parameters, or a trial before the run.
    """

    t: float
    number: int
    total: int
    counted: bool = True


class Objective(nn.Module, ABC):
    """A loss over a supernet's weights, with its hooks: the loop calls them, an objective owns no loop."""

    def __init__(self, supernet: Supernet) -> None:
        super().__init__()
        self.supernet: Supernet = supernet

    @abstractmethod
    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        """The weighted terms; their sum is the loss."""

    @abstractmethod
    def networks(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """The networks to evaluate, by their names in log.csv: images (B, C, H, W) -> logits (B, classes)."""

    def remembering(self) -> AbstractContextManager[None]:
        """Inside, what a frozen network gives for the same batch, the very tensor, may be computed once."""
        return nullcontext()

    @property
    def may_leave_weights_unused(self) -> bool:
        """Whether a step's loss may depend on only some of the weights: processes then look for the others."""
        return False

    def architecture_parameters(self) -> list[nn.Parameter]:
        """Parameters with an optimiser of their own."""
        return []

    def architecture_optimizer(self, lr: float) -> torch.optim.Optimizer | None:
        """The optimiser of `architecture_parameters`."""
        parameters = self.architecture_parameters()
        return torch.optim.Adam(parameters, lr=lr) if parameters else None

    def pace(self, step: Step) -> float:
        """What the rate of the architecture parameters is multiplied by at a step."""
        return 1.0

    def held_out(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Mapping[str, float]:
        """What it measures of held-out images by itself, besides what its networks score: {name: less is better}."""
        return {}

    def after_step(self, step: Step) -> None:
        """Updates that are not gradient steps."""

    def after_epoch(self) -> None:
        """Updates at the end of an epoch, before its row is logged."""

    def process_state(self) -> dict[str, Tensor]:
        """Copies of what each process adds up for itself inside an epoch, and all of them together at its end."""
        return {}

    def load_process_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""

    def log(self, step: Step) -> dict[str, float]:
        """Values for the epoch's row in log.csv."""
        return {}

    def choice_rows(self) -> list[dict[str, Any]]:
        """The epoch's rows in choices.csv: block, choice, candidate, probability."""
        return []

    def step_rows(self) -> list[dict[str, Any]]:
        """The epoch's rows in steps.csv, where the state moves within an epoch; asked for once."""
        return []
