"""One stage by several processes of this machine, under torchrun: what a sweep's trial runs with --procs-per-trial."""

import csv
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from nas.config import Common, RetrainConfig, SearchConfig
from nas.machine.distributed import leave
from nas.machine.files import write_text
from nas.runs.folder import plain, typed
from nas.training.loop import OnEpoch
from search_spaces.errors import UserError

ROOT = Path(str(files("nas"))).parent  # where a process started elsewhere finds this package
KINDS: dict[str, type[Common]] = {"search": SearchConfig, "retrain": RetrainConfig}
POLL = 0.5  # seconds


def run_together(stage: str, config: Common, processes: int, on_epoch: OnEpoch) -> None:
    """Run a stage to its end by `processes` of them, which print to this one's standard output.

    on_epoch: called with the rows of log.csv as they appear. Raises UserError for what the stage refused, RuntimeError
    when a process died. The processes end with this one, however it ends.
    """
    assert config.output is not None
    folder = config.output.absolute()
    options, refused = (folder.with_name(f".{stage}.{suffix}") for suffix in ("yaml", "error"))
    write_text(options, yaml.safe_dump(plain(config), sort_keys=False))
    refused.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    job = subprocess.Popen(
        [*command, "-m", "nas.sweeps.together", stage, str(options), str(refused)],
        stdout=sys.stdout,
        stderr=subprocess.STDOUT,
        env=environment,
        preexec_fn=_end_with_parent,
    )
    told = len(_rows(folder))
    try:
        while True:
            over = job.poll() is not None
            rows = _rows(folder)
            for row in rows[told:]:
                on_epoch(row)
            told = max(told, len(rows))
            if over:
                break
            time.sleep(POLL)
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait()
        options.unlink(missing_ok=True)
    if refused.is_file():
        message = json.loads(refused.read_text())
        refused.unlink()
        raise UserError(message)
    if job.returncode:
        raise RuntimeError(f"{processes} processes ended with exit code {job.returncode}")


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; torchrun passes it on to its processes


def _rows(folder: Path) -> list[Mapping[str, Any]]:
    try:
        with open(folder / "log.csv", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def main(stage: str, options: Path, refused: Path) -> None:
    """One of the processes."""
    try:
        config: Any = KINDS[stage](**typed(KINDS[stage], yaml.safe_load(options.read_text()), options))
        if stage == "search":
            from nas.stages.search import run_search

            run_search(config)
        else:
            from nas.stages.retrain import run_retrain

            run_retrain(config)
        leave()
    except UserError as error:
        write_text(refused, json.dumps(str(error)))
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
