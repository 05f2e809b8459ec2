"""What free widths cost (section 2.9): half by half, given the widths of the stages."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nas.prices.costs import PricedSpace
from nas.prices.selection import KnapsackItem, SelectionProblem
from search_spaces.method import Picks
from search_spaces.slices import BlockSlice

Costs = NDArray[np.int64]


@dataclass(frozen=True)
class HalfOption:
    """One way to take one half of a block. slice: of the block, its other half skipped, its stream whole."""

    picks: Picks
    slice: BlockSlice


class Halves:
    """A priced space whose halves choose by themselves: the options of each, and what they cost.

    Halves are counted through the network: 2 b is the attention of block b, 2 b + 1 its MLP.
    """

    def __init__(self, priced: PricedSpace) -> None:
        self.priced, self.space = priced, priced.space
        self._options: dict[Any, tuple[HalfOption, ...]] = {}
        self._costs: dict[Any, Costs] = {}

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
        key = self._kind(half)
        if key not in self._options:
            self._options[key] = self._all_options(half)
        return self._options[key]

    def costs(self, half: int, width: int) -> Costs:
        """The price of each of `options` where the stage has so many channels: (options,)."""
        key = (self._kind(half), width)
        if key not in self._costs:
            shape, costs = self.space.shapes[half // 2], self.priced.network.blocks[half // 2]
            slices = [replace(option.slice, stream=width) for option in self.options(half)]
            self._costs[key] = np.array([self.priced.price.block(shape, costs, s) for s in slices], dtype=np.int64)
        return self._costs[key]

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
        return replace(base, blocks=tuple(items), stages=stages, fixed_widths=tuple(widths))

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

    def _all_options(self, half: int) -> tuple[HalfOption, ...]:
        """Products of the half's own choices; those of the same slice once."""
        block, method = half // 2, self.space.method
        shape, candidates = self.space.shapes[block], self.space.candidates[block]
        whole = {name: max(options) for name, options in candidates.items()}
        own = method.halves[half % 2]
        found: dict[BlockSlice, HalfOption] = {}
        for combination in itertools.product(*(candidates[name] for name in own)):
            picks = dict(zip(own, combination, strict=True))
            kept = method.block_slice(shape, self.space.settings, whole | picks, {})
            kept = replace(kept, attn=kept.attn and not half % 2, mlp=kept.mlp and bool(half % 2))
            if not kept.attn and not kept.mlp:  # whatever its other choices are
                picks = {name: whole[name] for name in own} | {own[0]: picks[own[0]]}
                kept = replace(kept, qk=None, v_channels=None)
            found.setdefault(kept, HalfOption(picks, kept))
        return tuple(found.values())
