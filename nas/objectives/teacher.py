"""The network that a small one learns from."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas.machine.timing import count_macs
from nas.networks.backbone import Start, starting_backbone
from nas.networks.key_values import parse_key_values
from nas.objectives.options import TeacherOptions
from nas.training.prepared import Prepared
from search_spaces.errors import UserError, reason


@dataclass
class Teacher:
    """A frozen network with the dataset's classes. No module, so that no checkpoint holds its weights.

    named: whether the options name it; otherwise it is the network that the small one was cut from. scale, shift:
    (C, 1, 1), from the student's normalisation of images to the teacher's own. flops in MACs.
    """

    name: str
    network: Any
    params: int
    flops: int
    scale: Tensor
    shift: Tensor
    named: bool = False
    known: dict[int, tuple[Tensor, Tensor]] | None = None  # images and their logits, while it remembers

    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W), normalised for the student -> logits (B, classes)."""
        if self.known is None:
            return self.output(images)
        if id(images) not in self.known:
            self.known[id(images)] = images, self.output(images)
        return self.known[id(images)][1]

    @torch.no_grad()
    def output(self, images: Tensor) -> Tensor:
        """The same, computed in any case."""
        return self.network(images * self.scale + self.shift)  # type: ignore[no-any-return]

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, the logits of the same tensor are computed once."""
        self.known = {}
        try:
            yield
        finally:
            self.known = None


def make_teacher(options: TeacherOptions, prepared: Prepared, base: Start, asked: str = "--train distill") -> Teacher:
    """The network that --teacher and --teacher-checkpoint name; by default the original one. Says which it is.

    base: the original weights; those that `prepared` starts from stand for them where they were never trained (a
    search from scratch). asked: the option that asks for a teacher.
    Raises UserError when the teacher was never trained for the dataset's classes, or cannot read its images.
    """
    mean, std = own_mean, own_std = prepared.loaders.stats()
    model, classes, start = prepared.model, prepared.num_classes, prepared.start
    named = options.teacher is not None or options.teacher_checkpoint is not None
    cut = None if named else model.cut
    own_name = model.name if cut is None else f"compact network of {model.name}"
    if not named and (start == base or not base.given()):
        if not start.given():
            raise UserError(f"{asked}: the original network is untrained; give --teacher-checkpoint, or --checkpoint")
        name, network, fresh = own_name, copy.deepcopy(prepared.supernet.backbone), prepared.fresh_classifier
    else:
        name = options.teacher or own_name
        arguments = model.kwargs if options.teacher is None else parse_key_values(options.teacher_kwargs)
        if named:
            base = Start(options.teacher_checkpoint is None, options.teacher_checkpoint, start.seed)
        model_name = options.teacher or model.name
        network, lines, fresh = starting_backbone(
            model_name, arguments, classes, base, prepared.splits.class_names, cut=cut
        )
        print("\n".join(f"teacher: {line}" for line in lines), end="\n" if lines else "")
        cfg = getattr(network, "pretrained_cfg", {}) if options.teacher is not None else {}
        if cfg.get("mean") and len(cfg["mean"]) == len(mean):
            own_mean, own_std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    if fresh:
        raise UserError(
            f"{asked}: {name} was not trained for the dataset's {classes} classes;"
            " give --teacher-checkpoint one that was"
        )
    device, size = prepared.device, prepared.supernet.adapter.input_size
    network = network.to(device).eval().requires_grad_(False)
    scale, shift = (std / own_std).to(device), ((mean - own_mean) / own_std).to(device)
    try:
        macs = count_macs(network, size, device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"teacher {name} cannot read images of {size[1]} x {size[2]} px ({reason(error)});"
            f" give --teacher-kwargs img_size={size[1]}, or another --teacher"
        ) from None
    params = sum(p.numel() for p in network.parameters())
    if not named:
        params, macs = prepared.supernet.params(), prepared.supernet.flops()
    print(f"teacher: {name}, {params / 1e6:.3f} M, {macs / 1e9:.4g} GFLOPs (MACs)")
    return Teacher(name, network, params, macs, scale, shift, named)
