"""The losses against numpy, the direction of KL, and where its gradient goes."""

import numpy as np
import pytest
import torch

from nas.objectives.adjoined import Adjoined, Loss
from nas.searchers.gradient import Gradient
from nas.training.losses import accuracy, cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.slices import network_slice
from tests.nas.small import small_costs, small_supernet
from tests.strategies import images

GENERATOR = torch.Generator().manual_seed(0)
P, Q = (3 * torch.randn(6, 5, generator=GENERATOR) for _ in range(2))
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def softmax(logits: torch.Tensor) -> np.ndarray:
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_labels(smoothing: float) -> None:
    target = np.full((6, 5), smoothing / 5)
    target[np.arange(6), LABELS.numpy()] += 1 - smoothing
    expected = -(target * np.log(softmax(P))).sum(1).mean()
    assert float(cross_entropy(P, LABELS, smoothing)) == pytest.approx(expected, rel=1e-6)
    # mixup hands over the same thing as soft targets, already smoothed
    assert float(cross_entropy(P, torch.tensor(target), smoothing)) == pytest.approx(expected, rel=1e-6)


def test_kl_is_of_p_from_q() -> None:
    p, q = softmax(P), softmax(Q)
    assert float(kl_divergence(P, Q)) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-6)
    assert float(kl_divergence(Q, P)) == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-6)
    assert float(kl_divergence(P, Q)) != pytest.approx(float(kl_divergence(Q, P)), rel=1e-2)
    assert float(kl_divergence(P, P)) == 0.0


def test_gradient_of_kl_flows_into_p_unless_detached() -> None:
    for detach in (False, True):
        large, small = P.clone().requires_grad_(), Q.clone().requires_grad_()
        kl_divergence(large, small, detach).backward()
        p, q = softmax(P), softmax(Q)
        assert small.grad.numpy() == pytest.approx((q - p) / 6, abs=1e-6)
        if detach:
            assert large.grad is None
        else:
            log_ratio = np.log(p / q)
            expected = p * (log_ratio - (p * log_ratio).sum(1, keepdims=True)) / 6
            assert large.grad.numpy() == pytest.approx(expected, abs=1e-6)


def test_half_precision_logits_are_compared_in_float32() -> None:
    assert kl_divergence(P.bfloat16(), Q.bfloat16()).dtype == torch.float32
    assert cross_entropy(P.bfloat16(), LABELS).dtype == torch.float32


def test_accuracy_counts_hits_within_the_top_k() -> None:
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 4)
    assert accuracy(logits, torch.tensor([0, 4, 5, -100])).tolist() == [1, 2]  # -100: no image
    assert accuracy(logits[:, :3], torch.tensor([2, 0, 1, 2])).tolist() == [1, 4]  # three classes: top 5 is all


def test_adjoined_terms_are_equation_3_4() -> None:
    supernet = small_supernet("vit")
    space = small_costs(supernet, "stream").space
    subnet = network_slice(supernet.shapes, space.block_slices([{"alpha": 2}] * 3))
    objective, x, y = Adjoined(supernet, subnet, Loss(0.1)), images(supernet.backbone, batch=6), LABELS
    p, q = supernet(x, subnet)
    for t, lam in ((0.0, 0.0), (0.25, 0.25), (0.8, 1.0)):
        terms = objective(x, y, Step(t, 0, 1))
        assert set(terms) == {"ce", "kl"}
        assert float(terms["ce"]) == pytest.approx(float(cross_entropy(p, y, 0.1)), rel=1e-6)
        assert float(terms["kl"]) == pytest.approx(lam * float(kl_divergence(p, q)), rel=1e-6)


@pytest.mark.parametrize("detach", [False, True])
def test_kl_trains_what_only_the_large_network_has_unless_detached(detach: bool) -> None:
    supernet = small_supernet("vit")
    space = small_costs(supernet, "stream").space
    subnet = network_slice(supernet.shapes, space.block_slices([{"alpha": 2}] * 3))
    objective = Adjoined(supernet, subnet, Loss(detach_teacher=detach))
    objective(images(supernet.backbone, batch=6), LABELS, Step(0.5, 0, 1))["kl"].backward()
    grad, half = supernet.backbone.blocks[0].mlp.fc1.weight.grad, supernet.shapes[0].hidden // 2
    assert grad[:half].abs().max() > 0
    assert (grad[half:].abs().max() > 0) != detach


def test_penalty_without_a_budget_is_equation_3_7() -> None:
    """gamma * n_f of the very draw that the mixture was made of, weighted by lambda."""
    supernet = small_supernet("vit")
    costs = small_costs(supernet, "stream")
    objective = Gradient(supernet, costs, budget=None, gamma=1e-6, seed=4, total_steps=10)
    terms = objective(images(supernet.backbone, batch=6), LABELS, Step(0.25, 2, 10))
    from nas.searchers.gumbel import step_generator, temperature

    draw = objective.choices.sample(temperature(0.25), step_generator(4, 2))
    n_f = sum(
        float(g) * option.cost
        for options, block in zip(costs.options, draw, strict=True)
        for g, option in zip(block["alpha"], options, strict=True)
    )
    assert float(terms["penalty"]) == pytest.approx(0.25 * 1e-6 * n_f, rel=1e-5)
    grads = torch.autograd.grad(sum(terms.values()), objective.architecture_parameters())
    assert all(grad.abs().max() > 0 for grad in grads)


def test_multiplier_of_a_budget_rises_while_it_is_exceeded_and_never_below_zero() -> None:
    supernet = small_supernet("vit")
    costs = small_costs(supernet, "inner")
    for budget in (0.2, 1.0):
        objective = Gradient(supernet, costs, budget=budget, gamma=0.0, seed=0, total_steps=50)
        fraction, z = float(objective.expected_fraction()), 0.0
        for number in range(10, 13):
            objective.after_step(Step(number / 50, number, 50))
            z = max(0.0, z + 60 / 50 * 4 * (number / 50) ** 2 * (fraction - budget))  # at the choices' own pace
            assert float(objective.multiplier) == pytest.approx(z, rel=1e-9)
        assert (z > 0) == (budget == 0.2)
        terms = objective(images(supernet.backbone, batch=6), LABELS, Step(0.5, 3, 50))
        price = max(0.0, z + 10 * (fraction - budget))  # damped: what lies above the budget costs more at once
        assert float(terms["penalty"]) == pytest.approx(price * fraction, rel=1e-9)
