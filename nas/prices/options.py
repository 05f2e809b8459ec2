"""The options of what an architecture may cost."""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from search_spaces.errors import UserError

P = TypeVar("P", bound="PriceOptions")
BAND = 0.02  # of the backbone's price


@dataclass(frozen=True)
class PriceOptions:
    """The budget, and the price it is set in; or the weight of the price without one."""

    stage_width: Literal["widest", "full"] = "widest"
    """narrow each stage to its widest slice, or keep it full"""
    price: str = "flops"
    """what a budget is set in: flops (MACs) or params"""
    budget: float | None = None
    """price of the result as a fraction of the backbone's; 0 for none"""
    gflops: float | None = None
    """the budget in GFLOPs (MACs)"""
    band: float = BAND
    """of a budget, as a share of the backbone's price: as much of it an architecture may leave unused and still be
    chosen before one that fills it"""
    gamma: float | None = None
    """weight of the price's penalty, per MAC or parameter, when there is no budget (1e-12, equation 3.7)"""

    def check_price(self) -> None:
        """Refuse values that no search can use."""
        if self.gamma is not None and self.gamma < 0:
            raise UserError(f"--gamma {self.gamma}; expected 0 or more")
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise UserError(f"--budget {self.budget}; expected a fraction of the backbone's price, 0 < B <= 1")
        if not 0 <= self.band <= 1:
            raise UserError(f"--band {self.band}; expected a share of the backbone's price, from 0 to 1")
        if self.band != BAND and not self.budget and self.gflops is None:
            raise UserError(
                f"--band {self.band} is the part of a budget that may stay unused; give --budget or --gflops"
            )
        if self.gflops is not None and self.price != "flops":
            raise UserError(
                f"--gflops is a budget in FLOPs, --price {self.price} sets it in another unit; give --budget"
            )

    def fraction(self, full: int) -> float | None:
        """The budget as a fraction of the backbone's price, `full`; None when there is none."""
        if self.gflops is None:
            return self.budget or None
        if not self.gflops > 0:
            raise UserError(f"--gflops {self.gflops}; expected more than 0")
        if self.gflops * 1e9 > full:
            raise UserError(
                f"--gflops {self.gflops}: the backbone has {full / 1e9:.4g} GFLOPs (MACs), nothing would be compressed;"
                " give fewer, or --budget, a fraction of them"
            )
        return self.gflops * 1e9 / full


def one_budget(options: P) -> P:
    """--gflops in place of the space's own --budget. UserError where both were given."""
    if options.gflops is None:
        return options
    if options.budget:
        raise UserError("--budget and --gflops name the same thing; give one of them")
    return replace(options, budget=0.0)
