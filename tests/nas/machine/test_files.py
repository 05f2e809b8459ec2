"""A file is whole or not there, and what stands in the way of writing it is one line."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from nas.machine.files import write_atomically, write_text
from search_spaces.errors import UserError


def full(path: Path) -> None:
    """A disk that fills while the file is written."""
    path.write_text("hal")
    raise OSError(errno.ENOSPC, "No space left on device")


def torchs(path: Path) -> None:
    path.write_text("hal")
    raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0\nframe #0")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("write", [full, torchs])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*file\.txt: .*; the file that was there is untouched") as error:
        write_atomically(path, write)
    assert "\n" not in str(error.value)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "/file.txt", "a file/file.txt", "a folder"])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "a folder").mkdir()
    with pytest.raises(UserError, match="cannot write") as error:
        write_text(tmp_path / name, "text")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "a folder"]
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match=r"cannot write .*Permission denied"):
        write_text(tmp_path / "new" / "file.txt", "text")
