"""Small pictures whose brightest channel says their class, as people lay them out: folders and tars."""

import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from nas.data.images import Images

CLASSES = ("ant", "bee", "cat")
SPLITS = (("train", 20), ("val", 6))


def picture(channel: int, seed: int = 0, size: tuple[int, int] = (40, 40)) -> Image.Image:
    """Noise with one bright channel; (width, height)."""
    pixels = np.random.default_rng([channel, seed]).integers(0, 60, (*size[::-1], 3), dtype=np.uint8)
    pixels[..., channel % 3] += 150
    return Image.fromarray(pixels)


def class_folders(root: Path, counts: Iterable[tuple[str, int]] = SPLITS, suffix: str = ".jpg") -> Path:
    """<split>/<class>/<number>.jpg"""
    for split, count in counts:
        for channel, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(channel, i).save(root / split / name / f"{i:03d}{suffix}")
    return root


def as_tar(folder: Path, tar: Path) -> Path:
    """Everything in a folder, as `tar` puts it there."""
    with tarfile.open(tar, "w") as out:
        out.add(folder, ".")
    return tar


def tars_of(root: Path, to: Path) -> Path:
    """The splits of a data set as train.tar and val.tar."""
    to.mkdir(parents=True, exist_ok=True)
    for folder in sorted(root.iterdir()):
        if folder.is_dir():
            as_tar(folder, to / f"{folder.name}.tar")
    return to


def seen(images: Images) -> list[int]:
    """The class that each picture's pixels say."""
    return [int(np.asarray(images.read(i)).mean((0, 1)).argmax()) for i in range(len(images))]


def below(images: Images, split: str) -> list[str]:
    """The images' paths below their split, a folder or a tar."""
    return [images.name(i).split(f"/{split}/")[-1].split(f"/{split}.tar/")[-1] for i in range(len(images))]
