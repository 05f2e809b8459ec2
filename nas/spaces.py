"""search.py --list-spaces: every space with its model, choices, size and FLOPs range."""

from collections.abc import Sequence
from typing import Any

from nas.config import SearchConfig, with_defaults
from nas.machine.ranges import as_given
from nas.methods.recipe import published
from nas.methods.table import training_of
from nas.networks.backbone import TimmModel
from nas.networks.opening import meta_supernet
from nas.prices.costs import PricedSpace, priced
from nas.prices.flops import FLOPS
from nas.prices.selection import reachable_range
from search_spaces.registry import Space, all_spaces
from search_spaces.space import make_space, spell, uniform_alphas
from supernets.supernet import Supernet


def list_spaces(verbose: bool = False) -> None:
    """Print the table; ranges are of stream width, the default, at the model's own number of classes.

    verbose: below it, what every space fills in for options that are left open, and what its published recipe sets.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="search spaces (GFLOPs are MACs; stream width)", title_justify="left")
    for column in ("space", "method", "model", "choices per block", "size", "GFLOPs"):
        table.add_column(column, overflow="fold")
    supernets: dict[tuple[str, str], Supernet] = {}  # by model and family: spaces of many methods share one
    for space in all_spaces().values():
        costs = costs_of(space, supernets)
        words, size, (low, high) = uniform_choice(costs) if space.method.uniform else free_choice(costs)
        reach = f"{low / 1e9:.4g} to {high / 1e9:.4g}"
        table.add_row(space.name, space.method.name, space.model, words, f"{size:.3g}", reach)
    Console().print(table)
    if verbose:
        for space in all_spaces().values():
            print(space.name)
            for words, options in settings_of(space).items():
                print(f"  {words}: {' '.join(as_given(name, value) for name, value in options.items())}")


def settings_of(space: Space) -> dict[str, dict[str, Any]]:
    """Options by stage: the space's defaults, and what its method's authors ran where they are known."""
    offered = {"alphas": space.alphas} if space.alphas and "alpha" in space.method.choice_names else {}
    found: dict[str, dict[str, Any]] = {
        "search": dict(space.training) | dict(space.search) | offered,
        "retrain": dict(space.training) | dict(space.retrain),
    }
    if space.published is not None:
        found |= {"published search": published(space, "search"), "published retrain": published(space, "retrain")}
    return found


def costs_of(space: Space, supernets: dict[tuple[str, str], Supernet] | None = None) -> PricedSpace:
    """The space over its default model, which is among the supernets afterwards."""
    supernets = {} if supernets is None else supernets
    model, classes = TimmModel(space.model, space.model_kwargs), 10 if space.nano else 1000
    key = (space.family, f"{model} {classes}")
    if key not in supernets:
        supernets[key] = meta_supernet(model, classes, space)
    supernet = supernets[key]
    options = with_defaults(SearchConfig(space=space.name), space, "search")
    choices = make_space(space.name, space.method, training_of(space).settings(options, space), supernet.shapes)
    return priced(choices, supernet.adapter.costs, FLOPS)


def free_choice(costs: PricedSpace) -> tuple[str, float, tuple[int, int]]:
    """What every block chooses from, how many architectures that makes, and what they cost."""
    kinds = dict.fromkeys(
        "; ".join(f"{name} {spell(c)}" for name, c in block.items()) for block in costs.space.candidates
    )
    return " or ".join(kinds), float(costs.space.size()), reachable_range(costs.uniform())


def uniform_choice(costs: PricedSpace) -> tuple[str, float, tuple[int, int]]:
    """The same where one factor serves all blocks."""
    alphas = uniform_alphas(costs.space)
    picks = [[o.picks["alpha"] for o in row].index(alphas[-1]) for row in costs.options]
    least, (_, most) = costs.uniform().cost(picks), reachable_range(costs.uniform())
    return f"alpha {_list(alphas)}, the same everywhere", float(len(alphas)), (least, most)


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
