"""What is minimised: a module from a batch to the terms of the loss. One file per method only where it differs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nas.training.losses import adjoined_weight, cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet


class Adjoined(nn.Module):
    """L = CE(p) + lambda(t) KL(p || q) on a fixed subnet, equation (3.4)."""

    def __init__(
        self, supernet: Supernet, subnet: NetworkSlice, smoothing: float = 0.0, detach_teacher: bool = False
    ) -> None:
        super().__init__()
        self.supernet: Supernet = supernet
        self.subnet = subnet
        self.smoothing = smoothing
        self.detach_teacher = detach_teacher

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        """The weighted terms; their sum is the loss."""
        p, q = self.supernet(images, self.subnet)
        return {
            "ce": cross_entropy(p, target, self.smoothing),
            "kl": adjoined_weight(step.t) * kl_divergence(p, q, self.detach_teacher),
        }

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

    def after_step(self, step: Step) -> None:
        """Updates that are not gradient steps."""

    def after_epoch(self) -> None:
        """Updates at the end of an epoch, before its row is logged."""

    def current_subnet(self) -> NetworkSlice:
        """The subnet to evaluate."""
        return self.subnet

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The networks to evaluate, by their names in log.csv: images (B, C, H, W) -> logits (B, classes)."""
        subnet = self.current_subnet()
        return {"large": self.supernet.large, "subnet": lambda x: self.supernet.small(x, subnet)}

    def log(self, step: Step) -> dict[str, float]:
        """Values for the epoch's row in log.csv."""
        return {"lam": adjoined_weight(step.t), "selected_gflops": self.supernet.flops(self.subnet) / 1e9}

    def choice_rows(self) -> list[dict[str, Any]]:
        """The epoch's rows in choices.csv: block, choice, candidate, probability."""
        return []

    def step_rows(self) -> list[dict[str, Any]]:
        """The epoch's rows in steps.csv, of methods whose state moves within an epoch; asked for once."""
        return []
