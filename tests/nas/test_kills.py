"""Invariant 7 with kill -9: whenever a search is killed, its files are whole and it resumes to the same run."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.nas.runs import assert_same_run, assert_whole, draw_pictures, visible

ROOT = Path(__file__).parents[2]
# Runs search.py, and sends SIGKILL to itself in the n-th call of a function: before its work, or, in the middle
# of a write, when half of the file (the second argument) is there.
DRIVER = """
import importlib, os, runpy, signal, sys
module, name, call, half = sys.argv[1:5]
del sys.argv[:5]
sys.argv.insert(0, "search.py")
import nas.search
module, calls = importlib.import_module(module), 0
function = getattr(module, name)
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(call):
        if half == "half":
            function(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
setattr(module, name, dying)
runpy.run_path("search.py", run_name="__main__")
"""
KILLS = [  # one after the other, each in the run that the one before left
    ("os", "replace", "1", ""),  # the very first file
    ("nas.loop", "update_weights", "3", ""),
    None,  # at a random moment after the next epoch was saved
    ("torch", "save", "1", "half"),  # half a checkpoint
    None,
    ("nas.loop", "write_tables", "2", ""),  # the first is the resume's own, if there is a checkpoint by now
    ("nas.search", "top_k", "1", ""),  # in validation
    None,
    ("nas.checkpoint", "save_file", "1", "half"),  # all epochs done, half of the weights written
]


OPTIONS = """--space vit-dan-nano --alphas 1 2 4 --budget 0.6 --arch-lr 0.3 --drop-path 0.2 --mixup 0.5
 --model-kwargs patch_size=8 embed_dim=24 depth=2 num_heads=4 --val-fraction 0.2 --epochs 12 --batch-size 16
 --workers 0 --threads 1 --device cpu"""


def saved_at(folder: Path) -> int:
    """When the last epoch was saved; 0 when none was."""
    checkpoint = folder / "checkpoint.pt"
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


@pytest.mark.slow
def test_7_a_killed_search_resumes_to_the_run_that_was_not(tmp_path: Path) -> None:
    options = ["--dataset", "folder", "--data-dir", str(draw_pictures(tmp_path / "pictures")), *OPTIONS.split()]
    python = [sys.executable, "search.py", *options]
    folder, undisturbed, moments = tmp_path / "killed", tmp_path / "undisturbed", random.Random(7)
    subprocess.run([*python, "--output", undisturbed], check=True, cwd=ROOT, capture_output=True)
    for kill in KILLS:
        place = ["--output", str(folder)] + ["--resume"] * (folder / "config.yaml").exists()
        command = python if kill is None else [sys.executable, "-c", DRIVER, *kill, *options]
        before = saved_at(folder)
        with subprocess.Popen(
            [*command, *place], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            if kill is None:
                while saved_at(folder) == before and process.poll() is None:
                    time.sleep(0.002)
                time.sleep(moments.uniform(0.0, 0.3))
                process.kill()
            output = process.communicate(timeout=300)[0]
        assert process.returncode == -signal.SIGKILL, output.decode()
        if folder.exists():
            assert_whole(folder)
    subprocess.run([*python, "--output", folder, "--resume"], check=True, cwd=ROOT, capture_output=True)
    assert_whole(folder)
    assert_same_run(folder, undisturbed)
    assert visible(folder).keys() == visible(undisturbed).keys()  # pictures too
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []  # halves are swept up
