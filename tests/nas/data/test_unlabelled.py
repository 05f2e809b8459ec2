"""Images that lie in no class folder, and class folders whose labels are not to be read."""

import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nas.data.datasets import DataSpec, Splits, open_splits
from search_spaces.errors import UserError


def draw(folder: Path, number: int, name: str = "{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name.format(i))
    return folder


def opened(root: Path, **options: Any) -> Splits:
    return open_splits(DataSpec("folder", root, **options))


def assert_unlabelled(splits: Splits, sizes: tuple[int, int, int]) -> None:
    assert splits.num_classes == 0 and splits.class_names is None
    assert (len(splits.train), len(splits.val or ()), len(splits.test)) == sizes
    assert not splits.train.labels.any() and not splits.test.labels.any()


def test_a_flat_folder_is_parted(tmp_path: Path) -> None:
    splits = opened(draw(tmp_path / "photos", 50))
    assert_unlabelled(splits, (36, 4, 10))
    parts = [{part.name(i) for i in range(len(part))} for part in (splits.train, splits.val, splits.test)]
    assert len(set.union(*parts)) == 50 and splits.reported == "test fifth" and not splits.remarks


def test_flat_training_and_validation_folders(tmp_path: Path) -> None:
    draw(tmp_path / "train", 20), draw(tmp_path / "val", 6)
    assert_unlabelled(opened(tmp_path), (18, 2, 6))


def test_a_flat_tar(tmp_path: Path) -> None:
    photos = draw(tmp_path / "photos", 20)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    assert_unlabelled(opened(tmp_path / "all.tar"), (14, 2, 4))


def test_no_labels_takes_images_wherever_they_lie(tmp_path: Path) -> None:
    draw(tmp_path / "a", 10), draw(tmp_path / "b" / "c", 10), draw(tmp_path, 5, "top-{}.png")
    with pytest.raises(UserError, match=r"5 images lie outside of any class folder; .* or --no-labels"):
        opened(tmp_path)
    assert_unlabelled(opened(tmp_path, labels=False), (18, 2, 5))


def test_no_labels_of_class_folders(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a", 10), draw(tmp_path / "train" / "b", 10), draw(tmp_path / "val" / "c", 4)
    assert_unlabelled(opened(tmp_path, labels=False), (18, 2, 4))  # classes need not agree
    with pytest.raises(UserError, match="says which labels there are, --no-labels reads none"):
        opened(tmp_path, labels=False, class_map="classes.txt")


def test_no_labels_of_a_data_set_that_has_some() -> None:
    splits = open_splits(DataSpec("digits", labels=False))
    assert_unlabelled(splits, (1294, 144, 359))
