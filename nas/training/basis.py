"""The basis of a start (section 2.7): planned, found on training images, written down, applied."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nas.data.loaders import CALIBRATION_BATCH
from nas.machine.distributed import is_main, mean_gradients, on_main
from nas.machine.files import write_text
from nas.machine.progress import progress
from nas.machine.randomness import seed_everything
from nas.networks.basis_file import BASIS, read_basis, recorded, save_basis
from nas.training.calibration import calibration_images, to_score
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from supernets.basis import Basis, rewrite
from supernets.calibration import Wanted, as_it_stands, calibrate
from supernets.importance import Orders, magnitude_scores, orders_of, permute, taylor_pass

TAYLOR_BATCHES = 8
GRADIENT_IMAGES = 256  # on which the metric of what halves add is found
PERMUTATION = "permutation.json"


@dataclass(frozen=True)
class Standing:
    """How a run's network stands, for arch.json: permutation without a rotation, basis with one."""

    permutation: Orders = field(default_factory=dict)
    basis: Mapping[str, Any] = field(default_factory=dict)


def find_basis(options: LoopOptions, prepared: Prepared) -> Standing:
    """Rewrite the supernet in place as planned, and say how it stands now.

    What was found is written down before it is applied: a resume loads it and never computes it again.
    """
    plan, folder = prepared.plan, prepared.folder
    if plan.kind == "none":
        return Standing()
    kind = options.importance or by_default(prepared)
    if plan.kind == "order" and not plan.weighed:
        return Standing(permutation=_ordered(options, prepared, kind))
    if options.resume and on_main((folder / BASIS).is_file):
        basis = on_main(lambda: read_basis(folder))
    else:
        basis = on_main(lambda: _calibrated(options, prepared, kind))
        basis = replace(basis, orders=_orders(options, prepared, kind, basis.orders))
        on_main(lambda: save_basis(basis, folder))
    rewrite(prepared.supernet, basis)
    print(words(basis, kind))
    return Standing(basis=recorded(basis))


def words(basis: Basis, kind: str) -> str:
    """What was done, in one line: how much of what its readers see the first half of each rotated stream holds."""
    halves = [f"{float(energy[: len(energy) // 2].sum()):.1%}" for _, energy in sorted(basis.energy.items())]
    line = f"stream rotated: the first half of its channels holds {', '.join(halves)} of the energy"
    line = line if halves else "stream not rotated"
    return line + ("" if kind == "none" else f"; heads and neurons sorted by importance ({kind})")


def _ordered(options: LoopOptions, prepared: Prepared, kind: str) -> Orders:
    path = prepared.folder / PERMUTATION
    if options.resume and path.is_file():
        orders: Orders = json.loads(path.read_text())
    else:
        by_error = on_main(lambda: _calibrated(options, prepared, kind)).orders if kind == "error" else {}
        orders = _orders(options, prepared, kind, by_error)
        if is_main():
            write_text(path, json.dumps(orders))
    permute(prepared.supernet, orders)
    prepared.supernet.sorted = orders
    print(f"heads, neurons and channels sorted by importance ({kind})")
    return orders


def by_default(prepared: Prepared) -> str:
    """What orders a network where nothing is said: what least squares cannot take over, where it is to."""
    return "error" if prepared.plan.weighed else unfitted(prepared)


def unfitted(prepared: Prepared) -> str:
    """What orders units that no refit follows: gradients of a new classifier would mean nothing."""
    return "magnitude" if prepared.fresh_classifier else "taylor"


def _orders(options: LoopOptions, prepared: Prepared, kind: str, by_error: Orders) -> dict[str, list[int]]:
    """Of heads, neurons and streams that are not rotated. by_error: of heads and neurons, where that is the kind."""
    if kind == "none":
        return {}
    streams = {f"stream.{shape.stage}": shape.stage in prepared.plan.streams for shape in prepared.supernet.shapes}
    if kind == "error":
        others = {} if all(streams.values()) else _orders(options, prepared, unfitted(prepared), {})
        return dict(by_error) | {name: order for name, order in others.items() if name in streams}
    if kind == "magnitude":
        scores = magnitude_scores(prepared.supernet)
    else:
        seed_everything(options.seed, -1)
        loader, device = prepared.loaders.train, prepared.device
        loader.set_epoch(0)
        batches = [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, TAYLOR_BATCHES)]
        batches, loss = to_score(prepared.supernet, batches, prepared.plan.labels, options.seed)
        scores = taylor_pass(prepared.supernet, batches, loss, mean_gradients)
    orders = on_main(lambda: orders_of(scores, prepared.supernet))
    return {name: order for name, order in orders.items() if not streams.get(name)}


def lost_as_it_stands(options: LoopOptions, prepared: Prepared) -> Mapping[str, Tensor]:
    """What is lost with the first units alone, by names and shapes as in `Basis.lost`, of the weights as they are."""
    count = min(options.calibration_images or GRADIENT_IMAGES, prepared.plan.images)
    images = calibration_images(options, prepared, count)
    shown = progress(images, "weighing units", -(-count // CALIBRATION_BATCH))
    return as_it_stands(prepared.supernet, (batch for batch, _ in shown), GRADIENT_IMAGES, options.seed)


def _calibrated(options: LoopOptions, prepared: Prepared, kind: str) -> Basis:
    plan = prepared.plan
    assert options.calibration_images is not None
    count = min(options.calibration_images, plan.images)
    wanted = Wanted(
        frozenset(plan.streams),
        inside=plan.inside,
        error_order=kind == "error",
        gradient_images=GRADIENT_IMAGES if plan.weighed else 0,
        seed=options.seed,
    )
    batches = -(-count // CALIBRATION_BATCH)
    images = progress(calibration_images(options, prepared, count), "finding a basis", batches)
    return calibrate(prepared.supernet, (batch for batch, _ in images), wanted)
