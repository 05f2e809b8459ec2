"""What options lose: part by part from tables by width, and those of which none is as cheap and as good."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from nas.prices.halves import Halves
from nas.searchers.losses import PARTS, losses_of, undominated
from tests.nas.free import free_costs
from tests.nas.small import FAMILIES, small_supernet
from tests.supernets.test_invariants import few


def tables(halves: Halves, seed: int = 0, scale: float = 1.0) -> tuple[list[str], dict[str, Tensor]]:
    """Names of blocks, and losses that fall with every unit to 0, as calibration gives them."""
    generator = torch.Generator().manual_seed(seed)
    names, lost = [], {}
    for i, shape in enumerate(halves.space.shapes):
        names.append(f"block{i}")
        H, d, M = shape.num_heads, shape.head_dim, shape.hidden
        for part, shape_of in (("heads", (H,)), ("qk", (d,)), ("v", (H, d)), ("hidden", (M,))):
            each = scale * torch.rand(shape_of, generator=generator, dtype=torch.float64) ** 3
            tails = torch.cat([each, each.new_zeros((*shape_of[:-1], 1))], -1)
            lost[f"block{i}.{part}"] = tails.flip(-1).cumsum(-1).flip(-1)
    return names, lost


@given(
    pairs=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0, 1e-9])), min_size=1),
)
@few
def test_the_undominated_are_those_of_which_none_is_as_cheap_and_as_good(pairs: list[tuple[int, float]]) -> None:
    costs, losses = (np.array(each) for each in zip(*pairs, strict=True))
    kept = undominated(costs, losses)
    assert len(set(kept)) == len(kept) > 0
    assert (np.diff(costs[kept]) > 0).all() and (np.diff(losses[kept]) < 0).all()
    for option in range(len(pairs)):
        as_good = [k for k in range(len(pairs)) if costs[k] <= costs[option] and losses[k] <= losses[option]]
        better = [k for k in as_good if (costs[k], losses[k]) != (costs[option], losses[option])]
        equals = [k for k in as_good if k not in better]
        assert (option in kept) == (not better and option == min(equals))
        assert set(as_good) & set(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_option_loses_what_its_widths_lose(family: str) -> None:
    halves = Halves(free_costs(small_supernet(family), granularity=2))
    names, lost = tables(halves)
    losses = losses_of(halves, names, lost)
    equal = dict.fromkeys(PARTS, 1.0)
    for half in range(len(halves)):
        shape, name, attention = halves.space.shapes[half // 2], names[half // 2], half % 2 == 0
        parts = losses.parts[half]
        assert tuple(parts) == (("heads", "qk", "v") if attention else ("hidden",))
        assert losses.total(half, equal)[0] == 0 and (losses.total(half, equal)[1:] > 0).all()
        for k, option in enumerate(halves.options(half)):
            picks: Any = option.picks
            if not attention:
                assert parts["hidden"][k] == float(lost[f"{name}.hidden"][picks["hidden"]])
                continue
            heads = picks["heads"]
            assert parts["heads"][k] == float(lost[f"{name}.heads"][heads])
            assert parts["qk"][k] == pytest.approx(float(lost[f"{name}.qk"][picks["qk"]]) * heads / shape.num_heads)
            of_v = sum(float(lost[f"{name}.v"][head, picks["v"]]) for head in range(heads))
            assert parts["v"][k] == pytest.approx(of_v)
            if heads == 0:  # a half that is gone loses nothing twice
                assert parts["qk"][k] == parts["v"][k] == 0
        weights = {"heads": 2.0, "qk": 0.5, "v": 3.0, "hidden": 7.0}
        by_hand = sum(weights[part] * loss for part, loss in parts.items())
        assert losses.total(half, weights) == pytest.approx(by_hand)


def test_less_width_never_loses_less() -> None:
    halves = Halves(free_costs(small_supernet("vit"), granularity=1))
    losses = losses_of(halves, *tables(halves, 3))
    for half in range(len(halves)):
        total = losses.total(half, dict.fromkeys(PARTS, 1.0))
        places = {tuple(option.picks.values()): k for k, option in enumerate(halves.options(half))}
        for picks, k in places.items():
            if picks[0] == 0:
                continue
            for part in range(len(picks)):
                wider = places.get((*picks[:part], picks[part] + 1, *picks[part + 1 :]))
                if wider is not None and part > 0:
                    assert total[wider] <= total[k]
