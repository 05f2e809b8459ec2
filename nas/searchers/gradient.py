"""The search by gradient: every choice a Gumbel-softmax over its candidates (section 2.2)."""

from typing import Any

import torch
from torch import Tensor, nn

from nas.prices.costs import PricedSpace, joint_probability
from nas.prices.selection import Selection, finalists
from nas.searchers.choices import ChoiceLogits, mixture_of
from nas.searchers.gumbel import step_generator, temperature
from nas.searchers.supernet_search import Draw, Search
from nas.training.losses import adjoined_weight, cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.method import Picks
from supernets.elastic import BlockMixture
from supernets.supernet import Supernet

FINALISTS = 16  # architectures measured at the end of a search


class Gradient(Search):
    """L = CE(p) + lambda(t) (KL(p || q) + penalty), q a Gumbel-softmax mixture, equations (3.5) to (3.8)."""

    def __init__(self, supernet: Supernet, costs: PricedSpace, **options: Any) -> None:
        """options: those of Search."""
        super().__init__(supernet, costs, **options)
        self.choices = ChoiceLogits(costs.space)

    def draw(self, step: Step) -> Draw:
        return self.choices.sample(temperature(step.t), step_generator(self.seed, step.number))

    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        return [
            mixture_of([o.slice for o in options], joint_probability(g, candidates), costs)
            for options, candidates, costs, g in zip(
                self.costs.options, self.costs.space.candidates, self.costs.network.blocks, draw, strict=True
            )
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

    def drawn_cost(self, draw: Draw) -> Tensor:
        return self.costs.blocks_cost(draw)

    def expected_fraction(self) -> Tensor:
        """E[F]/F_full under softmax(eta)."""
        return self.costs.expected(self.choices.probabilities()) / self.costs.full

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
        found = finalists(problem, self.costs.full, self.budget, most=most)
        return [([self.costs.options[i][k].picks for i, k in enumerate(f.picks)], f) for f in found]

    @torch.no_grad()
    def choice_rows(self) -> list[dict[str, Any]]:
        return [
            {"block": i, "choice": name, "candidate": candidate, "probability": float(p[k])}
            for i, block in enumerate(self.choices.probabilities())
            for name, p in block.items()
            for k, candidate in enumerate(self.costs.space.candidates[i][name])
        ]
