"""Points of the literature behind one's own: the published ones that come with the toolkit, and a user's own file.

A file is CSV with the columns network, dataset, gflops, top1 and source, and, where known, params_m, start (what the
network was made from) and note; others are left alone. gflops: of one image, MACs. params_m: millions. top1: percent.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search_spaces.errors import UserError, reason

if TYPE_CHECKING:
    import pandas as pd

NAS = Path(__file__).resolve().parents[1]
INSTALLED = NAS / "published" / "published.csv"  # where pyproject.toml puts a checkout's results/published.csv
PUBLISHED = INSTALLED if INSTALLED.is_file() else NAS.parent / "results" / "published.csv"
OWN = Path("results") / "literature.csv"  # a user's, read where it is there
WORDS, NUMBERS = ("network", "dataset", "source"), ("gflops", "top1")
OPTIONAL_NUMBERS = ("params_m",)


def read_literature(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, numbers as floats. UserError with line and column where it is not as it has to be."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, strict=True)
            head = [name.strip() for name in next(rows, [])]
            missing = [name for name in (*WORDS, *NUMBERS) if name not in head]
            if missing:
                raise UserError(
                    f"{path}: line 1 has no column {missing[0]} but {', '.join(head) or 'nothing'}; expected"
                    f" {', '.join((*WORDS, *NUMBERS))}"
                )
            return [_row(path, rows.line_num, head, cells) for cells in rows if any(cell.strip() for cell in cells)]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a CSV file of networks (docs/numbers.md)") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as CSV ({reason(error)})") from None


def _row(path: Path, line: int, head: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) != len(head):
        raise UserError(f"{path}: line {line} has {len(cells)} cells; expected {len(head)}, one for every column")
    row: dict[str, Any] = {name: cell.strip() for name, cell in zip(head, cells, strict=True)}
    for name in WORDS:
        if not row[name]:
            raise UserError(f"{path}: line {line}, column {name} is empty; expected words")
    for name in (*NUMBERS, *(n for n in OPTIONAL_NUMBERS if n in row)):
        row[name] = _number(path, line, name, row[name])
    if row["top1"] > 100:
        raise UserError(f"{path}: line {line}, column top1 is {row['top1']:g}; expected per cent, at most 100")
    return row


def _number(path: Path, line: int, name: str, cell: str) -> float:
    if not cell and name in OPTIONAL_NUMBERS:
        return math.nan
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{path}: line {line}, column {name} is {cell!r}; expected a number above 0")
    return value


def users_own() -> Path | None:
    """The file that is read unless another is given, where it is there."""
    return OWN if OWN.is_file() else None


def literature(dataset: str, own: Path | None = None) -> pd.DataFrame:
    """What was published on a data set, and then the points on it of a user's file.

    Columns as in the files. UserError as in `read_literature`.
    """
    import pandas as pd

    rows = read_literature(PUBLISHED) + (read_literature(own) if own is not None else [])
    columns = (*WORDS, *NUMBERS, *OPTIONAL_NUMBERS)
    return pd.DataFrame([row for row in rows if row["dataset"] == dataset], columns=list(columns))
