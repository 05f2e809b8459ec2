"""What one run trains with, and how far it has come inside an epoch."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.machine.every import Every
from nas.training.meter import Meter
from nas.training.objective import Objective

Batch = tuple[Tensor, Tensor]
HALF_AN_HOUR, A_MINUTE = Every(seconds=1800), Every(seconds=60)


@dataclass
class Training:
    """Everything one run trains with.

    optimizer steps the weights, arch_optimizer the objective's architecture parameters. scheduler is timm's,
    stepped per epoch and per update. arch_batches: batches for the architecture parameters alone
    (--arch-data val), None when they share the weights' batches. evaluate: accuracy on the held-out part, which
    held_out says in words. accum_steps: batches per optimiser step.
    clip clips the weights' gradients. ema: timm's average of the weights, which is evaluated instead of them.
    grad_scaler: torch's, at work in float16 only. keep: checkpoints of the last so many epochs to keep. measure_start:
    whether the network as it starts is evaluated, and may be the best. checkpoint_every, log_every: how often, besides
    the ends of epochs. may_skip: so many steps of the run may be left out for a loss that is not finite; skipped: how
    many were.
    """

    objective: Objective
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: Any
    epochs: int
    folder: Path
    seed: int
    device: torch.device
    evaluate: Callable[[], Mapping[str, float]]
    held_out: str
    arch_optimizer: torch.optim.Optimizer | None = None
    arch_loader: Any = None
    mixup: Any = None
    clip: Callable[[], None] | None = None
    accum_steps: int = 1
    amp_dtype: torch.dtype | None = None
    grad_scaler: Any = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    channels_last: bool = False
    ema: Any = None
    checkpoint_every: Every = HALF_AN_HOUR
    log_every: Every = A_MINUTE
    keep: int = 0
    tensorboard: bool = False
    measure_start: bool = False
    may_skip: int = 0
    skipped: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    choice_rows: list[dict[str, Any]] = field(default_factory=list)
    step_rows: list[dict[str, Any]] = field(default_factory=list)
    parallel: torch.nn.Module | None = None  # the objective under DistributedDataParallel, made by `fit`

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's precision."""
        if self.amp_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp_dtype)

    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return -(-len(self.train_loader) // self.accum_steps)

    def place(self, batch: Batch) -> Batch:
        """A batch on the device, in the memory format asked for."""
        images, target = batch[0].to(self.device), batch[1].to(self.device)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images, target


@dataclass
class Pass:
    """One pass over the training set, as far as this process has come.

    steps: optimiser steps done. images: seen by this process. seconds: that parts before an interruption took.
    batch, arch_turn, arch_batch: where the loaders stand. generators: of random numbers, where the pass is to go on.
    """

    epoch: int
    meter: Meter
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    batch: int = 0
    arch_turn: int = 0
    arch_batch: int = 0
    generators: Mapping[str, Any] | None = None
