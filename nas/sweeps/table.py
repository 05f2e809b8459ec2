"""A sweep's table: trials.csv on disk, and the same live on the terminal."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nas.data.split_names import held_out_words, trained_before
from nas.machine.files import write_csv
from nas.sweeps.trial import epochs_done, outcome_of
from nas.sweeps.trials import MEASURES, TRIALS, Trial, short

STATES = ("done", "stopped", "failed", "running", "waiting")
SHOWN = 30  # rows of the live table; the rest is counted


class TrialTable:
    """One row per trial, from the folders and from what Ray reports; written whenever a trial changes its state."""

    def __init__(self, sweep: Path, trials: Sequence[Trial]) -> None:
        self.sweep, self.trials = sweep, {t.name: t for t in trials}
        self.rows = [trial_row(sweep, t) for t in trials]
        self.by_name = {row["trial"]: row for row in self.rows}
        self.live: dict[str, dict[str, Any]] = {}
        self.display: Any = None
        self.write()

    def write(self) -> None:
        """trials.csv, whole."""
        write_csv(self.sweep / TRIALS, self.rows)

    def started(self, name: str) -> None:
        """Ray has given the trial a worker."""
        self.live.setdefault(name, {})["since"] = time.monotonic()
        self._change(name, "running")

    def epoch(self, name: str, result: Mapping[str, Any]) -> None:
        """An epoch is done."""
        seen = {k: result[k] for k in ("stage", "epoch", "held_out_top1", "gflops", "node") if k in result}
        self.live.setdefault(name, {}).update(seen)
        self._refresh()

    def lost(self, name: str) -> None:
        """Its process or node is gone; it will be started again."""
        self.by_name[name]["restarts"] = int(self.by_name[name]["restarts"] or 0) + 1
        self._change(name, "waiting")

    def ended(self, name: str) -> None:
        """It is done, stopped or failed, as its folder says."""
        row = trial_row(self.sweep, self.trials[name])
        kept = {k: self.by_name[name][k] for k in ("status", "restarts")}
        self.by_name[name].update(row | kept)
        self._change(name, row["status"])

    def _change(self, name: str, status: str) -> None:
        before, self.by_name[name]["status"] = self.by_name[name]["status"], status
        self.write()
        if self.display is None and before != status:
            print(" ".join(self._words(name)), flush=True)
        self._refresh()

    def _words(self, name: str) -> list[str]:
        row = self.by_name[name]
        if row["status"] == "waiting":
            return [f"trial {name}: its process or node is lost; it is started again"]
        top1 = [f"{row['top1']:.2f} % on the {row['split']}"] if isinstance(row["top1"], float) else []
        error = [f"({row['error']})"] if row["error"] else []
        return [f"trial {name} ({self.trials[name].words()}): {row['status']}", *top1, *error]

    def _refresh(self) -> None:
        if self.display is not None:
            self.display.update(self.table())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The live table while trials run; lines where there is no terminal."""
        if not sys.stdout.isatty():
            yield
            return
        from rich.live import Live

        with Live(self.table(), refresh_per_second=2) as self.display:
            try:
                yield
            finally:
                self.display.update("")
                self.display, display = None, self.display
                display.refresh()

    def table(self) -> Any:
        """All trials, or those that run and the latest, with what is known of each."""
        from rich.table import Table

        options = list(next(iter(self.trials.values())).values)
        count = Counter(row["status"] for row in self.rows)
        title = ", ".join(f"{count[s]} {s}" for s in STATES if count[s])
        scores = ("held-out top-1 (%)", "top-1 (%)")
        table = Table("trial", *options, "status", "stage", "epoch", *scores, "GFLOPs", "s", title=title)
        rank = {"running": 0, "failed": 1, "waiting": 3}
        chosen = sorted(self.rows, key=lambda r: rank.get(r["status"], 2))[:SHOWN]
        for row in sorted(chosen, key=lambda r: str(r["trial"])):
            name = row["trial"]
            live = self.live.get(name, {})
            since = f"{time.monotonic() - live['since']:.0f}" if row["status"] == "running" else ""
            keys = ("held_out_top1", "top1", "gflops")
            values = [short(row[k] if row[k] != "" else live.get(k, "")) for k in keys]
            cells = [row["status"], live.get("stage", ""), live.get("epoch", ""), *values, since]
            table.add_row(name, *(short(v) for v in self.trials[name].values.values()), *map(str, cells))
        return table

    def print_all(self) -> None:
        """The table at the end."""
        from rich.console import Console

        self.display = None
        Console().print(self.table(), highlight=False)


def trial_row(sweep: Path, trial: Trial) -> dict[str, Any]:
    """A trial as its folder has it: the compact network where it was retrained, the search's subnet otherwise."""
    from nas.pictures.run import run_points
    from nas.pictures.scatter import WHOLE

    folder = sweep / trial.name
    outcome = outcome_of(folder)
    row: dict[str, Any] = {"trial": trial.name}
    row |= {f"config.{option}": short_or_plain(value) for option, value in trial.values.items()}
    row |= {"status": outcome.get("status", "waiting"), "stage": "", "split": ""} | dict.fromkeys(MEASURES, "")
    row |= {"held_out": held_out_of(trial)}
    row |= {"epochs": "", "restarts": "", "error": outcome.get("error", ""), "search": "", "retrain": ""}
    done = epochs_done(folder / "search")
    if done:
        row |= {"epochs": done[-1]["epoch"]}
        if row["status"] == "stopped":  # all there is to know of it
            row |= {k: done[-1][k] for k in ("held_out_top1", "gflops") if k in done[-1]} | {"stage": "search"}
            row |= {"top1": row["held_out_top1"], "split": row["held_out"]}
    for stage in ("search", "retrain"):
        run = folder / stage
        if not run.is_dir():
            continue
        row[stage] = f"{trial.name}/{stage}"
        for point in run_points(run):
            if point["role"] not in WHOLE:
                row |= {k: point[k] for k in MEASURES if point[k] == point[k]}
                row |= {"stage": stage, "split": point["split"]}
    return row


def held_out_of(trial: Trial) -> str:
    """What the images of `held_out_top1` are, in words."""
    search = trial.resolved()
    return held_out_words(trained_before(search.pretrained, search.checkpoint))


def short_or_plain(value: Any) -> Any:
    """A value as a cell of a CSV file: whole, lists with spaces."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value
