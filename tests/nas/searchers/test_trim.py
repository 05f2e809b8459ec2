"""UVC's architecture in whole units (section 2.5): never above the budget, in the band, by the lowest score per MAC."""

import random
from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from nas.searchers.primal_dual import Prices
from nas.searchers.trim import Gate, Plan, Scores, fit_budget, make_plan, remove_units, restore_units
from tests.supernets.test_invariants import few


def small(channels: list[list[float]], hidden: list[float], s1: int = 0, r: Any = (0, 0), s3: int = 0) -> Plan:
    """One block of two heads of two channels and three neurons: a channel costs 5, a head 20, a neuron 4."""
    price = Prices(2, 2, 3, channel=5, neuron=4)
    return make_plan([price], [Scores(channels, hidden)], 10, [s1], [r], [s3])


def test_counts_remove_the_lowest_scores() -> None:
    plan = small([[4, 1], [2, 6]], [3, 1, 2], s1=1, r=(1, 1), s3=2)
    assert plan.blocks[0].channels == [set(), {1}]  # head 0 scores 5, head 1 scores 8
    assert plan.blocks[0].hidden == {0}
    assert plan.flops() == 10 + 5 * (2 + 1) + 4
    assert plan.removed() == {"skipped": 0, "heads": 20, "channels": 5, "neurons": 8}
    assert sum(plan.removed().values()) + plan.flops() == 10 + 40 + 12
    assert plan.bounds() == (10 + 15 + 4, 62)


def test_the_lowest_score_per_mac_leaves_first() -> None:
    # per MAC: neurons 0.75, 0.25, 0.5; channels 0.8, 0.2, 0.4, 1.2; heads 5/20 and 8/20
    plan = small([[4, 1], [2, 6]], [3, 1, 2])
    remove_units(plan, 57)
    assert plan.blocks[0].channels == [{0}, {0, 1}] and plan.blocks[0].hidden == {0, 1, 2}
    remove_units(plan, 53)
    assert plan.blocks[0].hidden == {0, 2}
    remove_units(plan, 52)  # head 0 is now 4/15, below the channel of 0.4
    assert plan.blocks[0].channels == [set(), {0, 1}]
    remove_units(plan, 0)  # a half keeps its last
    assert plan.blocks[0].channels == [set(), {1}] and plan.blocks[0].hidden == {0}


def test_the_highest_score_per_mac_comes_back_if_it_fits() -> None:
    plan = small([[4, 1], [2, 6]], [3, 1, 2], s1=1, r=(1, 1), s3=2)  # 29
    restore_units(plan, 34)
    assert plan.blocks[0].hidden == {0, 2}  # 0.5 per MAC goes before the channel's 0.4
    restore_units(plan, 62)
    assert plan.flops() == 62


def test_skipped_blocks_come_back_until_the_budget_is_nearest() -> None:
    price, score = Prices(2, 2, 3, channel=5, neuron=4), Scores([[4, 1], [2, 6]], [3, 1, 2])

    def kept(margins: list[float], high: int, s3: int = 0, units: bool = True) -> tuple[list[bool], int]:
        plan = make_plan([price] * 4, [score] * 4, 10, [0] * 4, [(0, 0)] * 4, [s3] * 4)
        gates = [Gate(b, True, True, margin) for b, margin in enumerate(margins)]
        fit_budget(plan, gates, high - 4, high, units)
        assert plan.flops() <= high
        return [block.attn and block.mlp for block in plan.blocks], plan.flops()

    assert kept([1, 1, -1, 1], 166)[0] == [True, True, False, True]  # 166: as decided
    assert kept([-3, -1, -4, -2], 166)[0] == [True, True, False, True]
    assert kept([-3, -1, -4, -2], 118) == ([False, True, False, True], 114)  # nearer to 118 than 166 is
    assert kept([-3, -1, -4, -2], 130)[0] == [True, True, False, True]  # 114 is nearer, and below the band
    assert kept([-3, -1, -4, -2], 150) == ([True, True, False, True], 147)  # 166 is nearer; units leave
    assert kept([3, 1, 4, 2], 100, units=False) == ([False, False, True, False], 62)
    assert kept([3, -1, 4, -2], 218, units=False) == ([True] * 4, 218)


@given(data=st.data())
@few
def test_every_plan_ends_in_the_band_where_that_is_possible(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    prices = [Prices(rng.choice([2, 3, 4]), 6, 40, rng.randint(4, 8), rng.randint(4, 9)) for _ in range(5)]
    scores = [
        Scores([[rng.random() for _ in range(6)] for _ in range(p.num_heads)], [rng.random() for _ in range(40)])
        for p in prices
    ]
    full = 50 + sum(p.attn + p.mlp for p in prices)
    plan = make_plan(
        prices,
        scores,
        50,
        [rng.randrange(p.num_heads) for p in prices],
        [[rng.randrange(p.head_dim) for _ in range(p.num_heads)] for p in prices],
        [rng.randrange(40) for _ in prices],
    )
    kind = data.draw(st.sampled_from(["block", "attention", "mlp", "halves", "none"]))
    halves = {"block": [(1, 1)], "attention": [(1, 0)], "mlp": [(0, 1)], "halves": [(1, 0), (0, 1)], "none": []}[kind]
    gates = [Gate(b, bool(a), bool(m), rng.uniform(-3, 3)) for b in range(5) for a, m in halves]
    high = int(full * data.draw(st.sampled_from([0.2, 0.3, 0.5, 0.8, 1.0])))
    fit_budget(plan, gates, high - full // 50, high)
    assert high - full // 50 <= plan.flops() <= high
    assert sum(plan.removed().values()) + plan.flops() == full
    assert all(b.heads() >= 1 for b in plan.blocks if b.attn) and all(b.hidden for b in plan.blocks if b.mlp)
