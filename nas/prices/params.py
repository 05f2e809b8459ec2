"""Parameters of the compact network."""

from collections.abc import Sequence

from nas.prices.price import Price
from search_spaces.slices import BlockShape, BlockSlice, NetworkSlice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth, block_params, network_params


class Parameters(Price):
    """How many numbers the network is."""

    name, words, scale, unit, column = "params", "parameters", 1e6, "M parameters", "mparams"
    flag, affine = "mparams", True

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        return block_params(shape, costs, kept)

    def outer(self, costs: NetworkCosts) -> PerWidth:
        return costs.outer_params()

    def network(self, shapes: Sequence[BlockShape], costs: NetworkCosts, subnet: NetworkSlice) -> int:
        return network_params(shapes, costs, subnet)

    def backbone(self, shapes: Sequence[BlockShape], costs: NetworkCosts) -> int:
        return super().backbone(shapes, costs) - costs.spared[1]
