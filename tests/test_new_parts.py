"""A method, a searcher and a price come with one class and one line of a table each: nothing else is touched."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from nas.config import RetrainConfig, SearchConfig
from nas.prices.price import Price
from nas.prices.table import PRICES
from nas.searchers.options import SearchOptions
from nas.searchers.searcher import Answer, Question, Run, Searcher
from nas.searchers.table import SEARCHERS
from nas.stages.asked import resolve
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from search_spaces.method import Candidate, Method, Picks, Settings
from search_spaces.registry import METHODS
from search_spaces.slices import BlockShape, BlockSlice
from supernets.flops import BlockCosts, NetworkCosts, PerWidth

TINY = dict(epochs=1, batch_size=256, workers=0, threads=1, model_kwargs=("depths=(1, 1)",))


class Halves(Method):
    """Every block keeps all of its heads and neurons, or half of them."""

    name, choice_names = "halves", ("share",)

    def choices(self, shape: BlockShape, settings: Settings) -> tuple[dict[str, tuple[Candidate, ...]], list[str]]:
        return {"share": (1.0, 0.5)}, []

    def block_slice(
        self, shape: BlockShape, settings: Settings, picks: Picks, kept: Mapping[str, Sequence[int]]
    ) -> BlockSlice:
        share = float(picks["share"])
        return BlockSlice(shape.embed_dim, int(shape.num_heads * share), int(shape.hidden * share))


class Heads(Price):
    """Heads, of all blocks."""

    name, words, scale, unit, column = "heads", "heads", 1.0, "heads", "heads"

    def block(self, shape: BlockShape, costs: BlockCosts, kept: BlockSlice) -> int:
        return int(kept.heads) if kept.attn else 0

    def outer(self, costs: NetworkCosts) -> PerWidth:
        stages = len(costs.flops.merge_pair)
        return PerWidth(0, 0, 0, merge_pair=(0,) * stages, merge_in=(0,) * stages)


class LastFirst(Searcher):
    """Narrows the last blocks first, until the budget is met: prices alone answer."""

    name = "last-first"

    def pick(self, options: SearchOptions, question: Question) -> Answer:
        rows, problem = question.priced.options, question.priced.uniform()
        taken = [0] * len(rows)
        for block in reversed(range(len(rows))):
            if question.budget is not None and problem.cost(taken) <= question.budget * question.priced.full:
                break
            taken[block] = len(rows[block]) - 1
        return Answer([row[k].picks for row, k in zip(rows, taken, strict=True)], [{}] * len(rows))

    def search(self, run: Run) -> Answer:
        return self.pick(run.options, run.question)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "halves", Halves())


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRICES, "heads", Heads())


@pytest.fixture
def last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from nas.methods.method import MethodTraining

    monkeypatch.setitem(SEARCHERS, "last-first", LastFirst())
    monkeypatch.setattr(MethodTraining, "searchers", ("gradient", "last-first"))


@pytest.mark.slow
def test_a_new_method_is_searched_and_retrained_on_the_digits(halves: None, tmp_path: Path) -> None:
    found = run_search(SearchConfig(space="swin-halves-nano", output=tmp_path / "found", **TINY, budget=0.8))
    arch = load_architecture(found)
    assert arch.method == "halves" and {block["share"] for block in arch.blocks} <= {1.0, 0.5}
    assert arch.flops <= 0.8 * arch.backbone_flops
    small = run_retrain(
        RetrainConfig(arch=found, output=tmp_path / "small", **{k: v for k, v in TINY.items() if k != "model_kwargs"})
    )
    assert json.loads((small / "summary.json").read_text())["compact_minus_subnet"] <= 1e-5


@pytest.mark.slow
def test_a_new_price_bounds_the_result(heads: None, tmp_path: Path) -> None:
    own = dict(price="heads", budget=0.5, width="inner")
    found = run_search(SearchConfig(space="swin-dan-nano", output=tmp_path / "found", **own, **TINY))
    arch = load_architecture(found)
    assert sum(heads / block["alpha"] for heads, block in zip((4, 8), arch.blocks, strict=True)) <= 6
    assert "expected_heads" in (found / "log.csv").read_text().splitlines()[0]
    with pytest.raises(UserError, match=r"0\.1 .* cannot be met.*heads"):
        run_search(SearchConfig(space="swin-dan-nano", output=tmp_path / "none", **own | {"budget": 0.1}, **TINY))


def test_a_new_searcher_answers_from_prices_alone(halves: None, last_first: None, tmp_path: Path) -> None:
    config = SearchConfig(
        space="swin-halves-nano", searcher="last-first", output=tmp_path / "found", **TINY, budget=0.8
    )
    arch = load_architecture(run_search(config))
    assert [block["share"] for block in arch.blocks] == [1.0, 0.5] and arch.flops <= 0.8 * arch.backbone_flops
    assert not (tmp_path / "found" / "supernet.safetensors").exists()


def test_what_is_in_no_table_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="--price joules; expected flops, params or latency"):
        resolve(SearchConfig(price="joules"))
    with pytest.raises(
        UserError, match="--searcher luck: swin-dan-nano is searched by gradient, evolution, random or uniform"
    ):
        resolve(SearchConfig(searcher="luck"))
    with pytest.raises(UserError, match="unknown space 'swin-halves-nano'"):
        resolve(SearchConfig(space="swin-halves-nano"))


@pytest.mark.slow
@pytest.mark.parametrize(("space", "budget"), [("swin-dan-nano", 0.4), ("vit-kcr-nano", 0.85)])
def test_a_budget_in_parameters_is_met_in_parameters(space: str, budget: float, tmp_path: Path) -> None:
    own = {k: v for k, v in TINY.items() if k != "model_kwargs"}
    arch = load_architecture(
        run_search(SearchConfig(space=space, price="params", budget=budget, output=tmp_path / "found", **own))
    )
    assert budget - 0.1 <= arch.params / arch.backbone_params <= budget


def test_one_factor_serves_a_space_of_many(tmp_path: Path) -> None:
    config = SearchConfig(space="swin-dan-nano", searcher="uniform", budget=0.6, output=tmp_path / "found")
    arch = load_architecture(run_search(config))
    assert {block["alpha"] for block in arch.blocks} == {2} and arch.flops <= 0.6 * arch.backbone_flops
