"""FLOPs: multiply-accumulates of one image, as executed."""

from collections.abc import Sequence

from nas.prices.price import Price
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth, block_flops, network_flops


class Flops(Price):
    """MACs."""

    name, words, scale, unit, column = "flops", "FLOPs", 1e9, "GFLOPs", "gflops"
    flag, affine = "gflops", True

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        return block_flops(shape, costs, kept)

    def outer(self, costs: NetworkCosts) -> PerWidth:
        return costs.outer_flops()

    def network(self, shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
        return network_flops(shapes, costs, subnet)

    def backbone(self, shapes: Sequence[BlockShape], costs: NetworkCosts) -> int:
        return super().backbone(shapes, costs) - costs.spared[0]


FLOPS = Flops()
