"""Orders by what least squares cannot take over, against refits done the long way."""

from collections.abc import Sequence
from itertools import pairwise, permutations
from unittest.mock import patch

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from supernets import least_squares
from supernets.least_squares import gram_matrix, head_order, neuron_order, prefix_lost

RIDGE = 1e-6
quick = settings(max_examples=25, deadline=None)


def activations(tokens: int, units: int, seed: int) -> Tensor:
    """(tokens, units) of correlated, uncentred activations of uneven size, some dead and some alike."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, units, generator=g).double() @ torch.randn(units, units, generator=g).double()
    x = torch.relu(mixed + 0.5) * torch.rand(units, generator=g).double()
    x[:, torch.rand(units, generator=g) < 0.1] = 0.3
    if units > 3 and seed % 2:
        x[:, 2] = x[:, 0]
    return x


def readers(outputs: int, units: int, seed: int) -> Tensor:
    return torch.randn(outputs, units, generator=torch.Generator().manual_seed(seed + 1)).double()


def covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / len(x)


def ridged(gram: Tensor) -> Tensor:
    return gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def refitted(h: Tensor, weight: Tensor, keep: Sequence[int]) -> Tensor:
    """The weights of the kept units that come closest to the whole output."""
    kept = list(keep)
    columns: Tensor = torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T)
    return columns.T


def subset_error(h: Tensor, weight: Tensor, keep: Sequence[int]) -> float:
    """tr(W_R (C_RR - C_RK C_KK^-1 C_KR) W_R^T), R the units that are not kept."""
    kept, gone = list(keep), [unit for unit in range(len(h)) if unit not in set(keep)]
    rest = h[gone][:, gone] - h[gone][:, kept] @ torch.linalg.solve(h[kept][:, kept], h[kept][:, gone])
    return float(torch.trace(weight[:, gone] @ rest @ weight[:, gone].T))


def by_lstsq(x: Tensor, weight: Tensor, keep: Sequence[int]) -> float:
    """Squared error per token of the output when kept units and a bias are fitted to it."""
    inputs = torch.cat([x[:, list(keep)], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    output = x @ weight.T
    left = output - inputs @ torch.linalg.lstsq(inputs, output, driver="gelsd").solution
    return float(left.square().sum()) / len(x)


def units_of(heads: Sequence[int], size: int) -> list[int]:
    return [head * size + channel for head in heads for channel in range(size)]


@given(
    units=st.integers(1, 24), outputs=st.integers(1, 8), tokens=st.integers(2, 60), seed=st.integers(0, 1000),
    block=st.sampled_from([1, 5, 64]),
)  # fmt: skip
@quick
def test_every_removal_is_the_cheapest_by_an_optimal_brain_surgeon_that_refits_from_scratch(
    units: int, outputs: int, tokens: int, seed: int, block: int
) -> None:
    gram, weight = covariance(activations(tokens, units, seed)), readers(outputs, units, seed)
    with patch.object(least_squares, "BLOCK", block):
        order, errors = neuron_order(gram, weight)
    assert sorted(order) == list(range(units))
    assert errors.shape == (units + 1,) and errors[units] == 0
    if not gram.any():
        assert not errors.any()
        return
    h, left = ridged(gram), list(range(units))
    for removed in reversed(order):
        costs = refitted(h, weight, left).square().sum(0) / torch.linalg.inv(h[left][:, left]).diagonal()
        assert costs[left.index(removed)] <= costs.min() * (1 + 1e-5)
        left.remove(removed)
        assert float(errors[len(left)]) == pytest.approx(subset_error(h, weight, left), rel=1e-5)


def test_many_neurons_take_several_blocks() -> None:
    gram, weight = covariance(activations(400, 150, 0)), readers(20, 150, 0)
    order, errors = neuron_order(gram, weight)
    assert sorted(order) == list(range(150))
    with patch.object(least_squares, "BLOCK", 1):
        assert neuron_order(gram, weight)[0] == order
    for width in range(150):
        expected = subset_error(ridged(gram), weight, order[:width])
        assert float(errors[width]) == pytest.approx(expected, rel=1e-6)


def test_errors_of_neurons_are_those_of_least_squares_on_the_activations() -> None:
    x, weight = activations(300, 20, 4), readers(6, 20, 4)
    order, errors = neuron_order(covariance(x), weight, ridge=1e-10)
    for width in range(20):
        assert float(errors[width]) == pytest.approx(by_lstsq(x, weight, order[:width]), rel=1e-5, abs=1e-6)


def test_one_of_two_identical_neurons_goes_first_and_costs_nothing() -> None:
    x, weight = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double(), readers(5, 12, 0)
    x[:, 7], weight[:, 7] = x[:, 3], weight[:, 3]
    order, errors = neuron_order(covariance(x), weight)
    assert order[-1] == 7  # the later of two equals
    assert float(errors[11]) < 1e-5 * float(errors[0])
    assert float(errors[10]) > 1e-3 * float(errors[0])


def test_dead_neurons_go_before_the_others() -> None:
    x, weight = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)).double(), readers(5, 12, 0)
    x[:, [1, 4, 9]] = 2.0
    order, errors = neuron_order(covariance(x), weight)
    assert set(order[-3:]) == {1, 4, 9}
    assert float(errors[9]) < 1e-5 * float(errors[0])


def test_equal_costs_remove_the_last_first() -> None:
    eye, ones = torch.eye(70).double(), torch.ones(3, 70).double()
    assert neuron_order(eye, ones)[0] == list(range(70))
    assert neuron_order(eye, 0 * ones)[0] == list(range(70))
    assert head_order(eye, ones, 7)[0] == list(range(7))
    assert head_order(eye, ones, 10)[0] == list(range(10))


def test_nothing_but_dead_units_keep_their_place() -> None:
    gram, weight = torch.zeros(18, 18), torch.ones(2, 18)
    for order, errors in (neuron_order(gram, weight), head_order(gram, weight, 9)):
        assert order == list(range(len(order)))
        assert errors.shape == (len(order) + 1,) and not errors.any()


def test_a_covariance_from_float32_that_is_not_positive_gets_a_larger_ridge() -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(100, 20, generator=g) @ torch.randn(20, 80, generator=g)).float() + 50
    gram, weight = (x.T @ x).double() / 100 - torch.outer(x.double().mean(0), x.double().mean(0)), readers(9, 80, 0)
    assert torch.linalg.cholesky_ex(ridged(gram)).info
    for order, errors in (neuron_order(gram, weight), head_order(gram, weight, 8), head_order(gram, weight, 10)):
        assert sorted(order) == list(range(len(order)))
        assert (errors.diff() <= 0).all()
    assert float(neuron_order(gram, weight)[1][20]) < 0.01 * float(torch.trace(weight @ gram @ weight.T))


@pytest.mark.parametrize("entry", [torch.nan, -3.0])
def test_what_is_no_covariance_is_refused(entry: float) -> None:
    gram, weight = torch.full((8, 8), entry).fill_diagonal_(1), torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="cholesky"):
        neuron_order(gram, weight)
    with pytest.raises(RuntimeError, match="cholesky"):
        head_order(gram, weight, 4)


def test_the_same_inputs_give_the_same_order_and_stay_as_they_are() -> None:
    gram, weight = covariance(activations(100, 80, 1)), readers(9, 80, 1).float().requires_grad_()
    before = gram.clone(), weight.detach().clone()
    for first, again in (
        (neuron_order(gram, weight), neuron_order(gram, weight)),
        (head_order(gram, weight, 8), head_order(gram, weight, 8)),
        (head_order(gram, weight, 10), head_order(gram, weight, 10)),
    ):
        assert first[0] == again[0] and torch.equal(first[1], again[1])
        assert first[1].dtype == torch.float64 and not first[1].requires_grad
    assert torch.equal(gram, before[0]) and torch.equal(weight, before[1])


@given(heads=st.integers(1, 5), size=st.integers(1, 4), tokens=st.integers(3, 60), seed=st.integers(0, 1000))
@quick
def test_few_heads_take_the_best_of_all_chains(heads: int, size: int, tokens: int, seed: int) -> None:
    gram, weight = covariance(activations(tokens, heads * size, seed)), readers(6, heads * size, seed)
    order, errors = head_order(gram, weight, heads)
    assert sorted(order) == list(range(heads))
    if not gram.any():
        return
    h, known = ridged(gram), dict[frozenset[int], float]()

    def chain(kept_first: Sequence[int]) -> list[float]:
        for width in range(heads):
            kept = frozenset(kept_first[:width])
            if kept not in known:
                known[kept] = subset_error(h, weight, units_of(sorted(kept), size))
        return [*(known[frozenset(kept_first[:width])] for width in range(heads)), 0.0]

    assert errors.tolist() == pytest.approx(chain(order), rel=1e-5)
    assert float(errors.sum()) <= min(sum(chain(other)) for other in permutations(range(heads))) * (1 + 1e-5)


@pytest.mark.parametrize(("heads", "seed"), [(4, 78), (5, 164)])
def test_few_heads_do_better_than_one_by_one_where_the_cheapest_first_misleads(heads: int, seed: int) -> None:
    gram, weight = covariance(activations(40, heads, seed)), readers(6, heads, seed)
    best = head_order(gram, weight, heads)[1].sum()
    with patch.object(least_squares, "EXACT_HEADS", 0):
        assert head_order(gram, weight, heads)[1].sum() > 1.05 * best


@given(heads=st.integers(9, 11), size=st.integers(1, 3), tokens=st.integers(3, 60), seed=st.integers(0, 1000))
@quick
def test_many_heads_go_one_by_one_each_the_one_that_leaves_the_least_error(
    heads: int, size: int, tokens: int, seed: int
) -> None:
    gram, weight = covariance(activations(tokens, heads * size, seed)), readers(6, heads * size, seed)
    order, errors = head_order(gram, weight, heads)
    assert sorted(order) == list(range(heads))
    assert errors.shape == (heads + 1,) and errors[heads] == 0
    h = ridged(gram)
    for width, following in pairwise(range(heads, -1, -1)):
        left = order[:width]
        least = min(subset_error(h, weight, units_of([o for o in left if o != head], size)) for head in left)
        assert float(errors[following]) == pytest.approx(least, rel=1e-5)
        assert float(errors[following]) == pytest.approx(
            subset_error(h, weight, units_of(order[:following], size)), rel=1e-5
        )


@pytest.mark.parametrize("heads", [4, 10])
def test_errors_of_heads_are_those_of_least_squares_on_the_activations(heads: int) -> None:
    x, weight = activations(300, 40, 4), readers(30, 40, 4)
    order, errors = head_order(covariance(x), weight, heads, ridge=1e-10)
    for width in range(heads):
        expected = by_lstsq(x, weight, units_of(order[:width], 40 // heads))
        assert float(errors[width]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("heads", [5, 10])
def test_one_of_two_identical_heads_goes_first_and_costs_nothing(heads: int) -> None:
    x, weight = torch.randn(300, 3 * heads, generator=torch.Generator().manual_seed(0)).double(), readers(9, 30, 0)
    weight = weight[:, : 3 * heads]
    x[:, 9:12], weight[:, 9:12] = x[:, 3:6], weight[:, 3:6]
    order, errors = head_order(covariance(x), weight, heads)
    assert order[-1] == 3
    assert float(errors[heads - 1]) < 1e-5 * float(errors[0])


@pytest.mark.parametrize("shape", [(3, 5), (40, 257), (2, 30, 700), (10, 1)])
def test_a_gram_matrix_is_that_of_the_whole_product(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram_matrix(x), x.mT @ x)


@quick
@given(units=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_the_first_units_as_they_stand_leave_the_error_of_that_subset(units: int, seed: int) -> None:
    gram, weight = covariance(activations(60, units, seed)), readers(5, units, seed)
    if gram.diagonal().sum() <= 0:
        return
    lost, h = prefix_lost(gram, weight), ridged(gram)
    assert lost.shape == (units + 1,) and float(lost[-1]) == 0
    for kept in range(units):
        assert float(lost[kept]) == pytest.approx(subset_error(h, weight, range(kept)), rel=1e-6, abs=1e-9)


def test_units_go_in_groups_and_in_batches() -> None:
    grams = torch.stack([covariance(activations(60, 8, seed)) for seed in (1, 2)])
    weights = torch.stack([readers(5, 8, seed) for seed in (1, 2)])
    alone = torch.stack([prefix_lost(gram, weight) for gram, weight in zip(grams, weights, strict=True)])
    assert torch.allclose(prefix_lost(grams, weights), alone)
    assert torch.allclose(prefix_lost(grams, weights, group=4), alone[:, ::4])
    assert float(prefix_lost(torch.zeros(3, 3), torch.ones(2, 3)).max()) < 1e-20  # every unit is dead


def test_in_the_order_that_was_found_the_errors_are_those_that_were_found() -> None:
    gram, weight = covariance(activations(80, 9, 3)), readers(5, 9, 3)
    order, errors = neuron_order(gram, weight)
    assert torch.allclose(prefix_lost(gram[order][:, order], weight[:, order]), errors, rtol=1e-6, atol=1e-9)
