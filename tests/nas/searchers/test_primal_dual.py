"""UVC's minimax step (section 2.5), move by move, against values worked out by hand."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from nas.objectives.distill import distilled_terms
from nas.searchers.minimax import unit_prices
from nas.searchers.primal_dual import (
    PUBLISHED_PRICE,
    PUBLISHED_STEPS,
    AveragedSGD,
    Prices,
    Rates,
    ascend,
    ceil,
    constraint,
    damped_price,
    flops,
    hard,
    next_score,
    shares,
    shrink_smallest,
    smallest_sum,
    step_counts,
    unit_scores,
)
from search_spaces.slices import network_slice
from search_spaces.uvc import UVC
from tests.nas.small import UVC_FAMILIES, small_supernet
from tests.supernets.test_invariants import few


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_group_scores_are_squared_norms_of_columns() -> None:
    proj = tensor(1, 2, 0, 3, 2, 0, 1, 1).view(2, 4)  # (E 2, 2 heads of 2)
    fc2 = tensor(3, 0, 1, 4, 2, 1).view(2, 3)
    channels, neurons = unit_scores(proj, fc2, 2)
    assert channels.tolist() == [[5.0, 4.0], [1.0, 10.0]]
    assert neurons.tolist() == [25.0, 4.0, 2.0]
    assert shares(channels).tolist() == [[5 / 9, 4 / 9], [1 / 11, 10 / 11]]


def test_the_sum_of_the_smallest_and_its_slope() -> None:
    scores = tensor(0.5, 0.1, 0.4, 0.2)
    assert [float(smallest_sum(scores, tensor(k)[0])) for k in range(5)] == pytest.approx([0, 0.1, 0.3, 0.7, 1.2])
    assert [float(next_score(scores, tensor(k)[0])) for k in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]


def test_move_1_is_cross_entropy_and_distillation() -> None:
    q, expert, target = tensor(0.0, math.log(3.0))[None], tensor(0.0, 0.0)[None], torch.tensor([1])
    terms = distilled_terms(expert, q, target, False, 0.1, 1.0)
    assert float(terms["ce"]) == pytest.approx(0.9 * -math.log(3 / 4))
    assert float(terms["distill"]) == pytest.approx(0.1 * 0.5 * (math.log(2) + math.log(2 / 3)), rel=1e-6)


def test_move_2_shrinks_the_smallest_groups_alone() -> None:
    factors = shrink_smallest(tensor(0.5, 0.1, 0.4, 0.2), tensor(2)[0], lr=0.25, duals=tensor(2.0)[0])
    assert factors.tolist() == [1.0, 0.5, 1.0, 0.5]  # 1 / (1 + 2 * 0.25 * 2)
    two = shrink_smallest(tensor(3, 1, 1, 3).view(2, 2), tensor(0, 1), lr=1.0, duals=tensor(9.0, 0.5))
    assert two.tolist() == [[1.0, 1.0], [0.5, 1.0]]


def test_move_3_steps_shares_clips_and_projects() -> None:
    sizes, counts = tensor(4, 100), tensor(1.0, 98.9)
    assert step_counts(counts, tensor(0.5, -0.25), sizes, 0.01).tolist() == pytest.approx([0.98, 99.0])  # 98.9 + 0.25
    clipped = step_counts(tensor(0.0, 50.0), tensor(4.0, -2.0), sizes, 0.01)  # by the largest: (1, -1/2)
    assert clipped.tolist() == pytest.approx([0.0, 50.5])


def test_counts_are_whole_and_gates_are_decided_but_gradients_pass() -> None:
    s, keep = tensor(0.2, 3.0).requires_grad_(), tensor(0.4, 0.6).requires_grad_()
    assert ceil(s).tolist() == [1.0, 3.0] and hard(keep).tolist() == [0.0, 1.0]
    (to_s,) = torch.autograd.grad((ceil(s) * tensor(2, 5)).sum(), s)
    (to_keep,) = torch.autograd.grad((hard(keep) * tensor(2, 5)).sum(), keep)
    assert to_s.tolist() == to_keep.tolist() == [2.0, 5.0]


def test_move_4_averages_a_window_and_has_momentum() -> None:
    gate = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = AveragedSGD([gate], lr=0.1, momentum=0.9, window=2)
    seen = []
    for gradient in (1.0, 3.0, None, 0.0, 2.0):
        gate.grad = None if gradient is None else torch.tensor([gradient])
        optimizer.step()
        seen.append(gate.item())
    # means 2 and 1: 1 - 0.1 * 2, then 0.8 - 0.1 * (0.9 * 2 + 1)
    assert seen == pytest.approx([1.0, 0.8, 0.8, 0.8, 0.52])


def test_move_4_resumes_in_the_middle_of_a_window() -> None:
    gates = [torch.nn.Parameter(torch.tensor([1.0])) for _ in range(2)]
    first, second = (AveragedSGD([g], lr=0.1, momentum=0.9, window=3) for g in gates)
    for i in range(8):
        for gate, optimizer in zip(gates, (first, second), strict=True):
            gate.grad = torch.tensor([float(i)])
            optimizer.step()
        if i == 4:
            state = second.state_dict()
            second = AveragedSGD([gates[1]], lr=0.1, momentum=0.9, window=3)
            second.load_state_dict(state)
    assert gates[0].item() == gates[1].item() != 1.0


def test_move_5_ascends_and_never_below_zero() -> None:
    assert ascend(tensor(0.5, 0.1), tensor(0.2, -0.3), 2.0).tolist() == pytest.approx([0.9, 0.0])


def test_the_constraint_is_clamped_in_value_and_its_gradient_passes() -> None:
    fraction = tensor(1.0, 0.55, 0.1).requires_grad_()
    value = constraint(fraction, 0.3)
    assert value.tolist() == pytest.approx([0.5, 0.25, -0.2])
    (gradient,) = torch.autograd.grad(value.sum(), fraction)
    assert gradient.tolist() == [1.0, 1.0, 1.0]
    assert damped_price(tensor(0.2), tensor(0.5, -0.5)).tolist() == pytest.approx([1.7, -1.3])


def test_rates_are_the_published_ones_at_the_published_length() -> None:
    rates = Rates(PUBLISHED_STEPS)
    assert (rates.weights, rates.duals) == (1e-4, 1e-4)
    assert (rates.counts * 768, rates.budget / PUBLISHED_PRICE) == (pytest.approx(0.02), 1.0)
    assert rates.gate_weight(0.5) * PUBLISHED_PRICE == pytest.approx(5e-4)
    assert (rates.gate_window, rates.gates(0.1)) == (50, pytest.approx(0.1))
    short = Rates(100)  # as much in all of the run, whatever its length
    assert short.counts * 100 == pytest.approx(rates.counts * PUBLISHED_STEPS)
    assert short.gates(0.1) * 100 == pytest.approx(0.1 * PUBLISHED_STEPS / 50) and short.gate_window == 1


def test_flops_and_their_slopes_by_hand() -> None:
    price = Prices(num_heads=3, head_dim=4, hidden=10, channel=5, neuron=7)  # attention 120, MLP 70
    counts = [tensor(0.5), tensor(1, 0.3, 0), tensor(2.5), tensor(1, 1)[None]]
    counts = [t.requires_grad_() for t in counts]
    s1, r, s3, keep = counts
    total = flops([price], 100, s1, [r], s3, keep, [tensor(2, 1, 3)])
    # one head leaves, the second; heads of 4 + 3 and 4 + 4 channels stay, 7 neurons
    assert total.item() == 100 + 5 * (7 + 8) + 7 * 7
    slopes = torch.autograd.grad(total, counts)
    assert slopes[0].tolist() == [-5 * 7.0]  # the next head, the first, has 3 channels left
    assert slopes[1].tolist() == [-5.0, 0.0, -5.0] and slopes[2].tolist() == [-7.0]
    assert slopes[3].tolist() == [[75.0, 49.0]]


@pytest.mark.parametrize("family", UVC_FAMILIES)
@given(data=st.data())
@few
def test_flops_are_the_exact_count_at_whole_numbers(family: str, data: st.DataObject) -> None:
    supernet = small_supernet(family)
    prices = [unit_prices(*pair) for pair in zip(supernet.shapes, supernet.adapter.costs.blocks, strict=True)]
    method, blocks, r, s1, s3, keep, scores = UVC(), [], [], [], [], [], []
    for shape, price in zip(supernet.shapes, prices, strict=True):
        removed = data.draw(st.integers(0, price.num_heads - 1))
        gone = [data.draw(st.integers(0, price.head_dim - 1)) for _ in range(price.num_heads)]
        neurons, gates = data.draw(st.integers(0, price.hidden - 1)), data.draw(st.tuples(st.booleans(), st.booleans()))
        order = data.draw(st.permutations(range(price.num_heads)))  # order[i]: the score of head i
        heads = [h for h in range(price.num_heads) if order[h] >= removed] if gates[0] else []
        v = [h * price.head_dim + c for h in heads for c in range(price.head_dim - gone[h])]
        hidden = list(range(price.hidden - neurons)) if gates[1] else []
        picks = {"heads": len(heads), "v_channels": len(v), "hidden": len(hidden)}
        blocks.append(method.block_slice(shape, None, picks, {"kept_v": v, "kept_hidden": hidden}))  # type: ignore[arg-type]
        r.append(tensor(*gone))
        s1.append(removed)
        s3.append(neurons)
        keep.append(gates)
        scores.append(tensor(*order))
    outer = supernet.adapter.costs.flops.at(supernet.identity().stage_widths)
    total = flops(prices, outer, tensor(*s1), r, tensor(*s3), torch.tensor(keep).double(), scores)
    assert total.item() == supernet.flops(network_slice(supernet.shapes, blocks, full_stage_width=True))
