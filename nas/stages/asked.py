"""What a search is asked, known before any weight is loaded: options, choices, price, budget, and who is to answer."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from nas.config import SearchConfig, with_defaults
from nas.data.datasets import Splits
from nas.methods.method import GAMMA
from nas.methods.recipe import recipe_lines, with_recipe
from nas.methods.table import (
    alternatives,
    check_owned,
    check_searcher,
    searcher_of,
    training_of,
    with_searcher,
    without_foreign,
)
from nas.networks.backbone import Start, TimmModel
from nas.networks.basis_file import streams_of
from nas.networks.classes import Outputs, outputs_of
from nas.networks.compact_file import WEIGHTS
from nas.networks.opening import meta_supernet, model_of, settled_space, start_of
from nas.networks.rounds import Round, check_widths, narrowed_stem, round_of, with_stem
from nas.prices.costs import PricedSpace, priced
from nas.prices.flops import FLOPS
from nas.prices.price import Price
from nas.prices.selection import reachable_range
from nas.prices.table import bound_of, bounds_of, budget_of, price_of, with_price
from nas.runs.folder import results_path
from nas.searchers.options import one_front
from nas.searchers.searcher import Question, Searcher
from nas.searchers.table import SEARCHERS
from nas.stages.continued import continued, continued_words, folder_of
from nas.stages.planned import check_trained, cuts_of, planned
from nas.training.plan import BasisPlan
from search_spaces.errors import UserError
from search_spaces.registry import Space, get_space
from search_spaces.space import make_space
from supernets.basis import install_stages
from supernets.supernet import Supernet


@dataclass(frozen=True)
class Asked:
    """What is searched for, known before any weight is loaded. backbone: on the meta device.

    outputs: what the networks give. earlier: the run whose compact network that is (rounds.py). original: timm's own
    model on the meta device, of which the answer is an architecture; the backbone itself where there is no earlier run.
    """

    config: SearchConfig
    space: Space
    model: TimmModel
    backbone: Supernet
    question: Question
    searcher: Searcher
    plan: BasisPlan
    original: Supernet
    outputs: Outputs
    earlier: Round | None = None


def resolve(config: SearchConfig) -> tuple[SearchConfig, Space]:
    """Fill in the space's defaults and check every option that needs no data."""
    config = continued(config)
    assert config.space is not None
    space = get_space(settled_space(config.space, config))
    config = replace(config, space=space.name)
    check_searcher(config, space)
    config = with_recipe(with_price(one_front(config), config.front), space, "search")
    trained = config.arch is not None
    config = without_foreign(with_defaults(with_searcher(config, space), space, "search", trained), space)
    config = replace(config, dataset=config.dataset_name())
    config.check()
    check_owned(config, space)
    training_of(space).check(config, space)
    return config, space


def started_from(config: SearchConfig) -> Start:
    """Where the weights start: an earlier run's compact network, or what the options name."""
    if config.arch is None:
        return start_of(config, config.seed)
    return Start(checkpoint=folder_of(config.arch) / WEIGHTS, seed=config.seed)


def ask(config: SearchConfig, space: Space, splits: Splits) -> Asked:
    """The choices over the backbone's blocks, their basis and price, the budget, and who is to answer."""
    earlier = None if config.arch is None else round_of(config.arch)
    model = model_of(config, space) if earlier is None else earlier.model
    searcher, start, price = searcher_of(config, space), started_from(config), price_of(config.price)
    trains = config.supernet is not None
    as_it_is = (training_of(space).refits or searcher.measures) and not trains
    outputs = outputs_of(config.num_classes, splits.num_classes, model, start, as_it_is)
    check_outputs(config, space, searcher, outputs)
    original = meta_supernet(replace(model, cut=None), outputs.classes, space)
    if earlier is not None:
        check_widths(earlier, original)
    backbone = original if earlier is None else meta_supernet(model, outputs.classes, space)
    choices = make_space(space.name, space.method, training_of(space).settings(config, space), backbone.shapes)
    price, others = price.opened(config), [each.opened(config) for each in bounds_of(config, price)]
    for each in (price, *others):
        each.check(choices, original)
    cuts = cuts_of(choices) if earlier is None else replace(cuts_of(choices), fixed=narrowed_stem(earlier, original))
    original_costs = original.adapter.costs  # before its stages are said to be rotated
    if not trains:
        check_trained(space, start, searcher.measures)
    plan = planned(config, space, backbone, cuts, splits, start, searcher.measures)
    install_stages(backbone, plan.streams)
    if earlier is not None:
        install_stages(original, streams_of(with_stem({"streams": plan.streams}, backbone)))

    def priced_by(each: Price) -> PricedSpace:
        full = each.backbone(original.shapes, original_costs)
        return priced(choices, backbone.adapter.costs, each, config.stage_width == "full", full)

    costs = priced_by(price)
    costs = replace(costs, bounds=tuple(bound_of(config, priced_by(each)) for each in others))
    budget = max(config.front) if config.front else budget_of(config, price, costs.full)
    question = Question(costs, budget, config.band)
    if earlier is not None:
        check_smaller(earlier, question)
    searcher.check(config, question)
    return Asked(config, space, model, backbone, question, searcher, plan, original, outputs, earlier)


def check_outputs(config: SearchConfig, space: Space, searcher: Searcher, outputs: Outputs) -> None:
    """Refuse a search that learns from labels where there are none, or where no classifier tells classes apart."""
    lacks = outputs.lacks()
    if not lacks:
        return
    if searcher.learns:
        names = [name for name in training_of(space).searchers if not SEARCHERS[name].learns]
        other = f"take --searcher {alternatives(names)}" if names else "take a space of free widths"
        raise UserError(f"{space.name} is searched by {searcher.name}, which learns from labels; {lacks}: {other}")
    if config.supernet is not None:
        raise UserError(f"--supernet {config.supernet} learns from labels; {lacks}: leave it out")
    if config.decide in ("top1", "loss"):
        counts = "counts hits" if config.decide == "top1" else "reads labels"
        raise UserError(f"--decide {config.decide} {counts}; {lacks}: take --decide kl")


def check_smaller(earlier: Round, question: Question) -> None:
    """Refuse a budget that the compact network of an earlier run is within already, with the range that is left."""
    costs, budget = question.priced, question.budget
    if budget is None or budget * costs.full < costs.whole:
        return
    least = math.ceil(Fraction(reachable_range(costs.uniform())[0], costs.full) * 10_000) / 10_000  # up: it must work
    raise UserError(
        f"budget {budget:g} of the {costs.price.words} of {earlier.arch.model}: the compact network of {earlier.folder}"
        f" has {costs.whole / costs.full:.4f} already; ask for {least:.4f} or more, and less than that"
    )


def said(asked: Asked) -> tuple[str, ...]:
    """What is worth saying before the search: what a recipe and an earlier run have decided, and what is left out."""
    recipe, earlier = recipe_lines(asked.config, asked.space, "search"), continued_words(asked.config)
    remarks = filter(None, (price.remark() for price in prices_of(asked)))
    return (*recipe, *earlier, *asked.outputs.lines(), *dropped(asked), *remarks)


def prices_of(asked: Asked) -> list[Price]:
    """What the budget is set in, and the other prices that have a limit."""
    costs = asked.question.priced
    return [costs.price, *(bound.priced.price for bound in costs.bounds)]


def dropped(asked: Asked) -> tuple[str, ...]:
    """The candidates that were offered and are left out, in words."""
    return tuple(f"{asked.space.name}: {line}" for line in asked.question.priced.space.dropped)


def headline(asked: Asked) -> str:
    """What is searched, in one line."""
    choices, budget, backbone = asked.question.priced.space, asked.question.budget, asked.backbone
    words = (
        f"{asked.space.name} on {asked.config.dataset}: {choices.size():.3g} architectures, backbone {asked.model.name}"
        f" {asked.original.params() / 1e6:.2f} M parameters, {asked.original.flops() / 1e9:.4g} GFLOPs (MACs)"
    )
    if asked.earlier is not None:
        price = asked.question.priced
        words += (
            f", from the compact network of {results_path(asked.earlier.folder)} with {backbone.params() / 1e6:.2f} M,"
            f" {backbone.flops() / 1e9:.4g} GFLOPs, {price.whole / price.full:.4g} of the {price.price.words}"
        )
    if asked.config.front:
        return f"{words}, budgets {', '.join(f'{each:.4g}' for each in asked.config.front)}{of_price(asked)}"
    if budget is not None:
        limits = "".join(f", {bound.words}" for bound in asked.question.priced.bounds)
        return f"{words}, budget {budget:.4g}{of_price(asked)}{limits}"
    gamma = GAMMA if asked.config.gamma is None else asked.config.gamma
    return words if asked.config.alone() else f"{words}, gamma {gamma:g}"


def of_price(asked: Asked) -> str:
    """What a budget is a share of, where it is not what the line before has counted."""
    costs = asked.question.priced
    if costs.price.name == FLOPS.name:
        return ""
    amount = f"{costs.full / costs.price.scale:.4g} {costs.price.unit}"
    return f" of {amount}" if costs.price.unit.endswith(costs.price.words) else f" of {amount} {costs.price.words}"
