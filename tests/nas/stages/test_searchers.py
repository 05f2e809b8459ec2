"""Searchers beside each other, over spaces and families by table: budgets, seeds, kills, fronts, refusals."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nas.searchers.measure
import nas.stages.front
from nas.config import SearchConfig
from nas.methods.table import TRAININGS
from nas.searchers.judge import Judge
from nas.searchers.measure import CANDIDATES
from nas.searchers.table import SEARCHERS
from nas.stages.front import FRONT
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from tests.nas.run_checks import assert_whole, visible
from tests.nas.stages.free_world import COMMON, World, model_options, world
from tests.nas.stages.test_free import assert_same, rows_of, summary_of
from tests.nas.stages.test_search import Interrupt

__all__ = ["world"]  # the fixture
SPACES = {"dan": 0.6, "kcr": 0.9, "joint": 0.6, "free": 0.5}  # a budget that leaves several architectures
FEW: dict[str, dict[str, Any]] = {
    "random": dict(candidates=5),
    "evolution": dict(population=4, generations=2),
    "uniform": {},
    "importance": {},
}
MODEL: dict[str, dict[str, Any]] = {"vit": dict(embed_dim=32, num_heads=4, depth=3), "swin": dict(num_heads=(4, 4))}
TABLE = [
    (searcher, method, family)
    for searcher in FEW
    for method in SPACES
    for family in MODEL
    if searcher in TRAININGS[method].searchers
]


def search(world: World, output: Path, searcher: str, method: str, family: str = "vit", **options: Any) -> SearchConfig:
    """A search of a few candidates from trained weights."""
    more = MODEL[family]
    own = COMMON | dict(data_dir=world.pictures, checkpoint=world.checkpoint(family, **more), budget=SPACES[method])
    own |= FEW[searcher] | model_options(family, **more)
    own |= dict(evals=2) if method == "free" and searcher in ("importance", "evolution") else {}
    return SearchConfig(space=f"{family}-{method}-nano", searcher=searcher, output=output, **own | options)


def values_of(folder: Path) -> list[float]:
    return [float(row["value"]) for row in rows_of(folder)]


def test_every_searcher_that_measures_is_in_the_table() -> None:
    assert {name for name, each in SEARCHERS.items() if each.measures} < FEW.keys()
    assert {method for _, method, _ in TABLE} | {"an", "uvc"} == TRAININGS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("searcher", "method", "family"), TABLE)
def test_the_best_of_what_was_measured_is_taken_and_nothing_is_above_the_budget(
    searcher: str, method: str, family: str, world: World, tmp_path: Path
) -> None:
    config = search(world, tmp_path / "run", searcher, method, family)
    folder = run_search(config)
    arch = load_architecture(folder)
    assert arch.flops <= SPACES[method] * arch.backbone_flops and arch.search["searcher"] == searcher
    if not SEARCHERS[searcher].measures:
        assert not (folder / CANDIDATES).exists()
        return
    rows = rows_of(folder)
    assert len({row["picks"] for row in rows}) == len(rows) > 1
    assert all(float(row["gflops"]) * 1e9 <= SPACES[method] * arch.backbone_flops for row in rows)
    assert all(float(row["price"]) == pytest.approx(float(row["gflops"]) * 1e9 / arch.backbone_flops) for row in rows)
    best = min(rows, key=lambda row: float(row["value"]))
    own = [{k: v for k, v in block.items() if not isinstance(v, list)} for block in arch.blocks]
    assert json.loads(best["picks"]) == own
    if "value" in arch.search:
        assert arch.search["value"] == float(best["value"])


@pytest.fixture(scope="module")
def undisturbed(world: World) -> dict[str, tuple[SearchConfig, Path]]:
    """Of free widths and of factors, by searcher and method."""
    found = {}
    for searcher, method in (("random", "free"), ("evolution", "free"), ("evolution", "joint")):
        config = search(world, world.root / f"{searcher}-{method}", searcher, method)
        found[f"{searcher}, {method}"] = config, run_search(config)
    return found


CASES = ("random, free", "evolution, free", "evolution, joint")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_8_the_same_seed_gives_the_same_and_another_another(
    case: str, undisturbed: dict[str, tuple[SearchConfig, Path]], tmp_path: Path
) -> None:
    config, folder = undisturbed[case]
    torch.manual_seed(7)  # whatever was drawn before
    assert_same(run_search(replace(config, output=tmp_path / "again")), folder)
    other = run_search(replace(config, output=tmp_path / "other", seed=1))
    assert [row["picks"] for row in rows_of(other)] != [row["picks"] for row in rows_of(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("known", [0, 2, 5])
@pytest.mark.parametrize("case", CASES)
def test_7_what_was_measured_is_not_measured_again(
    case: str,
    known: int,
    undisturbed: dict[str, tuple[SearchConfig, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if it had been killed after so many candidates."""
    config, finished = undisturbed[case]
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("arch.json", "summary.json", "compact.safetensors", "supernet.safetensors"):
        (folder / name).unlink(missing_ok=True)
    lines = (folder / CANDIDATES).read_text().splitlines(keepends=True)
    known = min(known, len(lines) - 2)
    (folder / CANDIDATES).write_text("".join(lines[: 1 + known]))
    measured: list[Any] = []
    timed = Judge.timed
    monkeypatch.setattr(Judge, "timed", lambda self, subnet: (measured.append(subnet), timed(self, subnet))[1])
    assert_same(run_search(replace(config, output=folder, resume=True)), finished)
    assert len(measured) == len(lines) - 1 - known


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_7_a_search_killed_among_its_candidates_resumes_to_the_same(
    case: str, undisturbed: dict[str, tuple[SearchConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, finished = undisturbed[case]
    with monkeypatch.context() as patch:
        patch.setattr(nas.searchers.measure, "write_csv", Interrupt(nas.searchers.measure.write_csv, 3))
        with pytest.raises(KeyboardInterrupt):
            run_search(replace(config, output=tmp_path / "run"))
    assert_whole(tmp_path / "run")
    assert_same(run_search(replace(config, output=tmp_path / "run", resume=True)), finished)


@pytest.mark.slow
def test_evolution_begins_with_the_solution_by_importance(undisturbed: dict[str, tuple[SearchConfig, Path]]) -> None:
    for case in CASES[1:]:
        rows = rows_of(undisturbed[case][1])
        origins = [row["origin"] for row in rows]
        assert origins[0] == "importance" and set(origins) <= {"importance", "random", "crossover", "mutation"}
        assert [int(row["generation"]) for row in rows] == sorted(int(row["generation"]) for row in rows)
        assert {"crossover", "mutation"} <= set(origins)
    assert origins.count("importance") == 1  # the exact program has but one


@pytest.mark.slow
def test_evolution_may_begin_at_random(world: World, tmp_path: Path) -> None:
    folder = run_search(search(world, tmp_path / "run", "evolution", "free", start="uniform", evals=None))
    assert {row["origin"] for row in rows_of(folder)} == {"random", "crossover", "mutation"}
    assert load_architecture(folder).search["start"] == "uniform"


@pytest.mark.parametrize("decide", ["top1", "loss"])
def test_candidates_are_measured_by_labels_too(decide: str, world: World, tmp_path: Path) -> None:
    folder = run_search(search(world, tmp_path / "run", "random", "dan", decide=decide))
    assert {row["measured"] for row in rows_of(folder)} == {decide}
    assert all(0 <= value <= 100 for value in values_of(folder))


def test_what_is_not_of_a_searcher_is_not_recorded(undisturbed: dict[str, tuple[SearchConfig, Path]]) -> None:
    recorded = load_architecture(undisturbed["random, free"][1]).search
    assert {"candidates", "decide", "granularity"} <= recorded.keys()
    assert not {"evals", "score", "population", "arch_lr", "start"} & recorded.keys()
    assert {"population", "mutate", "evals", "start"} <= load_architecture(undisturbed[CASES[1]][1]).search.keys()


def test_what_a_searcher_of_factors_found_is_retrained(
    undisturbed: dict[str, tuple[SearchConfig, Path]], world: World, tmp_path: Path
) -> None:
    config = world.retrain(tmp_path / "small", arch=undisturbed["evolution, joint"][1])
    assert summary_of(run_retrain(config))["compact_minus_subnet"] <= 1e-5


# A front

FRONTS = {"importance": "free", "random": "dan", "evolution": "free"}
BUDGETS = (0.7, 0.35, 0.5)


@pytest.fixture(scope="module")
def fronts(world: World) -> dict[str, tuple[SearchConfig, Path]]:
    found = {}
    for searcher, method in FRONTS.items():
        output = world.root / f"front-{searcher}"
        config = search(world, output, searcher, method, front=BUDGETS, budget=None)
        found[searcher] = config, run_search(config)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("searcher", FRONTS)
def test_a_front_is_the_best_at_each_budget(searcher: str, fronts: dict[str, tuple[SearchConfig, Path]]) -> None:
    _, folder = fronts[searcher]
    assert_whole(folder)
    assert {"arch-0.35.json", "arch-0.50.json", "arch-0.70.json", FRONT, CANDIDATES} <= visible(folder).keys()
    assert not (folder / "arch.json").exists()
    with (folder / FRONT).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["budget"]) for row in rows] == sorted(BUDGETS)
    candidates = rows_of(folder)
    for row in rows:
        arch = load_architecture(folder / row["file"])
        assert arch.flops <= float(row["budget"]) * arch.backbone_flops and arch.flops == round(
            float(row["gflops"]) * 1e9
        )
        assert arch.search["budget"] == float(row["budget"])
        within = [float(c["value"]) for c in candidates if float(c["price"]) <= float(row["budget"])]
        assert float(row["value"]) == min(within)
        assert 0 <= float(row["top1"]) <= 100 and 0 <= float(row["held_out_top1"]) <= 100
    assert summary_of(folder)["front"][0]["file"] == "arch-0.35.json"


@pytest.mark.slow
def test_one_scoring_serves_a_front(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its architectures at each budget are those of a search at that budget alone."""
    import nas.searchers.importance as module

    passes: list[Any] = []
    scored = module.lost_of
    monkeypatch.setattr(module, "lost_of", lambda *own: (passes.append(own), scored(*own))[1])
    own = dict(score="taylor", decide="score")
    folder = run_search(search(world, tmp_path / "front", "importance", "free", front=(0.5, 0.3), budget=None, **own))
    assert len(passes) == 1
    alone = run_search(search(world, tmp_path / "alone", "importance", "free", budget=0.3, **own))
    assert load_architecture(folder / "arch-0.30.json").blocks == load_architecture(alone).blocks
    assert not (folder / CANDIDATES).exists()


@pytest.mark.slow
def test_a_front_draws_what_a_search_at_one_budget_draws(
    fronts: dict[str, tuple[SearchConfig, Path]], world: World, tmp_path: Path
) -> None:
    alone = run_search(search(world, tmp_path / "alone", "random", "dan", budget=0.5))
    of_front = [row["picks"] for row in rows_of(fronts["random"][1])]
    assert {row["picks"] for row in rows_of(alone)} <= set(of_front)


@pytest.mark.slow
def test_7_an_interrupted_front_resumes_to_the_same(
    fronts: dict[str, tuple[SearchConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, finished = fronts["evolution"]
    for module, function, call in ((nas.searchers.measure, "write_csv", 9), (nas.stages.front, "write_csv", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, Interrupt(getattr(module, function), call))
            with pytest.raises(KeyboardInterrupt):
                run_search(replace(config, output=tmp_path / "run", resume=(tmp_path / "run").exists()))
    folder = run_search(replace(config, output=tmp_path / "run", resume=True))
    assert_same(folder, finished)
    for name in ("arch-0.35.json", "arch-0.50.json", "arch-0.70.json", FRONT):
        assert (folder / name).read_text() == (finished / name).read_text()


def test_one_of_a_front_is_retrained(
    fronts: dict[str, tuple[SearchConfig, Path]], world: World, tmp_path: Path
) -> None:
    folder = fronts["importance"][1]
    small = run_retrain(world.retrain(tmp_path / "small", arch=folder / "arch-0.35.json"))
    assert summary_of(small)["compact_minus_subnet"] <= 1e-5


# Refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "evals of a search at random": (
        dict(searcher="random", evals=3), "--evals goes with a search by gradient, importance or evolution; vit-free-"
        "nano is searched by random",
    ),
    "a population of importance": (
        dict(searcher="importance", population=8), "--population goes with a search by evolution; vit-free-nano is",
    ),
    "candidates of evolution": (dict(searcher="evolution", candidates=8), "--candidates goes with a search by random"),
    "a front by gradient": (
        dict(searcher="gradient", front=(0.2, 0.5)), "--front goes with a search by importance, evolution or random",
    ),
    "a front of the uniform": (dict(searcher="uniform", front=(0.2, 0.5)), "--front goes with a search by importance"),
    "a rate of logits": (
        dict(searcher="random", arch_lr=0.1), "--arch-lr goes with a search that trains; one by random does not",
    ),
    "epochs": (dict(searcher="evolution", epochs=3), "--epochs 3: a search by evolution trains nothing; leave it out"),
    "a start of random": (
        dict(searcher="random", start="importance"), "--start importance is of a search by gradient or evolution; ",
    ),
    "a score that measures nothing": (dict(searcher="random", decide="score"), "--decide score is of a search by imp"),
    "no candidates": (dict(searcher="random", candidates=0), "--candidates 0; expected at least 1"),
    "one parent": (dict(searcher="evolution", population=1), "--population 1; expected at least 2"),
    "no generation": (dict(searcher="evolution", generations=0), "--generations 0; expected at least 1"),
    "no mutation": (dict(searcher="evolution", mutate=0.0), "--mutate 0.0; expected a probability above 0, at most 1"),
    "a budget twice": (dict(front=(0.5, 0.3, 0.5)), "--front names 0.5 more than once; give every budget once"),
    "a budget that is none": (dict(front=(0.5, 1.5)), "--front 1.5; expected fractions of the backbone's price"),
    "a front and a budget": (dict(front=(0.5, 0.3), budget=0.5), "--front is several budgets, --budget is one; give"),
    "a front below reach": (
        dict(front=(0.5, 0.01)), r"budget 0\.01 .* cannot be met: this search space reaches 0\.\d{4} to 1\.0000",
    ),
    "uniform below reach": (dict(searcher="uniform", budget=0.01), r"budget 0\.01: nothing that is the same everywh"),
    "another's searcher": (
        dict(searcher="minimax"), "--searcher minimax: vit-free-nano is searched by importance, gradient, evolution, r",
    ),
    "no budget": (dict(space="vit-dan-nano", searcher="random", budget=0.0), "--searcher random searches within a bud"),
    "what only a training reads": (
        dict(space="vit-kcr-nano", searcher="random", eta_kc=0.1, budget=0.8), "--eta-kc goes with a search that trai",
    ),
    "gates by channel": (
        dict(space="vit-kcr-nano", searcher="random", selection="bernoulli", budget=0.8), "--selection bernoulli goes",
    ),
    "its own alone": (
        dict(space="vit-uvc-nano", searcher="random"), "--searcher random: vit-uvc-nano is searched by minimax",
    ),
    "one factor alone": (
        dict(space="vit-an-nano", searcher="evolution"), "--searcher evolution: vit-an-nano is searched by uniform",
    ),
    "untrained weights": (
        dict(space="vit-dan-nano", searcher="random", checkpoint=None), "vit-dan-nano asks what trained weights can do",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_searcher_cannot_use_is_refused_before_anything_is_written(
    case: str, world: World, tmp_path: Path
) -> None:
    options, says = REFUSED[case]
    own: dict[str, Any] = {"evals": None, "budget": None if "front" in options else 0.5} | options
    config = replace(world.search(tmp_path / "run"), **own)
    with pytest.raises(UserError, match=says):
        run_search(config)
    assert list(tmp_path.iterdir()) == []


def test_a_front_is_no_trial_of_a_sweep() -> None:
    from nas.sweeps.sweep import check_trials
    from nas.sweeps.trials import Trial

    trial = Trial("000", {"seed": 1}, SearchConfig(space="vit-free-nano", front=(0.2, 0.5)), None)
    with pytest.raises(UserError, match="--front is several architectures, a trial is one; sweep budgets"):
        check_trials([trial])
