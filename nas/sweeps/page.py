"""A sweep as one HTML file that needs nothing else: a plot to hover over, a table to sort, links to the runs."""

import csv
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nas.machine.files import write_text
from nas.pictures.run import find_runs, plot_together, run_points
from nas.sweeps.trials import MEASURES, TRIALS
from search_spaces.errors import UserError

PAGE = "index.html"
TEMPLATE = Path(__file__).with_name("page.html")
COSTS = {"gflops": "GFLOPs (MACs)", "params": "parameters", "images_per_s": "images/s at batch 32"}
LABELS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "held_out_top1": "held-out top-1 (%)",
    "held_out": "held out",
    **COSTS,
}
WORDS = ("trial", "status", "stage", "split", "held_out", "error")  # never numbers, whatever they look like
HIDDEN = ("search", "retrain")  # they become links
FILES = {"choices.png": "choices", "curves.png": "curves", "arch.json": "arch"}


def write_page(sweep: Path) -> Path:
    """Write index.html from trials.csv and the files of the runs. UserError when there is no table."""
    path = sweep / TRIALS
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        raise UserError(f"{path} is not there; give the folder of a sweep") from None
    text = json.dumps(page_data(sweep, rows), ensure_ascii=False).replace("<", "\\u003c")  # no tag ends the script
    template = TEMPLATE.read_text(encoding="utf-8")
    write_text(sweep / PAGE, template.replace("DATA</script>", f"{text}</script>", 1))
    return sweep / PAGE


def page_data(sweep: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """What the page shows, as its script reads it."""
    names = [name for name in (rows[0] if rows else {"trial": ""}) if name not in HIDDEN]
    names = [n for n in names if n in ("trial", "status") or any(row[n] for row in rows)]
    columns: list[dict[str, Any]] = []
    for name in names:
        known = name in MEASURES or name == "status" or name.startswith("config.")
        columns.append({"key": name, "label": LABELS.get(name, name.removeprefix("config.")), "tip": known})
        columns[-1] |= {"word": True} if name in WORDS else {}
    columns.insert(1, {"key": "links", "label": "runs", "links": True, "word": True})
    cells = [{n: row[n] if n in WORDS else number(row[n]) for n in row} | {"links": links(sweep, row)} for row in rows]
    costs = [{"key": k, "label": v, "more": k == "images_per_s"} for k, v in COSTS.items() if k in names]
    count = {s: sum(row["status"] == s for row in rows) for s in dict.fromkeys(row["status"] for row in rows)}
    words = f"{len(rows)} trials: " + ", ".join(f"{n} {status}" for status, n in count.items())
    return {
        "title": sweep.resolve().name,
        "words": words,
        "columns": columns,
        "rows": cells,
        "costs": costs or [{"key": "gflops", "label": COSTS["gflops"], "more": False}],
    }


def number(text: str) -> float | str | None:
    """A cell as a number where it is one, None where it is empty."""
    if text == "":
        return None
    try:
        value = float(text)
    except ValueError:
        return text
    return value if abs(value) < float("inf") else text


def links(sweep: Path, row: dict[str, str]) -> list[dict[str, str]]:
    """To the folders of a trial's runs and to what lies in them, relative to the page."""
    found = []
    for stage in HIDDEN:
        run = row.get(stage)
        if run:
            found.append({"label": stage, "href": f"{quote(run)}/"})
            found += [
                {"label": label, "href": f"{quote(run)}/{file}"}
                for file, label in FILES.items()
                if (sweep / run / file).is_file()
            ]
    if row["trial"] and (sweep / row["trial"] / "output.log").is_file():
        found.append({"label": "log", "href": f"{quote(row['trial'])}/output.log"})
    return found


def plot_sweep(folder: Path, x: str = "gflops") -> list[Path]:
    """The Pareto picture and the page of a sweep, whose runs have their own; the paths written."""
    points = [p for run in find_runs(folder) for p in run_points(run)]
    return [*plot_together(folder, points, x), *page_of(folder)]


def page_of(folder: Path) -> list[Path]:
    """index.html of a sweep."""
    from nas.sweeps.page import write_page

    return [write_page(folder)]
