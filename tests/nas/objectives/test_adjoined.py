"""Adjoined training from a trained start: the schedules of lambda, a third term, and whom the small network follows."""

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from nas.config import RetrainConfig
from nas.networks.backbone import Start
from nas.objectives.adjoined import Adjoined, Loss
from nas.objectives.kernel import KernelAdjoined, KernelTerm
from nas.objectives.teacher import Teacher
from nas.stages.goal import resolve
from nas.training.loop import fit
from nas.training.objective import Step
from nas.training.rate import RATES, best_of, find_rate, judging_images, may_be_tried, tried
from nas.training.state import CHECKPOINT
from search_spaces.architecture import save_architecture
from search_spaces.errors import UserError
from supernets.supernet import Supernet
from tests.nas import tiny
from tests.nas.finished import finished_run

LOSSES = ("current", "ema", "frozen")


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 4


def frozen(net: Supernet) -> Teacher:
    one = torch.ones(3, 1, 1)
    return Teacher("t", net.backbone.eval().requires_grad_(False), 1, 1, one, 0 * one)


def made(kind: type, net: Supernet, loss: Loss | None = None, who: str = "current", seed: int = 9) -> Any:
    more: dict[str, Any] = dict(loss=loss, averaged=who == "ema")
    more |= dict(teacher=frozen(tiny.supernet(seed=seed))) if who == "frozen" else {}
    more |= dict(kernel=KernelTerm(0.1, 0.2), adjoined=True) if kind is KernelAdjoined else {}
    return kind(net, tiny.half(net), **more)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("thesis", [0, 0.01, 0.25, 1, 1]), ("constant", [1, 1, 1, 1, 1]), ("warm", [0, 0.5, 1, 1, 1])],
)
def test_the_schedules_of_lambda(schedule: str, expected: list[float]) -> None:
    assert [Loss(schedule=schedule).lam(t) for t in (0.0, 0.05, 0.25, 0.5, 1.0)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", [Adjoined, KernelAdjoined])
@pytest.mark.parametrize("who", LOSSES)
def test_the_terms_and_where_their_gradients_go(kind: type, who: str) -> None:
    net = tiny.supernet(seed=1).eval()
    objective = made(kind, net, Loss(schedule="constant", small_ce=0.3), who).eval()
    if who == "ema":
        objective.average.module.load_state_dict(tiny.supernet(seed=5).backbone.state_dict())
    (x, y), subnet = batch(), tiny.half(net)
    terms = objective(x, y, Step(0.0, 0, 8))
    p, q = net(x, subnet)
    expert = {"current": lambda: p, "ema": lambda: objective.average.module(x), "frozen": lambda: objective.teacher(x)}
    followed = expert[who]()
    assert torch.allclose(terms["ce"], F.cross_entropy(p, y))
    assert torch.allclose(
        terms["kl"], F.kl_div(q.log_softmax(1), followed.softmax(1), reduction="batchmean"), rtol=1e-3
    )
    assert torch.allclose(terms["ce_small"], 0.3 * F.cross_entropy(q, y))
    gradients = torch.autograd.grad(terms["kl"], net.backbone.blocks[0].mlp.fc1.weight)[0]
    beyond = gradients[32:].abs().max()  # neurons that only the large network has
    assert (beyond > 0) == (who == "current") and gradients[:32, :8].abs().max() > 0
    assert ("ce_small" in made(kind, net)(x, y, Step(0.0, 0, 8))) is False


def test_the_average_lags_behind_stays_in_evaluation_mode_and_is_in_the_checkpoint(tmp_path: Path) -> None:
    net = tiny.supernet(drop_path_rate=0.5)
    objective = made(Adjoined, net, who="ema").train()
    assert not objective.average.module.training and net.backbone.training
    training = tiny.training(tiny.config(tmp_path), objective)
    fit(training, resume=False, words="test")
    own, average = net.backbone.head.weight, objective.average.module.head.weight
    start = tiny.supernet().backbone.head.weight
    assert 0 < (own - average).norm() < (own - start).norm()
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)["objective"]
    assert torch.equal(state["average.module.head.weight"], average)
    assert not any(name.startswith("average") for name in made(Adjoined, net).state_dict())


@pytest.mark.parametrize("who", LOSSES)
def test_7_a_run_goes_on_to_the_same_weights(who: str, tmp_path: Path) -> None:
    """Its target among them."""
    for name, halves in (("whole", [4]), ("parts", [2, 4])):
        for i, epochs in enumerate(halves):
            net = tiny.supernet()
            training = tiny.training(tiny.config(tmp_path / name, epochs=4), made(Adjoined, net, who=who))
            training.epochs = epochs if epochs == 4 else 4
            if epochs < 4:
                with pytest.raises(KeyboardInterrupt):
                    fit(training, False, "test", lambda row: stop(row, 2))
            else:
                fit(training, bool(i), "test")
    states = [torch.load(tmp_path / n / CHECKPOINT, weights_only=True)["objective"] for n in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def stop(row: dict[str, Any], epoch: int) -> None:
    if row["epoch"] == epoch:
        raise KeyboardInterrupt


def test_whom_it_learns_from_is_measured_at_the_end_and_not_by_epoch(tmp_path: Path) -> None:
    objective = made(Adjoined, tiny.supernet(), who="frozen")
    assert list(objective.networks()) == ["teacher", "large", "subnet"]
    training = tiny.training(tiny.config(tmp_path), objective)
    fit(training, resume=False, words="test")
    assert {c for c in training.rows[-1] if c.endswith("top1")} == {"held_out_large_top1", "held_out_subnet_top1"}


OWN = dict(space="vit-an-nano", alpha=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (dict(train="distill", kl_schedule="constant"), "--kl-schedule constant goes with --train adjoined, not with"),
        (dict(train="plain", small_ce=1.0, alpha=None), "--small-ce 1.0 goes with --train adjoined"),
        (dict(train="distill", adjoined_teacher="ema"), "--adjoined-teacher ema goes with --train adjoined"),
        (dict(adjoined=False, small_ce=1.0, space="vit-kcr-nano"), "is to be searched first"),
        (dict(small_ce=-1.0), "--small-ce -1.0; expected 0 or more"),
        (dict(adjoined_teacher="frozen", detach_teacher=True), "--adjoined-teacher frozen has none: drop one"),
        (dict(teacher="vit_tiny_patch16_224"), "--teacher goes with --train distill or --adjoined-teacher frozen"),
    ],
)
def test_options_of_another_way_to_train_are_refused(tmp_path: Path, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve(tiny.config(tmp_path, **OWN | flags))


def test_the_small_network_alone_follows_nobody(tmp_path: Path) -> None:

    arch, _ = finished_run(tmp_path)
    blocks = tuple({"channels": 16, "kept_channels": list(range(16))} for _ in arch.blocks)
    save_architecture(replace(arch, space="swin-kcr-nano", method="kcr", blocks=blocks), tmp_path / "arch.json")
    with pytest.raises(UserError, match="--adjoined-teacher ema: --no-adjoined trains the small network alone"):
        resolve(RetrainConfig(arch=tmp_path / "arch.json", adjoined=False, adjoined_teacher="ema", data_dir=tmp_path))


def trained_run(tmp_path: Path, kind: type = Adjoined, **options: Any) -> tuple[RetrainConfig, Any, Any]:
    """Some training, so that there is something to lose; then a run that would begin there."""
    net = tiny.supernet()
    first = tiny.config(tmp_path / "first", epochs=10, lr=3e-3)
    fit(tiny.training(first, Adjoined(net, tiny.half(net))), resume=False, words="first")
    config = tiny.config(tmp_path / "run", lr=None, **options)
    (tmp_path / "run").mkdir()
    known = dict(start=Start(checkpoint=tmp_path / "w"), fresh_classifier=False)
    return config, made(kind, net), tiny.prepared(config, net, **known)


@pytest.mark.parametrize("kind", [Adjoined, KernelAdjoined])
def test_a_rate_that_does_no_harm_is_found_and_nothing_else_is_left_of_trying(kind: type, tmp_path: Path) -> None:
    config, objective, prepared = trained_run(tmp_path, kind)
    assert may_be_tried(prepared)
    before = {name: torch.as_tensor(t).clone() for name, t in objective.supernet.state_dict().items()}
    rate = find_rate(config, objective, prepared)
    with (tmp_path / "run" / "rates.csv").open() as file:
        rows = {float(row["lr"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert rate in RATES and rows[rate] <= 1.02 * min(rows.values())
    assert all(torch.equal(t, before[name]) for name, t in objective.supernet.state_dict().items())
    if kind is KernelAdjoined:
        assert not objective.process_state()


@pytest.mark.parametrize(
    ("losses", "rate", "trials"),
    [
        ((1.0, 1.0, 0.99, 0.98, 0.97, 2.0, 5.0), 3e-4, 4),
        ((1.0, 1.0, 1.0, 1.01, 1.5, 2.0, 5.0), 1e-4, 4),
        ((1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 3e-3, 4),
        ((1.0, 1.01, 1.3, 1.5, 1.5, 2.0, 5.0), 1e-5, 3),
        ((1.01, 1.3, 1.5, 1.9, 2.5, 3.0, 5.0), 3e-6, 4),
        ((1.3, 1.3, 1.5, 1.9, 2.5, 3.0, 5.0), 1e-5, 4),  # nothing is without harm: the highest of the least
        ((1.0, *[math.inf] * 6), 3e-6, 4),
        ([math.inf] * 7, 3e-6, 4),
    ],
)
def test_the_rates_tried_find_what_trying_all_of_them_finds(losses: Sequence[float], rate: float, trials: int) -> None:
    table = dict(zip(RATES, losses, strict=True))
    rows = tried(table.__getitem__, lambda: 1.0)
    assert [row["lr"] for row in rows] == sorted(row["lr"] for row in rows)
    assert all(row["loss"] == table[row["lr"]] for row in rows)
    assert len(rows) == trials
    assert best_of(rows) == rate == best_of([{"lr": lr, "loss": loss} for lr, loss in table.items()])


def test_a_teacher_is_asked_once_for_all_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, objective, prepared = trained_run(tmp_path)
    objective = made(Adjoined, objective.supernet, who="frozen")
    asked, own = [], Teacher.output
    monkeypatch.setattr(Teacher, "output", lambda self, images: asked.append(len(images)) or own(self, images))
    find_rate(config, objective, prepared)
    batches, judging = len(prepared.loaders.train), len(judging_images(config, prepared))
    assert len(asked) == batches + judging
    objective(*next(iter(prepared.loaders.train)), Step(t=1.0, number=0, total=1))
    assert len(asked) == batches + judging + 1  # afterwards it remembers nothing


def test_the_rate_is_judged_by_both_terms_and_tried_with_layer_decay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, objective, prepared = trained_run(tmp_path, layer_decay=0.5)
    seen: list[tuple[bool, dict[str, float]]] = []
    forward = Adjoined.forward

    def watched(self: Any, images: Tensor, target: Tensor, step: Step) -> dict[str, Tensor]:
        terms = forward(self, images, target, step)
        seen.append((self.training, {name: float(v.detach()) for name, v in terms.items()}))
        return terms

    monkeypatch.setattr(Adjoined, "forward", watched)
    moved: dict[str, float] = {}
    start = {name: t.clone() for name, t in objective.supernet.backbone.state_dict().items()}
    load = type(objective).load_state_dict

    def compare(self: Any, state: Any, *rest: Any) -> Any:
        if not moved:  # after the first rate
            for name in ("blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"):
                moved[name] = float((self.supernet.backbone.state_dict()[name] - start[name]).abs().max())
        return load(self, state, *rest)

    monkeypatch.setattr(type(objective), "load_state_dict", compare)
    find_rate(config, objective, prepared)
    assert all(terms["kl"] > 0 for _, terms in seen)
    first, second = moved.values()
    assert first == pytest.approx(second / 2, rel=0.2)


def test_without_something_to_lose_or_to_see_it_by_no_rate_is_tried(tmp_path: Path) -> None:
    config, _, prepared = trained_run(tmp_path)
    net = prepared.supernet
    given = Start(checkpoint=tmp_path / "w")
    assert not may_be_tried(tiny.prepared(config, net, start=given, fresh_classifier=True))
    assert not may_be_tried(tiny.prepared(config, net, start=Start(), fresh_classifier=False))
    unseen = replace(prepared.loaders, deciding=None)
    assert not may_be_tried(replace(prepared, loaders=unseen))


@pytest.mark.parametrize(
    ("flags", "follows"),
    [
        (dict(), False),
        (dict(checkpoint="weights.safetensors"), True),
        (dict(checkpoint="weights.safetensors", lr=1e-3), False),
        (dict(checkpoint="weights.safetensors", train="plain", alpha=None), False),
    ],
)
def test_left_out_the_rate_follows_a_start_of_the_users(tmp_path: Path, flags: dict[str, Any], follows: bool) -> None:
    save_file(tiny.supernet().backbone.state_dict(), tmp_path / "weights.safetensors")
    place = {"checkpoint": tmp_path / flags["checkpoint"]} if "checkpoint" in flags else {}
    config, _, _ = resolve(tiny.config(tmp_path, **OWN | dict(lr=None) | flags | place))
    assert (config.lr is None) == follows
