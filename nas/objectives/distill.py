"""The other ways to train than adjoined: the large network alone, and the small one under a frozen teacher.

UVC's search learns from the same teacher, by the same terms.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nas.config import Common
from nas.objectives.adjoined import Adjoined
from nas.objectives.teacher import Teacher
from nas.training.losses import cross_entropy
from nas.training.objective import Step
from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet

DISTILL_WEIGHT = 0.5


class Distilled(Adjoined):
    """L = (1 - w) CE(q) + w D(teacher, q): the small network alone, under a frozen teacher."""

    def __init__(
        self,
        supernet: Supernet,
        subnet: NetworkSlice,
        teacher: Teacher,
        *,
        hard: bool = False,
        weight: float = 0.5,
        temperature: float = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(supernet, subnet, smoothing)
        self.teacher, self.hard, self.weight, self.temperature = teacher, hard, weight, temperature

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        expert, q = self.teacher(images), self.supernet.small(images, self.subnet)
        return distilled_terms(expert, q, target, self.hard, self.weight, self.temperature, self.smoothing)

    @property
    def may_leave_weights_unused(self) -> bool:
        return not all(block.attn and block.mlp for block in self.subnet.blocks)

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"teacher": self.teacher, "subnet": lambda x: self.supernet.small(x, self.subnet)}

    def log(self, step: Step) -> dict[str, float]:
        return {"selected_gflops": self.supernet.flops(self.subnet) / 1e9}


def distilled_terms(
    expert: Tensor, q: Tensor, target: Tensor, hard: bool, weight: float, temperature: float, smoothing: float = 0.0
) -> dict[str, Tensor]:
    """(1 - w) CE(q) and w D(teacher, q). expert, q: logits (B, classes) of teacher and student."""
    term = cross_entropy(q, expert.argmax(dim=1)) if hard else soft_distillation(expert, q, temperature)
    return {"ce": (1 - weight) * cross_entropy(q, target, smoothing), "distill": weight * term}


def soft_distillation(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher/T || student/T), mean over the batch, float32 (Hinton, Vinyals, Dean 2015)."""
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()


def check_distillation(config: Common, refusal: str | None) -> None:
    """Refuse a teacher that nothing learns from, and weights and temperatures that make no loss.

    refusal: in whose place options of distillation are given to no purpose, in words; None: they have one.
    """
    given = [
        flag
        for flag, value in (
            ("--teacher", config.teacher),
            ("--teacher-kwargs", config.teacher_kwargs),
            ("--teacher-checkpoint", config.teacher_checkpoint),
        )
        if value
    ]
    if given and refusal is not None:
        raise UserError(f"{given[0]} goes with {refusal}")
    if given and config.distill == "none":
        raise UserError(f"{given[0]} names a teacher, --distill none has none")
    if config.teacher_kwargs and config.teacher is None:
        raise UserError("--teacher-kwargs are arguments of --teacher; name the model too")
    if not 0 < distill_weight(config) <= 1:
        raise UserError(f"--distill-weight {config.distill_weight}; expected a share above 0 and up to 1")
    if config.distill_temperature <= 0:
        raise UserError(f"--distill-temperature {config.distill_temperature}; expected more than 0")


def distill_weight(config: Common) -> float:
    """The share of the loss that is the teacher's."""
    return DISTILL_WEIGHT if config.distill_weight is None else config.distill_weight
