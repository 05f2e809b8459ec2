"""Several processes under torch.distributed: the same losses, weights and architecture as one process."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nas.stages.retrain
import nas.stages.search
from nas.config import Common, RetrainConfig, SearchConfig
from nas.networks.basis_file import read_basis
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from tests.forked import FORK
from tests.nas.run_checks import draw_pictures

ROOT = Path(__file__).parents[3]
# SGD, because Adam turns the rounding of a gradient near zero into a whole step.
TINY: dict[str, Any] = dict(
    model_kwargs=("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4"), dataset="folder", workers=0,
    val_fraction=0.2, epochs=2, batch_size=16, threads=1, device="cpu", opt="momentum", lr=0.05, importance="taylor",
)  # fmt: skip
SEARCHES: dict[str, SearchConfig] = {
    "dan": SearchConfig(space="vit-dan-nano", alphas=(1, 2, 4), budget=0.5, arch_lr=0.3, grad_accum_steps=2, **TINY),
    "dan-val": SearchConfig(space="vit-dan-nano", width="inner", budget=0.0, gamma=1e-6, arch_data="val", **TINY),
    "kcr": SearchConfig(space="vit-kcr-nano", budget=0.75, arch_lr=0.3, **TINY),
    "uvc": SearchConfig(space="vit-uvc-nano", budget=0.5, warmup_epochs=1, **TINY),
    "joint": SearchConfig(space="vit-joint-nano", budget=0.5, arch_lr=0.3, model_ema=True, **TINY),
    "rotated": SearchConfig(space="vit-dan-nano", budget=0.5, arch_lr=0.3, basis="rotate", **TINY),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def process(rank: int, port: int, stages: list[tuple[Any, Common]], log: Path) -> None:
    """One of two: every run with half of its batch."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    nas.stages.search.plot_run = lambda folder: None  # type: ignore[assignment, misc]
    for run, config in stages:
        run(config)
        torch.distributed.barrier()  # the next run may read what process 0 wrote last
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Every run twice: by one process, and by two."""
    root = tmp_path_factory.mktemp("runs")
    pictures = draw_pictures(root / "pictures")
    stages: list[tuple[str, Any, Common]] = []
    for name, config in SEARCHES.items():
        stages.append((name, run_search, replace(config, data_dir=pictures)))
    for name, train in (("dan", "adjoined"), ("joint", "adjoined"), ("rotated", "adjoined"), ("dan", "distill")):
        options = {k: v for k, v in TINY.items() if k not in ("model_kwargs", "importance")}
        stages.append((f"{train}-{name}", run_retrain, RetrainConfig(train=train, data_dir=pictures, **options)))

    def place(name: str, config: Any, where: str, batch_size: int) -> Any:
        source = {"arch": root / where / name.partition("-")[2]} if isinstance(config, RetrainConfig) else {}
        return replace(config, output=root / where / name, batch_size=batch_size, **source)

    with pytest.MonkeyPatch.context() as patch:
        for stage in (nas.stages.search, nas.stages.retrain):
            patch.setattr(stage, "plot_run", lambda folder: None)
        patch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
        for name, run, config in stages:
            run(place(name, config, "one", 16))
    halves = [(run, place(name, config, "two", 8)) for name, run, config in stages]
    port, logs = free_port(), [root / f"{rank}.txt" for rank in range(2)]
    processes = [FORK.Process(target=process, args=(rank, port, halves, logs[rank])) for rank in range(2)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(240)
    assert [p.exitcode for p in processes] == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert logs[1].read_text() == ""  # only process 0 speaks
    return {name: (root / "one" / name, root / "two" / name) for name, *_ in stages}


RUNS = [*SEARCHES, "adjoined-dan", "adjoined-joint", "adjoined-rotated", "distill-dan"]


def rows(path: Path) -> list[dict[str, float]]:
    timings = ("images_per_s", "peak_memory_mb", "seconds")
    read = list(csv.DictReader(path.open()))
    return [{k: float(v) for k, v in row.items() if k not in timings and v} for row in read]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(pairs: dict[str, tuple[Path, Path]], name: str) -> None:
    one, two = pairs[name]
    first, second = rows(one / "log.csv"), rows(two / "log.csv")
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    weights = "supernet.safetensors" if name in SEARCHES else "compact.safetensors"
    a_weights, b_weights = load_file(one / weights), load_file(two / weights)
    moved = 0.0
    for key, value in a_weights.items():
        scale = float(value.abs().max())
        assert float((value - b_weights[key]).abs().max()) <= 1e-4 * scale + 1e-6, key
        moved += scale
    assert moved > 0
    a_arch, b_arch = load_architecture(one), load_architecture(two)
    assert (a_arch.blocks, a_arch.stage_widths) == (b_arch.blocks, b_arch.stage_widths)
    assert a_arch.permutation == b_arch.permutation
    assert bool(a_arch.permutation) != bool(a_arch.basis)


@pytest.mark.slow
def test_two_processes_find_the_basis_of_one(pairs: dict[str, tuple[Path, Path]]) -> None:
    """On the same images, which process 0 alone looks at; the size of its batches is in the last digits."""
    for name in ("rotated", "adjoined-rotated"):
        one, two = (read_basis(folder) for folder in pairs[name])
        assert one.orders == two.orders and one.streams.keys() == two.streams.keys() == {0}
        assert torch.allclose(one.energy[0], two.energy[0], atol=1e-5)
        assert torch.allclose(one.streams[0], two.streams[0], atol=1e-3)
        assert [load_architecture(folder).basis["streams"] for folder in pairs[name]] == [[0], [0]]
    for side in (0, 1):  # a retrain stands in the basis of its search
        assert (
            load_architecture(pairs["rotated"][side]).basis == load_architecture(pairs["adjoined-rotated"][side]).basis
        )


@pytest.mark.slow
def test_the_runs_differ_where_they_should(pairs: dict[str, tuple[Path, Path]]) -> None:
    """Two processes did take part: each saw half of the batch, and only one wrote."""
    one, two = pairs["dan"]
    assert "processes: 2" in (two / "config.yaml").read_text()
    assert "batch_size: 8" in (two / "config.yaml").read_text()
    assert "processes: null" in (one / "config.yaml").read_text()
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}


@pytest.mark.slow
def test_a_resume_keeps_the_global_batch(pairs: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    import nas.runs.folder

    _, two = pairs["dan"]
    saved = replace(nas.runs.folder.saved_config(SearchConfig, two), resume=True)
    config = nas.runs.folder.open_run(saved, "search")
    assert (config.batch_size, config.processes) == (16, None)
    monkeypatch.setattr(nas.runs.folder, "world_size", lambda: 4)
    assert nas.runs.folder.open_run(saved, "search").batch_size == 4
    monkeypatch.setattr(nas.runs.folder, "world_size", lambda: 3)
    with pytest.raises(UserError, match="16 images, which 3 processes cannot share"):
        nas.runs.folder.open_run(saved, "search")


def test_streams_are_refused() -> None:
    from types import SimpleNamespace

    from nas.data.loader import train_loader
    from nas.data.transforms import LoaderSpec

    spec = LoaderSpec(8, (3, 32, 32), (0.5,), (0.5,))
    with pytest.raises(UserError, match="stream"):
        train_loader(SimpleNamespace(reader=None), spec, 0, "cpu", rank=0, world_size=2)


LONG = [
    "--space=vit-dan-nano", "--alphas", "1", "2", "4", "--budget=0.5", "--arch-lr=0.3", "--opt=momentum", "--lr=0.05",
    "--epochs=60", "--model-kwargs", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=4", "--val-fraction=0.2",
    "--workers=0", "--threads=1", "--device=cpu", "--dataset=folder",
]  # fmt: skip


def torchrun(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


@pytest.mark.slow
def test_a_killed_process_stops_the_job_and_another_number_goes_on(tmp_path: Path) -> None:
    options = [*LONG, "--data-dir", str(draw_pictures(tmp_path / "pictures"))]
    one, two = tmp_path / "one", tmp_path / "two"
    run = [sys.executable, "search.py", *options]
    subprocess.run([*run, "--batch-size", "16", "--output", one], check=True, cwd=ROOT, capture_output=True)
    command = torchrun("--nproc-per-node", "2", "--master-port", str(free_port()), "search.py", *options)
    command += ["--batch-size", "8", "--output", str(two)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (two / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    ranks = {child: Path(f"/proc/{child}/environ").read_bytes() for child in children}
    victim = next(int(child) for child, environment in ranks.items() if b"\0RANK=1\0" in environment)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    output = job.communicate(timeout=60)[0].decode()
    assert time.monotonic() - killed < 60 and job.returncode != 0
    assert (f"pid: {victim}" in output and "SIGKILL" in output.upper()) or "-9" in output
    assert not (two / "arch.json").exists()
    subprocess.run(
        [sys.executable, "search.py", "--output", two, "--resume"], check=True, cwd=ROOT, capture_output=True
    )
    first, second = rows(one / "log.csv"), rows(two / "log.csv")
    assert len(first) == len(second) == 60
    for a, b in zip(first[:10], second[:10], strict=True):  # further on, float error has grown
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert (two / "arch.json").is_file()


@pytest.mark.slow
def test_two_nodes_run_both_stages(tmp_path: Path) -> None:
    pictures, port = draw_pictures(tmp_path / "pictures"), free_port()
    search = ["search.py", *LONG, "--epochs=2", "--data-dir", pictures, "--batch-size", "8"]
    retrain = ["retrain.py", "--arch", tmp_path / "search", "--dataset", "folder", "--data-dir", pictures, "--epochs",
               "2", "--workers", "0", "--device", "cpu"]  # fmt: skip
    for name, stage in (("search", search), ("retrain", retrain)):
        nodes = [
            subprocess.Popen(
                torchrun("--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                         "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", name, "--local-addr", "127.0.0.1",
                         *stage, "--output", tmp_path / name),
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for node in range(2)
        ]  # fmt: skip
        outputs = [node.communicate(timeout=240)[0].decode() for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], outputs
        assert "epoch 2/2" in outputs[0] + outputs[1] and not ("epoch" in outputs[0] and "epoch" in outputs[1])
    assert (tmp_path / "retrain" / "compact.safetensors").is_file()


@pytest.mark.slow
def test_a_trial_of_a_sweep_by_two_processes(tmp_path: Path) -> None:
    from nas.sweeps.trial import as_plain, outcome_of, run_trial
    from nas.sweeps.trials import Trial

    pictures = draw_pictures(tmp_path / "pictures")
    search = replace(SEARCHES["dan"], data_dir=pictures)
    options = {k: v for k, v in TINY.items() if k not in ("model_kwargs", "importance", "batch_size")}
    retrain = RetrainConfig(data_dir=pictures, batch_size=8, **options)
    reported: list[Any] = []
    trial = Trial("000", {}, replace(search, batch_size=8), retrain)
    run_trial(as_plain(trial, tmp_path, None, False, processes=2), "node", reported.append)
    log = (tmp_path / "000" / "output.log").read_text()
    assert outcome_of(tmp_path / "000")["status"] == "done", log
    assert [(row["stage"], row["epoch"]) for row in reported[1:]] == [
        ("search", 1), ("search", 2), ("retrain", 1), ("retrain", 2),
    ]  # fmt: skip
    assert log.count("epoch 2/2") == 2
    alone = run_search(replace(search, output=tmp_path / "alone"))
    together = tmp_path / "000" / "search"
    assert load_architecture(alone).blocks == load_architecture(together).blocks
    for a, b in zip(rows(alone / "log.csv"), rows(together / "log.csv"), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    refused = Trial("001", {}, replace(search, data_dir=tmp_path / "nowhere"), None)
    run_trial(as_plain(refused, tmp_path, None, False, processes=2), "node", reported.append)
    outcome = outcome_of(tmp_path / "001")
    assert outcome["status"] == "failed" and "nowhere" in outcome["error"]
