"""Invariant 7 with kill -9: whenever a search is killed, its files are whole and it resumes to the same run."""

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.forked import FORK
from tests.nas.run_checks import assert_same_run, assert_whole, draw_pictures, visible

ROOT = Path(__file__).parents[3]
# Where SIGKILL strikes: in the n-th call of a function, before its work or, with "half", in the middle of a write,
# when half of the file (its second argument) is there. None: at a random moment after the next epoch was saved.
Kill = tuple[str, str, int, str] | None
KILLS: list[Kill] = [  # one after the other, each in the run that the one before left
    ("os", "replace", 1, ""),  # the very first file
    ("nas.training.loop", "update_weights", 3, ""),  # in the first epoch
    None,
    ("torch", "save", 1, "half"),  # half a checkpoint
    None,
    ("nas.training.state", "write_tables", 2, ""),  # the first is the resume's own, if there is a checkpoint by now
    ("nas.training.scores", "top_k", 1, ""),  # in validation
    None,
    ("torch", "save", 2, "half"),
    None,
    ("nas.training.loop", "update_weights", 1, ""),  # in the first step after a resume
    None,
    ("nas.training.scores", "top_k", 2, ""),
    None,
    ("os", "replace", 5, ""),
    None,
    ("nas.training.loop", "update_weights", 9, ""),
    ("nas.stages.search", "scores_of", 1, ""),  # all epochs done
    ("nas.networks.weights", "save_file", 1, "half"),  # half of the weights written
    ("nas.pictures.run", "save", 2, ""),  # among the pictures
]
OPTIONS = """--space vit-dan-nano --alphas 1 2 4 --budget 0.6 --arch-lr 0.3 --drop-path 0.2 --mixup 0.5
 --model-kwargs patch_size=8 embed_dim=24 depth=2 num_heads=4 --val-fraction 0.2 --epochs 16 --batch-size 16
 --workers 0 --threads 1 --device cpu"""


def search(options: list[str], kill: Kill, log: Path) -> None:
    """In a process of its own: search.py, and its death if it is to die of its own hand."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    if kill is not None:
        module, name, call, half = kill
        function, calls = getattr(import_module(module), name), 0

        def dying(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                if half:
                    function(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)  # type: ignore[call-overload]
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        setattr(import_module(module), name, dying)
    sys.argv = ["search.py", *options]
    runpy.run_path("search.py", run_name="__main__")


def saved_at(folder: Path) -> int:
    """When the last epoch was saved; 0 when none was."""
    checkpoint = folder / "checkpoint.pt"
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


@pytest.mark.slow
def test_7_a_search_killed_twenty_times_resumes_to_the_run_that_was_not(tmp_path: Path) -> None:
    options = ["--dataset", "folder", "--data-dir", str(draw_pictures(tmp_path / "pictures")), *OPTIONS.split()]
    python = [sys.executable, "search.py", *options]
    folder, undisturbed, moments = tmp_path / "killed", tmp_path / "undisturbed", random.Random(7)
    log = tmp_path / "log.txt"
    subprocess.run([*python, "--output", undisturbed], check=True, cwd=ROOT, capture_output=True)
    assert len(KILLS) == 20
    for kill in KILLS:
        place = ["--output", str(folder)] + ["--resume"] * (folder / "config.yaml").exists()
        before = saved_at(folder)
        process = FORK.Process(target=search, args=([*options, *place], kill, log))
        process.start()
        if kill is None:
            while saved_at(folder) == before and process.is_alive():
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.15))
            process.kill()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, (kill, log.read_text())
        if folder.exists():
            assert_whole(folder)
    subprocess.run([*python, "--output", folder, "--resume"], check=True, cwd=ROOT, capture_output=True)
    assert_whole(folder)
    assert_same_run(folder, undisturbed)
    assert visible(folder).keys() == visible(undisturbed).keys()  # pictures too
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []  # halves are swept up
