"""Milliseconds as the budget: searched by a table, timed whole beside what it says, in both stages (section 2.13)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import nas.prices.whole
from nas import validate
from nas.config import SearchConfig
from nas.machine.devices import device_name
from nas.machine.files import write_json
from nas.pictures.run import plot_run, run_points
from nas.prices.latency_table import Setting
from nas.runs.folder import saved_config
from nas.stages.asked import resolve
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from supernets.supernet import Supernet
from tests.nas.prices.drawn_table import drawn_table
from tests.nas.stages.free_world import CLASSES, FAMILIES, World, world

__all__ = ["world"]  # the fixture
HERE = Setting(device_name(torch.device("cpu")), "cpu", "eager", "fp32", 1, 1)
FAR = replace(HERE, device="a telephone")


def table_file(world: World, setting: Setting = HERE, family: str = "vit", name: str = "latency") -> Path:
    """A table of the family's network, drawn."""
    path = world.root / f"{name}-{family}-{setting.device_type}-{len(setting.device)}.json"
    if not path.exists():
        model, options = FAMILIES[family]
        supernet = Supernet(timm.create_model(model, num_classes=CLASSES, **options))
        write_json(path, drawn_table(supernet, setting=setting).record())
    return path


@pytest.fixture(scope="module")
def searched(world: World) -> Path:
    """Within half of the latency and, at once, so many parameters."""
    own = dict(price="latency", latency_table=table_file(world), mparams=0.004)
    return run_search(world.search(world.root / "by-latency", **own))


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_a_search_holds_milliseconds_and_parameters_at_once(searched: Path) -> None:
    arch, summary = load_architecture(searched), summary_of(searched)
    record = arch.search["latency"]
    assert record["predicted_ms"] <= 0.5 * record["backbone_ms"] and arch.params <= 4000
    assert record["on"] == HERE.words() == summary["latency"]["on"] and record["setting"]["batch_size"] == 1
    assert arch.search["price"] == "latency" and arch.search["mparams"] == 0.004
    assert summary["compact"]["ms_predicted"] == record["predicted_ms"]
    assert summary["original"]["ms_predicted"] == record["backbone_ms"]
    assert summary["compact"]["ms"] > 0 and summary["original"]["ms"] > 0
    assert "ms" not in summary["subnet"]


def test_a_limit_in_milliseconds_is_the_budget_where_there_is_no_other(world: World, searched: Path) -> None:
    whole = load_architecture(searched).search["latency"]["backbone_ms"]
    limit = round(0.6 * whole, 6)
    own = dict(budget=None, ms=limit, latency_table=table_file(world), searcher="uniform", evals=None)
    arch = load_architecture(run_search(world.search(world.root / "by-ms", **own)))
    assert arch.search["latency"]["predicted_ms"] <= limit and arch.search["price"] == "latency"
    assert arch.search["budget"] == pytest.approx(0.6, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["random", "gradient"])
def test_other_searchers_hold_two_limits(searcher: str, world: World) -> None:
    own: dict[str, Any] = dict(price="latency", budget=0.6, latency_table=table_file(world), mparams=0.004)
    own |= dict(random=dict(candidates=3), gradient=dict(epochs=1))[searcher] | dict(searcher=searcher, evals=None)
    folder = run_search(world.search(world.root / f"two-{searcher}", **own))
    arch = load_architecture(folder)
    assert arch.params <= 4000
    assert arch.search["latency"]["predicted_ms"] <= 0.6 * arch.search["latency"]["backbone_ms"]
    if searcher == "gradient":
        assert "expected_ms" in (folder / "log.csv").read_text().splitlines()[0]


def test_a_front_has_its_milliseconds(world: World) -> None:
    own = dict(price="latency", budget=None, front=(0.5, 0.8), latency_table=table_file(world), evals=1)
    folder = run_search(world.search(world.root / "front", **own))
    rows = summary_of(folder)["front"]
    assert [row["budget"] for row in rows] == [0.5, 0.8] and all(row["price"] <= row["budget"] for row in rows)
    assert rows[0]["ms_predicted"] < rows[1]["ms_predicted"] and all(row["ms"] > 0 for row in rows)


def test_stage_2_and_validate_carry_the_columns(world: World, searched: Path, capsys: Any) -> None:
    small = run_retrain(world.retrain(world.root / "retrained", arch=searched))
    summary = summary_of(small)
    assert summary["compact"]["ms_predicted"] == load_architecture(searched).search["latency"]["predicted_ms"]
    assert summary["compact"]["ms"] > 0 and summary["latency"]["on"] == HERE.words()
    assert "ms, predicted" in capsys.readouterr().out
    options = validate.parser().parse_args(["--weights", str(searched), "--workers", "0", "--speed-batches", "1"])
    networks = validate.run_validate(options)["networks"]
    assert networks["compact"]["ms"] > 0 and networks["original"]["ms_predicted"] > networks["compact"]["ms_predicted"]


def test_another_devices_table_is_used_and_nothing_is_timed(world: World, capsys: Any) -> None:
    own = dict(price="latency", latency_table=table_file(world, FAR), evals=1)
    folder = run_search(world.search(world.root / "far", **own))
    found = summary_of(folder)["compact"]
    assert found["ms_predicted"] > 0 and "ms" not in found
    assert f"latency is not measured: the table is of a telephone, this is {HERE.device}" in capsys.readouterr().out
    point = next(p for p in run_points(folder) if p["role"] == "refitted")
    assert point["latency"] == found["ms_predicted"] and point["on"].startswith("a telephone, 1 thread, eager fp32")


def test_milliseconds_are_drawn_device_by_device(world: World, searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_another = world.root / "far"
    if not test_another.exists():
        own = dict(price="latency", latency_table=table_file(world, FAR), evals=1)
        run_search(world.search(test_another, **own))
    labels: dict[str, str] = {}

    def record(figure: Any, path: Path) -> list[Path]:
        labels[path.name] = figure.axes[0].get_xlabel() if figure.axes else ""
        return [path]

    monkeypatch.setattr(nas.pictures.run, "save", record)
    points = [*run_points(searched), *run_points(test_another)]
    assert len({p["on"] for p in points}) == 2
    plot_run(searched, points, x="latency")
    assert labels["pareto-latency.png"] == f"ms, {HERE.words()}"


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (dict(price="latency", budget=0.5), "give it with --latency-table"),
        (dict(price="latency", budget=0.5, ms=3.0), "--budget and --ms name the same thing"),
        (dict(price="params", ms=3.0), "--price params is what --budget is a share of; .* beside --ms 3"),
        (dict(gflops=-1.0), "--gflops -1.0; expected more than 0"),
        (dict(ms=1e6), "--ms 1e[+]06: the backbone has .* ms, nothing would be compressed"),
        (dict(price="latency", budget=0.9, mparams=0.000001), "cannot be met together with --mparams 1e-06"),
        (dict(budget=0.5, latency_table=Path("t.json")), "--latency-table goes with --price latency or --ms"),
        (dict(price="latency", budget=1e-5), "cannot be met: .* ms"),
    ],
)
def test_what_no_search_can_do_is_refused_before_it_begins(own: dict[str, Any], words: str, world: World) -> None:
    config = world.search(world.root / "refused", **dict(budget=None) | own)
    if {"ms", "price"} & set(own) and "give it" not in words:
        config = replace(config, latency_table=table_file(world))
    with pytest.raises(UserError, match=words):
        run_search(config)
    assert not (world.root / "refused").exists()


def test_a_table_of_another_network_is_refused(world: World) -> None:
    own = dict(price="latency", latency_table=table_file(world, family="swin"))
    with pytest.raises(UserError, match="is of drawn, a SwinTransformer; this network is a VisionTransformer"):
        run_search(world.search(world.root / "other", **own))


def test_a_minimax_search_holds_one_price() -> None:
    config = SearchConfig(space="deit-uvc-nano", budget=0.5, mparams=0.1, price="flops")
    config, space = resolve(config)
    assert config.price == "flops" and space.name == "deit-uvc-nano"
    with pytest.raises(UserError, match=r"--mparams 0.1: a minimax search holds one budget, in FLOPs"):
        run_search(replace(config, epochs=1, batch_size=256, workers=0, threads=1))


def test_the_options_are_kept_for_a_resume(searched: Path) -> None:
    config = saved_config(SearchConfig, searched)
    assert config.price == "latency" and config.mparams == 0.004 and config.latency_table is not None
    again, _ = resolve(replace(config, resume=True))
    assert again.budget == 0.5


def test_whole_networks_are_timed_as_the_table_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype, int]] = []

    def fake(calls: Any, device: torch.device, rounds: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [0.002] * rounds for name in calls}

    class Watched(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((len(x), x.dtype, torch.get_num_threads()))
            return x

    monkeypatch.setattr(nas.prices.whole, "in_turn", fake)
    setting, threads = replace(HERE, batch_size=3, precision="bf16"), torch.get_num_threads()
    assert nas.prices.whole.milliseconds({"a": Watched(2, 2)}, (3, 4, 4), setting) == {"a": 2.0}
    assert seen == [(3, torch.bfloat16, 1)] and torch.get_num_threads() == threads
