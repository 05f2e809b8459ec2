"""Threads are chosen by what a step takes with them, unless they are given."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import nas.machine.threads
from nas.config import SearchConfig
from nas.machine.cores import usable_cores
from nas.machine.options import MachineOptions
from nas.machine.threads import affordable, timed_by_threads, with_threads
from nas.stages.search import run_search
from tests.nas.run_checks import draw_pictures

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch begins with four threads, and OMP_NUM_THREADS says nothing."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[int], None]]:
    """Makes a step that takes so many seconds of a clock that stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(nas.machine.threads.time, "perf_counter", lambda: now[0])

    def step(by_threads: dict[int, float]) -> Callable[[int], None]:
        def work(images: int) -> None:
            now[0] += images * by_threads[torch.get_num_threads()]

        return work

    return step


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 0.04, 2: 0.021, 4: 0.011}, 4),
        ({1: 0.04, 2: 0.13, 4: 0.2}, 1),  # another program has a core
        ({1: 0.04, 2: 0.03, 4: 0.06}, 2),
        ({1: 0.04, 2: 0.039, 4: 0.041}, 1),  # as good with fewer
    ],
)
def test_the_fastest_is_taken_set_and_said(
    clock: Callable[..., Callable[[int], None]],
    seconds: dict[int, float],
    best: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = with_threads(MachineOptions(), CPU, clock(seconds), images=8)
    assert options.threads == best == torch.get_num_threads()
    said = capsys.readouterr().out
    assert f"threads: {best} of 4; a step takes {8 * seconds[best]:.2g} s" in said


def test_what_is_slower_is_not_gone_into_further(clock: Callable[..., Callable[[int], None]]) -> None:
    tried: list[int] = []
    work = clock({1: 0.1, 2: 1.0, 4: 100.0})

    def watched(images: int) -> None:
        tried.append(torch.get_num_threads())
        work(images)

    found = timed_by_threads(watched, 1, most=4)
    assert found == pytest.approx({1: 0.1, 2: 1.0})
    assert tried == [1, 1, 1, 1, 2, 2]  # once unmeasured; then as long as it may still be the fastest
    torch.set_num_threads(1)
    assert sorted(timed_by_threads(clock({1: 6.0, 3: 2.0, 6: 1.0}), 1, most=6)) == [1, 3, 6]


def test_a_long_step_is_timed_on_fewer_images(clock: Callable[..., Callable[[int], None]]) -> None:
    torch.set_num_threads(1)
    assert affordable(clock({1: 0.05}), images=64) == 10
    assert affordable(clock({1: 9.0}), images=64) == 1
    assert affordable(clock({1: 0.001}), images=64) == 64


@pytest.mark.parametrize("given", ["option", "environment", "torchrun", "accelerator", "one core"])
def test_nothing_is_timed_where_there_is_nothing_to_choose(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(images: int) -> None:
        raise AssertionError("timed")

    options, device = MachineOptions(threads=3 if given == "option" else None), CPU
    if given == "environment":
        monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "4")
    if given == "torchrun":
        monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    if given == "accelerator":
        device = torch.device("cuda")
    if given == "one core":
        torch.set_num_threads(1)
    assert with_threads(options, device, work, images=8) is options


@pytest.mark.slow
def test_a_run_records_its_threads_goes_on_with_them_and_draws_no_number_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SearchConfig(
        space="vit-dan-nano",
        model_kwargs=("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4"),
        dataset="folder",
        data_dir=draw_pictures(tmp_path / "pictures"),
        workers=0,
        epochs=1,
        batch_size=16,
        output=tmp_path / "run",
    )
    monkeypatch.setattr(nas.machine.threads, "timed_by_threads", lambda work, images, most: {1: 0.1, 2: 0.3})
    run_search(config)
    assert "threads: 1 of 4; a step takes 0.1 s, 0.3 s with 2 (--threads)" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["threads"] == 1
    torch.set_num_threads(4)
    run_search(replace(config, resume=True))  # of a run from before threads were chosen: torch's own
    assert "threads:" not in capsys.readouterr().out
    torch.set_num_threads(1)
    run_search(replace(config, threads=1, output=tmp_path / "given"))
    weights = [(tmp_path / name / "supernet.safetensors").read_bytes() for name in ("run", "given")]
    assert weights[0] == weights[1]


def test_seconds_are_seconds() -> None:
    assert nas.machine.threads.seconds_of(lambda images: time.sleep(0.02 * images), 2) == pytest.approx(0.04, abs=0.03)


def test_workers_are_no_more_than_the_cores_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 7, 8}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # a system without
    assert usable_cores() == 64
