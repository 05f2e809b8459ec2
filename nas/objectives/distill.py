"""The small network alone, under a frozen teacher; a search under a teacher learns by the same terms."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from nas.objectives.options import StageTwoOptions
from nas.objectives.teacher import Teacher
from nas.objectives.tokens import Tokens
from nas.training.losses import cross_entropy
from nas.training.objective import Objective, Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet


class Distilled(Objective):
    """L = (1 - w) CE(q) + w D(teacher, q): the small network alone, under a frozen teacher.

    tokens: those of the original network, whose error is added, times a weight.
    """

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
        over_classes: bool = False,
        tokens: tuple[float, Tokens] | None = None,
    ) -> None:
        super().__init__(supernet)
        self.tokens = tokens
        self.subnet, self.smoothing, self.over_classes = subnet, smoothing, over_classes
        self.teacher, self.hard, self.weight, self.temperature = teacher, hard, weight, temperature

    @classmethod
    def of(
        cls, options: StageTwoOptions, supernet: Supernet, subnet: NetworkSlice, teacher: Teacher | None
    ) -> "Distilled":
        """As the options ask for it."""
        assert teacher is not None
        matched = Tokens(supernet, subnet, teacher, options.distill_blocks) if options.distill_features else None
        return cls(
            supernet,
            subnet,
            teacher,
            hard=options.distill == "hard",
            weight=options.teacher_share(),
            temperature=options.distill_temperature,
            smoothing=options.smoothing or 0.0,
            over_classes=options.over_classes(),
            tokens=None if matched is None else (options.distill_features or 0.0, matched),
        )

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        matched: dict[str, Tensor] = {}
        if self.tokens is None:
            expert, q = self.teacher(images), self.supernet.small(images, self.subnet)
        else:
            weight, tokens = self.tokens
            expert = tokens.expected(images)
            q, streams = self.supernet.small_with_streams(images, self.subnet, tokens.after)
            matched["tokens"] = weight * tokens.error(self.supernet, streams)
        terms = distilled_terms(expert, q, target, self.hard, self.weight, self.temperature, self.smoothing)
        return (per_class(terms, q) if self.over_classes and not self.hard else terms) | matched

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


def per_class(terms: dict[str, Tensor], q: Tensor) -> dict[str, Tensor]:
    """The terms with that of the teacher divided by the number of classes, as torch's kl_div has it under "mean"."""
    return terms | {"distill": terms["distill"] / q.shape[1]}


def soft_distillation(teacher_logits: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher/T || student/T), mean over the batch, float32 (Hinton, Vinyals, Dean 2015)."""
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
