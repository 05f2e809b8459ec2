"""Choosing how many stream channels an MLP reads and writes, and naming which (section 2.3)."""

import math
from collections.abc import Mapping, Sequence

from search_spaces.slices import Kept

STEP = 8  # counts are multiples of this: what tensor cores and vector units take whole
KERNEL = dict(adjoined=True, eta_kc=5e-4, rho=0.3)  # docs/kcr.md says why
NANO_KERNEL = dict(adjoined=True, eta_kc=5e-3, rho=0.15)
KEPT = "kept_channels"  # the indices' name in a block's entry of arch.json


def channel_count(stream: int, fraction: float) -> int:
    """How many of `stream` channels a fraction keeps: the nearest multiple of 8, at least 8, at most all."""
    if fraction >= 1:
        return stream
    return min(stream, max(STEP, STEP * math.floor(stream * fraction / STEP + 0.5)))


def kept_channels(count: int, stream: int, kept: Mapping[str, Sequence[int]]) -> Kept | None:
    """What a slice says about `count` channels of `stream`: None for all, the indices given, or else a prefix.

    A prefix is what a candidate costs before anything is known about the scores. ValueError when the indices are
    not `count` ascending ones below `stream`.
    """
    if not 1 <= count <= stream:
        raise ValueError(f"{count} channels of {stream}")
    if KEPT not in kept:
        return None if count == stream else count
    indices = tuple(kept[KEPT])
    if len(indices) != count:
        raise ValueError(f"{KEPT} holds {len(indices)} indices, the choice is {count}")
    if list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= stream:
        raise ValueError(f"{KEPT} must rise and lie from 0 to {stream - 1}")
    return None if count == stream else indices
