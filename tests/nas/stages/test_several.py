"""A retrain of a front: one training over shared weights, a compact network for every budget."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nas
import nas.stages.front
import nas.stages.several
from nas.config import RetrainConfig
from nas.objectives.adjoined import Adjoined, Loss
from nas.objectives.distill import Distilled
from nas.objectives.members import Members
from nas.runs.front import FRONT
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.objective import Step
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from tests.nas import tiny
from tests.nas.run_checks import assert_same_run, assert_whole
from tests.nas.stages.free_world import COMMON, World, quick, world
from tests.nas.stages.test_searchers import search

__all__ = ["world"]  # the fixture
BUDGETS = 0.6, 0.8


@pytest.fixture(scope="module")
def fronts(world: World) -> dict[tuple[str, str], Path]:
    """A search for two budgets, by method and family."""
    found, drawn = {}, pytest.MonkeyPatch()
    drawn.setattr(nas.stages.front, "plot_run", lambda folder: None)
    for method, family in [("dan", "vit"), ("free", "swin"), ("kcr", "vit")]:
        budgets = (0.9, 0.95) if method == "kcr" else BUDGETS
        output = world.root / f"several-{method}"
        config = search(world, output, "random", method, family, front=budgets, budget=None, candidates=2)
        found[method, family] = run_search(config)
    drawn.undo()
    return found


def retrain(world: World, front: Path, output: Path, **options: Any) -> RetrainConfig:
    own = COMMON | dict(data_dir=world.pictures, epochs=2, lr=1e-3)
    return RetrainConfig(arch=front, output=output, **own | options)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "family", "train"), [("dan", "vit", "adjoined"), ("free", "swin", "distill")])
def test_a_front_is_trained_at_once_and_cut(
    method: str,
    family: str,
    train: str,
    fronts: dict[tuple[str, str], Path],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = run_retrain(retrain(world, fronts[method, family], tmp_path / "run"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["train"] == train and [row["budget"] for row in summary["front"]] == list(BUDGETS)
    assert (folder / "large.safetensors").exists() == (train == "adjoined")
    assert ("large" if train == "adjoined" else "original") in summary
    for row in summary["front"]:
        own = folder / row["folder"]
        arch, network = load_architecture(own), nas.load(folder, budget=row["budget"])
        assert arch.flops <= row["budget"] * arch.backbone_flops and arch.flops / 1e9 == row["gflops"]
        assert sum(p.numel() for p in network.parameters()) == arch.params == row["params"]
        assert arch == replace(load_architecture(fronts[method, family] / f"arch-{row['budget']:.2f}.json"))
        alone = nas.load(own)
        x = torch.randn(2, *arch.input_size)
        assert torch.equal(network(x), alone(x))
    for name in ("front.png", "pareto.png", "curves.png", "table.csv", FRONT):
        assert (folder / name).stat().st_size > 100
    header = (folder / "log.csv").read_text().splitlines()[0]
    assert "held_out_0.6_top1" in header and "held_out_0.8_top1" in header
    assert_whole(folder)
    quick(monkeypatch)
    trained_on = retrain(world, folder / "compact-0.60", tmp_path / "on", epochs=1)
    assert run_retrain(trained_on).joinpath("compact.safetensors").exists()


def test_7_an_interrupted_run_resumes_to_the_same(
    fronts: dict[tuple[str, str], Path], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nas.stages.several, "plot_run", lambda folder: None)
    monkeypatch.setattr(nas.stages.several, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
    front = fronts["dan", "vit"]
    whole = run_retrain(retrain(world, front, tmp_path / "whole", per_step=1))

    def stop(row: Any) -> None:
        raise KeyboardInterrupt

    config = retrain(world, front, tmp_path / "halves", per_step=1)
    with pytest.raises(KeyboardInterrupt):
        run_retrain(config, stop)
    run_retrain(replace(config, resume=True))
    assert_same_run(whole, tmp_path / "halves")


def slices() -> tuple[Any, Members, Tensor, Tensor]:
    net = tiny.supernet()
    subnets = {"0.5": tiny.half(net), "1": net.identity()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *net.adapter.input_size, generator=generator)
    return net.eval(), Members(subnets, 1), x, torch.arange(4) % 2


def test_networks_take_part_in_turn() -> None:
    members = slices()[1]
    narrow, wide = members.subnets.values()
    assert [members.at(n) for n in range(3)] == [[narrow], [wide], [narrow]]
    assert replace(members, per_step=2).at(5) == [narrow, wide] == replace(members, per_step=9).at(0)


def test_losses_of_a_step_are_those_of_its_networks_added() -> None:
    """By hand, with gradients: CE(p) once, a KL term for each."""
    net, members, x, y = slices()
    step = Step(t=0.4, number=0, total=10)
    both = Adjoined(net, replace(members, per_step=2), Loss(small_ce=0.3))
    each = [Adjoined(net, subnet, Loss(small_ce=0.3)) for subnet in members.subnets.values()]
    terms, alone = both(x, y, step), [one(x, y, step) for one in each]
    torch.testing.assert_close(terms["ce"], alone[0]["ce"])
    for name in ("kl", "ce_small"):
        torch.testing.assert_close(terms[name], sum(one[name] for one in alone))
    turn = Adjoined(net, members, Loss(small_ce=0.3))
    for number, one in enumerate(each):
        now = Step(t=0.4, number=number, total=10)
        torch.testing.assert_close(turn(x, y, now)["kl"], one(x, y, now)["kl"])


def test_under_a_teacher_losses_add_up_too() -> None:
    net, members, x, y = slices()
    step = Step(t=0.4, number=0, total=10)
    teacher: Any = lambda images: torch.linspace(0, 1, 4)[:, None] * torch.ones(4, net.backbone.num_classes)  # noqa: E731
    both = Distilled(net, replace(members, per_step=2), teacher)(x, y, step)
    alone = [Distilled(net, subnet, teacher)(x, y, step) for subnet in members.subnets.values()]
    for name in both:
        torch.testing.assert_close(both[name], sum(one[name] for one in alone))


def test_refusals(fronts: dict[tuple[str, str], Path], world: World, tmp_path: Path) -> None:
    dan, run = fronts["dan", "vit"], tmp_path / "run"
    with pytest.raises(UserError, match="the kernel term is of the features of one network"):
        run_retrain(retrain(world, fronts["kcr", "vit"], run, train="adjoined"))
    with pytest.raises(UserError, match="--per-step 2 is of the networks of a front"):
        run_retrain(retrain(world, dan / "arch-0.60.json", run, per_step=2))
    with pytest.raises(UserError, match="--per-step 0"):
        run_retrain(retrain(world, dan, run, per_step=0))
    with pytest.raises(UserError, match="no compact network at budget"):
        nas.load(dan, budget=0.3)
    broken = tmp_path / "broken"
    shutil.copytree(dan, broken)
    (broken / FRONT).write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="expected columns budget and file"):
        run_retrain(retrain(world, broken, run))
    shutil.copy(dan / FRONT, broken / FRONT)
    arch = json.loads((broken / "arch-0.80.json").read_text())
    (broken / "arch-0.80.json").write_text(json.dumps(arch | {"model": "vit_small_patch16_224"}))
    with pytest.raises(UserError, match="field 'model' is not that of the others"):
        run_retrain(retrain(world, broken, run))
