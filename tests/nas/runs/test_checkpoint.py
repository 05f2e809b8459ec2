"""Files are whole or untouched, and weights come in whatever wrapper people have."""

import argparse
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from nas.machine.files import copy_atomically
from nas.networks.backbone import Start, starting_backbone
from nas.networks.key_values import parse_key_values
from nas.networks.weights import load_weights, save_weights
from nas.runs.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from nas.training.loop import fit
from nas.training.state import CHECKPOINT
from search_spaces.errors import UserError
from tests.nas import tiny

FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import torch
    from nas.networks.weights import save_weights
    from nas.runs.checkpoint import save_checkpoint
    from search_spaces.errors import UserError

    folder = Path(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    large = {"w": torch.zeros(100_000)}
    for write, name in ((save_checkpoint, "checkpoint.pt"), (save_weights, "weights.safetensors")):
        try:
            write(large, folder / name)
        except UserError as error:
            print(error)
        else:
            sys.exit(f"{name} was written past the limit")
"""


def test_a_full_disk_stops_with_the_old_file_intact(tmp_path):
    save_checkpoint({"epoch": 1}, tmp_path / "checkpoint.pt")
    save_weights({"w": torch.ones(3)}, tmp_path / "weights.safetensors")
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write") == 2 and "untouched" in done.stdout
    assert load_checkpoint(tmp_path / "checkpoint.pt") == {"format": FORMAT, "epoch": 1}
    assert torch.equal(load_weights(tmp_path / "weights.safetensors")["w"], torch.ones(3))
    assert len(list(tmp_path.iterdir())) == 2, "a temporary file was left behind"


def test_a_copy_survives_the_next_checkpoint(tmp_path):
    save_checkpoint({"epoch": 1}, tmp_path / "checkpoint.pt")
    copy_atomically(tmp_path / "checkpoint.pt", tmp_path / "best.pt")
    save_checkpoint({"epoch": 2}, tmp_path / "checkpoint.pt")
    assert [load_checkpoint(tmp_path / f"{n}.pt")["epoch"] for n in ("best", "checkpoint")] == [1, 2]


def test_damaged_foreign_and_newer_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"epoch": 1, "w": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint\.pt is not a readable checkpoint"):
            load_checkpoint(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt is not a checkpoint of this toolkit"):
        load_checkpoint(path)
    torch.save({"format": FORMAT + 1}, path)
    with pytest.raises(UserError, match=rf"format {FORMAT + 1}, this toolkit reads up to {FORMAT}"):
        load_checkpoint(path)
    with pytest.raises(UserError, match=r"nowhere\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere.pt")


def test_a_resume_refuses_another_networks_checkpoint(tmp_path):
    fit(tiny.training(tiny.config(tmp_path, epochs=1)), resume=False, words="test")
    other = tiny.supernet(depth=3)
    with pytest.raises(UserError, match=r"checkpoint\.pt belongs to another run"):
        fit(tiny.training(tiny.config(tmp_path), tiny.Adjoined(other, tiny.half(other))), resume=True, words="test")


SWIN = "img_size=32 patch_size=2 window_size=4 embed_dim=32 depths=2,2,4 num_heads=2,4,8"


@pytest.fixture(scope="module")
def swin():
    """A 32-px Swin of three stages, as --model and --model-kwargs describe it."""
    model = "swin_tiny_patch4_window7_224", parse_key_values(tuple(SWIN.split()))
    network, _, _ = starting_backbone(*model, 10, Start(seed=7))
    return model, network.state_dict()


def wrap(form, state, path):
    other = {name: torch.zeros_like(t) for name, t in state.items()}
    forms = {
        "bare": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "args": argparse.Namespace(lr=0.1)},
        "timm ema": {"state_dict": other, "state_dict_ema": state, "args": argparse.Namespace(lr=0.1)},
        "deit ema": {"model": other, "model_ema": state},
        "distributed": {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        "compiled": {f"module._orig_mod.{n}": t for n, t in state.items()},
        "own": {"format": 1, "objective": {f"supernet.backbone.{n}": t for n, t in state.items()}},
        "own ema": {"format": 1, "objective": {f"supernet.backbone.{n}": t for n, t in other.items()}, "ema": state},
    }
    torch.save(forms[form], path)


FORMS = ["bare", "state_dict", "model", "timm ema", "deit ema", "distributed", "compiled", "own", "own ema"]


@pytest.mark.parametrize("form", [*FORMS, "safetensors"])
def test_every_form_of_checkpoint_starts_a_network_of_ones_own(swin, form, tmp_path):
    model, state = swin
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    save_file(dict(state), path) if form == "safetensors" else wrap(form, state, path)
    network, lines, fresh = starting_backbone(*model, 10, Start(checkpoint=path, seed=1))
    assert lines == [] and not fresh
    loaded = network.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[n], state[n]) for n in state)


def test_what_does_not_match_is_reported(swin, tmp_path):
    model, state = swin
    path = tmp_path / "w.pth"
    torch.save(state | {"head_extra.weight": torch.zeros(2)}, path)
    network, lines, fresh = starting_backbone(*model, 6, Start(checkpoint=path))
    assert fresh and len(lines) == 3
    assert "head.fc.weight: 10 classes in" in lines[0] and "made anew" in lines[0]
    assert lines[2].startswith("not used from") and "head_extra.weight" in lines[2]
    assert torch.equal(network.state_dict()["norm.weight"], state["norm.weight"])
    smaller = {n: t for n, t in state.items() if n != "norm.bias"}
    torch.save(smaller, path)
    with pytest.raises(UserError, match=r"w\.pth does not fit SwinTransformer: missing: norm\.bias"):
        starting_backbone(*model, 10, Start(checkpoint=path))
    torch.save(state | {"norm.bias": torch.zeros(5)}, path)
    with pytest.raises(UserError, match=r"shape: norm\.bias \(5,\), here \(128,\)"):
        starting_backbone(*model, 10, Start(checkpoint=path))


def test_weights_that_are_no_weights_are_refused_by_name(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": [1, 2]}, path)
    with pytest.raises(UserError, match=r"w\.pth holds no state dict"):
        load_weights(path)
    path.write_bytes(b"\x80garbage")
    with pytest.raises(UserError, match=r"w\.pth is not a readable torch file"):
        load_weights(path)
    (tmp_path / "w.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"w\.safetensors is not a readable safetensors file"):
        load_weights(tmp_path / "w.safetensors")


def test_training_checkpoints_start_a_new_run(tmp_path):
    training = tiny.training(tiny.config(tmp_path, epochs=1))
    fit(training, resume=False, words="test")
    weights = load_weights(tmp_path / CHECKPOINT)
    own = training.objective.supernet.backbone.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[n], own[n]) for n in own)
