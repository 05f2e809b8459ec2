"""Where a sweep's trials keep their files: the sweep's own folder, or a place that every node can reach.

On a shared place (`--storage`) a node works in a scratch folder of its own and copies what is new there after every
epoch; a node that takes a trial over fetches it from there first.
"""

import fcntl
import hashlib
import os
import posixpath
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_spaces.errors import UserError

BASES = ("basis.safetensors", "permutation.json")
WAIT = 60.0  # seconds for a process that was killed to let go of its trial
PUTS_WHOLE = ("s3", "gcs", "abfs")  # an object appears there when all of it has arrived


@dataclass(frozen=True)
class Storage:
    """A folder of a file system that pyarrow or fsspec can open."""

    uri: str

    def open(self) -> tuple[Any, str]:
        """The pyarrow file system and the path on it. UserError when no file system knows the URI."""
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

        try:
            filesystem, path = FileSystem.from_uri(self.uri)
            return filesystem, path
        except (ArrowException, OSError, ValueError) as error:
            try:
                import fsspec

                other, path = fsspec.core.url_to_fs(self.uri)
                return PyFileSystem(FSSpecHandler(other)), path
            except (ImportError, ValueError, OSError):
                raise UserError(f"--storage {self.uri}: {str(error).splitlines()[0]}") from None

    def push(self, folder: Path, name: str) -> None:
        """Copy every file of `folder` that is newer than its copy; each is whole there or as it was."""
        from pyarrow.fs import FileType, LocalFileSystem, copy_files

        filesystem, root = self.open()
        there = {info.path: info for info in listing(filesystem, posixpath.join(root, name))}
        # the basis first, in which the checkpoint stands, and that before the tables, which are written again from it
        files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
        for file in sorted(files, key=lambda p: (p.name not in BASES, p.suffix != ".pt", str(p))):
            target = posixpath.join(root, name, file.relative_to(folder).as_posix())
            info = there.get(target)
            fresh = info is not None and info.type == FileType.File and info.size == file.stat().st_size
            if fresh and info is not None and info.mtime_ns is not None and info.mtime_ns >= file.stat().st_mtime_ns:
                continue
            filesystem.create_dir(posixpath.dirname(target), recursive=True)
            whole = filesystem.type_name in PUTS_WHOLE
            arriving = target if whole else posixpath.join(posixpath.dirname(target), f".{file.name}.arriving")
            copy_files(str(file), arriving, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem)
            if not whole:
                filesystem.move(arriving, target)

    def pull(self, name: str, folder: Path) -> None:
        """Fetch every file of a trial, each whole."""
        from pyarrow.fs import FileType, LocalFileSystem, copy_files

        filesystem, root = self.open()
        base = posixpath.join(root, name)
        for info in listing(filesystem, base):
            relative = Path(posixpath.relpath(info.path, base))
            if info.type != FileType.File or relative.name.startswith("."):
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            arriving = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            copy_files(info.path, str(arriving), source_filesystem=filesystem, destination_filesystem=LocalFileSystem())
            os.replace(arriving, target)


def listing(filesystem: Any, path: str) -> list[Any]:
    """Every file below a path; none where there is no such folder."""
    from pyarrow.fs import FileSelector

    return list(filesystem.get_file_info(FileSelector(path, allow_not_found=True, recursive=True)))


def storage_of(place: str | None, sweep: Path) -> Storage | None:
    """The sweep's own part of --storage; None where there is none. A plain path is a shared folder."""
    if place is None:
        return None
    uri = place if "://" in place else Path(place).absolute().as_uri()
    return Storage(posixpath.join(uri.rstrip("/"), sweep.name))


def scratch(sweep: Path, node: str) -> Path:
    """Where a node works on trials that live elsewhere."""
    import tempfile

    key = hashlib.sha256(f"{os.getuid()} {sweep}".encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"vit-nas-{key}" / node


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process at a time in a trial's folder. UserError when another one does not let go of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        give_up = time.monotonic() + WAIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise UserError(f"{folder}: another process is at work on this trial; end it first") from None
                time.sleep(0.2)
        yield
