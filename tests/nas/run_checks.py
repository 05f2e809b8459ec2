"""Whole runs looked at from outside: is every file whole, are two runs the same, and a tiny dataset to run on."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from nas.runs.checkpoint import load_checkpoint
from search_spaces.architecture import load_architecture

PICTURES = (".png", ".pdf", ".svg")
TIMINGS = ("images_per_s", "peak_memory_mb", "seconds")


def visible(folder: Path) -> dict[str, Path]:
    """What a user sees of a run: every file but temporary ones, which a kill may leave behind."""
    return {p.name: p for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def log_rows(path: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def assert_whole(folder: Path) -> None:
    """Every file of a run reads to its end."""
    readers: dict[str, Callable[[Path], Any]] = {
        ".json": lambda p: json.loads(p.read_text()),
        ".yaml": lambda p: yaml.safe_load(p.read_text())["seed"],
        ".csv": lambda p: [row for row in csv.DictReader(io.StringIO(p.read_text())) if None in row.values()],
        ".pt": load_checkpoint,
        ".safetensors": load_file,
        ".png": lambda p: Image.open(p).load(),
        ".svg": lambda p: p.read_text().rstrip().endswith("</svg>") or pytest.fail(f"{p} is cut off"),
        ".pdf": lambda p: p.read_bytes().rstrip().endswith(b"%%EOF") or pytest.fail(f"{p} is cut off"),
    }
    for name, path in visible(folder).items():
        if path.is_dir():  # a network of a front
            assert_whole(path)
            continue
        found = readers[path.suffix](path)
        if path.suffix == ".csv":
            assert found == [], f"{name} has short rows"
        if name == "arch.json":
            load_architecture(path)


def assert_same_run(folder: Path, undisturbed: Path) -> None:
    """Same files but for pictures, weights to the bit, architecture, and rows but for timings."""
    names, expected = ({n for n in visible(f) if not n.endswith(PICTURES)} for f in (folder, undisturbed))
    assert names == expected
    for name, path in visible(undisturbed).items():
        other = folder / name
        if path.is_dir():
            assert_same_files(other, path)
        elif path.suffix == ".safetensors":
            a, b = load_file(path), load_file(other)
            assert a.keys() == b.keys()
            assert [n for n in a if not torch.equal(a[n], b[n])] == []
        elif name in ("log.csv", "choices.csv"):
            assert log_rows(path) == log_rows(other)
    if (undisturbed / "arch.json").exists():  # not where the large network was trained alone
        assert (folder / "arch.json").read_text() == (undisturbed / "arch.json").read_text()
    first, second = (load_checkpoint(f / "checkpoint.pt")["objective"] for f in (folder, undisturbed))
    assert [n for n in first if not alike(first[n], second[n])] == []


def assert_same_files(folder: Path, undisturbed: Path) -> None:
    """Of a network of a front, to the byte."""
    for path in undisturbed.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def alike(first: Any, second: Any) -> bool:
    """Of a state dict's values: tensors, or a mapping of tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    return torch.equal(first, second)


def draw_pictures(root: Path) -> Path:
    """Six classes of 40 noisy stripes, 16 px, a folder each."""
    root.mkdir(exist_ok=True)
    noise = np.random.RandomState(0)
    for label in range(6):
        (root / str(label)).mkdir()
        stripes = 127 + 100 * np.sin(np.arange(16) * (label + 1) / 3)
        for i in range(40):
            pixels = np.clip(stripes[:, None, None] + 40 * noise.randn(16, 16, 3), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{i}.png")
    return root
