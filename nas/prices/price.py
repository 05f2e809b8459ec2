"""What an architecture costs, and a budget is set in (section 2.13): a sum over blocks, given the stage widths."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice, identity_slice, network_slice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth


class Price(ABC):
    """One price, in whole numbers.

    words: its name in a sentence. scale, unit: what it is printed in; column: the end of its names in log.csv.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    scale: ClassVar[float]
    unit: ClassVar[str]
    column: ClassVar[str]

    @abstractmethod
    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        """Of one block at a slice."""

    @abstractmethod
    def outer(self, costs: NetworkCosts) -> PerWidth:
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
