"""A supernet trained for all of its subnets at once (section 2.12): the sandwich rule, with in-place distillation.

Yu and Huang, Universally Slimmable Networks (arXiv 1903.05134): each step the largest network, the smallest and some
drawn between them; the largest learns from the labels, the others from what the largest predicts in that step.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from nas.training.losses import cross_entropy, kl_divergence
from nas.training.objective import Objective, Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet


class Sandwich(Objective):
    """L = CE(p) + KL(p || q_smallest) + sum over the step's drawn subnets of KL(p || q), no gradient through p in KL.

    drawn: the subnets of a step, by its number.
    """

    def __init__(
        self,
        supernet: Supernet,
        smallest: NetworkSlice,
        drawn: Callable[[int], Sequence[NetworkSlice]],
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(supernet)
        self.smallest, self.drawn, self.smoothing = smallest, drawn, smoothing

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        p = self.supernet.large(images)

        def divergence(subnet: NetworkSlice) -> Tensor:
            return kl_divergence(p, self.supernet.small(images, subnet), detach_teacher=True)

        first, *others = [divergence(subnet) for subnet in self.drawn(step.number)]
        return {
            "ce": cross_entropy(p, target, self.smoothing),
            "kl_smallest": divergence(self.smallest),
            "kl_drawn": sum(others, first),
        }

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"large": self.supernet.large, "smallest": lambda x: self.supernet.small(x, self.smallest)}
