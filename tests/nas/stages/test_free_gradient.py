"""Free widths searched by gradient: from the solution by importance through training to the cut network; resumed."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

import nas.searchers.judge
import nas.training.loop
from nas.config import SearchConfig
from nas.networks.compact_file import load_compact
from nas.searchers.measure import CANDIDATES
from nas.searchers.start import START
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from tests.nas.run_checks import assert_same_run, assert_whole
from tests.nas.stages.free_world import World, world
from tests.nas.stages.test_search import Interrupt

__all__ = ["world"]  # the fixture
GRADIENT = dict(searcher="gradient", epochs=2, lr=1e-3, arch_lr=0.05)


@pytest.fixture(scope="module")
def searched(world: World) -> tuple[SearchConfig, Path]:
    """A search that nothing disturbed."""
    config = world.search(world.root / "searched", **GRADIENT)
    return config, run_search(config)


@pytest.mark.slow
def test_a_search_by_gradient_begins_at_importance_and_ends_in_the_budget(searched: tuple[SearchConfig, Path]) -> None:
    _, folder = searched
    assert_whole(folder)
    arch = load_architecture(folder)
    assert (arch.search["searcher"], arch.search["start"]) == ("gradient", "importance")
    assert 0.47 * arch.backbone_flops <= arch.flops <= 0.5 * arch.backbone_flops
    start = json.loads((folder / START).read_text())
    measured = {row["picks"]: float(row["value"]) for row in csv.DictReader((folder / CANDIDATES).open(newline=""))}
    assert json.dumps(start["picks"]) == min(measured, key=lambda picks: measured[picks])  # the best of those measured
    summary = json.loads((folder / "summary.json").read_text())
    widths = [row["stage_widths"] for row in summary["finalists"]]
    assert [start["picks"][0]["stream"]] in widths
    assert summary["compact"]["params"] == arch.params == sum(p.numel() for p in load_compact(folder).parameters())


def test_its_choices_are_in_the_table_once(searched: tuple[SearchConfig, Path]) -> None:
    _, folder = searched
    rows = list(csv.DictReader((folder / "choices.csv").open(newline="")))
    shares: dict[tuple[str, ...], float] = {}
    for row in rows:
        key = row["epoch"], row["choice"], row["block"], row["last_block"]
        shares[key] = shares.get(key, 0.0) + float(row["probability"])
    assert all(share == pytest.approx(1.0, abs=1e-4) for share in shares.values())
    blocks = {(choice, block, last) for _, choice, block, last in shares}
    assert {(c, b, last) for c, b, last in blocks if c == "stream"} == {("stream", "0", "1")}
    assert {(b, last) for c, b, last in blocks if c == "hidden"} == {("0", "0"), ("1", "1")}
    assert len({row["probability"] for row in rows if row["choice"] == "v"}) > 20  # the logits moved


def test_what_it_found_is_retrained(searched: tuple[SearchConfig, Path], world: World, tmp_path: Path) -> None:
    small = run_retrain(world.retrain(tmp_path / "small", arch=searched[1]))
    summary = json.loads((small / "summary.json").read_text())
    assert summary["compact_minus_subnet"] <= 1e-5
    assert sum(p.numel() for p in load_compact(small).parameters()) == load_architecture(searched[1]).params


@pytest.mark.parametrize("moment", ["while candidates are measured", "in the first epoch", "between epochs"])
def test_7_an_interrupted_search_resumes_to_the_same_run(
    moment: str, searched: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = searched
    config = replace(config, output=tmp_path / "run")
    with monkeypatch.context() as patch:
        if moment == "while candidates are measured":
            patch.setattr(nas.searchers.judge, "refit", Interrupt(nas.searchers.judge.refit, 2))
        else:
            call = 3 if moment == "in the first epoch" else 6
            patch.setattr(nas.training.loop, "update_weights", Interrupt(nas.training.loop.update_weights, call))
        with pytest.raises(KeyboardInterrupt):
            run_search(config)
    assert (tmp_path / "run" / START).exists() == (moment != "while candidates are measured")
    if moment != "while candidates are measured":
        monkeypatch.setattr(nas.searchers.judge, "refit", None)  # what began does not look for it again
    folder = run_search(replace(config, resume=True))
    assert_same_run(folder, undisturbed)
    assert (folder / START).read_text() == (undisturbed / START).read_text()


def test_a_uniform_start_measures_no_candidates(world: World, tmp_path: Path) -> None:
    config = world.search(tmp_path / "run", **GRADIENT | dict(epochs=1, start="uniform"))
    arch = load_architecture(run_search(config))
    assert arch.search["start"] == "uniform"
    assert not (tmp_path / "run" / START).exists() and not (tmp_path / "run" / CANDIDATES).exists()
    assert arch.flops <= 0.5 * arch.backbone_flops


def test_what_a_start_cannot_be_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--start uniform is of a search by gradient or evolution; vit-free-nano is searched by"
    ):
        run_search(world.search(tmp_path / "run", start="uniform"))
    own = dict(space="vit-dan-nano", output=tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="--start importance is a solution within a budget"):
        run_search(SearchConfig(**own, start="importance", budget=0.0))
    with pytest.raises(UserError, match="--start importance asks what trained weights can do without"):
        run_search(SearchConfig(**own, start="importance"))


def test_factors_begin_at_a_solution_too(world: World, tmp_path: Path) -> None:
    own = world.search(tmp_path / "run", epochs=1, lr=1e-3)
    run = run_search(replace(own, space="vit-dan-nano", evals=None, budget=0.5))
    arch, start = load_architecture(run), json.loads((run / START).read_text())
    assert arch.search["start"] == "importance" and arch.flops <= 0.5 * arch.backbone_flops
    for block, picks in enumerate(start["picks"]):
        p = start["probabilities"][f"block{block}/alpha"]
        assert max(p) == pytest.approx(0.6, abs=1e-6) and {1: p[0], 2: p[1]}[picks["alpha"]] == max(p)
