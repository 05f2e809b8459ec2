"""The compact network as ONNX and as a torch.export program, its card, and its upload up to the network."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml

import nas.export
from nas.export import differences, parser, run_export
from nas.machine import runtimes
from nas.machine.files import write_json
from nas.machine.runtimes import compiled, export_onnx, export_program, onnx_network
from nas.networks.compact_file import load_compact
from nas.runs.card import push_to_hub
from search_spaces.errors import UserError
from supernets.rotated import StreamNorm
from tests.nas import tiny
from tests.nas.finished import finished_run, pictures
from tests.oracle import randomise

ROOT = Path(__file__).resolve().parents[2]


def noise(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    finished_run(folder)
    return folder


@pytest.mark.slow
def test_both_files_give_the_networks_logits_at_any_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in runtimes.PACKAGES:
        pytest.importorskip(name)
    write_json(run / "summary.json", {"dataset": "digits", "split": "test fifth", "compact": {"top1": 91.5}})
    options = [str(run), "--no-compile", "--rounds", "6", "--seconds", "0", "--batches", "1", "3"]
    result = run_export(parser().parse_args(options))
    network = load_compact(run)
    program = torch.export.load(run / "compact.pt2").module()
    for batch in (1, 2, 5):
        x = pictures(batch, seed=batch)
        expected = network(x)
        for other in (program, onnx_network(run / "compact.onnx", 1)):
            assert other(x).shape == (batch, 10)
            assert (other(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert result == json.loads((run / "export.json").read_text())
    assert {max(d.values()) <= 1e-4 for d in result["differences"].values()} == {True} and result["real_images"] == 8
    seen = {(r["batch"], r["network"], r["backend"]) for r in result["speed"]}
    assert seen == {(b, n, e) for b in (1, 3) for n in ("large", "compact") for e in ("PyTorch", "ONNX")}
    assert all(0 < r["p50_ms"] <= r["p95_ms"] and r["calls"] >= 5 for r in result["speed"])
    assert "/ FLOPs" in capsys.readouterr().out
    card = (run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "timm" and front["datasets"] == ["digits"]
    for text in ("swin_tiny_patch4_window7_224", "1 in 1, 2 in 2", "| top-1 % | – | 91.5 |", "| 3 | compact | ONNX |"):
        assert text in card


@pytest.mark.slow
@pytest.mark.parametrize(("alphas", "norms"), [((2, 2), 0), ((1, 2), 5), (None, 5)], ids=["plain", "prefix", "large"])
def test_a_network_in_a_rotated_basis_is_exported(alphas: tuple[int, ...] | None, norms: int, tmp_path: Path) -> None:
    """Under timm's norms where its blocks are equally wide, otherwise, as the large one, under StreamNorms."""
    for name in runtimes.PACKAGES:
        pytest.importorskip(name)
    options = tiny.VIT[1] | dict(pre_norm=True, num_classes=10)
    supernet = nas.Supernet(randomise(timm.create_model(tiny.VIT[0], **options), 0)).eval()
    basis, network = nas.rewrite(supernet, [noise(32)]), supernet.backbone
    if alphas is not None:
        arch = nas.pick(supernet, "vit-dan", [{"alpha": alpha} for alpha in alphas], model_kwargs=options)
        nas.save(nas.cut(supernet, arch), tmp_path, arch, basis)
        network = load_compact(tmp_path)
    assert sum(isinstance(m, StreamNorm) for m in network.modules()) == norms
    program = export_program(network, noise(2))
    torch.export.save(program, tmp_path / "network.pt2")
    export_onnx(program, tmp_path / "network.onnx")
    others = {"program": torch.export.load(tmp_path / "network.pt2").module()}
    others["onnx"] = onnx_network(tmp_path / "network.onnx", 1)
    found = differences(network, others, {str(size): noise(size) for size in (1, 2, 5)})
    assert max(max(seen.values()) for seen in found.values()) <= 1e-5, found


def assert_exported(network: Any, folder: Path) -> None:
    """The program and the ONNX file give the network's logits."""
    program = export_program(network, noise(2))
    export_onnx(program, folder / "network.onnx")
    others = {"program": program.module(), "onnx": onnx_network(folder / "network.onnx", 1)}
    found = differences(network, others, {str(size): noise(size) for size in (1, 2, 5)})
    assert max(max(seen.values()) for seen in found.values()) <= 1e-5, found


@pytest.mark.slow
def test_heads_whose_widths_differ_are_exported(tmp_path: Path) -> None:
    """Wider q and k than v in one block, wider v in the other; the second has no MLP."""
    for name in runtimes.PACKAGES:
        pytest.importorskip(name)
    options = tiny.VIT[1] | dict(num_classes=10)
    supernet = nas.Supernet(randomise(timm.create_model(tiny.VIT[0], **options), 0)).eval()
    picks = [
        dict(stream=12, heads=2, qk=5, v=3, hidden=40),
        dict(stream=12, heads=1, qk=2, v=7, hidden=0),
    ]
    arch = nas.pick(supernet, "vit-free", picks, model_kwargs=options)
    nas.save(nas.cut(supernet, arch), tmp_path, arch)
    network = load_compact(tmp_path)
    assert_exported(network, tmp_path)


def with_uneven_blocks(space: str, model: str, heads: int, kept: int, folder: Path) -> Any:
    """A compact network of three blocks, saved: of the first so many heads are kept, the third is not there at all."""
    options = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=heads, num_classes=10)
    supernet = nas.Supernet(randomise(timm.create_model(model, **options), 0)).eval()
    picks = [
        dict(stream=24, heads=kept, qk=6, v=3, hidden=40),
        dict(stream=24, heads=1, qk=2, v=7, hidden=0),
        dict(stream=24, heads=0, qk=2, v=7, hidden=0),
    ]
    arch = nas.pick(supernet, space, picks, model_kwargs=options)
    nas.save(nas.cut(supernet, arch), folder, arch)
    return load_compact(folder)


EVAS = {
    "EVA-02": "eva02_base_patch14_224",
    "DINOv3": "vit_small_plus_patch16_dinov3",
    "mixed": "vit_small_patch16_rope_mixed_224",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVAS)
def test_heads_that_turn_are_exported(kind: str, tmp_path: Path) -> None:
    """Pairs of q and k left out, SwiGLUs with and without norm; the third block is not there at all."""
    for name in runtimes.PACKAGES:
        pytest.importorskip(name)
    assert_exported(with_uneven_blocks("eva-free", EVAS[kind], 2, 2, tmp_path), tmp_path)
    wider = load_compact(tmp_path, img_size=(24, 16))
    assert wider(torch.randn(1, 3, 24, 16)).shape == (1, 10)


@pytest.mark.slow
def test_talking_heads_are_exported(tmp_path: Path) -> None:
    for name in runtimes.PACKAGES:
        pytest.importorskip(name)
    assert_exported(with_uneven_blocks("cait-free", "cait_xxs24_224", 4, 3, tmp_path), tmp_path)


def test_a_file_that_computes_something_else_is_caught(run: Path) -> None:
    network = load_compact(run)
    batches = {"one": pictures(1)}
    same = differences(network, {"same": load_compact(run)}, batches)
    other = differences(network, {"other": lambda x: network(x) * 1.01}, batches)
    assert same["same"]["one"] == 0 and other["other"]["one"] == pytest.approx(0.01, rel=1e-3)


def test_a_machine_that_cannot_compile_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(x: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nin a long trace")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: no_compiler)
    assert compiled(torch.nn.Identity(), torch.zeros(1)) is None
    assert capsys.readouterr().out == (
        "torch.compile does not work here: InvalidCxxCompiler: No working C++ compiler found\n"
    )


def test_missing_packages_and_files_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no folder"):
        run_export(parser().parse_args([str(tmp_path / "nowhere")]))
    empty = tmp_path / "search"
    finished_run(empty)
    (empty / "compact.safetensors").unlink()
    with pytest.raises(UserError, match=r"no compact\.safetensors"):
        run_export(parser().parse_args([str(empty), "--no-onnx"]))
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime: pip install 'vit-nas\[export\]'"):
        run_export(parser().parse_args([str(run)]))


def test_bad_commands_end_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nas.export", str(tmp_path), "--push-only"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "python -m nas.export: error: --push-only goes with --push-to-hub USER/NAME\n"


def test_the_upload_up_to_the_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, dict[str, Any]]] = []

    class Address(str):
        repo_id = "someone/small"

    class Api:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo: str, **options: Any) -> Address:
            calls.append((repo, options))
            return Address("https://huggingface.co/someone/small")

        def upload_folder(self, **options: Any) -> None:
            present = {p.name for p in Path(options["folder_path"]).iterdir()} & set(options["allow_patterns"])
            calls.append(("upload", options | {"present": present}))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push_to_hub(run, "small", private=True) == "https://huggingface.co/someone/small"
    assert calls[0] == ("small", {"private": True, "exist_ok": True})
    assert calls[1][1]["repo_id"] == "someone/small"
    assert {"arch.json", "compact.safetensors", "config.json", "README.md"} <= calls[1][1]["present"]
    assert "large.safetensors" not in calls[1][1]["allow_patterns"]
    assert "hf-hub:someone/small" in (run / "README.md").read_text()

    def refuse(self: Any, repo: str, **_: Any) -> None:
        response = SimpleNamespace(headers={}, request=None, status_code=401, text="")
        raise huggingface_hub.errors.HfHubHTTPError("401 Unauthorized", response=response)

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(UserError, match=r"someone/small: 401 Unauthorized; .*hf auth login"):
        push_to_hub(run, "someone/small")


def test_nothing_to_upload(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no arch\.json, compact\.safetensors, config\.json"):
        push_to_hub(tmp_path, "someone/small")


@pytest.mark.slow
def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished_run(tmp_path / "run")
    monkeypatch.setattr(nas.export, "differences", lambda *_: {"compact.pt2": {"random": 0.0, "real": 0.1}})
    with pytest.raises(UserError, match=r"compact\.pt2 differs from PyTorch by 1\.0e-01 .* on real images"):
        run_export(parser().parse_args([str(tmp_path / "run"), "--no-onnx", "--no-compile"]))
    assert not (tmp_path / "run" / "compact.pt2").exists()


def test_onnx_keeps_a_small_constant(tmp_path: Path) -> None:
    """x / (y + 1e-8): torch's ONNX optimiser takes 1e-8 for zero."""
    for name in runtimes.PACKAGES:
        pytest.importorskip(name)

    class Ratio(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x + 1e-8)

    x = torch.full((2, 3), 1e-8)
    export_onnx(export_program(Ratio(), x), tmp_path / "ratio.onnx")
    assert torch.allclose(onnx_network(tmp_path / "ratio.onnx", 1)(x), torch.full((2, 3), 0.5))
