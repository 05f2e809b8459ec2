"""Which files are images and of which class: the same for folders and tars, and every file that is not is counted."""

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from nas.data.datasets import DataSpec, Splits, open_splits
from nas.data.listing import NO_FILE, OTHERS, UNNAMED, few, natural_key
from search_spaces.errors import UserError
from tests.nas.data.inputs import CLASSES, below, class_folders, picture, seen, tars_of

Layout = Callable[[Path], Path]


@pytest.fixture(params=["folders", "tars"])
def laid(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    """Gives a data set of folders as it is, or as tars."""
    return (lambda root: root) if request.param == "folders" else lambda root: tars_of(root, tmp_path / "tars")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return class_folders(tmp_path / "data", (("train", 10), ("val", 4)))


def opened(root: Path, **options: Any) -> Splits:
    """Every label checked against the pixels."""
    splits = open_splits(DataSpec("folder", root, val_fraction=0, **options))
    assert splits.class_names is not None
    for images in (splits.train, splits.test):
        assert [splits.class_names[label] for label in images.labels] == [CLASSES[c] for c in seen(images)]
    return splits


def test_plain_folders_are_as_timm_reads_them(tmp_path: Path) -> None:
    names = ["1", "2", "10", "a", "a10", "a2", "B", "n01440764", "x 1"]
    for split in ("train", "val"):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for file in ("1.JPEG", "10.jpg", "2.png", f"{name}_11.JPEG", f"{name}_9.jpeg", "Z.jpg", "y.JPG"):
                picture(0, 0, (4, 4)).convert("L").save(tmp_path / split / name / file)
    tars_of(tmp_path, tmp_path / "tars")
    ours, theirs = open_splits(DataSpec("folder", tmp_path, val_fraction=0)), ReaderImageFolder(str(tmp_path / "train"))
    assert [ours.train.name(i) for i in range(len(ours.train))] == [name for name, _ in theirs.samples]
    assert ours.train.labels.tolist() == [label for _, label in theirs.samples]
    assert ours.class_names == tuple(theirs.class_to_idx)
    assert ours.remarks == () and ours.left_out == {}
    tar = open_splits(DataSpec("folder", tmp_path / "tars", val_fraction=0)).train
    reader = ReaderImageInTar(str(tmp_path / "tars" / "train.tar"))
    assert below(tar, "train") == [member.name.removeprefix("./") for member, *_ in reader.samples]
    assert tar.labels.tolist() == reader.targets.tolist() == ours.train.labels.tolist()


def test_a_class_is_the_folder_under_the_split(root: Path, laid: Layout) -> None:
    for name in CLASSES:
        for i in range(8):
            deep = root / "train" / name / ("2024/june" if i % 2 else "2025")
            deep.mkdir(parents=True, exist_ok=True)
            (root / "train" / name / f"{i:03d}.jpg").rename(deep / f"{i:03d}.jpg")
    splits = opened(laid(root))
    assert splits.class_names == CLASSES and len(splits.train) == 30 and len(splits.test) == 12
    (line,) = splits.remarks
    assert "24 of 30 images lie in subfolders of their class's folder (ant/2024/june/001.jpg, " in line


def test_subfolders_called_like_classes_are_no_classes(root: Path, laid: Layout) -> None:
    (root / "train" / "ant" / "bee").mkdir()
    (root / "train" / "ant" / "000.jpg").rename(root / "train" / "ant" / "bee" / "000.jpg")
    assert opened(laid(root)).train.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10


@pytest.mark.parametrize("wrapped", ["train", "data/images"])
def test_one_folder_around_the_classes_is_looked_through(root: Path, laid: Layout, wrapped: str) -> None:
    for split in ("train", "val"):
        (root / split).rename(root / "inner")
        (root / split / wrapped).parent.mkdir(parents=True)
        (root / "inner").rename(root / split / wrapped)
        (root / split / "readme.md").touch()
    splits = opened(laid(root))
    assert splits.class_names == CLASSES
    assert any(f"all images lie under {wrapped}/, so the classes are the folders in that" in s for s in splits.remarks)


def test_a_second_folder_keeps_the_first_from_being_looked_through(root: Path, laid: Layout) -> None:
    """One class has nothing but what is left out: its sister's subfolders must not become the classes."""
    for split in ("train", "val"):
        shutil.rmtree(root / split / "cat")
        for name, part in (("ant", "2024"), ("bee", "2025")):
            (root / split / "kept" / name).mkdir(parents=True)
            for file in (root / split / name).iterdir():
                file.rename(root / split / "kept" / name / f"{part}{file.name}")
            shutil.rmtree(root / split / name)
        (root / split / "other").mkdir()
        (root / split / "other" / "photo.heic").write_bytes(b"heic")
    with pytest.raises(UserError, match="no images in 1 classes of folder: other;"):
        open_splits(DataSpec("folder", laid(root)))


def test_a_class_of_nothing_but_what_is_left_out_is_refused(root: Path, laid: Layout) -> None:
    for file in (root / "train" / "bee").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match="no images in 1 classes of folder: bee;"):
        open_splits(DataSpec("folder", laid(root)))


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (".ipynb_checkpoints/000.jpg", ".ipynb_checkpoints"),
        ("__MACOSX/ant/._000.jpg", "__MACOSX"),
        ("__macosx/000.jpg", "__macosx"),
        ("ant/._000.jpg", "ant/._000.jpg"),
        ("ant/.DS_Store", "ant/.DS_Store"),
        ("Thumbs.db", "Thumbs.db"),
        ("bee/thumbs.db", "bee/thumbs.db"),
        ("desktop.ini", "desktop.ini"),
        ("@eaDir/ant/SYNOPHOTO_THUMB.jpg", "@eaDir"),
        ("ant/@eaDir/000.jpg", "ant/@eaDir"),
        ("$RECYCLE.BIN/000.jpg", "$RECYCLE.BIN"),
        ("System Volume Information/000.jpg", "System Volume Information"),
        (".git/objects/000.png", ".git"),
        (".Trash-1000/files/000.jpg", ".Trash-1000"),
        ("ant/.thumbnails/deep/000.jpg", "ant/.thumbnails"),
        ("lost+found/000.jpg", "lost+found"),
        ("__pycache__/x.pyc", "__pycache__"),
        ("ant/.ipynb_checkpoints/000-checkpoint.jpg", "ant/.ipynb_checkpoints"),
    ],
)
def test_what_other_programs_leave_is_neither_class_nor_image(root: Path, laid: Layout, path: str, named: str) -> None:
    for split in ("train", "val"):
        (root / split / path).parent.mkdir(parents=True, exist_ok=True)
        (root / split / path).write_bytes(b"\x00\x05\x16\x07Mac OS X")
    splits = opened(laid(root))
    assert splits.class_names == CLASSES and (len(splits.train), len(splits.test)) == (30, 12)
    assert splits.left_out == {OTHERS: 2}
    assert sum(f"left out 1 {OTHERS} ({named})" in line for line in splits.remarks) == 2


def test_a_hidden_folder_may_hold_the_data_set(tmp_path: Path) -> None:
    assert len(opened(class_folders(tmp_path / ".cache" / "lost+found", (("train", 3), ("val", 2)))).train) == 9


@pytest.mark.slow
def test_every_suffix_of_pillows_counts(root: Path, laid: Layout) -> None:
    suffixes = [".webp", ".tif", ".TIFF", ".BMP", ".PNG", ".Jpeg", ".jfif", ".gif", ".ppm", ".tga"]
    for name in CLASSES:
        for i, suffix in enumerate(suffixes):
            old = root / "train" / name / f"{i:03d}.jpg"
            Image.open(old).save(old.with_suffix(suffix))
            old.unlink()
    splits = opened(laid(root))
    assert len(splits.train) == 30 and splits.left_out == {} and splits.remarks == ()


def test_what_is_left_out_is_counted_by_kind(root: Path, laid: Layout) -> None:
    (root / "train" / "ant" / "photo.heic").touch()
    (root / "train" / "bee" / "notes.TXT").touch()
    (root / "train" / "bee" / "more.txt").touch()
    (root / "val" / "labels.txt").touch()
    (root / "val" / "cat" / "photo").touch()
    splits = opened(laid(root))
    assert splits.left_out == {".heic": 1, ".txt": 3, "without a suffix": 1}
    train, val = (line for line in splits.remarks if "left out" in line)
    assert "train" in train and "1 .heic (ant/photo.heic)" in train and "2 .txt (" in train
    assert "1 .txt (labels.txt)" in val and "1 without a suffix (cat/photo)" in val


def test_nothing_but_what_is_left_out(root: Path, laid: Layout) -> None:
    for file in root.rglob("*.jpg"):
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"found 0 images, but 30 \.heic \(ant/0.* and 27 more\); expected") as error:
        opened(laid(root))
    assert "\n" not in str(error.value)


def test_classes_of_one_natural_order_are_numbered_alike_by_every_process(tmp_path: Path) -> None:
    for name in ("1", "01", "Ant", "ant", "ANT"):
        (tmp_path / name).mkdir()
        for file in ("1.png", "01.png", "a.png", "A.png"):
            picture(0, 0, (4, 4)).save(tmp_path / name / file)
    code = (
        "import sys; from nas.data.datasets import DataSpec, open_splits;"
        "s = open_splits(DataSpec('folder', sys.argv[1], val_fraction=0));"
        "print(s.class_names, [s.train.name(i) for i in range(len(s.train))])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert len(said) == 1
    assert said.pop().startswith("('01', '1', 'ANT', 'Ant', 'ant')")


def test_links(root: Path) -> None:
    (root / "train" / "ant" / "000.jpg").rename(root / "stored.jpg")
    (root / "train" / "ant" / "000.jpg").symlink_to(root / "stored.jpg")
    (root / "train" / "bee").rename(root / "bees")
    (root / "train" / "bee").symlink_to(root / "bees")
    (root / "train" / "ant" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "train" / "ant" / "round").symlink_to(root / "train" / "ant")
    os.mkfifo(root / "val" / "cat" / "pipe.jpg")  # to open it would wait for ever
    splits = opened(root)
    assert (len(splits.train), len(splits.test)) == (30, 12)
    assert splits.left_out == {NO_FILE: 2, "links to a folder that they lie in": 1}


def test_a_folder_that_cannot_be_listed_is_no_empty_class(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def denied(path: str) -> Any:
        if str(path).endswith("train/bee"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"train: .*Permission denied: '.*train/bee'; expected"):
        opened(root)


@pytest.mark.parametrize("wrong", ["~no-such-user/data", "x" * 300, "a\0b"])
def test_a_data_dir_that_cannot_be(wrong: str) -> None:
    for name in ("folder", "imagenet", "cifar10", "torch/folder"):
        with pytest.raises(UserError) as error:
            open_splits(DataSpec(name, wrong))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("train", "test"), ("training_set", "test_set", "validation_set"), ("Train", "VAL")])
def test_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for above in ("", "data"):
        root = tmp_path / f"of {above}"
        for name in names:
            class_folders(root / above, ((name, 3),))
        if set(names) == {"train", "test"} and not above:
            continue  # which is a layout that is read
        with pytest.raises(UserError, match="look like splits, not like classes; give --data-dir the folder that"):
            open_splits(DataSpec("folder", root))


def test_a_class_called_train_is_one(tmp_path: Path) -> None:
    for name in ("train", "truck"):
        (tmp_path / "data" / "set" / name).mkdir(parents=True)
        for i in range(5):
            picture(0, i).save(tmp_path / "data" / "set" / name / f"{i}.png")
    assert open_splits(DataSpec("folder", tmp_path / "data" / "set", train_split="x", test_split="y")).num_classes == 2


class TestClassMap:
    def opened(self, root: Path, content: bytes | dict[Any, Any], name: str = "map.txt") -> Splits:
        path = root.parent / name
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return open_splits(DataSpec("folder", root, val_fraction=0, class_map=str(path)))

    def test_what_it_does_not_name_is_said(self, root: Path, laid: Layout) -> None:
        splits = self.opened(laid(root), b"cat\nant\n")
        assert splits.class_names == ("cat", "ant")
        assert [("cat", "ant")[label] for label in splits.train.labels] == [CLASSES[c] for c in seen(splits.train)]
        assert splits.left_out == {UNNAMED: 14}

    def test_an_empty_last_line_is_no_class(self, root: Path, laid: Layout) -> None:
        assert self.opened(laid(root), b"ant\nbee\ncat\n\n").class_names == CLASSES

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (b"", "map.txt"),
            (b"\n", "map.txt"),
            (b"\xff\xfe", "map.txt"),
            (b"not a pickle", "map.pkl"),
            ({"ant": "a", "bee": "b", "cat": "c"}, "map.pkl"),
            ({"ant": -1, "bee": 0, "cat": 1}, "map.pkl"),
            ({"ant": 0.5, "bee": 0, "cat": 1}, "map.pkl"),
            (b"ant,bee,cat", "map.csv"),
            (b"moth\nfly\n", "map.txt"),
        ],
    )
    def test_what_is_none_is_refused(self, root: Path, content: Any, name: str) -> None:
        with pytest.raises(UserError) as error:
            self.opened(root, content, name)
        assert "\n" not in str(error.value)


def test_names_that_no_terminal_prints(root: Path, laid: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    strange = ("new\nline.txt", os.fsdecode(b"latin\xe9.txt"), "bell\x07.txt", "größe.txt")
    for name in strange:
        (root / "train" / "ant" / name).touch()
    picture(0).save(root / "train" / "ant" / os.fsdecode(b"caf\xe9\n.png"))
    splits = opened(laid(root))
    assert len(splits.train) == 31 and splits.left_out == {".txt": 4}
    names = [*splits.remarks, *(splits.train.name(i) for i in range(31)), few(strange)]
    assert all(text.isprintable() and text.encode("utf-8") for text in names)
    assert "größe.txt" in few(strange)


def test_natural_order_is_timms() -> None:
    from timm.utils.misc import natural_key as timms

    for name in ("a10b2", "A2", "", "007", "x/10.jpg", "é1"):
        assert natural_key(name) == timms(name)
    assert natural_key("1²3") == ["", 1, "²", 3, ""]  # which timm's cannot


def test_a_held_out_part_is_the_same_in_folder_and_tar(root: Path, tmp_path: Path) -> None:
    both = [open_splits(DataSpec("folder", at)) for at in (root, tars_of(root, tmp_path / "tars"))]
    assert below(both[0].val, "train") == below(both[1].val, "train")
    assert np.array_equal(both[0].val.labels, both[1].val.labels)
