"""The small network alone, after the original one's tokens and output: no label is read, no classifier needed."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nas.machine.distributed import sum_
from nas.objectives.distill import soft_distillation
from nas.objectives.members import Members
from nas.objectives.options import StageTwoOptions
from nas.objectives.teacher import Teacher
from nas.objectives.tokens import LEAST, Tokens
from nas.training.objective import Objective, Step
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet

JUDGED = Step(t=1.0, number=-1, total=1, counted=False)  # of no run


class Features(Objective):
    """L = W · error of tokens + error of the features, or with a classifier KL(teacher || q), without labels.

    Tokens are compared in the channels that the small network keeps; features all of them, as its last layer gives
    them.
    """

    def __init__(
        self,
        supernet: Supernet,
        subnet: NetworkSlice,
        teacher: Teacher,
        *,
        weight: float = 1.0,
        blocks: tuple[int, ...] = (),
        temperature: float = 1.0,
    ) -> None:
        super().__init__(supernet)
        self.members, self.teacher, self.weight, self.temperature = Members.of(subnet), teacher, weight, temperature
        self.tokens = Tokens(supernet, subnet, teacher, blocks)

    @classmethod
    def of(cls, options: StageTwoOptions, supernet: Supernet, members: Members, teacher: Teacher | None) -> "Features":
        """As the options ask for it. UserError for a front: tokens are matched in one network's channels."""
        assert teacher is not None
        weight = 1.0 if options.distill_features is None else options.distill_features
        more = {"blocks": options.distill_blocks, "temperature": options.distill_temperature}
        subnet = members.only("--train features matches tokens")
        return cls(supernet, subnet, teacher, weight=weight, **more)  # type: ignore[arg-type]

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        expert = self.tokens.expected(images)
        output, streams = self.supernet.small_with_streams(images, self.members.widest, self.tokens.after)
        terms = {"tokens": self.weight * self.tokens.error(self.supernet, streams)}
        if self.supernet.adapter.feature_head is None:
            return terms | {"distill": soft_distillation(expert, output, self.temperature)}
        return terms | {"features": relative_error(expert, output)}

    @property
    def may_leave_weights_unused(self) -> bool:
        return self.members.may_leave_weights_unused

    @torch.no_grad()
    def held_out(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Its own loss, which is what the best epoch has least of."""
        device = next(self.supernet.parameters()).device
        total, seen = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        for images, target in batches:
            terms = self(images.to(device), target.to(device), JUDGED)
            total = total + len(images) * torch.stack([v.double() for v in terms.values()]).sum()
            seen = seen + len(images)
        sums = torch.stack([total, seen])
        sum_(sums)
        return {"subnet_error": float(sums[0] / sums[1].clamp_min(1))}

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        return {"teacher": self.teacher} | self.members.networks(self.supernet)

    def log(self, step: Step) -> dict[str, float]:
        return self.members.log(self.supernet)


def relative_error(expected: Tensor, found: Tensor) -> Tensor:
    """|a - b|^2 / |a|^2 of rows (B, E), mean over the batch, float32."""
    a, b = expected.float(), found.float()
    return ((a - b).square().sum(-1) / a.square().sum(-1).clamp_min(LEAST)).mean()
