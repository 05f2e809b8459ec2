"""Redraw the pictures of runs from their files.

    python -m nas.plot results/

draws, in every run folder below: choices.png (which candidate each block leans to), curves.png (losses,
accuracy, cost, schedules), steps.png (a minimax search, step by step), pareto.png and pareto.pdf (accuracy against
cost, among the other runs on the same dataset); and in the folder itself, and in every sweep's, the Pareto picture
of all its runs, and a sweep's page. What a run's files do not hold is left out; nothing but pictures and pages is
written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nas.failing import errors
from nas.pictures.figures import X_AXES
from nas.pictures.literature import read_literature
from nas.pictures.run import RUN_FILES, SWEEP_FILE, _hidden, find_runs, plot_run, plot_together, run_points
from nas.sweeps.page import page_of
from search_spaces.errors import UserError

if TYPE_CHECKING:
    pass


def plot_all(root: Path, x: str = "gflops", beside: Sequence[Path] = (), behind: Path | None = None) -> list[Path]:
    """Redraw every run at or below `root`, and the Pareto pictures of `root` and of its sweeps, with their pages.

    beside: further runs, sweeps or folders of them, whose points join every Pareto picture. behind: a file of the
    literature instead of the runs' own. Raises UserError when there is no run, or that file is not as it has to be.
    """
    if behind is not None:
        read_literature(behind)
    for place in (root, *beside):
        if not place.is_dir():
            raise UserError(f"{place}: no such folder; give a run's folder, or one that holds runs")
    runs = find_runs(root)
    if not runs:
        raise UserError(f"{root}: no run in it ({', '.join(RUN_FILES)}); give the folder that search.py wrote")
    own = {run.resolve() for run in runs}
    joining = dict.fromkeys(run for place in beside for run in find_runs(place) if run.resolve() not in own)
    extra = [p for run in joining for p in run_points(run)]
    points = [*(p for run in runs for p in run_points(run)), *extra] if runs != [root] or extra else None
    written = [path for run in runs for path in plot_run(run, points, x, behind)]
    sweeps = {f.parent for f in root.rglob(SWEEP_FILE) if not _hidden(f, root)}
    for folder in sorted(sweeps | ({root} - set(runs))):
        inside = [p for p in points or [] if Path(p["run"]).is_relative_to(folder.resolve())]
        shared = {p["dataset"] for p in inside}
        written += plot_together(folder, [*inside, *(p for p in extra if p["dataset"] in shared)], x, behind)
    for folder in sorted(sweeps):
        written += page_of(folder)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit code 2 after one line on stderr when there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m nas.plot", description="Redraw the pictures of runs.")
    parser.add_argument("folder", type=Path, help="a run's folder, or one that holds runs, e.g. results/")
    parser.add_argument("--x", choices=tuple(X_AXES), default="gflops", help="cost axis of the Pareto pictures")
    words = "more folders, whose runs join the Pareto pictures: other sweeps, runs of one factor for the uniform line"
    parser.add_argument("--with", type=Path, nargs="+", default=[], dest="beside", metavar="FOLDER", help=words)
    words = "CSV file of networks to draw behind the runs on the same data set (docs/numbers.md)"
    parser.add_argument("--literature", type=Path, metavar="FILE", help=words)
    options = parser.parse_args(arguments)
    with errors(parser.prog):
        for path in plot_all(options.folder, options.x, options.beside, options.literature):
            print(path)


if __name__ == "__main__":
    main()
