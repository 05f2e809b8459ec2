"""The same in every block (section 2.1): nothing to search, prices alone give the answer."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nas.prices.costs import PricedSpace
from nas.prices.selection import cost_band
from nas.searchers.measure import first_kept, subnet_of
from nas.searchers.options import SearchOptions, SupernetOptions
from nas.searchers.searcher import Answer, Question, Run, Searcher
from nas.searchers.supernets import check_supernet, defaults_with, trained_supernet
from nas.training.basis import find_basis
from search_spaces.errors import UserError
from search_spaces.method import Candidate, Method, Picks
from search_spaces.slices import network_slice
from search_spaces.space import SearchSpace, check_uniform_alpha, require_search, uniform_alphas


class Uniform(Searcher):
    """The factor that was asked for, or what uses up the budget best of all that is the same everywhere."""

    name = "uniform"

    def owned(self, method: Method) -> tuple[type, ...]:
        return (SupernetOptions,)

    def defaults_of(self, options: SearchOptions) -> Mapping[str, Any]:
        return defaults_with(options, self.defaults)

    def check(self, options: SearchOptions, question: Question) -> None:
        check_supernet(options)
        space = question.priced.space
        if options.supernet is not None:
            require_search(space)
        if not factors_alone(space):
            require_search(space)
            if options.alpha is not None:
                raise UserError(f"--alpha is one factor, {space.name} chooses other widths too; give --budget")
            if question.budget is None:
                raise UserError(f"--searcher {self.name} fills a budget; give --budget or --gflops")
            widest_uniform(question.priced, question.budget)
            return
        if options.alpha is None and question.budget is None:
            allowed = ", ".join(map(str, uniform_alphas(space)))
            raise UserError(f"{space.name} needs --alpha or --budget; allowed alpha: {allowed}")
        if options.alpha is not None:
            check_uniform_alpha(space, options.alpha)

    def pick(self, options: SearchOptions, question: Question) -> Answer | None:
        if not factors_alone(question.priced.space) or options.supernet is not None:
            return None  # which channels, what is refitted, or what is trained is a matter of weights
        picks = one_factor(options, question)
        return Answer(picks=picks, kept=[{}] * len(picks))

    def search(self, run: Run) -> Answer:
        priced, budget = run.question.priced, run.question.budget
        standing = find_basis(run.options, run.prepared)
        trained = trained_supernet(run)
        if factors_alone(priced.space):
            picks = one_factor(run.options, run.question)
        else:
            assert budget is not None
            picks = widest_uniform(priced, budget)
        share = priced.network_cost(subnet_of(priced, picks)) / priced.full
        asked = "" if budget is None else f", budget {budget:.4g}"
        print(f"the same everywhere: {share:.4f} of the backbone's {priced.price.words}{asked}")
        return Answer(picks, first_kept(priced, picks), standing=standing, trained=trained)


def factors_alone(space: SearchSpace) -> bool:
    """Whether a factor is all that is chosen."""
    return space.method.choice_names == ("alpha",)


def one_factor(options: SearchOptions, question: Question) -> list[Picks]:
    """The factor that was asked for, or the smallest that fits, in every block."""
    alpha = options.alpha
    if alpha is None:
        assert question.budget is not None
        alpha = smallest_alpha(question.priced, question.budget)
    return [{"alpha": alpha}] * len(question.priced.space.shapes)


def widest_uniform(priced: PricedSpace, budget: float) -> list[Picks]:
    """The dearest within a budget of all that are the same everywhere. UserError with the least where none is."""
    subnets = [(subnet_of(priced, picks), picks) for picks in uniform_picks(priced.space)]
    prices = [(priced.network_cost(subnet), picks) for subnet, picks in subnets if priced.within_bounds(subnet)]
    most = cost_band(priced.full, budget)[1]
    fitting = [each for each in prices if each[0] <= most]
    if not prices:
        raise UserError(
            f"nothing that is the same everywhere in {priced.space.name} is within"
            f" {' and '.join(bound.words for bound in priced.bounds)}; allow more"
        )
    if not fitting:
        least = math.ceil(min(price for price, _ in prices) / priced.full * 10_000) / 10_000  # up: it must work
        raise UserError(
            f"budget {budget:.4g}: nothing that is the same everywhere in {priced.space.name} costs less than"
            f" {least:.4f} of the backbone's {priced.price.words}; ask for at least that"
        )
    return max(fitting, key=lambda each: each[0])[1]


def uniform_picks(space: SearchSpace) -> Iterator[list[Picks]]:
    """All that are the same everywhere: one value of a relative choice, one share of all that count units.

    Of a share every choice takes the fewest units that are at least so many.
    """
    counted = [name for name in space.method.choice_names if name in space.method.counted]
    relative = [name for name in space.method.choice_names if name not in counted]
    values = [
        [c for c in space.candidates[0][name] if all(c in block[name] for block in space.candidates)]
        for name in relative
    ]
    shares = {c / max(*block[name], 1) for block in space.candidates for name in counted for c in block[name]} or {1.0}
    for combination in itertools.product(*values):
        alike = dict(zip(relative, combination, strict=True))
        for share in sorted(shares, reverse=True):
            yield [
                {name: alike[name] if name in alike else at_least(block[name], share) for name in block}
                for block in space.candidates
            ]


def at_least(candidates: Sequence[Candidate], share: float) -> Candidate:
    """The least of them that is so large a share of the largest."""
    return min(c for c in candidates if c >= share * max(candidates))


def smallest_alpha(priced: PricedSpace, budget: float) -> int:
    """The least compression that fits a budget. UserError with what each alpha costs when none does."""
    space, fractions = priced.space, {}
    for alpha in uniform_alphas(space):
        blocks = space.block_slices([{"alpha": alpha}] * len(space.shapes))
        subnet = network_slice(space.shapes, blocks, priced.full_stage_width)
        fractions[alpha] = priced.network_cost(subnet) / priced.full
        if fractions[alpha] <= budget and priced.within_bounds(subnet):
            return alpha
    also = "".join(f" and {bound.words}" for bound in priced.bounds)
    reach = ", ".join(f"{alpha}: {fraction:.4f}" for alpha, fraction in fractions.items())
    raise UserError(
        f"--budget {budget:.4g}{also}: no alpha of {space.name} fits; {priced.price.words} fraction by alpha: {reach}"
    )
