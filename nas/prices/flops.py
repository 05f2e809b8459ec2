"""FLOPs: multiply-accumulates of one image, as executed."""

from nas.prices.price import Price
from search_spaces.slices import BlockShape, BlockSlice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth, block_flops


class Flops(Price):
    """MACs."""

    name, words, scale, unit, column = "flops", "FLOPs", 1e9, "GFLOPs", "gflops"

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        return block_flops(shape, costs, kept)

    def outer(self, costs: NetworkCosts) -> PerWidth:
        return costs.flops


FLOPS = Flops()
