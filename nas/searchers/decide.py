"""The last choice: accuracy on held-out images among the architectures that a search would take."""

import math
from functools import partial
from typing import Any

from nas.data.loaders import Loaders
from nas.prices.selection import Selection
from nas.searchers.supernet_search import Search
from nas.training.evaluate import top_k
from nas.training.loop import Training
from search_spaces.method import Picks
from search_spaces.slices import network_slice


def decide(
    objective: Search, training: Training, loaders: Loaders, full_stage_width: bool
) -> tuple[list[Picks], Selection | None, list[dict[str, Any]]]:
    """The likeliest finalist whose held-out top-1, at once and untrained, is within a standard error of the best.

    Probabilities are of single blocks, a stage is as wide as its widest: what a combination of stage widths costs the
    whole network is not in them. Returns the picks, their selection, and what was measured of every finalist:
    likeliest first, empty if there is but one.
    """
    print("choosing the architecture ...")  # up to a minute or two of integer programs for a Swin-B
    entries = objective.finalists() if loaders.val is not None else [objective.selection()]
    if len(entries) == 1:
        return *entries[0], []
    space, supernet = objective.costs.space, objective.supernet
    subnets = [
        network_slice(space.shapes, space.block_slices(picks, objective.kept(picks)), full_stage_width)
        for picks, _ in entries
    ]
    networks = {str(i): partial(supernet.small, small=subnet) for i, subnet in enumerate(subnets)}
    scores = top_k(networks, loaders.val, training.device, training.autocast)
    top1 = [scores[f"{i}_top1"] for i in range(len(entries))]
    best = max(top1) / 100
    error = 100 * math.sqrt(best * (1 - best) / loaders.val.num_images)
    taken = next(i for i, value in enumerate(top1) if value >= max(top1) - error)
    print(
        f"stage widths: {len(entries)} combinations fit the budget, the likeliest architecture of each has"
        f" {min(top1):.2f} to {max(top1):.2f} % top-1 on {training.held_out}; taken: number {taken + 1} by"
        f" probability, {top1[taken]:.2f} %"
    )
    measured = [
        {"stage_widths": list(s.stage_widths), "flops": supernet.flops(s), "held_out_top1": value, "taken": i == taken}
        for i, (s, value) in enumerate(zip(subnets, top1, strict=True))
    ]
    return *entries[taken], measured
