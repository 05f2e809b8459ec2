"""The relaxation of the exact selection at given stage widths: a bound on what it can reach, and its shadow price.

Choose one option of each group, least loss together, at a cost within limits. Where a unit of cost has a price, every
group chooses for itself; the price at which their choices just fit is that of the limit, and loss + price * cost there
less price * limit is a loss that no choice within the limits goes below.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.int64]
Floats = NDArray[np.float64]
HALVINGS = 100  # of the interval in which the price lies


@dataclass(frozen=True)
class Relaxed:
    """loss: no choice within the limits loses less. price: what a unit of cost is worth; below 0 where more is wanted.

    Every choice within the limits loses at least `loss` and the `excess` of each of its options.
    """

    loss: float
    price: float

    def excess(self, costs: Costs, losses: Floats) -> Floats:
        """Of one group's options, (options,): by how much loss + price * cost is above the group's least."""
        total: Floats = losses + self.price * costs
        total -= total.min()
        return total


def relaxed(costs: Sequence[Costs], losses: Sequence[Floats], most: float, least: float = 0.0) -> Relaxed | None:
    """Of groups with options of these costs and losses, (options,) each; the cost from least to most. None: none is."""
    longest = max(map(len, losses))
    cost, loss = np.zeros((len(costs), longest)), np.full((len(costs), longest), np.inf)
    for k, (c, each) in enumerate(zip(costs, losses, strict=True)):
        cost[k, : len(c)], loss[k, : len(c)] = c, each
    rows = np.arange(len(costs))

    def at(price: float) -> tuple[float, float]:
        """The least loss + price * cost, and its cost."""
        total = loss + price * cost
        taken = total.argmin(1)
        return float(total[rows, taken].sum()), float(cost[rows, taken].sum())

    if sum(float(c.min()) for c in costs) > most or sum(float(c.max()) for c in costs) < least:
        return None
    total, spent = at(0.0)
    if least <= spent <= most:
        return Relaxed(total, 0.0)
    sign, limit = (1.0, most) if spent > most else (-1.0, least)
    low, high = 0.0, sum(float(each.max() - each.min()) for each in losses) + 1.0  # no unit of cost is worth more
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sign * (at(sign * middle)[1] - limit) > 0:
            low = middle
        else:
            high = middle
    price = sign * high
    return Relaxed(at(price)[0] - price * limit, price)
