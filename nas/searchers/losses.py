"""What each option of each half loses (section 2.10): the numbers that the exact program adds up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nas.prices.halves import Costs, HalfOption, Halves
from search_spaces.slices import BlockShape, BlockSlice, count

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
        if not (shape.mlp if half % 2 else shape.attn):  # the network has none, so none is lost
            parts.append(dict.fromkeys(PARTS[3:] if half % 2 else PARTS[:3], np.zeros(len(options))))
            continue
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


def tails(scores: Tensor) -> Floats:
    """What goes with all but the first of n units, (n + 1,)."""
    units = scores.detach().double().cpu().numpy()
    return np.append(np.cumsum(units[::-1])[::-1], 0.0)


def slice_losses(
    names: Sequence[str],
    shapes: Sequence[BlockShape],
    slices: Sequence[Sequence[BlockSlice]],
    scores: Mapping[str, Tensor],
    stream_lost: Mapping[int, Floats],
) -> list[Floats]:
    """Of each block what each of its slices leaves out, (slices,), as a share of what all blocks have.

    scores: of heads and neurons, by "<block>.heads" and ".hidden". stream_lost: of each stage the share of its stream
    beyond the first w channels, (E + 1,), which is lost of what a half's units do.
    """
    whole = sum(float(scores[f"{name}.{part}"].sum()) for name in names for part in ("heads", "hidden"))
    found = []
    for name, shape, own in zip(names, shapes, slices, strict=True):
        heads, hidden = tails(scores[f"{name}.heads"]), tails(scores[f"{name}.hidden"])
        beyond = stream_lost[shape.stage]
        kept = [
            (1 - beyond[s.stream]) * (heads[0] - heads[count(s.heads)]) * s.attn
            + (1 - beyond[s.num_mlp_stream()]) * (hidden[0] - hidden[count(s.hidden)]) * s.mlp
            for s in own
        ]
        found.append((heads[0] + hidden[0] - np.array(kept)) / whole)
    return found


def undominated(costs: Costs, losses: Floats, others: Sequence[Costs] = ()) -> list[int]:
    """The options of which none is as cheap and loses as little, by rising cost; of equals the first.

    others: what they cost by further prices, (options,) each.
    """
    order = sorted(range(len(losses)), key=lambda o: (costs[o], losses[o], *(other[o] for other in others), o))
    rest = np.array([losses, *others]).T  # (options, prices); the cost rises anyway
    kept: list[int] = []
    for option in order:
        before = kept if others else kept[-1:]
        if not (rest[before] <= rest[option]).all(1).any():
            kept.append(option)
    return kept
