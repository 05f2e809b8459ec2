"""The prices, by their names on the command line, and what the options ask of each."""

from dataclasses import replace
from typing import TypeVar

from nas.machine.ranges import as_given
from nas.prices.costs import Bound, PricedSpace
from nas.prices.flops import FLOPS
from nas.prices.latency import Latency
from nas.prices.options import PriceOptions
from nas.prices.params import Parameters
from nas.prices.price import Price
from search_spaces.errors import UserError

P = TypeVar("P", bound=PriceOptions)
PRICES: dict[str, Price] = {price.name: price for price in (FLOPS, Parameters(), Latency())}


def price_of(name: str | None) -> Price:
    """The price of that name; UserError names those there are."""
    if name not in PRICES:
        *others, last = PRICES
        raise UserError(f"--price {name}; expected {', '.join(others)} or {last}")
    return PRICES[name]


def with_price(options: P, front: tuple[float, ...] = ()) -> P:
    """The price that the budget is set in filled in, and none of the space's own budget where a limit is one.

    --budget and --front are shares of --price; --gflops, --mparams and --ms are limits of their own, of which the
    first is the budget where there is no share. UserError where two name the same.
    """
    given = [name for name, price in PRICES.items() if price.flag in options.limits()]
    share = "--budget" if options.budget else "--front" if front else None
    name = options.price or (given[0] if given and share is None else FLOPS.name)
    price = price_of(name)
    if options.latency_table is not None and Latency.name not in (name, *given):
        raise UserError("--latency-table goes with --price latency or --ms; leave it out")
    if name in given and share == "--front":
        raise UserError(f"--front is several budgets, --{price.flag} is one; give one of them")
    if name in given and share is not None:
        raise UserError(f"{share} and --{price.flag} name the same thing; give one of them")
    if given and share is None and name not in given:
        words = " and ".join(as_given(flag, value) for flag, value in options.limits().items())
        raise UserError(f"--price {name} is what --budget is a share of; give --budget, or leave it out beside {words}")
    return replace(options, price=name, budget=0.0 if given and share is None else options.budget)


def budget_of(options: PriceOptions, price: Price, full: int) -> float | None:
    """The budget as a fraction of the backbone's price, `full`; None when there is none."""
    if options.budget or price.flag not in options.limits():
        return options.budget or None
    return _amount(options, price, full) / full


def bounds_of(options: PriceOptions, price: Price) -> list[Price]:
    """The other prices that have a limit."""
    return [each for each in PRICES.values() if each is not PRICES[price.name] and each.flag in options.limits()]


def bound_of(options: PriceOptions, priced: PricedSpace) -> Bound:
    """The limit of another price."""
    price = priced.price
    assert price.flag is not None
    return Bound(priced, int(_amount(options, price, priced.full)), as_given(price.flag, options.limits()[price.flag]))


def _amount(options: PriceOptions, price: Price, full: int) -> float:
    """An absolute limit in the price's own numbers. UserError where it is above all that there is."""
    assert price.flag is not None
    value = options.limits()[price.flag]
    if value * price.scale > full:
        raise UserError(
            f"{as_given(price.flag, value)}: the backbone has {full / price.scale:.4g} {price.unit}, nothing would be"
            " compressed; give less, or --budget, a fraction of it"
        )
    return value * price.scale
