"""Sweeps on real Ray processes: what they leave, alone or when workers, nodes and the driver are killed."""

import contextlib
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nas.sweeps.storage import scratch
from tests.nas.run_checks import assert_same_run, assert_whole

ROOT = Path(__file__).parents[3]
EPOCHS = 25  # a fast machine takes 0.1 s for each, and must not finish before it is killed
OPTIONS = f"""--space vit-dan-nano --alphas 1 2 4 --arch-lr 0.3 --epochs {EPOCHS} --batch-size 64
 --model-kwargs patch_size=8 embed_dim=24 depth=2 num_heads=4"""
TINY = OPTIONS.split()
ALONE = [*TINY, "--threads", "1"]
LIMIT = 240  # seconds for anything below: far more than it takes


class Sweep:
    """search.py --sweep in a process of its own, and the folder that it fills."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        command = [sys.executable, "search.py", *TINY, "--output", str(folder), *arguments]
        with open(folder.parent / "driver.log", "ab") as log:
            self.process = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def says(self) -> str:
        return (self.folder.parent / "driver.log").read_text()

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "trials.csv").read_text().splitlines()))

    def wait(self) -> int:
        return int(self.process.wait(timeout=LIMIT))

    def until(self, what: Any) -> Any:
        """The first true value of what()."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if found := what():
                return found
            assert self.process.poll() is None, self.says()
            time.sleep(0.05)
        raise AssertionError(self.says())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


@pytest.fixture
def sweeps(tmp_path: Path) -> Iterator[Any]:
    """Starts sweeps, and leaves none of their processes behind."""
    started: list[Sweep] = []

    def start(*arguments: str) -> Sweep:
        started.append(Sweep(tmp_path / "sweep", *arguments))
        return started[-1]

    yield start
    for sweep in started:
        for process in [sweep.process] if sweep.process.poll() is None else []:
            for child in [*process.children(recursive=True), process]:
                child.kill()


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two raylets of one core each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def worker_of(folder: Path) -> psutil.Process:
    """The process that works on a trial now."""
    pid = re.findall(r"process (\d+)", (folder / "output.log").read_text())[-1]
    return psutil.Process(int(pid))


def epochs(folder: Path) -> int:
    log = folder / "search" / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def assert_each_epoch_once(folder: Path, restarts: int = 0) -> None:
    """The log has every epoch once; what was printed shows that only an interrupted one was run again.

    A kill between an epoch's row and its line leaves the line out.
    """
    every = set(range(1, EPOCHS + 1))
    with open(folder / "search" / "log.csv") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == sorted(every)
    output = (folder / "output.log").read_text()
    assert output.count("process ") == 1 + restarts
    printed = [int(n) for n in re.findall(r"^epoch (\d+)/", output, re.MULTILINE)]
    assert set(printed) <= every and len(every - set(printed)) <= restarts
    assert len(printed) - len(set(printed)) <= restarts


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process and its descendants can be reached."""
    found = set()
    try:
        own = {p.pid for p in [process, *process.children(recursive=True)]}
    except psutil.NoSuchProcess:
        return found
    for connection in psutil.net_connections("inet"):
        if connection.pid in own and connection.status == psutil.CONN_LISTEN:
            found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


@pytest.mark.slow
def test_a_trial_is_the_same_command_without_ray_and_nothing_listens_outside(sweeps: Any, tmp_path: Path) -> None:
    """One worker for both trials: the second runs in a process that has run the first. A third fails, alone."""
    sweep = sweeps(
        "--epochs", "2", "--max-concurrent", "1", "--retrain-trials", "--sweep", "seed=0,1",
        "--sweep", "retrain.epochs=randint(2,3)", "--trials", "1",  # two: a draw, so Ray is imported early
        "--sweep", "alphas=1 2 4,1 5",
    )  # fmt: skip
    heard, places = set[str](), set[str]()
    while sweep.process.poll() is None:
        heard |= listening(sweep.process)
        with contextlib.suppress(FileNotFoundError, IndexError, psutil.NoSuchProcess):
            places.add(worker_of(sweep.folder / "000").cwd())
        time.sleep(1)
    assert heard and heard <= {"127.0.0.1", "::1"}
    assert places == {str(ROOT)}  # where the command was typed, under `uv run`, too: paths mean there what they say
    assert sweep.process.returncode == 1, sweep.says()
    rows = sweep.rows()
    assert [r["trial"] for r in rows] == ["000", "001", "002", "003"]
    assert [r["status"] for r in rows] == ["done", "failed", "done", "failed"]
    assert all("alpha" in r["error"] for r in rows if r["status"] == "failed")
    workers = {re.findall(r"process (\d+)", (sweep.folder / t / "output.log").read_text())[0] for t in ("000", "002")}
    assert len(workers) == 1
    python, found, trained = sys.executable, tmp_path / "found", tmp_path / "trained"
    options = ["--seed", "1", "--epochs", "2", "--threads", "1"]
    subprocess.run([python, "search.py", *ALONE, *options, "--output", found], cwd=ROOT, check=True)
    retrain = [python, "retrain.py", "--arch", found, *options, "--output", trained]
    subprocess.run(retrain, cwd=ROOT, check=True)
    assert_same_run(sweep.folder / "002/search", found)
    assert_same_run(sweep.folder / "002/retrain", trained)
    assert rows[2]["stage"] == "retrain" and rows[2]["split"] == "test fifth"
    assert float(rows[2]["images_per_s"]) > 0
    for name in ("pareto.png", "pareto.pdf", "index.html"):
        assert (sweep.folder / name).stat().st_size > 1000
    assert not list(sweep.folder.glob(".tune*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of seed 0 that nobody kills."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    subprocess.run([sys.executable, "search.py", *ALONE, "--seed", "0", "--output", folder], cwd=ROOT, check=True)
    return folder


@pytest.mark.slow
def test_a_killed_worker_costs_an_epoch(sweeps: Any, cluster: Any, undisturbed: Path) -> None:
    sweep = sweeps("--sweep", "seed=0,1", "--ray-address", cluster.address)
    trial = sweep.folder / "000"
    sweep.until(lambda: epochs(trial) >= 2)
    worker_of(trial).kill()
    assert sweep.wait() == 0, sweep.says()
    assert [(r["trial"], r["status"], r["restarts"]) for r in sweep.rows()] == [
        ("000", "done", "1"),
        ("001", "done", ""),
    ]
    assert_each_epoch_once(trial, restarts=1)
    assert_each_epoch_once(sweep.folder / "001")
    assert_whole(trial / "search")
    assert_same_run(trial / "search", undisturbed)


@pytest.mark.slow
def test_a_killed_node_leaves_its_trial_to_the_other(
    sweeps: Any, cluster: Any, undisturbed: Path, tmp_path: Path
) -> None:
    """The nodes share nothing but --storage: each has a scratch folder of its own."""
    stored = tmp_path / "stored" / "sweep"
    sweep = sweeps(
        "--sweep", "seed=0,1", "--ray-address", cluster.address, "--storage", str(tmp_path / "stored")
    )  # fmt: skip
    doomed = next(n for n in cluster.list_all_nodes() if n is not cluster.head_node)

    held: dict[int, psutil.Process] = {}

    def on_it() -> Path | None:
        """The trial at work on the node that will be lost.

        The other node's worker stands still until then: having nothing left to do, it would take this trial, too.
        """
        for name in ("000", "001"):
            with contextlib.suppress(psutil.NoSuchProcess):
                if epochs(stored / name) >= 2:
                    worker = worker_of(stored / name)
                    if worker.ppid() == raylet_pid(doomed):
                        return stored / name
                    worker.suspend()
                    held[worker.pid] = worker
        return None

    trial = sweep.until(on_it)
    raylet = psutil.Process(raylet_pid(doomed))
    for process in [raylet, *raylet.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    for worker in held.values():
        worker.resume()
    assert sweep.wait() == 0, sweep.says()
    rows = {r["trial"]: r for r in sweep.rows()}
    assert sorted(rows) == ["000", "001"] and len(sweep.rows()) == 2
    assert all(r["status"] == "done" for r in rows.values())
    assert rows[trial.name]["restarts"] == "1"
    for name in rows:
        assert_each_epoch_once(sweep.folder / name, restarts=int(name == trial.name))
        assert_whole(sweep.folder / name / "search")
    assert_same_run(sweep.folder / "000" / "search", undisturbed)
    shutil.rmtree(scratch(sweep.folder, "node").parent)


@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_runs_no_finished_trial_again(sweeps: Any, undisturbed: Path) -> None:
    grid = ("--sweep", "seed=1,0,2", "--max-concurrent", "1")
    sweep = sweeps(*grid)
    sweep.until(lambda: epochs(sweep.folder / "001") >= 2)
    sweep.kill()
    assert [r["status"] for r in sweep.rows()] == ["done", "running", "waiting"]
    before = {p: p.stat().st_mtime_ns for p in (sweep.folder / "000").rglob("*") if p.suffix in (".pt", ".safetensors")}
    assert sweeps(*grid).wait() == 2  # there is a sweep already
    assert "already holds a run" in sweep.says()
    again = sweeps("--resume")
    assert again.wait() == 0, again.says()
    assert [(r["trial"], r["config.seed"], r["status"]) for r in again.rows()] == [
        ("000", "1", "done"), ("001", "0", "done"), ("002", "2", "done"),
    ]  # fmt: skip
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert_each_epoch_once(again.folder / "000")
    assert_each_epoch_once(again.folder / "001", restarts=1)
    assert_each_epoch_once(again.folder / "002")
    assert_same_run(again.folder / "001" / "search", undisturbed)
