"""Which images: every dataset that `--dataset` can name; the schemes are opened through timm's factory.

| name | what is read | test images |
|---|---|---|
| digits | scikit-learn's 1,797 scanned digits, 8 x 8 enlarged to 32 x 32 RGB | a fixed fifth |
| imagenet | folders train and val (or tars) of 1000 class folders | val |
| imagenet100 | the 100 published classes out of such folders, or folders of only these | val |
| cifar10, cifar100 | torchvision's python files under data_dir | their test files |
| folder, or nothing | folders train and val, or train.tar and val.tar, of class folders | val |
| folder, or nothing | one folder of class folders, or one tar of them | a fixed fifth |
| folder, or nothing | the same of images that lie in no class folder: without labels | val, or a fixed fifth |
| torch/…, hfds/… | timm's random-access schemes | test_split |
| hfids/…, tfds/…, wds/… | timm's streams, of which nothing can be held out | test_split |

Each is opened as train, val and test. Class folders are labelled in natural order of their names, as in timm
and torchvision (ImageNet's ids: ascending). Heavy imports happen where a dataset needs them, torch included.
"""

import difflib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.data.class_folders import names_by_label, one_line
from nas.data.decoding import opened
from nas.data.folders import FOLDERS, layout, open_folders
from nas.data.images import Images, Source
from nas.data.listing import few, list_images, walk
from nas.data.split_names import reported_words
from search_spaces.errors import UserError

NAMES = ("digits", "cifar10", "cifar100", *FOLDERS)
STREAMS = ("hfids", "tfds", "wds")
SCHEMES = ("torch", "hfds", *STREAMS)
TORCH_FOLDERS = ("torch/folder", "torch/image_folder")
TEST_FRACTION = 0.2  # of a dataset that has no test images of its own: the "test fifth" of nas.data.split_names


@dataclass(frozen=True)
class DataSpec:
    """What to open. Names follow timm's train.py."""

    dataset: str = "digits"
    data_dir: str | Path | None = None
    val_fraction: float = 0.1  # held out of the training images, by a rule without a seed
    train_split: str = "train"
    test_split: str = "validation"
    class_map: str = ""  # timm's: a text file of one class per line, or a pickled {name: label}
    num_classes: int | None = None  # needed only where the dataset does not record it
    download: bool = False
    labels: bool = True  # whether they may be read


@dataclass(frozen=True)
class Splits:
    """Images to train on, to decide by (None iff val_fraction is 0) and to report on.

    num_classes: that the labels are of; 0: there are no labels, or none that may be read, and theirs mean nothing.
    A stream is timm's IterableImageDataset; everything else is `Images`. reported: what the test images are, in
    words: "validation split", or "test fifth" where the dataset has no such split of its own.
    """

    train: Any
    val: Images | None
    test: Any
    num_classes: int
    class_names: tuple[str, ...] | None  # in label order; ImageNet's are ids (n01440764, …)
    reported: str
    remarks: tuple[str, ...] = ()  # what a user is to be told of the files, a line each
    left_out: Mapping[str, int] = field(default_factory=dict)  # {kind of file: how many} that are no images


def open_splits(spec: DataSpec) -> Splits:
    """Open the dataset that `spec` names.

    Raises UserError: unknown name, missing directory, split, class or package, classes that differ between
    training and test images, an option that the dataset has no use for.
    """
    name, scheme = _checked_name(spec)
    if scheme in STREAMS:
        return _open_streams(spec, name)
    if name == "digits":
        (train, test), split = Images(_digits()).split(TEST_FRACTION), None
    elif name in FOLDERS:
        if not spec.data_dir:
            raise UserError(f"--dataset {name} needs --data-dir; expected {layout(name, 'DIR')}")
        train, test, split = _open_folders(spec, name)
    else:
        split = spec.test_split
        train, test = (Images(_open_scheme(spec, name, which)) for which in (spec.train_split, split))
        if name in TORCH_FOLDERS and train.name(0) == test.name(0):
            raise UserError(f"{name}: no {spec.train_split} and {spec.test_split} folders in {spec.data_dir}")
    if not spec.labels:
        train, test = (Images(part.source.unlabelled(), part.indices) for part in (train, test))
    reported = reported_words(split)
    num_classes, names = _common_classes(spec, train, test, reported)
    val: Images | None = None
    if spec.val_fraction:
        train, val = train.split(spec.val_fraction)
    remarks, left_out = _sources_say(train.source, test.source)
    return Splits(train, val, test, num_classes, names, reported, remarks, left_out)


def _open_folders(spec: DataSpec, name: str) -> tuple[Images, Images, str | None]:
    root = Path(_root(spec) or "")
    try:
        return open_folders(name, root, spec.train_split, spec.test_split, spec.class_map, TEST_FRACTION, spec.labels)
    except OSError as error:  # no permission, a name that is too long
        raise UserError(f"--data-dir {root}: {one_line(error)}; expected {layout(name, root)}") from error


def _sources_say(*sources: Source) -> tuple[tuple[str, ...], dict[str, int]]:
    """What is to be said of some sources, each once, and what was left out of them in all."""
    remarks = tuple(dict.fromkeys(line for source in sources for line in source.remarks))
    left_out: Counter[str] = Counter()
    for source in {id(source): source for source in sources}.values():
        left_out.update(source.left_out)
    return remarks, dict(left_out)


def _root(spec: DataSpec) -> str | None:
    """--data-dir, ~ for one's home written out."""
    if not spec.data_dir:
        return None
    try:
        return str(Path(spec.data_dir).expanduser())
    except RuntimeError as error:  # of a user that there is none of
        raise UserError(f"--data-dir {spec.data_dir}: {one_line(error)}") from error


def _checked_name(spec: DataSpec) -> tuple[str, str]:
    """The dataset's name and timm's scheme for it, if any, after a check of every option against them."""
    name = spec.dataset or "folder"
    scheme, slash, rest = name.partition("/")
    scheme = scheme.lower() if slash else ""
    nameless = not rest and scheme != "wds"  # webdataset goes by the shards alone
    if (scheme not in SCHEMES or nameless) if slash else name not in NAMES:
        near = difflib.get_close_matches(name.lower(), [*NAMES, *(f"torch/{n}" for n in NAMES)], cutoff=0.5)
        known = ", ".join([*NAMES, *(f"{s}/…" for s in SCHEMES)])
        raise UserError(
            f"unknown dataset {name!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {known}")
        )
    if name in ("cifar10", "cifar100"):
        scheme, rest = "torch", name
    name = f"{scheme}/{rest}" if scheme else name
    if not 0 <= spec.val_fraction < 1:
        raise UserError(f"--val-fraction is {spec.val_fraction:g}; it must lie in [0, 1)")
    if name != "digits" and spec.train_split == spec.test_split:
        raise UserError(
            f"--train-split and --val-split are both {spec.test_split}: results are reported on other images"
        )
    if name == "digits" and spec.data_dir:
        raise UserError(f"digits is built in and reads no --data-dir, got {spec.data_dir}; which --dataset is it?")
    if spec.class_map and not spec.labels:
        raise UserError(f"--class-map {spec.class_map} says which labels there are, --no-labels reads none; drop one")
    if spec.class_map and (name in ("digits", "imagenet", "imagenet100") or scheme == "torch"):
        raise UserError(f"--class-map: the classes of {spec.dataset} are fixed; use it with --dataset folder")
    if spec.download and scheme in ("", "wds"):
        raise UserError(f"--download: {name} cannot be downloaded; put it under --data-dir")
    return name, scheme


def _common_classes(spec: DataSpec, train: Images, test: Images, reported: str) -> tuple[int, tuple[str, ...] | None]:
    """(num_classes, class names in label order) of both. Raises UserError where they differ."""
    if train.source.labelled != test.source.labelled:
        have, lack = ("training images", reported) if train.source.labelled else (reported, "training images")
        raise UserError(f"{spec.dataset}: the {have} have class folders, the {lack} none; --no-labels reads none")
    names, test_names = train.source.class_names, test.source.class_names
    if names != test_names:
        raise UserError(
            f"{spec.dataset}: training images and {reported} have other classes:"
            f" {_difference(names or (), test_names or (), reported)}"
        )
    if not len(train) or not len(test):
        raise UserError(
            f"{spec.dataset}: {len(train)} training images, {len(test)} in the {reported}; both must have some"
        )
    if not train.source.labelled:
        return 0, None
    labels = np.concatenate([train.labels, test.labels])
    num_classes = len(names) if names else spec.num_classes or int(labels.max()) + 1
    if spec.num_classes not in (None, num_classes):
        raise UserError(f"{spec.dataset} has {num_classes} classes, not {spec.num_classes}; drop --num-classes")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise UserError(
            f"{spec.dataset}: labels run from {labels.min()} to {labels.max()}, not 0 to {num_classes - 1}; "
            "a split without labels, or a wrong --num-classes?"
        )
    return num_classes, names


def _difference(train: Sequence[str], test: Sequence[str], reported: str) -> str:
    parts = (("training", set(train) - set(test)), (f"the {reported}", set(test) - set(train)))
    return "; ".join(f"only in {where}: {few(sorted(only))}" for where, only in parts if only) or "in their order"


def _digits() -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), from 0..16
    bicubic = Image.Resampling.BICUBIC
    images = [Image.fromarray(image).resize((32, 32), bicubic).convert("RGB") for image in grey]
    names = tuple(str(name) for name in digits.target_names)
    return Source(partial(_copy, images), "digit {}".format, digits.target.astype(np.int64), names)


def _copy(images: list[Image.Image], index: int) -> Image.Image:
    return images[index].copy()


def _create(spec: DataSpec, name: str, split: str, **options: Any) -> Any:
    """timm's create_dataset for a scheme. Raises UserError with what the scheme's package had to say."""
    from timm.data import create_dataset

    root = _root(spec)
    if root is None and name.startswith(("torch/", "wds/")):
        raise UserError(f"--dataset {spec.dataset} needs --data-dir, the folder with its files")
    if name.startswith("torch/") and not spec.download and not os.path.isdir(str(root)):
        raise UserError(f"--data-dir {root} does not exist; expected {_torch_layout(name, root)}")
    try:
        return create_dataset(name, root, split=split, class_map=spec.class_map, download=spec.download, **options)
    except ImportError as error:
        what = f"needs a package that is not installed: {one_line(error)}"
        raise UserError(f"--dataset {spec.dataset} {what}") from error
    except Exception as error:  # each package raises its own: files, split, configuration, network
        hint = f"; expected {_torch_layout(name, root)}" if name.startswith("torch/") else ""
        where = f" under {root}" if root else ""
        raise UserError(f"--dataset {spec.dataset}, split {split}{where}: {one_line(error)}{hint}") from error


def _torch_layout(name: str, root: str | None) -> str:
    folder = {"torch/cifar10": "cifar-10-batches-py", "torch/cifar100": "cifar-100-python"}.get(name)
    files = f"{root}/{folder}/" if folder else f"torchvision's files of {name.removeprefix('torch/')}"
    return f"{files} (--download fetches them, where torchvision can)"


def _open_scheme(spec: DataSpec, name: str, split: str) -> Source:
    """A random-access scheme: a dataset of torchvision or of Hugging Face."""
    dataset = _create(spec, name, split)
    if not name.startswith("torch/"):
        reader = dataset.reader
        labels, names = _hf_labels(reader, spec.dataset), names_by_label(reader.class_to_idx)
        return Source(partial(_read_timm, reader), partial(_hf_name, reader), labels, names)
    if name in TORCH_FOLDERS:
        _check_torch_folder(name, dataset)
    if hasattr(dataset, "loader"):  # torchvision's own converts to RGB by itself, and makes 16 bits all white
        dataset.loader = _read_path
    if hasattr(dataset, "targets"):
        labels = np.asarray(dataset.targets)
        labels = labels if labels.ndim == 1 else labels[:, 0]  # QMNIST: its first column is the digit
    else:  # iNaturalist
        kind, index = dataset.target_type[0], dataset.index
        labels = np.array([c if kind == "full" else dataset.categories_map[c][kind] for c, _ in index])
    names = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    return Source(
        partial(_read_torch, dataset),
        partial(_torch_name, dataset, name),
        labels.astype(np.int64),
        tuple(str(n) for n in names) if names else None,
    )


def _check_torch_folder(name: str, dataset: Any) -> None:
    """Refuse a folder of which torchvision takes other files than --dataset folder does: it says of none why."""
    try:
        ours = {image.place for image in list_images(walk(dataset.root)).images}
    except OSError as error:
        raise UserError(f"{name}: {one_line(error)}") from error
    taken = {path for path, _ in dataset.imgs}
    if taken != ours:
        raise UserError(
            f"{name}: torchvision reads {len(taken)} files under {dataset.root}, where {len(ours)} images lie; they"
            f" differ in {few(sorted(taken ^ ours), 3)}; give --dataset folder"
        )


def _read_torch(dataset: Any, index: int) -> Image.Image:
    image: Image.Image = dataset[index][0]
    return image


def _read_path(path: str) -> Image.Image:
    return opened(Path(path).read_bytes())


def _read_timm(reader: Any, index: int) -> Image.Image:
    """Decode as timm's ImageDataset does, but without its retries: raises what the decoder raises."""
    with reader[index][0] as stream:
        return opened(stream.read())


def _torch_name(dataset: Any, name: str, index: int) -> str:
    files = getattr(dataset, "imgs", None)  # ImageFolder and Places365
    return str(files[index][0]) if files else f"image {index} of {name}"


def _hf_labels(reader: Any, dataset: str) -> NDArray[np.int64]:
    labels = list(reader.dataset[reader.label_key])
    if reader.remap_class:
        classes, names = (
            reader.class_to_idx,
            getattr(reader.dataset.features[reader.label_key], "names", None),
        )
        labels = [names[y] if names and y not in classes else y for y in labels]
        if absent := set(labels) - set(classes):
            raise UserError(f"--class-map lacks classes of {dataset}: {few(sorted(map(str, absent)))}")
        labels = [classes[y] for y in labels]
        reader.remap_class = False  # only images are read from here on, and timm 1.0.26 cannot map numbers
    out = np.asarray(labels)
    if out.ndim != 1 or out.dtype.kind not in "iu":
        raise UserError(f"--dataset {dataset}: labels are not one number per image; name them in a --class-map")
    return out.astype(np.int64)


def _hf_name(reader: Any, index: int) -> str:
    return str(reader.filename(index) or f"image {index}")


def _open_streams(spec: DataSpec, name: str) -> Splits:
    if spec.val_fraction:
        raise UserError(f"--dataset {name} is a stream and nothing can be held out of it; pass --val-fraction 0")
    # Images as they are, for our reading of them; TensorFlow decodes by itself, to 8-bit RGB.
    mode = "RGB" if name.startswith("tfds/") else ""
    train = _create(spec, name, spec.train_split, is_training=True, input_img_mode=mode)
    test = _create(spec, name, spec.test_split, input_img_mode=mode)
    class_to_idx: dict[str, int] = train.reader.class_to_idx
    num_classes = spec.num_classes or (max(class_to_idx.values()) + 1 if class_to_idx else 0)
    if not spec.labels:
        return Splits(train, None, test, 0, None, reported_words(spec.test_split))
    if not num_classes:
        raise UserError(f"--dataset {name} does not record its classes; pass --num-classes or --class-map")
    return Splits(train, None, test, num_classes, names_by_label(class_to_idx), reported_words(spec.test_split))
