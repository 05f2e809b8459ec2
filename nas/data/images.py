"""A set of labelled images and its parts: what is held out, what is read, which transform it carries."""

import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.data.decoding import as_seen
from search_spaces.errors import UserError

# What decoders raise on a file that is not the image it should be.
UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True)
class Source:
    """One set of n images as it lies on the disk, before it is split."""

    read: Callable[[int], Image.Image]  # opens one image, of any mode; raises UNREADABLE
    name: Callable[[int], str]  # the file's name, for messages
    labels: NDArray[np.int64]  # (n,); all 0 where there are none
    class_names: tuple[str, ...] | None  # in label order
    remarks: tuple[str, ...] = ()  # what a user is to be told of the files, a line each
    left_out: Mapping[str, int] = field(default_factory=dict)  # {kind of file: how many} that lie beside the images
    labelled: bool = True

    def unlabelled(self) -> "Source":
        """The same images, whose labels are not to be read."""
        return replace(self, labels=np.zeros_like(self.labels), class_names=None, labelled=False)


class Images:
    """Some images of a source: a map-style dataset of (RGB image or what `transform` makes of it, int label).

    Parts of one source carry transforms of their own.
    """

    def __init__(self, source: Source, indices: NDArray[np.int64] | None = None) -> None:
        self.source = source
        self.indices = np.arange(len(source.labels)) if indices is None else indices
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        image = self.read(position)
        return image if self.transform is None else self.transform(image), self.label(position)

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,), known without decoding an image."""
        return self.source.labels[self.indices]

    def counts(self, num_classes: int) -> list[int]:
        """How many images each class has, (num_classes,)."""
        return np.bincount(self.labels, minlength=num_classes).tolist()  # type: ignore[no-any-return]

    def label(self, position: int) -> int:
        return int(self.source.labels[self.indices[position]])

    def read(self, position: int, exif: bool = True) -> Image.Image:
        """The decoded image, RGB (`as_seen`). Raises UNREADABLE, where timm's dataset would silently give the next.

        exif: turn it as its EXIF data says.
        """
        return as_seen(self.source.read(int(self.indices[position])), exif)

    def name(self, position: int) -> str:
        return self.source.name(int(self.indices[position]))

    def split(self, fraction: float) -> tuple["Images", "Images"]:
        """What is left, and the stratified `fraction` that is held out of it (`held_out`)."""
        out = held_out(self.labels, fraction)
        return Images(self.source, self.indices[~out]), Images(self.source, self.indices[out])


def held_out(labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Which of n images to hold out: round(fraction · n) in all, spread evenly over the classes.

    labels (n,) -> bool (n,). No seed and no random numbers: inside a class they lie at equal distances in the
    dataset's own order, so that every run, machine and library version holds out the same. Each class keeps
    at least one image. Raises UserError when that holds out nothing.
    """
    classes, counts = np.unique(labels, return_counts=True)
    ideal = counts * fraction
    take = np.floor(ideal).astype(np.int64)
    short = round(float(ideal.sum())) - int(take.sum())
    take[np.argsort(take - ideal, kind="stable")[:short]] += 1  # largest remainders, ties to the lower label
    take = np.minimum(take, counts - 1)
    if not take.any():
        raise UserError(
            f"a fraction of {fraction:g} of {len(labels)} images in {len(classes)} classes holds out none; "
            "give more images, a larger --val-fraction, or --val-fraction 0"
        )
    out = np.zeros(len(labels), dtype=np.bool_)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # positions, ascending
    for positions, number in zip(by_class, take, strict=True):
        if number:
            out[positions[((np.arange(number) + 0.5) * len(positions) / number).astype(np.int64)]] = True
    return out
