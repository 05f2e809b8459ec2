"""The large network alone: the baseline that the others are to be compared with."""

from collections.abc import Callable

from torch import Tensor

from nas.objectives.adjoined import Adjoined
from nas.training.losses import cross_entropy
from nas.training.objective import Step
from supernets.supernet import Supernet


class Plain(Adjoined):
    """L = CE(p): the large network alone, the baseline that the adjoined one is to be compared with."""

    def __init__(self, supernet: Supernet, smoothing: float = 0.0) -> None:
        super().__init__(supernet, supernet.identity(), smoothing)

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        return {"ce": cross_entropy(self.supernet.large(images), target, self.smoothing)}

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"large": self.supernet.large}

    def log(self, step: Step) -> dict[str, float]:
        return {}
