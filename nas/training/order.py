"""The order of importance of a start (section 2.7): found on training images, written down, applied."""

import itertools
import json

from nas.machine.distributed import is_main, mean_gradients, on_main
from nas.machine.files import write_text
from nas.training.loop import seed_everything
from nas.training.losses import cross_entropy
from nas.training.options import LoopOptions
from nas.training.prepared import Prepared
from supernets.importance import magnitude_scores, orders_of, permute, taylor_pass

TAYLOR_BATCHES = 8


def order_by_importance(options: LoopOptions, prepared: Prepared) -> dict[str, list[int]]:
    """Sort the supernet in place (section 2.7) and return the permutation; empty when there is none.

    The order is written down before it is applied: a resume loads it and never computes it again.
    """
    kind, trained = options.importance, prepared.start.given()
    if kind is None:
        kind = "none" if not trained else "magnitude" if prepared.fresh_classifier else "taylor"
    if kind == "none":
        return {}
    path, supernet = prepared.folder / "permutation.json", prepared.supernet
    if options.resume and path.is_file():
        orders: dict[str, list[int]] = json.loads(path.read_text())
    else:
        if kind == "magnitude":
            scores = magnitude_scores(supernet)
        else:
            seed_everything(options.seed, -1)
            loader, device = prepared.loaders.train, prepared.device
            loader.set_epoch(0)
            batches = [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, TAYLOR_BATCHES)]
            scores = taylor_pass(supernet, batches, cross_entropy, mean_gradients)
        orders = on_main(lambda: orders_of(scores))
        if is_main():
            write_text(path, json.dumps(orders))
    permute(supernet, orders)
    print(f"heads, neurons and channels sorted by importance ({kind})")
    return orders
