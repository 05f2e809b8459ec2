"""From counts and gates to an architecture within the budget, in whole units and whole MACs (section 2.5).

What is left above the budget leaves by the lowest score per MAC; what was removed below the band comes back by the
highest. Ties go to the first block, heads before channels before neurons.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from nas.searchers.primal_dual import Prices


@dataclass(frozen=True)
class Scores:
    """Squared norms of a block's units: channels (H, d), hidden (M,)."""

    channels: Sequence[Sequence[float]]
    hidden: Sequence[float]


@dataclass(frozen=True)
class Gate:
    """One gate: the half-blocks it skips, and how far its logits are for keeping them."""

    block: int
    attn: bool
    mlp: bool
    margin: float


@dataclass
class BlockPlan:
    """What a block keeps: channels by head (an empty set: the head is gone), neurons; whether a half is there."""

    channels: list[set[int]]
    hidden: set[int]
    attn: bool = True
    mlp: bool = True

    def heads(self) -> int:
        return sum(map(bool, self.channels))


@dataclass
class Plan:
    """A network in the making, and its price."""

    blocks: list[BlockPlan]
    prices: Sequence[Prices]
    scores: Sequence[Scores]
    outer: int

    def flops(self) -> int:
        """MACs, exact."""
        total = self.outer
        for block, price in zip(self.blocks, self.prices, strict=True):
            if block.attn:
                total += price.channel * sum(price.head_dim + len(kept) for kept in block.channels if kept)
            if block.mlp:
                total += price.neuron * len(block.hidden)
        return total

    def removed(self) -> dict[str, int]:
        """MACs that each mechanism took off; together with `flops` they make the backbone's."""
        off = dict.fromkeys(("skipped", "heads", "channels", "neurons"), 0)
        for block, price in zip(self.blocks, self.prices, strict=True):
            off["skipped"] += price.attn * (not block.attn) + price.mlp * (not block.mlp)
            if block.attn:
                off["heads"] += 2 * price.head_dim * price.channel * (price.num_heads - block.heads())
                off["channels"] += price.channel * sum(price.head_dim - len(kept) for kept in block.channels if kept)
            if block.mlp:
                off["neurons"] += price.neuron * (price.hidden - len(block.hidden))
        return off

    def bounds(self) -> tuple[int, int]:
        """The fewest and the most MACs at the halves that are there."""
        least = most = self.outer
        for block, price in zip(self.blocks, self.prices, strict=True):
            least += block.attn * price.channel * (price.head_dim + 1) + block.mlp * price.neuron
            most += block.attn * price.attn + block.mlp * price.mlp
        return least, most

    def half_flops(self, gate: Gate) -> int:
        """MACs of a gate's halves with all their units."""
        price = self.prices[gate.block]
        return gate.attn * price.attn + gate.mlp * price.mlp

    def switch(self, gate: Gate, there: bool) -> None:
        """Skip a gate's halves, or have them back."""
        block = self.blocks[gate.block]
        block.attn, block.mlp = (there if gate.attn else block.attn), (there if gate.mlp else block.mlp)


def make_plan(
    prices: Sequence[Prices],
    scores: Sequence[Scores],
    outer: int,
    heads: Sequence[int],
    channels: Sequence[Sequence[int]],
    hidden: Sequence[int],
) -> Plan:
    """The units left when the given numbers of lowest-scored ones are removed from every block. Nothing is skipped."""
    blocks = []
    for score, s1, r, s3 in zip(scores, heads, channels, hidden, strict=True):
        of_heads = [sum(row) for row in score.channels]
        gone = set(_ascending(of_heads)[:s1])
        kept = [
            set() if h in gone else set(_ascending(row)[k:])
            for h, (row, k) in enumerate(zip(score.channels, r, strict=True))
        ]
        blocks.append(BlockPlan(kept, set(_ascending(score.hidden)[s3:])))
    return Plan(blocks, prices, scores, outer)


def fit_budget(plan: Plan, gates: Sequence[Gate], low: int, high: int, units: bool = True) -> None:
    """Bring a plan's MACs to low <= F <= high, or as near below as it goes.

    A half is kept if its gate's margin is positive. Where more are skipped than the budget asks for, the likeliest
    come back as long as that brings F nearer to `high`, or while the kept ones at their most cannot reach `low`.
    Where the kept ones at their least are too dear, the least likely go. units: whether heads, channels and neurons
    may leave; otherwise gates do it alone.
    """
    for gate in gates:
        plan.switch(gate, gate.margin > 0)
    likely = sorted(gates, key=lambda g: (g.margin, g.block, g.mlp))  # those that are skipped first
    if not units:
        _fit_gates(plan, likely, low, high)
        return
    for gate in reversed([g for g in likely if g.margin <= 0]):
        far = high - plan.flops()
        plan.switch(gate, True)
        if far <= 0 or (abs(high - plan.flops()) > far and plan.bounds()[1] - plan.half_flops(gate) >= low):
            plan.switch(gate, False)
            break
    for gate in [g for g in likely if g.margin > 0]:
        if plan.bounds()[0] > high:
            plan.switch(gate, False)
    if plan.flops() > high:
        remove_units(plan, high)
    if plan.flops() < low:
        restore_units(plan, high)
    if plan.flops() < low and (heads := _lost_heads(plan)):  # a head is more than the band: others leave for it
        _, b, h = heads[0]
        plan.blocks[b].channels[h].add(_ascending(plan.scores[b].channels[h])[-1])
        remove_units(plan, high, heads=False)


def _fit_gates(plan: Plan, likely: Sequence[Gate], low: int, high: int) -> None:
    for gate in likely:
        if plan.flops() > high:
            plan.switch(gate, False)
    for gate in reversed(likely):
        block = plan.blocks[gate.block]
        there = (block.attn or not gate.attn) and (block.mlp or not gate.mlp)
        if plan.flops() < low and not there:
            plan.switch(gate, True)
            if plan.flops() > high:
                plan.switch(gate, False)


def remove_units(plan: Plan, high: int, heads: bool = True) -> None:
    """Remove the unit of lowest score per MAC until F <= high; a half keeps one neuron, or one channel of one head.

    heads: whether whole heads may leave.
    """
    total = plan.flops()

    def head_key(b: int, h: int) -> float:
        kept, price = plan.blocks[b].channels[h], plan.prices[b]
        return sum(plan.scores[b].channels[h][c] for c in sorted(kept)) / (price.channel * (price.head_dim + len(kept)))

    heap: list[tuple[float, int, int, int, int]] = []  # key, block, kind, head, index
    for b, (block, price, score) in enumerate(zip(plan.blocks, plan.prices, plan.scores, strict=True)):
        if block.attn:
            for h, kept in enumerate(block.channels):
                if kept:
                    heap += [(head_key(b, h), b, 0, h, 0)] * heads
                    heap += [(score.channels[h][c] / price.channel, b, 1, h, c) for c in kept]
        if block.mlp:
            heap += [(score.hidden[j] / price.neuron, b, 2, 0, j) for j in block.hidden]
    heapq.heapify(heap)
    while total > high and heap:
        key, b, kind, h, index = heapq.heappop(heap)
        block, price = plan.blocks[b], plan.prices[b]
        kept = block.channels[h]
        if kind == 2 and len(block.hidden) > 1:
            block.hidden.discard(index)
            total -= price.neuron
        elif kind == 1 and index in kept and len(kept) > 1:
            kept.discard(index)
            total -= price.channel
        elif kind == 0 and block.heads() > 1:
            if (now := head_key(b, h)) != key:  # channels have left it since
                heapq.heappush(heap, (now, b, 0, h, 0))
                continue
            total -= price.channel * (price.head_dim + len(kept))
            kept.clear()


def restore_units(plan: Plan, high: int) -> None:
    """Have removed units back by the highest score per MAC, as long as they fit under `high`; whole heads last."""
    total = plan.flops()
    while True:
        offers: list[tuple[float, int, int, int, int]] = []
        for b, (block, price, score) in enumerate(zip(plan.blocks, plan.prices, plan.scores, strict=True)):
            if block.mlp:
                gone = set(range(price.hidden)) - block.hidden
                offers += [(-score.hidden[j] / price.neuron, b, 2, 0, j) for j in gone]
            for h, kept in enumerate(block.channels if block.attn else []):
                gone = set(range(price.head_dim)) - kept if kept else set()
                offers += [(-score.channels[h][c] / price.channel, b, 1, h, c) for c in gone]
        before = total
        for _, b, kind, h, index in sorted(offers):
            price = plan.prices[b]
            cost = price.neuron if kind == 2 else price.channel
            if total + cost <= high:
                total += cost
                (plan.blocks[b].hidden if kind == 2 else plan.blocks[b].channels[h]).add(index)
        if total != before:
            continue
        for _, b, h in _lost_heads(plan):  # a head comes back with its best channel; the next turn adds more
            price, row = plan.prices[b], plan.scores[b].channels[h]
            if total + price.channel * (price.head_dim + 1) <= high:
                total += price.channel * (price.head_dim + 1)
                plan.blocks[b].channels[h].add(_ascending(row)[-1])
                break
        if total == before:
            return


def _lost_heads(plan: Plan) -> list[tuple[float, int, int]]:
    """Removed heads of attention that is there, the highest score per MAC first: key, block, head."""
    lost = []
    for b, (block, price, score) in enumerate(zip(plan.blocks, plan.prices, plan.scores, strict=True)):
        for h, kept in enumerate(block.channels if block.attn else []):
            if not kept:
                lost.append((-sum(score.channels[h]) / (2 * price.head_dim * price.channel), b, h))
    return sorted(lost)


def _ascending(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (scores[i], i))
