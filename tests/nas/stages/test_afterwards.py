"""Invariant 12: a trained network is written before anything is asked of it; what fails afterwards loses nothing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nas.stages.prepare
import nas.stages.retrain
import nas.stages.search
import nas.training.loop
from nas.config import RetrainConfig, SearchConfig
from nas.machine.precision import EXACT, product_error, tolerance
from nas.networks.compact_file import load_compact
from nas.runs.checkpoint import load_checkpoint
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.scores import scores_of
from nas.training.state import BEST, CHECKPOINT
from search_spaces.errors import UserError
from tests.nas.run_checks import draw_pictures
from tests.nas.stages.free_world import World, quick, world

__all__ = ["world"]
CPU = torch.device("cpu")
AN: dict[str, Any] = dict(
    space="vit-an-nano", alpha=2, model_kwargs=("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4"),
    dataset="folder", workers=0, val_fraction=0.2, epochs=1, batch_size=16, threads=1, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


def failing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("CUDA out of memory\nTried to allocate")


def disturbed(cut: Callable[..., Any], by: float) -> Callable[..., Any]:
    """A cut that gets a weight wrong."""

    def wrong(*args: Any) -> Any:
        compact = cut(*args)
        with torch.no_grad():
            compact.head.bias[0] += by
        return compact

    return wrong


def unscored(*arguments: Any) -> Any:
    """Scores that cannot be had."""
    return replace(scores_of(*arguments), autocast=failing)


FAULTS: dict[str, tuple[str, Any, str, tuple[str, ...]]] = {  # of nas.stages.retrain; what is said; what is there
    "another network": ("cut", disturbed(nas.stages.retrain.cut, 0.1), "they differ by", ("summary.json", "table.csv")),
    "not a number": ("cut", disturbed(nas.stages.retrain.cut, float("nan")), "differ by nan", ("summary.json",)),
    "the comparison": ("compared", failing, "comparing compact.safetensors with the subnet", ("summary.json",)),
    "accuracy": (
        "scores_of",
        unscored,
        "measuring accuracy on the test fifth: CUDA out of memory",
        ("summary.json",),
    ),
    "speed": ("images_per_second", failing, "measuring speed: CUDA out of memory", ("summary.json", "curves.png")),
    "tables": ("write_json", failing, "writing tables: CUDA out of memory", ("curves.png",)),
    "pictures": ("plot_run", failing, "drawing pictures: CUDA out of memory", ("summary.json", "table.csv")),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_12_what_fails_after_a_retrain_loses_neither_the_network_nor_the_rest(
    fault: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, put, said, there = FAULTS[fault]
    if name not in ("images_per_second", "write_json"):
        quick(monkeypatch)
    monkeypatch.setattr(nas.stages.retrain, name, put)
    with pytest.raises(UserError) as error:
        run_retrain(RetrainConfig(data_dir=pictures, output=tmp_path / "run", **AN))
    assert said in str(error.value) and "what was trained is in" in str(error.value)
    assert load_compact(tmp_path / "run")(torch.zeros(1, 3, 32, 32)).shape == (1, 6)
    assert (tmp_path / "run" / "large.safetensors").is_file()
    for file in there:
        assert (tmp_path / "run" / file).is_file(), file
    if "summary.json" in there and fault not in ("pictures",):
        assert said in json.loads((tmp_path / "run" / "summary.json").read_text())["troubles"][0]


def test_12_a_resume_measures_what_could_not_be_measured(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    config = RetrainConfig(data_dir=pictures, output=tmp_path / "run", **AN)
    with monkeypatch.context() as patch:
        patch.setattr(nas.stages.retrain, "scores_of", unscored)
        with pytest.raises(UserError, match="measuring accuracy"):
            run_retrain(config)
    before = (tmp_path / "run" / "compact.safetensors").read_bytes()
    run_retrain(replace(config, resume=True))
    assert (tmp_path / "run" / "compact.safetensors").read_bytes() == before
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "troubles" not in summary and summary["compact"]["top1"] > 0


@pytest.mark.parametrize(("name", "put"), [("plot_run", failing), ("scores_of", unscored), ("write_json", failing)])
def test_12_what_fails_after_a_search(
    name: str, put: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {k: v for k, v in AN.items() if k not in ("space", "alpha")}
    config = SearchConfig(space="vit-dan-nano", budget=0.5, alphas=(1, 2, 4), data_dir=pictures, **options)
    quick(monkeypatch)
    monkeypatch.setattr(nas.stages.search, name, put)
    with pytest.raises(UserError, match="CUDA out of memory"):
        run_search(replace(config, output=tmp_path / "run"))
    assert (tmp_path / "run" / "arch.json").is_file() and (tmp_path / "run" / "supernet.safetensors").is_file()
    assert (tmp_path / "run" / "summary.json").is_file() == (name != "write_json")


def test_12_a_refitted_network_that_differs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nas.stages.search, "cut", disturbed(nas.stages.search.cut, 0.1))
    with pytest.raises(UserError, match=r"comparing compact\.safetensors with the subnet: they differ by"):
        run_search(world.search(tmp_path / "run", evals=1))
    load_compact(tmp_path / "run")
    assert "top1" in json.loads((tmp_path / "run" / "summary.json").read_text())["compact"]


def test_the_tolerance_is_that_of_the_precision_in_force() -> None:
    assert EXACT <= tolerance(CPU) < 2 * EXACT  # by the rounding of a machine's products
    exact = product_error(CPU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, allowed = product_error(CPU), tolerance(CPU)
    assert exact < 1e-6 < 1e-3 < rounded < 1e-2
    assert 0.01 < allowed < 0.1  # the networks of docs/export.md's models part by 0.01


class Diverges:
    """Weights that are thrown far away from some step on."""

    def __init__(self, step: int) -> None:
        self.step, self.update = step, nas.training.loop.update_weights

    def __call__(self, training: Any, batches: Any, step: Any, meter: Any) -> None:
        if step.number >= self.step:
            for group in training.optimizer.param_groups:
                group["lr"] = float("inf")
        self.update(training, batches, step, meter)


@pytest.mark.slow
@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize(("result", "step"), [("best", 2), ("last", 12), ("best", 9), ("best", 17)])
def test_12_a_run_that_diverges_leaves_the_best_network_it_had(
    ema: bool, result: Any, step: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first epoch, in the second, and with the last steps of both, so that only the weights show it."""
    quick(monkeypatch)
    monkeypatch.setattr(nas.training.loop, "update_weights", Diverges(step))
    options = AN | dict(epochs=2, result=result, opt="sgd", lr=0.1, model_ema=ema, mixup=0.1)
    with pytest.raises(UserError, match=r"(is nan|is inf|not finite).*the networks are those of best\.pt") as error:
        run_retrain(RetrainConfig(data_dir=pictures, output=tmp_path / "run", **options))
    assert "what was trained is in" in str(error.value)
    assert load_checkpoint(tmp_path / "run" / BEST)["epoch"] <= step // 9
    best = load_checkpoint(tmp_path / "run" / BEST)
    own = {n.removeprefix("supernet.backbone."): t for n, t in best["objective"].items()}
    large = load_file(tmp_path / "run" / "large.safetensors")
    assert all(torch.equal(large[n], t) for n, t in (best["ema"] if ema else own).items())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["compact_minus_subnet"] <= EXACT and summary["compact"]["top1"] > 0
    assert all(bool(t.isfinite().all()) for t in load_checkpoint(tmp_path / "run" / CHECKPOINT)["objective"].values())


def test_a_run_that_diverges_before_anything_was_saved_says_so(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.training.loop, "update_weights", Diverges(2))
    with pytest.raises(UserError, match="lower --lr"):
        run_retrain(RetrainConfig(data_dir=pictures, output=tmp_path / "run", **AN | dict(opt="sgd")))
    assert not (tmp_path / "run" / "compact.safetensors").exists()
