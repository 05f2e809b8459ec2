"""What lies in a tar, and in tars inside it, and where: the files of a data set that is one tar.

timm's reader either keeps the tar open, and forked workers would share its file offset, or opens and scans it for each
image, which takes longer than to decode a small one. Here a file is found once and read at its place.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path

from nas.data.listing import NO_FILE, Found, foreign, printable
from search_spaces.errors import UserError

SUFFIX = ".tar"
Place = tuple[int, int]  # a file's first byte in the outermost tar, and how many it has


def members(path: Path) -> list[Found]:
    """Everything in a tar but its folders; a tar inside it is a folder of its name. A name that comes again replaces.

    Raises UserError where the tar is cut short or damaged, OSError and tarfile.TarError where it is none.
    """
    with tarfile.open(path, "r:") as tar:
        found = {thing.path: thing for thing in _scan(tar, 0, "", path)}
    return list(found.values())


def read_member(path: Path, place: Place) -> bytes:
    """A file's bytes. The tar is opened anew: processes share the offset of one that was open before they forked."""
    start, size = place
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _scan(tar: tarfile.TarFile, start: int, below: str, path: Path) -> Iterator[Found]:
    """What is in a tar that begins at byte `start` of the file, in the folder `below`. path: for messages."""
    files: dict[str, Place] = {}
    links: dict[str, str] = {}
    orders: dict[str, str] = {}
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # it would keep a kilobyte of each
        name = _plain(member.name)
        orders[name] = member.name
        links.pop(name, None)
        if member.isreg() and not member.issparse():
            if name.lower().endswith(SUFFIX) and not foreign(name):
                yield from _inside(tar, member, start, below + name[: -len(SUFFIX)] + "/", path)
            else:
                files[name] = start + member.offset_data, member.size
        elif member.issym():
            links[name] = _plain(posixpath.join(posixpath.dirname(name), member.linkname))
        elif member.islnk():
            links[name] = _plain(member.linkname)
        elif not member.isdir():
            yield Found(below + name, None, member.name, NO_FILE)
    _check_end(tar, f"{path}: {printable(below[:-1])}{SUFFIX} inside it" if below else str(path))
    for name in [*files, *links]:
        place = files.get(_end_of(name, links))
        yield Found(below + name, place, orders[name], None if place else NO_FILE)


def _inside(tar: tarfile.TarFile, member: tarfile.TarInfo, start: int, below: str, path: Path) -> Iterator[Found]:
    """What is in a tar inside a tar."""
    try:
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
            yield from _scan(inner, start + member.offset_data, below, path)
    except tarfile.TarError as error:
        raise UserError(f"{path}: {printable(member.name)} inside it is not a readable tar ({error})") from error


def _plain(name: str) -> str:
    """A member's name without "./", "//" and the like."""
    return posixpath.normpath(name).lstrip("/")


def _end_of(name: str, links: dict[str, str]) -> str:
    """Where a link leads, over other links; a circle leads nowhere."""
    passed: set[str] = set()
    while name in links and name not in passed:
        passed.add(name)
        name = links[name]
    return name


def _check_end(tar: tarfile.TarFile, words: str) -> None:
    """Refuse a tar that does not end as one: Python stops without a word at a header that is cut short or damaged."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    rest = file.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise UserError(f"{words} is cut short or damaged (no end mark at byte {tar.offset}); make or fetch it again")
    while chunk := file.read(1 << 20):
        if chunk.count(0) < len(chunk):
            raise UserError(f"{words} has more behind its end mark: several tars in one file? unpack them into folders")
