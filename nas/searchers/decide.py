"""The last choice: accuracy on held-out images among the architectures that a search would take."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nas.training.evaluate import top_k
from nas.training.prepared import Prepared
from search_spaces.slices import NetworkSlice


def decide(
    finalists: Sequence[NetworkSlice], prepared: Prepared, autocast: Callable[[], Any]
) -> tuple[int, list[dict[str, Any]]]:
    """The likeliest finalist whose held-out top-1, at once and untrained, is within a standard error of the best.

    Probabilities are of single blocks, a stage is as wide as its widest: what a combination of stage widths costs the
    whole network is not in them. finalists: likeliest first. Returns the place of the one that is taken, and what was
    measured of each; nothing is where there is but one.
    """
    if len(finalists) == 1:
        return 0, []
    supernet, loaders = prepared.supernet, prepared.loaders
    networks = {str(i): partial(supernet.small, small=subnet) for i, subnet in enumerate(finalists)}
    scores = top_k(networks, loaders.val, prepared.device, autocast)
    top1 = [scores[f"{i}_top1"] for i in range(len(finalists))]
    best = max(top1) / 100
    error = 100 * math.sqrt(best * (1 - best) / loaders.val.num_images)
    taken = next(i for i, value in enumerate(top1) if value >= max(top1) - error)
    print(
        f"finalists: {len(finalists)} architectures within the budget, the likeliest of stage widths that fit it, have"
        f" {min(top1):.2f} to {max(top1):.2f} % top-1 on {loaders.held_out}; taken: number {taken + 1} by"
        f" probability, {top1[taken]:.2f} %"
    )
    return taken, [
        {"stage_widths": list(s.stage_widths), "flops": supernet.flops(s), "held_out_top1": value, "taken": i == taken}
        for i, (s, value) in enumerate(zip(finalists, top1, strict=True))
    ]
