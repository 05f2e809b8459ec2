"""300 option lines of which something is wrong: bad values of every option, altered arch.json, damaged weights.

No traceback, exit code 2 or a run that begins, and not one file that was there before written over.
"""

import copy
import hashlib
import json
import random
import string
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

import nas.training.loop
from nas.cli import main
from nas.commands import start_retrain, start_search
from nas.config import RetrainConfig
from nas.sweeps.options import SweepConfig
from tests.nas.finished import finished_run

LINES = 300
STARTED = ("--device", "cpu", "--workers", "0", "--threads", "1")
NOT_TRIED = {
    "resume",
    "list_spaces",
    "verbose",
    "processes",
    "sweep",
    "download",
    "compile",
    "tensorboard",
    "ray_address",
}
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e400", "-0.0", "1e-300", "99999999999999999999", "abc", "", "1,5", "0x10")
WORDS = (
    "",
    " ",
    "none",
    "../..",
    "nowhere",
    "\u00e4\u00f6",
    "a" * 300,
    "x" * 5000,
    "%s",
    "-",
    "'",
    "$HOME",
    "\n",
    "NaN",
    "[1]",
)
CONTRARY: dict[str, tuple[str, ...]] = {  # what names a thing to be had elsewhere
    "dataset": ("hfds/", "torch/", "tfds/x", "wds/", "folder", "imagenet", "cifar10x"),
    "model": ("vit_tiny_patch16_2244", "resnet18", "local-dir:nowhere", "local-dir:", "hf-hub:", "timm/x", "vit:"),
    "model_kwargs": (
        "img_size=-1",
        "depth=0",
        "num_heads=7",
        "embed_dim=x",
        "=",
        "a=b=c",
        "num_classes=3",
        "img_size=()",
    ),
    "opt": ("adamx", "lbfgs", "sgd_"),
    "sched": ("cosin", "plateau", "x"),
}


class Reached(Exception):
    """Training would begin."""


def drawn_value(draw: random.Random, name: str, kind: Any) -> list[str]:
    """Values that an option of this type may be given by mistake."""
    words = str(kind)
    if name in CONTRARY and draw.random() < 0.7:
        return [draw.choice(CONTRARY[name])]
    if "bool" in words:
        return draw.choice([[], ["maybe"], ["True"], ["-1"]])
    if "Literal" in words or "str" in words or "Path" in words:
        return [draw.choice(WORDS)]
    count = draw.choice([0, 1, 1, 2, 5]) if "tuple" in words else 1
    return [draw.choice(NUMBERS) for _ in range(count)]


def drawn_options(draw: random.Random, kind: Any, files: Path) -> list[str]:
    """One to three options with values of their type that mean nothing, or something else."""
    known = [f for f in fields(kind) if f.name not in NOT_TRIED]
    line = []
    for field in draw.sample(known, draw.choice([1, 1, 1, 2, 3])):
        flag = field.name.replace("_", "-")
        line += [f"--{'no-' if 'bool' in str(field.type) and draw.random() < 0.3 else ''}{flag}"]
        line += drawn_value(draw, field.name, field.type)
    if draw.random() < 0.3:
        line += ["--output", str(draw.choice([files / "used", files / "notes.txt" / "run", files / ("y" * 300)]))]
    return line


def altered(draw: random.Random, value: Any) -> Any:
    """A JSON value with something in it removed, or replaced by another type, size or sign."""
    value = copy.deepcopy(value)
    others = [None, True, -1, 0, 7, 1e9, 0.5, "x", "", [], {}, [1], [[1]], {"a": 1}, [None], 10**30]
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        if draw.random() < 0.2:
            del value[key]
        else:
            value[key] = altered(draw, value[key])
        return value
    if isinstance(value, list) and value and draw.random() < 0.8:
        i = draw.randrange(len(value))
        if draw.random() < 0.2:
            del value[i]
        else:
            value[i] = altered(draw, value[i])
        return value
    return draw.choice(others)


def damaged(draw: random.Random, state: dict[str, Any], path: Path) -> Path:
    """A weights file with something wrong in its tensors, or in its bytes; under any name."""
    state = {name: t.clone() for name, t in state.items()}
    for _ in range(draw.choice([0, 1, 3])):
        name = draw.choice(sorted(state))
        what = draw.randrange(6)
        if what == 0:
            del state[name]
        elif what == 1:
            state["".join(draw.choices(string.ascii_lowercase + ".", k=9))] = state.pop(name)
        elif what == 2:
            state[name] = state[name].flatten()[: draw.randrange(5)]
        elif what == 3:
            state[name] = torch.full_like(state[name], float(draw.choice(["nan", "inf"])))
        elif what == 4:
            state[name] = state[name].to(draw.choice([torch.int8, torch.bfloat16, torch.complex64, torch.bool]))
        else:
            state[draw.choice(sorted(state))] = state[name][None].clone()
    path = path.with_suffix(draw.choice([".safetensors", ".pt", ".pth", ".bin", ""]))
    if draw.random() < 0.5:
        save_file(state, path)
    else:
        around: list[Callable[[Any], Any]] = [
            lambda s: s, lambda s: {"model": s, "epoch": 1}, lambda s: {"state_dict": {"a": s}}, lambda s: [s],
            lambda s: {"ema": {"model": None}, "net": s}, lambda s: {"module": {"module": s}, "optimizer": {}},
        ]  # fmt: skip
        torch.save(draw.choice(around)(state), path)
    content = bytearray(path.read_bytes())
    if draw.random() < 0.4:
        content = content[: draw.randrange(len(content))]
    elif draw.random() < 0.4:
        for _ in range(20):
            content[draw.randrange(min(len(content), 4000))] = draw.randrange(256)
    path.write_bytes(content)
    return path


def drawn_line(
    draw: random.Random, number: int, files: Path, arch: Any, state: dict[str, Any]
) -> tuple[str, list[str]]:
    """The program, and its options."""
    what = draw.randrange(4)
    if what == 0:
        return "retrain.py", ["--space", "vit-an-nano", "--alpha", "2", *drawn_options(draw, RetrainConfig, files)]
    if what == 1:
        folder = files / f"arch{number}"
        folder.mkdir()
        text = json.dumps(altered(draw, altered(draw, arch) if draw.random() < 0.3 else arch))
        (folder / "arch.json").write_text(text[: draw.randrange(len(text))] if draw.random() < 0.1 else text)
        return "retrain.py", ["--arch", str(folder), "--no-pretrained"]
    if what == 2:
        path = damaged(draw, state, files / f"weights{number}")
        return "search.py", ["--space", "vit-dan-nano", "--model-kwargs", *ARGUMENTS, "--checkpoint", str(path)]
    return "search.py", ["--space", "vit-dan-nano", *drawn_options(draw, SweepConfig, files)]


KWARGS: dict[str, Any] = dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2)
ARGUMENTS = [f"{key}={value}" for key, value in KWARGS.items()]


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_no_line_ends_in_a_traceback_or_writes_over_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    failures = tried(seed, LINES, tmp_path, monkeypatch, capsys)
    assert not failures, f"seed {seed}:\n" + "\n".join(failures)


def tried(seed: int, lines: int, place: Path, monkeypatch: Any, capsys: Any) -> list[str]:
    """The lines that were answered badly, and how."""
    draw, files = random.Random(seed), place / "files"
    finished_run(files / "used")
    (files / "used" / "log.csv").write_text("mine\n")
    (files / "notes.txt").write_text("mine\n")
    arch = json.loads((files / "used" / "arch.json").read_text())
    state = timm.create_model("vit_tiny_patch16_224", num_classes=10, **KWARGS).state_dict()
    (place / "runs").mkdir()
    monkeypatch.chdir(place / "runs")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # nothing is fetched

    def begin(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(nas.training.loop, "train_epoch", begin)
    failures = []
    for number in range(lines):
        program, line = drawn_line(draw, number, files, arch, state)
        before = contents(files)
        said = answer(program, [*line, *(STARTED if "--device" not in line else ())], monkeypatch, capsys)
        if said is not None:
            failures.append(f"{program} {line!r:.400}\n    {said}")
        after = contents(files)
        changed = [name for name, digest in before.items() if after.get(name) != digest]
        if changed:
            failures.append(f"{program} {line!r:.400}\n    wrote over {changed}")
    return failures


def answer(program: str, line: list[str], monkeypatch: Any, capsys: Any) -> str | None:
    """What is wrong with the answer to a line: None when it is exit code 2 and words, or a run that begins."""
    kind, run = (SweepConfig, start_search) if program == "search.py" else (RetrainConfig, start_retrain)
    monkeypatch.setattr(sys, "argv", [program, *line])
    try:
        main(kind, run)
    except Reached:
        return None
    except SystemExit as end:
        words = capsys.readouterr().err
        if end.code == 0 and "--help" not in line:
            return "exit code 0 and no run"
        if end.code != 2 or not words.strip() or "Traceback" in words or "\x1b" in words:
            return f"exit code {end.code}: {words[-300:]}"
        own = f"{program}: error: " in words  # else the parser's, which draws a box
        return f"more than a line: {words[:300]}" if own and words.strip().count("\n") else None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None  # an answer without training
