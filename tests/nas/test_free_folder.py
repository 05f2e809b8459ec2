"""The folders of a search over free widths and of its retrain: whatever opens a run opens them, and says what is so."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import nas.stages.retrain
import nas.timm_entry
from nas import describe, plot, validate
from nas.config import RetrainConfig, SearchConfig
from nas.export import parser, run_export
from nas.runs.card import model_card
from nas.runs.opened import open_folder
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from tests.nas import tiny
from tests.nas.run_checks import assert_whole, draw_pictures, visible
from tests.oracle import randomise

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = dict(
    dataset="folder", workers=0, threads=1, device="cpu", val_fraction=0.2, batch_size=64, refit_images=64
)


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("free")
    name, options = tiny.VIT
    save_file(randomise(timm.create_model(name, num_classes=6, **options), 0).state_dict(), root / "mine.safetensors")
    config = SearchConfig(
        space="vit-free-nano",
        model=name,
        model_kwargs=tuple(f"{key}={value}" for key, value in options.items()),
        checkpoint=root / "mine.safetensors",
        data_dir=draw_pictures(root / "pictures"),
        output=root / "search",
        evals=3,
        calibration_images=64,
        **OPTIONS,
    )
    return run_search(config)


@pytest.fixture(scope="module")
def retrain(search: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
        config = RetrainConfig(
            arch=search, data_dir=search.parent / "pictures", output=search.parent / "retrain", epochs=1, **OPTIONS
        )
        return run_retrain(config)


@pytest.fixture(params=["search", "retrain"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.slow
def test_a_search_leaves_the_network_and_its_pictures(search: Path) -> None:
    assert_whole(search)
    assert {
        "arch.json", "compact.safetensors", "supernet.safetensors", "config.json", "basis.safetensors", "summary.json",
        "candidates.csv", "candidates.png", "architecture.png", "pareto.png",
    } <= set(visible(search))  # fmt: skip
    assert not {"log.csv", "checkpoint.pt"} & set(visible(search))


def test_each_network_measures_as_its_stage_reported_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.machine.timing.images_per_second", lambda networks, *_: dict.fromkeys(networks, 7.0))
    rows = validate.run_validate(validate.parser().parse_args(["--weights", str(folder), "--workers", "0"]))["networks"]
    summary = json.loads((folder / "summary.json").read_text())
    assert list(rows) == (["original", "subnet", "compact"] if summary["stage"] == "search" else ["compact"])
    for name, row in rows.items():
        for key in ("params", "gflops") if name == "subnet" else ("top1", "top5", "params", "gflops"):
            assert row[key] == pytest.approx(summary[name][key])


def test_the_subnet_of_a_search_is_not_refitted_and_its_compact_network_is(search: Path) -> None:
    opened, x = open_folder(search, CPU), torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        large, subnet, compact = (network(x) for network in opened.networks().values())
    assert (compact - large).square().mean() < (subnet - large).square().mean() / 2
    assert list(open_folder(search / "supernet.safetensors", CPU).networks()) == ["original", "subnet"]


def test_timm_opens_both(folder: Path) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(network(x), nas.load(folder)(x))
    maps = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True)(x)
    (width,) = load_architecture(folder).stage_widths
    assert {m.shape[1] for m in maps} == {width}


def test_both_are_exported_and_carded(folder: Path) -> None:
    options = ["--no-onnx", "--no-compile", "--rounds", "5", "--seconds", "0", "--batches", "1"]
    run_export(parser().parse_args([str(folder), *options]))
    card, arch = (folder / "README.md").read_text(), load_architecture(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert "| | original | compact | |" in card and not {"large", "teacher"} & summary.keys()
    assert f"| top-1 % | {summary['original']['top1']:.4g} | {summary['compact']['top1']:.4g} |" in card
    assert f"* hidden by block: {' '.join(str(block['hidden']) for block in arch.blocks)}\n" in card
    assert "its widths chosen one by one" in card and "width)" not in card
    trained = "* distill training: epochs 1" in card
    refitted = "refitted on up to 64 training images, without labels; not trained since" in card
    assert (trained, refitted) == ((False, True) if summary["stage"] == "search" else (True, False))


def test_a_card_does_not_speak_of_a_refit_that_was_not(search: Path, tmp_path: Path) -> None:
    for name in ("arch.json", "summary.json", "config.yaml"):
        (tmp_path / name).write_text((search / name).read_text().replace("refit_images: 64", "refit_images: 0"))
    assert "not refitted; not trained since" in model_card(tmp_path, load_architecture(tmp_path))


@pytest.mark.slow
def test_both_are_described_and_drawn_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe.main([str(folder), "--output", str(folder / "again.png")])
    assert "choices" not in capsys.readouterr().out
    assert (folder / "again.png").read_bytes() == (folder / "architecture.png").read_bytes()
    (folder / "again.png").unlink()
    names = {path.name for path in plot.plot_all(folder)}
    assert {"architecture.png", "basis.png", "pareto.png"} <= names
    assert ("candidates.png" in names) == (folder / "candidates.csv").is_file()
