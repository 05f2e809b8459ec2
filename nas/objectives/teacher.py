"""The network that a small one learns from."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas.config import Common, parse_key_values
from nas.data.datasets import Splits
from nas.machine.timing import count_macs
from nas.networks.backbone import Start, starting_backbone
from search_spaces.errors import UserError, reason
from supernets.supernet import Supernet


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
