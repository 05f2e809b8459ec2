"""One trial of a sweep, in a Ray worker: the same search, and retraining, as from the command line.

Whatever is raised becomes the trial's outcome; only the death of the process or the node is left to Ray, which starts
the trial again elsewhere, where it resumes from its checkpoint.
"""

import csv
import gc
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nas.config import RetrainConfig, SearchConfig
from nas.machine.files import write_text
from nas.runs.folder import plain, typed
from nas.sweeps.storage import Storage, exclusive, scratch
from nas.sweeps.trials import Trial
from nas.training.loop import OnEpoch
from search_spaces.errors import UserError

OUTCOME = "outcome.json"  # written once, when a trial has come to its end
OUTPUT = "output.log"
STAGES = ("search", "retrain")
Report = Callable[[Mapping[str, Any]], None]


def as_plain(trial: Trial, sweep: Path, storage: Storage | None, replay: bool, processes: int = 1) -> dict[str, Any]:
    """A trial as Ray carries it to a worker. replay: report again the epochs that are done, for a scheduler."""
    return {
        "trial": trial.name,
        "sweep": str(sweep.absolute()),
        "storage": None if storage is None else storage.uri,
        "search": plain(trial.search),
        "retrain": None if trial.retrain is None else plain(trial.retrain),
        "replay": replay,
        "processes": processes,
    }


def trainable(job: dict[str, Any]) -> None:
    """What Ray Tune runs."""
    from ray import get_runtime_context, tune

    node = get_runtime_context().get_node_id()
    run_trial(job, node, lambda row: tune.report(dict(row)))


def run_trial(job: Mapping[str, Any], node: str, report: Report) -> None:
    """Run a trial to its end, from where it stands, and leave its outcome; report every epoch."""
    sweep, name = Path(job["sweep"]), job["trial"]
    storage = None if job["storage"] is None else Storage(job["storage"])
    folder = (sweep if storage is None else scratch(sweep, node)) / name
    with exclusive(folder):
        if storage is not None:
            fetch(storage, name, folder)
        if job["replay"]:
            for row in epochs_done(folder / "search"):
                report({"stage": "search", "folder": str(folder)} | row)
        if not finished(outcome_of(folder)):
            (folder / OUTCOME).unlink(missing_ok=True)
            with open(folder / OUTPUT, "a", buffering=1) as output, redirect_stdout(output):
                began = time.time()
                outcome = {"trial": name, "node": node, "process": os.getpid(), "began": began}
                outcome |= attempt(job, folder, storage, report) | {"ended": time.time()}
            write_text(folder / OUTCOME, json.dumps(outcome, indent=2) + "\n")
            if storage is not None:
                storage.push(folder, name)
    if storage is not None:
        shutil.rmtree(folder, ignore_errors=True)
    gc.collect()


def attempt(job: Mapping[str, Any], folder: Path, storage: Storage | None, report: Report) -> dict[str, Any]:
    """Both stages; {"status": done}, or failed and why."""

    def on_epoch(stage: str) -> OnEpoch:
        def send(row: Mapping[str, Any]) -> None:
            if storage is not None:
                storage.push(folder, job["trial"])
            report({"stage": stage} | figures(row, stage))

        return send

    print(f"trial {job['trial']} on {os.uname().nodename}, process {os.getpid()}")
    report({"stage": "start", "node": os.uname().nodename, "pid": os.getpid(), "folder": str(folder)})
    try:
        if not (folder / "retrain" / "config.yaml").is_file():  # not done, or not known to be
            search = SearchConfig(**typed(SearchConfig, job["search"], folder))
            run("search", here(search, folder / "search"), job["processes"], on_epoch("search"))
        if job["retrain"] is not None:
            retrain = RetrainConfig(**typed(RetrainConfig, job["retrain"], folder))
            retrain = replace(retrain, arch=folder / "search" / "arch.json")
            run("retrain", here(retrain, folder / "retrain"), job["processes"], on_epoch("retrain"))
    except UserError as error:
        print(f"error: {error}")
        return {"status": "failed", "error": str(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return {"status": "failed", "error": f"{type(error).__name__}: {error} ({folder.name}/{OUTPUT})"}
    return {"status": "done"}


def run(stage: str, config: Any, processes: int, on_epoch: OnEpoch) -> None:
    """One stage, in this process or by several."""
    if processes > 1:
        from nas.sweeps.together import run_together

        run_together(stage, config, processes, on_epoch)
    elif stage == "search":
        from nas.stages.search import run_search

        run_search(config, on_epoch)
    else:
        from nas.stages.retrain import run_retrain

        run_retrain(config, on_epoch)


def here(config: Any, folder: Path) -> Any:
    """The run in this folder, resumed where it has begun."""
    begun = (folder / "config.yaml").is_file()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)  # what has arrived of a run without its options
    return replace(config, output=folder, resume=begun)


def figures(row: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """What the table shows of an epoch; ASHA compares `held_out_top1` of the search at `iteration`."""
    shown: dict[str, Any] = {"epoch": int(float(row["epoch"]))}
    top1 = row.get("held_out_subnet_top1", row.get("held_out_large_top1"))
    if top1 not in (None, ""):
        shown["held_out_top1"] = float(top1)
    if row.get("selected_gflops") not in (None, ""):
        shown["gflops"] = float(row["selected_gflops"])
    return shown | ({"iteration": shown["epoch"]} if stage == "search" else {})


def fetch(storage: Storage, name: str, folder: Path) -> None:
    """Bring a trial's files here, and let its runs know where they are now."""
    storage.pull(name, folder)
    for stage in STAGES:
        path = folder / stage / "config.yaml"
        if path.is_file():
            options = yaml.safe_load(path.read_text())
            options["output"] = str(folder / stage)
            if stage == "retrain":
                options["arch"] = str(folder / "search" / "arch.json")
            write_text(path, yaml.safe_dump(options, sort_keys=False))


def epochs_done(run: Path) -> list[dict[str, Any]]:
    """The epochs in a run's log, as they were reported."""
    try:
        with open(run / "log.csv", newline="") as file:
            return [figures(row, "search") for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def outcome_of(folder: Path) -> dict[str, Any]:
    """How a trial ended; empty while it has not."""
    try:
        value = json.loads((folder / OUTCOME).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def finished(outcome: Mapping[str, Any]) -> bool:
    """Whether there is nothing left to do: a failed trial is tried again."""
    return outcome.get("status") in ("done", "stopped")
