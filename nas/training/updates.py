"""One optimiser step: on the weights, and on the architecture parameters that share its batches or have their own."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nas.machine import distributed
from nas.training.meter import Diverged, Meter, diverged
from nas.training.objective import Step
from nas.training.training import Batch, Training


def groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one optimiser step at a time; the epoch's last step may have fewer."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def update_weights(training: Training, batches: Sequence[Batch], step: Step, meter: Meter) -> None:
    """One optimiser step on weights, and on the architecture parameters when they share the batches.

    The gradient is the mean over the batches, whose terms go to the meter. Where steps may be left out (--on-nan skip)
    one whose terms or gradients are not finite is, and the meter hears nothing of it; Diverged when they are too many.
    """
    objective = training.parallel or training.objective
    before = training.objective.process_state() if training.may_skip else {}
    seen: list[dict[str, Tensor]] = []
    for i, batch in enumerate(batches):
        images, target = training.place(batch)
        if training.mixup is not None:
            images, target = training.mixup(images, target)
        with synchronised(objective, last=i == len(batches) - 1):
            with training.autocast():
                terms = objective(images, target, step)
            terms = weighted(terms, len(images), training.device)
            seen.append({name: value.detach() for name, value in terms.items()})
            loss = torch.stack([v.float() for v in terms.values()]).sum() / len(batches)
            training.grad_scaler.scale(loss).backward()
    optimizers = [training.optimizer]
    if training.arch_optimizer is not None and training.arch_loader is None:
        optimizers.append(training.arch_optimizer)
    for optimizer in optimizers:
        training.grad_scaler.unscale_(optimizer)
    if training.may_skip and left_out(training, seen, step):
        training.objective.load_process_state(before)
    else:
        meter.add(step, seen)
        if training.clip is not None:
            training.clip()
        for optimizer in optimizers:
            training.grad_scaler.step(optimizer)
    training.grad_scaler.update()
    training.objective.zero_grad(set_to_none=True)


def left_out(training: Training, seen: Sequence[Mapping[str, Tensor]], step: Step) -> bool:
    """Whether a step is to be left out, agreed among the processes; it waits for the device.

    Gradients are not looked at in float16, whose scaler does so itself.
    """
    found = [(name, value) for terms in seen for name, value in terms.items()]
    if not training.grad_scaler.is_enabled():
        gradients = [p.grad for p in training.objective.parameters() if p.grad is not None]
        found.append(("gradient's norm", torch.nn.utils.get_total_norm(gradients)))
    values = torch.stack([value.double() for _, value in found]).tolist()
    bad = next(((name, v) for (name, _), v in zip(found, values, strict=True) if not math.isfinite(v)), None)
    if not distributed.highest(int(bad is not None)):
        return False
    words = next(w for w in distributed.gather(None if bad is None else str(diverged(*bad, step))) if w is not None)
    training.skipped += 1
    if training.skipped > training.may_skip:
        raise Diverged(f"{words}; {training.may_skip} such steps were left out before (--on-nan)")
    term, _, _ = words.partition(";")
    print(f"step {step.number + 1} left out ({training.skipped} of at most {training.may_skip}): {term}")
    return True


def synchronised(objective: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients once per optimiser step: in the backward pass of its last batch."""
    no_sync = getattr(objective, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()


def weighted(terms: Mapping[str, Tensor], n: int, device: torch.device) -> dict[str, Tensor]:
    """The terms of n images such that their mean over the processes is the mean over the images of all."""
    share = distributed.share_of_batch(n, device)
    return dict(terms) if share is None else {name: value * share for name, value in terms.items()}


def update_choices(training: Training, batch: Batch, step: Step, meter: Meter) -> None:
    """One step of the architecture parameters alone, on a held-out batch (--arch-data val)."""
    assert training.arch_optimizer is not None
    images, target = training.place(batch)
    held_out = replace(step, counted=False)
    with training.autocast():
        terms = weighted(training.objective(images, target, held_out), len(images), training.device)
    meter.add(step, [terms], counted=False)
    parameters = training.objective.architecture_parameters()
    loss = torch.stack([v.float() for v in terms.values()]).sum()
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        p.grad = g
    distributed.mean_gradients(parameters)
    training.arch_optimizer.step()
    training.objective.zero_grad(set_to_none=True)


class Endless:
    """Batches of a loader over and over, its order drawn from the epoch.

    turn: how often it was read to its end; batch: where it stands in this turn (`Loader.position`).
    """

    def __init__(self, loader: Any, epoch: int, turn: int = 0, batch: int = 0) -> None:
        self.loader, self.epoch, self.turn, self.batch = loader, epoch, turn, batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.loader.set_epoch(self.epoch * 1000 + self.turn, self.batch)
            for batch in self.loader:
                self.batch = self.loader.position
                yield batch
            self.turn, self.batch = self.turn + 1, 0
