"""Compression in rounds: search.py --arch goes on from a finished run's compact network, in free widths."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import nas.searchers.measured
from nas import commands
from nas.config import SearchConfig
from nas.networks.architecture import architecture_of, slices_of
from nas.networks.backbone import TimmModel
from nas.networks.basis_file import read_basis
from nas.networks.compact_file import WEIGHTS, load_compact, save_compact
from nas.networks.opening import meta_supernet
from nas.networks.rounds import LARGE_ARCH
from nas.pictures.rows import rows_of
from nas.runs.card import model_card
from nas.runs.opened import open_folder
from nas.searchers.measure import Measure
from nas.stages.asked import resolve
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.sweeps.options import SweepConfig
from nas.sweeps.trials import make_trials
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.registry import get_space
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.nas.stages.free_world import CLASSES, FAMILIES, World, draw, quick
from tests.oracle import randomise

CPU = torch.device("cpu")
SMALL: dict[str, Any] = dict(threads=1, device="cpu", batch_size=16, evals=2)
# Budgets of the second round.
AGAIN = dict(vit=0.4, swin=0.4, swinv2=0.6, t2t=0.6, eva=0.4, beit=0.4, relpos=0.5, cait=0.6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pictures, and weights that are drawn: nothing here asks whether they are good."""
    root = tmp_path_factory.mktemp("rounds")
    draw(root / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        yield World(root, root / "none")


def first(world: World, family: str, **options: Any) -> Path:
    """The first round of a family, at three quarters of its FLOPs; made once."""
    own = dict(budget=0.75, evals=2) | options
    folder = world.root / f"{family}-{'-'.join(f'{key}={value}' for key, value in sorted(own.items()))}"
    if not folder.exists():
        run_search(world.search(folder, family, dict(drop_rate=0.0), **own))
    return folder


def again(arch: Path, output: Path, **options: Any) -> Path:
    """Another round."""
    return run_search(SearchConfig(**SMALL | dict(arch=arch, output=output, budget=0.4) | options))


def handmade(world: World, name: str, space: str, picks: Sequence[Any], family: str = "vit", **more: Any) -> Path:
    """A folder with the compact network of an architecture that no search has found."""
    folder = world.root / name
    if folder.exists():
        return folder
    model, options = FAMILIES[family]
    options = options | more.pop("model", {})
    supernet = Supernet(randomise(timm.create_model(model, num_classes=CLASSES, **options), 0)).eval()
    arch = architecture_of(supernet, space, model, options, picks, **more)
    save_compact(cut(supernet.backbone, slices_of(arch, supernet.shapes)), folder, arch)
    return folder


def on(world: World) -> dict[str, Any]:
    """The images, where the folder's run does not say which."""
    return dict(dataset="folder", data_dir=world.pictures, val_fraction=0.25)


def halved(world: World) -> Path:
    """A ViT of three blocks, one of which has no attention and one nothing."""
    whole = dict(stream=14, heads=2, qk=5, v=6, hidden=40)
    picks = [whole | dict(heads=0), whole | dict(heads=0, hidden=0), whole]
    return handmade(world, "halved", "vit-free-nano", picks, model=dict(depth=3))


def assert_of_the_backbone(folder: Path, budget: float, earlier: Path) -> Architecture:
    """An architecture of timm's model, counted there, within the budget; its networks agree."""
    arch, before = load_architecture(folder), load_architecture(earlier)
    original = meta_supernet(TimmModel(arch.model, arch.model_kwargs), arch.num_classes, get_space(arch.space))
    assert (arch.model, arch.model_kwargs) == (before.model, before.model_kwargs)
    assert (arch.backbone_flops, arch.backbone_params) == (original.flops(), original.params())
    assert arch.flops <= budget * arch.backbone_flops and arch.flops < before.flops
    assert sum(row.flops[0] for row in rows_of(arch)) == arch.flops
    for block, was in zip(arch.blocks, before.blocks, strict=True):
        assert all(block[name] <= was[name] for name in ("stream", "heads", "hidden"))
    assert arch.search["round"]["run"] == str(earlier)
    compact, opened = load_compact(folder), open_folder(folder, CPU)
    assert sum(p.numel() for p in compact.parameters()) == arch.params
    x = torch.randn(4, *arch.input_size, generator=torch.Generator().manual_seed(0))
    networks = opened.networks()
    if "previous" in networks:
        torch.testing.assert_close(networks["previous"](x), load_compact(earlier)(x), rtol=1e-4, atol=1e-4)
        assert opened.costs("previous") == {"params": before.params, "gflops": before.flops / 1e9}
    return arch


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_rounds(family: str, world: World) -> None:
    """Search, search again, train; and a third round from what was trained."""
    one, budget = first(world, family), AGAIN[family]
    two = again(one, world.root / f"{family}-2", budget=budget)
    assert (two / LARGE_ARCH).is_file() and load_architecture(two).space == f"{family}-free-nano"
    arch = assert_of_the_backbone(two, budget, one)
    summary = json.loads((two / "summary.json").read_text())
    assert "original" not in summary and summary["previous"]["params"] == load_architecture(one).params
    trained = run_retrain(world.retrain(world.root / f"{family}-2-trained", arch=two, epochs=1))
    assert_of_the_backbone(trained, budget, one)
    assert load_architecture(trained).blocks == arch.blocks
    table = json.loads((trained / "summary.json").read_text())
    assert table["previous"]["gflops"] == load_architecture(one).flops / 1e9 and table["train"] == "distill"
    assert "from the compact network" not in model_card(trained, arch) and str(one) in model_card(trained, arch)
    last = 0.99 * budget if family == "t2t" else 0.8 * budget  # its token module never shrinks
    assert_of_the_backbone(again(trained, world.root / f"{family}-3", budget=last), last, trained)


def test_images_are_those_of_the_run_unless_others_are_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    one = first(world, "vit")
    config, _ = resolve(SearchConfig(arch=one, budget=0.4))
    assert (config.dataset, config.data_dir, config.val_fraction) == ("folder", world.pictures, 0.25)
    other = SearchConfig(arch=one / "arch.json", budget=0.4, dataset="digits", val_fraction=0.2)
    config, _ = resolve(other)
    assert (config.dataset, config.data_dir, config.val_fraction) == ("digits", None, 0.2)
    again(one, world.root / "said")
    said = capsys.readouterr().out
    assert f"--data-dir {world.pictures}, --val-fraction 0.25" in said
    share = load_architecture(one).flops / load_architecture(one).backbone_flops
    assert f"GFLOPs, {share:.4g} of the FLOPs, budget 0.4" in said
    trials = make_trials(
        SweepConfig(**SMALL | dict(arch=one, sweep=("budget=0.3,0.4",), retrain_trials=True, evals=None))
    )
    for trial in trials:
        assert trial.search.arch == one.absolute() and trial.search.space == "vit-free-nano"
        assert trial.retrain is not None and trial.retrain.data_dir == world.pictures


@pytest.mark.slow
@pytest.mark.parametrize("searcher", ["importance", "gradient", "evolution", "random", "uniform"])
def test_every_searcher_goes_on_from_missing_halves(searcher: str, world: World) -> None:
    one, options = halved(world), on(world) | dict(searcher=searcher, budget=0.2, evals=None)
    options |= dict(importance=dict(evals=3), gradient=dict(epochs=1, evals=2), random=dict(candidates=2),
                    evolution=dict(population=2, generations=1), uniform={})[searcher]  # fmt: skip
    two = again(one, world.root / f"halved-{searcher}", **options)
    arch = load_architecture(two)
    assert arch.flops <= 0.2 * arch.backbone_flops
    assert [block["heads"] == 0 for block in arch.blocks][:2] == [True, True] and arch.blocks[1]["hidden"] == 0
    x = torch.randn(4, *arch.input_size)
    networks = open_folder(two, CPU).networks()
    assert networks["compact"](x).shape == networks["subnet"](x).shape == (4, CLASSES)
    trained = run_retrain(world.retrain(world.root / f"halved-{searcher}-trained", arch=two, epochs=1))
    assert load_architecture(trained).flops == arch.flops


@pytest.mark.slow
def test_a_front_of_a_further_round(world: World) -> None:
    one = first(world, "vit")
    two = run_search(SearchConfig(**SMALL | dict(arch=one, output=world.root / "front", front=(0.3, 0.5))))
    for budget in (0.3, 0.5):
        arch = load_architecture(two / f"arch-{budget:.2f}.json")
        assert arch.flops <= budget * arch.backbone_flops
    trained = run_retrain(world.retrain(world.root / "front-trained", arch=two / "arch-0.30.json", epochs=1))
    assert_of_the_backbone(trained, 0.3, one)
    with pytest.raises(UserError, match=r"budget 0.8 .* has 0.7\d* already"):
        run_search(SearchConfig(**SMALL | dict(arch=one, output=world.root / "front-2", front=(0.3, 0.8))))


@pytest.mark.parametrize(
    ("space", "picks", "width", "accepted"),
    [
        ("vit-an-nano", [{"alpha": 2}] * 2, "stream", True),
        ("vit-an-nano", [{"alpha": 2}] * 2, "inner", True),
        ("vit-dan-nano", [{"alpha": 1}, {"alpha": 2}], "inner", True),
        ("vit-dan-nano", [{"alpha": 1}, {"alpha": 2}], "stream", r"left block 1 with 8 of the 16 channels"),
        ("vit-kcr-nano", [{"channels": 8}] * 2, "stream", "an MLP that reads 8 of its 16 channels"),
        (
            "vit-uvc-nano",
            [{"heads": 2, "v_channels": 9, "hidden": 31}] * 2,
            "stream",
            "different numbers of v channels",
        ),
        ("vit-uvc-nano", [{"heads": 2, "v_channels": 6, "hidden": 31}] * 2, "stream", True),
    ],
)
def test_what_free_widths_describe_goes_on(
    space: str, picks: list[Any], width: str, accepted: Any, world: World
) -> None:
    more: dict[str, Any] = dict(width=width)
    if "kcr" in space:
        more["kept"] = [{"kept_channels": list(range(8))}] * 2
    if "uvc" in space:
        own = [0, 1, 2, 8, 9, 10] if accepted is True else [*range(8), 8]  # of the heads' 2 x 8 channels
        more["kept"] = [{"kept_v": own, "kept_hidden": [*range(1, 32)]}] * 2
    name = f"{space}-{width}-{accepted is True}"
    one = handmade(world, name, space, picks, **more)
    options, output = on(world) | dict(budget=0.2), world.root / f"{name}-2"
    if accepted is True:
        arch = load_architecture(again(one, output, **options))
        assert arch.space == "vit-free-nano" and arch.flops <= 0.2 * arch.backbone_flops
    else:
        with pytest.raises(UserError, match=accepted):
            again(one, output, **options)
        assert not output.exists()


@pytest.mark.slow
def test_a_stem_that_was_rotated_stays_a_layer_without_another_basis(world: World) -> None:
    """arch.json has to say so, and then names a basis; one that changes nothing."""
    one = first(world, "swin", evals=1)
    two = again(one, world.root / "swin-plain", basis="none", score="taylor")
    arch = load_architecture(two)
    assert load_architecture(one).stage_widths[0] < 16 and arch.basis["streams"] == [0]
    assert read_basis(two).orders == {"stream.0": list(range(load_architecture(one).stage_widths[0]))}
    trained = run_retrain(world.retrain(world.root / "swin-plain-trained", arch=two, epochs=1))
    assert load_architecture(trained).basis == arch.basis
    assert_of_the_backbone(trained, 0.4, one)


@pytest.mark.slow
def test_a_stem_that_was_narrowed_unrotated_is_not_rotated_later(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    one = first(world, "swin", basis="order", evals=1)
    assert load_architecture(one).stage_widths[0] < 16
    two = again(one, world.root / "swin-rotated-later")
    assert "stage 0 is ordered, not rotated: an earlier round narrowed the norm" in capsys.readouterr().out
    assert load_architecture(two).basis["streams"] == [1]
    assert_of_the_backbone(two, 0.4, one)


def test_train_adjoined_trains_the_earlier_network_with_it(world: World) -> None:
    one = first(world, "vit")
    two = again(one, world.root / "for-adjoined")
    trained = run_retrain(world.retrain(world.root / "adjoined", arch=two, epochs=1, train="adjoined"))
    networks = open_folder(trained, CPU).networks()
    assert list(networks) == ["large", "subnet", "compact"]
    large, x = load_file(trained / "large.safetensors"), torch.randn(2, 3, 16, 16)
    assert {n: t.shape for n, t in large.items()} == {n: t.shape for n, t in load_file(one / WEIGHTS).items()}
    torch.testing.assert_close(networks["subnet"](x), networks["compact"](x), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"--train plain trains the large network alone, which here is the compact"):
        run_retrain(world.retrain(world.root / "plain-2", arch=two, train="plain"))


def test_the_teacher_is_the_earlier_network_or_the_one_named(world: World) -> None:
    """A checkpoint that is named is of timm's model, as it is: the network of the first round."""
    one = first(world, "vit")
    two = again(one, world.root / "for-teacher")
    own = world.retrain(world.root / "own-teacher", arch=two, epochs=1, init="base")
    table = json.loads((run_retrain(own) / "summary.json").read_text())
    before = load_architecture(one)
    assert table["previous"]["params"] == before.params and "teacher" not in table
    original = world.checkpoint("vit", drop_rate=0.0)
    named = world.retrain(world.root / "named-teacher", arch=two, epochs=1, teacher_checkpoint=original)
    table = json.loads((run_retrain(named) / "summary.json").read_text())
    assert table["teacher"]["params"] == before.backbone_params and table["previous"]["params"] == before.params


# Resumed, moved, changed


@pytest.mark.slow
def test_a_killed_round_goes_on_as_if_nothing_had_happened(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = first(world, "vit")
    undisturbed = again(one, world.root / "undisturbed", evals=3)
    killed = world.root / "killed"

    class Stopped(Measure):
        def __call__(self, *arguments: Any) -> float:
            if len(self.candidates) == 1:
                raise KeyboardInterrupt
            return super().__call__(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(nas.searchers.measured, "Measure", Stopped)
        with pytest.raises(KeyboardInterrupt):
            again(one, killed, evals=3)
    again(one, killed, evals=3, resume=True)
    for name in ("arch.json", LARGE_ARCH):
        assert (killed / name).read_text() == (undisturbed / name).read_text()
    a, b = (load_file(folder / WEIGHTS) for folder in (killed, undisturbed))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_has_moved_or_changed_is_refused_by_name(world: World) -> None:
    one = world.root / "to-change"
    shutil.copytree(first(world, "vit"), one)
    two = again(one, world.root / "of-changed")
    stage_two = world.retrain(world.root / "retrain-of-changed", arch=two, epochs=1)
    weights = load_file(one / WEIGHTS)
    save_file({name: t + 1e-3 for name, t in weights.items()}, one / WEIGHTS)
    with pytest.raises(UserError, match=r"the files of .*to-change have changed since the run began"):
        again(one, two, resume=True)
    with pytest.raises(UserError, match=r"to-change/compact.safetensors has changed since the search went on from it"):
        run_retrain(stage_two)
    shutil.move(one, world.root / "moved")
    with pytest.raises(UserError, match=r"to-change"):
        again(one, two, resume=True)
    with pytest.raises(UserError, match=r"to-change/arch.json: no such file; the search went on from that run"):
        run_retrain(stage_two)
    (two / LARGE_ARCH).unlink()
    with pytest.raises(UserError, match=r"large.json: no such file; arch.json is of a search that went on from"):
        run_retrain(stage_two)
    assert not stage_two.output.exists()


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(space="vit-dan-nano"), r"--space vit-dan-nano: .* is compressed in deit-free|vit-free or vit-free-nano"),
        (dict(space="swin-free-nano"), r"--space swin-free-nano: .* is compressed in vit-free or vit-free-nano"),
        (dict(model="vit_tiny_patch16_224"), r"--model names a network, and so does --arch"),
        (dict(model_kwargs=("depth=3",)), r"--model-kwargs names a network"),
        (dict(checkpoint=Path("x.safetensors")), r"--checkpoint names a network"),
        (dict(pretrained=True), r"--pretrained names a network"),
        (dict(budget=0.8), r"budget 0.8 of the FLOPs of vit_tiny\w*: .* has 0.7\d* already; ask for 0\.\d+ or more"),
        (dict(budget=0.01), r"budget 0.01 .* cannot be met: this search space reaches 0\.\d+ to 0.7\d+ of"),
        (dict(dataset="digits"), r"no classifier for these 10 classes"),
    ],
)
def test_refusals(options: dict[str, Any], words: str, world: World) -> None:
    output = world.root / "refused"
    with pytest.raises(UserError, match=words):
        again(first(world, "vit"), output, **options)
    assert not output.exists()


def test_a_folder_without_a_compact_network_is_refused(world: World) -> None:
    folder = world.root / "bare"
    folder.mkdir()
    with pytest.raises(UserError, match=r"bare/arch.json: no such file"):
        again(folder, world.root / "of-bare")
    save_architecture(load_architecture(first(world, "vit")), folder / "arch.json")
    with pytest.raises(UserError, match=r"no compact.safetensors there, .* retrain.py --arch .*bare"):
        again(folder, world.root / "of-bare")


def test_a_smaller_network_is_the_same_whatever_was_called_first(world: World) -> None:
    """Budgets are shares of timm's model, whatever the round: --gflops says the same."""
    one = first(world, "vit")
    arch = load_architecture(one)
    by_share = load_architecture(again(one, world.root / "by-share", budget=0.4))
    gflops = 0.4 * arch.backbone_flops / 1e9
    by_gflops = load_architecture(again(one, world.root / "by-gflops", budget=None, gflops=gflops))
    assert by_share.blocks == by_gflops.blocks


# The commands


@pytest.mark.slow
def test_two_rounds_by_the_commands_on_the_digits(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = FAMILIES["vit"]
    start = tmp_path / "start.safetensors"
    save_file(timm.create_model(name, num_classes=10, **options).state_dict(), start)
    model = ["--model", name, "--model-kwargs", *(f"{key}={value}" for key, value in options.items())]
    quickly = ["--evals", "1", "--calibration-images", "64", "--refit-images", "64", "--threads", "1"]

    def call(run: Any, *words: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["search.py", *map(str, words)])
        run()

    r1, t1, r2, t2 = (tmp_path / name for name in ("r1", "t1", "r2", "t2"))
    first_words = ["--space", "vit-free-nano", *model, "--checkpoint", start, "--budget", "0.6"]
    call(commands.search, *first_words, "--output", r1, *quickly)
    call(commands.retrain, "--arch", r1, "--output", t1, "--epochs", 1, "--refit-images", 64, "--lr", "1e-3")
    call(commands.search, "--arch", t1, "--budget", "0.3", "--output", r2, *quickly)
    call(commands.retrain, "--arch", r2, "--output", t2, "--epochs", 1, "--refit-images", 64, "--lr", "1e-3")
    arch = assert_of_the_backbone(t2, 0.3, t1)
    assert arch.num_classes == 10 and replace(arch, search={}) == replace(load_architecture(r2), search={})
