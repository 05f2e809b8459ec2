"""Every benchmark that takes a small network runs to its end on one: what it prints there says nothing about speed."""

import csv
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

import nas
from benchmarks import evidence, families
from nas.config import RetrainConfig, SearchConfig
from nas.machine.files import write_json
from nas.networks.weights import load_weights, save_weights
from nas.runs.folder import SUPERNET, open_run, read_options, typed
from nas.runs.opened import open_folder
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.errors import UserError
from search_spaces.families import FAMILIES
from supernets.basis import timm_state
from supernets.supernet import Supernet
from tests.nas.run_checks import draw_pictures
from tests.photographs import class_folders


def run(name: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `python benchmarks/NAME.py ARGUMENTS` prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments.split()])
    importlib.import_module(f"benchmarks.{name}").main()
    return capsys.readouterr().out


SMALL = {
    "search_step": ("--nets nano --rounds 1 --batch-size 2 --profile", "nano"),
    "sandwich_step": ("--nets nano-vit --rounds 1 --batch-size 2", "nano"),
    "training_flags": ("--nets nano --rounds 1 --batch-size 2 --options float32 bf16 channels-last", "nano"),
    "compact_speed": (
        "--nets nano --kinds stream inner dan-stream kcr joint uvc heads odd --alphas 1 2 4 --batches 2 --rounds 1"
        " --seconds 0",
        "nano",
    ),
    "importance": (
        "--space vit-an-nano --epochs 1 --threads 1 --test-images 50 --calibration-images 128 --alphas 2",
        "rotate taylor",
    ),
    "rotation": (
        "--space vit-an-nano --epochs 0 --threads 1 --widths 48 --calibration-images 128 --test-images 50",
        "gradient ",
    ),
    "accepted": ("--modules naflexvit --names", "NaFlexVit"),
    "basis": ("--model deit_tiny_patch16_224 --images 8 --batch-size 4", "by error"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_measures_a_small_network(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, row = SMALL[name]
    printed = run(name, arguments, monkeypatch, capsys)
    rows = [line for line in printed.splitlines() if row in line]
    assert rows and not any("nan" in line.replace("nano", "") for line in rows)


@pytest.mark.slow
def test_methods_are_compared_and_what_is_finished_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = draw_pictures(tmp_path / "pictures")
    arguments = f"--output {tmp_path} --runs dan:0.6 kcr:0.9:eta_kc=0 --seeds 0 --family vit --search-epochs 1"
    arguments += f" --retrain-epochs 1 --batch-size 16 --data-dir {pictures}"
    table = [line for line in run("methods", arguments, monkeypatch, capsys).splitlines() if "+-" in line]
    assert [line.split()[:2] for line in table] == [["dan:0.6", "1"], ["kcr:0.9:eta_kc=0", "1"]]
    weights = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("compact.safetensors")}
    assert len(weights) == 2
    assert run("methods", arguments, monkeypatch, capsys).splitlines()[-2:] == table
    assert {p: p.stat().st_mtime_ns for p in weights} == weights


@pytest.mark.slow
def test_two_losses_are_watched_and_watching_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained.safetensors"
    torch.manual_seed(0)
    options = dict(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, class_token=False, global_pool="avg")
    save_weights(timm.create_model("vit_tiny_patch16_224", num_classes=10, **options).state_dict(), trained)
    model = "--model vit_tiny_patch16_224 --model-kwargs " + " ".join(f"{k}={v!r}" for k, v in options.items())
    model += f" --checkpoint {trained} --epochs 2 --batch-size 256 --every 2 --lr 1e-3"
    variants = ["thesis", "constant:small_ce=1:adjoined_teacher=frozen", "distill"]
    printed = run("adjoined", f"--output {tmp_path} {model} --variants {' '.join(variants)}", monkeypatch, capsys)
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split(" ")[0] in variants}
    assert [row.count("nan") for row in table.values()] == [1, 0, 3]  # no original; no large, no angles
    with (tmp_path / "thesis" / "gradients.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(0, 2 * len(rows), 2)) and len(rows) > 3
    assert all(0 < float(row[f"angle_{name}"]) < 180 for row in rows for name in ("kl", "q", "small"))
    assert all(0.1 < float(row["shared"]) < 0.7 for row in rows)  # alpha 2 keeps a quarter of most matrices
    assert (tmp_path / "adjoined.png").stat().st_size > 10_000
    unwatched = RetrainConfig(**typed(RetrainConfig, read_options(tmp_path / "thesis" / "config.yaml"), tmp_path))
    run_retrain(replace(unwatched, output=tmp_path / "unwatched"))
    first, second = (load_weights(tmp_path / name / "large.safetensors") for name in ("thesis", "unwatched"))
    assert all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_torch_pruning_meets_the_budget_and_learns(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table, kinds = tmp_path / "table.json", ["dims-bottleneck", "heads-bottleneck", "both"]
    small = {"vit": "depth=3 patch_size=8", "swin": "depths=1,2"}[family]
    arguments = f"--space {family}-an-nano --model-kwargs {small} --budget 0.5 --kinds {' '.join(kinds)}"
    run(
        "pruners",
        f"{arguments} --calibration-images 64 --epochs 1 --lr 1e-3 --test-images 100 --output {table}",
        monkeypatch,
        capsys,
    )
    whole, *cut = json.loads(table.read_text())
    assert whole["share"] == 1 and [row["network"] for row in cut] == [f"{kind} 0.5" for kind in kinds]
    assert all(0.4 < row["share"] <= 0.5 and row["params"] < whole["params"] for row in cut)
    assert all(row["epoch"] in (0, 1) and row["best"] == "*" for row in cut)


@pytest.mark.slow
def test_a_network_of_another_family_is_trained_compressed_and_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("img_size=32", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=2")
    monkeypatch.setitem(families.NETWORKS, "dinov3", replace(families.NETWORKS["dinov3"], model_kwargs=small))
    data = class_folders(tmp_path / "data", 4, train=30, val=5)
    arguments = f"--output {tmp_path / 'out'} --data-dir {data} --networks dinov3 --epochs 1 --budgets 0.7 --threads 1"
    printed = run("families", f"{arguments} --workers 0", monkeypatch, capsys)
    base, ours, theirs = (
        row
        for way in ("ours", "torch-pruning")
        for row in json.loads((tmp_path / f"out/dinov3/{way}.json").read_text())
        if way == "ours" or row["network"] != "unpruned"
    )
    assert base["share"] == 1 and base["cut"] == nas_top1(tmp_path / "out/dinov3/base")
    assert all(0.5 < row["share"] <= 0.7 and row["params"] < base["params"] for row in (ours, theirs))
    assert theirs["network"] == "neurons 0.7" and "dinov3" in printed
    weights = (tmp_path / "out/dinov3/base/large.safetensors").stat().st_mtime_ns
    run("families", f"{arguments} --workers 0", monkeypatch, capsys)
    assert (tmp_path / "out/dinov3/base/large.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
def test_the_table_of_evidence_has_a_row_for_every_way_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, class_token=False, global_pool="avg")
    monkeypatch.setitem(FAMILIES, "vit", replace(FAMILIES["vit"], nano_kwargs=small))
    data, ways = class_folders(tmp_path / "data", 4, train=30, val=5), ["random", "importance", "gradient", "uvc"]
    monkeypatch.setitem(evidence.SEARCHES, "random", evidence.Way("free", {"searcher": "random", "candidates": 3}))
    monkeypatch.setattr(evidence, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
    rows = ["control", "uniform", *ways, "by default", *evidence.PRUNED]
    arguments = f"--output {tmp_path} --data-dir {data} --base-epochs 1 --epochs 2 --search-epochs 1 --lr 1e-3"
    arguments += " --budgets 0.7 --seeds 0 --threads 1 --workers 0 --rows"
    monkeypatch.setattr(sys, "argv", ["evidence", *arguments.split(), *rows])
    evidence.main()
    table = list(csv.DictReader((tmp_path / "vit/evidence.csv").open(newline="")))
    assert [row["row"] for row in table] == rows and not any(row.get("failed") for row in table)
    start = float(table[0]["params"])
    assert all(float(r["share"]) <= 0.7 and float(r["params"]) < start and float(r["trained"]) >= 0 for r in table[1:])
    assert float(table[0]["share"]) == 1 and float(table[0]["cut"]) == nas_top1(tmp_path / "vit/base")
    markdown = (tmp_path / "vit/evidence.md").read_text()
    assert markdown in capsys.readouterr().out and markdown.count("\n") == len(rows) + 2
    assert (tmp_path / "vit/evidence.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(evidence.ROW)}
    evidence.main()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob(evidence.ROW)} == before and len(before) == 9


def nas_top1(folder: Path) -> float:
    """Of the large network, by the run's own table."""
    return float(json.loads((folder / "summary.json").read_text())["large"]["top1"])


def test_without_torch_pruning_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UserError, match="Torch-Pruning is not installed: pip install"):
        run("pruners", "", monkeypatch, None)  # type: ignore[arg-type]  # nothing is printed


@pytest.mark.slow
def test_networks_drawn_at_random_stand_in_the_basis_of_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a retrain of each would read; none is run. A Swin, whose rotated stem costs a layer more."""
    import benchmarks.chance

    options = dict(img_size=16, patch_size=2, embed_dim=24, depths=(2, 2), num_heads=(6, 12), window_size=4)
    supernet = nas.Supernet(timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **options)).eval()
    basis = nas.rewrite(supernet, [torch.randn(48, 3, 16, 16)])
    arch = nas.pick(supernet, "swin-dan-nano", [{"alpha": 2}] * 4, model_kwargs=options)
    budget = arch.flops / arch.backbone_flops + 0.01
    arch = replace(arch, search={"budget": budget})
    open_run(SearchConfig(space="swin-dan-nano", dataset="digits", batch_size=256, output=tmp_path / "s"), "search")
    nas.save(nas.cut(supernet, arch), tmp_path / "s", arch, basis)
    save_weights(timm_state(supernet), tmp_path / "s" / SUPERNET)
    x, read = torch.randn(2, 3, 16, 16), []

    def retrained(config: RetrainConfig) -> None:
        assert config.arch is not None and config.output is not None
        opened = open_folder(config.arch, torch.device("cpu"))
        assert opened.supernet is not None
        assert torch.allclose(opened.supernet.large(x), supernet.large(x), rtol=1e-4, atol=1e-4)
        assert opened.arch.flops == supernet.flops(opened.subnet) <= budget * arch.backbone_flops
        read.append(opened.arch)
        config.output.mkdir()
        write_json(config.output / "summary.json", {"compact": {"top1": 0.0}})

    monkeypatch.setattr(benchmarks.chance, "run_retrain", retrained)
    run("chance", f"--search {tmp_path / 's'} --output {tmp_path / 'chance'} --count 3", monkeypatch, capsys)
    assert [a.basis for a in read] == [arch.basis] * 4 and len({str(a.blocks) for a in read}) == 4


@pytest.mark.slow
def test_a_search_is_compared_with_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("patch_size=8", "embed_dim=48", "depth=4")
    search = SearchConfig(
        space="vit-dan-nano", model_kwargs=small, budget=0.6, epochs=1, batch_size=256, threads=1, output=tmp_path / "s"
    )
    run_search(search)
    arguments = f"--search {tmp_path / 's'} --output {tmp_path / 'chance'} --count 2 --epochs 1"
    *rows, last = run("chance", arguments, monkeypatch, capsys).splitlines()[-4:]
    assert [row.split()[0] for row in rows] == ["searched", "chance-0", "chance-1"]
    assert all(0.58 <= float(row.split()[1]) <= 0.6 for row in rows)
    assert len({row.split(maxsplit=4)[4] for row in rows}) == 3  # different networks
    beaten = sum(float(rows[0].split()[3]) > float(row.split()[3]) for row in rows[1:])
    assert last.endswith(f"beats {beaten} of 2")


def test_a_table_of_latencies_is_held_against_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nas.machine.devices import device_name
    from tests.nas.prices.drawn_table import HERE, drawn_table

    model, kwargs = "vit_tiny_patch16_224", dict(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2)
    setting = replace(HERE, device=device_name(torch.device("cpu")))
    write_json(tmp_path / "t.json", drawn_table(Supernet(timm.create_model(model, **kwargs)), setting=setting).record())
    arguments = f"--table {tmp_path / 't.json'} --model {model} --model-kwargs " + " ".join(
        f"{name}={value}" for name, value in kwargs.items()
    )
    arguments += f" --networks 3 --rounds 1 --granularity 2 --output {tmp_path}"
    printed = run("latency", arguments, monkeypatch, capsys)
    assert "4 networks" in printed and "nan" not in printed
    assert all(f"{name:8} mean error" in printed for name in ("lines", "grid")) and "ms per GFLOP" in printed
    rows = list(csv.DictReader((tmp_path / "latency.csv").open(newline="")))
    assert list(rows[0]) == ["network", "gflops", "lines", "grid", "ms"] and len(rows) == 4
    assert (tmp_path / "latency.png").stat().st_size > 5000
    write_json(
        tmp_path / "far.json", json.loads((tmp_path / "t.json").read_text().replace(setting.device, "a telephone"))
    )
    with pytest.raises(UserError, match="the table is of a telephone"):
        run("latency", arguments.replace("t.json", "far.json"), monkeypatch, capsys)
