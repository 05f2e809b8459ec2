"""Long runs: steps that are left out, numbers read late, lines that show life, a script that starts again."""

import csv
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import nas.training.meter
from nas.cli import with_resume
from nas.machine.stopping import RESUME_ME
from nas.runs.checkpoint import load_checkpoint
from nas.training.loop import fit
from nas.training.meter import Diverged, Meter
from nas.training.objective import Step
from nas.training.state import CHECKPOINT
from search_spaces.errors import UserError
from tests.nas import tiny
from tests.nas.run_checks import draw_pictures

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def weights(training: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in training.objective.supernet.backbone.parameters()])


def broken_at(training: Any, *steps: int) -> Any:
    """A training whose loss is not a number at some steps."""
    forward = training.objective.forward

    def broken(images: Any, target: Any, step: Step) -> Any:
        terms = forward(images, target, step)
        return terms | {"kl": terms["kl"] * float("nan")} if step.number in steps else terms

    training.objective.forward = broken
    return training


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = dict(opt="sgd", epochs=1, on_nan=("skip", "2"))
    training = broken_at(tiny.training(tiny.config(tmp_path / "a", **options)), 1, 3)
    fit(training, resume=False, words="test")
    assert training.skipped == 2 and load_checkpoint(tmp_path / "a" / CHECKPOINT)["skipped"] == 2
    said = capsys.readouterr().out
    assert "step 2 left out (1 of at most 2): the kl term of the loss is nan at step 2 of 4" in said
    assert bool(weights(training).isfinite().all()) and 0 < training.rows[0]["loss"] < 10  # the mean of the others
    too_many = broken_at(tiny.training(tiny.config(tmp_path / "b", **options)), 0, 1, 3)
    with pytest.raises(Diverged, match=r"at step 4 of 4; .*2 such steps were left out before \(--on-nan\)"):
        fit(too_many, resume=False, words="test")


def test_where_nothing_has_to_be_left_out_skipping_changes_nothing(tmp_path: Path) -> None:
    runs = [tiny.training(tiny.config(tmp_path / how[0], on_nan=how)) for how in (("stop",), ("skip", "3"))]
    for run in runs:
        fit(run, resume=False, words="test")
    assert torch.equal(weights(runs[0]), weights(runs[1])) and runs[0].rows[1]["loss"] == runs[1].rows[1]["loss"]


def test_numbers_that_are_read_late_are_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where reading waits for it."""
    rows = []
    for every in (1, 3):
        init = Meter.__init__

        def late(meter: Meter, *args: Any, every: int = every, init: Any = init) -> None:
            init(meter, *args)
            meter.every = every

        with monkeypatch.context() as patch:
            patch.setattr(nas.training.meter.Meter, "__init__", late)
            run = tiny.training(tiny.config(tmp_path / str(every), grad_accum_steps=2))
            fit(run, resume=False, words="test")
            rows.append([run.rows[0][name] for name in ("loss", "loss_ce", "loss_kl")])
            again = broken_at(tiny.training(tiny.config(tmp_path / f"nan-{every}")), 4)
            with pytest.raises(Diverged, match="the kl term of the loss is nan at step 5 of 8"):
                fit(again, resume=False, words="test")
            assert load_checkpoint(tmp_path / f"nan-{every}" / CHECKPOINT)["epoch"] == 1
    assert rows[0] == rows[1]


def test_an_accelerator_is_read_now_and_then() -> None:
    meter = Meter(torch.device("meta"))
    assert meter.every == nas.training.meter.READ_EVERY > 1 and Meter(CPU).every == 1


def test_lines_show_life_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[tuple[str, str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder = Path(folder).name

        def add_scalar(self, name: str, value: float, step: int) -> None:
            points.append((self.folder, name, step))

        def flush(self) -> None:
            """Nothing is buffered."""

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    with (tmp_path / "out.txt").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        fit(tiny.training(tiny.config(tmp_path, log_every="2steps", tensorboard=True)), False, "retrain")
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert [line.split("  loss")[0] for line in lines if line.startswith("retrain")] == [
        f"retrain: epoch {epoch}/2  step {step}/4" for epoch in (1, 2) for step in (2, 4)
    ]
    assert all(line.endswith(" left") and "images/s" in line for line in lines if line.startswith("retrain"))
    assert [step for folder, name, step in points if (folder, name) == ("steps", "loss_kl")] == [2, 4, 6, 8]
    assert [step for folder, name, step in points if (folder, name) == ("tensorboard", "loss")] == [1, 2]


def test_resume_auto(tmp_path: Path) -> None:
    place = ["--output", str(tmp_path)]
    for written in (["--resume", "auto"], ["--resume=auto"]):
        assert with_resume(["--seed", "1", *written, *place]) == ["--seed", "1", *place]
    assert with_resume(["--resume", *place]) == ["--resume", *place]
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert with_resume(["--resume", "auto", *place]) == [*place, "--resume"]
    with pytest.raises(UserError, match="--resume auto needs --output"):
        with_resume(["--resume", "auto"])


@pytest.mark.slow
def test_the_script_for_a_scheduler_goes_on_until_the_run_is_done(tmp_path: Path) -> None:
    """The test is the scheduler: it sends the signal, and starts again what asks for it."""
    requeue = tmp_path / "bin" / "scontrol"
    requeue.parent.mkdir()
    requeue.write_text(f"#!/bin/bash\necho $* >> {tmp_path}/asked.txt\n")
    requeue.chmod(0o755)
    environment = os.environ | {"SLURM_JOB_ID": "17", "PATH": f"{requeue.parent}:{os.environ['PATH']}"}
    options = f"""--space vit-an-nano --alpha 2 --model-kwargs patch_size=8 embed_dim=24 depth=2 num_heads=4
        --dataset folder --data-dir {draw_pictures(tmp_path / "pictures")} --epochs 40 --batch-size 8 --workers 0
        --threads 1 --device cpu --output {tmp_path / "run"}""".split()
    command = ["bash", "docs/preempted.sh", sys.executable, "retrain.py", *options]
    codes = []
    for sends in (signal.SIGUSR1, signal.SIGTERM, None):
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        before = len(epochs(tmp_path / "run"))
        while sends is not None and len(epochs(tmp_path / "run")) <= before and job.poll() is None:
            time.sleep(0.01)
        if sends is not None:
            job.send_signal(sends)
        output = job.communicate(timeout=300)[0].decode()
        codes.append(job.returncode)
        assert sends is None or "retrain.py: stopped by SIGTERM after" in output
    assert codes == [RESUME_ME, RESUME_ME, 0]
    assert (tmp_path / "asked.txt").read_text() == "requeue 17\n" * 2
    assert len(epochs(tmp_path / "run")) == 40 and (tmp_path / "run" / "compact.safetensors").is_file()


def epochs(folder: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    except FileNotFoundError:
        return []
