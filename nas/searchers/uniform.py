"""One factor for the whole network (section 2.1): nothing to search, prices alone give the answer."""

from nas.prices.costs import PricedSpace
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Answer, Question, Run, Searcher
from search_spaces.errors import UserError
from search_spaces.slices import network_slice
from search_spaces.space import check_uniform_alpha, uniform_alphas


class Uniform(Searcher):
    """The factor that was asked for, or the smallest whose network fits the budget."""

    name = "uniform"

    def check(self, options: SearchOptions, question: Question) -> None:
        space = question.priced.space
        if options.alpha is None and question.budget is None:
            allowed = ", ".join(map(str, uniform_alphas(space)))
            raise UserError(f"{space.name} needs --alpha or --budget; allowed alpha: {allowed}")
        if options.alpha is not None:
            check_uniform_alpha(space, options.alpha)

    def pick(self, options: SearchOptions, question: Question) -> Answer:
        alpha = options.alpha
        if alpha is None:
            assert question.budget is not None
            alpha = smallest_alpha(question.priced, question.budget)
        blocks = len(question.priced.space.shapes)
        return Answer(picks=[{"alpha": alpha}] * blocks, kept=[{}] * blocks)

    def search(self, run: Run) -> Answer:
        return self.pick(run.options, run.question)


def smallest_alpha(priced: PricedSpace, budget: float) -> int:
    """The least compression that fits a budget. UserError with what each alpha costs when none does."""
    space, fractions = priced.space, {}
    for alpha in uniform_alphas(space):
        blocks = space.block_slices([{"alpha": alpha}] * len(space.shapes))
        subnet = network_slice(space.shapes, blocks, priced.full_stage_width)
        fractions[alpha] = priced.network_cost(subnet) / priced.full
        if fractions[alpha] <= budget:
            return alpha
    reach = ", ".join(f"{alpha}: {fraction:.4f}" for alpha, fraction in fractions.items())
    raise UserError(
        f"--budget {budget:.4g}: no alpha of {space.name} fits; {priced.price.words} fraction by alpha: {reach}"
    )
