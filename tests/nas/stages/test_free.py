"""Free widths through both stages: searched by importance, refitted and cut, distilled; killed and resumed."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nas.searchers.judge
import nas.stages.prepare
import nas.stages.retrain
import nas.stages.search
import nas.training.basis
import nas.training.loop
import nas.training.refit
import nas.training.state
from nas import validate
from nas.config import RetrainConfig, SearchConfig
from nas.data.images import Images
from nas.networks.basis_file import BASIS, read_basis, recorded
from nas.networks.compact_file import load_compact
from nas.runs.folder import SUPERNET
from nas.runs.opened import open_folder
from nas.searchers.judge import Judge
from nas.searchers.measure import CANDIDATES
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.refit import REFIT
from search_spaces.architecture import load_architecture, save_architecture
from tests.nas.run_checks import assert_whole, log_rows, visible
from tests.nas.stages.free_world import CLASSES, FAMILIES, World, draw, world
from tests.nas.stages.test_search import Interrupt

__all__ = ["world"]  # the fixture
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def searched(world: World) -> tuple[SearchConfig, Path]:
    """A search that nothing disturbed."""
    config = world.search(world.root / "searched", evals=3)
    return config, run_search(config)


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The candidates, but for how long they took."""
    rows = list(csv.DictReader((folder / CANDIDATES).open(newline="")))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def assert_same(folder: Path, undisturbed: Path) -> None:
    """Every file but for timings, weights to the bit."""
    names, expected = set(visible(folder)), set(visible(undisturbed))
    assert names == expected
    for name, path in visible(undisturbed).items():
        other = folder / name
        if path.suffix == ".safetensors":
            a, b = load_file(path), load_file(other)
            assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == [], name
        elif name == "log.csv":
            assert log_rows(path) == log_rows(other)
        elif name == "summary.json":
            assert summary_of(folder) | {"seconds": None} == summary_of(undisturbed) | {"seconds": None}
        elif name in ("arch.json", "config.json"):
            assert path.read_text() == other.read_text(), name
    if CANDIDATES in names:
        assert rows_of(folder) == rows_of(undisturbed)


# A search


def test_fewer_images_than_a_batch_are_enough_where_nothing_is_trained(
    searched: tuple[SearchConfig, Path], world: World, tmp_path: Path
) -> None:
    _, folder = searched
    few = run_search(world.search(tmp_path / "run", evals=3, batch_size=64))  # of 54 images
    assert load_architecture(few).blocks == load_architecture(folder).blocks


def test_a_search_leaves_what_it_promises(searched: tuple[SearchConfig, Path]) -> None:
    _, folder = searched
    assert_whole(folder)
    assert set(visible(folder)) == {
        "arch.json", "basis.safetensors", "candidates.csv", "compact.safetensors", "config.json", "config.yaml",
        "data.json", "refit.safetensors", "summary.json", "supernet.safetensors",
    }  # fmt: skip
    arch = load_architecture(folder)
    assert arch.flops <= 0.5 * arch.backbone_flops and arch.method == "free" and arch.num_classes == CLASSES
    assert arch.basis == recorded(read_basis(folder)) and arch.basis["streams"] == [0] and not arch.permutation
    assert len({block["stream"] for block in arch.blocks}) == 1 and len(arch.blocks) == 2
    search = arch.search
    assert (search["searcher"], search["epochs"], search["evals"], search["decide"]) == ("importance", 0, 3, "kl")
    assert search["loss"] > 0 and search["granularity"] == 1


def test_the_best_of_the_candidates_is_taken(searched: tuple[SearchConfig, Path]) -> None:
    _, folder = searched
    arch, rows = load_architecture(folder), rows_of(folder)
    assert [row["candidate"] for row in rows] == ["1", "2", "3"]
    assert len({row["picks"] for row in rows}) == 3
    best = min(rows, key=lambda row: float(row["value"]))
    assert json.loads(best["picks"]) == list(arch.blocks)
    assert best["stage_widths"] == " ".join(map(str, arch.stage_widths))
    assert float(best["gflops"]) == arch.flops / 1e9 and float(best["loss"]) == arch.search["loss"]
    assert all(float(row["gflops"]) * 1e9 <= 0.5 * arch.backbone_flops for row in rows)


def test_the_compact_network_is_the_one_of_the_summary(
    searched: tuple[SearchConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again, and better than the subnet that was not refitted."""
    _, folder = searched
    monkeypatch.setattr("nas.machine.timing.images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
    summary, arch = summary_of(folder), load_architecture(folder)
    arguments = ["--weights", str(folder), "--workers", "0", "--output", str(folder.parent / "measured.json")]
    networks = validate.run_validate(validate.parser().parse_args(arguments))["networks"]
    assert {"original", "subnet", "compact"} == networks.keys()
    assert "top1" not in summary["subnet"] and "held_out_top1" in summary["subnet"]  # only the results cost that time
    for name in ("original", "compact"):
        for value in ("top1", "top5", "params", "gflops"):
            assert networks[name][value] == summary[name][value], (name, value)
    compact = load_compact(folder)
    assert sum(p.numel() for p in compact.parameters()) == arch.params == summary["compact"]["params"]
    assert {"held_out_top1", "held_out_top5"} <= summary["compact"].keys()
    assert summary["original"]["top1"] > 60 and summary["compact"]["top1"] >= networks["subnet"]["top1"]


def test_the_supernet_is_the_network_it_began_with(searched: tuple[SearchConfig, Path], world: World) -> None:
    _, folder = searched
    before, after = load_file(world.trained), load_file(folder / "supernet.safetensors")
    assert before.keys() == after.keys()
    opened = open_folder(folder, CPU)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    from nas.networks.backbone import build

    name, options = FAMILIES["vit"]
    network = build(name, options, num_classes=CLASSES).eval()
    network.load_state_dict(before)
    with torch.no_grad():
        torch.testing.assert_close(opened.networks()["original"](x), network(x), rtol=1e-3, atol=1e-4)


def test_8_the_same_seed_gives_the_same_search(searched: tuple[SearchConfig, Path], tmp_path: Path) -> None:
    config, folder = searched
    torch.manual_seed(99)  # whatever was drawn before
    assert_same(run_search(replace(config, output=tmp_path / "again")), folder)


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, of the model, options
    "swin": ("swin", {}, {}),
    "swinv2": ("swinv2", {}, {}),
    "t2t": ("t2t", {}, {}),
    "eva": ("eva", {}, {}),
    "eva, mixed": ("eva", dict(rope_type="mixed"), dict(evals=1)),
    "cait": ("cait", {}, dict(evals=1)),
    "beit": ("beit", {}, {}),
    "beit, one table": ("beit", dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True), {}),
    "relpos": ("relpos", {}, {}),
    "relpos, one network": ("relpos", dict(shared_rel_pos=True), dict(evals=1)),
    "eva, norms inside": ("eva", dict(scale_mlp=True, scale_attn_inner=True, qkv_fused=False), dict(evals=1)),
    "attention pooling": ("vit", dict(global_pool="map", class_token=False), dict(evals=1)),
    "taylor, and no basis": ("vit", {}, dict(score="taylor", basis="none")),
    "ordered, not rotated": ("vit", {}, dict(basis="order", evals=1)),
    "heads kept whole": ("vit", {}, dict(fix=("qk", "v"), evals=1)),
    "one block kept": ("vit", {}, dict(keep_block=(0,), granularity=2, budget=0.75, evals=1)),
    "a norm behind the heads": ("vit", dict(scale_attn_norm=True, qk_norm=True), dict(evals=1)),
    "too few images for the stream": ("vit", {}, dict(calibration_images=10, evals=1)),
    "parameters, by the score alone": ("vit", {}, dict(price="params", decide="score")),
    "not refitted": ("vit", {}, dict(refit_images=0, decide="top1", evals=2)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_search_ends_in_a_network_within_its_budget(kind: str, world: World, tmp_path: Path) -> None:
    family, more, options = KINDS[kind]
    config = world.search(tmp_path / "run", family, more, **options)
    folder = run_search(config)
    arch, compact = load_architecture(folder), load_compact(folder)
    price = (arch.params, arch.backbone_params) if config.price == "params" else (arch.flops, arch.backbone_flops)
    assert price[0] <= config.budget * price[1]
    assert sum(p.numel() for p in compact.parameters()) == arch.params
    assert (folder / CANDIDATES).exists() == (config.decide != "score" and config.evals != 1)
    assert (folder / BASIS).exists() == (config.basis != "none") == bool(arch.basis)
    assert all(block["qk"] == block["v"] == 8 for block in arch.blocks) or "qk" not in config.fix
    if config.keep_block:
        assert {**arch.blocks[0], "stream": 0} == {"stream": 0, "heads": 2, "qk": 8, "v": 8, "hidden": 64}
    opened = open_folder(folder, CPU)
    x = torch.randn(4, *arch.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        subnet, cut = opened.networks()["subnet"](x), compact(x)
    same = bool(torch.allclose(subnet, cut, rtol=1e-3, atol=1e-4))
    assert same == (config.refit_images == 0)  # otherwise least squares came in between


def test_where_nothing_is_to_be_refitted_no_candidate_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.searchers.judge, "refit", None)
    run_search(world.search(tmp_path / "run", refit_images=0, evals=2))


def test_pictures_that_are_all_alike_end_in_a_network_too(world: World, tmp_path: Path) -> None:
    pictures = draw(tmp_path / "grey", number=8, constant=True)
    folder = run_search(world.search(tmp_path / "run", data_dir=pictures, evals=2))
    assert all(torch.isfinite(t).all() for t in load_file(folder / "compact.safetensors").values())
    assert all(np.isfinite(float(row["value"])) for row in rows_of(folder))


# Interrupted


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {  # module, function, call, after
    "in the calibration": (nas.training.basis, "calibrate", 1, True),
    "once the basis is found": (nas.training.basis, "rewrite", 1, False),
    "in the second candidate": (nas.searchers.judge, "refit", 2, True),
    "before the summary": (nas.stages.search, "write_json", 1, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_7_an_interrupted_search_resumes_to_the_same(
    moment: str, searched: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = searched
    config = replace(config, output=tmp_path / "run")
    module, function, call, after = MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, Interrupt(getattr(module, function), call, after))
        with pytest.raises(KeyboardInterrupt):
            run_search(config)
    assert_whole(tmp_path / "run")
    torch.manual_seed(123)
    assert_same(run_search(replace(config, resume=True)), undisturbed)


@pytest.mark.parametrize("known", [0, 1, 3])
def test_7_what_was_measured_is_not_measured_again(
    known: int, searched: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been killed after so many candidates."""
    config, undisturbed = searched
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for name in ("arch.json", "summary.json", "compact.safetensors", "supernet.safetensors"):
        (folder / name).unlink()
    lines = (folder / CANDIDATES).read_text().splitlines(keepends=True)
    (folder / CANDIDATES).write_text("".join(lines[: 1 + known]))
    measured: list[Any] = []
    timed = Judge.timed
    monkeypatch.setattr(Judge, "timed", lambda self, subnet: (measured.append(subnet), timed(self, subnet))[1])
    assert_same(run_search(replace(config, output=folder, resume=True)), undisturbed)
    assert len(measured) == 3 - known
    assert (folder / CANDIDATES).read_text().splitlines()[: 1 + known] == [line.strip() for line in lines[: 1 + known]]


# Stage 2


@pytest.fixture(scope="module")
def retrained(searched: tuple[SearchConfig, Path], world: World) -> tuple[RetrainConfig, Path]:
    config = world.retrain(world.root / "retrained", arch=searched[1])
    return config, run_retrain(config)


def start_of(config: RetrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights with which a retrain begins to train."""
    found: dict[str, Tensor] = {}

    def stop(training: Any, *_: Any) -> None:
        state = training.objective.supernet.backbone.state_dict()
        found.update({name: t.clone() for name, t in state.items()})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nas.stages.retrain, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            run_retrain(config)
    return found


def test_a_retrain_distils_and_its_log_begins_with_the_start(
    retrained: tuple[RetrainConfig, Path], searched: tuple[SearchConfig, Path]
) -> None:
    _, folder = retrained
    summary, rows = summary_of(folder), log_rows(folder / "log.csv")
    assert (summary["train"], summary["result"]) == ("distill", "best")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["t"] == "0.0" and rows[0]["loss"] == "" and float(rows[1]["loss"]) > 0
    # the refit is that of the search, whose compact network was measured on the same images
    assert float(rows[0]["held_out_subnet_top1"]) == summary_of(searched[1])["compact"]["held_out_top1"]
    first, second = load_architecture(searched[1]), load_architecture(folder)
    assert first.basis == second.basis and first.blocks == second.blocks
    assert_whole(folder)


@pytest.mark.parametrize("init", ["base", "supernet"])
def test_a_retrain_begins_refitted_wherever_its_weights_come_from(
    init: str, searched: tuple[SearchConfig, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.retrain(tmp_path / "run", arch=searched[1], init=init)
    state = start_of(config, monkeypatch)
    opened = open_folder(searched[1], CPU)
    assert opened.supernet is not None and opened.compact is not None
    with torch.no_grad():
        opened.supernet.backbone.load_state_dict(state)
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(opened.networks()["subnet"](x), opened.compact(x), rtol=1e-2, atol=1e-3)


def refits(patch: pytest.MonkeyPatch) -> list[Any]:
    """Filled with every subnet that is refitted from here on."""
    seen: list[Any] = []
    own = nas.training.refit.refit

    def watched(supernet: Any, subnet: Any, *rest: Any, **more: Any) -> Any:
        seen.append(subnet)
        return own(supernet, subnet, *rest, **more)

    patch.setattr(nas.training.refit, "refit", watched)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("more", [{}, {"init_values": 0.3}], ids=["", "LayerScale"])
def test_a_retrain_begins_at_what_its_search_refitted(
    family: str, more: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its network was taken out of the basis and put into it again, and stands there otherwise scaled."""
    if more and family not in ("vit", "eva", "beit", "relpos"):
        pytest.skip("has none, or has it already")
    search = run_search(world.search(tmp_path / "search", family, more, decide="score", evals=1, refit_images=24))
    seen = refits(monkeypatch)
    state = start_of(world.retrain(tmp_path / "run", arch=search, refit_images=24), monkeypatch)
    assert not seen
    opened = open_folder(search, CPU)
    assert opened.supernet is not None and opened.compact is not None
    side = opened.supernet.adapter.input_size[-1]
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opened.supernet.backbone.load_state_dict(state)
        torch.testing.assert_close(opened.networks()["subnet"](x), opened.compact(x), rtol=1e-4, atol=1e-5)


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 7}, "images": {"refit_images": 20}, "held out": {"val_fraction": 0.2}, "base": {"init": "base"},
}  # fmt: skip


@pytest.mark.parametrize("what", [*OTHERS, "weights", "weights trained on", "another architecture", "a torn file"])
def test_a_retrain_refits_where_the_search_did_not_refit_the_same(
    what: str, searched: tuple[SearchConfig, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(searched[1], folder := tmp_path / "search")
    options = OTHERS.get(what, {"checkpoint": world.trained} if what == "weights" else {})
    if what == "another architecture":
        arch = load_architecture(folder)
        save_architecture(
            replace(arch, blocks=tuple(dict(b) | {"hidden": 5} for b in arch.blocks)), folder / "arch.json"
        )
    if what == "weights trained on":  # the search resumed for more epochs, and ended before its refit
        weights = load_file(folder / SUPERNET)
        save_file({name: t * 1.001 for name, t in weights.items()}, folder / SUPERNET)
    if what == "a torn file":
        (folder / REFIT).write_bytes((folder / REFIT).read_bytes()[:200])
    seen = refits(monkeypatch)
    start_of(world.retrain(tmp_path / "run", arch=folder, **options), monkeypatch)
    assert len(seen) == 1


def test_a_search_that_goes_on_refits_no_second_time(
    searched: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = searched
    shutil.copytree(undisturbed, folder := tmp_path / "run")
    for name in ("arch.json", "summary.json", "compact.safetensors"):
        (folder / name).unlink()
    seen = refits(monkeypatch)
    assert_same(run_search(replace(config, output=folder, resume=True)), undisturbed)
    assert not seen


@pytest.mark.parametrize("ema", [False, True])
def test_no_result_is_worse_than_its_start(
    ema: bool, searched: tuple[SearchConfig, Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that destroys it: then it is the start."""
    options: dict[str, Any] = dict(arch=searched[1], lr=3.0, model_ema=ema, model_ema_decay=0.01)
    start = start_of(world.retrain(tmp_path / "start", **options), monkeypatch)
    folder = run_retrain(world.retrain(tmp_path / "run", **options))
    rows = log_rows(folder / "log.csv")
    scores = [float(row["held_out_subnet_top1"]) for row in rows]
    assert scores[0] > max(scores[1:]) + 10
    compact, opened = load_compact(folder), open_folder(searched[1], CPU)
    assert opened.supernet is not None
    opened.supernet.backbone.load_state_dict(start)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(opened.networks()["subnet"](x), compact(x), rtol=1e-4, atol=1e-5)
    last = run_retrain(world.retrain(tmp_path / "last", result="last", **options))
    assert summary_of(last)["compact"]["top1"] < summary_of(folder)["compact"]["top1"]
    assert log_rows(last / "log.csv")[0]["epoch"] == "1"


RETRAIN_MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "at the refit of its search": (nas.stages.retrain, "write", 1, True),
    "once the start is saved": (nas.training.state, "save_checkpoint", 1, True),
    "between checkpoint and best": (nas.training.state, "copy_atomically", 1, False),
    "in the second epoch": (nas.training.loop, "update_weights", 5, True),
    "after the last": (nas.stages.retrain, "settle", 1, False),
}


@pytest.mark.parametrize("moment", RETRAIN_MOMENTS)
def test_7_an_interrupted_retrain_resumes_to_the_same(
    moment: str, retrained: tuple[RetrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = retrained
    config = replace(config, output=tmp_path / "run")
    module, function, call, after = RETRAIN_MOMENTS[moment]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, Interrupt(getattr(module, function), call, after))
        with pytest.raises(KeyboardInterrupt):
            run_retrain(config)
    torch.manual_seed(123)
    assert_same(run_retrain(replace(config, resume=True)), undisturbed)


def test_adjoined_training_shares_weights_and_begins_without_a_refit(
    searched: tuple[SearchConfig, Path], world: World, tmp_path: Path
) -> None:
    folder = run_retrain(world.retrain(tmp_path / "run", arch=searched[1], train="adjoined", result="last", epochs=1))
    assert {"large.safetensors", "compact.safetensors"} <= set(visible(folder))
    assert summary_of(folder)["compact_minus_subnet"] <= 1e-5


# Labels


def with_labels(images: Images, order: Any) -> Images:
    """The same pictures under other labels."""
    source = images.source
    return Images(replace(source, labels=order(np.asarray(source.labels))), images.indices)


def shuffled(labels: Any) -> Any:
    return np.random.default_rng(1).permutation(labels)


UNLABELLED: dict[str, dict[str, Any]] = {
    "error": dict(score="error"),
    "error, a stream that is not rotated": dict(score="error", calibration_images=10),
    "taylor, ordered by it": dict(score="taylor", importance="taylor"),
}


@pytest.mark.slow
@pytest.mark.parametrize("score", UNLABELLED)
def test_without_labels_none_is_read(score: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels on the same pictures give the same basis, candidates, architecture and refit."""
    opened, folders = nas.stages.search.open_data, []
    for name, order in (("own", np.array), ("shuffled", shuffled)):

        def other(config: Any, order: Any = order) -> Any:
            splits = opened(config)
            parts = {part: with_labels(getattr(splits, part), order) for part in ("train", "val", "test")}
            return replace(splits, **parts)

        monkeypatch.setattr(nas.stages.search, "open_data", other)
        options = UNLABELLED[score] | dict(labels=False, evals=2)
        folders.append(run_search(world.search(tmp_path / name, **options)))
    first, second = folders
    for name in ("basis.safetensors", "compact.safetensors", "supernet.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items()), name
    assert rows_of(first) == rows_of(second)
    assert (first / "arch.json").read_text() == (second / "arch.json").read_text()
    assert ("stream.0" in read_basis(first).orders) == ("not rotated" in score)
    assert summary_of(first)["original"] == summary_of(second)["original"] and "kl" in summary_of(first)["compact"]


def test_with_labels_taylor_reads_them(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, losses = nas.stages.search.open_data, []
    for name, order in (("own", np.array), ("shuffled", shuffled)):

        def other(config: Any, order: Any = order) -> Any:
            splits = opened(config)
            return replace(splits, train=with_labels(splits.train, order))

        monkeypatch.setattr(nas.stages.search, "open_data", other)
        folder = run_search(world.search(tmp_path / name, score="taylor", decide="score"))
        losses.append(load_architecture(folder).search["loss"])
    assert losses[0] != losses[1]
