"""Images without labels and networks without classifier, through both stages and what opens their results."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import nas
from nas import describe, validate
from nas.config import SearchConfig
from nas.data.loaders import open_data
from nas.export import differences
from nas.machine.runtimes import export_program
from nas.networks.compact_file import load_compact, save_compact
from nas.objectives.features import Features
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from supernets.feature_head import feature_head
from tests.nas.run_checks import assert_whole, log_rows
from tests.nas.stages.free_world import CLASSES, FAMILIES, World, world

__all__ = ["world"]  # the fixture


@pytest.fixture(scope="module")
def flat(world: World) -> Path:
    """The pictures in one folder."""
    folder = world.root / "flat"
    folder.mkdir()
    for path in sorted(world.pictures.glob("*/*.png")):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    return folder


def without_classifier(world: World, family: str) -> Path:
    path = world.root / f"{family}-features.safetensors"
    if not path.exists():
        state = load_file(world.checkpoint(family))
        save_file({n: t for n, t in state.items() if not n.startswith("head.")}, path)
    return path


def of_features(world: World, output: Path, family: str = "vit", **options: Any) -> SearchConfig:
    config: SearchConfig = world.search(
        output, family, **dict(checkpoint=without_classifier(world, family), evals=1) | options
    )
    return config


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def searched(world: World, flat: Path) -> Path:
    return run_search(of_features(world, world.root / "features", data_dir=flat, evals=2))


@pytest.fixture(scope="module")
def trained(world: World, flat: Path, searched: Path) -> Path:
    return run_retrain(world.retrain(world.root / "trained-features", arch=searched, data_dir=flat))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_without_classifier_and_labels(
    family: str, world: World, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_search(of_features(world, tmp_path / "run", family, data_dir=flat))
    said = capsys.readouterr().out
    assert "has no classifier: its output are its pooled features" in said and "folder, without labels: reads" in said
    assert_whole(folder)
    arch, summary = load_architecture(folder), summary_of(folder)
    assert arch.num_classes == 0 and arch.flops <= (0.75 if family == "t2t" else 0.5) * arch.backbone_flops
    assert set(summary["compact"]) == {
        "params", "gflops", "cosine", "feature_error", "held_out_cosine", "held_out_feature_error"
    }  # fmt: skip
    assert summary["original"]["cosine"] == pytest.approx(1) and summary["original"]["feature_error"] == 0
    assert summary["compact"]["held_out_feature_error"] < summary["subnet"]["held_out_feature_error"]
    name, options = FAMILIES[family]
    original = timm.create_model(name, num_classes=0, **options)
    original.load_state_dict(load_file(folder / "supernet.safetensors"))  # timm's own names and shapes
    own = load_file(without_classifier(world, family))
    x = torch.randn(4, *arch.input_size, generator=torch.Generator().manual_seed(0))
    expected = original.eval()(x)
    again = timm.create_model(name, num_classes=0, **options)
    again.load_state_dict(own)
    assert torch.allclose(again.eval()(x), expected, atol=1e-4)
    compact: Any = nas.load(folder)
    assert compact(x).shape == expected.shape
    assert sum(p.numel() for p in compact.parameters()) == arch.params == summary["compact"]["params"]
    assert sum(p.numel() for p in again.parameters()) == arch.backbone_params


@pytest.mark.slow
def test_the_compact_network_is_opened_saved_and_exported(searched: Path, tmp_path: Path) -> None:
    arch, compact = load_architecture(searched), load_compact(searched)
    found = feature_head(compact)
    assert found is not None and found[1].out_features == 16 and found[1].in_features == arch.stage_widths[0]
    save_compact(compact, tmp_path, arch)
    x = torch.randn(2, *arch.input_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_compact(tmp_path)(x), compact(x)) and torch.equal(
        load_compact(tmp_path, num_classes=0)(x), compact(x)
    )
    import nas.timm_entry  # noqa: F401

    assert torch.equal(timm.create_model(f"local-dir:{searched}", pretrained=True).eval()(x), compact(x))
    program = export_program(compact, x)
    assert differences(compact, {"program": program.module()}, {"x": x})["program"]["x"] < 1e-4
    classified: Any = load_compact(searched, num_classes=7)
    assert classified(x).shape == (2, 7) and feature_head(classified) is None
    assert torch.equal(classified.forward_features(x), compact.forward_features(x))  # type: ignore[operator]
    classified.reset_classifier(3)
    save_compact(classified, tmp_path / "three", arch)
    assert load_architecture(tmp_path / "three").num_classes == 3


def test_it_is_described(searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe.main([str(searched), "--output", str(tmp_path / "picture.png")])
    said = capsys.readouterr().out
    assert "no classifier, features" in said and "features" in said


def test_labels_only_measure_where_the_weights_have_no_classifier(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_search(of_features(world, tmp_path / "labelled"))
    said = capsys.readouterr().out
    assert "comes without classifier: its output are its pooled features, and labels only measure them" in said
    assert "--num-classes 5" in said and "folder, 5 classes" in said
    summary = summary_of(folder)
    assert 0 <= summary["compact"]["knn"] <= 100 and "knn" in summary["original"] and "top1" not in summary["compact"]
    with pytest.raises(UserError, match="no classifier for these 5 classes; train one first"):
        run_search(of_features(world, tmp_path / "fresh", num_classes=CLASSES))


def test_a_classifier_that_there_is_can_be_left_out(world: World, tmp_path: Path) -> None:
    folder = run_search(world.search(tmp_path / "left-out", num_classes=0, evals=1))
    assert load_architecture(folder).num_classes == 0 and "knn" in summary_of(folder)["compact"]


def test_both_ways_to_open_a_folder_read_the_same_pictures(world: World, flat: Path) -> None:
    of_classes = open_data(world.retrain(world.root / "x", labels=False))
    assert of_classes.num_classes == 0 and of_classes.class_names is None
    assert len(of_classes.train) == len(open_data(world.retrain(world.root / "x", data_dir=flat)).train)


# Stage 2


def test_training_keeps_the_best_by_held_out_error(trained: Path, searched: Path) -> None:
    assert_whole(trained)
    errors = [float(row["held_out_subnet_error"]) for row in log_rows(trained / "log.csv")]
    assert len(errors) == 3 and np.isfinite(errors).all()
    summary, before = summary_of(trained), summary_of(searched)
    assert summary["train"] == "features" and {"cosine", "feature_error"} <= set(summary["compact"])
    assert "top1" not in summary["compact"] and summary["original"]["cosine"] == pytest.approx(1)
    assert not (trained / "large.safetensors").exists()
    assert load_architecture(trained).num_classes == 0
    # the start is among those that are kept: what is delivered is as near as what was given, or nearer
    assert summary["compact"]["feature_error"] < 1.05 * before["compact"]["feature_error"]
    best = torch.load(trained / "best.pt", weights_only=True)
    assert best["rows"][-1]["held_out_subnet_error"] == min(errors)


def test_more_epochs_bring_the_tokens_nearer(world: World, flat: Path, searched: Path, tmp_path: Path) -> None:
    """From a network that was cut and not refitted: there is something to gain."""
    options = dict(arch=searched, data_dir=flat, epochs=8, lr=3e-3, refit_images=0, scale=(1.0, 1.0))
    errors = [
        float(row["held_out_subnet_error"])
        for row in log_rows(run_retrain(world.retrain(tmp_path / "run", **options)) / "log.csv")
    ]
    assert min(errors) < 0.9 * errors[0]


def test_no_label_is_read(
    world: World, searched: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class folders under --no-labels give the run of the flat folder's kind: whatever the labels are."""
    seen: list[torch.Tensor] = []
    forward = Features.forward

    def watched(self: Any, images: Any, target: Any, step: Any) -> Any:
        seen.append(target)
        return forward(self, images, target, step)

    monkeypatch.setattr(Features, "forward", watched)
    run_retrain(world.retrain(tmp_path / "run", arch=searched, labels=False, epochs=1))
    assert seen and all(not target.any() for target in seen)


@pytest.mark.slow
def test_a_classifier_follows_without_labels(
    world: World, flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_search(world.search(tmp_path / "search", data_dir=flat, evals=1))
    arch, summary = load_architecture(found), summary_of(found)
    assert arch.num_classes == CLASSES  # of the checkpoint
    assert summary["original"]["agreement"] == 100 and summary["original"]["kl"] == pytest.approx(0, abs=1e-6)
    assert {"kl", "agreement", "held_out_kl"} <= set(summary["compact"]) and "top1" not in summary["compact"]
    folder = run_retrain(world.retrain(tmp_path / "train", arch=found, data_dir=flat, distill_blocks=(0,)))
    said = capsys.readouterr().out
    assert "--train features, which reads no labels: these images have none" in said
    rows = log_rows(folder / "log.csv")
    assert {"loss_tokens", "loss_distill", "held_out_subnet_error", "held_out_subnet_kl"} <= set(rows[-1])
    assert load_architecture(folder).num_classes == CLASSES and {"kl", "agreement"} <= set(
        summary_of(folder)["compact"]
    )
    alone = run_retrain(
        world.retrain(tmp_path / "alone", arch=found, data_dir=flat, train="distill", distill_weight=1.0, epochs=1)
    )
    assert "held_out_subnet_kl" in log_rows(alone / "log.csv")[-1]


def test_with_labels_features_are_trained_too(world: World, tmp_path: Path) -> None:
    found = run_search(world.search(tmp_path / "search", evals=1))
    folder = run_retrain(world.retrain(tmp_path / "train", arch=found, train="features", epochs=1))
    assert {"held_out_subnet_error", "held_out_subnet_top1"} <= set(log_rows(folder / "log.csv")[-1])
    assert "top1" in summary_of(folder)["compact"]
    both = run_retrain(
        world.retrain(tmp_path / "both", arch=found, distill_features=0.5, distill_blocks=(0,), epochs=1)
    )
    assert {"loss_ce", "loss_distill", "loss_tokens"} <= set(log_rows(both / "log.csv")[-1])


def test_another_factor_spaces_network_is_trained_so(world: World, tmp_path: Path) -> None:
    """AN by its factor, no search and no refit, ordered and rotated."""
    name, options = FAMILIES["vit"]
    common = dict(
        space="vit-an-nano", alpha=2, checkpoint=without_classifier(world, "vit"), num_classes=0, epochs=1,
        model=name, model_kwargs=tuple(f"{k}={v!r}" for k, v in options.items()),
    )  # fmt: skip
    for basis in ("rotate", "order"):
        folder = run_retrain(world.retrain(tmp_path / basis, basis=basis, **common))
        assert load_architecture(folder).num_classes == 0 and "cosine" in summary_of(folder)["compact"]


def test_a_further_round_goes_on_from_features(world: World, flat: Path, searched: Path, tmp_path: Path) -> None:
    config = SearchConfig(
        arch=searched, budget=0.4, evals=1, output=tmp_path / "two", threads=1, workers=0, device="cpu", batch_size=16
    )
    folder = run_search(config)
    arch, large = load_architecture(folder), load_architecture(searched)
    assert arch.num_classes == 0 and arch.flops < large.flops and "cosine" in summary_of(folder)["previous"]
    state = load_file(folder / "supernet.safetensors")
    assert state["head.weight"].shape == (16, large.stage_widths[0])  # of the compact network before it
    assert load_compact(folder)(torch.randn(2, *arch.input_size)).shape == (2, 16)
    again = run_retrain(world.retrain(tmp_path / "train", arch=folder, data_dir=flat, epochs=1))
    assert "cosine" in summary_of(again)["previous"]


# What needs a classifier or labels is refused by its name


NEITHER = "these images have none, and the network no classifier"
REFUSED_SEARCHES: dict[str, tuple[dict[str, Any], str]] = {
    "gradient": (
        dict(searcher="gradient", epochs=1),
        f"vit-free-nano is searched by gradient, which learns from labels; {NEITHER}: take --searcher importance,"
        " evolution, random or uniform",
    ),
    "top1": (dict(decide="top1"), "--decide top1 counts hits; these images have none"),
    "loss": (dict(decide="loss"), "--decide loss reads labels; these images have none"),
}
REFUSED_TRAININGS: dict[str, tuple[dict[str, Any], str]] = {
    "distill": (dict(train="distill"), f"--train distill learns from labels; {NEITHER}: take --train features"),
    "adjoined": (dict(train="adjoined"), "--train adjoined learns from labels"),
    "teacher": (
        dict(train="features", teacher="vit_tiny_patch16_224"),
        "--teacher: tokens are matched in the channels of the original network",
    ),
    "hard": (dict(train="features", distill="hard"), "follows the teacher's whole output"),
    "block": (dict(train="features", distill_blocks=(5,)), "--distill-blocks 5: the network has blocks 0 to 1"),
    "weightless": (dict(train="distill", distill_blocks=(0,)), "nothing weighs"),
    "other way": (
        dict(train="adjoined", distill_features=1.0),
        "--distill-features goes with --train distill or features",
    ),
    "negative": (dict(distill_features=-1.0), "--distill-features -1.0"),
}


@pytest.mark.parametrize(("options", "words"), REFUSED_SEARCHES.values(), ids=REFUSED_SEARCHES)
def test_a_search_is_refused(options: dict[str, Any], words: str, world: World, flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        run_search(of_features(world, tmp_path / "run", **dict(data_dir=flat) | options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "words"), REFUSED_TRAININGS.values(), ids=REFUSED_TRAININGS)
def test_a_training_is_refused(
    options: dict[str, Any], words: str, world: World, flat: Path, searched: Path, tmp_path: Path
) -> None:
    config = world.retrain(tmp_path / "run", arch=searched, data_dir=flat)
    with pytest.raises(UserError, match=words):
        run_retrain(replace(config, **options))


def test_images_without_labels_teach_nothing_from_scratch(world: World, flat: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teach no network from scratch"):
        run_search(world.search(tmp_path / "run", data_dir=flat, checkpoint=None))


# nas.validate


def table(arguments: list[str], folder: Path) -> dict[str, Any]:
    out = folder / "validation.json"
    own = ["--output", str(out), "--speed-batches", "1", "--workers", "0", "--threads", "1", "--device", "cpu"]
    validate.run_validate(validate.parser().parse_args([*arguments, *own]))
    found: dict[str, Any] = json.loads(out.read_text())["networks"]
    return found


def test_validate_measures_likeness_and_neighbours(
    world: World, flat: Path, searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = table(["--weights", str(searched)], tmp_path)
    expected = summary_of(searched)
    for name in ("original", "compact"):
        for column in ("cosine", "feature_error"):
            assert found[name][column] == pytest.approx(expected[name][column], abs=1e-5)
    pictures = ["--dataset", "folder", "--data-dir", str(world.pictures)]
    found = table(["--weights", str(searched), *pictures, "--knn"], tmp_path)
    assert all(0 <= row["knn"] <= 100 for row in found.values()) and "cosine" in found["compact"]
    with pytest.raises(UserError, match="--knn tells classes apart, and these images have no labels"):
        table(["--weights", str(searched), "--knn"], tmp_path)


def test_validate_finds_neighbours_of_any_network(world: World, tmp_path: Path) -> None:
    name, options = FAMILIES["vit"]
    own = ["--model", name, "--model-kwargs", *(f"{k}={v!r}" for k, v in options.items())]
    pictures = ["--dataset", "folder", "--data-dir", str(world.pictures), "--knn"]
    classified = table([*own, "--checkpoint", str(world.trained), *pictures], tmp_path)["network"]
    assert {"top1", "knn"} <= set(classified)
    features = table([*own, "--checkpoint", str(without_classifier(world, "vit")), *pictures], tmp_path)["network"]
    assert "top1" not in features and features["knn"] == classified["knn"]  # the same features
