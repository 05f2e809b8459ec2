"""Accuracy and speed of finished networks, from a run's folder or one of its files."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config

from nas.networks.compact_file import load_compact
from nas.runs.opened import open_folder
from nas.stages.reported import reported_images
from nas.validate import IMAGES, _options, main, parser, run_validate
from search_spaces.errors import UserError
from supernets.supernet import Supernet
from tests.nas.finished import finished_run
from tests.photographs import PRETRAINED, TINY_IMAGENET, class_folders

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "run"
    finished_run(folder)
    return folder


def validate(*arguments: Any) -> dict[str, Any]:
    return run_validate(parser().parse_args([*map(str, arguments), "--speed-batches", "1", "--workers", "0"]))


def test_all_three_networks_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.machine.timing.images_per_second", lambda networks, *_: dict.fromkeys(networks, 7.0))
    result = validate("--weights", run)
    rows = result["networks"]
    assert list(rows) == ["large", "subnet", "compact"]
    assert rows["subnet"]["top1"] == rows["compact"]["top1"] and rows["subnet"]["top5"] == rows["compact"]["top5"]
    assert rows["large"]["params"] > rows["compact"]["params"] and rows["compact"]["images_per_s_1"] == 7.0
    network, right, seen = load_compact(run), 0, 0
    opened = open_folder(run, CPU)
    large, small = opened.supernet.flops() / 1e9, opened.supernet.flops(opened.subnet) / 1e9
    assert [row["gflops"] for row in rows.values()] == [large, small, small]
    with torch.no_grad():
        reported = reported_images(opened, CPU, {})
        for images, labels in reported.images:
            right += int((network(images).argmax(1) == labels).sum())
            seen += len(labels)
    assert rows["compact"]["top1"] == pytest.approx(100 * right / seen)
    assert json.loads((run / "validation.json").read_text()) == result
    assert reported.words == result["split"] == "test fifth" and result["images"] == 359


def test_the_stream_parts_from_the_large_networks_block_by_block(run: Path) -> None:
    rows = validate("--weights", run, "--by-block")["networks"]
    cosines = [rows[name]["cosine_by_block"] for name in ("subnet", "compact")]
    assert "cosine_by_block" not in rows["large"] and len(cosines[0]) == 3
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-5) and all(0 < value < 0.9999 for value in cosines[0])
    assert (run / "blocks.png").stat().st_size > 5000
    with pytest.raises(UserError, match="--by-block holds small networks against the large one"):
        validate("--weights", run / "compact.safetensors", "--by-block")


def test_one_file_is_one_network(run: Path, tmp_path: Path) -> None:
    assert list(open_folder(run / "compact.safetensors", CPU).networks()) == ["compact"]
    assert list(open_folder(run / "large.safetensors", CPU).networks()) == ["large", "subnet"]


def test_what_does_not_fit_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        open_folder(tmp_path / "nowhere", CPU)
    (tmp_path / "arch.json").write_text((run / "arch.json").read_text())
    with pytest.raises(UserError, match=r"expected compact\.safetensors or"):
        open_folder(tmp_path, CPU)
    finished_run(tmp_path / "seven", num_classes=7)
    with pytest.raises(UserError, match=r"digits has 10 classes, the networks of .* 7"):
        validate("--weights", tmp_path / "seven")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nas.validate", "--weights", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("python -m nas.validate: error: ")


@pytest.mark.parametrize("exif", [True, False])
def test_images_lie_as_the_option_says(run: Path, monkeypatch: pytest.MonkeyPatch, exif: bool) -> None:
    specs: list[Any] = []
    monkeypatch.setattr("nas.stages.reported.eval_loader", lambda images, spec, device: specs.append(spec))
    options = parser().parse_args(["--exif" if exif else "--no-exif"])
    reported_images(open_folder(run, CPU), CPU, _options(options, *IMAGES))
    assert [spec.exif for spec in specs] == [exif]


VIT = ("vit_tiny_patch16_224", dict(img_size=48, embed_dim=48, depth=2, num_heads=4))
VIT_KWARGS = [f"{k}={v}" for k, v in VIT[1].items()]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("photographs"), classes=4, train=2, val=12)


def saved(folder: Path, model: str, num_classes: int = 4, **kwargs: Any) -> Path:
    """A file of random weights, under the wrapping that a training script leaves."""
    torch.manual_seed(3)
    network = timm.create_model(model, num_classes=num_classes, **kwargs)
    path = folder / "theirs.pth"
    torch.save({"state_dict": {f"module.{n}": t.half() for n, t in network.state_dict().items()}, "epoch": 3}, path)
    return path


def test_a_network_that_no_run_made_is_measured_as_timm_would(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, kwargs = VIT
    checkpoint = saved(tmp_path, model, **kwargs)
    arguments = ["--model", model, "--model-kwargs", *VIT_KWARGS, "--checkpoint", checkpoint, "--data-dir", photographs]
    result = validate(*arguments, "--crop-pct", "0.9", "--output", tmp_path / "out.json")
    said = capsys.readouterr().out
    network = timm.create_model(model, num_classes=4, **kwargs).eval()
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({n.removeprefix("module."): t.float() for n, t in state.items()})
    data = resolve_data_config({"input_size": (3, 48, 48), "crop_pct": 0.9}, model=network)
    images = create_dataset("", str(photographs), split="validation", transform=create_transform(**data))
    with torch.no_grad():
        right = sum(int(network(image[None]).argmax()) == label for image, label in images)
    (row,) = result["networks"].values()
    assert len(images) == result["images"] == 48
    assert row["top1"] == pytest.approx(100 * right / 48) and 0 < right < 48
    assert row["params"] == sum(p.numel() for p in network.parameters())
    assert row["gflops"] == Supernet(network).flops() / 1e9  # torch's counter and ours agree
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert "the spaces vit-* and deit-* take it" in said and "48 x 48 px, bicubic, centre crop 0.9" in said
    assert result["split"] == "validation split" and f"{checkpoint}, validation split" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "theirs.pth"]


@pytest.mark.slow
def test_a_network_of_no_space_is_measured_all_the_same(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = saved(tmp_path, "resnet10t")
    result = validate("--model", "resnet10t", "--checkpoint", checkpoint, "--data-dir", photographs)
    assert 0 <= result["networks"]["network"]["top1"] <= 100
    assert "measured only, no space takes it (ResNet is not a supported backbone" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["theirs.pth"]  # nothing is written unless asked for


def test_what_leaves_nothing_to_measure_is_refused(run: Path, photographs: Path, tmp_path: Path) -> None:
    model, kwargs = VIT
    checkpoint = saved(tmp_path, model, num_classes=9, **kwargs)
    named = ["--model", model, "--model-kwargs", *VIT_KWARGS, "--data-dir", photographs]
    for arguments, said in (
        ([], "give --weights, a run's folder or file, or --model"),
        (["--weights", run, *named], "one of them"),
        (["--weights", run, "--checkpoint", checkpoint], "--checkpoint goes with --model"),
        ([*named, "--checkpoint", checkpoint], "no classifier for the 4 classes of this dataset"),
        ([*named, "--checkpoint", tmp_path / "none.pth"], r"none\.pth: no such file"),
        ([*named, "--no-pretrained"], "--no-pretrained leaves nothing to measure"),
        ([*named, "--pretrained", "--checkpoint", checkpoint], "both name the weights"),
        (["--model", "vit_tinny", "--checkpoint", checkpoint], "unknown model"),
        ([*named, "--checkpoint", checkpoint, "--val-split", "nowhere"], "found only train"),
    ):
        with pytest.raises(UserError, match=said) as error:
            validate(*arguments)
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.skipif(not PRETRAINED.is_file(), reason="shared/pretrained does not lie beside the checkout")
def test_a_real_network_has_about_the_accuracy_it_was_given_with(tmp_path: Path) -> None:
    """75.16 % on 5,000 validation images, by its README; here on ten of each class, four standard errors wide."""
    taken: dict[str, int] = {}
    with tarfile.open(TINY_IMAGENET / "val.tar") as whole, tarfile.open(tmp_path / "val.tar", "w") as few:
        for member in whole:
            label = str(Path(member.name).parent)
            if member.isfile() and taken.setdefault(label, 0) < 10:
                taken[label] += 1
                few.addfile(member, whole.extractfile(member))
    (tmp_path / "train.tar").symlink_to((TINY_IMAGENET / "train.tar").resolve())
    model = ["--model", "vit_small_patch14_dinov2", "--model-kwargs", "img_size=112", "--checkpoint", PRETRAINED]
    (row,) = validate(*model, "--data-dir", tmp_path)["networks"].values()
    assert row["top1"] == pytest.approx(75.16, abs=5.5)
    assert row["gflops"] == pytest.approx(1.434, abs=5e-4)
