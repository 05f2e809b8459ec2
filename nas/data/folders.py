"""Folders and tars with one folder per class, read by timm: `folder`, `imagenet` and `imagenet100`."""

import io
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.data.imagenet100 import CLASSES as IMAGENET100
from nas.data.images import Images, Source
from search_spaces.errors import UserError

FOLDERS = ("folder", "imagenet", "imagenet100")
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "eval", "evaluation", "test")  # timm's, and test


def open_folders(
    name: str, root: Path, train_split: str, test_split: str, class_map: str, test_fraction: float
) -> tuple[Images, Images, str | None]:
    """Training and test images of one of FOLDERS under `root`, and the name of the split that the latter are.

    `root` holds one folder of class folders, or one tar of them, per split; for `folder` it may itself be
    one, of which a fixed, stratified `test_fraction` becomes the test set: a split of no name. Labels follow the
    class names in natural order, as in timm and torchvision, or the class map.
    Raises UserError with the path looked at and the layout expected, or with the classes that have no images.
    """
    if not root.exists():
        raise UserError(f"--data-dir {root} does not exist; expected {layout(name, root)}")
    classes = _published_classes(name) or class_map or None
    train_at, test_at = _find(root, train_split, TRAIN_NAMES), _find(root, test_split, TEST_NAMES)
    if train_at and test_at:
        train, test = (Images(_read_folder(at, name, classes)) for at in (train_at, test_at))
        return train, test, test_at.stem if test_at.is_file() else test_at.name
    one = train_at or test_at
    if one or name != "folder":
        found = f"only {one.name}" if one else "neither"
        raise UserError(
            f"{root}: looked for training and validation images, found {found}; expected {layout(name, root)}"
        )
    whole = _read_folder(root, name, classes)
    _refuse_shared_names(root, whole)
    return *Images(whole).split(test_fraction), None


def layout(name: str, root: Path | str) -> str:
    """The folders that a dataset is expected to consist of, in one line."""
    wanted = {"imagenet": "each of 1000 ids", "imagenet100": "each of 100 ids, or all 1000"}.get(name, "class")
    text = f"{root}/train/<{wanted}>/*.JPEG and {root}/val/<the same>/*.JPEG, or {root}/train.tar and val.tar"
    return text if name != "folder" else f"{text}, or one folder of <class>/*.JPEG, or one .tar of it"


def few(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def read_timm(reader: Any, index: int) -> Image.Image:
    """Decode as timm's ImageDataset does, but without its retries: raises what the decoder raises."""
    with reader[index][0] as stream:
        return Image.open(stream).convert("RGB")


def names_by_label(class_to_idx: dict[str, int]) -> tuple[str, ...] | None:
    """Class names in label order; None when the labels are not 0, 1, …, each once."""
    by_label = sorted(class_to_idx.items(), key=lambda item: item[1])
    if not by_label or [label for _, label in by_label] != list(range(len(by_label))):
        return None
    return tuple(str(name) for name, _ in by_label)


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


def _read_folder(path: Path, name: str, classes: dict[str, int] | str | None) -> Source:
    """One folder of class folders, or one tar of them. `classes`: a dict, or the file of a class map."""
    from timm.data import create_dataset

    is_tar = path.is_file()
    expected = f"expected {layout(name, path.parent)}"
    if is_tar and path.suffix.lower() != ".tar":
        raise UserError(f"{path} is neither a folder nor a .tar file; {expected}")
    try:
        reader = create_dataset("", str(path), search_split=False, class_map=classes).reader
    except Exception as error:  # each of timm's readers raises its own: no images, damaged tar, no class map
        nothing = isinstance(error, ValueError) and "unpack" in str(error)  # how the tar reader fails on no image
        raise UserError(f"{path}: {'found 0 images' if nothing else one_line(error)}; {expected}") from error
    class_to_idx: dict[str, int] = reader.class_name_to_idx if is_tar else reader.class_to_idx
    labels = np.asarray(reader.targets if is_tar else [label for _, label in reader.samples], dtype=np.int64)
    if "" in class_to_idx:
        number = int((labels == class_to_idx[""]).sum())
        raise UserError(f"{path}: {number} images lie outside of any class folder; expected {path}/<class>/*.JPEG")
    if isinstance(classes, dict):
        absent = _without_images(class_to_idx, labels)
    else:  # a class map may name more than a folder holds, and a tar does not list its empty folders
        absent = [] if classes or is_tar else _empty_folders(path, [filename for filename, _ in reader.samples])
    if absent:
        raise UserError(f"{path}: no images in {len(absent)} classes of {name}: {few(absent, 100)}; {expected}")
    read = partial(_read_tar if is_tar else read_timm, reader)
    return Source(read, partial(reader.filename, absolute=True), labels, names_by_label(class_to_idx))


def _read_tar(reader: Any, index: int) -> Image.Image:
    """One image of a tar, or of a tar inside it, at the place that timm's reader has found.

    The reader itself either keeps the tar open, and forked workers would share its file offset, or opens and
    scans it for each image, which takes longer than to decode a small one.
    """
    member, _, parent = reader.samples[index]
    with open(reader.root, "rb") as file:
        file.seek(member.offset_data + (parent.offset_data if parent else 0))
        return Image.open(io.BytesIO(file.read(member.size))).convert("RGB")


def _without_images(class_to_idx: dict[str, int], labels: NDArray[np.int64]) -> list[str]:
    counts = np.bincount(labels, minlength=len(class_to_idx))
    return [name for name, label in class_to_idx.items() if not counts[label]]


def _empty_folders(path: Path, filenames: list[str]) -> list[str]:
    skip = len(str(path)) + 1
    filled = {filename[skip:].partition(os.sep)[0] for filename in filenames}
    return sorted(d.name for d in path.iterdir() if d.is_dir() and d.name not in filled and d.name[0] != ".")


def _refuse_shared_names(root: Path, source: Source) -> None:
    """One folder per class, where the test images are drawn from the same folders.

    timm names a class by its innermost folder: of data/train/cat and data/val/cat, given one level too high,
    it makes one class, and training images would become test images.
    """
    seen: dict[int, str] = {}
    for index, label in enumerate(source.labels.tolist()):
        parent = os.path.dirname(source.name(index))
        if seen.setdefault(label, parent) != parent:
            raise UserError(
                f"{root}: the same class in two folders, {seen[label]} and {parent}; give --data-dir the "
                "folder that holds train and val directly, or rename one of the two"
            )
