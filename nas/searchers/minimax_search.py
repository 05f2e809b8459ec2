"""The minimax search (section 2.5): trained as every search by gradient is, under a budget that it can reach."""

from dataclasses import replace

from nas.prices.costs import PricedSpace
from nas.prices.selection import KnapsackItem, check_budget
from nas.searchers.minimax import unit_prices
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Question
from nas.searchers.trained import Trained
from search_spaces.errors import UserError
from search_spaces.method import Method


class MinimaxSearch(Trained):
    """Counts, gates and multipliers; its FLOPs are those of single units, so they are its only price."""

    name, starts = "minimax", False

    def owned(self, method: Method) -> tuple[type, ...]:
        """None: its gates have a temperature and a pace of their own."""
        return ()

    def check(self, options: SearchOptions, question: Question) -> None:
        if question.priced.price.name != "flops":
            raise UserError(f"--price {options.price}: a minimax search counts FLOPs; leave it out")
        if question.priced.bounds:
            words = " and ".join(bound.words for bound in question.priced.bounds)
            raise UserError(f"{words}: a minimax search holds one budget, in FLOPs; leave it out")
        super().check(options, question)
        assert question.budget is not None
        check_reach(question.priced, question.budget, options.skip, options.prune)


def check_reach(costs: PricedSpace, budget: float, skip: str, prune: bool) -> None:
    """Refuse a budget below what the mechanisms asked for can reach."""
    blocks = []
    for shape, block in zip(costs.space.shapes, costs.network.blocks, strict=True):
        price = unit_prices(shape, block)
        units = prune or skip == "none"
        attn = price.channel * (price.head_dim + 1) if units else price.attn
        mlp = price.neuron if units else price.mlp
        least = attn * (skip not in ("block", "attention", "halves")) + mlp * (skip not in ("block", "mlp", "halves"))
        ends = (price.attn + price.mlp, least)
        blocks.append(tuple(KnapsackItem(macs, shape.embed_dim, 0.0) for macs in ends))
    problem = replace(costs.uniform(), blocks=tuple(blocks))
    check_budget(problem, costs.full, budget)
