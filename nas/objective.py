"""What is minimised: a module from a batch to the terms of the loss. One file per method only where it differs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.choices import ChoiceLogits, alpha_mixture
from nas.costs import SpaceCosts
from nas.gumbel import adjoined_weight, step_generator, temperature
from nas.losses import cross_entropy, kl_divergence
from nas.primal_dual import ascend, price_of_flops
from nas.selection import Selection, finalists
from search_spaces.method import Picks
from search_spaces.slices import NetworkSlice, network_slice
from supernets.elastic import BlockMixture
from supernets.supernet import Supernet

Draw = list[dict[str, Tensor]]  # per block, choice name -> what one step drew for it
FINALISTS = 16  # architectures measured at the end of a search
DAMPING = 10.0  # large enough beside the multiplier's rate that E[F] settles at the budget within a run of 300 steps


@dataclass(frozen=True)
class Step:
    """Where in the run a step stands. t: steps done over all steps. number: steps done."""

    t: float
    number: int
    total: int


class Adjoined(nn.Module):
    """L = CE(p) + lambda(t) KL(p || q) on a fixed subnet, equation (3.4)."""

    def __init__(
        self, supernet: Supernet, subnet: NetworkSlice, smoothing: float = 0.0, detach_teacher: bool = False
    ) -> None:
        super().__init__()
        self.supernet: Supernet = supernet
        self.subnet = subnet
        self.smoothing = smoothing
        self.detach_teacher = detach_teacher

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        """The weighted terms; their sum is the loss."""
        p, q = self.supernet(images, self.subnet)
        return {
            "ce": cross_entropy(p, target, self.smoothing),
            "kl": adjoined_weight(step.t) * kl_divergence(p, q, self.detach_teacher),
        }

    @property
    def may_leave_weights_unused(self) -> bool:
        """Whether a step's loss may depend on only some of the weights: processes then look for the others."""
        return False

    def architecture_parameters(self) -> list[nn.Parameter]:
        """Parameters with an optimiser of their own."""
        return []

    def architecture_optimizer(self, lr: float) -> torch.optim.Optimizer | None:
        """The optimiser of `architecture_parameters`."""
        parameters = self.architecture_parameters()
        return torch.optim.Adam(parameters, lr=lr) if parameters else None

    def pace(self, step: Step) -> float:
        """What the rate of the architecture parameters is multiplied by at a step."""
        return 1.0

    def after_step(self, step: Step) -> None:
        """Updates that are not gradient steps."""

    def after_epoch(self) -> None:
        """Updates at the end of an epoch, before its row is logged."""

    def current_subnet(self) -> NetworkSlice:
        """The subnet to evaluate."""
        return self.subnet

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The networks to evaluate, by their names in log.csv: images (B, C, H, W) -> logits (B, classes)."""
        subnet = self.current_subnet()
        return {"large": self.supernet.large, "subnet": lambda x: self.supernet.small(x, subnet)}

    def log(self, step: Step) -> dict[str, float]:
        """Values for the epoch's row in log.csv."""
        return {"lam": adjoined_weight(step.t), "selected_gflops": self.supernet.flops(self.subnet) / 1e9}

    def choice_rows(self) -> list[dict[str, Any]]:
        """The epoch's rows in choices.csv: block, choice, candidate, probability."""
        return []

    def step_rows(self) -> list[dict[str, Any]]:
        """The epoch's rows in steps.csv, of methods whose state moves within an epoch; asked for once."""
        return []


class Search(Adjoined, ABC):
    """What every search shares: the price of FLOPs, and the architecture that its parameters stand for.

    penalty: gamma * n_f, or with a budget a price * E[F]/F_full, from the multiplier z of E[F]/F_full <= B
    (section 2.6). multiplier_rate is per step: a violation of 0.1 raises z by 0.6 in a tenth of the run.
    """

    def __init__(
        self,
        supernet: Supernet,
        costs: SpaceCosts,
        *,
        budget: float | None,
        gamma: float,
        seed: int,
        total_steps: int,
        smoothing: float = 0.0,
        detach_teacher: bool = False,
    ) -> None:
        super().__init__(supernet, supernet.identity(), smoothing, detach_teacher)
        self.costs = costs
        self.budget, self.gamma, self.seed = budget, gamma, seed
        self.multiplier_rate = 60.0 / max(total_steps, 1)
        self.multiplier: Tensor
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))

    @abstractmethod
    def draw(self, step: Step) -> Draw:
        """What a step's small path takes of every choice."""

    @abstractmethod
    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        """What each block of the small path computes at a draw."""

    @abstractmethod
    def drawn_flops(self, draw: Draw) -> Tensor:
        """n_f of equation (3.8): MACs of the blocks at a draw, differentiable."""

    @abstractmethod
    def expected_fraction(self) -> Tensor:
        """E[F]/F_full, differentiable."""

    @abstractmethod
    def selection(self) -> tuple[list[Picks], Selection | None]:
        """The architecture that the parameters stand for; within the budget, when there is one."""

    def finalists(self) -> list[tuple[list[Picks], Selection | None]]:
        """The architectures among which accuracy on held-out images decides; `selection` is the first."""
        return [self.selection()]

    def kept(self, picks: list[Picks]) -> list[dict[str, list[int]]]:
        """Per block the kept indices of a choice that is no prefix, by their name in arch.json."""
        return [{} for _ in picks]

    def found(self) -> dict[str, Any]:
        """What the search has to say about its result, for arch.json."""
        return {}

    def penalty(self, draw: Draw) -> Tensor:
        """gamma * n_f of the draw, or under a budget max(0, z + DAMPING * (E[F]/F_full - B)) * E[F]/F_full.

        As in an augmented Lagrangian: z alone swings about the budget for longer than a short run lasts.
        """
        if self.budget is None:
            return self.gamma * self.drawn_flops(draw)
        fraction = self.expected_fraction()
        return price_of_flops(self.multiplier, fraction - self.budget, DAMPING).clamp_min(0.0) * fraction

    def pace(self, step: Step) -> float:
        """lambda(t): it is in their gradients, but Adam divides it out again.

        Unscaled, they would be settled while lambda has hardly let the small network learn: by what a slice does
        before any training, which of a trained network is least harm, the widest and the narrowest of all.
        """
        return adjoined_weight(step.t)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """z <- max(0, z + rate * pace * (E[F]/F_full - B))."""
        if self.budget is not None:
            violation = self.expected_fraction() - self.budget
            self.multiplier.copy_(ascend(self.multiplier, violation, self.multiplier_rate * self.pace(step)))

    def current_subnet(self) -> NetworkSlice:
        space = self.costs.space
        picks, _ = self.selection()
        return network_slice(space.shapes, space.block_slices(picks, self.kept(picks)), self.costs.full_stage_width)

    @torch.no_grad()
    def log(self, step: Step) -> dict[str, float]:
        return {
            "lam": adjoined_weight(step.t),
            "tau": temperature(step.t),
            "multiplier": float(self.multiplier),
            "expected_gflops": float(self.expected_fraction()) * self.costs.full_flops / 1e9,
            "selected_gflops": self.supernet.flops(self.current_subnet()) / 1e9,
        }


class Differentiable(Search):
    """L = CE(p) + lambda(t) (KL(p || q) + penalty), q a Gumbel-softmax mixture, equations (3.5) to (3.8)."""

    def __init__(self, supernet: Supernet, costs: SpaceCosts, **options: Any) -> None:
        """options: those of Search."""
        super().__init__(supernet, costs, **options)
        self.choices = ChoiceLogits(costs.space)

    def draw(self, step: Step) -> Draw:
        return self.choices.sample(temperature(step.t), step_generator(self.seed, step.number))

    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        return [
            alpha_mixture([o.slice for o in options], g["alpha"], costs)
            for options, costs, g in zip(self.costs.options, self.costs.network.blocks, draw, strict=True)
        ]

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        draw = self.draw(step)
        p, q = self.supernet(images, self.mixtures(draw), self.costs.stage_gates(draw))
        lam = adjoined_weight(step.t)
        return {
            "ce": cross_entropy(p, target, self.smoothing),
            "kl": lam * kl_divergence(p, q, self.detach_teacher),
            "penalty": lam * self.penalty(draw),
        }

    def drawn_flops(self, draw: Draw) -> Tensor:
        return self.costs.block_penalty(draw)

    def expected_fraction(self) -> Tensor:
        """E[F]/F_full under softmax(eta)."""
        return self.costs.expected(self.choices.probabilities()) / self.costs.full_flops

    def architecture_parameters(self) -> list[nn.Parameter]:
        return list(self.choices.parameters())

    def selection(self) -> tuple[list[Picks], Selection | None]:
        """The architecture that the logits stand for: argmax, or the best that fits the budget."""
        return self._best(1)[0]

    def finalists(self) -> list[tuple[list[Picks], Selection | None]]:
        """The best architecture of each combination of stage widths that fits the budget."""
        return self._best(FINALISTS)

    @torch.no_grad()
    def _best(self, most: int) -> list[tuple[list[Picks], Selection | None]]:
        if self.budget is None:
            return [(self.choices.argmax(), None)]
        problem = self.costs.problem(self.choices.probabilities())
        found = finalists(problem, self.costs.full_flops, self.budget, most=most)
        return [([self.costs.options[i][k].picks for i, k in enumerate(f.picks)], f) for f in found]

    @torch.no_grad()
    def choice_rows(self) -> list[dict[str, Any]]:
        return [
            {"block": i, "choice": name, "candidate": candidate, "probability": float(p[k])}
            for i, block in enumerate(self.choices.probabilities())
            for name, p in block.items()
            for k, candidate in enumerate(self.costs.space.candidates[i][name])
        ]
