"""The minimax step of nas/searchers/primal_dual.py as an objective of the one training loop (section 2.5)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.prices.costs import PricedSpace
from nas.prices.selection import Selection, cost_band
from nas.searchers.gumbel import gumbel_softmax, step_generator
from nas.searchers.primal_dual import (
    DUAL_START,
    GATE_START,
    TAU,
    AveragedSGD,
    Prices,
    Rates,
    Rules,
    ascend,
    constraint,
    damped_price,
    flops,
    hard,
    next_score,
    shares,
    shrink_smallest,
    smallest_sum,
    step_counts,
    unit_scores,
)
from nas.searchers.supernet_search import Draw, Search
from nas.searchers.trim import Gate, Plan, Scores, fit_budget, make_plan
from nas.training.objective import Step
from search_spaces.method import Picks
from search_spaces.slices import BlockShape, identity_slice
from search_spaces.units import KEPT_HIDDEN, KEPT_V, SKIPS
from supernets.elastic import BlockMixture, Term
from supernets.flops import BlockCosts, block_flops, unit_flops
from supernets.supernet import Supernet

RECORDS = 200  # rows of steps.csv, about
MECHANISMS = ("skipped", "heads", "channels", "neurons")
Loss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]  # images, logits q, target -> weighted terms


class Minimax(Search):
    """L_distill(W, gates) + z w_g (F/F_full - B) for weights and gates; s, r and the duals step after it.

    loss: of the gated network. skip: what gates skip (search_spaces/units.py). prune: whether s and r move. rules:
    where paper and authors' code differ. warmup_steps: for so long gates stand at one half and s, r and the duals as
    they began.
    """

    def __init__(
        self,
        supernet: Supernet,
        costs: PricedSpace,
        *,
        loss: Loss,
        skip: str,
        prune: bool,
        warmup_steps: int,
        rules: Rules | None = None,
        **options: Any,
    ) -> None:
        super().__init__(supernet, costs, **options)
        assert self.budget is not None
        self.loss, self.skip, self.prune, self.warmup_steps = loss, skip, prune, warmup_steps
        self.total_steps: int = options["total_steps"]
        self.rules = rules or Rules()
        self.rates = Rates(self.total_steps - warmup_steps, self.rules.steps)
        shapes = supernet.shapes
        self.prices = [unit_prices(*pair) for pair in zip(shapes, costs.network.blocks, strict=True)]
        self.outer = costs.network.flops.at(supernet.identity().stage_widths)
        self.num_heads = [shape.num_heads for shape in shapes]
        start = torch.tensor(GATE_START).expand(len(shapes), SKIPS[skip], 2)
        # (L, gates, 2): logits of skipping and of keeping
        self.gates = nn.Parameter(start.clone(), requires_grad=SKIPS[skip] > 0)
        self.removed_heads: Tensor  # s1 (L,)
        self.removed_hidden: Tensor  # s3 (L,)
        self.removed_channels: Tensor  # r (all heads,)
        self.dual_heads: Tensor  # y of s1 (L,)
        self.dual_hidden: Tensor  # y of s3 (L,)
        self.dual_channels: Tensor  # p (all heads,)
        for name, size in (("heads", len(shapes)), ("hidden", len(shapes)), ("channels", sum(self.num_heads))):
            self.register_buffer(f"removed_{name}", torch.zeros(size, dtype=torch.float64))
            self.register_buffer(f"dual_{name}", torch.full((size,), DUAL_START, dtype=torch.float64))
        self.multiplier.fill_(DUAL_START)  # z
        self._rows: list[dict[str, Any]] = []

    def architecture_parameters(self) -> list[nn.Parameter]:
        return [self.gates] if SKIPS[self.skip] else []

    def architecture_optimizer(self, lr: float) -> torch.optim.Optimizer | None:
        """Move 4."""
        if not self.architecture_parameters():
            return None
        return AveragedSGD([self.gates], self.rates.gates(lr), 0.9, self.rates.gate_window, self.rules.ramp)

    @property
    def trains_large(self) -> bool:
        return False

    def halves(self, values: Tensor) -> Tensor:
        """Values of the gates (L, gates) -> of attention and MLP, (L, 2); 1 where no gate is."""
        ones = torch.ones(len(values), 1, dtype=values.dtype, device=values.device)
        first = values[:, :1] if SKIPS[self.skip] else ones
        return {
            "block": torch.cat([first, first], dim=1),
            "attention": torch.cat([first, ones], dim=1),
            "mlp": torch.cat([ones, first], dim=1),
            "halves": values,
            "none": torch.cat([ones, ones], dim=1),
        }[self.skip]

    def probabilities(self) -> Tensor:
        """P(keep) of every gate, (L, gates)."""
        return self.gates.softmax(-1)[..., 1]

    def draw(self, step: Step) -> Draw:
        """The gates g1 of one step, one half during the warm-up: "keep" (2,) of attention and MLP."""
        if step.number < self.warmup_steps:
            values = 0.5 + 0.0 * self.gates[..., 1]  # a gradient of zero: float16's scaler wants one
        else:
            generator = step_generator(self.seed, step.number)
            drawn = [gumbel_softmax(logits, TAU, generator)[1] for logits in self.gates.flatten(0, 1)]
            values = torch.stack(drawn).view(self.gates.shape[:2]) if drawn else self.gates[..., 1]
        return [{"keep": keep} for keep in self.halves(values)]

    def mixtures(self, draw: Draw) -> list[BlockMixture]:
        """x <- g1 block(x) + g0 x, or the same of each half: the whole block, nothing of it cut yet."""
        mixtures = []
        for shape, drawn in zip(self.supernet.shapes, draw, strict=True):
            whole = identity_slice(shape)
            if self.skip == "none":
                mixtures.append(BlockMixture((Term(whole),)))
            elif self.skip == "block":
                mixtures.append(BlockMixture((Term(whole),), keep=drawn["keep"][0]))
            else:
                attn, mlp = replace(whole, mlp=False), replace(whole, attn=False)
                terms = Term(attn, weight=drawn["keep"][0]), Term(mlp, weight=drawn["keep"][1])
                mixtures.append(BlockMixture(terms))
        return mixtures

    def forward(self, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        draw = self.draw(step)
        terms = self.loss(images, self.supernet.small(images, self.mixtures(draw)), target)
        if step.number >= self.warmup_steps and SKIPS[self.skip]:
            assert self.budget is not None
            violation = constraint(self.fraction(self.counted(draw)), self.budget)
            price = damped_price(self.multiplier, violation, self.rules.damping)
            terms["penalty"] = self.rates.gate_weight(self.budget) * price * violation
        return terms

    def scores(self) -> list[tuple[Tensor, Tensor]]:
        """Squared norms of every block's groups: channels (H, d) and neurons (M,), float64."""
        found = []
        for block, heads in zip(self.supernet.adapter.blocks(), self.num_heads, strict=True):
            channels, neurons = unit_scores(*self.supernet.adapter.writers(block), heads)
            found.append((channels.double(), neurons.double()))
        return found

    def flops_at(self, heads: Tensor, channels: Tensor, hidden: Tensor, keep: Tensor) -> Tensor:
        """F(s, r, gates) in MACs. keep: (L, 2)."""
        adapter = self.supernet.adapter
        weights = [adapter.writers(block)[0].detach() for block in adapter.blocks()]
        order = [w.square().sum(0).unflatten(0, (n, -1)).sum(1) for w, n in zip(weights, self.num_heads, strict=True)]
        parts = channels.split(self.num_heads)
        return flops(self.prices, self.outer, heads, parts, hidden, keep, order)

    def drawn_cost(self, draw: Draw) -> Tensor:
        return self.macs(kept_halves(draw))

    def macs(self, keep: Tensor) -> Tensor:
        """F at ceil(s), ceil(r) and gates g1 of both halves, (L, 2)."""
        return self.flops_at(self.removed_heads, self.removed_channels, self.removed_hidden, keep)

    def fraction(self, keep: Tensor) -> Tensor:
        """The same as a share of the backbone's FLOPs."""
        return self.macs(keep) / self.costs.full

    def decided(self) -> Tensor:
        """The gates of both halves as they would be decided now, straight through: (L, 2)."""
        return self.halves(hard(self.probabilities()))

    def counted(self, draw: Draw) -> Tensor:
        """The gates by which the constraint counts a step's FLOPs, (L, 2)."""
        return kept_halves(draw) if self.rules.drawn else self.decided()

    def expected_fraction(self) -> Tensor:
        """F/F_full at ceil(s), ceil(r) and the gates as they would be decided now, straight through."""
        return self.fraction(self.decided())

    def soft_fraction(self) -> Tensor:
        """F/F_full with every half counted by the probability that it is kept."""
        return self.fraction(self.halves(self.probabilities()))

    def pace(self, step: Step) -> float:
        """1: its rates are its own, and its warm-up comes before them."""
        return 1.0

    def after_step(self, step: Step) -> None:
        """Moves 2, 3 and 5."""
        if step.number >= self.warmup_steps:
            scores = self.scores()
            of_heads = [shares(channels.sum(-1)) for channels, _ in scores]
            of_hidden = [shares(hidden) for _, hidden in scores]
            of_channels = [shares(channels) for channels, _ in scores]
            keep = self.counted(self.draw(step)).detach()
            if self.prune:
                self._shrink(of_heads, of_channels, of_hidden)
                self._count(of_heads, of_channels, of_hidden, keep)
            self._ascend(of_heads, of_channels, of_hidden, keep)
        every = max(1, self.total_steps // RECORDS)
        if (step.number + 1) % every == 0:
            self._record(step.number + 1)

    @torch.no_grad()
    def _shrink(self, of_heads: list[Tensor], of_channels: list[Tensor], of_hidden: list[Tensor]) -> None:
        """Move 2: on the columns of the matrices that write the stream, by head and channel, and by neuron."""
        lr, channels = self.rates.weights, self.removed_channels.ceil().split(self.num_heads)
        duals = self.dual_channels.split(self.num_heads)
        for b, block in enumerate(self.supernet.adapter.blocks()):
            of_v, of_neurons = self.supernet.adapter.writers(block)
            heads = shrink_smallest(of_heads[b], self.removed_heads[b].ceil(), lr, self.dual_heads[b])
            columns = heads[:, None] * shrink_smallest(of_channels[b], channels[b], lr, duals[b])
            of_v.mul_(columns.flatten())
            neurons = shrink_smallest(of_hidden[b], self.removed_hidden[b].ceil(), lr, self.dual_hidden[b])
            of_neurons.mul_(neurons)

    def _count(self, of_heads: list[Tensor], of_channels: list[Tensor], of_hidden: list[Tensor], keep: Tensor) -> None:
        """Move 3: gradient y (score of the next group) + z dF/ds; what is skipped keeps its counts. keep: (L, 2)."""
        assert self.budget is not None
        with torch.enable_grad():
            counts = [
                t.clone().requires_grad_() for t in (self.removed_heads, self.removed_hidden, self.removed_channels)
            ]
            fraction = self.flops_at(counts[0], counts[2], counts[1], keep) / self.costs.full
            price = damped_price(self.multiplier, constraint(fraction, self.budget), self.rules.damping)
            slopes = torch.autograd.grad(price * fraction, counts)
        removed = self.removed_channels.ceil().split(self.num_heads)
        sizes, units, following = self._lists(of_heads, of_channels, of_hidden, removed)
        there = keep[:, 0], keep[:, 1], keep[:, 0].repeat_interleave(torch.tensor(self.num_heads, device=keep.device))
        duals = self.dual_heads, self.dual_hidden, self.dual_channels
        gradients = [
            here.double() * dual * score + slope * self.costs.full / unit
            for here, dual, score, slope, unit in zip(there, duals, following, slopes, units, strict=True)
        ]
        s = torch.cat([self.removed_heads, self.removed_hidden])
        s = step_counts(s, torch.cat(gradients[:2]), torch.cat(sizes[:2]), self.rates.counts)
        self.removed_heads.copy_(s[: len(self.removed_heads)])
        self.removed_hidden.copy_(s[len(self.removed_heads) :])
        self.removed_channels.copy_(step_counts(self.removed_channels, gradients[2], sizes[2], self.rates.counts))

    def _lists(
        self, of_heads: list[Tensor], of_channels: list[Tensor], of_hidden: list[Tensor], removed: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of s1, s3 and r: the lists' sizes, MACs of a unit, and the next unit's score as a multiple of the mean."""
        heads, hidden = zip(*((p.num_heads, p.hidden) for p in self.prices), strict=True)
        per_head = [(p.head_dim, p.channel) for p in self.prices for _ in range(p.num_heads)]
        sizes = [torch.tensor(n).to(self.removed_heads) for n in (heads, hidden, [d for d, _ in per_head])]
        macs = [2 * p.head_dim * p.channel for p in self.prices], [p.neuron for p in self.prices]
        units = [torch.tensor(n).to(self.removed_heads) for n in (*macs, [c for _, c in per_head])]
        following = [
            torch.stack([next_score(s, k) for s, k in zip(of_heads, self.removed_heads.ceil(), strict=True)]),
            torch.stack([next_score(s, k) for s, k in zip(of_hidden, self.removed_hidden.ceil(), strict=True)]),
            torch.cat([next_score(s, k) for s, k in zip(of_channels, removed, strict=True)]),
        ]
        return sizes, units, [share * size for share, size in zip(following, sizes, strict=True)]

    @torch.no_grad()
    def _ascend(self, of_heads: list[Tensor], of_channels: list[Tensor], of_hidden: list[Tensor], keep: Tensor) -> None:
        """Move 5. keep: (L, 2)."""
        assert self.budget is not None
        removed = self.removed_channels.ceil().split(self.num_heads)
        sums = {
            "heads": torch.stack(
                [smallest_sum(s, k) for s, k in zip(of_heads, self.removed_heads.ceil(), strict=True)]
            ),
            "hidden": torch.stack(
                [smallest_sum(s, k) for s, k in zip(of_hidden, self.removed_hidden.ceil(), strict=True)]
            ),
            "channels": torch.cat([smallest_sum(s, k) for s, k in zip(of_channels, removed, strict=True)]),
        }
        for name, value in sums.items():
            dual = self.get_buffer(f"dual_{name}")
            dual.copy_(ascend(dual, value, self.rates.duals))
        violation = self.fraction(keep) - self.budget
        self.multiplier.copy_(ascend(self.multiplier, violation, self.rates.budget))

    @torch.no_grad()
    def plan(self) -> Plan:
        """What the counts and gates stand for, brought within the budget in whole MACs."""
        assert self.budget is not None
        found = [Scores(channels.tolist(), hidden.tolist()) for channels, hidden in self.scores()]
        heads, channels, hidden = (
            t.ceil().long() for t in (self.removed_heads, self.removed_channels, self.removed_hidden)
        )
        by_block = [r.tolist() for r in channels.split(self.num_heads)]
        plan = make_plan(self.prices, found, self.outer, heads.tolist(), by_block, hidden.tolist())
        margins = (self.gates[..., 1] - self.gates[..., 0]).tolist()
        attn, mlp = self.skip in ("block", "attention"), self.skip in ("block", "mlp")
        gates = [
            Gate(b, attn if self.skip != "halves" else k == 0, mlp if self.skip != "halves" else k == 1, margin)
            for b, row in enumerate(margins)
            for k, margin in enumerate(row)
        ]
        low, high = cost_band(self.costs.full, self.budget, self.band)
        fit_budget(plan, gates, low, high, units=self.prune or not gates)
        return plan

    def selection(self) -> tuple[list[Picks], Selection | None]:
        assert self.budget is not None
        plan = self.plan()
        total = plan.flops()
        low, _ = cost_band(self.costs.full, self.budget, self.band)
        picks: list[Picks] = [
            {
                "heads": block.heads() if block.attn else 0,
                "v_channels": sum(map(len, block.channels)) if block.attn else 0,
                "hidden": len(block.hidden) if block.mlp else 0,
            }
            for block in plan.blocks
        ]
        return picks, Selection((), total, in_band=total >= low)

    def kept_indices(self, picks: list[Picks]) -> list[dict[str, list[int]]]:
        plan = self.plan()
        return [
            {
                KEPT_V: [
                    h * price.head_dim + c
                    for h, kept in enumerate(block.channels if block.attn else [])
                    for c in sorted(kept)
                ],
                KEPT_HIDDEN: sorted(block.hidden) if block.mlp else [],
            }
            for block, price in zip(plan.blocks, self.prices, strict=True)
        ]

    def found(self) -> dict[str, Any]:
        """MACs that each mechanism took off, as shares of the backbone's."""
        removed = self.plan().removed()
        return {"removed": {name: removed[name] / self.costs.full for name in MECHANISMS}}

    @torch.no_grad()
    def log(self, step: Step) -> dict[str, float]:
        plan = self.plan()
        row = {
            "tau": TAU,
            "multiplier": float(self.multiplier),
            "expected_gflops": float(self.soft_fraction()) * self.costs.full / 1e9,
            "hard_gflops": float(self.expected_fraction()) * self.costs.full / 1e9,
            "selected_gflops": plan.flops() / 1e9,
        }
        return row | {f"removed_{n}": m / self.costs.full for n, m in plan.removed().items()}

    @torch.no_grad()
    def choice_rows(self) -> list[dict[str, Any]]:
        """How sure every gate is."""
        if not SKIPS[self.skip]:
            return []
        names = {"block": ("block",), "attention": ("attention",), "mlp": ("mlp",), "halves": ("attention", "mlp")}
        return [
            {"block": b, "choice": f"{name} gate", "candidate": candidate, "probability": p}
            for b, row in enumerate(self.probabilities().tolist())
            for name, keep in zip(names[self.skip], row, strict=True)
            for candidate, p in (("kept", keep), ("skipped", 1.0 - keep))
        ]

    @torch.no_grad()
    def _record(self, steps_done: int) -> None:
        row: dict[str, Any] = {
            "step": steps_done,
            "z": float(self.multiplier),
            "expected": float(self.soft_fraction()),
            "hard": float(self.expected_fraction()),
            "budget": self.budget,
        }
        keep = self.halves(self.probabilities()).tolist()
        for b, (price, r) in enumerate(zip(self.prices, self.removed_channels.split(self.num_heads), strict=True)):
            row[f"heads_{b}"] = float(self.removed_heads[b]) / price.num_heads
            row[f"channels_{b}"] = float(r.mean()) / price.head_dim
            row[f"neurons_{b}"] = float(self.removed_hidden[b]) / price.hidden
            row[f"keep_attention_{b}"], row[f"keep_mlp_{b}"] = keep[b]
        self._rows.append(row)

    def step_rows(self) -> list[dict[str, Any]]:
        """Rows of steps.csv since the last call: z, F/F_full, and by block shares removed and P(keep)."""
        rows, self._rows = self._rows, []
        return rows


def kept_halves(draw: Draw) -> Tensor:
    """g1 of attention and MLP of every block at a draw, (L, 2)."""
    return torch.stack([drawn["keep"] for drawn in draw])


def unit_prices(shape: BlockShape, costs: BlockCosts) -> Prices:
    """MACs of the block's units."""
    unit = unit_flops(shape, costs)
    prices = Prices(shape.num_heads, shape.head_dim, shape.hidden, unit.v_channel, unit.neuron)
    assert prices.attn + prices.mlp == block_flops(shape, costs, identity_slice(shape)), "q and k cost what V does"
    return prices
