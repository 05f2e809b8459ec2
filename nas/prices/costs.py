"""What a search space costs: every option of every block, expected under probabilities, and as a selection problem."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nas.prices.price import Outside, Price
from nas.prices.selection import KnapsackItem, Limit, SelectionProblem
from search_spaces.method import Candidate, Choices, Picks
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, identity_slice, network_slice
from search_spaces.space import SearchSpace
from supernets.flops import NetworkCosts, PerWidth

Probabilities = Sequence[Mapping[str, Tensor]]  # per block, choice name -> (candidates,)


@dataclass(frozen=True)
class Option:
    """One way to take all choices of one block."""

    picks: Picks
    slice: BlockSlice
    cost: int


@dataclass(frozen=True)
class Bound:
    """A limit of another price: `most` of what the same space costs by it. words: as it was typed."""

    priced: "PricedSpace"
    most: int
    words: str


@dataclass(frozen=True)
class PricedSpace:
    """options[l]: every option of block l, in the order of the product of its choices' candidates.

    full: the price of the backbone, in the units of `price`; whole: of the network that these are the blocks of, which
    is less where that is a compact network of the backbone (nas/networks/rounds.py). bounds: by other prices.
    """

    space: SearchSpace
    network: NetworkCosts
    price: Price
    options: tuple[tuple[Option, ...], ...]
    full: int
    whole: int
    full_stage_width: bool
    bounds: tuple[Bound, ...] = ()

    def blocks_of(self, stage: int) -> list[int]:
        """Indices of the blocks of a stage."""
        return [i for i, shape in enumerate(self.space.shapes) if shape.stage == stage]

    def network_cost(self, subnet: NetworkSlice) -> int:
        """The exact price of a subnet, in the units of `full`."""
        return self.price.network(self.space.shapes, self.network, subnet)

    def within_bounds(self, subnet: NetworkSlice) -> bool:
        """Whether a subnet is within the limits of the other prices; exact."""
        return all(bound.priced.network_cost(subnet) <= bound.most for bound in self.bounds)

    def blocks_cost(self, weights: Probabilities) -> Tensor:
        """n_f of equation (3.8): the sum over blocks of g_j * price(block, j), float64."""
        return torch.stack([self._block(i, weights[i]) for i in range(len(self.options))]).sum()

    def expected(self, probabilities: Probabilities) -> Tensor:
        """E[F], differentiable: blocks, and stem, merging and classifier over the stage widths (section 2.6)."""
        stages = range(1 + max(shape.stage for shape in self.space.shapes))
        per = self.price.outer(self.network)
        if isinstance(per, PerWidth):
            outside = affine_outside(per, [self._exists(stage, probabilities).sum() for stage in stages])
        else:
            outside = expected_outside(per, [self._widths(stage, probabilities) for stage in stages])
        return self.blocks_cost(probabilities) + outside

    def _block(self, block: int, weights: Mapping[str, Tensor]) -> Tensor:
        p = joint_probability(weights, self.space.candidates[block])
        costs = torch.tensor([float(o.cost) for o in self.options[block]], dtype=torch.float64, device=p.device)
        return (p.double() * costs).sum()

    def stage_gates(self, weights: Probabilities) -> list[Tensor] | None:
        """Per stage (E,): how much of each channel of the stream exists at these weights, float32, differentiable.

        The probability that the stage is wider, so that their sums are the stage widths that `expected` charges for.
        None where no pick narrows a stage.
        """
        if self.full_stage_width or all(
            option.slice.stream == shape.embed_dim
            for shape, options in zip(self.space.shapes, self.options, strict=True)
            for option in options
        ):
            return None
        return [self._exists(stage, weights).float() for stage in range(1 + self.space.shapes[-1].stage)]

    def _exists(self, stage: int, probabilities: Probabilities) -> Tensor:
        """P(stage width > c) of every channel c, (E,), float64."""
        widths, at_most = self._at_most(stage, probabilities)
        embed_dim = self.space.shapes[self.blocks_of(stage)[0]].embed_dim
        runs = [e - w for w, e in itertools.pairwise([*widths, embed_dim])]
        wider = [(1 - p).expand(run) for p, run in zip(at_most, runs, strict=True)]
        return torch.cat([at_most.new_ones(widths[0]), *wider])

    def _widths(self, stage: int, probabilities: Probabilities) -> tuple[list[int], Tensor]:
        """The widths that a stage may have and their probabilities, (widths,), float64."""
        widths, at_most = self._at_most(stage, probabilities)
        return widths, at_most.diff(prepend=at_most.new_zeros(1))

    def _at_most(self, stage: int, probabilities: Probabilities) -> tuple[list[int], Tensor]:
        """The widths that a stage may have, rising, and P(it is no wider): as wide as the widest of its blocks."""
        blocks = self.blocks_of(stage)
        joint = [joint_probability(probabilities[b], self.space.candidates[b]).double() for b in blocks]
        if self.full_stage_width:
            return [self.space.shapes[blocks[0]].embed_dim], joint[0].new_ones(1)
        streams = [[o.slice.stream for o in self.options[b]] for b in blocks]
        widths = sorted({w for row in streams for w in row})
        fits = [torch.tensor([[s <= w for w in widths] for s in row], device=joint[0].device) for row in streams]
        return widths, torch.stack([p @ f.double() for p, f in zip(joint, fits, strict=True)]).prod(0)

    def problem(self, probabilities: Probabilities) -> SelectionProblem:
        """The exact selection of section 2.6, scored by log-probability."""
        joint = [joint_probability(p, c) for p, c in zip(probabilities, self.space.candidates, strict=True)]
        return self.scored([p.detach().double().clamp_min(1e-300).log().tolist() for p in joint])

    def scored(self, scores: Sequence[Sequence[float]]) -> SelectionProblem:
        """The exact selection of section 2.6 at these scores of every block's options."""
        blocks = [
            tuple(KnapsackItem(o.cost, o.slice.stream, s) for o, s in zip(options, own, strict=True))
            for options, own in zip(self.options, scores, strict=True)
        ]
        shapes = self.space.shapes
        stages = range(shapes[-1].stage + 1)
        full = tuple(shapes[self.blocks_of(s)[0]].embed_dim for s in stages)
        whole = [any(o.slice == identity_slice(s) for o in row) for s, row in zip(shapes, self.options, strict=True)]
        return SelectionProblem(
            blocks=tuple(blocks),
            stages=tuple(shape.stage for shape in shapes),
            outer=self.price.outer(self.network),
            fixed_widths=full if self.full_stage_width else None,
            whole=self.whole if all(whole) else None,
            limits=tuple(self._limit(bound) for bound in self.bounds),
        )

    def _limit(self, bound: Bound) -> Limit:
        other = bound.priced
        costs = tuple(tuple(option.cost for option in options) for options in other.options)
        return Limit(costs, other.price.outer(other.network), bound.most, bound.words)

    def uniform(self) -> "SelectionProblem":
        """The selection problem with every option equally likely, for ranges."""
        return self.problem(
            [
                {name: torch.full((len(c),), 1.0 / len(c)) for name, c in choices.items()}
                for choices in self.space.candidates
            ]
        )


class EndsOnly(PricedSpace):
    """Costs of a space too fine to list: options[l] are block l whole and block l skipped."""

    def uniform(self) -> SelectionProblem:
        blocks = [{"end": torch.full((len(options),), 1.0 / len(options))} for options in self.options]
        ends = replace(self.space, candidates=tuple({"end": tuple(range(len(o)))} for o in self.options))
        own = {f.name: getattr(self, f.name) for f in fields(PricedSpace)}
        return PricedSpace(**own | {"space": ends}).problem(blocks)


def affine_outside(per: PerWidth, widths: Sequence[Tensor]) -> Tensor:
    """The expectation of what stem, merging and classifier cost, at the expected widths of the stages.

    Stages are independent, so the expectation of a product of neighbouring widths is the product of theirs.
    """
    total: Tensor = per.constant + per.first * widths[0] + per.last * widths[-1]
    for s, (pair, single) in enumerate(zip(per.merge_pair, per.merge_in, strict=True)):
        total = total + pair * widths[s] * widths[s + 1] + single * widths[s]
    return total


def expected_outside(per: Outside, stages: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """The same of a cost that is any function of the widths: term by term over their probabilities (widths,)."""
    total = stages[0][1].new_tensor(float(per.constant))
    for stage, (widths, p) in enumerate(stages):
        total = total + p @ p.new_tensor([float(per.of_stage(stage, w)) for w in widths])
        if stage + 1 < len(stages):
            after, q = stages[stage + 1]
            costs = p.new_tensor([[float(per.of_merging(stage, w, v)) for v in after] for w in widths])
            total = total + p @ costs @ q
    return total


def joint_probability(weights: Mapping[str, Tensor], candidates: Mapping[str, tuple[object, ...]]) -> Tensor:
    """Probability of every option of a block, its choices being independent: (prod of their sizes,)."""
    joint: Tensor | None = None
    for name in candidates:
        p = weights[name]
        joint = p if joint is None else (joint[:, None] * p[None, :]).flatten()
    assert joint is not None, "a block without choices"
    return joint


def block_options(space: SearchSpace, shape: BlockShape, choices: Choices) -> list[tuple[Picks, BlockSlice]]:
    """Every option of a block; of a space too fine to list, the ends."""
    combinations: Iterable[tuple[Candidate, ...]] = itertools.product(*choices.values())
    if not space.method.listed:
        combinations = [tuple(map(end, choices.values())) for end in (max, min)]
    picks = [dict(zip(choices, combination, strict=True)) for combination in combinations]
    return [(pick, space.method.block_slice(shape, space.settings, pick, {})) for pick in picks]


def priced(
    space: SearchSpace, network: NetworkCosts, price: Price, full_stage_width: bool = False, full: int | None = None
) -> PricedSpace:
    """Price every option of every block; of a space too fine to list, the ends.

    full: of the backbone, where that is not the network whose blocks these are.
    """
    whole = price.network(space.shapes, network, network_slice(space.shapes, [identity_slice(s) for s in space.shapes]))
    full = whole if full is None else full
    options = tuple(
        tuple(
            Option(picks, kept, price.block(shape, costs, kept)) for picks, kept in block_options(space, shape, choices)
        )
        for shape, costs, choices in zip(space.shapes, network.blocks, space.candidates, strict=True)
    )
    if not space.method.listed:
        return EndsOnly(space, network, price, options, full, whole, full_stage_width=not space.method.stage_choices)
    return PricedSpace(space, network, price, options, full, whole, full_stage_width)
