"""search.py --list-spaces: every space with its model, choices, size and FLOPs range."""

from nas.networks.opening import meta_supernet, search_space
from nas.prices.costs import space_costs
from nas.prices.selection import reachable_range
from search_spaces.registry import SPACES
from search_spaces.space import spell, uniform_alphas


def list_spaces() -> None:
    """Print the table; ranges are of stream width, the default, at the model's own number of classes."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="search spaces (GFLOPs are MACs; stream width)", title_justify="left")
    for column in ("space", "method", "model", "choices per block", "size", "GFLOPs"):
        table.add_column(column, overflow="fold")
    for space in SPACES.values():
        supernet = meta_supernet(space.model, dict(space.model_kwargs), 10 if space.nano else 1000, space)
        choices = search_space(space, supernet, "stream", None)
        costs = space_costs(choices, supernet.adapter.costs, supernet.flops())
        size = float(choices.size())
        if space.method.name == "an":
            options = uniform_alphas(choices)
            words, size = f"alpha {_list(options)}, the same everywhere", float(len(options))
        else:
            kinds = dict.fromkeys(
                "; ".join(f"{name} {spell(c)}" for name, c in block.items()) for block in choices.candidates
            )
            words = " or ".join(kinds)
        low, high = reachable_range(costs.uniform())
        if space.method.name == "an":
            picks = [[o.picks["alpha"] for o in row].index(options[-1]) for row in costs.options]
            low = costs.uniform().flops(picks)
        table.add_row(
            space.name,
            space.method.name,
            space.model,
            words,
            f"{size:.3g}",
            f"{low / 1e9:.4g} to {high / 1e9:.4g}",
        )
    Console().print(table)


def _list(values: list[int] | list[int | float]) -> str:
    return ", ".join(map(str, values))
