"""What people bring, through whole runs: what was made of it is said, counted in the summary, and can be learnt."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from nas.config import SearchConfig
from nas.data.datasets import DataSpec, open_splits
from nas.data.listing import OTHERS
from nas.runs.images import RECORD
from nas.stages.search import run_search
from search_spaces.errors import UserError
from tests.nas.data.inputs import CLASSES, class_folders, picture, seen

TINY = SearchConfig(
    space="vit-dan-nano",
    dataset="folder",
    model_kwargs=("img_size=16,24", "patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"),
    alphas=(1, 2),
    budget=0.6,
    epochs=1,
    batch_size=8,
    workers=0,
    val_fraction=0.2,
    threads=1,
    device="cpu",
)


def nested(root: Path) -> None:
    """expected: three classes; images in subfolders (ant/2024/...) belong to the top folder's class"""
    for file in sorted(root.rglob("*.jpg")):
        year = file.parent / ("2024" if int(file.stem) % 2 else "2025")
        year.mkdir(exist_ok=True)
        file.rename(year / file.name)


def extensions(root: Path) -> None:
    """expected: all images of each class are used, or the run says how many it left out and of what kind"""
    for name, suffix in zip(CLASSES, (".webp", ".tif", ".BMP"), strict=True):
        for file in sorted(root.glob(f"*/{name}/*.jpg"))[::2]:
            Image.open(file).save(file.with_suffix(suffix))
            file.unlink()


def hidden(root: Path) -> None:
    """expected: .ipynb_checkpoints and __MACOSX are not classes, ._x.jpg is not an image"""
    for split in ("train", "val"):
        for name in (".ipynb_checkpoints", "__MACOSX"):
            (root / split / name).mkdir()
            picture(0).save(root / split / name / "000.jpg")
        (root / split / "ant" / "._000.jpg").write_bytes(b"\x00\x05\x16\x07Mac OS X")


@pytest.mark.parametrize("case", [nested, extensions, hidden])
def test_three_classes_of_all_their_images(case, tmp_path: Path) -> None:
    case(class_folders(tmp_path))
    splits = open_splits(DataSpec("folder", tmp_path, val_fraction=0))
    assert splits.class_names == CLASSES and (len(splits.train), len(splits.test)) == (60, 18)
    for images in (splits.train, splits.test):
        assert images.labels.tolist() == seen(images)
    assert splits.left_out == ({OTHERS: 6} if case is hidden else {})


def test_sixteen_bits_keep_their_contrast(tmp_path: Path) -> None:
    """expected: 16-bit grey images keep their contrast (not all white): the classes can be learnt"""
    rng = np.random.default_rng(0)
    for split, n in (("train", 20), ("val", 6)):
        for c, name in enumerate(("dark", "bright")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                grey = (rng.integers(2_000, 12_000, (40, 40)) + 30_000 * c).astype(np.uint16)
                Image.fromarray(grey).save(tmp_path / split / name / f"{i:03d}.png")
    splits = open_splits(DataSpec("folder", tmp_path, val_fraction=0))
    assert splits.class_names == ("bright", "dark")
    for images in (splits.train, splits.test):
        grey = np.array([np.asarray(images.read(i)).mean() for i in range(len(images))])
        assert np.all(np.abs(grey - np.where(images.labels == 0, 37_000, 7_000) / 256) < 3)
        assert np.asarray(images.read(0)).std() > 5
    assert [line.count("grey of more than 8 bits is scaled by its type: ") for line in splits.remarks] == [1, 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data of every kind at once, and the folder of a search over it, at 16 x 24 px."""
    root = tmp_path_factory.mktemp("cases")
    for case in (extensions, nested, hidden):
        case(class_folders(root / "data") if case is extensions else root / "data")
    (root / "data" / "train" / "notes.txt").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nas.stages.search.plot_run", lambda folder: None)
        return root / "data", run_search(replace(TINY, data_dir=root / "data", output=root / "run"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.stages.search.plot_run", lambda folder: None)


def test_a_run_says_what_it_left_out(run: tuple[Path, Path]) -> None:
    summary = json.loads((run[1] / "summary.json").read_text())
    assert summary["left_out_files"] == {OTHERS: 6, ".txt": 1} and summary["unreadable_images"] == 0
    record = json.loads((run[1] / RECORD).read_text())
    assert record == {"classes": list(CLASSES), "images": {"train": [16] * 3, "val": [4] * 3, "test": [6] * 3}}


def copied(run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, SearchConfig]:
    """The data at another place, and the options of the run's copy resumed there."""
    moved = shutil.copytree(run[0], tmp_path / "moved")
    folder = shutil.copytree(run[1], tmp_path / "run")
    return moved, replace(TINY, data_dir=moved, output=folder, resume=True)


def test_a_resume_takes_data_that_moved(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, config = copied(run, tmp_path)
    folder = run_search(config)
    said = capsys.readouterr().out
    assert f"--data-dir was {run[0]}, is now {moved}: the same classes and numbers of images" in said
    assert f"left out 3 {OTHERS} (" in said and ", 1 .txt (notes.txt)" in said
    assert yaml.safe_load((folder / "config.yaml").read_text())["data_dir"] == str(moved)
    assert json.loads((folder / "summary.json").read_text()) == json.loads((run[1] / "summary.json").read_text())
    run_search(config)
    assert "--data-dir was" not in capsys.readouterr().out  # it lies there now


@pytest.mark.parametrize("change", ["fewer", "another class", "relabelled", "in place", "no record", "garbage"])
def test_a_resume_on_other_images_is_refused(run: tuple[Path, Path], tmp_path: Path, change: str) -> None:
    moved, config = copied(run, tmp_path)
    folder = tmp_path / "run"
    ants = sorted((moved / "train" / "ant").rglob("[0-9]*.*"))
    says = {
        "another class": "its classes are others",
        "no record": f"no {RECORD}",
        "garbage": "is not what a run writes",
    }
    if change == "another class":
        for split in ("train", "val"):
            (moved / split / "cat").rename(moved / split / "cow")
    elif change == "relabelled":
        ants[0].rename(moved / "train" / "bee" / "x.jpg")
    elif change == "no record":
        (folder / RECORD).unlink()
    elif change == "garbage":
        (folder / RECORD).write_text('{"classes": 3, "images": {"train": "many"}}')
    else:
        ants[0].unlink()
    if change == "in place":
        values = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(values | {"data_dir": str(moved)}))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=says.get(change, r"images in (train|val) then, \d+ now")) as error:
        run_search(config)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
