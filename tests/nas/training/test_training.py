"""timm's training options do in the one loop what they do in timm."""

import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nas.data.loaders
import nas.training.state
from nas.cli import parse
from nas.config import RetrainConfig
from nas.runs.checkpoint import load_checkpoint
from nas.searchers.gradient import Gradient
from nas.training.loop import fit
from nas.training.make import make_training
from nas.training.objective import Step
from nas.training.optim import make_clip, make_optimizer, make_scheduler
from nas.training.state import BEST, CHECKPOINT, settle
from search_spaces.errors import UserError
from tests.nas import tiny
from tests.nas.small import small_costs


def weights(training):
    return torch.cat([p.detach().flatten() for p in training.objective.supernet.backbone.parameters()])


def test_every_augmentation_flag_arrives(monkeypatch):
    seen = {}

    def record(images, spec, **rest):
        seen["spec"] = spec

    monkeypatch.setattr(nas.data.loaders, "train_loader", record)
    monkeypatch.setattr(nas.data.loaders, "mixup_fn", lambda *a, **k: seen.update(mixup=(a, k)))
    line = (
        "--space swin-an-nano --batch-size 8 --no-aug --vflip 0.3 --ratio 0.9 1.1 --train-interpolation bilinear"
        " --interpolation nearest --recount 2 --aug-repeats 3 --crop-pct 0.7 --mean 0.1 0.2 0.3 --std 0.4 0.5 0.6"
        " --mixup 0.2 --cutmix 0.3 --cutmix-minmax 0.2 0.8 --mixup-prob 0.4 --mixup-switch-prob 0.6 --mixup-mode elem"
        " --smoothing 0.05"
    )
    tiny.loaders(parse(RetrainConfig, line.split(), "retrain.py"), tiny.supernet())
    spec = seen["spec"]
    assert (spec.no_aug, spec.vflip, spec.ratio, spec.recount, spec.aug_repeats) == (True, 0.3, (0.9, 1.1), 2, 3)
    assert (spec.train_interpolation, spec.interpolation, spec.crop_pct) == ("bilinear", "nearest", 0.7)
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    positional, named = seen["mixup"]
    assert positional == (4, 0.2, 0.3, (0.2, 0.8))
    assert named == dict(prob=0.4, switch_prob=0.6, mode="elem", smoothing=0.05)


def test_splits_and_classes_arrive(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        nas.data.loaders, "open_splits", lambda spec: (seen.append(spec), SimpleNamespace(remarks=()))[1]
    )
    options = tiny.config(tmp_path, train_split="a", val_split="b", num_classes=7)
    nas.data.loaders.open_data(options)
    assert (seen[0].train_split, seen[0].test_split, seen[0].num_classes) == ("a", "b", 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(grad_accum_steps=0), "--grad-accum-steps 0"),
        (dict(vflip=1.5), "--vflip 1.5"),
        (dict(mixup=0.5, batch_size=7), "even"),
        (dict(ratio=(2.0, 1.0)), "low <= high"),
        (dict(layer_decay=0.0), "--layer-decay 0.0"),
        (dict(mean=(0.5, 0.5)), "--mean has 2 numbers"),
        (dict(train_interpolation="none"), "interpolation"),
    ],
)
def test_values_that_no_run_can_use_are_refused(tmp_path, options, words):
    def start():
        chosen = tiny.config(tmp_path, **options)
        chosen.check()
        tiny.loaders(chosen, tiny.supernet())

    with pytest.raises(UserError, match=words):
        start()


def test_optimizer_options_arrive_and_layer_decay_scales_a_constant_rate(tmp_path):
    options = tiny.config(tmp_path, opt="adamw", opt_eps=1e-5, opt_betas=(0.8, 0.9), layer_decay=0.5)
    optimizer = make_optimizer(options, tiny.supernet().backbone)
    group = optimizer.param_groups[0]
    assert (group["eps"], tuple(group["betas"])) == (1e-5, (0.8, 0.9))
    assert make_scheduler(options, optimizer, 4) is not None
    scales = {g["lr_scale"] for g in optimizer.param_groups}
    assert {0.5, 1.0} <= scales
    assert all(g["lr"] == pytest.approx(1e-2 * g["lr_scale"]) for g in optimizer.param_groups)
    with pytest.raises(UserError, match="--opt nonsense"):
        make_optimizer(tiny.config(tmp_path, opt="nonsense"), tiny.supernet().backbone)


@pytest.mark.parametrize("opt", ["adamw", "adam", "lamb", "lion", "adan", "sgd", "radam"])
def test_betas_that_an_optimizer_cannot_take_are_refused_by_their_value(tmp_path, opt):
    backbone = tiny.supernet().backbone
    for betas in ((0.9,), (0.9, 2.0), (1e-300,)):
        with pytest.raises(UserError, match=f"--opt {opt} --opt-betas {' '.join(map(str, betas))}"):
            make_optimizer(tiny.config(tmp_path, opt=opt, opt_betas=betas), backbone)


@pytest.mark.parametrize(
    ("options", "expected"),  # the rate before updates 0, 4, 8, ... of an epoch of four
    [
        (dict(sched="none", warmup_epochs=2, warmup_lr=0.0, epochs=4), [0.0, 0.5e-2, 1e-2, 1e-2, 1e-2]),
        (dict(sched="step", decay_epochs=1.0, decay_rate=0.5, epochs=3), [1e-2, 0.5e-2, 0.25e-2]),
        (dict(sched="cosine", epochs=2, cooldown_epochs=2, min_lr=1e-4), [1e-2, 0.505e-2, 1e-4, 1e-4, 1e-4]),
    ],
)
def test_schedules(tmp_path, options, expected):
    options = tiny.config(tmp_path, **options)
    optimizer = make_optimizer(options, tiny.supernet().backbone)
    scheduler = make_scheduler(options, optimizer, 4)
    rates = []
    for update in range(4 * len(expected)):
        if update:
            scheduler.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[::4] == pytest.approx(expected)


def test_accumulated_batches_are_one_large_batch_and_t_counts_optimiser_steps(tmp_path, monkeypatch):
    numbers = {"one": [], "two": []}
    runs = {}
    for name, options in (("one", dict(batch_size=16)), ("two", dict(batch_size=8, grad_accum_steps=2))):
        training = runs[name] = tiny.training(tiny.config(tmp_path / name, opt="sgd", clip_grad=1.0, **options))
        after = training.objective.after_step
        training.objective.after_step = lambda s, n=name, f=after: (numbers[n].append((s.number, s.t)), f(s))
        fit(training, resume=False, words="test")
    assert numbers["one"] == numbers["two"] == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    start = torch.cat([p.detach().flatten() for p in tiny.supernet().backbone.parameters()])
    assert (weights(runs["one"]) - start).abs().max() > 1e-3
    torch.testing.assert_close(weights(runs["one"]), weights(runs["two"]), rtol=1e-4, atol=1e-6)
    assert runs["one"].rows[-1]["loss"] == pytest.approx(runs["two"].rows[-1]["loss"], rel=1e-4)


def test_choices_move_at_the_pace_of_lambda(tmp_path):
    """Adam would take whole steps from the first, whatever factor their gradient has."""
    net, options = tiny.supernet(), tiny.config(tmp_path)
    objective = Gradient(net, small_costs(net, "stream"), budget=0.5, gamma=0.0, seed=0, total_steps=8)
    training = make_training(options, objective, tiny.prepared(options, net), arch_lr=0.1)
    own, rates, etas = objective.after_step, [], []

    def after_step(step):
        rates.append(training.arch_optimizer.param_groups[0]["lr"])
        etas.append(torch.cat([eta.detach().clone() for eta in objective.architecture_parameters()]))
        own(step)

    objective.after_step = after_step
    fit(training, resume=False, words="test")
    pace = [0, 1 / 16, 1 / 4, 9 / 16, 1, 1, 1, 1]  # min(4 t^2, 1) at t = 0, 1/8, 2/8, ...
    assert rates == pytest.approx([0.1 * p for p in pace])
    assert training.rows[-1]["arch_lr"] == pytest.approx(0.1)
    steps = [float((b - a).abs().max()) for a, b in zip([torch.zeros_like(etas[0]), *etas], etas, strict=False)]
    assert steps[0] == 0.0 and all(step > 0.005 * p for step, p in zip(steps[1:], pace[1:], strict=True))
    assert all(step <= 0.32 * p for step, p in zip(steps, pace, strict=True))  # Adam's bound, 0.1 / sqrt(10)


def test_an_epochs_last_step_may_have_fewer_batches(tmp_path):
    training = tiny.training(tiny.config(tmp_path, grad_accum_steps=3, epochs=1))  # four batches
    seen = []
    training.objective.after_step = lambda step: seen.append(step.number)
    fit(training, resume=False, words="test")
    assert seen == [0, 1]


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clip_modes(tmp_path, mode):
    net = tiny.supernet()
    for p in net.backbone.parameters():
        p.grad = torch.full_like(p, 3.0)
    make_clip(tiny.config(tmp_path, clip_grad=0.01, clip_mode=mode), net.backbone)()
    grads = {name: p.grad for name, p in net.backbone.named_parameters()}
    if mode == "norm":
        assert torch.cat([g.flatten() for g in grads.values()]).norm() == pytest.approx(0.01, rel=1e-3)
    elif mode == "value":
        assert all(float(g.max()) == pytest.approx(0.01) for g in grads.values())
    else:  # the classifier is left alone
        assert grads["head.weight"].max() == 3.0 and grads["blocks.0.mlp.fc1.weight"].max() < 3.0


def test_the_average_is_evaluated_and_is_the_result_and_training_goes_on_from_the_weights(tmp_path):
    training = tiny.training(tiny.config(tmp_path, model_ema=True, model_ema_decay=0.9, model_ema_warmup=False))
    seen = []
    training.evaluate = lambda: seen.append(weights(training)) or {}
    fit(training, resume=False, words="test")
    average = torch.cat([p.detach().flatten() for p in training.ema.module.parameters()])
    assert torch.equal(seen[-1], average) and not torch.equal(weights(training), average)
    settle(training, best=False)
    assert torch.equal(weights(training), average)


def test_channels_last_changes_the_layout_and_not_the_result(tmp_path):
    runs = [tiny.training(tiny.config(tmp_path / str(on), opt="sgd", channels_last=on)) for on in (False, True)]
    assert runs[1].objective.supernet.backbone.patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)
    image = next(iter(runs[1].train_loader))
    assert runs[1].place(image)[0].is_contiguous(memory_format=torch.channels_last)
    for run in runs:
        fit(run, resume=False, words="test")
    torch.testing.assert_close(weights(runs[0]), weights(runs[1]), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_forwards_give_the_eager_loss(tmp_path):
    runs = [tiny.training(tiny.config(tmp_path / str(on), opt="sgd", epochs=1, compile=on)) for on in (False, True)]
    for run in runs:
        fit(run, resume=False, words="test")
    assert runs[0].rows[-1]["loss"] == pytest.approx(runs[1].rows[-1]["loss"], rel=1e-4)


def scripted(training, scores):
    """Let the held-out accuracy of epoch e be scores[e]."""
    training.evaluate = lambda: {"held_out_subnet_top1": scores[len(training.rows)]}
    return training


def test_the_best_and_the_last_epochs_are_kept(tmp_path):
    scores = [10.0, 30.0, 30.0, 20.0]
    training = scripted(tiny.training(tiny.config(tmp_path, epochs=4, keep=2)), scores)
    fit(training, resume=False, words="test")
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 2  # the first of equals
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 4
    assert sorted(p.name for p in tmp_path.glob("epoch-*")) == ["epoch-0003.pt", "epoch-0004.pt"]
    last = weights(training)
    settle(training, best=True)
    best = load_checkpoint(tmp_path / BEST)["objective"]["supernet.backbone.head.weight"]
    assert torch.equal(training.objective.supernet.backbone.head.weight, best)
    assert not torch.equal(weights(training), last)


def test_a_kill_right_after_the_checkpoint_loses_no_best(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(training):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(nas.training.state, "keep_copies", killed)
        with pytest.raises(Killed):
            fit(scripted(tiny.training(tiny.config(tmp_path)), [30.0]), resume=False, words="test")
    fit(scripted(tiny.training(tiny.config(tmp_path)), [30.0, 10.0]), resume=True, words="test")
    assert load_checkpoint(tmp_path / BEST)["epoch"] == 1
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 2


def test_a_loss_that_is_not_finite_names_its_term_and_keeps_the_checkpoint(tmp_path):
    fit(tiny.training(tiny.config(tmp_path)), resume=False, words="test")
    before = (tmp_path / CHECKPOINT).read_bytes()
    again = tiny.training(tiny.config(tmp_path, epochs=3))
    forward = again.objective.forward

    def broken(images, target, step: Step):
        terms = forward(images, target, step)
        return terms | {"kl": terms["kl"] * float("nan")} if step.number >= 9 else terms

    again.objective.forward = broken
    with pytest.raises(UserError, match="the kl term of the loss is nan at step 10 of 12"):
        fit(again, resume=True, words="test")
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert load_checkpoint(tmp_path / CHECKPOINT)["epoch"] == 2


def test_tensorboard_gets_the_columns_of_the_log_and_its_absence_is_said_before_training(tmp_path, monkeypatch):
    points = []

    class Writer:
        def __init__(self, folder, purge_step):
            self.first = (folder, purge_step)

        def add_scalar(self, name, value, epoch):
            points.append((name, value, epoch))

        def flush(self):
            points.append(self.first)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    training = tiny.training(tiny.config(tmp_path, tensorboard=True))
    fit(training, resume=False, words="test")
    assert ("loss", training.rows[1]["loss"], 2) in points and (str(tmp_path / "tensorboard"), 1) in points
    assert (tmp_path / "log.csv").is_file()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        tiny.config(tmp_path, tensorboard=True).check()


def test_too_many_unreadable_images_stop_the_run_and_few_are_counted(tmp_path, capsys):
    options = tiny.config(tmp_path, batch_size=8)
    net = tiny.supernet()
    loaders = tiny.loaders(options, net, n=200)  # one in a hundred may be unreadable
    source = loaders.train._loader.dataset.images.source
    broken = {3, 50}

    def read(i, inner=source.read):
        if i in broken:
            raise OSError("truncated")
        return inner(i)

    object.__setattr__(source, "read", read)
    training = make_training(options, tiny.Adjoined(net, tiny.half(net)), tiny.prepared(options, net, loaders=loaders))
    fit(training, resume=False, words="test")
    capsys.readouterr()
    assert nas.data.loaders.report_unreadable(loaders) == 2
    assert "2 images could not be read and were left out: image" in capsys.readouterr().out
    before = (tmp_path / CHECKPOINT).read_bytes()
    broken |= {7}
    longer = tiny.config(tmp_path, epochs=3)
    training = make_training(longer, tiny.Adjoined(net, tiny.half(net)), tiny.prepared(longer, net, loaders=loaders))
    with pytest.raises(UserError, match="3 of 200 images cannot be read"):
        fit(training, resume=True, words="test")
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_longer_run_goes_on_by_its_own_schedule(tmp_path: Path) -> None:
    options = dict(sched="cosine", warmup_epochs=1, min_lr=1e-4)
    fit(tiny.training(tiny.config(tmp_path / "run", epochs=3, **options)), resume=False, words="test")
    longer = tiny.training(tiny.config(tmp_path / "run", epochs=6, **options))
    fit(longer, resume=True, words="test")
    whole = tiny.training(tiny.config(tmp_path / "whole", epochs=6, **options))
    fit(whole, resume=False, words="test")
    assert [row["epoch"] for row in longer.rows] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in longer.rows[3:]] == [row["lr"] for row in whole.rows[3:]]
    assert longer.rows[2]["lr"] != whole.rows[2]["lr"]
