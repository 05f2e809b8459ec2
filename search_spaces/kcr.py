"""KCR: how many, and which, stream channels the MLP of a block reads and writes (section 2.3).

The method of "Compression of Vision Transformer by Reduction of Kernel Complexity" (KCR-Transformer). Attention
and both norms keep the whole stream; the channels that the MLP leaves out pass by on the residual.
"""

import math
from collections.abc import Mapping, Sequence

from search_spaces.method import Candidate, Picks, Settings
from search_spaces.slices import BlockShape, BlockSlice, Kept

STEP = 8  # counts are multiples of this: what tensor cores and vector units take whole
KEPT = "kept_channels"  # the indices' name in a block's entry of arch.json


class KCR:
    """Per block a choice of how many channels; which ones follows from their scores (nas/kcr.py)."""

    name = "kcr"
    choice_names: tuple[str, ...] = ("channels",)
    kept_names: tuple[str, ...] = (KEPT,)

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        E = shape.embed_dim
        if settings.fractions is None:
            counts = {*range(STEP, E + 1, STEP), E}
        else:
            counts = {channel_count(E, fraction) for fraction in settings.fractions}
        return {"channels": tuple(sorted(counts, reverse=True))}, []

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        channels = kept_channels(int(picks["channels"]), shape.embed_dim, kept)
        return BlockSlice(shape.embed_dim, shape.num_heads, shape.hidden, mlp_stream=channels)


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
