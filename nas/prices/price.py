"""What an architecture costs, and a budget is set in (section 2.13): a sum over blocks, given the stage widths."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from nas.prices.options import PriceOptions
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, identity_slice, network_slice
from search_spaces.space import SearchSpace
from supernets.flops import BlockCosts, NetworkCosts
from supernets.supernet import Supernet


class Outside(Protocol):
    """What stem, merging and classifier cost: terms of each stage's width, and of the widths of neighbouring stages."""

    @property
    def constant(self) -> int:
        """What no width changes."""

    @property
    def num_stages(self) -> int:
        """Of the network."""

    def of_stage(self, stage: int, width: int) -> int:
        """The term of a stage's width."""

    def of_merging(self, stage: int, width: int, after: int) -> int:
        """The term of a stage's width and the next one's."""

    def at(self, widths: Sequence[int]) -> int:
        """All of it at the given stage widths."""


class Price(ABC):
    """One price, in whole numbers.

    words: its name in a sentence. scale, unit: what it is printed in; column: the end of its names in log.csv, and
    flag: of the option that says how much of it, in `unit`, may be used at most. affine: whether a block's is affine in
    its stage's width.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    scale: ClassVar[float]
    unit: ClassVar[str]
    column: ClassVar[str]
    flag: ClassVar[str | None] = None
    affine: ClassVar[bool] = False

    def opened(self, options: PriceOptions) -> "Price":
        """The price as the options name it: with the file that it rests on, where there is one."""
        return self

    def check(self, space: SearchSpace, original: Supernet) -> None:  # noqa: B027
        """Refuse, with a UserError, a space or a timm model that it cannot price; most price all."""

    def remark(self) -> str:
        """What is worth saying before a search by it; empty for nothing."""
        return ""

    def recorded(self, cost: int, full: int) -> dict[str, Any]:
        """What arch.json says of an architecture of that price, beside the options; full: the backbone's."""
        return {}

    @abstractmethod
    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        """Of one block at a slice."""

    @abstractmethod
    def outer(self, costs: NetworkCosts) -> Outside:
        """Of stem, merging and classifier, by the stage widths.

        Rotated stages count as cut (section 2.7): one that turns out whole costs less than it says here.
        """

    def network(self, shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
        """Of a whole subnet; exactly, where a price says how."""
        blocks = zip(shapes, costs.blocks, subnet.blocks, strict=True)
        return sum(self.block(*block) for block in blocks) + self.outer(costs).at(subnet.stage_widths)

    def backbone(self, shapes: Sequence[BlockShape], costs: NetworkCosts) -> int:
        """Of the network itself, without what only its compact networks have."""
        return self.network(shapes, costs, network_slice(shapes, [identity_slice(s) for s in shapes]))
