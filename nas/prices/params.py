"""Parameters of the compact network."""

from nas.prices.price import Price
from search_spaces.slices import BlockShape, BlockSlice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth, block_params


class Parameters(Price):
    """How many numbers the network is."""

    name, words, scale, unit, column = "params", "parameters", 1e6, "M parameters", "mparams"

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        return block_params(shape, costs, kept)

    def outer(self, costs: NetworkCosts) -> PerWidth:
        return costs.params
