"""The search by gradient: every choice a Gumbel-softmax over its candidates (section 2.2)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.prices.costs import PricedSpace, joint_probability
from nas.prices.selection import Selection, cost_band, finalists
from nas.searchers.choices import ChoiceLogits, mixture_of
from nas.searchers.gumbel import step_generator
from nas.searchers.supernet_search import Draw, Search
from nas.training.losses import adjoined_weight, cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.method import Picks
from supernets.elastic import BlockMixture
from supernets.supernet import Supernet

FINALISTS = 16  # architectures measured at the end of a search


@dataclass(frozen=True)
class Solution:
    """Where a search may begin: at an architecture, its picks.

    probabilities: of each choice's candidates, by its label. price: what a saved share of the backbone's is worth, in
    nats.
    """

    picks: Sequence[Picks]
    probabilities: Mapping[str, Sequence[float]]
    price: float


class Gradient(Search):
    """L = CE(p) + lambda(t) (KL(p || q) + penalty), q a Gumbel-softmax mixture, equations (3.5) to (3.8)."""

    def __init__(self, supernet: Supernet, costs: PricedSpace, **options: Any) -> None:
        """options: those of Search."""
        super().__init__(supernet, costs, **options)
        self.choices = ChoiceLogits(costs.space)
        self.began: list[Picks] | None = None

    @property
    def may_begin(self) -> bool:
        """Whether it may begin at a solution."""
        return True

    def begin(self, solution: Solution) -> None:
        """Start where an architecture is likely, at its price."""
        self.choices.begin(solution.probabilities)
        self.multiplier.fill_(solution.price)
        self.began = [dict(picks) for picks in solution.picks]

    @torch.no_grad()
    def divergence(self, picks: Sequence[Picks], batches: Iterable[Tensor]) -> float:
        """KL(large || subnet) in nats per image, the subnet as it is cut. batches: images (B, C, H, W)."""
        subnet, total, seen = self.subnet_of([dict(pick) for pick in picks]), 0.0, 0
        for images in batches:
            p, q = self.supernet.large(images), self.supernet.small(images, subnet)
            total += len(images) * float(kl_divergence(p, q))
            seen += len(images)
        return total / max(seen, 1)

    def share(self, picks: Sequence[Picks]) -> float:
        """The exact price of an architecture, as a share of the backbone's."""
        return self.costs.network_cost(self.subnet_of([dict(pick) for pick in picks])) / self.costs.full

    def draw(self, step: Step) -> Draw:
        return self.choices.sample(self.tau(step), step_generator(self.seed, step.number))

    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        return [
            mixture_of([o.slice for o in options], joint_probability(g, candidates), costs)
            for options, candidates, costs, g in zip(
                self.costs.options, self.costs.space.candidates, self.costs.network.blocks, draw, strict=True
            )
        ]

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        draw = self.draw(step)
        p, q = self.supernet(images, self.mixtures(draw), self.stage_gates(draw))
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

    def other_fractions(self) -> Tensor:
        p = self.choices.probabilities()
        return torch.stack([bound.priced.expected(p) / bound.most for bound in self.costs.bounds])

    def architecture_parameters(self) -> list[nn.Parameter]:
        return list(self.choices.parameters())

    def selection(self) -> tuple[list[Picks], Selection | None]:
        """The architecture that the logits stand for: argmax, or the best that fits the budget."""
        return self._best(1)[0]

    def finalists(self) -> list[tuple[list[Picks], Selection | None]]:
        """The best architecture of each combination of stage widths that fits the budget; and where the search began.

        Last of all, so that it is taken where training has found nothing as good.
        """
        found = self._best(FINALISTS)
        if self.began is not None and self.began not in [picks for picks, _ in found]:
            found.append((self.began, self._selected(self.began)))
        return found

    def _selected(self, picks: list[Picks]) -> Selection:
        assert self.budget is not None
        price = self.costs.network_cost(self.subnet_of(picks))
        return Selection((), price, in_band=price >= cost_band(self.costs.full, self.budget, self.band)[0])

    def found(self) -> dict[str, Any]:
        return super().found() | ({} if self.began is None else {"start": "importance"})

    @torch.no_grad()
    def _best(self, most: int) -> list[tuple[list[Picks], Selection | None]]:
        if self.budget is None:
            return [(self.choices.argmax(), None)]
        problem = self.costs.problem(self.choices.probabilities())
        found = finalists(problem, self.costs.full, self.budget, self.band, most)
        return [([self.costs.options[i][k].picks for i, k in enumerate(f.picks)], f) for f in found]

    @torch.no_grad()
    def choice_rows(self) -> list[dict[str, Any]]:
        """last_block: where blocks of a stage choose alike, the last that a choice is of."""
        probabilities, space = self.choices.probabilities(), self.costs.space
        rows = []
        for blocks, name in self.choices.once():
            i = blocks[0]
            of: dict[str, Any] = {"block": i} | ({"last_block": blocks[-1]} if space.method.stage_choices else {})
            for candidate, p in zip(space.candidates[i][name], probabilities[i][name].tolist(), strict=True):
                rows.append(of | {"choice": name, "candidate": candidate, "probability": p})
        return rows
