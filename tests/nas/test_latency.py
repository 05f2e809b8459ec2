"""python -m nas.latency: what it times, that it goes on, and that it needs torch and timm only (section 2.13)."""

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import nas.latency
import nas.machine.timing
from nas.latency import Point, parser, points_of, run_latency
from nas.machine.timing import in_turn, stopwatch
from nas.prices.latency_table import read_table
from search_spaces.errors import UserError
from search_spaces.slices import BlockSlice, NetworkSlice
from supernets.chains import Parts, half_slice, widths_of
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.nas.small import FAMILIES, small_supernet

ROOT = Path(__file__).resolve().parents[2]
MODEL = "vit_tiny_patch16_224"
KWARGS = ["img_size=32", "patch_size=16", "embed_dim=4", "depth=2", "num_heads=1", "mlp_ratio=2"]
CPU = torch.device("cpu")


def options(out: Path, *more: str) -> argparse.Namespace:
    own = ["--model", MODEL, "--model-kwargs", *KWARGS, "--num-classes", "5", "--device", "cpu", "--threads", "1"]
    return parser().parse_args([*own, "--out", str(out), *more])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No waiting: a call takes as many microseconds as what it runs has parameters. Returns the sizes of the groups."""
    groups: list[int] = []

    def counted(
        calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int, shortest: float
    ) -> dict[str, list[float]]:
        groups.append(len(calls))
        found = {}
        for name, call in calls.items():
            assert call() is not None
            run = call.__defaults__[0]  # type: ignore[attr-defined]
            found[name] = [1e-6 * (1 + sum(p.numel() for p in run.parameters()))] * rounds
        return found

    monkeypatch.setattr(nas.machine.timing, "in_turn", counted)
    return groups


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_is_made_of_what_the_compact_network_runs(family: str) -> None:
    """The same numbers as the compact network's own block, and of nothing but the half."""
    supernet = small_supernet(family).float()
    expected = Supernet(supernet.backbone)
    images = torch.randn(2, *supernet.adapter.input_size)
    parts = Parts(copy.deepcopy(supernet.backbone))
    for kind, name in parts.blocks.items():
        shape = parts.shape(kind)
        widths = {n: max(1, w // 2) for n, w in widths_of(kind, shape).items()}
        widths["qk"] = widths.get("qk", 1) * shape.qk_unit if "qk" in widths else 0
        widths = {n: min(w, widths_of(kind, shape)[n]) for n, w in widths.items() if n in kind.names}
        chain, x = parts.chain(kind, widths, 2, images)
        assert x.shape[-1] == widths["stream"] and len(x) == 2
        with torch.no_grad():
            y = chain(x)
        assert y.shape == x.shape and torch.isfinite(y).all()
        stage_widths = [min(8, w) for w in expected.identity().stage_widths]
        stage_widths[shape.stage] = widths["stream"]
        blocks = [
            half_slice(kind, shape, widths)
            if n == name
            else BlockSlice(stage_widths[s.stage], s.num_heads, s.hidden, attn=False, mlp=False)
            for n, s in zip(expected.adapter.block_names, expected.shapes, strict=True)
        ]
        whole = cut(expected.backbone, NetworkSlice(tuple(blocks), tuple(stage_widths))).eval()
        own = sum(p.numel() for p in whole.get_submodule(name).parameters())
        assert sum(p.numel() for p in chain.parameters()) == 2 * own > 0
        with torch.no_grad():
            torch.testing.assert_close(whole.get_submodule(name)(x, **chain.given), chain.blocks[0](x, **chain.given))


def test_a_table_of_every_half_is_made(clock: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run_latency(options(tmp_path / "t.json", "--grid", "coarse", "--rounds", "2"))
    assert max(clock) <= 1 + nas.latency.GROUP["eager"] and not list(tmp_path.glob("*.part"))
    assert read_table(tmp_path / "t.json").record() == table.record()
    assert {kind.half for kind in table.halves} == {"attention", "mlp"} and table.noisy == 0
    printed = capsys.readouterr()
    assert "points on" in printed.out and "left" in printed.err and "quiet" not in printed.out
    (mlp,) = (times for kind, times in table.halves.items() if kind.half == "mlp")
    S, M = 4, 8
    assert mlp.at({"stream": S, "hidden": M}) == pytest.approx(1e3 * (2 * S * M + M + S + 2 * S), rel=0.01)
    whole = timm.create_model(MODEL, img_size=32, patch_size=16, embed_dim=S, depth=2, num_heads=1, num_classes=5)
    own = sum(p.numel() for name, p in whole.named_parameters() if not name.startswith("blocks."))
    assert table.outside.at((S,)) == pytest.approx(1e3 * (own + 1))
    with pytest.raises(UserError, match="is there already; remove it, or give another"):
        run_latency(options(tmp_path / "t.json"))


@pytest.mark.slow
def test_what_was_stopped_goes_on(clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--grid", "coarse", "--rounds", "2"]
    undisturbed = run_latency(options(tmp_path / "whole.json", *own))
    total, seen = len(clock), len(clock)
    with monkeypatch.context() as patch:
        fake = nas.machine.timing.in_turn

        def stopped(*given: Any) -> Any:
            if len(clock) >= seen + total // 2:
                raise KeyboardInterrupt
            return fake(*given)

        patch.setattr(nas.machine.timing, "in_turn", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_latency(options(tmp_path / "t.json", *own))
    assert (tmp_path / "t.json.part").is_file() and not (tmp_path / "t.json").exists()
    with pytest.raises(UserError, match=r"t.json.part was begun with rounds 2, this is 3; remove it to begin anew"):
        run_latency(options(tmp_path / "t.json", "--grid", "coarse", "--rounds", "3"))
    before = len(clock)
    again = run_latency(options(tmp_path / "t.json", *own))
    assert again.record() == undisturbed.record()
    assert len(clock) - before < total
    (tmp_path / "u.json.part").write_text("{}")
    with pytest.raises(UserError, match="is no unfinished table; remove it"):
        run_latency(options(tmp_path / "u.json", *own))


def test_noise_is_said(clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    quiet = nas.machine.timing.in_turn

    def noisy(*given: Any) -> dict[str, list[float]]:
        return {name: [each * (1 + 0.3 * i) for i, each in enumerate(of)] for name, of in quiet(*given).items()}

    monkeypatch.setattr(nas.machine.timing, "in_turn", noisy)
    table = run_latency(options(tmp_path / "t.json", "--grid", "coarse", "--rounds", "4"))
    assert table.noisy == table.points
    assert "points vary by more than 10% between rounds" in capsys.readouterr().out


def test_a_fine_grid_has_every_width_along_a_line() -> None:
    parts = Parts(timm.create_model(MODEL, img_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=2))
    coarse, fine = points_of(parts, False), points_of(parts, True)
    assert set(coarse) < set(fine)
    streams = {dict(p.widths)["stream"] for p in fine if p.kind is not None}
    assert streams == set(range(16, 65, 8))
    assert all(isinstance(p, Point) for p in fine)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--batch-size", "0"), "expected at least 1"),
        (("--runtime", "onnxruntime", "--precision", "bf16"), "onnxruntime is timed on the CPU in fp32"),
        (("--space", "swin-free"), "is a VisionTransformer, the swin-. spaces take"),
        (("--device", "tpu:x"), "--device tpu:x"),
    ],
)
def test_what_does_not_go_together_is_refused(more: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        run_latency(options(tmp_path / "t.json", *more))


def test_neither_a_space_nor_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --space, a search space, or --model"):
        run_latency(parser().parse_args(["--out", str(tmp_path / "t.json"), "--device", "cpu"]))


ALONE = """
import importlib.machinery, runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ModuleNotFoundError(spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Missing())
import nas.machine.timing
nas.machine.timing.in_turn = lambda calls, device, rounds, _: {{n: [1e-3] * rounds for n, c in calls.items() if [c()]}}
sys.argv = ["nas.latency", *sys.argv[1:]]
runpy.run_module("nas.latency", run_name="__main__")
"""
BLOCKED = ("nni", "scipy", "tyro", "rich", "pandas", "matplotlib", "ray", "sklearn", "onnx_ir", "onnxruntime")


@pytest.mark.slow
def test_it_runs_where_only_torch_and_timm_are_installed(tmp_path: Path) -> None:
    arguments = ["--model", MODEL, "--model-kwargs", *KWARGS, "--out", str(tmp_path / "t.json"), "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(blocked=BLOCKED), *arguments, "--device", "cpu", "--grid", "coarse"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "t.json").read_text())["setting"]["runtime"] == "eager"


class FakeEvent:
    """One of a GPU whose calls take 2 ms each, as its own clock sees it."""

    calls = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1

    def record(self) -> None:
        self.at = FakeEvent.calls

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 2.0 * (end.at - self.at)


def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda")

    def call() -> None:
        FakeEvent.calls += 1

    assert stopwatch(device)(call, 5) == pytest.approx(2e-3) and waited == [device] * 2
    found = in_turn({"a": call, "b": call}, device, rounds=3, shortest=0.02)
    assert found == {"a": pytest.approx([2e-3] * 3), "b": pytest.approx([2e-3] * 3)}
    assert FakeEvent.calls == 5 + 2 * 2 + 2 * 3 * 10


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    found = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 2, shortest=0.0)
    assert order == ["a", "a", "b", "b", *"abab"] and all(len(each) == 2 for each in found.values())
