"""What free widths cost (section 2.9): half by half, given the widths of the stages, or expected."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.prices.costs import EndsOnly, PricedSpace, Probabilities, joint_probability
from nas.prices.selection import KnapsackItem, SelectionProblem
from search_spaces.method import Candidate, Picks
from search_spaces.slices import BlockSlice

Costs = NDArray[np.int64]


@dataclass(frozen=True)
class HalfOption:
    """One way to take one half of a block. slice: of the block, its other half skipped, its stream whole."""

    picks: Picks
    slice: BlockSlice


class Halves:
    """A priced space whose halves choose by themselves: the options of each, and what they cost.

    Halves are counted through the network: 2 b is the attention of block b, 2 b + 1 its MLP. kinds: those of the same
    number have the same options at the same costs.
    """

    def __init__(self, priced: PricedSpace) -> None:
        self.priced, self.space = priced, priced.space
        self.others = [Halves(bound.priced) for bound in priced.bounds]  # the same options, by other prices
        numbers: dict[Any, int] = {}
        self.kinds = [numbers.setdefault(self._kind(half), len(numbers)) for half in range(len(self))]
        self._options: dict[int, tuple[tuple[HalfOption, ...], Costs]] = {}
        self._costs: dict[tuple[int, int], Costs] = {}

    def __len__(self) -> int:
        return 2 * len(self.space.shapes)

    def stage(self, half: int) -> int:
        """The stage of a half."""
        return self.space.shapes[half // 2].stage

    def widths(self, stage: int) -> tuple[int, ...]:
        """The widths that a stage may have, rising."""
        (choice,) = self.space.method.stage_choices
        block = self.priced.blocks_of(stage)[0]
        return tuple(sorted(int(w) for w in self.space.candidates[block][choice]))

    def options(self, half: int) -> tuple[HalfOption, ...]:
        """Every way to take a half; the first is the backbone's own."""
        return self._listed(half)[0]

    def choices(self, half: int) -> dict[str, tuple[Candidate, ...]]:
        """The half's own choices and their candidates."""
        candidates = self.space.candidates[half // 2]
        return {name: candidates[name] for name in self.space.method.halves[half % 2]}

    def option_of(self, half: int) -> Costs:
        """The place in `options` of every combination of the half's choices, in the order of their product."""
        return self._listed(half)[1]

    def costs(self, half: int, width: int) -> Costs:
        """The price of each of `options` where the stage has so many channels: (options,)."""
        key = self.kinds[half], width
        if key not in self._costs:
            shape, costs = self.space.shapes[half // 2], self.priced.network.blocks[half // 2]
            slices = [replace(option.slice, stream=width) for option in self.options(half)]
            self._costs[key] = np.array([self.priced.price.block(shape, costs, s) for s in slices], dtype=np.int64)
        return self._costs[key]

    def affine(self, half: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`costs` of any width, of an affine price: (options,) without a channel of the stream, and more with each."""
        widths = self.widths(self.stage(half))
        first, last = (self.costs(half, widths[k]) for k in (0, -1))
        per_channel = (last - first) / max(widths[-1] - widths[0], 1)
        return first - per_channel * widths[0], per_channel

    def outer(self, widths: Sequence[int]) -> int:
        """The price of stem, merging and classifier at these stage widths."""
        return self.priced.price.outer(self.priced.network).at(widths)

    def problem(self, widths: Sequence[int], chosen: Sequence[Sequence[int]], gains: Sequence[Any]) -> SelectionProblem:
        """The exact selection at these stage widths. chosen: of each half the options offered; gains: their scores."""
        items = []
        for half, (options, gain) in enumerate(zip(chosen, gains, strict=True)):
            width = widths[self.stage(half)]
            costs = self.costs(half, width)
            items.append(tuple(KnapsackItem(int(costs[o]), width, float(gain[o])) for o in options))
        base = self.priced.uniform()
        stages = tuple(self.stage(half) for half in range(len(self)))
        limits = tuple(
            replace(limit, costs=tuple(tuple(row.tolist()) for row in other.offered(widths, chosen)))
            for limit, other in zip(base.limits, self.others, strict=True)
        )
        return replace(base, blocks=tuple(items), stages=stages, fixed_widths=tuple(widths), limits=limits)

    def offered(self, widths: Sequence[int], chosen: Sequence[Sequence[int]]) -> list[Costs]:
        """The price of some options of each half at these stage widths."""
        return [self.costs(half, widths[self.stage(half)])[list(options)] for half, options in enumerate(chosen)]

    def may_fit(self, widths: Sequence[int]) -> bool:
        """Whether, at these stage widths, each of the other prices has an architecture within its limit."""
        for bound, other in zip(self.priced.bounds, self.others, strict=True):
            least = sum(int(other.costs(half, widths[other.stage(half)]).min()) for half in range(len(other)))
            if least + other.outer(widths) > bound.most:
                return False
        return True

    def picks(self, widths: Sequence[int], chosen: Sequence[int]) -> list[Picks]:
        """The picks of every block at one option per half."""
        (choice,) = self.space.method.stage_choices
        return [
            {choice: widths[self.stage(half)]}
            | dict(self.options(half)[chosen[half]].picks)
            | dict(self.options(half + 1)[chosen[half + 1]].picks)
            for half in range(0, len(self), 2)
        ]

    def _kind(self, half: int) -> Any:
        block = half // 2
        candidates = tuple(self.space.candidates[block].items())
        return self.space.shapes[block], self.priced.network.blocks[block], candidates, half % 2

    def _listed(self, half: int) -> tuple[tuple[HalfOption, ...], Costs]:
        key = self.kinds[half]
        if key not in self._options:
            self._options[key] = self._all_options(half)
        return self._options[key]

    def _all_options(self, half: int) -> tuple[tuple[HalfOption, ...], Costs]:
        """Products of the half's own choices; those of the same slice are one option."""
        block, method = half // 2, self.space.method
        shape, candidates = self.space.shapes[block], self.space.candidates[block]
        whole = {name: max(options) for name, options in candidates.items()}
        own = self.choices(half)
        found: dict[BlockSlice, HalfOption] = {}
        slices = []
        for combination in itertools.product(*own.values()):
            picks = dict(zip(own, combination, strict=True))
            kept = method.block_slice(shape, self.space.settings, whole | picks, {})
            kept = replace(kept, attn=kept.attn and not half % 2, mlp=kept.mlp and bool(half % 2))
            if not kept.attn and not kept.mlp:  # whatever its other choices are
                first = next(iter(own))
                picks = {name: whole[name] for name in own} | {first: picks[first]}
                kept = replace(kept, qk=None, v_channels=None)
            found.setdefault(kept, HalfOption(picks, kept))
            slices.append(kept)
        places = {kept: k for k, kept in enumerate(found)}
        return tuple(found.values()), np.array([places[kept] for kept in slices])


@dataclass(frozen=True)
class PricedHalves(EndsOnly):
    """A space whose halves choose by themselves, and its expected price: half by half, at the expected stage widths.

    A stage's width is a choice of its own, independent of the half's. Where what a half costs is affine in it, so is
    the expectation; otherwise it is the sum over all widths.
    """

    @classmethod
    def of(cls, priced: PricedSpace) -> "PricedHalves":
        """The same space, its prices by halves."""
        own = {f.name: getattr(priced, f.name) for f in fields(priced)}
        bounds = tuple(replace(bound, priced=cls.of(bound.priced)) for bound in priced.bounds)
        return cls(**own | {"bounds": bounds})

    @cached_property
    def halves(self) -> Halves:
        """Its halves."""
        return Halves(self)

    def _block(self, block: int, weights: Mapping[str, Tensor]) -> Tensor:
        (choice,) = self.space.method.stage_choices
        of_widths, width = weights[choice].double(), self._stage_gate(block, weights).sum()
        total = width.new_zeros(())
        for half in (2 * block, 2 * block + 1):
            joint = joint_probability(weights, self.halves.choices(half)).double()
            if self.price.affine:
                constant, per_channel = self._affine(half, joint.device)
                total = total + joint @ (constant + per_channel * width)
            else:
                total = total + of_widths @ self._by_width(half, joint.device) @ joint
        return total

    def _by_width(self, half: int, device: torch.device) -> Tensor:
        """(widths, combinations): the price of every combination of the half's choices at every candidate width."""
        key = self.halves.kinds[half], device
        if key not in self._matrices:
            (choice,) = self.space.method.stage_choices
            widths, option_of = self.space.candidates[half // 2][choice], self.halves.option_of(half)
            rows = np.array([self.halves.costs(half, int(width))[option_of] for width in widths], dtype=np.float64)
            self._matrices[key] = torch.from_numpy(rows).to(device)
        return self._matrices[key]

    @cached_property
    def _matrices(self) -> dict[tuple[int, torch.device], Tensor]:
        return {}

    def _affine(self, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """`Halves.affine` of every combination of the half's choices."""
        key = self.halves.kinds[half], device
        if key not in self._tensors:
            option_of = self.halves.option_of(half)
            constant, per_channel = (torch.from_numpy(each[option_of]).to(device) for each in self.halves.affine(half))
            self._tensors[key] = constant, per_channel
        return self._tensors[key]

    @cached_property
    def _tensors(self) -> dict[tuple[int, torch.device], tuple[Tensor, Tensor]]:
        return {}

    def _exists(self, stage: int, probabilities: Probabilities) -> Tensor:
        block = self.blocks_of(stage)[0]
        return self._stage_gate(block, probabilities[block])

    def _widths(self, stage: int, probabilities: Probabilities) -> tuple[list[int], Tensor]:
        (choice,) = self.space.method.stage_choices
        block = self.blocks_of(stage)[0]
        return [int(w) for w in self.space.candidates[block][choice]], probabilities[block][choice].double()

    def _stage_gate(self, block: int, weights: Mapping[str, Tensor]) -> Tensor:
        """P(stage width > c) of every channel c of the block's stage, (E,), float64."""
        (choice,) = self.space.method.stage_choices
        p = weights[choice].double()
        widths = torch.tensor(self.space.candidates[block][choice], device=p.device)
        channels = torch.arange(self.space.shapes[block].embed_dim, device=p.device)
        return p @ (channels < widths[:, None]).double()
