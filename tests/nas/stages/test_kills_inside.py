"""Invariant 7 by signals from outside: twenty ends at random moments, of both stages, by one process and by two."""

import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

from nas.machine.stopping import RESUME_ME
from tests.forked import FORK
from tests.nas.machine.test_distributed import free_port
from tests.nas.run_checks import assert_whole, draw_pictures
from tests.nas.stages.test_inside import assert_same_bytes

ROOT = Path(__file__).parents[3]
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGTERM)
COMMON = """--dataset folder --model-kwargs patch_size=8 embed_dim=24 depth=2 num_heads=4 --val-fraction 0.2 --epochs 8
 --batch-size 16 --threads 1 --device cpu --mixup 0.5 --drop-path 0.2 --checkpoint-every 3steps"""
RUNS = {  # script, processes, options
    "gradient": ("search.py", 1, "--space vit-dan-nano --alphas 1 2 4 --budget 0.6 --arch-lr 0.3 --workers 2"),
    "channels by score": ("search.py", 2, "--space vit-kcr-nano --budget 0.75 --workers 0"),
    "minimax": ("search.py", 1, "--space vit-uvc-nano --budget 0.5 --warmup-epochs 1 --workers 0"),
    "adjoined": ("retrain.py", 2, "--space vit-an-nano --alpha 2 --model-ema --workers 0"),
}


def stage(script: str, options: list[str], rank: int, processes: int, port: int, log: Path) -> None:
    """In a process of its own: one of those that torchrun would start."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    quick()
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [script, *options]
    runpy.run_path(script, run_name="__main__")


def quick() -> None:
    """Drawing and timing take longer than a tiny run."""
    import nas.stages.retrain
    import nas.stages.search

    nas.stages.search.plot_run = nas.stages.retrain.plot_run = lambda folder: None  # type: ignore[assignment,misc]
    nas.stages.retrain.images_per_second = lambda networks, *_: dict.fromkeys(networks, 1.0)  # type: ignore[misc]


def started(script: str, processes: int, options: list[str], log: Path) -> list[multiprocessing.Process]:
    port = free_port()
    ranks = [FORK.Process(target=stage, args=(script, options, r, processes, port, log)) for r in range(processes)]
    for process in ranks:
        process.start()
    return ranks  # type: ignore[return-value]


def saved_at(folder: Path) -> int:
    checkpoint = folder / "checkpoint.pt"
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0


def ended(ranks: list[multiprocessing.Process], by: signal.Signals, moments: random.Random) -> list[int | None]:
    """One of the processes hears the signal; of a kill the others hear, too, as torchrun has it. Their exit codes."""
    victim = moments.choice(ranks)
    assert victim.pid is not None
    os.kill(victim.pid, by)
    for process in ranks:
        if by == signal.SIGKILL:
            process.kill()
        process.join(120)
    return [process.exitcode for process in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_7_a_run_ended_five_times_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    script, processes, own = RUNS[name]
    options = ["--data-dir", str(draw_pictures(tmp_path / "pictures")), *COMMON.split(), *own.split()]
    log, moments = tmp_path / "log.txt", random.Random(name)
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "ended"
    for process in started(script, processes, [*options, "--output", str(undisturbed)], log):
        process.join(300)
        assert process.exitcode == 0, log.read_text()[-3000:]
    again = [*options, "--output", str(folder), "--resume", "auto"]
    for by in ENDS:
        before = saved_at(folder)
        ranks = started(script, processes, again, log)
        while saved_at(folder) == before and all(process.is_alive() for process in ranks):
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.2))
        expected = -signal.SIGKILL if by == signal.SIGKILL else RESUME_ME
        assert ended(ranks, by, moments) == [expected] * processes, (by, log.read_text()[-3000:])
        assert_whole(folder)
    for process in started(script, processes, again, log):
        process.join(300)
        assert process.exitcode == 0, log.read_text()[-3000:]
    assert_same_bytes(folder, undisturbed)
    assert log.read_text().count("go on with --output DIR --resume") == 3  # said by one of the processes
