"""What searches and retrains of free widths cannot do is one line and exit code 2, before anything is written."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.nas.stages.free_world import World, draw, model_options, world
from tests.nas.stages.test_rotated import refused

__all__ = ["world"]  # the fixture
SEARCH = ["--space", "vit-free-nano", "--budget", "0.5"]


def arguments(world: World, output: Path, **more: Any) -> list[str | Path]:
    """What is common to all: the pictures and the model."""
    model = model_options("vit", **more)
    data = ["--dataset", "folder", "--data-dir", world.pictures, "--workers", "0", "--batch-size", "16"]
    return ["--model", model["model"], "--model-kwargs", *model["model_kwargs"], *data, "--output", output]


REFUSED: dict[str, tuple[list[str], str]] = {
    "no budget": (["--budget", "0"], "vit-free-nano compresses to a budget; give --budget or --gflops"),
    "a budget below reach": (
        ["--budget", "0.01"],
        r"budget 0\.01 \(\S+ GFLOPs\) cannot be met: this search space reaches (0\.\d{4}) to 1\.0000 of the backbone"
        r" \(\S+ to \S+ GFLOPs\); ask for at least \1",
    ),
    "every block kept, and a budget for none": (
        ["--budget", "0.05", "--keep-block", "0", "1"],
        r"budget 0\.05 .* cannot be met: this search space reaches 0\.\d{4} to 1\.0000 of the backbone",
    ),
    "nothing left to choose": (
        ["--keep-block", "0", "1", "--fix", "stream"],
        "no block has two candidates, there is nothing to search; offer more with --granularity, --keep-block and",
    ),
    "a block that is not there": (["--keep-block", "2"], "--keep-block 2; the backbone has blocks 0 to 1"),
    "a choice that is none": (["--fix", "width"], "--fix width; expected some of stream, heads, qk, v, hidden"),
    "a step of nothing": (["--granularity", "0"], "--granularity 0; expected a whole number of at least 1"),
    "top-1 without labels": (
        ["--decide", "top1", "--no-labels"], "--decide top1 counts hits; these images have none: take --decide kl",
    ),
    "epochs": (["--epochs", "3"], "--epochs 3: a search by importance trains nothing; leave it out"),
    "no basis": (["--basis", "none"], "--score error needs units in a basis, ordered by --importance error; leave"),
    "another order": (["--importance", "magnitude"], "--score error needs units in a basis"),
    "an order that contradicts": (
        ["--score", "taylor", "--basis", "none", "--importance", "taylor"],
        "--importance taylor orders the network, --basis none leaves it as it is; drop one of them",
    ),
    "factors": (["--alphas", "1", "2"], "--alphas: vit-free-nano has no compression factor; --granularity says how"),
    "fractions": (["--fractions", "1", "0.5"], "--fractions goes with methods"),
    "inner width": (["--width", "inner"], "--width and --stage-width go with factors; --fix stream keeps the"),
    "full stages": (["--stage-width", "full"], "--width and --stage-width go with factors; --fix stream keeps the"),
    "no candidate": (["--evals", "0"], "--evals 0; expected at least 1"),
    "a searcher of others": (["--searcher", "minimax"], r"--searcher minimax: vit-free-nano is searched by importance"),
    "no images to calibrate on": (["--calibration-images", "0"], "--calibration-images 0; expected at least 1"),
    "fewer than no images to refit on": (["--refit-images", "-1"], "--refit-images -1; expected 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_search_cannot_use_is_one_line(
    case: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options, says = REFUSED[case]
    own = [*SEARCH, *options, "--checkpoint", world.trained]
    said = refused("search.py", [*own, *arguments(world, tmp_path / "run")], monkeypatch, capsys)
    assert re.search(says, said), said
    assert list(tmp_path.iterdir()) == []


def test_untrained_weights_have_nothing_to_say(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused("search.py", [*SEARCH, *arguments(world, tmp_path / "run")], monkeypatch, capsys)
    assert "vit-free-nano asks what trained weights can do without; give --checkpoint or --pretrained" in said
    assert "python retrain.py --space vit-free-nano --train plain" in said  # as the fixture has done it
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("score", ["error", "taylor"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(
    number: float, score: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    weights = load_file(world.trained)
    weights["blocks.1.mlp.fc1.weight"][3, 2] = number
    path = tmp_path / "broken.safetensors"
    save_file(weights, path)
    own = [*SEARCH, "--score", score, "--checkpoint", path]
    said = refused("search.py", [*own, *arguments(world, tmp_path / "run")], monkeypatch, capsys)
    assert f"{path} holds NaN or infinity: blocks.1.mlp.fc1.weight; its training has diverged, or it is damaged" in said
    assert list(tmp_path.iterdir()) == [path]


def test_a_classifier_of_other_classes_is_none(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(world.trained)
    weights |= {name: weights[name][:4].clone() for name in ("head.weight", "head.bias")}
    save_file(weights, tmp_path / "four.safetensors")
    own = [*SEARCH, "--checkpoint", tmp_path / "four.safetensors", *arguments(world, tmp_path / "run")]
    said = refused("search.py", own, monkeypatch, capsys)
    assert "its weights have no classifier for these 5 classes; train one first: python retrain.py" in said
    assert not (tmp_path / "run").exists()


def test_too_few_images_to_decide_by_are_said_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two to train on, of two classes."""
    few = tmp_path / "few"
    draw(few / "train", number=1)
    draw(few / "val", number=1)
    for folder in (few / "train", few / "val"):
        for label in (2, 3, 4):
            (folder / str(label) / "0.png").unlink()
            (folder / str(label)).rmdir()
    weights = load_file(world.trained)
    weights |= {name: weights[name][:2] for name in ("head.weight", "head.bias")}
    save_file(weights, tmp_path / "two.safetensors")
    own = [*SEARCH, "--checkpoint", tmp_path / "two.safetensors", *arguments(world, tmp_path / "run")]
    own += ["--data-dir", few, "--val-fraction", "0", "--batch-size", "2"]
    said = refused("search.py", own, monkeypatch, capsys)
    assert "--decide kl: of 2 training images none can be left to decide by; give more, or take --decide score" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--alpha", "2"], "vit-free-nano is to be searched first: python search.py --space vit-free-nano"),
        (["--train", "distill"], "vit-free-nano is to be searched first: python search.py --space vit-free-nano"),
        (["--train", "plain", "--granularity", "2"], "unrecognized|Unrecognized"),
    ],
)
def test_an_architecture_is_found_before_it_is_trained(
    options: list[str], says: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = ["--space", "vit-free-nano", *options, "--epochs", "1", *arguments(world, tmp_path / "run")]
    if "nrecognized" in says:
        monkeypatch.setattr("sys.argv", ["retrain.py", *map(str, own)])
        from nas import commands

        with pytest.raises(SystemExit, match="2"):
            commands.retrain()
    else:
        assert says in refused("retrain.py", own, monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []
