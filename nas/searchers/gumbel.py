"""Gumbel-softmax choices and the schedules that t drives. t: optimiser steps done over all steps, in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor

TAU = (5.0, 0.1)  # of the toolkit's own schedule; the thesis has a constant


def temperature(t: float, tau: Sequence[float] = TAU) -> float:
    """tau = 5 * (0.1/5)^t (section 2.2), or between two others, or the only one there is."""
    start, end = tau[0], tau[-1]
    return float(start * (end / start) ** t)


def gumbel_noise(n: int, generator: torch.Generator) -> Tensor:
    """n draws of Gumbel(0, 1) on the CPU: the same on every device and rank for the same generator."""
    exponential = torch.empty(n).exponential_(generator=generator)
    return -exponential.log()


def gumbel_softmax(eta: Tensor, tau: float, generator: torch.Generator) -> Tensor:
    """g = softmax((eta + noise) / tau), equation (3.6). eta (m,) -> g (m,), float32."""
    noise = gumbel_noise(eta.numel(), generator).to(eta.device)
    return torch.softmax((eta.float() + noise) / tau, dim=-1)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The noise source of one optimiser step: a function of seed and step alone, so a resume redraws it."""
    generator = torch.Generator()
    generator.manual_seed((seed * 1_000_003 + step) % 2**63)
    return generator
