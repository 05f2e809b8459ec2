"""The state of a run on the disk: after every epoch, and inside one wherever it was asked for.

An epoch is a function of (state at its start, seed, epoch): every random source is reseeded at its start. Inside an
epoch a checkpoint also holds what has been drawn and added up since, by every process its own, so that a run that was
killed at any step and resumed gives the run that was not.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean as mean
from typing import Any

from nas.machine import distributed
from nas.machine.files import copy_atomically, write_csv
from nas.machine.randomness import generators, seed_everything
from nas.runs.checkpoint import Unreadable, load_checkpoint, save_checkpoint
from nas.runs.log_columns import held_out
from nas.training.meter import Diverged, Meter
from nas.training.training import Pass, Training
from search_spaces.errors import UserError

CHECKPOINT = "checkpoint.pt"
BEFORE = "checkpoint-before.pt"  # the one before it, should that one be torn
BEST = "best.pt"
JUDGED = {"error": -1, "top1": 1, "kl": -1}  # what the best epoch has most or least of: the first that is there


def save(training: Training, epochs_done: int) -> None:
    """The checkpoint first, then the tables it holds: a kill in between loses and doubles no row."""
    write(training, {"epoch": epochs_done})
    keep_copies(training)
    write_tables(training)


def save_inside(training: Training, passing: Pass) -> None:
    """A checkpoint inside an epoch. Every process calls it, and process 0 writes."""
    own = {
        "steps": passing.steps,
        "sums": passing.meter.sums,
        "counted": passing.meter.steps,
        "images": passing.images,
        "seconds": passing.seconds,
        "batch": passing.batch,
        "arch": (passing.arch_turn, passing.arch_batch),
        "generators": generators(training.device),
        "process": training.objective.process_state(),
    }
    inside = distributed.gather(own)
    training.step_rows += training.objective.step_rows()
    if distributed.is_main():
        write(training, {"epoch": passing.epoch, "inside": inside})


def write(training: Training, place: Mapping[str, Any]) -> None:
    """checkpoint.pt; the one that was there is kept beside it."""
    state: dict[str, Any] = {
        **place,
        "epochs": training.epochs,
        "objective": training.objective.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "grad_scaler": training.grad_scaler.state_dict(),
        "rows": training.rows,
        "choice_rows": training.choice_rows,
        "step_rows": training.step_rows,
        "skipped": training.skipped,
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
    path = training.folder / CHECKPOINT
    if path.exists():
        copy_atomically(path, training.folder / BEFORE)
    save_checkpoint(state, path)


def check_weights(training: Training, step: int) -> None:
    """Diverged where a weight is not finite: no such checkpoint is written over a good one."""
    for name, weight in training.objective.supernet.backbone.named_parameters():
        if not bool(weight.isfinite().all()):
            raise Diverged(
                f"{name} is not finite after step {step}; the last checkpoint is kept; lower --lr or set --clip-grad"
            )


def keep_copies(training: Training) -> None:
    """Keep the checkpoint just written under further names: as the best, and among the last epochs.

    The best is the epoch (0: the start) whose subnet (of a front their mean; or large network, where that is all there
    is) has the highest top-1 on the held-out part, or the least of what counts without labels, the first of equals;
    without a held-out part there is none.
    """
    path, epoch = training.folder / CHECKPOINT, int(training.rows[-1]["epoch"])
    scores = [mean(own) for row in training.rows if (own := held_out_of(row))]
    if scores and scores[-1] > max(scores[:-1], default=-math.inf):
        copy_atomically(path, training.folder / BEST)
    if training.keep:
        copy_atomically(path, training.folder / f"epoch-{epoch:04d}.pt")
        for old in sorted(training.folder.glob("epoch-*.pt"))[: -training.keep]:
            old.unlink()


def held_out_of(row: Mapping[str, Any]) -> list[float]:
    """What small networks are judged by in a row of log.csv, or the large one where it is alone: more is better."""
    for measure, sign in JUDGED.items():
        found = {name: sign * float(row[key]) for name, key in held_out(row, measure).items()}
        small = [value for name, value in found.items() if name != "large"]
        if found:
            return small or list(found.values())
    return []


def write_tables(training: Training) -> None:
    """log.csv and, in a search, choices.csv; steps.csv where a method moves within an epoch."""
    if training.rows:
        write_csv(training.folder / "log.csv", training.rows)
    if training.choice_rows:
        write_csv(training.folder / "choices.csv", training.choice_rows)
    if training.step_rows:
        write_csv(training.folder / "steps.csv", training.step_rows)


def restore(training: Training) -> Pass:
    """Load the folder's checkpoint, if there is one: the pass to go on with, or to begin.

    A checkpoint that cannot be read is passed over for the one before it.
    """
    state = newest(training)
    if state is None:
        return Pass(0, Meter(training.device))
    load_state(training, state, training.folder / CHECKPOINT)
    training.rows, training.choice_rows = state["rows"], state["choice_rows"]
    training.step_rows, training.skipped = state.get("step_rows", []), state.get("skipped", 0)
    inside = state.get("inside")
    if distributed.is_main():
        if inside is None:
            keep_copies(training)  # the run may have been killed right after the checkpoint
        write_tables(training)
    return Pass(int(state["epoch"]), Meter(training.device)) if inside is None else going_on(training, state)


def newest(training: Training) -> dict[str, Any] | None:
    """The last checkpoint that can be read; None where there is none at all."""
    path, before = training.folder / CHECKPOINT, training.folder / BEFORE
    if not path.exists():
        return None
    try:
        return load_checkpoint(path)
    except Unreadable as error:
        if not before.exists():
            raise
        state = load_checkpoint(before)
        if distributed.is_main():
            print(f"warning: {error}; going on from {before.name}", file=sys.stderr)
            copy_atomically(before, path)
        return state


def going_on(training: Training, state: Mapping[str, Any]) -> Pass:
    """The pass that a checkpoint inside an epoch stands in."""
    inside, processes = state["inside"], distributed.world_size()
    epoch = int(state["epoch"])
    if len(inside) == processes:
        own = inside[distributed.rank()]
    else:
        own = handed_on(inside)
        seed_everything(training.seed, epoch, own["steps"])
        own["generators"] = generators(training.device)
        print(
            f"goes on inside epoch {epoch + 1} with {processes} processes instead of {len(inside)}:"
            " allowed, but not the same numbers as without the interruption"
        )
    training.objective.load_process_state(own["process"])
    turn, arch_batch = own["arch"]
    return Pass(
        epoch,
        Meter(training.device, own["sums"], own["counted"]),
        steps=own["steps"],
        images=own["images"],
        seconds=own["seconds"],
        batch=own["batch"],
        arch_turn=turn,
        arch_batch=arch_batch,
        generators=own["generators"],
    )


def handed_on(inside: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What other processes had come to, as one of another number of them takes it over.

    Sums whose mean over the processes counts are everybody's; what is added up over them is process 0's alone.
    """
    first, share = inside[0], int(distributed.is_main())
    mean = {name: sum(own["sums"][name] for own in inside) / len(inside) for name in first["sums"]}
    total = {name: sum(own["process"][name] for own in inside) * share for name in first["process"]}
    return {**first, "sums": mean, "process": total, "images": sum(own["images"] for own in inside) * share}


def go_back(training: Training) -> bool:
    """Put back the last checkpoint of a run that came to nothing after it; whether there is one."""
    state = newest(training)
    if state is not None:
        load_state(training, state, training.folder / CHECKPOINT)
    return state is not None


def settle(training: Training, best: bool) -> None:
    """Leave in the backbone the weights that the run gives as its result: averaged where there is an average, of the
    last epoch or of the best.
    """
    path = training.folder / BEST
    if best and path.is_file():
        load_state(training, load_checkpoint(path), path)
    if training.ema is not None:
        training.objective.supernet.backbone.load_state_dict(training.ema.module.state_dict())


def load_state(training: Training, state: Mapping[str, Any], path: Any) -> None:
    """Put a checkpoint's state back. UserError when it is another run's, or stands in another basis."""
    basis = training.objective.supernet.basis
    if state.get("basis") != (None if basis is None else basis.digest()):
        raise UserError(f"{path} stands in another basis than basis.safetensors beside it; both are of one run")
    try:
        training.objective.load_state_dict(state["objective"])
        training.optimizer.load_state_dict(state["optimizer"])
        if state.get("grad_scaler"):
            training.grad_scaler.load_state_dict(state["grad_scaler"])
        longer = state.get("epochs", training.epochs) != training.epochs  # its schedule is of the old length
        if training.scheduler is not None and not longer:
            training.scheduler.load_state_dict(state["scheduler"])
        if training.arch_optimizer is not None:
            training.arch_optimizer.load_state_dict(state["arch_optimizer"])
        if training.ema is not None:
            training.ema.module.load_state_dict(state["ema"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} belongs to another run: {str(error).splitlines()[0]}") from None
