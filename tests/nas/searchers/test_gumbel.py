"""Gumbel noise is a function of (seed, step), its draws are softmax(eta), the schedules are the equations."""

import math

import pytest
import torch

from nas.searchers.gumbel import gumbel_noise, gumbel_softmax, step_generator, temperature
from nas.training.losses import adjoined_weight

ETA = torch.tensor([1.0, 0.0, -1.0, 0.5])


def test_noise_is_a_function_of_seed_and_step() -> None:
    first = gumbel_noise(5, step_generator(42, 7))
    torch.manual_seed(0)  # whoever else draws in between
    torch.rand(3)
    assert torch.equal(gumbel_noise(5, step_generator(42, 7)), first)
    others = [gumbel_noise(5, step_generator(*key)) for key in ((42, 8), (43, 7), (7, 42))]
    assert not any(torch.equal(first, other) for other in others)


def test_g_is_the_tempered_softmax_of_eta_and_noise() -> None:
    for tau in (5.0, 0.1):
        noise = gumbel_noise(4, step_generator(1, 2)).double()
        exponents = [(e + n) / tau for e, n in zip(ETA.tolist(), noise.tolist(), strict=True)]
        total = sum(math.exp(v - max(exponents)) for v in exponents)
        expected = [math.exp(v - max(exponents)) / total for v in exponents]
        assert gumbel_softmax(ETA, tau, step_generator(1, 2)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_draws_of_a_search_follow_softmax_of_eta() -> None:
    """The first draw of 20,000 successive steps, each with the generator that the step would have."""
    n = 20_000
    draws = [int(gumbel_softmax(ETA, 0.5, step_generator(11, step)).argmax()) for step in range(n)]
    counts = torch.bincount(torch.tensor(draws), minlength=4)
    for count, p in zip(counts.tolist(), ETA.softmax(0).tolist(), strict=True):
        assert abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))


def test_noise_is_gumbel() -> None:
    """Mean 0.5772 (Euler), variance pi^2/6; P(noise <= 0) = exp(-1)."""
    noise, n = gumbel_noise(20_000, step_generator(0, 0)).double(), 20_000
    sigma = math.pi / math.sqrt(6)
    assert abs(float(noise.mean()) - 0.5772156649) < 4 * sigma / math.sqrt(n)
    assert float(noise.var()) == pytest.approx(sigma**2, rel=0.06)
    share = float((noise <= 0).double().mean())
    assert abs(share - math.exp(-1)) < 4 * math.sqrt(math.exp(-1) * (1 - math.exp(-1)) / n)


def test_temperature_falls_from_5_to_a_tenth_geometrically() -> None:
    assert [temperature(t) for t in (0.0, 0.5, 1.0)] == pytest.approx([5.0, math.sqrt(5.0 * 0.1), 0.1])
    assert temperature(0.25) == pytest.approx(5.0 * 0.02**0.25)


def test_lambda_is_equation_3_4() -> None:
    assert [adjoined_weight(t) for t in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0, 0.04, 0.25, 1, 1, 1])
