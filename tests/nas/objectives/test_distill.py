"""The large network alone, and the small one under a frozen teacher."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from nas.networks.backbone import Start
from nas.objectives.distill import Distilled, soft_distillation
from nas.objectives.plain import Plain
from nas.objectives.table import kind_of
from nas.objectives.teacher import Teacher, make_teacher
from nas.stages.goal import resolve
from nas.training.loop import fit
from nas.training.objective import Step
from search_spaces.errors import UserError
from tests.nas import tiny

STEP = Step(0.5, 4, 8)
STATS = torch.tensor([0.1, 0.3, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.4, 0.7]).view(3, 1, 1)


def batch(n=6):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n) % 4


def teacher(net, scale=1.0, shift=0.0):
    ones = torch.ones(3, 1, 1)
    return Teacher("t", net.backbone.eval().requires_grad_(False), 1, 1, scale * ones, shift * ones)


def test_plain_is_cross_entropy_of_the_large_network_and_evaluates_nothing_else():
    net = tiny.supernet().eval()
    images, target = batch()
    objective = Plain(net, smoothing=0.1)
    terms = objective(images, target, STEP)
    expected = F.cross_entropy(net.backbone(images), target, label_smoothing=0.1)
    assert terms.keys() == {"ce"} and torch.allclose(terms["ce"], expected)
    assert list(objective.networks()) == ["large"]


@pytest.mark.parametrize("hard", [False, True])
def test_distillation_trains_the_small_network_alone_towards_the_teacher(hard):
    net, expert = tiny.supernet().eval(), tiny.supernet(seed=5).eval()
    subnet = tiny.half(net)
    objective = Distilled(net, subnet, teacher(expert), hard=hard, weight=0.3, temperature=2.0)
    images, target = batch()
    terms = objective(images, target, STEP)
    with torch.no_grad():
        q, t = net.small(images, subnet), expert.backbone(images)
    assert torch.allclose(terms["ce"], 0.7 * F.cross_entropy(q, target))
    if hard:
        expected = F.cross_entropy(q, t.argmax(1))
    else:
        expected = 4 * F.kl_div((q / 2).log_softmax(1), (t / 2).softmax(1), reduction="batchmean")
    assert terms["distill"].item() == pytest.approx(0.3 * expected.item(), rel=1e-3)
    torch.stack(list(terms.values())).sum().backward()
    hidden = net.backbone.blocks[0].mlp.fc1.weight.grad
    assert hidden[:32, :8].abs().max() > 0 and hidden[32:].abs().max() == 0  # alpha 2 keeps half of both
    assert all(p.grad is None for p in expert.parameters())
    assert not any("teacher" in name for name in objective.state_dict())
    assert list(objective.networks()) == ["teacher", "subnet"]


def test_distillation_from_itself_is_no_distance_and_the_teacher_keeps_its_own_normalisation():
    net = tiny.supernet().eval()
    images, _ = batch()
    logits = net.backbone(images)
    assert soft_distillation(logits, logits, 3.0).item() == pytest.approx(0.0, abs=1e-6)
    assert torch.allclose(teacher(net, 2.0, 0.5)(images), net.backbone(images * 2 + 0.5))


def options(folder, **more):
    return tiny.config(folder, **dict(train="distill", space="vit-an-nano", alpha=2) | more)


def made(folder, base, origin, fresh=False, net=None, **more):
    config = options(folder, **more)
    loaders = SimpleNamespace(stats=lambda: STATS)
    net = net or tiny.supernet()
    return make_teacher(config, tiny.prepared(config, net, loaders=loaders, start=origin, fresh_classifier=fresh), base)


def test_the_default_teacher_is_the_original_network(tmp_path):
    net, trained = tiny.supernet(), tiny.supernet(seed=9)
    path = tmp_path / "base.safetensors"
    save_file(trained.backbone.state_dict(), path)
    base = Start(checkpoint=path)
    images, _ = batch()
    # started from the base: a copy of what it starts from, which training does not move
    copy = made(tmp_path, base, base, net=net)
    expected = net.backbone.eval()(images)
    with torch.no_grad():
        net.backbone.head.weight.zero_()
    assert torch.equal(copy(images), expected)
    # started where a search arrived: still the base
    arrived = Start(checkpoint=tmp_path / "supernet.safetensors")
    assert torch.allclose(made(tmp_path, base, arrived)(images), trained.backbone.eval()(images))
    assert copy.flops == net.flops() and copy.params == net.params()
    # a search from scratch has no original weights: its large network
    assert torch.equal(made(tmp_path, Start(), arrived, net=trained)(images), trained.backbone(images))


def test_a_named_teacher_sees_the_pixels_as_timm_normalises_them_for_it(tmp_path):
    expert = tiny.supernet(seed=9).backbone.eval()
    path = tmp_path / "expert.safetensors"
    save_file(expert.state_dict(), path)
    kwargs = tuple(f"{name}={value}" for name, value in tiny.VIT[1].items())
    named = dict(teacher=tiny.VIT[0], teacher_kwargs=kwargs, teacher_checkpoint=path)
    pixels, (mean, std) = torch.rand(2, 3, 16, 16), STATS
    own_mean, own_std = (torch.tensor(expert.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = expert((pixels - own_mean) / own_std)
    assert torch.allclose(made(tmp_path, Start(), Start(), **named)((pixels - mean) / std), expected, atol=1e-5)


def test_teachers_that_teach_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="the original network is untrained; give --teacher-checkpoint"):
        made(tmp_path, Start(), Start())
    given = Start(checkpoint=tmp_path / "w")
    with pytest.raises(UserError, match="was not trained for the dataset's 4 classes"):
        made(tmp_path, given, given, fresh=True)
    wide = tiny.supernet(img_size=32)
    path = tmp_path / "wide.safetensors"
    save_file(wide.backbone.state_dict(), path)
    kwargs = ("img_size=32", "patch_size=8", "embed_dim=16", "depth=2", "num_heads=2")
    more = dict(teacher=tiny.VIT[0], teacher_kwargs=kwargs, teacher_checkpoint=path)
    with pytest.raises(UserError, match="cannot read images of 16 x 16 px"):
        made(tmp_path, Start(), Start(), **more)
    for flags, words in (
        (
            dict(train="adjoined", teacher="vit_tiny_patch16_224"),
            "--teacher goes with --train distill or --adjoined-teacher frozen",
        ),
        (dict(distill_weight=0.0), "--distill-weight 0.0"),
        (dict(distill_temperature=0.0), "--distill-temperature 0.0"),
        (dict(teacher_kwargs=("depth=2",)), "name the model too"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(options(tmp_path, **flags))


@pytest.mark.parametrize("train", ["plain", "distill"])
def test_a_run_trains_and_logs_only_its_own_networks(tmp_path, train):
    net = tiny.supernet()
    config = tiny.config(tmp_path, train=train)
    subnet = tiny.half(net)
    objective = kind_of(train).make(config, net, subnet, None if train == "plain" else teacher(tiny.supernet(seed=5)))
    training = tiny.training(config, objective)
    before = training.objective.supernet.backbone.head.weight.clone()
    fit(training, resume=False, words="test")
    assert not torch.equal(before, net.backbone.head.weight)
    columns = {name for name in training.rows[-1] if name.endswith("_top1")}
    assert columns == {"held_out_large_top1" if train == "plain" else "held_out_subnet_top1"}


def test_plain_needs_no_alpha_and_takes_none(tmp_path):
    config, space, arch = resolve(tiny.config(tmp_path, train="plain", space="swin-dan-nano", dataset="digits"))
    assert space.family == "swin" and arch is None and config.alpha is None
    with pytest.raises(UserError, match="trains the large network alone; leave it out"):
        resolve(tiny.config(tmp_path, train="plain", space="swin-an-nano", alpha=2))
