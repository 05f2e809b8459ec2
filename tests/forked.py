"""Processes that find torch and timm imported: a start costs milliseconds instead of seconds."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["nas.stages.search", "nas.stages.retrain", "nas.plot", "timm", "torch._dynamo"])


def run_python(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> tuple[int, str, str]:
    """`python ARGUMENTS` (a script, or -m and a module) in a folder: exit code, what it printed, its errors."""
    files = log.with_suffix(".out"), log.with_suffix(".err")
    process = FORK.Process(target=_begin, args=(arguments, folder, environment, *files))
    process.start()
    process.join()
    printed, errors = (file.read_text() for file in files)
    assert process.exitcode is not None
    return process.exitcode, printed, errors


def _begin(arguments: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
