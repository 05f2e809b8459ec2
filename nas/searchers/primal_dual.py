"""The minimax step of section 2.5, one function per symbol and move.

    min over W, s, r, gates; max over y, p, z >= 0:
        L_distill(W, gates) + sum y S_ceil(s)(W) + sum p S_ceil(r)(W) + z (F(s, r, gates)/F_full - B)

One step: (1) the optimiser on W, with the loss of nas/objectives/distill.py; (2) `shrink_smallest`; (3) `step_counts`;
(4) `AveragedSGD` on the gates, under `constraint`; (5) `ascend`.

Letters: L blocks, H heads of a block, d channels of V in a head, M neurons. s counts heads (s1) or neurons (s3) to
remove from a block, r channels to remove inside one head. "Units" are a list of heads, channels or neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nas.searchers.options import MinimaxOptions

TAU = 0.5  # of the gates' Gumbel-softmax, constant
GATE_START = (-1.0, 1.0)  # logits of skipping and of keeping
DUAL_START = 1e-3
CLAMP = 0.5
PUBLISHED_STEPS = 62_500  # 25 of the 30 epochs, ImageNet at batch 512
PUBLISHED_WINDOW = 50  # steps that a gate's gradient is averaged over
PUBLISHED_SIZE = 768  # neurons of a DeiT-Tiny block
PUBLISHED_PRICE = 6e-5  # share of DeiT-Tiny's FLOPs that one of them costs
DAMPING = 3.0  # critical for counts and z at these rates, where a multiplier alone would swing about the budget


@dataclass(frozen=True)
class Rules:
    """Where paper and authors' code differ, and what is this toolkit's own (docs/uvc.md).

    ramp: whether a gate's gradients are weighed by their places in the window. drawn: whether F counts blocks by the
    gates as a step has drawn them, or as they would be decided now. damping: of the multiplier's swings. steps:
    learning steps of the run that the step sizes are those of.
    """

    ramp: bool = False
    drawn: bool = False
    damping: float = DAMPING
    steps: int = PUBLISHED_STEPS

    @classmethod
    def of(cls, options: MinimaxOptions) -> "Rules":
        """As the options ask for them."""
        own = cls()
        return cls(
            options.gate_average == "ramp",
            options.gate_flops == "drawn",
            own.damping if options.damping is None else options.damping,
            options.reference_steps or own.steps,
        )


@dataclass(frozen=True)
class Rates:
    """Step sizes, scaled from the published run, of `reference` learning steps, to one of `steps`.

    s and r are stepped as shares of their list, scores count as multiples of their list's mean, and dF/ds as
    multiples of the price of the list's unit: one rate then serves lists of any length and price. At `reference` steps
    a list of 768 units moves as published.
    """

    steps: int
    reference: int = PUBLISHED_STEPS

    @property
    def scale(self) -> float:
        return self.reference / max(self.steps, 1)

    @property
    def weights(self) -> float:
        """lr of the proximal step (published: 1e-4)."""
        return 1e-4 * self.scale

    @property
    def counts(self) -> float:
        """Of s/size and r/size (published: 0.02 of s and r)."""
        return 0.02 * self.scale / PUBLISHED_SIZE

    @property
    def duals(self) -> float:
        """Of y and p (published: 1e-4)."""
        return 1e-4 * self.scale

    @property
    def budget(self) -> float:
        """Of z (published: 1, where dF/ds is that of one neuron)."""
        return 1.0 * self.scale * PUBLISHED_PRICE

    def gate_weight(self, budget: float) -> float:
        """w_g (published: 5e-4 at B = 0.5); more where little is to be removed, so that gates take the same part."""
        return 5e-4 / PUBLISHED_PRICE * 0.5 / max(1 - budget, 0.05)

    @property
    def gate_window(self) -> int:
        """Steps that a gate's gradient is averaged over (published: 50)."""
        return max(1, round(PUBLISHED_WINDOW / self.scale))

    def gates(self, lr: float) -> float:
        """lr of one of the gates' updates: as much in all of them as `lr` has in the published run's."""
        updates = max(1, self.steps // self.gate_window)
        return lr * (self.reference / PUBLISHED_WINDOW) / updates


def ceil(s: Tensor) -> Tensor:
    """The whole number of units that s removes, its gradient straight through."""
    return s + (s.ceil() - s).detach()


def hard(keep: Tensor) -> Tensor:
    """1 where the probability of keeping is above one half, its gradient straight through."""
    return keep + ((keep > 0.5).to(keep.dtype) - keep).detach()


def unit_scores(w1: Tensor, w3: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Squared norms of the columns of W1 (E, H*d) and W3 (E, M), which write the stream: (H, d) and (M,)."""
    return w1.detach().square().sum(0).unflatten(0, (num_heads, -1)), w3.detach().square().sum(0)


def shares(scores: Tensor) -> Tensor:
    """Scores (..., units) as shares of their sum."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)


def smallest_sum(scores: Tensor, removed: Tensor) -> Tensor:
    """S_k: the sum of the k smallest scores. scores (..., units), removed k (...)."""
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return (scores.sort(-1).values * (ranks < removed.unsqueeze(-1))).sum(-1)


def next_score(scores: Tensor, removed: Tensor) -> Tensor:
    """The score of the unit that would be removed next, the slope of S_k in k. Shapes as in `smallest_sum`."""
    place = removed.long().clamp(max=scores.shape[-1] - 1)
    return scores.sort(-1).values.gather(-1, place.unsqueeze(-1)).squeeze(-1)


def ranks(scores: Tensor) -> Tensor:
    """The place of every unit from the smallest score to the largest; of equals the first comes first."""
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1)


@dataclass(frozen=True)
class Prices:
    """MACs of a block's units: a channel of V with its column of the projection, a neuron.

    The q and k of a head cost as much as d channels of V: 2 S + T each, on every token.
    """

    num_heads: int
    head_dim: int
    hidden: int
    channel: int
    neuron: int

    @property
    def attn(self) -> int:
        return 2 * self.num_heads * self.head_dim * self.channel

    @property
    def mlp(self) -> int:
        return self.hidden * self.neuron


def flops(
    prices: Sequence[Prices],
    outer: int,
    heads: Tensor,
    channels: Sequence[Tensor],
    hidden: Tensor,
    keep: Tensor,
    head_scores: Sequence[Tensor],
) -> Tensor:
    """F(s, r, gates) in MACs, float64: what the network costs at ceil(s) and ceil(r), gradients straight through.

    heads s1 (L,), channels r (H,) per block, hidden s3 (L,), keep g1 of both halves (L, 2), head_scores (H,) per
    block, which say whose channels leave with a head. The gradient in s1 is that of the next head to leave. outer:
    MACs of stem, merging and classifier.
    """
    total = torch.tensor(float(outer), dtype=torch.float64, device=heads.device)
    for block, price in enumerate(prices):
        s, place = heads[block], ranks(head_scores[block])
        removed = s.detach().ceil().clamp(max=price.num_heads - 1)
        kept = (place >= removed).double() - (place == removed) * (s - s.detach())  # (H,)
        attn = (kept * (2 * price.head_dim - ceil(channels[block]))).sum() * price.channel
        mlp = (price.hidden - ceil(hidden[block])) * price.neuron
        total = total + keep[block, 0].double() * attn + keep[block, 1].double() * mlp
    return total


def constraint(fraction: Tensor, budget: float) -> Tensor:
    """F/F_full - B, clamped to +-0.5 in value; the gradient passes, or a budget below one half could not begin."""
    violation = fraction - budget
    return violation + (violation.clamp(-CLAMP, CLAMP) - violation).detach()


def damped_price(z: Tensor, violation: Tensor, damping: float = DAMPING) -> Tensor:
    """What s, r and gates pay for F/F_full: z, and so much of the violation as keeps z from swinging.

    Below the budget it may be negative: more has left than had to, and comes back.
    """
    return z + damping * violation.detach()


def shrink_smallest(scores: Tensor, removed: Tensor, lr: float, duals: Tensor) -> Tensor:
    """Move 2, the proximal step of y S_k: 1/(1 + 2 lr y) for the k units of smallest score, 1 for the others.

    scores (..., units), removed k and duals y (...) -> factors (..., units).
    """
    factor = (1 / (1 + 2 * lr * duals)).unsqueeze(-1)
    return torch.where(ranks(scores) < removed.unsqueeze(-1), factor, torch.ones_like(factor))


def step_counts(counts: Tensor, gradient: Tensor, sizes: Tensor, rate: float) -> Tensor:
    """Move 3 on counts s (or r): a step on s/size, its gradient clipped in infinity norm, within [0, size - 1].

    gradient: y * next_score + z * dF/ds.
    """
    clipped = gradient / gradient.abs().max().clamp_min(1.0)
    return torch.minimum((counts - rate * sizes * clipped).clamp_min(0.0), sizes - 1)


class AveragedSGD(torch.optim.SGD):
    """Move 4: SGD on the mean gradient of every `window` calls.

    ramp: on the mean of each gradient times its place in the published window, from 0 to 49: 24.5 of an even one.
    """

    def __init__(self, params: Any, lr: float, momentum: float, window: int, ramp: bool = False) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.window, self.ramp = window, ramp

    def weight(self, seen: int) -> float:
        """Of a gradient that so many came before in its window; the mean is that of the published window."""
        mean = (PUBLISHED_WINDOW - 1) / 2
        if not self.ramp:
            return 1.0
        return mean if self.window == 1 else 2 * mean * seen / (self.window - 1)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Add the gradients up; at the window's end step on their mean. Without gradients nothing is counted."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                before = int(state.get("seen", 0))
                total = state.get("total", torch.zeros_like(p)) + self.weight(before) * p.grad
                seen = before + 1
                state["total"], state["seen"] = total, seen
                p.grad = None
                if seen == self.window:
                    p.grad = total / seen
                    state["total"], state["seen"] = torch.zeros_like(p), 0
        super().step(closure)


def ascend(dual: Tensor, violation: Tensor, rate: float) -> Tensor:
    """Move 5: y <- max(0, y + rate * violation); the violation is S_k(W), or F/F_full - B for z."""
    return (dual + rate * violation).clamp_min(0.0)
