"""Searches for stream channels by their scores (sections 2.3 and 2.4).

Every channel j of a block's stream has a score a_j. A candidate that keeps c channels keeps the c of highest score;
the step's mask sum_i g_i mask_(c_i) multiplies the MLP's input and output channels, so that one MLP pass serves all
counts. The mask is hard in the scores, its gradient goes through sigmoid(a).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.objectives.kernel import KernelTerm, Task
from nas.prices.costs import PricedSpace
from nas.prices.selection import Selection, check_budget, cost_band
from nas.searchers.choices import gates, mixture_of
from nas.searchers.gradient import Gradient
from nas.searchers.gumbel import gumbel_noise, step_generator
from nas.searchers.supernet_search import Draw, Search
from nas.training.losses import adjoined_weight
from nas.training.objective import Step
from search_spaces.channels import KEPT, channel_count
from search_spaces.method import Picks
from search_spaces.slices import BlockSlice, identity_slice, prefix_slice
from supernets.elastic import BlockMixture, Term
from supernets.supernet import Supernet

FLOPS_WEIGHT = 0.2  # w; the authors cross-validate 0.1 to 0.5
SCORE_SPREAD = 0.1  # scores start from +0.1 at the first channel to -0.1 at the last


class KernelSearch(Search):
    """CE(p) + lambda(t) (KL(p || q) + penalty) + eta_kc TNN; what both forms of channel selection share.

    flops_weight: w of the authors' own objective CE(q) + w E[F]/F_full + eta_kc TNN on the small network alone
    (--no-adjoined); None for the adjoined one. mask_warmup: share of the steps in which every channel is kept, and
    what is chosen stands still.
    """

    def __init__(
        self,
        supernet: Supernet,
        costs: PricedSpace,
        *,
        kernel: KernelTerm,
        flops_weight: float | None = None,
        mask_warmup: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(supernet, costs, **options)
        self.kernel, self.flops_weight, self.mask_warmup = kernel, flops_weight, mask_warmup
        # After importance order (section 2.7) the first channels are the stage's best: the order to start from.
        self.scores = nn.ParameterList(
            nn.Parameter(torch.linspace(SCORE_SPREAD, -SCORE_SPREAD, shape.embed_dim)) for shape in supernet.shapes
        )

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        draw, masked = self.draw(step), step.t >= self.mask_warmup
        mixtures = self.mixtures(draw, masked)
        q, features = self.supernet.small_with_features(images, mixtures, self.stage_gates(draw))
        lam = adjoined_weight(step.t)
        task = Task(self.supernet, self.smoothing, self.detach_teacher, adjoined=self.flops_weight is None)
        terms = task.terms(images, target, q, lam)
        if self.flops_weight is None:
            terms["penalty"] = lam * self.penalty(draw)
        else:
            terms["penalty"] = self.flops_weight * self.expected_fraction()
        terms["penalty"] = masked * terms["penalty"]
        return terms | {"tnn": self.kernel(features, step)}

    def pace(self, step: Step) -> float:
        """None before the masks are there."""
        return super().pace(step) if step.t >= self.mask_warmup else 0.0

    @property
    def own_pace(self) -> Literal["lambda", "constant"]:
        """Lambda(t) where factors are chosen too; constant for counts alone, which lose by waiting (docs/kcr.md).

        Constant, too, where the small network is trained by itself: there lambda is in no gradient.
        """
        return "lambda" if self.factors and self.flops_weight is None else "constant"

    @property
    def trains_large(self) -> bool:
        return self.flops_weight is None

    @property
    def factors(self) -> bool:
        """Whether factors are chosen too."""
        return any("alpha" in choices for choices in self.costs.space.candidates)

    @abstractmethod
    def channel_gate(self, block: int, drawn: Mapping[str, Tensor], stream: int) -> Tensor:
        """The step's mask over the first `stream` channels of a block: (stream,)."""

    def mixtures(self, draw: Draw, masked: bool = True) -> list[BlockMixture]:
        """A mixture of factors where the space has them, else the whole block; each MLP under its mask, if masked."""
        space, mixtures = self.costs.space, []
        for i, (shape, costs, drawn) in enumerate(zip(space.shapes, self.costs.network.blocks, draw, strict=True)):
            terms: tuple[Term, ...] = (Term(identity_slice(shape)),)
            if "alpha" in drawn:
                slices = [prefix_slice(shape, int(a), space.settings.width) for a in space.candidates[i]["alpha"]]
                terms = mixture_of(slices, drawn["alpha"], costs).terms
            channel_gates = [self.channel_gate(i, drawn, t.slice.stream) for t in terms]
            if not masked:
                channel_gates = [torch.ones_like(gate) + 0.0 * gate for gate in channel_gates]  # a gradient of zero
            gated = [replace(t, channel_gate=gate) for t, gate in zip(terms, channel_gates, strict=True)]
            mixtures.append(BlockMixture(tuple(gated)))
        return mixtures

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [*super().architecture_parameters(), *self.scores]

    def kept_indices(self, picks: list[Picks]) -> list[dict[str, list[int]]]:
        """The channels of highest score among those of the block's slice, ascending."""
        space = self.costs.space
        slices = space.block_slices(picks)
        return [{KEPT: best_channels(scores, kept)} for scores, kept in zip(self.scores, slices, strict=True)]

    def process_state(self) -> dict[str, Tensor]:
        return self.kernel.process_state()

    def load_process_state(self, state: Mapping[str, Tensor]) -> None:
        self.kernel.load_process_state(state)

    def after_epoch(self) -> None:
        self.kernel.finish_epoch()

    def log(self, step: Step) -> dict[str, float]:
        return super().log(step) | self.kernel.log()


class TopK(KernelSearch, Gradient):
    """The count is a Gumbel-softmax choice; a candidate keeps the channels of highest score."""

    @property
    def may_begin(self) -> bool:
        """Counts alone find their own way from the first step on (docs/kcr.md)."""
        return self.factors

    def channel_gate(self, block: int, drawn: Mapping[str, Tensor], stream: int) -> Tensor:
        candidates = self.costs.space.candidates[block]
        if "channels" in drawn:
            return top_gate(self.scores[block], drawn["channels"], [int(c) for c in candidates["channels"]])
        counts = [channel_count(stream, fraction) for fraction in candidates["fraction"]]
        return top_gate(self.scores[block][:stream], drawn["fraction"], counts)


class Bernoulli(KernelSearch):
    """The authors' form: an independent two-way Gumbel-softmax per channel, and no choice among counts."""

    def __init__(self, supernet: Supernet, costs: PricedSpace, **options: Any) -> None:
        super().__init__(supernet, costs, **options)
        self.channel_costs = []  # per block, of one channel that the MLP reads and writes
        for shape, block in zip(supernet.shapes, costs.network.blocks, strict=True):
            whole = identity_slice(shape)
            less = replace(whole, mlp_stream=shape.embed_dim - 1)
            self.channel_costs.append(costs.price.block(shape, block, whole) - costs.price.block(shape, block, less))

    def draw(self, step: Step) -> Draw:
        """One hard gate per channel: sigma((a + e1 - e2)/tau) > 1/2, its gradient straight through."""
        generator, tau = step_generator(self.seed, step.number), self.tau(step)
        draw: Draw = []
        for scores in self.scores:
            noise = gumbel_noise(len(scores), generator) - gumbel_noise(len(scores), generator)
            soft = torch.sigmoid((scores + noise.to(scores.device)) / tau)
            draw.append({"channels": (soft > 0.5).to(soft.dtype) + (soft - soft.detach())})
        return draw

    def channel_gate(self, block: int, drawn: Mapping[str, Tensor], stream: int) -> Tensor:
        return drawn["channels"]

    def drawn_cost(self, draw: Draw) -> Tensor:
        return self._cost([drawn["channels"].sum() for drawn in draw], sum(row[0].cost for row in self.costs.options))

    def expected_fraction(self) -> Tensor:
        """E[F]/F_full when every channel is kept with probability sigma(a)."""
        counts = [torch.sigmoid(scores).sum() for scores in self.scores]
        return self._cost(counts, self.costs.full) / self.costs.full

    def _cost(self, counts: Sequence[Tensor], full: int) -> Tensor:
        """The price at these counts, from that with every channel: it is linear in their number."""
        saved = [
            cost * (shape.embed_dim - count.double())
            for shape, cost, count in zip(self.supernet.shapes, self.channel_costs, counts, strict=True)
        ]
        return full - torch.stack(saved).sum()

    @torch.no_grad()
    def selection(self) -> tuple[list[Picks], Selection | None]:
        """Counts of a > 0, to the nearest multiple of 8; over budget, the lowest-scored eight leave, block by block."""
        options = [[int(o.picks["channels"]) for o in row] for row in self.costs.options]  # descending
        ordered = [scores.sort(descending=True).values.tolist() for scores in self.scores]
        taken = []
        for counts, scores in zip(options, ordered, strict=True):
            positive = sum(score > 0 for score in scores)
            taken.append(min(range(len(counts)), key=lambda k: abs(counts[k] - positive)))
        problem = self.costs.uniform()

        def next_to_leave(block: int) -> float:
            """Mean score of the channels that the block's next smaller count drops."""
            k = taken[block]
            leaving = ordered[block][options[block][k + 1] : options[block][k]]
            return float(sum(leaving) / len(leaving))

        chosen = None
        if self.budget is not None:
            check_budget(problem, self.costs.full, self.budget)
            low, high = cost_band(self.costs.full, self.budget, self.band)
            while problem.cost(taken) > high:
                open_blocks = [i for i, k in enumerate(taken) if k + 1 < len(options[i])]
                taken[min(open_blocks, key=next_to_leave)] += 1
            cost = problem.cost(taken)
            chosen = Selection(tuple(taken), cost, in_band=cost >= low)
        return [row[k].picks for row, k in zip(self.costs.options, taken, strict=True)], chosen

    @torch.no_grad()
    def choice_rows(self) -> list[dict[str, Any]]:
        rows = []
        for i, scores in enumerate(self.scores):
            share = float(torch.sigmoid(scores).mean())
            for candidate, probability in (("kept", share), ("left out", 1.0 - share)):
                rows.append({"block": i, "choice": "channel", "candidate": candidate, "probability": probability})
        return rows


def ranking(scores: Tensor) -> Tensor:
    """Channels from the highest score to the lowest, (channels,); of equals the first comes first."""
    return scores.detach().argsort(descending=True, stable=True)


def top_gate(scores: Tensor, weights: Tensor, counts: Sequence[int]) -> Tensor:
    """sum_i g_i mask_(c_i), (channels,): mask_c is 1 on the c highest scores, its gradient that of sigmoid(a).

    weights g: (candidates,), summing to one. counts: c of each candidate.
    """
    by_rank = gates(weights, counts)
    by_rank = F.pad(by_rank, (0, len(scores) - len(by_rank)))
    rank = ranking(scores).argsort()
    soft = torch.sigmoid(scores)
    return by_rank[rank] + (soft - soft.detach())  # the weights sum to one, so does the soft part's factor


def best_channels(scores: Tensor, kept: BlockSlice) -> list[int]:
    """Indices of the channels that the MLP of a slice keeps, ascending."""
    return sorted(ranking(scores[: kept.stream])[: kept.num_mlp_stream()].tolist())
