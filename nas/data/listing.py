"""Which files under a split are its images, and of which class: one rule for folders and for tars.

The class of an image is the folder directly under the split, however deep below it the image lies. What ends like an
image that Pillow decodes is one; what other programs leave behind is not. Whatever is left out is counted by kind.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nas.data.decoding import suffixes

OTHERS = "files or folders of other programs"
NO_FILE = "links that lead nowhere and other things that are no files"
LOOP = "links to a folder that they lie in"
UNNAMED = "images of classes that the class map does not name"
# Beside everything hidden (.DS_Store, .ipynb_checkpoints, ._x.jpg): what file managers and systems leave. Lower case.
LEFT_BEHIND = frozenset(
    {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "$recycle.bin", "lost+found"}
    | {"system volume information", "__pycache__", "icon\r"}
)


@dataclass(frozen=True, slots=True)
class Found:
    """Something that lies under a split. path: below it, parts joined by "/"; kind: why it cannot be read, if so.

    place: where its bytes are. order: what it is sorted by.
    """

    path: str
    place: Any
    order: str
    kind: str | None = None


@dataclass
class LeftOut:
    """What lies beside a split's images. paths: of each kind (".txt", or one of the kinds above)."""

    paths: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, kind: str, path: str) -> None:
        self.paths.setdefault(kind, {})[path] = None

    def counts(self) -> dict[str, int]:
        """{kind: how many}"""
        return {kind: len(paths) for kind, paths in self.paths.items()}

    def words(self) -> str:
        """In one line; nothing where nothing was left out."""
        return ", ".join(f"{len(paths)} {kind} ({few(list(paths), 3)})" for kind, paths in self.paths.items())


@dataclass(frozen=True)
class Listing:
    """The images of a split in order, their classes, and what is to be said of them. above: folders above the classes.

    Where every image lies under one and the same folder, and none of them in it, the classes are the folders in that.
    """

    images: list[Found]
    above: str
    left_out: LeftOut

    def class_of(self, image: Found) -> str:
        """The name of its class; "" where it lies outside of any folder."""
        folder, slash, _ = image.path[len(self.above) :].partition("/")
        return folder if slash else ""

    def folders_beside(self) -> set[str]:
        """The folders where the classes are in which something was left out, other programs' aside."""
        own = (path for kind, paths in self.left_out.paths.items() if kind != OTHERS for path in paths)
        parts = (path[len(self.above) :].partition("/") for path in own if path.startswith(self.above))
        return {folder for folder, slash, _ in parts if slash}

    def nested(self) -> list[str]:
        """The images that do not lie in their class's folder itself."""
        return [image.path for image in self.images if image.path.count("/", len(self.above)) > 1]


def list_images(found: Iterable[Found], known: Iterable[str] = ()) -> Listing:
    """The images among what was found, in natural order of their paths. known: names that can only be classes."""
    left_out, images, beside = LeftOut(), [], []
    for thing in found:
        others = foreign(thing.path)
        kind = OTHERS if others else _kind(thing)
        if kind is None:
            images.append(thing)
            continue
        left_out.add(kind, others or thing.path)
        beside += [] if others else [thing.path]
    images.sort(key=lambda image: natural_key(image.order))
    above = _above([image.path for image in images], beside, set(known))
    return Listing(images, above, left_out)


def natural_key(name: str) -> list[Any]:
    """timm's order of names: by the numbers in them as numbers, and without regard to case."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name.lower()))]


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted so. Those that it does not tell apart (Ant and ant, 1 and 01) follow their characters' codes."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def is_foreign(name: str) -> bool:
    """Whether a file or folder of this name is another program's."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def walk(folder: str) -> Iterator[Found]:
    """Everything under a folder, links followed, but for what lies in folders of other programs. Raises OSError."""
    return _walk(folder, "", ())


def _walk(folder: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[Found]:
    status = os.stat(folder)
    here = status.st_dev, status.st_ino
    if here in above:
        yield Found(below.rstrip("/"), None, below, LOOP)
        return
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        path = below + entry.name
        if is_foreign(entry.name):
            yield Found(path, None, path)
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _walk(entry.path, f"{path}/", (*above, here))
        else:
            is_file = os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()
            yield Found(path, entry.path, path, None if is_file else NO_FILE)


def _kind(thing: Found) -> str | None:
    """Why something of a user's own is left out; None of an image."""
    suffix = os.path.splitext(thing.path)[1].lower()
    if thing.kind is None and suffix not in suffixes():
        return suffix or "without a suffix"
    return thing.kind


def foreign(path: str) -> str | None:
    """The path up to a name that is another program's; None where there is none."""
    parts = path.split("/")
    return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if is_foreign(part)), None)


def _above(images: list[str], beside: list[str], known: set[str]) -> str:
    """The folders that every image's path begins with and in which no image lies, "a/b/", up to where they divide.

    What lies beside the images, in another folder, divides them too. known: names of classes.
    """
    above = ""
    while images:
        folder = images[0][len(above) :].partition("/")[0]
        deeper = f"{above}{folder}/"
        whole = all(path.startswith(deeper) and "/" in path[len(deeper) :] for path in images)
        if not whole or folder in known or any(_divides(path, above, deeper) for path in beside):
            return above
        above = deeper
    return above


def _divides(path: str, above: str, deeper: str) -> bool:
    return not path.startswith(deeper) and "/" in path[len(above) :]


def few(names: Iterable[Any], limit: int = 10) -> str:
    """Some names as they can be printed, and how many more."""
    known = [printable(str(name)) for name in names]
    return ", ".join(known[:limit]) + (f" and {len(known) - limit} more" if len(known) > limit else "")


def printable(name: str) -> str:
    """A file's name on one line and in any encoding: what cannot be printed as an escape."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
