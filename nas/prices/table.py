"""The prices, by their names on the command line."""

from nas.prices.flops import FLOPS
from nas.prices.params import Parameters
from nas.prices.price import Price
from search_spaces.errors import UserError

PRICES: dict[str, Price] = {price.name: price for price in (FLOPS, Parameters())}


def price_of(name: str) -> Price:
    """The price of that name; UserError names those there are."""
    if name not in PRICES:
        raise UserError(f"--price {name}; expected {' or '.join(PRICES)}")
    return PRICES[name]
