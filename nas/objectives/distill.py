"""The small network alone, under a frozen teacher; a search under a teacher learns by the same terms."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch.nn.functional as F
from torch import Tensor

from nas.objectives.members import Members, added
from nas.objectives.options import StageTwoOptions
from nas.objectives.teacher import Teacher
from nas.objectives.tokens import Tokens
from nas.training.losses import cross_entropy
from nas.training.objective import Objective, Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet


class Distilled(Objective):
    """L = (1 - w) CE(q) + w D(teacher, q): the small network alone, under a frozen teacher.

    Of a front: those of a step, the sum of their losses over weights that they share. tokens: those of the original
    network, whose error is added, times a weight; of one small network.
    """

    def __init__(
        self,
        supernet: Supernet,
        subnet: NetworkSlice | Members,
        teacher: Teacher,
        *,
        hard: bool = False,
        weight: float = 0.5,
        temperature: float = 1.0,
        smoothing: float = 0.0,
        over_classes: bool = False,
        tokens: tuple[float, Tokens] | None = None,
    ) -> None:
        super().__init__(supernet)
        self.members, self.tokens = Members.of(subnet), tokens
        self.smoothing, self.over_classes = smoothing, over_classes
        self.teacher, self.hard, self.weight, self.temperature = teacher, hard, weight, temperature

    @classmethod
    def of(cls, options: StageTwoOptions, supernet: Supernet, members: Members, teacher: Teacher | None) -> "Distilled":
        """As the options ask for it."""
        assert teacher is not None
        weight, tokens = options.distill_features, None
        if weight:
            only = members.only("--distill-features matches tokens")
            tokens = weight, Tokens(supernet, only, teacher, options.distill_blocks)
        return cls(
            supernet,
            members,
            teacher,
            hard=options.distill == "hard",
            weight=options.teacher_share(),
            temperature=options.distill_temperature,
            smoothing=options.smoothing or 0.0,
            over_classes=options.over_classes(),
            tokens=tokens,
        )

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        if self.tokens is not None:
            weight, tokens = self.tokens
            expert = tokens.expected(images)
            q, streams = self.supernet.small_with_streams(images, self.members.widest, tokens.after)
            return self.terms(expert, q, target) | {"tokens": weight * tokens.error(self.supernet, streams)}
        expert = self.teacher(images)
        small = [self.supernet.small(images, subnet) for subnet in self.members.at(step.number)]
        return added([self.terms(expert, q, target) for q in small])

    def terms(self, expert: Tensor, q: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Those of one small network. expert, q: logits (B, classes)."""
        terms = distilled_terms(expert, q, target, self.hard, self.weight, self.temperature, self.smoothing)
        return per_class(terms, q) if self.over_classes and not self.hard else terms

    def remembering(self) -> AbstractContextManager[None]:
        return self.teacher.remembering()

    @property
    def may_leave_weights_unused(self) -> bool:
        return self.members.may_leave_weights_unused

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"teacher": self.teacher} | self.members.networks(self.supernet)

    def log(self, step: Step) -> dict[str, float]:
        return self.members.log(self.supernet)


def distilled_terms(
    expert: Tensor, q: Tensor, target: Tensor, hard: bool, weight: float, temperature: float, smoothing: float = 0.0
) -> dict[str, Tensor]:
    """(1 - w) CE(q) and w D(teacher, q). expert, q: logits (B, classes) of teacher and student."""
    term = cross_entropy(q, expert.argmax(dim=1)) if hard else soft_distillation(expert, q, temperature)
    return {"ce": (1 - weight) * cross_entropy(q, target, smoothing), "distill": weight * term}


def per_class(terms: dict[str, Tensor], q: Tensor) -> dict[str, Tensor]:
    """The terms with that of the teacher divided by the number of classes, as torch's kl_div has it under "mean"."""
    return terms | {"distill": terms["distill"] / q.shape[1]}


def soft_distillation(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher/T || student/T), mean over the batch, float32 (Hinton, Vinyals, Dean 2015)."""
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
