"""The sandwich rule: its terms by hand against plain torch over cut networks, its gradients, who teaches whom."""

import pytest
import torch
from torch import Tensor

from nas.objectives.sandwich import Sandwich
from nas.training.objective import Step
from search_spaces.slices import NetworkSlice
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.nas.searchers.test_anywhere import SPACES, space_of

STEP = Step(0.5, 3, 8)


def batch(supernet: Supernet) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, *supernet.adapter.input_size, generator=generator, dtype=torch.float64)
    return images, torch.arange(4) % 5


@pytest.fixture(params=SPACES)
def objective(request: pytest.FixtureRequest) -> Sandwich:
    supernet, anywhere = space_of(request.param)
    return Sandwich(supernet, anywhere.smallest(), lambda number: anywhere.drawn(number, 2), smoothing=0.1)


def by_hand(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logits (B, classes)."""
    p, q = p.softmax(1), q.softmax(1)
    return (p * (p / q).log()).sum(1).mean()


def test_the_terms_are_those_of_the_networks_cut_out(objective: Sandwich) -> None:
    supernet = objective.supernet
    images, target = batch(supernet)
    with torch.no_grad():
        terms = objective(images, target, STEP)
        p = supernet.backbone(images)
    soft = torch.full((4, 5), 0.1 / 5).scatter(1, target[:, None], 0.9 + 0.1 / 5)
    first, second = objective.drawn(STEP.number)

    def divergence(subnet: NetworkSlice) -> float:
        return float(by_hand(p, cut(supernet.backbone, subnet).eval()(images).detach()))

    assert list(terms) == ["ce", "kl_smallest", "kl_drawn"]
    assert float(terms["ce"]) == pytest.approx(float(-(soft * p.log_softmax(1)).sum(1).mean()), rel=1e-5)
    assert float(terms["kl_smallest"]) == pytest.approx(divergence(objective.smallest), rel=1e-4, abs=1e-6)
    assert float(terms["kl_drawn"]) == pytest.approx(divergence(first) + divergence(second), rel=1e-4, abs=1e-6)


def test_one_step_adds_the_gradients_and_the_largest_learns_from_the_labels_alone(objective: Sandwich) -> None:
    supernet = objective.supernet
    images, target = batch(supernet)
    weights = list(supernet.backbone.parameters())

    def gradients(loss: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]

    p = supernet.large(images)
    with torch.no_grad():
        taught = supernet.large(images)
    expected = gradients(torch.nn.functional.cross_entropy(p, target, label_smoothing=0.1))
    for subnet in (objective.smallest, *objective.drawn(STEP.number)):
        own = gradients(by_hand(taught, supernet.small(images, subnet)))
        expected = [a + b for a, b in zip(expected, own, strict=True)]
    found = gradients(sum(objective(images, target, STEP).values()))  # type: ignore[arg-type]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_largest_and_smallest_are_looked_at(objective: Sandwich) -> None:
    images, _ = batch(objective.supernet)
    networks = objective.networks()
    assert list(networks) == ["large", "smallest"]
    assert torch.equal(networks["large"](images), objective.supernet.backbone(images))
    assert torch.equal(networks["smallest"](images), objective.supernet.small(images, objective.smallest))
