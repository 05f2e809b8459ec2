"""What each option of each half loses (section 2.10): the numbers that the exact program adds up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nas.prices.halves import Costs, HalfOption, Halves
from search_spaces.slices import BlockShape

Floats = NDArray[np.float64]
PARTS = ("heads", "qk", "v", "hidden")


@dataclass(frozen=True)
class Losses:
    """Of each half, part by part: (options,), nats of divergence per image, or Taylor's units; 0 for the whole half."""

    parts: tuple[Mapping[str, Floats], ...]

    def total(self, half: int, weights: Mapping[str, float]) -> Floats:
        """(options,): the sum over the half's parts, each times its weight."""
        total: Floats = sum(weights[part] * loss for part, loss in self.parts[half].items())  # type: ignore[assignment]
        return total


def losses_of(halves: Halves, names: Sequence[str], lost: Mapping[str, Tensor]) -> Losses:
    """From what is lost with the first units alone, by "<block>.heads", ".qk", ".v" and ".hidden" (calibration.py).

    names: of the blocks. lost: (H + 1,), (d + 1,), (H, d + 1) and (M + 1,). What q and k lose is shared by the heads
    alike; what v loses is each head's own.
    """
    parts = []
    for half in range(len(halves)):
        block, shape, options = names[half // 2], halves.space.shapes[half // 2], halves.options(half)
        own = {part: lost[f"{block}.{part}"].double().numpy() for part in (PARTS[:3] if half % 2 == 0 else PARTS[3:])}
        rows = [_attention(shape, option, own) if half % 2 == 0 else _mlp(shape, option, own) for option in options]
        parts.append({part: np.array([row[part] for row in rows]) for part in own})
    return Losses(tuple(parts))


def _attention(shape: BlockShape, option: HalfOption, lost: Mapping[str, Any]) -> dict[str, float]:
    kept = option.slice
    if not kept.attn:
        return {"heads": float(lost["heads"][0]), "qk": 0.0, "v": 0.0}
    heads, qk, v = (int(option.picks[name]) for name in ("heads", "qk", "v"))
    share = heads / shape.num_heads
    return {
        "heads": float(lost["heads"][heads]),
        "qk": float(lost["qk"][qk]) * share,
        "v": float(lost["v"][:heads, v].sum()),
    }


def _mlp(shape: BlockShape, option: HalfOption, lost: Mapping[str, Any]) -> dict[str, float]:
    return {"hidden": float(lost["hidden"][int(option.picks["hidden"]) if option.slice.mlp else 0])}


def undominated(costs: Costs, losses: Floats) -> list[int]:
    """The options of which none is as cheap and loses as little, by rising cost; of equals the first."""
    order = sorted(range(len(losses)), key=lambda o: (costs[o], losses[o], o))
    kept: list[int] = []
    for option in order:
        if not kept or losses[option] < losses[kept[-1]]:
            kept.append(option)
    return kept
