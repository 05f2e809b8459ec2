"""Every dataset name opens as train, val and test with the right labels, or says what is missing."""

import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nas.data.datasets import DataSpec, open_splits
from nas.data.imagenet100 import CLASSES as IMAGENET100
from nas.data.images import Images, held_out
from search_spaces.errors import UserError

# A folder with train.tar and val.tar: 100 classes of 150 and 50 images each.
TINY = os.environ.get("TINYIMAGENET100", "")
needs_tiny = pytest.mark.skipif(not TINY, reason="set TINYIMAGENET100 to the folder with its train.tar and val.tar")


def write_class(folder: Path, red: int, count: int) -> None:
    """Plain JPEGs whose colour says which they are: red the class, green the number."""
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (16, 12), (red, number, 0)).save(folder / f"{number}.jpg", quality=95)


def write_split(folder: Path, classes: list[str], count: int) -> Path:
    for k, name in enumerate(classes):
        write_class(folder / name, 40 * k, count)
    return folder


def as_tar(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as out:
        for file in sorted(folder.rglob("*.jpg")):
            out.add(file, file.relative_to(folder))
    return tar


def reds(images: Images) -> list[int]:
    """The class that the pixels say, for `write_class` images."""
    return [round(image.getpixel((0, 0))[0] / 40) for image, _ in images]


def identity(images: Images) -> set[str]:
    return {images.name(i) for i in range(len(images))}


CLASSES = ["a10", "a2", "b"]  # in natural order: a2, a10, b


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """train and val with three classes, as folders and as tars."""
    root = tmp_path_factory.mktemp("tree")
    as_tar(write_split(root / "folders" / "train", CLASSES, 10), root / "train.tar")
    as_tar(write_split(root / "folders" / "val", CLASSES, 4), root / "val.tar")
    (root / "tars").mkdir()
    for name in ("train.tar", "val.tar"):
        (root / name).rename(root / "tars" / name)
    return root


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(0.01, 0.9))
def test_held_out_is_stratified_and_fixed(labels, fraction):
    labels = np.array(labels)
    counts = np.bincount(labels)
    try:
        out = held_out(labels, fraction)
    except UserError:
        assert len(labels) * fraction < 1 or counts.max() == 1
        return
    taken = np.bincount(labels[out], minlength=len(counts))
    assert np.all(np.abs(taken - counts * fraction) < 1 + 1e-9)
    assert np.all(taken <= np.maximum(counts - 1, 0))  # a class never loses its last image
    if np.all(counts * (1 - fraction) >= 1):
        assert out.sum() == round(len(labels) * fraction)
    assert np.array_equal(out, held_out(labels, fraction))
    assert np.array_equal(out, held_out((labels + 3) * 7, fraction))  # only the grouping matters


def test_held_out_spreads_over_a_class():
    assert np.flatnonzero(held_out(np.zeros(20, dtype=np.int64), 0.2)).tolist() == [2, 7, 12, 17]


def test_digits_are_partitioned():
    from sklearn.datasets import load_digits

    digits = load_digits()
    splits = open_splits(DataSpec())
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [1294, 144, 359]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(1797))
    assert splits.num_classes == 10
    assert splits.class_names == tuple("0123456789")
    for part in parts:
        assert np.ptp(np.bincount(part.labels)) <= 0.06 * len(part)  # as balanced as the 174 to 183 of the set
    image, label = splits.train[17]
    index = splits.train.indices[17]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert label == digits.target[index]
    small = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX)) / 255 * 16
    assert np.corrcoef(small.ravel(), digits.images[index].ravel())[0, 1] > 0.97


def test_test_images_do_not_depend_on_what_is_held_out():
    ten, none = open_splits(DataSpec()), open_splits(DataSpec(val_fraction=0))
    assert none.val is None
    assert np.array_equal(ten.test.indices, none.test.indices)
    assert np.array_equal(np.sort(np.r_[ten.train.indices, ten.val.indices]), none.train.indices)


@pytest.mark.parametrize("kind", ["folders", "tars"])
@pytest.mark.parametrize("dataset", ["", "folder"])
def test_folders_and_tars(tree, kind, dataset):
    splits = open_splits(DataSpec(dataset, tree / kind, val_fraction=0.2))
    assert splits.class_names == ("a2", "a10", "b")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [24, 6, 12]
    of_red = [1, 0, 2]  # written as a10, a2, b
    for part in (splits.train, splits.val, splits.test):
        assert [of_red[red] for red in reds(part)] == part.labels.tolist() == [label for _, label in part]
    assert np.bincount(splits.val.labels).tolist() == [2, 2, 2]
    assert identity(splits.train).isdisjoint(identity(splits.val))


def test_tar_and_folder_give_the_same_split(tree):
    opened = [open_splits(DataSpec("folder", tree / kind)) for kind in ("folders", "tars")]
    names = [sorted("/".join(n.split("/")[-2:]) for n in identity(splits.val)) for splits in opened]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["folders/train", "tars/train.tar"])
def test_one_folder_or_tar_gets_a_fixed_test_split(tree, name):
    splits = open_splits(DataSpec("folder", tree / name, val_fraction=0.25))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [18, 6, 6]
    sets = [identity(part) for part in (splits.train, splits.val, splits.test)]
    assert len(set.union(*sets)) == 30
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize("kind", ["folders", "tars", ""])
def test_spawned_workers_can_be_sent_the_images(tree, kind):
    spec = DataSpec("folder", tree / kind) if kind else DataSpec()
    images = open_splits(spec).train
    _ = images[0]
    sent = pickle.loads(pickle.dumps(images))
    assert sent[5][1] == images[5][1]
    assert np.array_equal(np.asarray(sent[5][0]), np.asarray(images[5][0]))
    assert sent.name(5) == images.name(5)


def test_tar_of_tars(tree, tmp_path):
    """One tar per class inside the tar of the split, as ImageNet is distributed."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as out:
            for name in CLASSES:
                out.add(as_tar(tree / "folders" / split / name, tmp_path / "inner.tar"), f"{name}.tar")
    splits = open_splits(DataSpec("folder", tmp_path))
    assert splits.class_names == ("a2", "a10", "b")
    assert [[1, 0, 2][red] for red in reds(splits.test)] == splits.test.labels.tolist()
    assert sorted(splits.test.labels) == [0] * 4 + [1] * 4 + [2] * 4


def test_train_and_val_carry_their_own_transforms(tree):
    splits = open_splits(DataSpec("folder", tree / "folders"))
    splits.train.transform = lambda image: "train"
    splits.test.transform = lambda image: image.size
    assert splits.train[0] == ("train", splits.train.label(0))
    assert isinstance(splits.val[0][0], Image.Image)
    assert splits.test[0][0] == (16, 12)


def test_class_map_sets_the_labels(tree, tmp_path):
    (tmp_path / "map.txt").write_text("b\nabsent\na2\n")
    splits = open_splits(DataSpec("folder", tree / "folders", class_map=str(tmp_path / "map.txt")))
    assert splits.class_names == ("b", "absent", "a2")
    assert splits.num_classes == 3
    assert set(splits.train.labels.tolist()) == {0, 2}  # a10 is not in the map and left out
    assert {2: 0, 1: 2}[reds(splits.test)[0]] == splits.test.label(0)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """All 1000 ids with two training images and one for testing, all the same file."""
    from timm.data import ImageNetInfo

    root = tmp_path_factory.mktemp("imagenet")
    Image.new("RGB", (8, 8)).save(root / "image.jpg")
    for wnid in ImageNetInfo("imagenet-1k").label_names():
        for file in ("train/{}/0.JPEG", "train/{}/1.JPEG", "validation/{}/0.JPEG"):
            path = root / file.format(wnid)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(root / "image.jpg", path)
    return root


def test_imagenet_and_its_hundred(imagenet, tmp_path):
    whole = open_splits(DataSpec("imagenet", imagenet, val_fraction=0))
    assert (len(whole.train), len(whole.test), whole.num_classes) == (2000, 1000, 1000)
    assert whole.class_names == tuple(sorted(whole.class_names))
    assert whole.class_names[0] == "n01440764"  # tench, the classifier's first row
    hundred = open_splits(DataSpec("imagenet100", imagenet))
    assert (len(hundred.train), len(hundred.val), len(hundred.test)) == (180, 20, 100)
    assert hundred.class_names == tuple(sorted(IMAGENET100))
    for images in (hundred.train, hundred.test):
        folders = [Path(images.name(i)).parent.name for i in range(len(images))]
        assert folders == [hundred.class_names[label] for label in images.labels]
    for split in ("train", "val"):  # and a folder of only these
        for wnid in IMAGENET100:
            shutil.copytree(imagenet / split.replace("val", "validation") / wnid, tmp_path / split / wnid)
    only = open_splits(DataSpec("imagenet100", tmp_path))
    assert only.class_names == hundred.class_names
    assert np.array_equal(only.train.labels, hundred.train.labels)
    with pytest.raises(UserError, match=r"no images in 900 classes of imagenet: .*expected .*1000 ids"):
        open_splits(DataSpec("imagenet", tmp_path))
    shutil.rmtree(tmp_path / "val" / IMAGENET100[7])
    with pytest.raises(UserError, match=rf"val: no images in 1 classes of imagenet100: {IMAGENET100[7]};"):
        open_splits(DataSpec("imagenet100", tmp_path))


def test_the_published_hundred_are_imagenet_classes():
    from timm.data import ImageNetInfo

    assert len(set(IMAGENET100)) == 100
    assert set(IMAGENET100) < set(ImageNetInfo("imagenet-1k").label_names())


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """CIFAR's own file format with 20 training and 10 test images."""
    from torchvision.datasets import CIFAR10, CIFAR100

    def write(path: Path, content: dict) -> str:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(content))
        return md5(path.read_bytes()).hexdigest()

    for cls, key, classes in ((CIFAR10, "labels", 10), (CIFAR100, "fine_labels", 100)):
        for attribute, count in (("train_list", 4), ("test_list", 10)):
            listed = []
            for file, _ in getattr(cls, attribute):
                labels = [i % 10 for i in range(count if classes == 10 or count == 10 else 20)]
                data = np.stack([np.full(3072, 20 * label, np.uint8) for label in labels])
                listed.append([file, write(tmp_path / cls.base_folder / file, {"data": data, key: labels})])
            monkeypatch.setattr(cls, attribute, listed)
        meta = {cls.meta["key"]: [f"class {k}" for k in range(classes)]}
        checksum = write(tmp_path / cls.base_folder / cls.meta["filename"], meta)
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": checksum})
    return tmp_path


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("Torch/cifar10", 10)])
def test_cifar(cifar, name, classes):
    splits = open_splits(DataSpec(name, cifar, val_fraction=0.3))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [14, 6, 10]
    assert splits.num_classes == len(splits.class_names) == classes
    for part in (splits.train, splits.val, splits.test):
        assert [image.getpixel((3, 3))[0] // 20 for image, _ in part] == part.labels.tolist()


def test_torch_grey_images_become_rgb(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 40), ("t10k", 10)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.broadcast_to(labels[:, None, None] * 20, (count, 28, 28)).astype(np.uint8)
        header = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = bytes([0, 0, 8, 1]) + np.array([count], ">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    splits = open_splits(DataSpec("torch/mnist", tmp_path, val_fraction=0.25))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [30, 10, 10]
    image, label = splits.test[7]
    assert image.mode == "RGB"
    assert image.getpixel((5, 5)) == (140, 140, 140)
    assert label == 7


def test_torch_inaturalist_has_no_target_list(tmp_path):
    for split in ("2021_train", "2021_valid"):
        for k, name in enumerate(("00000_a_b_c_d_e_f_g", "00001_a_b_c_d_e_f_h")):
            write_class(tmp_path / split / name, 40 * k, 3)
    splits = open_splits(DataSpec("torch/inaturalist", tmp_path, val_fraction=0))
    assert splits.num_classes == 2
    assert splits.train.labels.tolist() == reds(splits.train) == [0, 0, 0, 1, 1, 1]


def test_torch_folder_does_not_test_on_its_training_images(tree):
    splits = open_splits(DataSpec("torch/folder", tree / "folders"))
    assert splits.class_names == ("a10", "a2", "b")  # torchvision's order
    assert reds(splits.test) == splits.test.labels.tolist()
    with pytest.raises(UserError, match="no train and validation folders"):
        open_splits(DataSpec("torch/folder", tree / "folders" / "train"))


def test_hugging_face(tree, tmp_path):
    pytest.importorskip("datasets")
    name = f"hfds/{tree / 'folders'}"
    splits = open_splits(DataSpec(name, tmp_path / "cache", val_fraction=0.2))
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [24, 6, 12]
    assert splits.class_names == ("a10", "a2", "b")
    assert reds(splits.val) == splits.val.labels.tolist()
    (tmp_path / "map.txt").write_text("b\na2\na10\n")
    mapped = open_splits(DataSpec(name, tmp_path / "cache", class_map=str(tmp_path / "map.txt")))
    assert mapped.class_names == ("b", "a2", "a10")
    assert [2 - red if red != 1 else 1 for red in reds(mapped.test)] == mapped.test.labels.tolist()
    (tmp_path / "map.txt").write_text("a2\na10\n")
    with pytest.raises(UserError, match=r"--class-map lacks classes of .*: b$"):
        open_splits(DataSpec(name, tmp_path / "cache", class_map=str(tmp_path / "map.txt")))
    with pytest.raises(UserError, match=r"split nowhere.*nowhere"):
        open_splits(DataSpec(name, tmp_path / "cache", test_split="nowhere"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("imagnet"), "unknown dataset 'imagnet'; did you mean imagenet"),
        (DataSpec("cifar1O"), "did you mean cifar10"),
        (DataSpec("zzzzz"), "known: digits, .*hfds/…"),
        (DataSpec("hfdz/mnist", "."), "unknown dataset 'hfdz/mnist'"),
        (DataSpec("hfds/", "."), "unknown dataset 'hfds/'"),
        (DataSpec("torch/nothing", "."), "torch/nothing.*Unknown torchvision dataset nothing"),
        (DataSpec("digits", val_fraction=1), "--val-fraction is 1; it must lie in"),
        (DataSpec("digits", "somewhere"), "digits is built in and reads no --data-dir"),
        (DataSpec("digits", num_classes=12), "digits has 10 classes, not 12"),
        (DataSpec("digits", class_map="map.txt"), "--class-map: the classes of digits are fixed"),
        (DataSpec("cifar10", ".", test_split="train"), "--train-split and --val-split are both train"),
        (DataSpec("digits", download=True), "--download: digits cannot be downloaded"),
        (DataSpec("digits", val_fraction=1e-4), "holds out none"),
        (DataSpec("imagenet"), r"needs --data-dir; expected DIR/train/<each of 1000 ids>/\*.JPEG"),
        (DataSpec("cifar10"), "needs --data-dir"),
        (DataSpec("folder", "no/such"), "--data-dir no/such does not exist; expected no/such/train/<class>"),
        (DataSpec("cifar10", "no/such"), "no/such does not exist; expected no/such/cifar-10-batches-py/"),
        (DataSpec("wds/x", "."), "is a stream and nothing can be held out of it; pass --val-fraction 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        open_splits(spec)
    assert "\n" not in str(error.value)


def test_cifar_files_missing(tmp_path):
    with pytest.raises(UserError, match=f"not found or corrupted.*expected {tmp_path}/cifar-100-python/"):
        open_splits(DataSpec("cifar100", tmp_path))


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match=r"tfds/mnist needs a package that is not installed.*tensorflow"):
        open_splits(DataSpec("tfds/mnist", tmp_path, val_fraction=0))


class TestBrokenFolders:
    def refuse(self, root: Path, message: str, **options: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            open_splits(DataSpec("folder", root, **options))
        assert "\n" not in str(error.value)

    def test_nothing_there(self, tmp_path):
        self.refuse(tmp_path, f"{tmp_path}: found 0 images.*expected .*train/<class>")

    def test_neither_folder_nor_tar(self, tmp_path):
        (tmp_path / "data.zip").touch()
        self.refuse(tmp_path / "data.zip", "neither a folder nor a .tar")

    def test_only_one_split(self, tmp_path):
        write_split(tmp_path / "train", ["a", "b"], 1)
        self.refuse(tmp_path, "found only train; expected")

    def test_empty_class_folder(self, tmp_path):
        for split in ("train", "val"):
            write_split(tmp_path / split, ["a", "b"], 3)
        (tmp_path / "train" / "c").mkdir()
        (tmp_path / "train" / ".thumbnails").mkdir()
        self.refuse(tmp_path, "train: no images in 1 classes of folder: c;")

    def test_other_classes_in_the_test_set(self, tmp_path):
        write_split(tmp_path / "train", ["a", "b"], 3)
        write_split(tmp_path / "val", ["a", "c"], 3)
        self.refuse(
            tmp_path,
            "training images and validation split have other classes: only in training: b; only in the validation",
        )

    def test_flat_folder(self, tmp_path):
        write_split(tmp_path / "train", ["a", "b"], 3)
        write_class(tmp_path / "val", 0, 5)
        self.refuse(tmp_path, "folder: the training images have class folders, the validation split none; --no-labels")

    def test_one_split_under_two_names(self, tmp_path):
        write_split(tmp_path / "train", ["a", "b"], 3)
        (tmp_path / "val").symlink_to("train")
        self.refuse(tmp_path, "train and val are the same images")

    def test_one_level_too_high(self, tmp_path):
        for split in ("train", "val"):
            write_split(tmp_path / "data" / split, ["a", "b"], 3)
        self.refuse(tmp_path, "train, val look like splits, not like classes; give --data-dir the folder that holds")

    @pytest.mark.parametrize("content", [b"", b"this is no tar"])
    def test_damaged_tar(self, tmp_path, content):
        (tmp_path / "train.tar").write_bytes(content)
        (tmp_path / "val.tar").write_bytes(content)
        self.refuse(tmp_path, "train.tar: ")

    def test_no_class_map(self, tmp_path):
        for split in ("train", "val"):
            write_split(tmp_path / split, ["a", "b"], 3)
        self.refuse(tmp_path, "class map file", class_map="nowhere.txt")


def test_importing_is_cheap():
    code = "import sys, nas.data.datasets; print(sorted({'torch', 'timm', 'sklearn', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@needs_tiny
def test_real_tar_folder_and_filter(tmp_path):
    tar = open_splits(DataSpec("folder", TINY))
    assert [len(part) for part in (tar.train, tar.val, tar.test)] == [13500, 1500, 5000]
    assert set(np.bincount(tar.val.labels)) == {15}
    for split in ("train", "val"):
        with tarfile.open(f"{TINY}/{split}.tar") as opened:
            opened.extractall(tmp_path / split, filter="data")
    folder = open_splits(DataSpec("folder", tmp_path))
    assert folder.class_names == tar.class_names
    for a, b in ((tar.train, folder.train), (tar.test, folder.test)):
        assert np.array_equal(a.labels, b.labels)
        for i in (0, 777, len(a) - 1):
            assert np.array_equal(np.asarray(a[i][0]), np.asarray(b[i][0]))
    present = set(IMAGENET100) & set(tar.class_names)
    with pytest.raises(UserError, match=f"no images in {100 - len(present)} classes of imagenet100") as error:
        open_splits(DataSpec("imagenet100", tmp_path))
    assert all(wnid in str(error.value) for wnid in set(IMAGENET100) - present)
