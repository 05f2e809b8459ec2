"""The small networks that one set of weights is trained for: one, or those of a front (section 2.12)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from search_spaces.errors import UserError
from search_spaces.slices import NetworkSlice
from supernets.supernet import Supernet

ONE = "subnet"  # the name of the only one
PER_STEP = 2


@dataclass(frozen=True)
class Members:
    """subnets: by their names, the narrowest first. per_step: how many of them take part in a step, in turn."""

    subnets: Mapping[str, NetworkSlice]
    per_step: int = PER_STEP

    @classmethod
    def of(cls, subnets: "NetworkSlice | Members") -> "Members":
        """One subnet, or those that they are."""
        return cls({ONE: subnets}) if isinstance(subnets, NetworkSlice) else subnets

    @property
    def widest(self) -> NetworkSlice:
        """The last of them."""
        return list(self.subnets.values())[-1]

    def only(self, what: str) -> NetworkSlice:
        """The one that there is. UserError for a front. what: of one network's channels or features, in words."""
        if len(self.subnets) > 1:
            raise UserError(f"{what} of one network, --arch names a front; name one of its files, or --train distill")
        return self.widest

    @property
    def may_leave_weights_unused(self) -> bool:
        """Whether some block's weights are in no network of a step."""
        return len(self.subnets) > 1 or not all(block.attn and block.mlp for block in self.widest.blocks)

    def at(self, number: int) -> list[NetworkSlice]:
        """Those of a step: all of them, or so many in a row, round and round."""
        every = list(self.subnets.values())
        count = min(self.per_step, len(every))
        return [every[(number * count + i) % len(every)] for i in range(count)]

    def networks(self, supernet: Supernet) -> dict[str, Callable[[Tensor], Tensor]]:
        """What each computes, images (B, C, H, W) -> logits (B, classes), by its name."""

        def computed(subnet: NetworkSlice) -> Callable[[Tensor], Tensor]:
            return lambda x: supernet.small(x, subnet)

        return {name: computed(subnet) for name, subnet in self.subnets.items()}

    def log(self, supernet: Supernet) -> dict[str, float]:
        """GFLOPs (MACs) of the only one, for log.csv."""
        return {"selected_gflops": supernet.flops(self.widest) / 1e9} if len(self.subnets) == 1 else {}


def added(terms: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Terms of the same names summed."""
    first, *others = terms
    return {name: sum((each[name] for each in others), first[name]) for name in first}
