"""Architectures of every price (section 2.12): what a supernet is trained for before its candidates are measured.

nni.mutable draws every choice; draws alone lie where most architectures do, so each is moved to a price of its own,
drawn from the least to the most that the space has. The exact program that repairs a candidate takes up to seconds,
which no training step has to give: here all choices move together along a line, towards their cheapest candidates or
their dearest, each at a speed of its own, and stop at the last architecture that costs no more.
"""

from collections.abc import Mapping
from typing import Any

from numpy.random import RandomState

from nas.prices.costs import PricedSpace
from nas.searchers.measure import subnet_of
from search_spaces.method import Candidate, Picks
from search_spaces.slices import NetworkSlice

SLOWEST, FASTEST = 0.5, 1.5  # a choice's speed along the line
HALVINGS = 12  # of the line
Places = Mapping[str, float]  # of every choice's label, the place among its candidates, the cheapest first


class Anywhere:
    """Draws over a priced space. seed: with a step's number all that decides them, so that a resume draws the same."""

    def __init__(self, priced: PricedSpace, seed: int) -> None:
        self.priced, self.seed = priced, seed
        self.choices: dict[str, Any] = priced.space.mutable().simplify()  # nni's Categorical of every label
        self.candidates = {label: list(choice.values) for label, choice in self.choices.items()}
        self.candidates = {label: self.by_price(label) for label in self.choices}
        self.cheapest: Places = dict.fromkeys(self.candidates, 0)
        self.dearest: Places = {label: len(options) - 1 for label, options in self.candidates.items()}
        self.range = self.price(self.subnet(self.cheapest)), self.price(self.subnet(self.dearest))

    def by_price(self, label: str) -> list[Candidate]:
        """A choice's candidates, the cheapest first, every other choice at the first that the space lists."""
        options, others = self.candidates[label], dict.fromkeys(self.candidates, 0)
        prices = [self.price(self.subnet({**others, label: place})) for place in range(len(options))]
        return [options[place] for place in sorted(range(len(options)), key=prices.__getitem__)]

    def smallest(self) -> NetworkSlice:
        """The cheapest candidate of every choice."""
        return self.subnet(self.cheapest)

    def drawn(self, number: int, count: int) -> list[NetworkSlice]:
        """So many subnets of a step, by its number."""
        random = RandomState([self.seed, number])
        return [self.one(random) for _ in range(count)]

    def one(self, random: RandomState) -> NetworkSlice:
        """A subnet of a price that is drawn, or of less where no other lies on the line; never of more."""
        sample: dict[str, Candidate] = {}
        for choice in self.choices.values():
            choice.random(sample, random)
        most = random.uniform(*self.range)
        speeds = {label: random.uniform(SLOWEST, FASTEST) for label in self.choices}
        start = {label: self.candidates[label].index(option) for label, option in sample.items()}
        narrows = self.price(self.subnet(start)) > most
        ends = self.cheapest if narrows else self.dearest

        def at(way: float) -> NetworkSlice:
            shares = {label: min(1.0, way * speed) for label, speed in speeds.items()}
            return self.subnet({label: p + (ends[label] - p) * shares[label] for label, p in start.items()})

        # One end of what is left of the line fits, the other does not, or lies beyond the last candidates.
        fits, other = (1 / SLOWEST, 0.0) if narrows else (0.0, 1 / SLOWEST)
        for _ in range(HALVINGS):
            middle = (fits + other) / 2
            fits, other = (middle, other) if self.price(at(middle)) <= most else (fits, middle)
        return at(fits)

    def subnet(self, places: Places) -> NetworkSlice:
        """The subnet at the nearest candidates."""
        space = self.priced.space
        picks: list[Picks] = [
            {name: self.candidates[label][round(places[label])] for name in block for label in (space.label(i, name),)}
            for i, block in enumerate(space.candidates)
        ]
        return subnet_of(self.priced, picks)

    def price(self, subnet: NetworkSlice) -> int:
        """Exact."""
        return self.priced.network_cost(subnet)
