"""The order of importance of a start (section 2.7): found on training images, written down, applied."""

import itertools
import json
from typing import Any

import torch

from nas.config import Common
from nas.machine.distributed import is_main, mean_gradients, on_main
from nas.machine.files import write_text
from nas.training.loop import seed_everything
from nas.training.losses import cross_entropy
from supernets.importance import magnitude_scores, orders_of, permute, taylor_pass
from supernets.supernet import Supernet

TAYLOR_BATCHES = 8


def order_by_importance(
    config: Common,
    supernet: Supernet,
    loader: Any,
    device: torch.device,
    *,
    trained: bool,
    fresh_classifier: bool,
) -> dict[str, list[int]]:
    """Sort the supernet in place (section 2.7) and return the permutation; empty when there is none.

    The order is written down before it is applied: a resume loads it and never computes it again.
    """
    kind = config.importance
    if kind is None:
        kind = "none" if not trained else "magnitude" if fresh_classifier else "taylor"
    if kind == "none":
        return {}
    assert config.output is not None
    path = config.output / "permutation.json"
    if config.resume and path.is_file():
        orders: dict[str, list[int]] = json.loads(path.read_text())
    else:
        if kind == "magnitude":
            scores = magnitude_scores(supernet)
        else:
            seed_everything(config.seed, -1)
            loader.set_epoch(0)
            batches = [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, TAYLOR_BATCHES)]
            scores = taylor_pass(supernet, batches, cross_entropy, mean_gradients)
        orders = on_main(lambda: orders_of(scores))
        if is_main():
            write_text(path, json.dumps(orders))
    permute(supernet, orders)
    print(f"heads, neurons and channels sorted by importance ({kind})")
    return orders
