"""Signals: noted or obeyed, and what a data loading process makes of them."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from nas.data.images import Images, Source
from nas.data.loader import train_loader
from nas.data.transforms import LoaderSpec
from nas.machine.every import Clock, Every, every
from nas.machine.stopping import RESUME_ME, Preempted, at_next_step, at_once
from search_spaces.errors import UserError

SPEC = LoaderSpec(batch_size=4, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0, workers=2)


def test_a_signal_is_noted_inside_and_ends_the_program_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with at_once():
        with at_next_step() as asked:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            assert asked.signal == "SIGUSR1"
        with pytest.raises(Preempted) as stopped:
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == RESUME_ME == 75 and stopped.value.words == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def black(i: int) -> Image.Image:
    return Image.new("RGB", (8, 8))


def images() -> Images:
    return Images(Source(black, "{}".format, np.zeros(64, dtype=np.int64), None))


def test_loading_processes_outlive_a_schedulers_signals_and_epochs() -> None:
    loader = train_loader(images(), SPEC, 0, "cpu")
    batches = iter(loader)
    next(batches)
    workers = [w.pid for w in loader._loader._iterator._workers]  # type: ignore[union-attr]
    sender = (
        "import os, signal, sys; [os.kill(int(p), s) for p in sys.argv[1:] for s in (signal.SIGTERM, signal.SIGUSR1)]"
    )
    subprocess.run([sys.executable, "-c", sender, *map(str, workers)], check=True)
    assert len(list(batches)) == 15
    loader.set_epoch(1, start=10)
    assert len(list(loader)) == 6 and loader.position == 16
    assert [w.pid for w in loader._loader._iterator._workers] == workers  # type: ignore[union-attr]


def program(start: str, main: str) -> list[str]:
    """A command whose loading processes start so, and which then runs this."""
    script = f"""
        import multiprocessing, os, signal
        from tests.nas.machine.test_stopping import SPEC, images
        from nas.data.loader import train_loader
        multiprocessing.set_start_method("{start}")
        loader = train_loader(images(), SPEC, 0, "cpu")
        if __name__ == "__main__":
            {main}
    """
    return [sys.executable, "-c", textwrap.dedent(script)]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_a_program_ends_though_its_loading_processes_live_on(start: str) -> None:
    line = program(start, "print(len(list(loader)), flush=True)")
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "16\n"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "forkserver"])
def test_no_loading_process_outlives_a_program_that_is_killed(start: str) -> None:
    said = "print(*(child.pid for child in multiprocessing.active_children()), flush=True)"
    line = program(start, f"len(list(loader)); {said}; os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, timeout=120)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and pids
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


def test_how_often() -> None:
    texts = {
        "90s": Every(seconds=90),
        "1.5m": Every(seconds=90),
        "2h": Every(seconds=7200),
        "500steps": Every(steps=500),
    }
    assert {text: every(text, "--log-every") for text in texts} == texts
    for text in ("", "5", "0s", "-3m", "1d", "steps", "0steps"):
        with pytest.raises(UserError, match=r"--log-every .*expected a time or a number of steps"):
            every(text, "--log-every")
    clock = Clock(Every(steps=3), step=4)
    assert [clock.due(step) for step in (5, 6, 7, 8)] == [False, False, True, True]
    clock.restart(7)
    assert not clock.due(9) and clock.due(10)
    soon = Clock(Every(seconds=0.01), 0)
    assert not soon.due(10**6)
    time.sleep(0.02)
    assert soon.due(0)


def test_generators_are_put_back() -> None:
    import random

    from nas.machine.randomness import generators, put_back, seed_everything

    def drawn() -> tuple[float, float, float, list[float]]:
        return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    seed_everything(3, 1)
    drawn()  # numpy now has a normal number in store
    state = generators(torch.device("cpu"))
    first = drawn()
    put_back(state, torch.device("cpu"))
    assert drawn() == first
