"""The one training loop, for search and retrain. An objective says what is minimised; the loop owns the rest.

An epoch is a function of (state at its start, seed, epoch): every random source is reseeded at its start, so a
run that was killed and resumed from the last checkpoint gives the run that was not. That is why no checkpoint
holds the state of a random generator: there is none to remember at the end of an epoch.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.machine import distributed
from nas.machine.files import copy_atomically, write_csv
from nas.runs.checkpoint import load_checkpoint, save_checkpoint
from nas.runs.tensorboard import EventFiles
from nas.training.objective import Objective, Step
from search_spaces.errors import UserError

Batch = tuple[Tensor, Tensor]
OnEpoch = Callable[[Mapping[str, Any]], None]
CHECKPOINT = "checkpoint.pt"
BEST = "best.pt"


@dataclass
class Training:
    """Everything one run trains with.

    optimizer steps the weights, arch_optimizer the objective's architecture parameters. scheduler is timm's,
    stepped per epoch and per update. arch_batches: batches for the architecture parameters alone
    (--arch-data val), None when they share the weights' batches. evaluate: accuracy on the held-out part, which
    held_out says in words. accum_steps: batches per optimiser step.
    clip clips the weights' gradients. ema: timm's average of the weights, which is evaluated instead of them.
    keep: checkpoints of the last so many epochs to keep. measure_start: whether the network as it starts is evaluated,
    and may be the best.
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
    channels_last: bool = False
    ema: Any = None
    keep: int = 0
    tensorboard: bool = False
    measure_start: bool = False
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


def seed_everything(seed: int, epoch: int) -> None:
    """Reseed torch, numpy and random for one epoch; every process drops out and mixes by numbers of its own."""
    mixed = (seed * 1_000_003 + epoch * 7919 + 17 + distributed.rank() * 104_729) % 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def fit(training: Training, resume: bool, words: str, on_epoch: OnEpoch | None = None) -> None:
    """Train to the last epoch, from the checkpoint when resuming. Logs, saves and shows progress each epoch.

    on_epoch: called with every row of log.csv once it is on disk.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    first = restore(training) if resume else 0
    training.parallel = distributed.parallel(
        training.objective, training.device, training.objective.may_leave_weights_unused
    )
    grad_scaler = torch.amp.GradScaler(training.device.type, enabled=training.amp_dtype is torch.float16)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    per_epoch = training.steps_per_epoch()
    main = distributed.is_main()
    events = EventFiles(training.folder, first) if training.tensorboard and main else None
    with Progress(*columns, TextColumn("left"), disable=not main) as progress:
        task = progress.add_task(words, total=training.epochs * per_epoch, completed=first * per_epoch)

        def done(row: dict[str, Any]) -> None:
            training.rows.append(row)
            if main:
                save(training, row["epoch"])
            if events is not None:
                events.add(row)
            line = summary_line(row, training.epochs, training.held_out)
            progress.console.print(line, highlight=False, soft_wrap=True)
            if on_epoch is not None:
                on_epoch(row)

        if training.measure_start and not training.rows:
            training.objective.eval()
            done({"epoch": 0, "t": 0.0} | dict(training.evaluate()))
        for epoch in range(first, training.epochs):
            row = train_epoch(training, epoch, grad_scaler, lambda: progress.advance(task))
            training.objective.eval()
            with averaged(training):
                row |= training.evaluate()
            training.choice_rows += [{"epoch": epoch + 1} | r for r in training.objective.choice_rows()]
            training.step_rows += training.objective.step_rows()
            done(row)
    training.parallel = None  # before its process group ends


def train_epoch(training: Training, epoch: int, grad_scaler: Any, advance: Callable[[], None]) -> dict[str, Any]:
    """One pass over the training set. Returns the epoch's row of log.csv, accuracies aside."""
    seed_everything(training.seed, epoch)
    objective, per_epoch = training.objective, training.steps_per_epoch()
    total = training.epochs * per_epoch
    objective.train()
    training.train_loader.set_epoch(epoch)
    arch_batches = endless(training.arch_loader, epoch) if training.arch_loader is not None else None
    sums: dict[str, float] = {}
    images_seen, start = 0, time.perf_counter()
    if training.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for i, batches in enumerate(groups(training.train_loader, training.accum_steps)):
        number = epoch * per_epoch + i
        step = Step(t=number / total, number=number, total=total)
        if training.arch_optimizer is not None:
            for group in training.arch_optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * objective.pace(step)
        terms = update_weights(training, batches, step, grad_scaler)
        if arch_batches is not None:
            update_choices(training, *training.place(next(arch_batches)), step)
        objective.after_step(step)
        if training.ema is not None:
            training.ema.update(objective.supernet.backbone, step=number)
        if training.scheduler is not None:
            training.scheduler.step_update(num_updates=number + 1)
        images_seen += sum(len(images) for images, _ in batches)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value
        advance()
    if training.scheduler is not None:
        training.scheduler.step(epoch + 1)
    objective.after_epoch()
    sums = distributed.mean_values(sums, training.device)
    images_seen = sum(distributed.gather(images_seen))
    seconds = time.perf_counter() - start
    end = Step(t=(epoch + 1) / training.epochs, number=(epoch + 1) * per_epoch, total=total)
    means = {name: value / per_epoch for name, value in sums.items()}
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


def groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches of one optimiser step at a time; the epoch's last step may have fewer."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


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


def update_weights(training: Training, batches: Sequence[Batch], step: Step, grad_scaler: Any) -> dict[str, float]:
    """One optimiser step on weights, and on the architecture parameters when they share the batches.

    The gradient is the mean over the batches, and so are the terms that are returned.
    """
    values: dict[str, float] = {}
    objective = training.parallel or training.objective
    for i, batch in enumerate(batches):
        images, target = training.place(batch)
        if training.mixup is not None:
            images, target = training.mixup(images, target)
        with synchronised(objective, last=i == len(batches) - 1):
            with training.autocast():
                terms = objective(images, target, step)
            terms = weighted(terms, len(images), training.device)
            for name, value in check_finite(terms, step).items():
                values[name] = values.get(name, 0.0) + value / len(batches)
            loss = torch.stack([v.float() for v in terms.values()]).sum() / len(batches)
            grad_scaler.scale(loss).backward()
    optimizers = [training.optimizer]
    if training.arch_optimizer is not None and training.arch_loader is None:
        optimizers.append(training.arch_optimizer)
    for optimizer in optimizers:
        grad_scaler.unscale_(optimizer)
    if training.clip is not None:
        training.clip()
    for optimizer in optimizers:
        grad_scaler.step(optimizer)
    grad_scaler.update()
    training.objective.zero_grad(set_to_none=True)
    return values


def synchronised(objective: torch.nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients once per optimiser step: in the backward pass of its last batch."""
    no_sync = getattr(objective, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()


def weighted(terms: Mapping[str, Tensor], n: int, device: torch.device) -> dict[str, Tensor]:
    """The terms of n images such that their mean over the processes is the mean over the images of all."""
    share = distributed.share_of_batch(n, device)
    return dict(terms) if share is None else {name: value * share for name, value in terms.items()}


def update_choices(training: Training, images: Tensor, target: Tensor, step: Step) -> None:
    """One step of the architecture parameters alone, on a held-out batch (--arch-data val)."""
    assert training.arch_optimizer is not None
    with training.autocast():
        terms = weighted(training.objective(images, target, step), len(images), training.device)
    check_finite(terms, step)
    parameters = training.objective.architecture_parameters()
    loss = torch.stack([v.float() for v in terms.values()]).sum()
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        p.grad = g
    distributed.mean_gradients(parameters)
    training.arch_optimizer.step()
    training.objective.zero_grad(set_to_none=True)


def check_finite(terms: Mapping[str, Tensor], step: Step) -> dict[str, float]:
    """The terms as floats; UserError naming the one that is not finite."""
    floats = torch.stack([v.detach().double() for v in terms.values()]).tolist()  # one synchronisation
    values = dict(zip(terms, floats, strict=True))
    for name, value in values.items():
        if not np.isfinite(value):
            raise UserError(
                f"the {name} term of the loss is {value} at step {step.number + 1} of {step.total};"
                " the last checkpoint is kept; lower --lr or set --clip-grad"
            )
    return values


def endless(loader: Any, epoch: int) -> Iterator[Any]:
    """Batches of a loader over and over, its order drawn from the epoch."""
    turn = 0
    while True:
        loader.set_epoch(epoch * 1000 + turn)
        yield from loader
        turn += 1


def save(training: Training, epochs_done: int) -> None:
    """The checkpoint first, then the tables it holds: a kill in between loses and doubles no row."""
    state: dict[str, Any] = {
        "epoch": epochs_done,
        "epochs": training.epochs,
        "objective": training.objective.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "rows": training.rows,
        "choice_rows": training.choice_rows,
        "step_rows": training.step_rows,
    }
    basis = training.objective.supernet.basis
    if basis is not None:
        state["basis"] = basis.digest()  # its weights are those of timm's model only after the basis is taken back
    if training.scheduler is not None:
        state["scheduler"] = training.scheduler.state_dict()
    if training.arch_optimizer is not None:
        state["arch_optimizer"] = training.arch_optimizer.state_dict()
    if training.ema is not None:
        state["ema"] = training.ema.module.state_dict()
    save_checkpoint(state, training.folder / CHECKPOINT)
    keep_copies(training)
    write_tables(training)


def keep_copies(training: Training) -> None:
    """Keep the checkpoint just written under further names: as the best, and among the last epochs.

    The best is the epoch (0: the start) whose subnet (or large network, where that is all there is) has the highest
    top-1 on the held-out part, the first of equals; without a held-out part there is none.
    """
    path, epoch = training.folder / CHECKPOINT, int(training.rows[-1]["epoch"])
    key = "held_out_subnet_top1" if "held_out_subnet_top1" in training.rows[-1] else "held_out_large_top1"
    scores = [row[key] for row in training.rows if key in row]
    if scores and scores[-1] > max(scores[:-1], default=-1.0):
        copy_atomically(path, training.folder / BEST)
    if training.keep:
        copy_atomically(path, training.folder / f"epoch-{epoch:04d}.pt")
        for old in sorted(training.folder.glob("epoch-*.pt"))[: -training.keep]:
            old.unlink()


def write_tables(training: Training) -> None:
    """log.csv and, in a search, choices.csv; steps.csv where a method moves within an epoch."""
    if training.rows:
        write_csv(training.folder / "log.csv", training.rows)
    if training.choice_rows:
        write_csv(training.folder / "choices.csv", training.choice_rows)
    if training.step_rows:
        write_csv(training.folder / "steps.csv", training.step_rows)


def restore(training: Training) -> int:
    """Load the folder's checkpoint, if there is one. Returns the epochs done."""
    path = training.folder / CHECKPOINT
    if not path.exists():
        return 0
    state = load_checkpoint(path)
    load_state(training, state, path)
    training.rows, training.choice_rows = state["rows"], state["choice_rows"]
    training.step_rows = state.get("step_rows", [])
    if distributed.is_main():
        keep_copies(training)  # the run may have been killed right after the checkpoint
        write_tables(training)
    return int(state["epoch"])


def settle(training: Training, best: bool) -> None:
    """Leave in the backbone the weights that the run gives as its result: averaged where there is an average, of the
    last epoch or of the best.
    """
    path = training.folder / BEST
    if best and path.is_file():
        load_state(training, load_checkpoint(path), path)
    if training.ema is not None:
        training.objective.supernet.backbone.load_state_dict(training.ema.module.state_dict())


def load_state(training: Training, state: Mapping[str, Any], path: Path) -> None:
    """Put a checkpoint's state back. UserError when it is another run's, or stands in another basis."""
    basis = training.objective.supernet.basis
    if state.get("basis") != (None if basis is None else basis.digest()):
        raise UserError(f"{path} stands in another basis than basis.safetensors beside it; both are of one run")
    try:
        training.objective.load_state_dict(state["objective"])
        training.optimizer.load_state_dict(state["optimizer"])
        longer = state.get("epochs", training.epochs) != training.epochs  # its schedule is of the old length
        if training.scheduler is not None and not longer:
            training.scheduler.load_state_dict(state["scheduler"])
        if training.arch_optimizer is not None:
            training.arch_optimizer.load_state_dict(state["arch_optimizer"])
        if training.ema is not None:
            training.ema.module.load_state_dict(state["ema"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} belongs to another run: {str(error).splitlines()[0]}") from None


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: of the device where there is one, of the process otherwise. MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summary_line(row: Mapping[str, Any], epochs: int, held_out: str) -> str:
    """One epoch in one line."""
    parts = [f"epoch {row['epoch']}/{epochs}"] + ([f"loss {row['loss']:.3f}"] if "loss" in row else [])
    keys = {name: f"held_out_{name}_top1" for name in ("large", "subnet")}
    scores = [f"{name} {row[key]:.2f} %" for name, key in keys.items() if key in row]
    parts += [f"{', '.join(scores)} on {held_out}"] if scores else []
    if "expected_gflops" in row:
        parts.append(f"expected {row['expected_gflops']:.4g} G, selected {row['selected_gflops']:.4g} G")
    parts += [f"{row['images_per_s']:.0f} images/s"] if "images_per_s" in row else []
    return "  ".join(parts)
