"""Files that are whole or not there: a temporary name, then a rename."""

import contextlib
import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from search_spaces.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, rename it over `path`.

    Whatever goes wrong, `path` is the old file or the new one. A full disk is a UserError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; the file that was there is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def copy_atomically(source: Path, path: Path) -> None:
    """Give a file that is only ever replaced whole a second name: a hard link, or a copy where there are none."""

    def link_or_copy(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(path, link_or_copy)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda p: p.write_text(text))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows at once; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")
