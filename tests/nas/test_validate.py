"""Accuracy and speed of finished networks, from a run's folder or one of its files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.compact_file import load_compact
from nas.opened import open_folder, test_images
from nas.validate import main, parser, run_validate
from search_spaces.errors import UserError
from tests.nas.finished import finished_run

test_images.__test__ = False  # type: ignore[attr-defined]  # not a test
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate") / "run"
    finished_run(folder)
    return folder


def validate(*arguments: Any) -> dict[str, Any]:
    return run_validate(parser().parse_args([*map(str, arguments), "--speed-batches", "1", "--workers", "0"]))


def test_all_three_networks_of_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.speed.images_per_second", lambda networks, *_: dict.fromkeys(networks, 7.0))
    result = validate("--weights", run)
    rows = result["networks"]
    assert list(rows) == ["large", "subnet", "compact"]
    assert rows["subnet"]["top1"] == rows["compact"]["top1"] and rows["subnet"]["top5"] == rows["compact"]["top5"]
    assert rows["large"]["params"] > rows["compact"]["params"] and rows["compact"]["images_per_s_1"] == 7.0
    network, right, seen = load_compact(run), 0, 0
    opened = open_folder(run, CPU)
    with torch.no_grad():
        batches, reported = test_images(opened, CPU, {})
        for images, labels in batches:
            right += int((network(images).argmax(1) == labels).sum())
            seen += len(labels)
    assert rows["compact"]["top1"] == pytest.approx(100 * right / seen)
    assert json.loads((run / "validation.json").read_text()) == result
    assert reported == result["split"] == "test fifth" and result["images"] == 359


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
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("nas.validate: error: ")
