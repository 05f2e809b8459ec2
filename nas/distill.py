"""The other ways to train than adjoined: the large network alone, and the small one under a frozen teacher.

UVC's search learns from the same teacher, by the same terms.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.backbone import Start, starting_backbone
from nas.config import Common, parse_key_values
from nas.datasets import Splits
from nas.losses import cross_entropy
from nas.objective import Adjoined, Step
from nas.speed import count_macs
from search_spaces.errors import UserError, reason
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet

DISTILL_WEIGHT = 0.5


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


@dataclass(frozen=True)
class Teacher:
    """A frozen network with the dataset's classes. No module, so that no checkpoint holds its weights.

    scale, shift: (C, 1, 1), from the student's normalisation of images to the teacher's own. flops in MACs.
    """

    name: str
    network: Any
    params: int
    flops: int
    scale: Tensor
    shift: Tensor

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), normalised for the student -> logits (B, classes)."""
        return self.network(images * self.scale + self.shift)  # type: ignore[no-any-return]


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


def make_teacher(
    config: Common,
    supernet: Supernet,
    model: tuple[str, dict[str, Any]],
    base: Start,
    origin: Start,
    fresh_classifier: bool,
    splits: Splits,
    stats: tuple[Tensor, Tensor],
    device: torch.device,
    asked: str = "--train distill",
) -> Teacher:
    """The network that --teacher and --teacher-checkpoint name; by default the original one.

    base: the original weights. origin: those that supernet holds now, before training; it stands for the original
    network where base was never trained (a search from scratch). stats: mean and std (C, 1, 1) that images are
    normalised with. asked: the option that asks for a teacher.
    Raises UserError when the teacher was never trained for the dataset's classes, or cannot read its images.
    """
    mean, std = stats
    own_mean, own_std = stats
    if config.teacher is None and config.teacher_checkpoint is None and (origin == base or not base.given()):
        if not origin.given():
            raise UserError(f"{asked}: the original network is untrained; give --teacher-checkpoint, or --checkpoint")
        name, network, fresh = model[0], copy.deepcopy(supernet.backbone), fresh_classifier
    else:
        name = config.teacher or model[0]
        arguments = model[1] if config.teacher is None else parse_key_values(config.teacher_kwargs)
        start = base
        if config.teacher is not None or config.teacher_checkpoint is not None:
            start = Start(config.teacher_checkpoint is None, config.teacher_checkpoint, config.seed)
        network, lines, fresh = starting_backbone(name, arguments, splits.num_classes, start, splits.class_names)
        print("\n".join(f"teacher: {line}" for line in lines), end="\n" if lines else "")
        cfg = getattr(network, "pretrained_cfg", {}) if config.teacher is not None else {}
        if cfg.get("mean") and len(cfg["mean"]) == len(mean):
            own_mean, own_std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    if fresh:
        raise UserError(
            f"{asked}: {name} was not trained for the dataset's {splits.num_classes} classes;"
            " give --teacher-checkpoint one that was"
        )
    network = network.to(device).eval().requires_grad_(False)
    scale, shift = (std / own_std).to(device), ((mean - own_mean) / own_std).to(device)
    size = supernet.adapter.input_size
    try:
        macs = count_macs(network, size, device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"teacher {name} cannot read images of {size[1]} x {size[2]} px ({reason(error)});"
            f" give --teacher-kwargs img_size={size[1]}, or another --teacher"
        ) from None
    return Teacher(name, network, sum(p.numel() for p in network.parameters()), macs, scale, shift)
