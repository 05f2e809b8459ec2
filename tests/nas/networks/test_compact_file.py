"""What is written beside a compact network is of that network: its classes, its sizes, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nas.networks.compact_file import load_compact, save_compact
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from tests.nas.finished import finished_run, pictures


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, Architecture, Any]:
    arch, _ = finished_run(tmp_path / "run")
    return tmp_path / "run", arch, load_compact(tmp_path / "run")


def test_other_classes_are_written_as_they_are(run: tuple[Path, Architecture, Any], tmp_path: Path) -> None:
    folder, arch, network = run
    for change in ("reset_classifier", "head.fc"):
        if change == "reset_classifier":
            network.reset_classifier(3)
        else:
            network.head.fc = nn.Linear(network.num_features, 7)
        save_compact(network, tmp_path / change, arch)
        written, classes = load_architecture(tmp_path / change), network.head.fc.out_features
        assert written.num_classes == classes
        assert written.params == sum(p.numel() for p in network.parameters()) < arch.params
        width = network.num_features
        assert arch.flops - written.flops == (10 - classes) * width
        again: Any = load_compact(tmp_path / change)
        assert torch.equal(again(pictures()), network(pictures()))
        assert again.num_classes == again.pretrained_cfg["num_classes"] == classes
    assert load_architecture(folder).num_classes == arch.num_classes == 10


@pytest.mark.parametrize(
    "change", ["no head", "another size", "a window", "another network", "cut once more", "mlp head"]
)
def test_another_network_is_refused_and_nothing_written(
    run: tuple[Path, Architecture, Any], tmp_path: Path, change: str
) -> None:
    folder, arch, network = run
    if change == "no head":
        network.reset_classifier(0)
    elif change == "another size":
        network.set_input_size(40, window_size=4)
    elif change == "a window":
        network.set_input_size(36, window_size=3)
    elif change == "another network":
        network.layers[0].blocks[1] = network.layers[0].blocks[0]
    elif change == "cut once more":
        mlp = network.layers[0].blocks[0].mlp
        mlp.fc1, mlp.fc2 = nn.Linear(mlp.fc1.in_features, 3), nn.Linear(3, mlp.fc2.out_features)
    else:
        network.head.fc = nn.Sequential(nn.Linear(network.num_features, 8), nn.Linear(8, 10))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for there in (folder, tmp_path / "elsewhere"):
        with pytest.raises(UserError, match=r"no linear classifier|is not the one that the architecture describes"):
            save_compact(network, there, arch)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not (tmp_path / "elsewhere").exists()
