"""A network that a run did not train is called the original, and has the accuracy that it had before."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from nas.config import RetrainConfig, SearchConfig
from nas.data.loader import eval_loader
from nas.data.loaders import loader_spec, open_data
from nas.runs.opened import open_folder
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.evaluate import top_k
from tests.nas.stages.free_world import CLASSES, COMMON, FAMILIES, World, model_options, world  # noqa: F401

CPU = torch.device("cpu")


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def columns_of(folder: Path) -> set[str]:
    with (folder / "log.csv").open() as file:
        return set(next(csv.reader(file)))


def search(world: World, output: Path, method: str, **options: Any) -> SearchConfig:  # noqa: F811
    own = COMMON | dict(data_dir=world.pictures, checkpoint=world.trained, epochs=2, lr=3e-2, budget=0.8)
    return SearchConfig(space=f"vit-{method}-nano", output=output, **own | model_options("vit") | options)


def timms_top1(world: World) -> float:  # noqa: F811
    """Of the checkpoint, opened by timm alone, on the reported split."""
    name, kwargs = FAMILIES["vit"]
    network = timm.create_model(name, num_classes=CLASSES, checkpoint_path=str(world.trained), **kwargs).eval()
    config = RetrainConfig(**COMMON | dict(data_dir=world.pictures))
    images = eval_loader(open_data(config).test, loader_spec(config, network, (3, 16, 16), 16), CPU)
    return top_k({"timm": network}, images, CPU, torch.no_grad)["timm_top1"]


TOOK_NO_PART: dict[str, dict[str, Any]] = {
    "uvc": dict(warmup_epochs=1, arch_lr=0.01),
    "kcr": dict(adjoined=False),
}


@pytest.mark.parametrize("method", TOOK_NO_PART)
def test_a_search_that_trains_the_subnet_alone(world: World, tmp_path: Path, method: str) -> None:  # noqa: F811
    own = TOOK_NO_PART[method]
    folder = run_search(search(world, tmp_path / "search", method, **own))
    found = summary_of(folder)
    assert "large" not in found and found["trained"] == ["subnet"]
    assert found["original"]["top1"] == pytest.approx(timms_top1(world), abs=1e-9)
    assert "held_out_subnet_top1" in columns_of(folder) and not [c for c in columns_of(folder) if "large" in c]
    opened = open_folder(folder, CPU)
    assert list(opened.networks()) == ["subnet"]  # its whole network has been trained for nothing
    again = world.retrain(tmp_path / "retrain", arch=folder, epochs=1, adjoined=own.get("adjoined", True))
    found = summary_of(run_retrain(again))
    trained = own.get("adjoined", True)  # stage 2 trains the large network, but by --no-adjoined
    assert ("large" in found, "original" in found) == (trained, not trained)
    assert (tmp_path / "retrain" / "large.safetensors").is_file() == trained
    if not trained:
        assert found["original"]["top1"] == pytest.approx(timms_top1(world), abs=1e-9)
        assert not [c for c in columns_of(tmp_path / "retrain") if "large" in c]


def test_a_search_that_trains_both_says_large(world: World, tmp_path: Path) -> None:  # noqa: F811
    found = summary_of(run_search(search(world, tmp_path / "search", "dan", epochs=1)))
    assert "original" not in found and found["trained"] == ["large", "subnet"]


def test_from_scratch_there_is_an_original_without_an_accuracy(world: World, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    config = search(world, tmp_path / "search", "kcr", adjoined=False, checkpoint=None, epochs=1)
    found = summary_of(run_search(config))
    assert found["original"].keys() == {"params", "gflops"} and "top1" in found["subnet"]
    assert "original" in capsys.readouterr().out


def test_distillation_learns_from_the_original_or_is_beside_it(world: World, tmp_path: Path) -> None:  # noqa: F811
    folder = run_search(world.search(tmp_path / "search", decide="score"))
    assert summary_of(folder)["original"]["top1"] == pytest.approx(timms_top1(world), abs=1e-9)
    assert summary_of(folder)["trained"] == []
    found = summary_of(run_retrain(world.retrain(tmp_path / "own", arch=folder, epochs=1)))
    assert not {"large", "teacher"} & found.keys()
    assert found["original"]["top1"] == pytest.approx(timms_top1(world), abs=1e-9)
    named = dict(teacher_checkpoint=world.trained)
    found = summary_of(run_retrain(world.retrain(tmp_path / "named", arch=folder, epochs=1, **named)))
    assert found["teacher"]["top1"] == found["original"]["top1"] and "large" not in found


@pytest.mark.slow
@pytest.mark.parametrize("who", ["current", "ema", "frozen"])
def test_beside_a_large_network_the_original_is_there_if_the_small_one_learnt_from_it(
    world: World,  # noqa: F811
    tmp_path: Path,
    who: Any,
) -> None:
    own = dict(space="vit-an-nano", alpha=2, checkpoint=world.trained, adjoined_teacher=who, epochs=1, lr=None)
    config = world.retrain(tmp_path / "run", **own | model_options("vit") | dict(kl_schedule="constant", small_ce=0.5))
    found = summary_of(run_retrain(config))
    assert ("original" in found) == (who == "frozen") and "large" in found and "teacher" not in found
    if who == "frozen":
        assert found["original"]["top1"] == pytest.approx(timms_top1(world), abs=1e-9)
    assert {"loss_ce", "loss_kl", "loss_ce_small"} <= columns_of(tmp_path / "run")
    assert (tmp_path / "run" / "rates.csv").is_file()  # --lr was left out
