"""Large and small together over one set of weights, equation (3.4), and what a trained start can do with it (2.14)."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas.objectives.members import Members, added
from nas.objectives.options import StageTwoOptions
from nas.objectives.teacher import Teacher
from nas.training.losses import adjoined_weight, cross_entropy, kl_divergence
from nas.training.objective import Objective, Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet

WARM = 0.1  # of the run, in which --kl-schedule warm rises
AVERAGE_DECAY = 0.999  # of the average that --adjoined-teacher ema follows, at most


def schedule_thesis(t: float) -> float:
    """Equation (3.4)."""
    return adjoined_weight(t)


def schedule_constant(t: float) -> float:
    """Both terms from the first step on."""
    return 1.0


def schedule_warm(t: float) -> float:
    """Up along a line over the first tenth."""
    return min(t / WARM, 1.0)


SCHEDULES = {"thesis": schedule_thesis, "constant": schedule_constant, "warm": schedule_warm}


@dataclass(frozen=True)
class Loss:
    """schedule: of lambda(t). small_ce: weight of the small network's own cross-entropy. smoothing: of labels."""

    smoothing: float = 0.0
    detach_teacher: bool = False
    schedule: str = "thesis"
    small_ce: float = 0.0

    @classmethod
    def of(cls, options: StageTwoOptions) -> "Loss":
        """As the options ask for it."""
        return cls(options.smoothing or 0.0, options.detach_teacher, options.kl_schedule, options.small_ce)

    def lam(self, t: float) -> float:
        """lambda(t)."""
        return SCHEDULES[self.schedule](t)

    def terms(self, p: Tensor, q: Tensor, expert: Tensor, target: Tensor, t: float) -> dict[str, Tensor]:
        """CE(p) + lambda(t) KL(expert || q) + small_ce CE(q), of logits (B, classes); expert: p unless another."""
        return {"ce": cross_entropy(p, target, self.smoothing)} | self.of_small(q, expert, target, t)

    def of_small(self, q: Tensor, expert: Tensor, target: Tensor, t: float) -> dict[str, Tensor]:
        """The terms that a small network brings."""
        found = {"kl": self.lam(t) * kl_divergence(expert, q, self.detach_teacher)}
        if self.small_ce:
            found["ce_small"] = self.small_ce * cross_entropy(q, target, self.smoothing)
        return found


class Adjoined(Objective):
    """L = CE(p) + lambda(t) KL(p || q) on a fixed subnet; of a front the sum of what those of a step bring.

    teacher: a frozen one in p's place in the KL term; averaged: the average of the large network's weights there.
    """

    def __init__(
        self,
        supernet: Supernet,
        subnet: NetworkSlice | Members,
        loss: Loss | None = None,
        teacher: Teacher | None = None,
        averaged: bool = False,
    ) -> None:
        super().__init__(supernet)
        self.members, self.loss, self.teacher = Members.of(subnet), loss or Loss(), teacher
        self.average: Any = average_of(supernet) if averaged else None

    @classmethod
    def of(cls, options: StageTwoOptions, supernet: Supernet, members: Members, teacher: Teacher | None) -> "Adjoined":
        """As the options ask for it."""
        return cls(supernet, members, Loss.of(options), teacher, options.adjoined_teacher == "ema")

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        p = self.supernet.large(images)
        own = {"ce": cross_entropy(p, target, self.loss.smoothing)}
        small = [self.supernet.small(images, subnet) for subnet in self.members.at(step.number)]
        expert = self.expert(images, p)
        return own | added([self.loss.of_small(q, expert, target, step.t) for q in small])

    def expert(self, images: Tensor, p: Tensor) -> Tensor:
        """The logits that the small network is to match; p: those of the large one as it is."""
        if self.teacher is not None:
            return self.teacher(images)
        if self.average is not None:
            with torch.no_grad():
                return self.average.module(images)  # type: ignore[no-any-return]
        return p

    def remembering(self) -> AbstractContextManager[None]:
        return super().remembering() if self.teacher is None else self.teacher.remembering()

    def train(self, mode: bool = True) -> "Adjoined":
        """The average stays in evaluation mode: it is a target."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def after_step(self, step: Step) -> None:
        if self.average is not None:
            self.average.update(self.supernet.backbone, step=step.number)

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return teacher | {"large": self.supernet.large} | self.members.networks(self.supernet)

    def log(self, step: Step) -> dict[str, float]:
        return {"lam": self.loss.lam(step.t)} | self.members.log(self.supernet)


def average_of(supernet: Supernet) -> Any:
    """timm's average of the large network's weights; the younger the run, the shorter its memory."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(supernet.backbone, decay=AVERAGE_DECAY, use_warmup=True).requires_grad_(False)
