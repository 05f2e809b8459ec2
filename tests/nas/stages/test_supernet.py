"""A supernet that is trained for all of its architectures before they are compared: whole searches."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nas.searchers.measure
import nas.stages.retrain
import nas.training.loop
from nas.config import SearchConfig
from nas.data.loaders import shuffled
from nas.methods.table import TRAININGS
from nas.runs.folder import SUPERNET, saved_config
from nas.searchers.measure import CANDIDATES
from nas.searchers.supernets import SUPERNETS
from nas.searchers.table import SEARCHERS
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.state import CHECKPOINT
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from tests.nas.run_checks import assert_whole, log_rows
from tests.nas.stages.free_world import World, model_options, world
from tests.nas.stages.test_free import assert_same, rows_of, summary_of
from tests.nas.stages.test_inside import before_step, killed
from tests.nas.stages.test_search import Interrupt
from tests.nas.stages.test_searchers import search

__all__ = ["world"]  # the fixture
SANDWICH: dict[str, Any] = dict(supernet="sandwich", epochs=2, lr=1e-3)
TABLE = [
    ("random", "dan", "swin"),
    ("random", "kcr", "vit"),
    ("random", "free", "swin"),
    ("evolution", "joint", "vit"),
    ("evolution", "free", "vit"),
    ("importance", "free", "swin"),
    ("uniform", "dan", "vit"),
    ("uniform", "free", "vit"),
]


def test_every_searcher_that_compares_architectures_and_every_method_is_in_the_table() -> None:
    assert {name for name, each in SEARCHERS.items() if each.measures} | {"uniform"} == {row[0] for row in TABLE}
    assert {method for _, method, _ in TABLE} | {"an", "uvc"} == TRAININGS.keys()
    assert list(SUPERNETS) == ["sandwich"]


@pytest.mark.slow
@pytest.mark.parametrize(("searcher", "method", "family"), TABLE)
def test_the_supernet_is_trained_and_what_is_taken_is_of_its_weights(
    searcher: str, method: str, family: str, world: World, tmp_path: Path
) -> None:
    config = search(world, tmp_path / "run", searcher, method, family, **SANDWICH)
    folder = run_search(config)
    assert_whole(folder)
    rows = log_rows(folder / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    terms = {"loss_ce", "loss_kl_smallest", "loss_kl_drawn", "held_out_large_top1", "held_out_smallest_top1"}
    assert terms <= rows[0].keys()
    arch, before = load_architecture(folder), load_file(str(config.checkpoint))
    assert arch.search["supernet"] == "sandwich" and arch.search["subnets"] == 2 and arch.search["epochs"] == 2
    assert saved_config(SearchConfig, folder).sched == "cosine"
    after = load_file(folder / SUPERNET)
    assert after.keys() == before.keys() and not any(torch.equal(after[k], t) for k, t in before.items() if t.dim() > 1)
    summary = summary_of(folder)
    assert "large" in summary["trained"] and "large" in summary and "original" not in summary
    assert (folder / CANDIDATES).exists() == SEARCHERS[searcher].measures


def test_images_that_decide_are_not_trained_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import nas.searchers.measured as module

    seen: list[Any] = []
    monkeypatch.setattr(module, "trained_supernet", lambda run: seen.append(run) or ())
    run_search(search(world, tmp_path / "run", "random", "dan", **SANDWICH, candidates=2))
    (run,) = seen
    prepared = run.prepared
    trained = set(prepared.loaders.train._loader.dataset.images.indices.tolist())
    deciding = set(shuffled(prepared.splits.train, run.options.seed).indices[: prepared.plan.deciding].tolist())
    assert len(deciding) > 3 and not trained & deciding
    assert trained | deciding == set(prepared.splits.train.indices.tolist())
    assert f"trains on {len(trained)} images" in capsys.readouterr().out


CASES = ("random, free", "evolution, joint", "importance, free")


@pytest.fixture(scope="module")
def undisturbed(world: World) -> dict[str, tuple[SearchConfig, Path]]:
    found = {}
    for case in CASES:
        searcher, method = case.split(", ")
        config = search(world, world.root / f"sandwich-{searcher}-{method}", searcher, method, **SANDWICH)
        found[case] = config, run_search(config)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_8_the_same_seed_gives_the_same_and_another_another(
    case: str, undisturbed: dict[str, tuple[SearchConfig, Path]], tmp_path: Path
) -> None:
    config, folder = undisturbed[case]
    torch.manual_seed(7)  # whatever was drawn before
    assert_same(run_search(replace(config, output=tmp_path / "again")), folder)
    other = run_search(replace(config, output=tmp_path / "other", seed=1))
    assert (other / SUPERNET).read_bytes() != (folder / SUPERNET).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_7_killed_in_the_training_before_the_candidates_and_among_them_resumes_to_the_same(
    case: str, undisturbed: dict[str, tuple[SearchConfig, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, finished = undisturbed[case]
    config = replace(config, output=tmp_path / "run", checkpoint_every="1steps")
    moments = (
        (nas.training.loop, "update_weights", before_step(2, killed)),
        (nas.training.loop, "update_weights", before_step(2, killed)),
        (nas.searchers.measure, "write_csv", Interrupt(nas.searchers.measure.write_csv, 1)),
        (nas.searchers.measure, "write_csv", Interrupt(nas.searchers.measure.write_csv, 2)),
    )
    for module, name, instead in moments:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, instead)
            with pytest.raises(KeyboardInterrupt):
                run_search(replace(config, resume=(tmp_path / "run").exists()))
    assert_same(run_search(replace(config, resume=True)), finished)


@pytest.mark.slow
def test_candidates_of_a_shorter_training_are_measured_again(
    undisturbed: dict[str, tuple[SearchConfig, Path]], tmp_path: Path
) -> None:
    """A resume with more epochs: what was measured is of weights that are no more."""
    config, finished = undisturbed["random, free"]
    shutil.copytree(finished, tmp_path / "run")
    longer = replace(config, epochs=3, output=tmp_path / "run", resume=True)
    folder = run_search(longer)
    assert len(log_rows(folder / "log.csv")) == 3
    before, after = ({row["picks"]: row["value"] for row in rows_of(each)} for each in (finished, folder))
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())


@pytest.mark.slow
def test_a_front_is_of_one_training(world: World, tmp_path: Path) -> None:
    own = dict(front=(0.35, 0.7), budget=None, candidates=3)
    folder = run_search(search(world, tmp_path / "run", "random", "free", **SANDWICH, **own))
    assert len(log_rows(folder / "log.csv")) == 2 and {"arch-0.35.json", "arch-0.70.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert len({row["budget"] for row in rows_of(folder)}) == 2


@pytest.mark.parametrize(("searcher", "method"), [("random", "dan"), ("importance", "free"), ("evolution", "free")])
def test_from_scratch_there_is_something_to_compare_once_it_is_trained(
    searcher: str, method: str, world: World, tmp_path: Path
) -> None:
    folder = run_search(search(world, tmp_path / "run", searcher, method, **SANDWICH | dict(checkpoint=None)))
    assert rows_of(folder) and "large" in summary_of(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["random, free", "evolution, joint"])
def test_stage_2_starts_from_the_trained_weights(
    case: str, undisturbed: dict[str, tuple[SearchConfig, Path]], world: World, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, begun = undisturbed[case][1], []
    prepared = nas.stages.retrain.prepare
    monkeypatch.setattr(
        nas.stages.retrain, "prepare", lambda *own, **more: begun.append(own[1]) or prepared(*own, **more)
    )
    summary = summary_of(run_retrain(world.retrain(tmp_path / "small", arch=folder, epochs=1)))
    assert summary["compact_minus_subnet"] <= 1e-5
    assert [own.start.checkpoint for own in begun] == [folder / SUPERNET]


@pytest.mark.slow
def test_a_uniform_architecture_of_a_trained_supernet_keeps_its_weights(world: World, tmp_path: Path) -> None:
    """Even where they stand in no basis: else it would be taken for one that prices alone have picked."""
    options = SANDWICH | dict(checkpoint=None, epochs=1)
    folder = run_search(search(world, tmp_path / "run", "uniform", "free", **options))
    small = run_retrain(world.retrain(tmp_path / "small", arch=folder, epochs=1))
    assert summary_of(small)["compact_minus_subnet"] <= 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "by gradient": (
        dict(searcher="gradient"), "--supernet sandwich goes with a search by importance, evolution, random or uniform;"
        " vit-free-nano is searched by gradient",
    ),
    "minimax": (dict(space="vit-uvc-nano", searcher=None), "--supernet sandwich goes with a search by importance, ev"),
    "no epochs": (dict(epochs=None), "--supernet sandwich trains for --epochs; give --epochs 1 or more, or leave"),
    "zero epochs": (dict(space="vit-dan-nano", epochs=0), "--supernet sandwich trains for --epochs; give --epochs 1"),
    "subnets alone": (dict(supernet=None, epochs=None, subnets=3), "--subnets 3 goes with --supernet sandwich; give"),
    "subnets of a gradient": (
        dict(searcher="gradient", supernet=None, subnets=3), "--subnets goes with a search by importance, evolution",
    ),
    "a gradient that never flows": (dict(detach_teacher=True), "--detach-teacher: --supernet sandwich never lets"),
    "no subnet": (dict(subnets=0), "--subnets 0; expected at least 1"),
    "another name": (dict(supernet="toast"), "--supernet toast; expected sandwich"),
    "compiled": (dict(compile=True), "--compile: --supernet sandwich trains other networks in every step"),
    "epochs alone": (dict(supernet=None), r"--epochs 2: a search by random trains nothing; .*\(--supernet sandwich\)"),
    "without labels": (dict(labels=False), "--supernet sandwich learns from labels; these images have none"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_such_a_training_cannot_use_is_refused_before_anything_is_written(
    case: str, world: World, tmp_path: Path
) -> None:
    options, says = REFUSED[case]
    own: dict[str, Any] = dict(searcher="random", space="vit-free-nano", budget=0.5) | SANDWICH
    own |= dict(dataset="folder", data_dir=world.pictures, checkpoint=world.trained) | model_options("vit")
    with pytest.raises(UserError, match=says):
        run_search(SearchConfig(output=tmp_path / "run", workers=0, **own | options))
    assert not (tmp_path / "run").exists()


def test_an_may_train_a_supernet_too(world: World, tmp_path: Path) -> None:
    own = dict(budget=None, alpha=2)
    config = search(world, tmp_path / "run", "uniform", "dan", **SANDWICH | dict(epochs=1))
    folder = run_search(replace(config, space="vit-an-nano", **own))
    assert {json.dumps(block) for block in load_architecture(folder).blocks} == {json.dumps({"alpha": 2})}
    assert len(list(csv.DictReader((folder / "log.csv").open()))) == 1 and (folder / CHECKPOINT).is_file()
