"""Photographs to run on: of Tiny ImageNet where it lies beside the checkout, else pictures much like photographs."""

import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared"
TINY_IMAGENET = SHARED / "data" / "tinyimagenet100"
PRETRAINED = SHARED / "pretrained" / "vit_small_patch14_dinov2_tiny100_112px.safetensors"


def photograph(seed: int, size: tuple[int, int] = (64, 64), hue: float = 0.0) -> Image.Image:
    """Light that changes slowly over the picture, a few shapes with edges, and grain. size: (width, height)."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    waves = rng.uniform(-3, 3, (3, 4))  # per colour: direction, phase, strength
    light = np.stack([np.sin(w[0] * x + w[1] * y + w[2] + hue) * w[3] * 20 for w in waves], axis=-1)
    pixels = 120 + light
    for _ in range(rng.integers(2, 6)):
        at, radius = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.3)
        inside = (x - at[0]) ** 2 + (y - at[1]) ** 2 < radius**2
        pixels[inside] = rng.uniform(0, 255, 3) + 40 * np.sin(hue + np.arange(3))
    pixels = pixels + rng.normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def class_folders(root: Path, classes: int = 20, train: int = 100, val: int = 10) -> Path:
    """root/train/<class>/*.jpg and root/val/<class>/*.jpg."""
    for split, count in (("train", train), ("val", val)):
        archive = TINY_IMAGENET / f"{split}.tar"
        if archive.is_file():
            _extract(archive, root / split, classes, count)
            continue
        for label in range(classes):
            folder = root / split / f"class{label:02d}"
            folder.mkdir(parents=True)
            for i in range(count):
                seed = zlib.crc32(f"{split} {label} {i}".encode())
                size = (48 + seed % 48, 48 + seed // 48 % 48)
                photograph(seed, size, hue=label).save(folder / f"{i}.jpg", quality=85)
    return root


def _extract(archive: Path, root: Path, classes: int, count: int) -> None:
    with tarfile.open(archive) as tar:
        images = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)
        names = sorted({Path(m.name).parent.name for m in images})[:classes]
        for name in names:
            (root / name).mkdir(parents=True)
            for member in [m for m in images if Path(m.name).parent.name == name][:count]:
                file = tar.extractfile(member)
                assert file is not None
                (root / name / Path(member.name).name).write_bytes(file.read())
