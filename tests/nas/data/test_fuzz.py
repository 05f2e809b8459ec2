"""Small data sets, broken in random ways: read with the right labels, or refused in one line, and left as they were."""

import gzip
import io
import os
import random
import shutil
import stat
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nas.data.datasets import DataSpec, Splits, open_splits
from nas.data.images import UNREADABLE, Images
from nas.data.listing import OTHERS
from nas.data.loader import eval_loader, train_loader
from nas.data.transforms import LoaderSpec
from search_spaces.errors import UserError

SEED = int(os.environ.get("FUZZ_SEED", "0"))
INPUTS = 300
SPEC = LoaderSpec(batch_size=2, input_size=(3, 8, 12), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0)
SAVED = (  # suffix, mode
    (".jpg", "RGB"), (".jpg", "L"), (".JPEG", "CMYK"), (".png", "RGB"), (".png", "L"), (".png", "P"), (".png", "RGBA"),
    (".png", "LA"), (".png", "I;16"), (".tif", "RGB"), (".tiff", "I;16"), (".tif", "F"), (".webp", "RGB"),
    (".webp", "RGBA"), (".bmp", "RGB"), (".gif", "P"), (".pgm", "I;16"), (".TGA", "RGB"), (".jp2", "L"),
)  # fmt: skip
STRANGE = ("sp ace", "é", "new\nline", "tab\t", "1²3", "-x", "a" * 200, os.fsdecode(b"\xff"), "{}", "%s", "x.jpg", "'")


def brightness(k: int) -> int:
    """What the pictures of class k are filled with."""
    return 30 + 90 * k


def write_picture(rng: random.Random, path: Path, k: int) -> None:
    suffix, mode = rng.choice(SAVED)
    size = rng.randint(4, 14), rng.randint(4, 14)
    image: Any = Image.new("L", size, brightness(k))
    if mode == "I;16":
        image = Image.fromarray(np.full(size[::-1], brightness(k) * 257, np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full(size[::-1], brightness(k) / 255, np.float32))
    else:
        image = image.convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    options = {"exif": exif} if suffix in (".jpg", ".JPEG", ".webp", ".tif") and rng.random() < 0.3 else {}
    image.save(path.with_name(path.name + suffix), **options)


def make(rng: random.Random, root: Path) -> None:
    for split, count in (("train", rng.randint(3, 6)), ("val", rng.randint(1, 3))):
        for k, name in enumerate(("ant", "bee", "10")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write_picture(rng, root / split / name / f"{i}", k)


# What can go wrong with a folder. Each is given the data's folder.
def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def truncated(rng: random.Random, root: Path) -> None:
    path = rng.choice(files(root))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) + 1)])


def flipped(rng: random.Random, root: Path) -> None:
    path = rng.choice(files(root))
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        if content:
            content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def renamed(rng: random.Random, root: Path) -> None:
    path = rng.choice(files(root))
    suffix = rng.choice([path.suffix, path.suffix.upper(), "", ".txt", ".jpg", ".png", ".heic", ".tar", "."])
    path.rename(path.with_name(rng.choice(STRANGE) + suffix))


def class_renamed(rng: random.Random, root: Path) -> None:
    name, new = rng.choice(("ant", "bee", "10")), rng.choice(STRANGE)
    for split in ("train", "val"):
        if (root / split / name).is_dir() and not (root / split / new).exists():
            (root / split / name).rename(root / split / new)


def nested(rng: random.Random, root: Path) -> None:
    for path in sorted(set(rng.choices(files(root), k=5))):
        if path.parent.parent.parent == root:
            deep = path.parent / rng.choice(("2024", "bee", "train", "x/y"))
            deep.mkdir(parents=True, exist_ok=True)
            path.rename(deep / path.name)


def wrapped(rng: random.Random, root: Path) -> None:
    for split in rng.choice((("train", "val"), ("train",), ("val",))):
        if (root / split).is_dir():
            (root / split).rename(root / "inner")
            (root / split / "data").mkdir(parents=True)
            (root / "inner").rename(root / split / "data" / split)


def lost_class(rng: random.Random, root: Path) -> None:
    name = rng.choice(("ant", "bee", "10"))
    for split in rng.choice((("train", "val"), ("train",), ("val",))):
        shutil.rmtree(root / split / name, ignore_errors=True)


def emptied_class(rng: random.Random, root: Path) -> None:
    for path in files(root / rng.choice(("train", "val"))):
        if path.parent.name == "bee":
            path.unlink()


def lost_split(rng: random.Random, root: Path) -> None:
    shutil.rmtree(root / rng.choice(("train", "val")), ignore_errors=True)


def split_renamed(rng: random.Random, root: Path) -> None:
    split, name = rng.choice(
        (("train", "Train"), ("train", "training"), ("val", "test"), ("val", "VAL"), ("val", "dev"))
    )
    if (root / split).is_dir():
        (root / split).rename(root / name)


def foreign(rng: random.Random, root: Path) -> None:
    name = rng.choice(
        (".ipynb_checkpoints/1.jpg", "__MACOSX/ant/._1.jpg", "ant/._1.jpg", "Thumbs.db", "@eaDir/x/y.png")
    )
    path = root / rng.choice(("train", "val")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x00\x05\x16\x07")


def beside(rng: random.Random, root: Path) -> None:
    path = (
        root / rng.choice(("train", "val", "train/ant", "val/bee", ".")) / rng.choice(("labels.txt", "a.xml", "none"))
    )
    if path.parent.is_dir():
        path.write_text("ant")


def loose(rng: random.Random, root: Path) -> None:
    target = root / rng.choice(("train", "val", "."))
    if target.is_dir():
        write_picture(rng, target / "loose", 0)


def folder_like_an_image(rng: random.Random, root: Path) -> None:
    (root / "train" / "ant" / "folder.jpg").mkdir(parents=True, exist_ok=True)


def linked(rng: random.Random, root: Path) -> None:
    folder = root / "train" / "ant"
    if folder.is_dir() and not (folder / "link.jpg").is_symlink():
        (folder / "link.jpg").symlink_to(rng.choice(("nowhere.jpg", ".", "..", "link.jpg", "../../val")))


def a_pipe(rng: random.Random, root: Path) -> None:
    if (root / "val").is_dir() and not (root / "val" / "pipe.png").exists():
        os.mkfifo(root / "val" / "pipe.png")


def locked(rng: random.Random, root: Path) -> None:
    path = rng.choice([root / "train", *files(root)])
    if path.exists():
        path.chmod(0)


BREAKS: tuple[Callable[[random.Random, Path], None], ...] = (
    truncated, flipped, renamed, class_renamed, nested, wrapped, lost_class, emptied_class, lost_split, split_renamed,
    foreign, beside, loose, folder_like_an_image, linked, a_pipe, locked,
)  # fmt: skip


def packed(rng: random.Random, root: Path) -> None:
    """The splits as tars, their members in any order, perhaps a tar for each class, perhaps broken."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        rng.shuffle(names)
        tar = root / f"{folder.name}.tar"
        with tarfile.open(tar, "w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))) as out:
            if rng.random() < 0.2:
                for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
                    data = io.BytesIO()
                    with tarfile.open(fileobj=data, mode="w") as part:
                        part.add(inner, rng.choice((".", inner.name)))
                    member = tarfile.TarInfo(f"{inner.name}.tar")
                    member.size = len(data.getvalue())
                    out.addfile(member, io.BytesIO(data.getvalue()))
            else:
                for name in names:
                    out.add(folder / name, rng.choice((f"./{name}", str(name))), recursive=False)
        shutil.rmtree(folder)
        way, content = rng.random(), tar.read_bytes()
        if way < 0.2:
            tar.write_bytes(content[: rng.randrange(len(content))])
        elif way < 0.3:
            with tarfile.open(tar) as whole:
                at = rng.choice([0, *(member.offset for member in whole.getmembers())])  # a header, not pixels
            tar.write_bytes(content[:at] + bytes(rng.randrange(256) for _ in range(512)) + content[at + 512 :])
        elif way < 0.35:
            tar.write_bytes(content + content)
        elif way < 0.4:
            tar.write_bytes(gzip.compress(content))


def state(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything about a folder that could be written over."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path)] = status.st_mode, status.st_size, status.st_mtime_ns, content
    return found


def read_all(splits: Splits) -> None:
    """Every image through the loaders of a run."""
    for images in (splits.train, splits.val, splits.test):
        if images is not None:
            list(eval_loader(images, SPEC, "cpu"))
    list(train_loader(splits.train, SPEC, 0, "cpu"))


def brightnesses(images: Images) -> dict[int, set[int]]:
    """{label: the classes that its pictures show}"""
    found: dict[int, set[int]] = defaultdict(set)
    for i in range(len(images)):
        try:
            mean = np.asarray(images.read(i)).mean()
        except UNREADABLE:
            continue
        found[images.label(i)].add(round((mean - 30) / 90))
    return found


def check_labels(splits: Splits) -> None:
    """One label shows one class, in training and test images alike, and no other label shows it."""
    train, test = brightnesses(splits.train), brightnesses(splits.test)
    for label, classes in (*train.items(), *test.items()):
        assert len(classes) == 1 and classes == train.get(label, classes), (label, train, test)
    assert len(set.union(*train.values())) == len(train)


def check_counts(root: Path, splits: Splits) -> None:
    """No file of the two splits is missing from both the images and what was left out."""
    roots = [root / Path(images.name(0)).relative_to(root).parts[0] for images in (splits.train, splits.test)]
    there = {path for split in roots for path in split.rglob("*") if not path.is_dir()}
    own = [
        path
        for path in there
        if not any(part.startswith((".", "__", "@", "Th")) for part in path.parts[len(root.parts) :])
    ]
    counted = sum(count for kind, count in splits.left_out.items() if kind != OTHERS)
    assert len(splits.train) + len(splits.test) + counted == len(own)


def one_input(rng: random.Random, root: Path) -> str:
    """Make a data set, break it, read it; what came of it."""
    make(rng, root)
    breaks = rng.sample(BREAKS, rng.choice((0, 1, 1, 1, 2, 3)))
    for wrong in breaks:
        if files(root):
            wrong(rng, root)
    is_tar = rng.random() < 0.35
    if is_tar:
        packed(rng, root)
    before = state(root)
    spec = DataSpec(rng.choice(("folder", "folder", "folder", "", "imagenet100", "torch/folder")), root, val_fraction=0)
    refusal = ""
    try:
        splits = open_splits(spec)
        if not {truncated, flipped, linked} & set(breaks):  # a link to all of val makes that a part of one class
            check_labels(splits)
            if spec.dataset != "torch/folder" and not is_tar:
                check_counts(root, splits)
        assert all(line.isprintable() for line in splits.remarks)
        read_all(splits)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal and "Traceback" not in refusal, refusal
    assert state(root) == before
    return "refused" if refusal else "read"


@pytest.mark.slow
def test_300_small_inputs_are_read_rightly_or_refused_in_one_line(tmp_path: Path) -> None:
    print(f"FUZZ_SEED={SEED}")
    outcomes: list[str] = []
    for number in range(INPUTS):
        rng, root = random.Random(f"{SEED} {number}"), tmp_path / str(number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of what is damaged
                outcomes.append(one_input(rng, root))
        except BaseException as error:
            error.add_note(f"input {number} of FUZZ_SEED={SEED}, in {root}")
            raise
        shutil.rmtree(root, ignore_errors=True)
    assert len(outcomes) == INPUTS and min(outcomes.count("read"), outcomes.count("refused")) > INPUTS // 10
