"""Folders and tars with one folder per class: `folder`, `imagenet` and `imagenet100`."""

import re
from pathlib import Path

from nas.data.class_folders import read_split
from nas.data.imagenet100 import CLASSES as IMAGENET100
from nas.data.images import Images, Source
from nas.data.listing import few
from search_spaces.errors import UserError

FOLDERS = ("folder", "imagenet", "imagenet100")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "eval", "evaluation", "test")  # timm's, and test


def open_folders(
    name: str, root: Path, train_split: str, test_split: str, class_map: str, test_fraction: float, labels: bool = True
) -> tuple[Images, Images, str | None]:
    """Training and test images of one of FOLDERS under `root`, and the name of the split that the latter are.

    `root` holds one folder of class folders, or one tar of them, per split; for `folder` it may itself be
    one, of which a fixed, stratified `test_fraction` becomes the test set: a split of no name. Labels follow the
    class names in natural order, as in timm and torchvision, or the class map. Where no image lies in a folder, or by
    `labels` False, there are no labels.
    Raises UserError with the path looked at and the layout expected, or with the classes that have no images.
    """
    expected = f"expected {layout(name, root)}"
    if not root.exists():
        raise UserError(f"--data-dir {root} does not exist; {expected}")
    classes = (_published_classes(name) or class_map or None) if labels else None
    train_at, test_at = _find(root, train_split, TRAIN_NAMES), _find(root, test_split, TEST_NAMES)
    if train_at and test_at:
        if train_at.resolve() == test_at.resolve():
            raise UserError(f"{root}: {train_at.name} and {test_at.name} are the same images; {expected}")
        train, test = (Images(read_split(at, name, classes, expected, labels)) for at in (train_at, test_at))
        return train, test, test_at.stem if test_at.is_file() else test_at.name
    one = train_at or test_at
    if one or name != "folder":
        found = f"only {one.name}" if one else "neither"
        raise UserError(f"{root}: looked for training and validation images, found {found}; {expected}")
    whole = read_split(root, name, classes, expected, labels)
    _refuse_splits(root, whole)
    return *Images(whole).split(test_fraction), None


def layout(name: str, root: Path | str) -> str:
    """The folders that a dataset is expected to consist of, in one line."""
    wanted = {"imagenet": "each of 1000 ids", "imagenet100": "each of 100 ids, or all 1000"}.get(name, "class")
    text = f"{root}/train/<{wanted}>/*.JPEG and {root}/val/<the same>/*.JPEG, or {root}/train.tar and val.tar"
    if name != "folder":
        return text
    return f"{text}, or one folder of <class>/*.JPEG, or one .tar of it (without labels: *.JPEG alone)"


def _published_classes(name: str) -> dict[str, int] | None:
    """{id: label}, ascending, of a dataset whose classes are published; None: whatever the folder holds."""
    if name == "folder":
        return None
    if name == "imagenet100":
        return {wnid: label for label, wnid in enumerate(sorted(IMAGENET100))}
    from timm.data import ImageNetInfo

    return {wnid: label for label, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _find(root: Path, split: str, synonyms: tuple[str, ...]) -> Path | None:
    """The folder or tar of a split: by its own name or else by a synonym, in timm's order."""
    for name in (split, *(synonyms if split in synonyms else ())):
        if (root / name).is_dir():
            return root / name
        if (root / f"{name}.tar").is_file():
            return root / f"{name}.tar"
    return None


def _refuse_splits(root: Path, whole: Source) -> None:
    """Class folders, where the test images are drawn from the same folders; not those of train and val."""
    names = whole.class_names or ()
    if len(names) > 1 and all(re.match(r"(train|val|test|eval|dev)", name.lower()) for name in names):
        raise UserError(
            f"{root}: its folders {few(names)} look like splits, not like classes; give --data-dir the folder that"
            " holds train and val directly, and --train-split and --val-split where they are called otherwise"
        )
