"""The one training loop, for search and retrain. An objective says what is minimised; the loop owns the rest."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from nas.machine import distributed
from nas.machine.every import Clock
from nas.machine.randomness import put_back, seed_everything
from nas.machine.stopping import Asked, Preempted, at_next_step
from nas.training.meter import Diverged, Meter
from nas.training.objective import Step
from nas.training.shown import Shown
from nas.training.state import check_weights, restore, save, save_inside
from nas.training.training import Pass, Training
from nas.training.updates import Endless, groups, update_choices, update_weights

OnEpoch = Callable[[Mapping[str, Any]], None]
NOTHING, LOOK, SAVE, STOP = range(4)  # what a step's end asks for; of several processes the most counts


def fit(training: Training, resume: bool, words: str, on_epoch: OnEpoch | None = None) -> None:
    """Train to the last epoch, from the checkpoint when resuming. Logs, saves and shows progress.

    on_epoch: called with every row of log.csv once it is on disk. Raises Diverged when a term of the loss, or a weight,
    is not finite, in every process; Preempted after a checkpoint when a signal has asked to stop.
    """
    passing = restore(training) if resume else Pass(0, Meter(training.device))
    training.parallel = distributed.parallel(
        training.objective, training.device, training.objective.may_leave_weights_unused
    )
    try:
        with Shown(training, words, passing) as shown, at_next_step() as asked:
            ends = Ends(training, shown, asked, passing)
            if training.measure_start and not training.rows:
                training.objective.eval()
                ends.epoch({"epoch": 0, "t": 0.0} | dict(training.evaluate()), on_epoch)
            for epoch in range(passing.epoch, training.epochs):
                shown.since(passing)
                row = train_epoch(training, passing, ends.step)
                training.objective.eval()
                with averaged(training):
                    row |= training.evaluate()
                training.choice_rows += [{"epoch": epoch + 1} | r for r in training.objective.choice_rows()]
                training.step_rows += training.objective.step_rows()
                ends.epoch(row, on_epoch)
                passing = Pass(epoch + 1, Meter(training.device))
    finally:
        training.parallel = None  # before its process group ends


class Ends:
    """What happens when a step or an epoch ends: it is shown and saved, and the run stops where it was asked to."""

    def __init__(self, training: Training, shown: Shown, asked: Asked, first: Pass) -> None:
        self.training, self.shown, self.asked = training, shown, asked
        self.clock = Clock(training.checkpoint_every, shown.steps_done(first))

    def step(self, passing: Pass) -> None:
        """Of all processes together."""
        self.shown.step(passing)
        number = self.shown.steps_done(passing)
        wish = distributed.highest(wished(passing.meter, self.asked, self.clock.due(number)))
        if wish == NOTHING:
            return
        check(passing.meter)
        check_weights(self.training, number)
        save_inside(self.training, passing)
        self.clock.restart(number)
        if wish == STOP:
            raise Preempted(f"{self.asked.signal or 'a signal'} after step {number} of {self.shown.total}")

    def epoch(self, row: dict[str, Any], on_epoch: OnEpoch | None) -> None:
        """row: of log.csv."""
        training, number = self.training, row["epoch"] * self.shown.per_epoch
        training.rows.append(row)
        check_weights(training, number)
        if distributed.is_main():
            save(training, row["epoch"])
        self.clock.restart(number)
        self.shown.epoch(row)
        if on_epoch is not None:
            on_epoch(row)
        if distributed.highest(int(self.asked.signal is not None)):
            raise Preempted(f"{self.asked.signal or 'a signal'} after epoch {row['epoch']} of {training.epochs}")


def wished(meter: Meter, asked: Asked, due: bool) -> int:
    """What this process wants to be done after a step."""
    if asked.signal is not None:
        return STOP
    if due:
        return SAVE
    return NOTHING if meter.failure is None else LOOK


def check(meter: Meter) -> None:
    """Diverged in every process where one has met a term that is not finite: the first one's."""
    meter.read()
    if distributed.highest(int(meter.failure is not None)):
        raise Diverged(next(words for words in distributed.gather(str(meter.failure or "")) if words))


def train_epoch(training: Training, passing: Pass, after_step: Callable[[Pass], None]) -> dict[str, Any]:
    """One pass over the training set, or what is left of it. Returns the epoch's row of log.csv, accuracies aside."""
    epoch, meter = passing.epoch, passing.meter
    seed_everything(training.seed, epoch)
    objective, per_epoch, loader = training.objective, training.steps_per_epoch(), training.train_loader
    total = training.epochs * per_epoch
    objective.train()
    loader.set_epoch(epoch, passing.batch)
    arch = None
    if training.arch_loader is not None:
        arch = Endless(training.arch_loader, epoch, passing.arch_turn, passing.arch_batch)
    arch_batches = iter(arch) if arch is not None else None
    if passing.generators is not None:
        put_back(passing.generators, training.device)
    start = time.perf_counter() - passing.seconds
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for batches in groups(loader, training.accum_steps):
        number = epoch * per_epoch + passing.steps
        step = Step(t=number / total, number=number, total=total)
        if training.arch_optimizer is not None:
            for group in training.arch_optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * objective.pace(step)
        update_weights(training, batches, step, meter)
        if arch is not None and arch_batches is not None:
            update_choices(training, next(arch_batches), step, meter)
            passing.arch_turn, passing.arch_batch = arch.turn, arch.batch
        objective.after_step(step)
        if training.ema is not None:
            training.ema.update(objective.supernet.backbone, step=number)
        if training.scheduler is not None:
            training.scheduler.step_update(num_updates=number + 1)
        passing.steps, passing.batch = passing.steps + 1, loader.position
        passing.images += sum(len(images) for images, _ in batches)
        passing.seconds = time.perf_counter() - start
        after_step(passing)
    check(meter)
    if training.scheduler is not None:
        training.scheduler.step(epoch + 1)
    objective.after_epoch()
    sums = distributed.mean_values(meter.sums, training.device)
    means = {name: value / max(meter.steps, 1) for name, value in sums.items()}
    images_seen = sum(distributed.gather(passing.images))
    seconds = time.perf_counter() - start
    end = Step(t=(epoch + 1) / training.epochs, number=(epoch + 1) * per_epoch, total=total)
    row: dict[str, Any] = {"epoch": epoch + 1, "t": end.t, "loss": sum(means.values())}
    row |= {f"loss_{name}": value for name, value in means.items()} | objective.log(end)
    row["lr"] = training.optimizer.param_groups[0]["lr"]
    if training.arch_optimizer is not None:
        row["arch_lr"] = training.arch_optimizer.param_groups[0]["lr"]
    return row | {
        "images_per_s": images_seen / seconds,
        "peak_memory_mb": peak_memory_mb(training.device),
        "seconds": seconds,
    }


@contextmanager
def averaged(training: Training) -> Iterator[None]:
    """The backbone holds the averaged weights inside, where there are any, and its own again afterwards."""
    if training.ema is None:
        yield
        return
    backbone = training.objective.supernet.backbone
    own = {name: t.clone() for name, t in backbone.state_dict().items()}
    backbone.load_state_dict(training.ema.module.state_dict())
    try:
        yield
    finally:
        backbone.load_state_dict(own)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: of the device where there is one, of the process otherwise. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
