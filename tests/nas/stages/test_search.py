"""Whole runs of both stages: the same seed twice, interrupted and resumed, killed (invariants 7 and 8)."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import nas.pictures.run
import nas.stages.retrain
import nas.stages.search
import nas.training.loop
import nas.training.scores
import nas.training.state
from nas.config import RetrainConfig, SearchConfig
from nas.networks.compact_file import load_compact
from nas.stages.asked import resolve
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from tests.nas.run_checks import assert_same_run, assert_whole, draw_pictures, log_rows, visible

TINY = dict(
    model_kwargs=("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4"),
    dataset="folder",  # of very few images, see `pictures`
    workers=0,
    val_fraction=0.2,
    epochs=2,
    batch_size=16,
    threads=1,
    device="cpu",
)
# Everything that draws random numbers or carries state from step to step.
STATEFUL = dict(drop_path=0.2, mixup=0.5, aa="rand-m9-mstd0.5", reprob=0.2, sched="cosine", warmup_epochs=1)
SEARCHES = {
    "stream": SearchConfig(space="vit-dan-nano", alphas=(1, 2, 3, 4), budget=0.4, arch_lr=0.3, **TINY),
    "inner": SearchConfig(
        space="vit-dan-nano", width="inner", budget=0.0, gamma=1e-6, arch_data="val", **TINY | STATEFUL
    ),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", params=SEARCHES)
def search(
    request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SearchConfig, Path]:
    """A search that nothing disturbed."""
    output = tmp_path_factory.mktemp("search") / request.param
    config = replace(SEARCHES[request.param], data_dir=pictures, output=output)
    return config, run_search(config)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is two thirds of a tiny run: only the undisturbed runs, whose fixtures come before this, draw."""
    monkeypatch.setattr(nas.stages.search, "plot_run", lambda folder: None)


one_search = partial(pytest.mark.parametrize, "search", indirect=True)


@pytest.mark.slow
def test_8_the_same_seed_gives_the_same_run(search: tuple[SearchConfig, Path], tmp_path: Path) -> None:
    config, folder = search
    torch.manual_seed(99)  # whatever was drawn before
    assert_same_run(run_search(replace(config, output=tmp_path / "again")), folder)


def test_a_search_writes_all_it_promises(search: tuple[SearchConfig, Path]) -> None:
    config, folder = search
    assert_whole(folder)
    assert {
        "arch.json",
        "supernet.safetensors",
        "log.csv",
        "choices.csv",
        "summary.json",
        "config.yaml",
        "pareto.png",
    } <= set(visible(folder))
    rows = log_rows(folder / "log.csv")
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["t"]) for row in rows] == [0.5, 1.0]
    assert 0 < float(rows[0]["held_out_large_top1"]) <= 100
    choices = list(csv.DictReader(io.StringIO((folder / "choices.csv").read_text())))
    for epoch in ("1", "2"):
        for block in ("0", "1"):
            shares = [float(r["probability"]) for r in choices if (r["epoch"], r["block"]) == (epoch, block)]
            assert len(shares) == 3  # 4 heads allow 1, 2 and 4
            assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert len({row["probability"] for row in choices}) > 3  # the logits moved
    arch = load_architecture(folder)
    assert (arch.width, arch.method, arch.model_kwargs["embed_dim"]) == (config.width, "dan", 24)


def test_the_budget_holds(search: tuple[SearchConfig, Path]) -> None:
    config, folder = search
    arch = load_architecture(folder)
    if config.budget:
        # Four of 9 architectures fit below 0.4; in the band or reported, see the next test, and never above.
        assert arch.flops <= config.budget * arch.backbone_flops
        assert arch.search["budget"] == config.budget


@pytest.mark.parametrize("budget", [0.9, 0.4])
def test_a_budget_is_met_in_its_band_or_the_rest_is_reported(
    budget: float, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SEARCHES["stream"], budget=budget, epochs=1, data_dir=pictures, output=tmp_path / "run")
    arch = load_architecture(run_search(config))
    printed = " ".join(capsys.readouterr().out.split())
    share = arch.flops / arch.backbone_flops
    assert share <= budget
    assert (share >= budget - 0.02) != ("of the budget is unused" in printed)
    # what was offered and does not divide is left out, and said
    for block in (0, 1):
        assert f"block {block}: alpha 3 left out (4 heads allow 1, 2, 4)" in printed


class Interrupt:
    """Raises KeyboardInterrupt in the n-th call of a function, before or after it did its work."""

    def __init__(self, function: Callable[..., Any], call: int, after: bool = False) -> None:
        self.function, self.calls, self.call, self.after = function, 0, call, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.call and not self.after:
            raise KeyboardInterrupt
        result = self.function(*args, **kwargs)
        if self.calls == self.call:
            raise KeyboardInterrupt
        return result


MOMENTS = {  # module, function, call, after
    "before anything was saved": (nas.training.loop, "update_weights", 3, True),
    "in the second epoch": (nas.training.loop, "update_weights", 14, True),
    "between checkpoint and tables": (nas.training.state, "save_checkpoint", 1, True),
    "in the second save": (nas.training.state, "save_checkpoint", 2, False),
    "after the last epoch": (nas.training.state, "write_tables", 2, True),
}


@one_search(["inner"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_7_an_interrupted_search_resumes_to_the_same_run(
    moment: str, search: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = search
    config = replace(config, output=tmp_path / "run")
    module, function, call, after = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, Interrupt(getattr(module, function), call, after))
        with pytest.raises(KeyboardInterrupt):
            run_search(config)
    assert_whole(tmp_path / "run")
    assert not (tmp_path / "run" / "arch.json").exists()
    torch.manual_seed(123)
    assert_same_run(run_search(replace(config, resume=True)), undisturbed)


@one_search(["stream"])
def test_7_an_interrupted_validation_resumes_to_the_same_run(
    search: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = search
    config = replace(config, output=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(nas.training.scores, "top_k", Interrupt(nas.training.scores.top_k, 2))
        with pytest.raises(KeyboardInterrupt):
            run_search(config)
    with monkeypatch.context() as patch:  # and once more, when all is trained but nothing concluded
        patch.setattr(nas.stages.search, "save_weights", Interrupt(nas.stages.search.save_weights, 1))
        with pytest.raises(KeyboardInterrupt):
            run_search(replace(config, resume=True))
    assert_whole(tmp_path / "run")
    assert_same_run(run_search(replace(config, resume=True)), undisturbed)


@one_search(["inner"])
def test_resuming_a_finished_search_changes_nothing(search: tuple[SearchConfig, Path], tmp_path: Path) -> None:
    import shutil

    config, undisturbed = search
    shutil.copytree(undisturbed, tmp_path / "run")
    assert_same_run(run_search(replace(config, output=tmp_path / "run", resume=True)), undisturbed)


@pytest.fixture(scope="module")
def quick_speeds() -> Iterator[None]:
    """Throughput is measured elsewhere; here it would only take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
        yield


RETRAIN = RetrainConfig(**{k: v for k, v in TINY.items() if k != "model_kwargs"}, **STATEFUL, model_ema=True)


@pytest.fixture(scope="module")
def retrain(
    search: tuple[SearchConfig, Path], quick_speeds: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RetrainConfig, Path]:
    """The search's architecture, retrained with everything that carries state."""
    config = replace(
        RETRAIN,
        arch=search[1] / "arch.json",
        data_dir=search[0].data_dir,
        output=tmp_path_factory.mktemp("retrain") / "run",
    )
    return config, run_retrain(config)


@pytest.mark.slow
@one_search(["stream"])
def test_7_and_8_of_a_retrain(
    retrain: tuple[RetrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = retrain
    config = replace(config, output=tmp_path / "run")
    for call, resume in ((3, False), (14, True)):  # in the first epoch, which starts anew, then in the second
        with monkeypatch.context() as patch:
            patch.setattr(
                nas.training.loop, "update_weights", Interrupt(nas.training.loop.update_weights, call, after=True)
            )
            with pytest.raises(KeyboardInterrupt):
                run_retrain(replace(config, resume=resume))
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert_same_run(run_retrain(replace(config, resume=True)), undisturbed)


@one_search(["stream"])
def test_a_retrain_leaves_a_compact_network_that_stands_alone(retrain: tuple[RetrainConfig, Path]) -> None:
    _, folder = retrain
    arch, compact = load_architecture(folder), load_compact(folder)
    assert sum(p.numel() for p in compact.parameters()) == arch.params
    assert compact(torch.zeros(1, *arch.input_size)).shape == (1, 6)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["compact_minus_subnet"] <= 1e-5
    assert summary["compact"]["top1"] == pytest.approx(summary["subnet"]["top1"], abs=5)  # one of few images
    assert (folder / "table.csv").read_text().startswith("network,params,gflops,top1,top5")


def unused_of(printed: str) -> float | None:
    found = re.search(r"([\d.]+) of the budget is unused", printed)
    return None if found is None else float(found[1])


@pytest.mark.parametrize(("band", "within"), [(0.02, False), (0.5, True)])
def test_the_band_is_an_option_and_what_would_use_the_rest_is_said(
    band: float, within: bool, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(SEARCHES["stream"], budget=0.4, band=band, epochs=1, data_dir=pictures, output=tmp_path / "run")
    arch = load_architecture(run_search(config))
    printed = " ".join(capsys.readouterr().out.split())
    unused = 0.4 - arch.flops / arch.backbone_flops
    assert unused > 0.02 and unused_of(printed) == pytest.approx(unused, abs=1e-4)
    assert ("no architecture between" in printed) != within
    family = arch.space.split("-")[0]
    assert f"python search.py --space {family}-free-nano --budget 0.4" in printed and "--data-dir" in printed
    assert arch.search["band"] == band


def test_a_uniform_factor_says_what_it_leaves_unused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SearchConfig(space="vit-an-nano", budget=0.9, dataset="folder", data_dir=pictures, output=tmp_path / "run")
    arch = load_architecture(run_search(config))
    unused = unused_of(" ".join(capsys.readouterr().out.split()))
    assert unused == pytest.approx(0.9 - arch.flops / arch.backbone_flops, abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(band=-0.1, budget=0.5), "--band -0.1; expected a share"),
        (dict(band=0.1, budget=0.0), "--band 0.1 is the part of a budget that may stay unused; give --budget"),
        (dict(band=0.1, budget=0.5, space="vit-an-nano"), "is searched by uniform, which has no band; leave it out"),
        (dict(band=0.1, space="vit-free-nano"), "is searched by importance, which has no band; leave it out"),
    ],
)
def test_a_band_that_nothing_uses_is_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(SearchConfig(**{"space": "vit-dan-nano"} | flags))
