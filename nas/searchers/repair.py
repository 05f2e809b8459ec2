"""Architectures in the budget's band, made of draws that know of no budget (section 2.12).

A draw is repaired by the exact program around it: of all architectures in the band the one whose candidates lie nearest
to those drawn, in places of each choice's list, every choice's distance weighed at random, lest the first blocks always
pay. So no draw is thrown away. The bias: draws lie where most architectures do, and a repaired one lies on the side of
the band that faces them, its choices off uniform by as little as the budget allows.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from numpy.random import RandomState
from torch import Tensor

from nas.prices.costs import PricedSpace
from nas.prices.halves import Halves
from nas.prices.selection import select
from nas.searchers.measure import key_of
from nas.searchers.nested import Likelihood
from search_spaces.method import Candidate, Picks

FARTHEST = 10.0  # nats between a choice's first candidate and its last
REPEATS = 32  # architectures known already that are drawn in a row before no new one is expected
Sample = Mapping[str, Candidate]  # the candidate of every choice, by its label


class Repair:
    """The nearest architecture within a budget. random: a generator of its own for every budget."""

    def __init__(self, priced: PricedSpace, budget: float, seed: int) -> None:
        self.priced, self.budget = priced, budget
        self.random = RandomState([seed, round(budget * 1e9) % 2**32])
        self.choices: dict[str, Any] = priced.space.mutable().simplify()  # nni's Categorical of every label
        self.halves = Halves(priced) if priced.space.method.halves else None

    def draw(self) -> dict[str, Candidate]:
        """One candidate of every choice, all alike likely, as nni.mutable draws them."""
        sample: dict[str, Candidate] = {}
        for choice in self.choices.values():
            choice.random(sample, self.random)
        return sample

    def sample_of(self, picks: Sequence[Picks]) -> dict[str, Candidate]:
        """An architecture by the labels of its choices."""
        space = self.priced.space
        return {space.label(i, name): option for i, pick in enumerate(picks) for name, option in pick.items()}

    def near(self, sample: Sample) -> list[Picks]:
        """The architecture in the band that is nearest; below the band where none lies in it, never above."""
        weights = {label: FARTHEST * self.random.uniform(0.5, 1.5) for label in self.choices}
        space, probabilities = self.priced.space, []
        for i, block in enumerate(space.candidates):
            labels = {name: space.label(i, name) for name in block}
            probabilities.append(
                {name: around(options, sample[labels[name]], weights[labels[name]]) for name, options in block.items()}
            )
        if self.halves is not None:
            return Likelihood(self.halves, probabilities).near(self.budget)
        chosen = select(self.priced.problem(probabilities), self.priced.full, self.budget)
        return [options[k].picks for options, k in zip(self.priced.options, chosen.picks, strict=True)]

    def new(self, make: Callable[[], Sample], known: Set[str]) -> list[Picks] | None:
        """The first architecture made that is not known; None where nothing but known ones came in a row."""
        for _ in range(REPEATS):
            picks = self.near(make())
            if key_of(picks) not in known:
                return picks
        return None


def around(options: Sequence[Candidate], drawn: Candidate, weight: float) -> Tensor:
    """Probabilities (candidates,) that fall exponentially with the distance from the one drawn."""
    places = torch.arange(len(options), dtype=torch.float64)
    return torch.softmax(-weight * (places - options.index(drawn)).abs() / max(len(options) - 1, 1), 0)
