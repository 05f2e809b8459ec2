"""Section 2.7 through both stages: searched, retrained, opened again, resumed and refused in a rotated basis."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import nas.stages.retrain
import nas.stages.search
import nas.timm_entry
import nas.training.basis
import nas.training.loop
import nas.training.state
from nas import commands, describe, validate
from nas.config import RetrainConfig, SearchConfig
from nas.networks.basis_file import BASIS, read_basis, recorded
from nas.networks.compact_file import load_compact
from nas.networks.weights import load_weights
from nas.runs.opened import large_network, open_folder
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.basis import PERMUTATION
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from supernets.basis import rewrite
from supernets.rotated import StreamNorm
from supernets.supernet import Supernet
from tests.nas.run_checks import assert_same_run, assert_whole
from tests.nas.stages.test_search import Interrupt

CPU = torch.device("cpu")
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, init_values=0.5),
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=20, patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, mlp_ratio=2),
    ),
    "t2t": ("t2t_vit_7", dict(img_size=32, embed_dim=32, depth=2, num_heads=4, mlp_ratio=2.0, token_dim=4)),
    "eva": (
        "eva02_tiny_patch14_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, mlp_ratio=3, init_values=0.5),
    ),
    "cait": (
        "cait_xxs24_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, depth_token_only=1, init_values=0.5),
    ),
    "beit": ("beit_base_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4)),
    "relpos": (
        "vit_relpos_small_patch16_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=4, rel_pos_dim=16, init_values=0.5),
    ),
}
METHODS: dict[str, dict[str, Any]] = {"dan": {"budget": 0.7}, "kcr": {"budget": 0.9}, "joint": {"budget": 0.7}}
TRAINING: dict[str, Any] = dict(
    dataset="folder", workers=0, val_fraction=0.2, epochs=1, batch_size=16, threads=1, device="cpu", lr=1e-3
)
over_families = pytest.mark.parametrize("family", FAMILIES)


def model_kwargs(family: str) -> tuple[str, ...]:
    return tuple(f"{key}={value!r}" for key, value in FAMILIES[family][1].items())


@dataclass
class World:
    """Pictures of five classes, a trained network of each family, and what the networks of every run said of one image.

    Logits by folder and network, as the run measured them last; `begun` are those with which a retrain began.
    """

    root: Path
    logits: dict[Path, dict[str, Tensor]]
    begun: dict[Path, dict[str, Tensor]]

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    def checkpoint(self, family: str) -> Path:
        return self.root / f"{family}.safetensors"

    def trained(self, family: str) -> dict[str, Any]:
        """Options of a run that starts from the family's checkpoint."""
        name, _ = FAMILIES[family]
        own = dict(model=name, model_kwargs=model_kwargs(family), checkpoint=self.checkpoint(family))
        return own | TRAINING | dict(data_dir=self.pictures)

    def search(self, family: str, method: str, output: Path, **options: Any) -> SearchConfig:
        own = self.trained(family) | dict(arch_lr=0.3) | METHODS[method] | options
        return SearchConfig(space=f"{family}-{method}-nano", output=output, **own)

    def retrain(self, output: Path, **options: Any) -> RetrainConfig:
        return RetrainConfig(output=output, **TRAINING | dict(data_dir=self.pictures) | options)


def pixels(family: str, batch: int = 4) -> Tensor:
    size = FAMILIES[family][1]["img_size"]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("rotated")
    random = np.random.default_rng(0)
    for label in range(5):
        (root / "pictures" / str(label)).mkdir(parents=True)
        colour = random.integers(60, 190, (1, 1, 3))
        for i in range(12):
            image = np.clip(colour + random.integers(-60, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "pictures" / str(label) / f"{i}.png")
    for family, (name, options) in FAMILIES.items():
        torch.manual_seed(0)
        network = timm.create_model(name, num_classes=5, **options)
        with torch.no_grad():  # else timm starts every bias at 0 and every norm at 1
            for p in network.parameters():
                p.add_((0.2 if p.dim() == 1 else 0.05) * torch.randn_like(p))
        save_file(network.state_dict(), root / f"{family}.safetensors")
    found = World(root, {}, {})

    def said(prepared: Any, networks: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
        x = pixels(prepared.space.family)
        with torch.no_grad():
            return {name: network(x) for name, network in networks.items()}

    searched, retrained, fit = nas.stages.search.conclude, nas.stages.retrain.conclude, nas.stages.retrain.fit

    def conclude_search(asked: Any, answer: Any, prepared: Any, arch: Architecture, *rest: Any) -> None:
        networks = open_networks(prepared.supernet.eval(), arch)
        found.logits[prepared.folder] = said(prepared, networks)
        searched(asked, answer, prepared, arch, *rest)

    def conclude_retrain(goal: Any, prepared: Any, *rest: Any) -> None:
        networks = open_networks(prepared.supernet.eval(), goal.arch)
        found.logits[prepared.folder] = said(prepared, networks)
        retrained(goal, prepared, *rest)

    def begin(training: Any, *rest: Any) -> None:
        supernet = training.objective.supernet.eval()
        x = pixels(next(family for family in FAMILIES if type(supernet.adapter).__name__.lower().startswith(family)))
        with torch.no_grad():
            found.begun[training.folder] = {"large": supernet.large(x)}
            if hasattr(training.objective, "members"):
                found.begun[training.folder]["subnet"] = supernet.small(x, training.objective.members.widest)
        fit(training, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.stages.search, "conclude", conclude_search)
        patch.setattr(nas.stages.retrain, "conclude", conclude_retrain)
        patch.setattr(nas.stages.retrain, "fit", begin)
        for stage in (nas.stages.search, nas.stages.retrain):
            patch.setattr(stage, "plot_run", lambda folder: None)
        patch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
        yield found


def open_networks(supernet: Supernet, arch: Architecture) -> dict[str, Callable[[Tensor], Tensor]]:
    from nas.networks.architecture import slices_of

    subnet = slices_of(arch, supernet.shapes)
    return {"large": supernet.large, "subnet": lambda x: supernet.small(x, subnet)}


PAIRS = [  # every family and every method is among the fast ones
    pytest.param((family, method), id=f"{family}-{method}", marks=pytest.mark.slow if (i - k) % len(METHODS) else ())
    for i, family in enumerate(FAMILIES)
    for k, method in enumerate(METHODS)
]


@pytest.fixture(scope="module", params=PAIRS)
def runs(request: pytest.FixtureRequest, world: World) -> tuple[str, Path, Path]:
    """A search from a trained network and the retrain of what it found: (family, search, retrain)."""
    family, method = request.param
    search = run_search(world.search(family, method, world.root / f"{family}-{method}"))
    return family, search, run_retrain(world.retrain(world.root / f"{family}-{method}-again", arch=search))


def same_logits(first: Tensor, second: Tensor, within: float = 1e-5) -> None:
    assert float((first - second).detach().abs().max() / first.abs().max()) <= within


def timms_own(family: str, weights: Path) -> Any:
    """timm's model with the weights of a file, under timm's names."""
    name, options = FAMILIES[family]
    network = timm.create_model(name, num_classes=5, **options)
    network.load_state_dict(load_file(weights))
    return network.eval()


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


@pytest.mark.slow
def test_both_stages_stand_in_one_basis(runs: tuple[str, Path, Path], world: World) -> None:
    family, search, retrain = runs
    first, second = load_architecture(search), load_architecture(retrain)
    assert first.basis["streams"] == ([0, 1] if family == "swin" else [0])
    assert first.basis == second.basis == recorded(read_basis(search)) == recorded(read_basis(retrain))
    for folder in (search, retrain):
        assert torch.load(folder / "checkpoint.pt", weights_only=True)["basis"] == first.basis["sha256"]
    assert first.permutation == second.permutation == {} and first.blocks == second.blocks
    assert not (search / PERMUTATION).exists()
    orders = read_basis(search).orders
    assert len(orders) == 2 * len(first.blocks) and any(order != sorted(order) for order in orders.values())
    summary = summary_of(retrain)
    assert summary["compact_minus_subnet"] <= 1e-5
    assert summary["compact"]["top1"] == summary["subnet"]["top1"]
    assert_whole(search)
    assert_whole(retrain)


def test_a_retrain_goes_on_where_the_search_arrived(runs: tuple[str, Path, Path], world: World) -> None:
    _, search, retrain = runs
    for name, logits in world.logits[search].items():
        same_logits(logits, world.begun[retrain][name], 1e-4)


def test_the_large_network_is_timms_own(runs: tuple[str, Path, Path], world: World) -> None:
    family, search, retrain = runs
    for folder, name in ((search, "supernet.safetensors"), (retrain, "large.safetensors")):
        with torch.no_grad():
            same_logits(world.logits[folder]["large"], timms_own(family, folder / name)(pixels(family)))
    trained = timms_own(family, world.checkpoint(family))
    assert not torch.allclose(world.logits[search]["large"], trained(pixels(family)), rtol=1e-2)  # it has learnt


def test_a_folder_opened_again_has_its_networks(runs: tuple[str, Path, Path], world: World) -> None:
    family, search, retrain = runs
    x, expected = pixels(family), world.logits
    with torch.no_grad():
        for folder in (search, retrain):
            networks = open_folder(folder, CPU).networks()
            assert list(networks) == ["large", "subnet"] + ["compact"] * (folder == retrain)
            for name, network in networks.items():
                same_logits(expected[folder]["subnet" if name == "compact" else name], network(x))
        compact = load_compact(retrain)
        for network in (compact, timm.create_model(f"local-dir:{retrain}", pretrained=True).eval()):
            same_logits(expected[retrain]["subnet"], network(x))


def test_prices_are_those_of_the_compact_network(runs: tuple[str, Path, Path]) -> None:
    _, search, retrain = runs
    for folder in (search, retrain):
        arch = load_architecture(folder)
        supernet = large_network(arch)
        opened = open_folder(folder, CPU)
        assert arch.flops <= arch.search["budget"] * arch.backbone_flops
        assert (supernet.flops(opened.subnet), supernet.params(opened.subnet)) == (arch.flops, arch.params)
        assert (supernet.flops(), supernet.params()) == (arch.backbone_flops, arch.backbone_params)
        assert opened.supernet is not None and opened.supernet.flops(opened.subnet) == arch.flops
        rows = describe.rows_of(arch)
        assert [sum(row.flops[i] for row in rows) for i in (0, 1)] == [arch.flops, arch.backbone_flops]
    compact: Any = load_compact(retrain)
    assert sum(p.numel() for p in compact.parameters()) == arch.params
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compact.to("meta").requires_grad_(False)(torch.zeros(1, *arch.input_size, device="meta"))
    assert counter.get_total_flops() == 2 * arch.flops
    table = {row["network"]: row for row in csv.DictReader((retrain / "table.csv").open())}
    assert int(table["compact"]["params"]) == arch.params and int(table["large"]["params"]) == arch.backbone_params


def test_measured_again_every_network_has_its_accuracy(
    runs: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, search, retrain = runs
    monkeypatch.setattr("nas.machine.timing.images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
    for folder in (search, retrain):
        arguments = ["--weights", str(folder), "--workers", "0", "--output", str(folder.parent / "measured.json")]
        networks = validate.run_validate(validate.parser().parse_args(arguments))["networks"]
        summary = summary_of(folder)
        assert {"large", "subnet"} <= networks.keys()
        for name, row in networks.items():
            assert (row["top1"], row["top5"]) == (summary[name]["top1"], summary[name]["top5"])
            assert (row["params"], row["gflops"]) == (summary[name]["params"], summary[name]["gflops"])


@pytest.fixture(scope="module")
def swin_search(world: World) -> Path:
    return run_search(world.search("swin", "dan", world.root / "one-swin"))


@pytest.fixture(scope="module")
def vit_search(world: World) -> Path:
    return run_search(world.search("vit", "dan", world.root / "one-vit"))


def test_the_original_weights_are_rewritten_in_the_stored_basis(
    world: World, swin_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Tensor]] = []

    def stop(training: Any, *_: Any) -> None:
        state = training.objective.supernet.backbone.state_dict()
        begun.append({name: t.clone() for name, t in state.items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(nas.stages.retrain, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        run_retrain(world.retrain(tmp_path / "run", arch=swin_search, init="base"))
    expected = Supernet(timms_own("swin", world.checkpoint("swin")))
    rewrite(expected, read_basis(swin_search))
    state = expected.backbone.state_dict()
    assert state.keys() == begun[0].keys() and all(torch.equal(t, begun[0][name]) for name, t in state.items())
    assert load_architecture(tmp_path / "run").basis == load_architecture(swin_search).basis


@over_families
def test_a_uniform_factor_finds_its_basis_itself(family: str, world: World, tmp_path: Path) -> None:
    """Every block is as wide as its stage, so that the compact network has timm's own norms."""
    kept = {name: value for name, value in world.trained(family).items() if name not in TRAINING}
    options = dict(space=f"{family}-an-nano", alpha=2, model_ema=True, importance="error", calibration_images=40)
    folder = run_retrain(world.retrain(tmp_path / "run", **options, **kept))
    arch = load_architecture(folder)
    assert arch.basis["streams"] == ([0, 1] if family == "swin" else [0]) and arch.permutation == {}
    assert summary_of(folder)["compact_minus_subnet"] <= 1e-5
    expected, x = world.logits[folder], pixels(family)
    compact = load_compact(folder)
    assert not [m for m in compact.modules() if isinstance(m, StreamNorm)]
    with torch.no_grad():
        same_logits(timms_own(family, world.checkpoint(family))(x), world.begun[folder]["large"])
        same_logits(expected["large"], timms_own(family, folder / "large.safetensors")(x))
        same_logits(expected["subnet"], compact(x))
        same_logits(expected["subnet"], open_folder(folder, CPU).networks()["subnet"](x))
    assert (sum(p.numel() for p in compact.parameters()), arch.num_classes) == (arch.params, 5)


def test_a_uniform_architecture_of_a_search_stands_in_the_basis_of_its_retrain(world: World, tmp_path: Path) -> None:
    """The search reads prices alone: it leaves no weights, and the retrain knows the checkpoint by it."""
    own = world.trained("vit") | dict(importance="magnitude")
    search = run_search(SearchConfig(space="vit-an-nano", budget=0.6, output=tmp_path / "search", **own))
    assert sorted(p.name for p in search.iterdir()) == ["arch.json", "config.yaml"]
    found = load_architecture(search)
    assert found.basis == {} and found.search["searcher"] == "uniform" and found.search["importance"] == "magnitude"
    folder = run_retrain(world.retrain(tmp_path / "run", arch=search))
    arch = load_architecture(folder)
    assert arch.basis["streams"] == [0] and arch.blocks == found.blocks
    assert arch.flops == found.flops <= 0.6 * arch.backbone_flops
    assert summary_of(folder)["compact_minus_subnet"] <= 1e-5
    own_basis = read_basis(folder)
    assert run_retrain(world.retrain(tmp_path / "plain", arch=search, basis="none", importance="none"))
    assert load_architecture(tmp_path / "plain").basis == {} and not (tmp_path / "plain" / BASIS).exists()
    again = run_retrain(world.retrain(tmp_path / "third", arch=folder))  # whose basis is found by now
    assert torch.equal(read_basis(again).streams[0], own_basis.streams[0])


def test_inner_width_is_ordered_and_says_so(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_search(world.search("swin", "dan", tmp_path / "run", width="inner", budget=0.8))
    arch = load_architecture(folder)
    assert arch.basis == {} and arch.permutation and not (folder / BASIS).exists()
    said = capsys.readouterr().out
    assert "nothing is rotated: no candidate leaves a channel of the stream out; heads and neurons are ordered" in said
    assert "heads, neurons and channels sorted by importance (taylor)" in said


@pytest.mark.parametrize("options", [dict(basis="none"), dict(importance="none"), dict(basis="order"), {}])
def test_without_a_rotation_nothing_is_rotated(options: dict[str, str], world: World, tmp_path: Path) -> None:
    """The last of them from scratch."""
    config = world.search("vit", "dan", tmp_path / "run", **options)
    folder = run_search(config if options else replace(config, checkpoint=None, pretrained=False))
    arch = load_architecture(folder)
    assert arch.basis == {} and not (folder / BASIS).exists()
    assert bool(arch.permutation) == (options == {"basis": "order"}) == (folder / PERMUTATION).exists()
    assert "basis" not in torch.load(folder / "checkpoint.pt", weights_only=True)


# Interrupted and resumed


@pytest.mark.parametrize(
    ("where", "function", "call", "after"),
    [
        (nas.training.basis, "rewrite", 1, False),  # found, not yet applied
        (nas.training.loop, "update_weights", 2, True),  # in the first epoch: nothing saved but the basis
        (nas.training.state, "save_checkpoint", 1, True),
    ],
    ids=["found", "first epoch", "saved"],
)
def test_7_an_interrupted_search_resumes_in_its_basis(
    where: Any, function: str, call: int, after: bool, world: World, swin_search: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = world.search("swin", "dan", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(where, function, Interrupt(getattr(where, function), call, after))
        with pytest.raises(KeyboardInterrupt):
            run_search(config)
    assert (tmp_path / "run" / BASIS).is_file() and not (tmp_path / "run" / "arch.json").exists()

    def never(*_: Any) -> None:
        raise AssertionError("a resume computes no basis")

    monkeypatch.setattr(nas.training.basis, "calibrate", never)
    monkeypatch.setattr(nas.training.basis, "taylor_pass", never)
    torch.manual_seed(123)
    assert_same_run(run_search(replace(config, resume=True)), swin_search)


def test_7_an_interrupted_retrain_resumes_in_its_basis(
    world: World, vit_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With averaged weights, from a search's basis and from one of its own, in the second epoch."""
    kept = {name: value for name, value in world.trained("vit").items() if name not in TRAINING}
    for name, source in (("searched", dict(arch=vit_search)), ("uniform", dict(space="vit-an-nano", alpha=2, **kept))):
        config = world.retrain(tmp_path / name, **source, epochs=2, model_ema=True)
        undisturbed = run_retrain(replace(config, output=tmp_path / f"{name}-undisturbed"))
        with monkeypatch.context() as patch:
            stop = Interrupt(nas.training.loop.update_weights, 3, after=True)
            patch.setattr(nas.training.loop, "update_weights", stop)
            with pytest.raises(KeyboardInterrupt):
                run_retrain(config)
        assert (tmp_path / name / "checkpoint.pt").is_file()
        assert_same_run(run_retrain(replace(config, resume=True)), undisturbed)


def test_a_run_that_was_begun_with_an_order_goes_on_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of before there were rotations, whose options say nothing of a basis."""
    config = world.search("vit", "dan", tmp_path / "run", epochs=2)
    undisturbed = run_search(replace(config, basis="order", output=tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr(nas.training.loop, "update_weights", Interrupt(nas.training.loop.update_weights, 3, after=True))
        with pytest.raises(KeyboardInterrupt):
            run_search(replace(config, basis="order"))
    options = tmp_path / "run" / "config.yaml"
    options.write_text(options.read_text().replace("basis: order", "basis: null"))
    folder = run_search(replace(config, resume=True))
    first, second = load_architecture(folder), load_architecture(undisturbed)
    assert first.basis == {} and first.permutation == second.permutation and first.blocks == second.blocks
    a, b = (load_file(f / "supernet.safetensors") for f in (folder, undisturbed))
    assert all(torch.equal(t, b[name]) for name, t in a.items())


# Refused


def refused(
    script: str, arguments: list[str | Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The one line after which a command ends with exit code 2."""
    command = {"search.py": commands.search, "retrain.py": commands.retrain}[script]
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "Traceback" not in out + err
    assert err.startswith(f"{script}: error: ") and len(err.splitlines()) == 1
    return err


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def copied(vit_search: Path, tmp_path: Path) -> Path:
    """arch.json, basis and weights of a rotated search, in a folder of their own."""
    folder = tmp_path / "search"
    folder.mkdir()
    for name in ("arch.json", BASIS, "supernet.safetensors"):
        (folder / name).write_bytes((vit_search / name).read_bytes())
    return folder


DATA = ["--dataset", "folder", "--workers", "0", "--epochs", "1", "--batch-size", "16"]


@pytest.mark.parametrize("case", ["missing", "wrong", "broken"])
def test_a_missing_or_wrong_basis_is_refused_before_anything_is_written(
    case: str, world: World, copied: Path, swin_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = copied / BASIS
    own = load_architecture(copied).basis["sha256"]
    if case == "missing":
        path.unlink()
    else:
        path.write_bytes((swin_search / BASIS).read_bytes() if case == "wrong" else path.read_bytes()[:50])
    before = files_of(tmp_path)
    output = tmp_path / "run"
    arguments = ["--arch", copied, "--data-dir", world.pictures, "--output", output, *DATA]
    said = refused("retrain.py", arguments, monkeypatch, capsys)
    words = {"missing": "no such file; the architecture stands in a rotated basis", "wrong": own[:12], "broken": "not"}
    assert str(path) in said and words[case] in said
    assert files_of(tmp_path) == before and not output.exists()
    with pytest.raises(UserError, match=r"basis\.safetensors"):
        open_folder(copied, CPU)


@pytest.mark.parametrize(
    ("script", "options", "says"),
    [
        ("search.py", ["--space", "vit-dan-nano", "--basis", "none", "--importance", "taylor"], "drop one of them"),
        ("search.py", ["--space", "vit-dan-nano", "--basis", "order", "--importance", "none"], "drop one of them"),
        ("search.py", ["--space", "vit-uvc-nano", "--basis", "rotate"], "this method scores its own units"),
        ("search.py", ["--space", "vit-dan-nano", "--calibration-images", "0"], "--calibration-images 0"),
        ("retrain.py", ["--space", "vit-an-nano", "--alpha", "2", "--basis", "order", "--importance", "none"], "drop"),
        ("retrain.py", ["--arch", "SEARCH", "--basis", "none"], "--basis goes with --space"),
        ("retrain.py", ["--arch", "SEARCH", "--importance", "taylor"], "--importance goes with --space"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(
    script: str, options: list[str], says: str, world: World, vit_search: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = ["--data-dir", world.pictures, "--output", tmp_path / "run", *DATA]
    arguments = [str(vit_search) if option == "SEARCH" else option for option in options]
    assert says in refused(script, [*arguments, *data], monkeypatch, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_a_rotated_basis_is_no_start(
    world: World, vit_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = vit_search / "checkpoint.pt", FAMILIES["vit"][0]
    options = ["--space", "vit-an-nano", "--alpha", "2", "--model", model, "--model-kwargs", *model_kwargs("vit")]
    data = ["--data-dir", world.pictures, "--output", tmp_path / "run", *DATA]
    said = refused("retrain.py", [*options, "--checkpoint", path, *data], monkeypatch, capsys)
    assert str(path) in said and "supernet.safetensors" in said and "rotated basis" in said
    assert list(tmp_path.iterdir()) == []
    assert load_weights(vit_search / "supernet.safetensors")


def test_a_checkpoint_does_not_go_on_in_another_basis(world: World, tmp_path: Path) -> None:
    config = world.search("vit", "dan", tmp_path / "run")
    run_search(config)
    other = run_search(replace(config, seed=7, calibration_images=20, output=tmp_path / "other"))
    (tmp_path / "run" / BASIS).write_bytes((other / BASIS).read_bytes())
    with pytest.raises(UserError, match=r"another basis than basis\.safetensors beside it"):
        run_search(replace(config, resume=True))
