"""The options of what an architecture may cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nas.machine.ranges import positive
from search_spaces.errors import UserError

LIMITS = ("gflops", "mparams", "ms")
BAND = 0.02  # of the backbone's price


@dataclass(frozen=True)
class PriceOptions:
    """The budget, and the price it is set in; or the weight of the price without one."""

    stage_width: Literal["widest", "full"] = "widest"
    """narrow each stage to its widest slice, or keep it full"""
    price: str | None = None
    """what --budget is a share of: flops (MACs; the default), params or latency"""
    budget: float | None = None
    """price of the result as a fraction of the backbone's; 0 for none"""
    gflops: float | None = None
    """GFLOPs (MACs) that the result may have at most; instead of --budget or, as --mparams and --ms, beside it"""
    mparams: float | None = None
    """millions of parameters that the result may have at most"""
    ms: float | None = None
    """milliseconds that a batch of the table's size may take at most on the table's device (docs/latency.md)"""
    latency_table: Path | None = None
    """where latency is a price: what python -m nas.latency has timed on the device"""
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
        if self.band != BAND and not self.budget and not self.limits():
            raise UserError(
                f"--band {self.band} is the part of a budget that may stay unused; give --budget or --gflops"
            )
        positive(self, *LIMITS)

    def limits(self) -> dict[str, float]:
        """The absolute limits that are given, by the names of their options."""
        given = {name: getattr(self, name) for name in LIMITS}
        return {name: value for name, value in given.items() if value is not None}
