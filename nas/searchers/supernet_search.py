"""A search whose parameters train with the supernet's weights, and stand for an architecture at every step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nas.prices.costs import PricedSpace
from nas.prices.options import BAND
from nas.prices.selection import Selection
from nas.searchers.gumbel import TAU, temperature
from nas.searchers.primal_dual import ascend, damped_price
from nas.training.losses import adjoined_weight
from nas.training.objective import Objective, Step
from search_spaces.errors import UserError
from search_spaces.method import Picks
from search_spaces.slices import NetworkSlice, network_slice
from supernets.elastic import BlockMixture
from supernets.supernet import Supernet

Draw = list[dict[str, Tensor]]  # per block, choice name -> what one step drew for it
DAMPING = 10.0  # large enough beside the multiplier's rate that E[F] settles at the budget within a run of 300 steps


@dataclass(frozen=True)
class Mixing:
    """How a mixture of candidates becomes a choice (section 2.2).

    tau: temperature, constant or from the first to the last. pace: of the choices' rate, None for the method's own.
    stage_gates: whether the mixture feels the stage widths that its draw implies.
    """

    tau: tuple[float, ...] = TAU
    pace: Literal["lambda", "constant"] | None = None
    stage_gates: bool = True


class Search(Objective, ABC):
    """What every trained search shares: the price, and the architecture that its parameters stand for.

    penalty: gamma * n_f, or with a budget a price * E[F]/F_full, from the multiplier z of E[F]/F_full <= B
    (section 2.6). multiplier_rate is per step: a violation of 0.1 raises z by 0.6 in a tenth of the run.
    """

    def __init__(
        self,
        supernet: Supernet,
        costs: PricedSpace,
        *,
        budget: float | None,
        gamma: float,
        seed: int,
        total_steps: int,
        smoothing: float = 0.0,
        detach_teacher: bool = False,
        band: float = BAND,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__(supernet)
        self.mixing = mixing or Mixing()
        self.costs, self.smoothing, self.detach_teacher = costs, smoothing, detach_teacher
        self.budget, self.band, self.gamma, self.seed = budget, band, gamma, seed
        self.multiplier_rate = 60.0 / max(total_steps, 1)
        self.multiplier: Tensor
        self.register_buffer("multiplier", torch.zeros((), dtype=torch.float64))
        self.other_multipliers: Tensor  # one of every other price that has a limit
        if costs.bounds:
            self.register_buffer("other_multipliers", torch.zeros(len(costs.bounds), dtype=torch.float64))

    @abstractmethod
    def draw(self, step: Step) -> Draw:
        """What a step's small path takes of every choice."""

    @abstractmethod
    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        """What each block of the small path computes at a draw."""

    @abstractmethod
    def drawn_cost(self, draw: Draw) -> Tensor:
        """n_f of equation (3.8): the price of the blocks at a draw, differentiable."""

    @abstractmethod
    def expected_fraction(self) -> Tensor:
        """E[F]/F_full, differentiable."""

    def other_fractions(self) -> Tensor:
        """E[F]/limit of every other price that has one, (limits,), differentiable. UserError where there is none."""
        names = " and ".join(bound.words for bound in self.costs.bounds)
        raise UserError(f"{names}: this search holds one price; leave {names} out")

    @abstractmethod
    def selection(self) -> tuple[list[Picks], Selection | None]:
        """The architecture that the parameters stand for; within the budget, when there is one."""

    def finalists(self) -> list[tuple[list[Picks], Selection | None]]:
        """The architectures among which accuracy on held-out images decides; `selection` is the first."""
        return [self.selection()]

    def kept_indices(self, picks: list[Picks]) -> list[dict[str, list[int]]]:
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
            return self.gamma * self.drawn_cost(draw)
        fraction = self.expected_fraction()
        total = damped_price(self.multiplier, fraction - self.budget, DAMPING).clamp_min(0.0) * fraction
        if self.costs.bounds:
            others = self.other_fractions()
            total = total + damped_price(self.other_multipliers, others - 1.0, DAMPING).clamp_min(0.0) @ others
        return total

    def pace(self, step: Step) -> float:
        """lambda(t), unless it is to be constant: lambda is in their gradients, but Adam divides it out again.

        Unscaled, they would be settled while lambda has hardly let the small network learn: by what a slice does
        before any training, which of a trained network is least harm, the widest and the narrowest of all.
        """
        return adjoined_weight(step.t) if (self.mixing.pace or self.own_pace) == "lambda" else 1.0

    @property
    def own_pace(self) -> Literal["lambda", "constant"]:
        """The pace unless another is asked for."""
        return "lambda"

    def tau(self, step: Step) -> float:
        """The temperature at a step."""
        return temperature(step.t, self.mixing.tau)

    def stage_gates(self, draw: Draw) -> list[Tensor] | None:
        """Per stage (E,): how much of each channel exists at a draw; None where the mixture is as wide as the stage."""
        return self.costs.stage_gates(draw) if self.mixing.stage_gates else None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """z <- max(0, z + rate * pace * (E[F]/F_full - B))."""
        if self.budget is not None:
            violation = self.expected_fraction() - self.budget
            rate = self.multiplier_rate * self.pace(step)
            self.multiplier.copy_(ascend(self.multiplier, violation, rate))
            if self.costs.bounds:
                others = self.other_multipliers
                others.copy_(ascend(others, self.other_fractions() - 1.0, rate))

    @property
    def trains_large(self) -> bool:
        """Whether the large network learns too; otherwise what it computes is nobody's result."""
        return True

    def networks(self) -> dict[str, Callable[[Tensor], Tensor]]:
        subnet = self.current_subnet()
        large = {"large": self.supernet.large} if self.trains_large else {}
        return large | {"subnet": lambda x: self.supernet.small(x, subnet)}

    def subnet_of(self, picks: list[Picks]) -> NetworkSlice:
        """The subnet at one candidate per choice and block."""
        space = self.costs.space
        blocks = space.block_slices(picks, self.kept_indices(picks))
        return network_slice(space.shapes, blocks, self.costs.full_stage_width)

    def current_subnet(self) -> NetworkSlice:
        """The subnet that the parameters stand for now."""
        return self.subnet_of(self.selection()[0])

    @torch.no_grad()
    def log(self, step: Step) -> dict[str, float]:
        price = self.costs.price
        return {
            "lam": adjoined_weight(step.t),
            "tau": self.tau(step),
            "multiplier": float(self.multiplier),
            f"expected_{price.column}": float(self.expected_fraction()) * self.costs.full / price.scale,
            "selected_gflops": self.supernet.flops(self.current_subnet()) / 1e9,
        }
