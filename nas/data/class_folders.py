"""One split: a folder of class folders, or a tar of them, as images with labels and with what is to be said of them."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nas.data.decoding import EIGHT_BITS, depth, opened
from nas.data.images import Source
from nas.data.listing import UNNAMED, Found, Listing, few, is_foreign, list_images, natural_order, printable, walk
from nas.data.tars import SUFFIX, Place, members, read_member
from search_spaces.errors import UserError

LOOKED_INTO = 100  # images of a split, for what is said of their depth


def read_split(
    path: Path, name: str, classes: dict[str, int] | str | None, expected: str, labels: bool = True
) -> Source:
    """The images of one folder of class folders, or of one tar of them; or of a flat one, without labels.

    name: the data set's. classes: {class: label} where they are published, or the file of a class map. expected: the
    layout, for messages. labels: whether class folders are to be any. Raises UserError where there are no images, or
    none of some class, or where their class is not said.
    """
    try:
        mapped = _class_map(classes, path)
        listing = _listed(path, known=mapped or (), expected=expected)
    except UserError:
        raise
    except Exception as error:  # a folder that cannot be listed, a damaged tar, no class map: each raises its own
        raise UserError(f"{path}: {one_line(error)}; {expected}") from error
    found = [listing.class_of(image) for image in listing.images]
    outside = found.count("")
    if listing.images and (not labels or (outside == len(found) and classes is None)):
        return _unlabelled(path, listing)
    if outside:
        raise UserError(
            f"{path}: {outside} images lie outside of any class folder; expected {path}/<class>/*.JPEG, or --no-labels,"
            " which takes all of them"
        )
    class_to_idx = mapped or {n: label for label, n in enumerate(natural_order(set(found)))}
    images, numbers = [], []
    for image, class_name in zip(listing.images, found, strict=True):
        if class_name in class_to_idx:
            images.append(image)
            numbers.append(class_to_idx[class_name])
        elif isinstance(classes, str):
            listing.left_out.add(UNNAMED, image.path)
    if not images:
        words = listing.left_out.words()
        raise UserError(f"{path}: found 0 images{f', but {words}' if words else ''}; {expected}")
    if absent := _without_images(path, listing, classes, set(found)):
        raise UserError(f"{path}: no images in {len(absent)} classes of {name}: {few(absent, 100)}; {expected}")
    return _source(path, listing, images, np.array(numbers, dtype=np.int64), names_by_label(class_to_idx), True)


def _unlabelled(path: Path, listing: Listing) -> Source:
    """All images, wherever they lie."""
    return _source(path, listing, listing.images, np.zeros(len(listing.images), dtype=np.int64), None, False)


def _source(
    path: Path,
    listing: Listing,
    images: Sequence[Found],
    labels: NDArray[np.int64],
    names: tuple[str, ...] | None,
    labelled: bool,
) -> Source:
    paths = [image.path for image in images]
    in_tar = partial(_read_member, path, [image.place for image in images])
    source = Source(
        in_tar if path.is_file() else partial(_read_file, path, paths),
        partial(_name, path, paths),
        labels,
        names,
        left_out=listing.left_out.counts(),
        labelled=labelled,
    )
    layout = _layout_said(listing) if labelled else ()
    lines = (*layout, *_depths_said(paths, source), *_left_out_said(listing))
    return replace(source, remarks=tuple(f"{path}: {line}" for line in lines))


def _listed(path: Path, known: Iterable[str], expected: str) -> Listing:
    if not path.is_file():
        return list_images(walk(str(path)), known)
    if path.suffix.lower() != SUFFIX:
        raise UserError(f"{path} is neither a folder nor a .tar file; {expected}")
    return list_images(members(path), known)


def _class_map(classes: dict[str, int] | str | None, path: Path) -> dict[str, int] | None:
    """{class: label} of a class map; an empty line of its file, such as a last one, names none."""
    if not classes or isinstance(classes, dict):
        return classes or None
    from timm.data.readers.class_map import load_class_map

    mapped = {str(name): label for name, label in load_class_map(classes, str(path)).items() if name != ""}
    wrong = [name for name, label in mapped.items() if not isinstance(label, int) or label < 0]
    if wrong or not mapped:
        what = f"labels that are no numbers from 0, of {few(wrong)}" if wrong else "no classes"
        raise UserError(f"--class-map {classes}: {what}; expected one class per line, or {{class: label}} in a pickle")
    return mapped


def _read_file(root: Path, paths: Sequence[str], index: int) -> Image.Image:
    return opened((root / paths[index]).read_bytes())


def _read_member(tar: Path, places: Sequence[Place], index: int) -> Image.Image:
    return opened(read_member(tar, places[index]))


def _name(root: Path, paths: Sequence[str], index: int) -> str:
    return printable(f"{root}/{paths[index]}")


def _without_images(path: Path, listing: Listing, classes: dict[str, int] | str | None, found: set[str]) -> list[str]:
    """Published classes, or class folders, that have no images: empty, or with nothing but what is left out.

    A class map may name more than there is. Of a tar's folders only those count in which something lies.
    """
    if isinstance(classes, dict):
        return [name for name in classes if name not in found]
    if classes:
        return []
    if path.is_file():
        return natural_order(listing.folders_beside() - found)
    absent: list[str] = []
    for filled in [*({name} for name in listing.above.split("/")[:-1]), found]:
        absent += [d.name for d in path.iterdir() if d.is_dir() and not is_foreign(d.name) and d.name not in filled]
        path = path / min(filled)  # the one folder above the classes
    return sorted(absent)


def _layout_said(listing: Listing) -> Iterator[str]:
    """What was made of folders that are not plainly <class>/<image>."""
    if listing.above:
        yield f"all images lie under {printable(listing.above)}, so the classes are the folders in that"
    if nested := listing.nested():
        yield (
            f"{len(nested)} of {len(listing.images)} images lie in subfolders of their class's folder"
            f" ({few(nested, 3)}); their class is the outermost"
        )


def _depths_said(paths: Sequence[str], source: Source) -> Iterator[str]:
    """What is done to images of more than 8 bits, each with one of them, as far as a look into some images tells."""
    said: set[str] = set()
    candidates = [i for i, path in enumerate(paths) if os.path.splitext(path)[1].lower() not in EIGHT_BITS]
    for i in candidates[:: max(1, len(candidates) // LOOKED_INTO)]:
        try:
            words = depth(source.read(i))
        except OSError:  # it is said when the image is to be used
            continue
        if words is not None and words not in said:
            said.add(words)
            yield f"{words} (such as {source.name(i)})"


def _left_out_said(listing: Listing) -> Iterator[str]:
    if words := listing.left_out.words():
        yield f"left out {words}"


def names_by_label(class_to_idx: dict[str, int]) -> tuple[str, ...] | None:
    """Class names in label order; None when the labels are not 0, 1, …, each once."""
    by_label = sorted(class_to_idx.items(), key=lambda item: item[1])
    if not by_label or [label for _, label in by_label] != list(range(len(by_label))):
        return None
    return tuple(str(name) for name, _ in by_label)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
