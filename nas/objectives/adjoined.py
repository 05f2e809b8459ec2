"""Large and small together over one set of weights, equation (3.4)."""

from collections.abc import Callable

from torch import Tensor

from nas.objectives.options import LossOptions
from nas.objectives.teacher import Teacher
from nas.training.losses import adjoined_weight, cross_entropy, kl_divergence
from nas.training.objective import Objective, Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet


class Adjoined(Objective):
    """L = CE(p) + lambda(t) KL(p || q) on a fixed subnet."""

    def __init__(
        self, supernet: Supernet, subnet: NetworkSlice, smoothing: float = 0.0, detach_teacher: bool = False
    ) -> None:
        super().__init__(supernet)
        self.subnet, self.smoothing, self.detach_teacher = subnet, smoothing, detach_teacher

    @classmethod
    def of(cls, options: LossOptions, supernet: Supernet, subnet: NetworkSlice, teacher: Teacher | None) -> "Adjoined":
        """As the options ask for it."""
        return cls(supernet, subnet, options.smoothing or 0.0, options.detach_teacher)

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        p, q = self.supernet(images, self.subnet)
        return {
            "ce": cross_entropy(p, target, self.smoothing),
            "kl": adjoined_weight(step.t) * kl_divergence(p, q, self.detach_teacher),
        }

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"large": self.supernet.large, "subnet": lambda x: self.supernet.small(x, self.subnet)}

    def log(self, step: Step) -> dict[str, float]:
        return {"lam": adjoined_weight(step.t), "selected_gflops": self.supernet.flops(self.subnet) / 1e9}
