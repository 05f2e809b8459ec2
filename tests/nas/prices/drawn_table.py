"""A table of latencies that nobody timed: of any supernet, in steps, a little at random."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from nas.latency import line_of, stage_grids, values_of
from nas.prices.latency_table import HalfTimes, LatencyTable, OutsideTimes, Setting, grid_products, network_facts
from supernets.chains import Kind, kinds_of_block, widths_of
from supernets.supernet import Supernet

HERE = Setting("a device of nobody's", "cpu", "eager", "fp32", 1, 1)


def stepped(kind: Kind, widths: Mapping[str, int]) -> float:
    """Nanoseconds of a half: its MACs, its stream counted in threes, and a launch."""
    S = 3 * -(-widths["stream"] // 3)
    if kind.half == "mlp":
        return 900.0 + kind.tokens * 2 * S * widths["hidden"] / 8
    h, qk, v = widths["heads"], widths["qk"], widths["v"]
    return 1500.0 + kind.tokens * (S * h * (2 * qk + 2 * v) + 2 * kind.attended * h * max(qk, v)) / 8


def drawn_table(
    supernet: Supernet,
    seed: int = 0,
    setting: Setting = HERE,
    of: Callable[[Kind, Mapping[str, int]], float] = stepped,
    path: Path | None = None,
) -> LatencyTable:
    """Of a network: half by half what `of` says, each within a tenth, and outside the blocks numbers of no form."""
    rng, halves = random.Random(seed), {}
    base = supernet.identity().stage_widths

    def near(ns: float) -> float:
        return ns * (1 + 0.1 * rng.random())

    for shape, costs in zip(supernet.shapes, supernet.adapter.costs.blocks, strict=True):
        for kind in kinds_of_block(costs):
            whole = widths_of(kind, shape)
            unit = {"qk": shape.qk_unit}
            grid = {name: values_of(name, most, unit.get(name, 1)) for name, most in whole.items()}
            ns = np.array([near(of(kind, widths)) for widths in grid_products(grid)])
            lines = {}
            for name, most in whole.items():
                values = line_of(name, most, unit.get(name, 1))
                lines[name] = values, np.array([near(of(kind, whole | {name: value})) for value in values])
            halves[kind] = HalfTimes(grid, ns.reshape([len(v) for v in grid.values()]), lines)

    def outside(rotated: bool) -> OutsideTimes:
        pairs = []
        for first, second in stage_grids(base, rotated, False):
            ns = np.array([[near(4000.0 + 40 * a + 25 * b) for b in second] for a in first])
            pairs.append((first, second, ns))
        return OutsideTimes(base, tuple(pairs))

    rotated = outside(True) if supernet.adapter.stem_norm is not None else None
    facts = network_facts("drawn", {}, supernet)
    return LatencyTable(setting, facts, halves, outside(False), rotated, (0.01, 0.05), 0, 100, {"torch": "2"}, path)
