"""Invariant 7 inside an epoch: a run that ended after any step goes on to the bytes of the run that did not end."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nas.stages.retrain
import nas.stages.search
import nas.training.loop
from nas.config import Common, RetrainConfig, SearchConfig
from nas.machine.stopping import RESUME_ME, Preempted
from nas.runs.checkpoint import load_checkpoint, save_checkpoint
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.state import BEFORE, CHECKPOINT
from search_spaces.errors import UserError
from tests.nas.run_checks import assert_same_run, draw_pictures, log_rows

STATEFUL: dict[str, Any] = dict(drop_path=0.2, mixup=0.5, aa="rand-m9-mstd0.5", reprob=0.2, sched="cosine")
TINY: dict[str, Any] = dict(
    dataset="folder", workers=0, val_fraction=0.2, epochs=2, batch_size=16, threads=1, device="cpu", warmup_epochs=1,
    **STATEFUL,
)  # fmt: skip
VIT: dict[str, Any] = dict(model_kwargs=("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4"), **TINY)
AN: dict[str, Any] = dict(space="vit-an-nano", alpha=2, **VIT)
RUNS: dict[str, Common] = {  # nine steps an epoch, five where batches are accumulated
    "gradient": SearchConfig(space="vit-dan-nano", alphas=(1, 2, 4), budget=0.5, arch_lr=0.3, **VIT),
    "held-out batches for the choices": SearchConfig(
        space="vit-dan-nano", width="inner", budget=0.0, gamma=1e-6, arch_data="val", **VIT
    ),
    "channels by score": SearchConfig(space="vit-kcr-nano", budget=0.75, arch_lr=0.3, model_ema=True, **VIT),
    "factors and counts": SearchConfig(space="vit-joint-nano", budget=0.5, grad_accum_steps=2, **VIT),
    "minimax": SearchConfig(space="vit-uvc-nano", budget=0.5, **VIT),
    "adjoined": RetrainConfig(model_ema=True, grad_accum_steps=2, clip_grad=1.0, result="best", **AN),
    "plain": RetrainConfig(space="vit-an-nano", train="plain", layer_decay=0.8, **VIT),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """Nor speeds, which would only take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for stage in (nas.stages.search, nas.stages.retrain):
            patch.setattr(stage, "plot_run", lambda folder: None)
        patch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
        yield


def start(config: Any) -> Path:
    return run_search(config) if isinstance(config, SearchConfig) else run_retrain(config)


def before_step(call: int, end: Callable[[], None]) -> Callable[..., Any]:
    """update_weights that lets something happen first in its n-th call."""
    update, calls = nas.training.loop.update_weights, iter(range(1, 1000))

    def wrapped(*args: Any) -> Any:
        if next(calls) == call:
            end()
        return update(*args)

    return wrapped


def killed() -> None:
    raise KeyboardInterrupt


def killed_in(config: Any, call: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.training.loop, "update_weights", before_step(call, killed))
        with pytest.raises(KeyboardInterrupt):
            start(config)


def assert_same_bytes(folder: Path, undisturbed: Path) -> None:
    assert_same_run(folder, undisturbed)
    for weights in undisturbed.glob("*.safetensors"):
        assert (folder / weights.name).read_bytes() == weights.read_bytes(), weights.name
    for table in ("choices.csv", "steps.csv"):
        if (undisturbed / table).exists():
            assert (folder / table).read_bytes() == (undisturbed / table).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A run to its end, and its options; made once, with checkpoints after epochs alone."""
    root, done = tmp_path_factory.mktemp("undisturbed"), {}

    def run(name: str) -> tuple[Any, Path]:
        if name not in done:
            config = replace(RUNS[name], data_dir=pictures, output=root / name.replace(" ", "-"))
            done[name] = config, start(config)
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_7_a_run_killed_inside_epochs_gives_the_same_bytes(
    name: str, undisturbed: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    config, expected = undisturbed(name)
    config = replace(config, output=tmp_path / "run", checkpoint_every="1steps")
    steps = -(-9 // config.grad_accum_steps)
    killed_in(config, steps // 2)
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["inside"][0]["steps"] == steps // 2 - 1
    config = replace(config, resume=True)
    torch.manual_seed(123)
    killed_in(config, steps)  # resumed after half of an epoch: in the second one
    torch.manual_seed(456)
    killed_in(config, 2)
    assert_same_bytes(start(config), expected)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 5, 9, 10, 18])  # first, inside, last of an epoch, first and last of the next
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_at_the_next_step_and_the_run_goes_on(
    name: signal.Signals, call: int, undisturbed: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    config, expected = undisturbed("channels by score")
    config = replace(config, output=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.training.loop, "update_weights", before_step(call, lambda: os.kill(os.getpid(), name)))
        with pytest.raises(Preempted) as stopped:
            start(config)
    assert stopped.value.code == RESUME_ME
    assert stopped.value.words == f"{name.name} after step {call} of 18"
    assert_same_bytes(start(replace(config, resume=True)), expected)


def test_a_torn_checkpoint_costs_one_interval(
    undisturbed: Callable[[str], tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, expected = undisturbed("adjoined")
    config = replace(config, output=tmp_path / "run", checkpoint_every="2steps")
    killed_in(config, 5)
    last, before = tmp_path / "run" / CHECKPOINT, tmp_path / "run" / BEFORE
    assert [load_checkpoint(path)["inside"][0]["steps"] for path in (before, last)] == [2, 4]
    last.write_bytes(last.read_bytes()[:-1000])
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        update = nas.training.loop.update_weights
        patch.setattr(nas.training.loop, "update_weights", lambda *a: (steps.append(a[2].number), update(*a)))
        folder = start(replace(config, resume=True))
    assert steps[0] == 2
    assert "checkpoint.pt is not a readable checkpoint" in (said := capsys.readouterr().err)
    assert "going on from checkpoint-before.pt" in said
    assert_same_bytes(folder, expected)


def test_a_checkpoint_of_an_earlier_format_goes_on(
    undisturbed: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    config, expected = undisturbed("plain")
    config = replace(config, output=tmp_path / "run")
    killed_in(config, 15)
    path = tmp_path / "run" / CHECKPOINT
    state = load_checkpoint(path)
    for later in ("grad_scaler", "skipped", "format"):
        del state[later]
    torch.save({"format": 1, **state}, path)
    assert_same_bytes(start(replace(config, resume=True)), expected)


def test_a_checkpoint_inside_an_epoch_goes_on_in_another_number_of_processes(
    undisturbed: Callable[[str], tuple[Any, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As two processes would have left it: each half of the sums and of the images."""
    config, expected = undisturbed("channels by score")
    config = replace(config, output=tmp_path / "run", checkpoint_every="1steps")
    killed_in(config, 15)
    path = tmp_path / "run" / CHECKPOINT
    state = load_checkpoint(path)
    (own,) = state["inside"]
    half = {"images": own["images"] // 2, "process": {name: t / 2 for name, t in own["process"].items()}}
    state["inside"] = [{**own, **half}, {**own, **half}]
    del state["format"]
    save_checkpoint(state, path)
    folder = start(replace(config, resume=True))
    assert "goes on inside epoch 2 with 1 processes instead of 2" in capsys.readouterr().out
    first, second = (log_rows(f / "log.csv") for f in (folder, expected))
    assert first[0] == second[0]
    # other numbers are drawn from here on, but sums and moments are those of the whole epoch
    for column in ("loss", "loss_ce", "trace", "kc"):
        assert float(first[1][column]) == pytest.approx(float(second[1][column]), rel=0.1), column
    assert float(first[1]["lr"]) == float(second[1]["lr"])


def test_values_of_the_new_options(tmp_path: Path) -> None:
    for options, words in (
        (dict(checkpoint_every="soon"), "--checkpoint-every soon; expected a time or a number of steps"),
        (dict(checkpoint_every="0steps"), "--checkpoint-every 0steps"),
        (dict(log_every="5"), "--log-every 5"),
        (dict(on_nan=("skip",)), "--on-nan skip; expected stop, or skip and a number of steps"),
        (dict(on_nan=("skip", "0")), "--on-nan skip 0"),
    ):
        with pytest.raises(UserError, match=words):
            RetrainConfig(**options).check()  # type: ignore[arg-type]
