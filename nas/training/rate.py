"""A learning rate that follows the start (section 2.14): a few steps at each of some rates, factors of ten first."""

import copy
import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from nas.machine.devices import autocast
from nas.machine.distributed import on_main
from nas.machine.files import write_csv
from nas.machine.progress import counted
from nas.machine.randomness import seed_everything
from nas.training.calibration import deciding_images, images_from
from nas.training.objective import Objective, Step
from nas.training.optim import make_optimizer
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from nas.training.training import Batch

RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
COARSE = RATES[1::2]
STEPS = 16  # at each rate, of which the first half warms up
JUDGING = 256  # training images that are set aside for decisions, on which a rate is judged
HARM = 0.02  # of the loss
TABLE = "rates.csv"
OF_NO_RUN = Step(t=1.0, number=-1, total=1, counted=False)


def may_be_tried(prepared: Prepared) -> bool:
    """Whether there is something to lose, and images of which no step reads to see it by."""
    judged = prepared.plan.deciding > 0 or prepared.loaders.deciding is not None
    return judged and prepared.start.given() and not prepared.fresh_classifier


def find_rate(options: LoopOptions, objective: Objective, prepared: Prepared) -> float:
    """The highest rate at which a few steps from this start do no harm; the objective is as it was afterwards.

    What a trained network has learnt is lost at a rate at which a fresh one learns: that shows within a few steps. What
    a higher rate gains over a run does not: so not the least loss is taken, but the highest rate whose loss is within
    HARM of the least. All terms count as at the end of a run; --layer-decay scales the rates as in it. Every other rate
    from low to high, until one is above; then the one after the highest that is not, and where even the first of them
    harms the start, the one below. Written to rates.csv, from which a resumed run has it.
    """
    path = prepared.folder / TABLE
    rate = on_main(lambda: _known(path) if options.resume and path.is_file() else _tried(options, objective, prepared))
    print(f"learning rate {rate:g}: of those tried, the highest that does this start no harm ({TABLE})")
    return rate


def _known(path: Path) -> float:
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return best_of(rows)


def best_of(rows: Sequence[Mapping[str, float]]) -> float:
    """The rate taken of those tried."""
    least = min(row["loss"] for row in rows)
    if least == float("inf"):
        return min(row["lr"] for row in rows)
    return max(row["lr"] for row in rows if row["loss"] <= least * (1 + HARM))


def _tried(options: LoopOptions, objective: Objective, prepared: Prepared) -> float:
    start = {name: copy.deepcopy(value) for name, value in objective.state_dict().items()}
    loader = prepared.loaders.train
    seed_everything(options.seed, -1)
    loader.set_epoch(0)
    batches = [(x.to(prepared.device), y.to(prepared.device)) for x, y in islice(loader, STEPS)]
    judging = judging_images(options, prepared)
    with counted("trying learning rates", len(COARSE) + 1) as advance, objective.remembering():

        def loss_after(rate: float) -> float:
            _step_through(options, objective, prepared, rate, batches)
            found = _judged(options, objective, prepared, judging)
            objective.load_state_dict(start)
            advance()
            return found

        rows = tried(loss_after, lambda: _judged(options, objective, prepared, judging))
    write_csv(prepared.folder / TABLE, rows)
    return best_of(rows)


def tried(loss_after: Callable[[float], float], of_start: Callable[[], float]) -> list[dict[str, float]]:
    """Rates by size, each with its loss: those it takes to find the highest that does no harm."""
    rows: list[dict[str, float]] = []

    def harmless(rate: float) -> bool:
        rows.append({"lr": rate, "loss": loss_after(rate)})
        return best_of(rows) == rate

    for rate in COARSE:
        if not harmless(rate):
            break
    harmless(RATES[RATES.index(best_of(rows)) + 1])
    if best_of(rows) == COARSE[0] and rows[0]["loss"] > (1 + HARM) * of_start():
        harmless(RATES[0])
    return sorted(rows, key=lambda row: row["lr"])


def judging_images(options: LoopOptions, prepared: Prepared) -> list[Batch]:
    """Batches of images that are set aside for decisions: of the training images those that are, or held-out ones."""
    if prepared.plan.deciding:
        images = deciding_images(options, prepared)
    else:
        assert prepared.loaders.deciding is not None
        images = images_from(prepared.loaders.deciding(options.seed), prepared.device, 0, JUDGING)
    found, seen = [], 0
    for batch in images:
        found.append(batch)
        seen += len(batch[1])
        if seen >= JUDGING:
            break
    return found


def _step_through(
    options: LoopOptions, objective: Objective, prepared: Prepared, rate: float, batches: list[Batch]
) -> None:
    """A step on every batch, the first half of them warming up to the rate."""
    optimizer = make_optimizer(replace(options, lr=rate), objective.supernet.backbone)
    objective.train()
    for i, (images, target) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0) * min(1.0, 2 * (i + 1) / len(batches))
        with autocast(options, prepared.device):
            loss = torch.stack([v.float() for v in objective(images, target, OF_NO_RUN).values()]).sum()
        loss.backward()
        optimizer.step()
        objective.zero_grad(set_to_none=True)


def _judged(options: LoopOptions, objective: Objective, prepared: Prepared, judging: list[Batch]) -> float:
    """The loss on the judging images; infinite where it is not finite."""
    objective.eval()
    total = 0.0
    with torch.no_grad(), autocast(options, prepared.device):
        for images, target in judging:
            total += len(target) * float(sum(objective(images, target, OF_NO_RUN).values()))
    found = total / sum(len(target) for _, target in judging)
    return found if found < float("inf") else float("inf")
