"""Which images decided and which were only reported on is said truly, wherever an accuracy is shown."""

import csv
import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from nas.config import RetrainConfig, SearchConfig
from nas.data.datasets import DataSpec, open_splits
from nas.data.split_names import HELD_OUT, held_out_words, reported_words
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.validate import parser, run_validate
from tests.photographs import class_folders

MODEL = "vit_tiny_patch16_224"
SHAPE = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4)
SEEN = "held-out training images, perhaps seen by the checkpoint"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("photographs"), classes=3, train=20, val=7)


def options(photographs: Path, folder: Path, **more: Any) -> dict[str, Any]:
    kwargs = tuple(f"{k}={v}" for k, v in SHAPE.items())
    common = dict(data_dir=photographs, epochs=1, batch_size=16, workers=0, lr=1e-3, aa="none", mixup=0.0, cutmix=0.0)
    return common | dict(space="vit-dan", model=MODEL, model_kwargs=kwargs, output=folder) | more


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def search(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A search from a checkpoint, and what it printed."""
    folder = tmp_path_factory.mktemp("search")
    save_file(timm.create_model(MODEL, num_classes=3, **SHAPE).state_dict(), folder / "mine.safetensors")
    with redirect_stdout(StringIO()) as said:
        run_search(SearchConfig(**options(photographs, folder / "run", checkpoint=folder / "mine.safetensors")))
    return folder / "run", said.getvalue()


@pytest.mark.slow
@pytest.mark.slow
def test_a_search_says_what_its_images_were_for(search: tuple[Path, str]) -> None:
    folder, said = search
    assert "trains on 54 images, decides on 6 held-out training images, perhaps seen by the checkpoint" in said
    assert "reports on the validation split (21 images)" in said
    (line,) = [line for line in said.splitlines() if line.startswith("epoch 1/1")]
    assert f"% on {SEEN}" in line
    found = summary(folder)
    assert (found["split"], found["held_out"]) == ("validation split", SEEN)
    table = " ".join(said.replace("│", " ").split())
    for words in ("top-1 %, validation split", "top-1 %, held-out training", "perhaps seen by"):
        assert words in table


@pytest.mark.slow
def test_both_accuracies_are_of_the_images_they_are_called_after(search: tuple[Path, str]) -> None:
    folder, _ = search
    found = summary(folder)
    again = run_validate(parser().parse_args(["--weights", str(folder), "--speed-batches", "1", "--workers", "0"]))
    (row,) = csv.DictReader((folder / "log.csv").read_text().splitlines())
    for name in ("large", "subnet"):
        assert found[name]["top1"] == pytest.approx(again["networks"][name]["top1"])
        assert found[name]["top1"] * 21 / 100 == pytest.approx(round(found[name]["top1"] * 21 / 100))
    assert found["large"]["held_out_top1"] == pytest.approx(float(row["held_out_large_top1"]))
    assert found["large"]["held_out_top1"] * 6 / 100 == pytest.approx(round(found["large"]["held_out_top1"] * 6 / 100))
    assert again["split"] == "validation split" and again["images"] == 21


@pytest.mark.slow
@pytest.mark.slow
def test_a_retrain_knows_what_the_searchs_weights_have_seen(
    search: tuple[Path, str], photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = search
    plain = {k: v for k, v in options(photographs, tmp_path / "retrain").items() if k not in ("space", "model")}
    run_retrain(RetrainConfig(arch=folder, **plain | {"model_kwargs": ()}))
    assert f"% on {SEEN}" in capsys.readouterr().out
    assert (summary(tmp_path / "retrain")["split"], summary(tmp_path / "retrain")["held_out"]) == (
        "validation split",
        SEEN,
    )


@pytest.mark.slow
def test_a_search_from_scratch_has_seen_nothing_unless_it_held_out_less(photographs: Path, tmp_path: Path) -> None:
    run_search(SearchConfig(**options(photographs, tmp_path / "search", pretrained=False)))
    assert summary(tmp_path / "search")["held_out"] == HELD_OUT
    plain = {k: v for k, v in options(photographs, tmp_path).items() if k not in ("space", "model")}
    for name, share, words in (("same", 0.1, HELD_OUT), ("more", 0.3, SEEN)):
        config = RetrainConfig(arch=tmp_path / "search", **plain | dict(model_kwargs=(), val_fraction=share))
        run_retrain(RetrainConfig(**vars(config) | {"output": tmp_path / name}))
        assert summary(tmp_path / name)["held_out"] == words


def test_words() -> None:
    assert held_out_words(None) == HELD_OUT and held_out_words("checkpoint") == SEEN
    assert [reported_words(s) for s in ("val", "valid", "validation")] == ["validation split"] * 3
    assert (reported_words("test"), reported_words("dev"), reported_words(None)) == (
        "test split",
        "dev split",
        "test fifth",
    )


@pytest.mark.parametrize(
    ("split", "asked", "words"),
    [("val", "validation", "validation split"), ("test", "validation", "test split"), ("dev", "dev", "dev split")],
)
def test_a_split_is_called_by_the_folder_it_was_found_in(
    photographs: Path, tmp_path: Path, split: str, asked: str, words: str
) -> None:
    (tmp_path / "train").symlink_to(photographs / "train")
    (tmp_path / split).symlink_to(photographs / "val")
    assert open_splits(DataSpec("folder", tmp_path, test_split=asked)).reported == words
    assert open_splits(DataSpec("folder", photographs / "train")).reported == "test fifth"


def test_the_digits_have_no_split_of_their_own() -> None:
    assert open_splits(DataSpec()).reported == "test fifth"
