"""The generators that dropout and mixup draw from: seeded by epoch, and, inside an epoch, kept and put back."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from nas.machine import distributed


def seed_everything(seed: int, epoch: int, step: int = 0) -> None:
    """Reseed torch, numpy and random; every process drops out and mixes by numbers of its own."""
    mixed = (seed * 1_000_003 + epoch * 7919 + 17 + distributed.rank() * 104_729 + step * 15_485_863) % 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def generators(device: torch.device) -> dict[str, Any]:
    """Where every generator of this process stands, in types that a checkpoint may hold."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def put_back(state: Mapping[str, Any], device: torch.device) -> None:
    """What `generators` gave."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
