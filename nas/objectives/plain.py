"""The large network alone: the baseline that the others are to be compared with."""

from collections.abc import Callable

from torch import Tensor

from nas.objectives.members import Members
from nas.objectives.options import StageTwoOptions
from nas.objectives.teacher import Teacher
from nas.training.losses import cross_entropy
from nas.training.objective import Objective, Step
from supernets.supernet import Supernet


class Plain(Objective):
    """L = CE(p)."""

    def __init__(self, supernet: Supernet, smoothing: float = 0.0) -> None:
        super().__init__(supernet)
        self.smoothing = smoothing

    @classmethod
    def of(cls, options: StageTwoOptions, supernet: Supernet, members: Members, teacher: Teacher | None) -> "Plain":
        """As the options ask for it."""
        return cls(supernet, options.smoothing or 0.0)

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        return {"ce": cross_entropy(self.supernet.large(images), target, self.smoothing)}

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"large": self.supernet.large}
