"""KCR in search and retrain (section 2.3): masks by score, one MLP pass, the kernel term, both forms of selection.

What holds for joint as well is tested here over both (and both widths); what is joint's own in test_joint.py.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from timm.models.deit import VisionTransformerDistilled
from torch.utils.flop_counter import FlopCounterMode

from nas.config import RetrainConfig, SearchConfig, with_defaults
from nas.objectives.adjoined import Adjoined
from nas.objectives.kernel import KernelAdjoined, KernelTerm
from nas.objectives.spectrum import kernel_complexity, spectrum
from nas.searchers.channels import top_gate
from nas.stages.asked import resolve
from nas.training.loop import fit
from nas.training.losses import cross_entropy
from nas.training.objective import Objective, Step
from search_spaces.channels import channel_count
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import METHODS, get_space
from search_spaces.slices import BlockShape, NetworkSlice
from search_spaces.space import make_space
from supernets.basis import rewrite
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.nas.kernels import (
    Linears,
    batches,
    gradients,
    mixture_logits,
    search_of,
    some_picks,
    subnet_of,
    tiny_vit,
    training_of,
)
from tests.oracle import randomise
from tests.strategies import (
    BACKBONES,
    expected_logits,
    images,
    random_basis,
)

over_families = pytest.mark.parametrize("family", BACKBONES)
over_methods = pytest.mark.parametrize(
    ("method", "width"), [("kcr", "stream"), ("joint", "stream"), ("joint", "inner")]
)
over_bases = pytest.mark.parametrize("basis", ["own", "rotated"])
few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
HALF = Step(t=0.5, number=7, total=14)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


@over_families
@over_methods
@over_bases
@given(data=st.data())
@few
def test_5_one_hot_mixture_is_the_subnet(family: str, method: str, width: str, basis: str, data: st.DataObject) -> None:
    timm = data.draw(BACKBONES[family]()).double()
    backbone, seed = copy.deepcopy(timm), data.draw(st.integers(0, 99))
    objective = search_of(backbone, method, width, seed=seed).double()
    if basis == "rotated":
        rewrite(objective.supernet, random_basis(objective.supernet, seed))
    picks = data.draw(some_picks(objective.costs.space))
    subnet = subnet_of(objective, picks, full_stage_width=False)
    x = images(backbone)
    mixture, small = mixture_logits(objective, x, picks), objective.supernet.small(x, subnet)
    assert relative(small, mixture) < 1e-9
    assert relative(expected_logits(timm, objective.supernet, subnet, x), mixture) < 1e-9
    expected = gradients(backbone, small)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, grad in gradients(backbone, mixture).items():
        assert float((grad - expected[name]).abs().max()) <= 1e-9 * scale, name


@over_families
@over_methods
@given(data=st.data())
@few
def test_2_and_3_compact_is_the_subnet_and_costs_what_was_counted(
    family: str, method: str, width: str, data: st.DataObject
) -> None:
    backbone = data.draw(BACKBONES[family]())
    objective = search_of(copy.deepcopy(backbone), method, width)
    subnet = subnet_of(objective, data.draw(some_picks(objective.costs.space)), full_stage_width=False)
    supernet = objective.supernet.eval()
    compact = cut(supernet.backbone, subnet).eval()
    x = images(backbone)
    assert relative(supernet.small(x, subnet), compact(x)) <= 1e-5
    assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compact.to("meta").requires_grad_(False)(x[:1].to("meta"))
    assert counter.get_total_flops() == 2 * supernet.flops(subnet)


@pytest.mark.parametrize(
    ("stream", "counts"),
    [(768, (768, 576, 384, 192)), (72, (72, 56, 40, 16)), (48, (48, 40, 24, 16)), (12, (12, 8)), (6, (6,))],
)
def test_counts_are_multiples_of_eight_and_at_least_eight(stream: int, counts: tuple[int, ...]) -> None:
    shape = BlockShape(0, stream, 2, stream // 2, stream)
    assert METHODS["kcr"].choices(shape, Settings())[0] == {"channels": counts}
    assert channel_count(stream, 1.0) == stream


def test_top_gate_is_hard_and_its_gradient_is_the_sigmoids() -> None:
    scores = torch.tensor([0.3, 2.0, -1.0, 0.3, 0.9], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64, requires_grad=True)
    gate = top_gate(scores, g, [4, 2, 1])
    assert torch.equal(gate, torch.tensor([0.2, 1.0, 0.0, 0.2, 0.7], dtype=torch.float64))
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5, 4.0], dtype=torch.float64)
    to_scores, to_g = torch.autograd.grad((gate * upstream).sum(), (scores, g))
    s = torch.sigmoid(scores.detach())
    assert torch.allclose(to_scores, upstream * s * (1 - s))
    assert torch.allclose(to_g, torch.tensor([1 - 2 + 0.5 + 4, -2 + 4, -2.0], dtype=torch.float64))


def test_kept_channels_are_those_of_highest_score() -> None:
    objective = search_of(tiny_vit(), "kcr")
    kept = objective.kept_indices([{"channels": 16}, {"channels": 40}])
    for scores, entry, count in zip(objective.scores, kept, (16, 40), strict=True):
        best = sorted(range(48), key=lambda j: -scores[j].item())[:count]
        assert entry == {"kept_channels": sorted(best)}


@pytest.mark.parametrize("fractions", [(1.0, 0.5), (1.0, 0.75, 0.5, 0.25)])
def test_one_mlp_pass_whatever_the_number_of_counts(fractions: tuple[float, ...]) -> None:
    objective = search_of(tiny_vit(depth=3), "kcr", fractions=fractions)
    draw = objective.draw(HALF)
    with Linears() as linears:
        objective.supernet.small(torch.randn(1, 3, 32, 32), objective.mixtures(draw))
    assert linears.outputs.count(72) == 3  # fc1 of three blocks
    assert len(linears.outputs) == 3 * 4 + 1  # qkv, proj, fc1, fc2, and the classifier


def test_scores_and_logits_learn_from_one_step() -> None:
    objective = search_of(tiny_vit(), "kcr").train()
    x, y = batches(1)[0]
    torch.stack(list(objective(x, y, HALF).values())).sum().backward()
    for p in objective.architecture_parameters():
        assert p.grad is not None and float(p.grad.abs().min()) > 0


def test_kernel_term_is_the_tail_outside_the_last_epochs_eigenvectors() -> None:
    supernet = Supernet(tiny_vit())
    subnet = subnet_of(search_of(supernet.backbone, "kcr"), [{"channels": 24}] * 2, full_stage_width=False)
    objective = KernelAdjoined(supernet, subnet, kernel=KernelTerm(0.5, 0.25), adjoined=True)
    epoch = batches(8)
    with torch.no_grad():
        features = torch.cat([supernet.small_with_features(x, subnet)[1] for x, _ in epoch]).double()
    for i, (x, y) in enumerate(epoch):
        terms = objective(x, y, Step(0.5, i, 16))
        assert float(terms["tnn"]) == 0.0  # no V yet
        objective(-x, y, Step(0.5, i, 16, counted=False))  # the logits' held-out batch is no training image
    objective.after_epoch()
    eigenvalues, vectors = torch.linalg.eigh(features.T @ features / len(features))
    r = math.ceil(0.25 * 48)
    log = objective.log(HALF)
    assert log["tnn"] == pytest.approx(float(eigenvalues[: 48 - r].sum()), rel=1e-6)
    assert log["trace"] == pytest.approx(float(eigenvalues.sum()), rel=1e-6)
    assert log["kc"] == pytest.approx(kernel_complexity(spectrum(features), len(features)), rel=1e-6)
    x, y = epoch[3]
    f, V = features[3 * 6 : 4 * 6], vectors[:, 48 - r :]
    term = objective(x, y, Step(0.5, 8, 16))["tnn"]
    assert term.item() == pytest.approx(0.5 * float((f.square().sum(1) - (f @ V).square().sum(1)).mean()), rel=1e-4)
    term.backward()
    fc1 = supernet.backbone.get_parameter("blocks.0.mlp.fc1.weight").grad
    outside = sorted(set(range(48)) - set(subnet.blocks[0].mlp_stream))  # type: ignore[arg-type]
    assert fc1 is not None and float(fc1.abs().sum()) > 0 and float(fc1[:, outside].abs().sum()) == 0


@pytest.mark.parametrize("kind", ["search", "retrain"])
@pytest.mark.parametrize("k", [2, 4])
def test_accumulated_batches_have_the_kernel_complexity_of_one(kind: str, k: int, tmp_path: Path) -> None:
    """k batches of n/k images a step give KC, TNN and weights of one batch of n."""
    logs, weights = {}, {}
    small = batches(8, size=4)  # the same 32 images an epoch, two steps of 16 or 4 of 8
    for accumulated in (1, k):
        groups = [small[i : i + k // accumulated] for i in range(0, 8, k // accumulated)]
        loader = type(small)(tuple(map(torch.cat, zip(*group, strict=True))) for group in groups)
        objective: Objective = search_of(tiny_vit(), "kcr", eta_kc=0.5)
        if kind == "retrain":
            subnet = subnet_of(objective, [{"channels": 24}] * 2, full_stage_width=False)  # type: ignore[arg-type]
            objective = KernelAdjoined(objective.supernet, subnet, kernel=KernelTerm(0.5, 0.3), adjoined=True)
        training = training_of(objective, tmp_path / f"{accumulated}", dict)
        training.folder.mkdir()
        training.train_loader, training.accum_steps = loader, accumulated
        training.optimizer = torch.optim.SGD(objective.supernet.backbone.parameters(), lr=1e-2)
        fit(training, False, "test")
        logs[accumulated] = training.rows
        weights[accumulated] = torch.cat([p.detach().flatten() for p in objective.supernet.backbone.parameters()])
    for one, several in zip(logs[1], logs[k], strict=True):
        for name in ("kc", "kc_normalised", "tnn", "trace", "loss_tnn", "loss"):
            assert several[name] == pytest.approx(one[name], rel=1e-4), name
    assert logs[1][-1]["loss_tnn"] > 0
    torch.testing.assert_close(weights[1], weights[k], rtol=1e-3, atol=1e-5)


def test_a_trial_of_learning_rates_is_counted_in_no_epoch() -> None:
    supernet = Supernet(tiny_vit())
    subnet = subnet_of(search_of(supernet.backbone, "kcr"), [{"channels": 24}] * 2, full_stage_width=False)
    objective = KernelAdjoined(supernet, subnet, kernel=KernelTerm(0.5, 0.25), adjoined=True)
    (x, y), *_ = batches(1)
    objective(x, y, Step(1.0, -1, 1, counted=False))
    assert int(objective.process_state()["n"]) == 0
    objective(x, y, Step(0.0, 0, 1))
    assert int(objective.process_state()["n"]) == len(x)


def test_kernel_term_takes_the_features_of_both_classifiers() -> None:
    options: dict[str, Any] = dict(img_size=32, patch_size=16, num_classes=5, embed_dim=48, depth=2, num_heads=4)
    objective = search_of(randomise(VisionTransformerDistilled(**options), 0), "kcr", eta_kc=2.0)
    for number, (x, y) in enumerate(batches(3)):
        if number == 2:
            objective.after_epoch()
        terms = objective(x, y, Step(0.5, number, 3))
    assert terms["tnn"].item() > 0
    assert objective.kernel.kernel is not None and len(objective.kernel.kernel.eigenvalues) == 12  # n < D = 2 * 48


@pytest.mark.parametrize("fractions", [(1.0, 0.5), None])
def test_without_the_large_network(fractions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = search_of(tiny_vit(), "kcr", fractions=fractions, flops_weight=0.2)
    x, y = batches(1)[0]
    with torch.no_grad():
        q = objective.supernet.small(x, objective.mixtures(objective.draw(HALF)))
    monkeypatch.setattr(Supernet, "large", lambda *_: pytest.fail("the large network was run"))
    terms = objective(x, y, HALF)
    assert set(terms) == {"ce", "penalty", "tnn"}
    assert float(terms["ce"]) == pytest.approx(float(cross_entropy(q, y)))
    assert float(terms["penalty"]) == pytest.approx(0.2 * float(objective.expected_fraction()))


def bernoulli(**options: Any) -> Any:
    return search_of(tiny_vit(depth=3), "kcr", fractions=None, **options)


def test_bernoulli_gates_are_hard_follow_the_scores_and_repeat() -> None:
    objective = bernoulli()
    with torch.no_grad():
        objective.scores[0].fill_(2.0)
    gates = torch.stack([objective.draw(Step(0.5, n, 999))[0]["channels"] for n in range(400)]).detach()
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    assert float(gates.mean()) == pytest.approx(1 / (1 + math.exp(-2.0)), abs=0.01)  # P(keep) = sigma(a), any tau
    again = objective.draw(Step(0.5, 3, 999))[0]["channels"]
    assert torch.equal(gates[3], again)


def test_bernoulli_flops_are_those_of_the_gates() -> None:
    objective = bernoulli()
    with torch.no_grad():
        for scores in objective.scores:
            scores.copy_(torch.where(scores > 0, 60.0, -60.0))
    counts = [int((scores > 0).sum()) for scores in objective.scores]
    space, supernet = objective.costs.space, objective.supernet
    slices = space.block_slices([{"channels": c} for c in counts])
    subnet = subnet_of(objective, [{"channels": c} for c in counts], True)
    assert [s.num_mlp_stream() for s in slices] == counts
    assert float(objective.expected_fraction()) * supernet.flops() == pytest.approx(supernet.flops(subnet))
    drawn = objective.drawn_cost(objective.draw(HALF))
    constant = objective.costs.network.flops.at(subnet.stage_widths)
    assert float(drawn) == supernet.flops(subnet) - constant
    drawn.backward()
    assert all(scores.grad is not None for scores in objective.scores)


@given(seed=st.integers(0, 999), budget=st.floats(0.82, 1.0), shift=st.floats(-1, 2))
@settings(few, max_examples=25)
def test_bernoulli_counts_are_rounded_and_trimmed_to_the_budget(seed: int, budget: float, shift: float) -> None:
    objective = bernoulli(seed=seed)
    with torch.no_grad():
        for scores in objective.scores:
            scores.add_(shift)
    free, none = objective.selection()
    assert none is None
    for pick, scores in zip(free, objective.scores, strict=True):
        positive = int((scores > 0).sum())
        assert pick["channels"] % 8 == 0 and abs(pick["channels"] - min(max(positive, 8), 48)) <= 4
    objective.budget = budget
    picks, chosen = objective.selection()
    full = objective.supernet.flops()
    subnet = subnet_of(objective, picks, False)
    assert objective.supernet.flops(subnet) == chosen.cost <= budget * full
    assert objective.current_subnet() == subnet
    removed, next_to_leave = [], []
    for i, (before, now) in enumerate(zip(free, picks, strict=True)):
        ordered = sorted(objective.scores[i].tolist(), reverse=True)
        removed += [(sum(ordered[c - 8 : c]) / 8, i) for c in range(before["channels"], now["channels"], -8)]
        if now["channels"] > 8:
            next_to_leave.append(sum(ordered[now["channels"] - 8 : now["channels"]]) / 8)
    if removed:
        last, block = max(removed)
        assert not next_to_leave or last <= min(next_to_leave)
        back = [dict(p, channels=p["channels"] + 8 * (i == block)) for i, p in enumerate(picks)]
        assert objective.supernet.flops(subnet_of(objective, back, False)) > budget * full


def searches() -> dict[str, Callable[[], Objective]]:
    def retrain() -> Adjoined:
        supernet = Supernet(tiny_vit())
        subnet = subnet_of(search_of(supernet.backbone, "joint"), [{"alpha": 2, "fraction": 0.5}] * 2, False)
        return KernelAdjoined(supernet, subnet, kernel=KernelTerm(0.1, 0.2), adjoined=True)

    return {
        "kcr": lambda: search_of(tiny_vit(), "kcr", budget=0.9),
        "joint": lambda: search_of(tiny_vit(), "joint", budget=0.5),
        "bernoulli": lambda: search_of(tiny_vit(), "kcr", fractions=None, budget=0.9),
        "retrain": retrain,
    }


def subnet_now(objective: Objective) -> NetworkSlice:
    return objective.members.widest if isinstance(objective, Adjoined) else objective.current_subnet()


@pytest.mark.parametrize("kind", searches())
def test_7_killed_and_resumed_is_the_run_that_was_not(kind: str, tmp_path: Path) -> None:
    make = searches()[kind]

    def run(folder: Path, kill_at: int | None, resume: bool) -> Any:
        training = training_of(make(), folder, lambda: {})
        epochs = iter(range(1 if resume else 0, 9))

        def evaluate() -> dict[str, float]:
            if next(epochs) == kill_at:
                raise KeyboardInterrupt
            return {}

        training.evaluate = evaluate
        try:
            fit(training, resume, "test")
        except KeyboardInterrupt:
            assert kill_at is not None
        return training

    whole = run(tmp_path / "whole", None, False)
    run(tmp_path / "killed", 1, False)
    resumed = run(tmp_path / "killed", None, True)
    states = [t.objective.state_dict() for t in (whole, resumed)]
    assert states[0].keys() == states[1].keys() and any("kernel" in name for name in states[0])
    flat = [dict(s) | {f"kernel.{k}": v for k, v in s.pop("kernel._extra_state").items()} for s in states]
    assert "kernel.previous_basis" in flat[0]
    for name, value in flat[0].items():
        if name != "kernel._extra_state":
            assert torch.equal(value, flat[1][name]), name
    timings = {"images_per_s", "peak_memory_mb", "seconds"}
    rows = [[{k: v for k, v in row.items() if k not in timings} for row in t.rows] for t in (whole, resumed)]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert rows[0][0]["loss_tnn"] == 0 < rows[0][1]["loss_tnn"]
    assert whole.choice_rows == resumed.choice_rows
    assert subnet_now(whole.objective) == subnet_now(resumed.objective)


def test_published_defaults() -> None:
    space = get_space("vit-kcr")
    config = with_defaults(RetrainConfig(space="vit-kcr"), space, "retrain")
    assert (config.epochs, config.opt, config.weight_decay, config.batch_size) == (300, "adamw", 0.01, 64)
    assert (config.lr, config.min_lr, config.warmup_lr, config.sched) == (1e-4, 1e-5, 1e-4, "cosine")
    assert (config.model_ema, config.model_ema_decay, config.amp) == (True, 0.9995, True)
    assert (config.aa, config.reprob, config.remode, config.smoothing) == ("rand-m9-mstd0.5", 0.2, "pixel", 0.1)
    assert with_defaults(SearchConfig(space="swin-dan", amp=False), get_space("swin-dan"), "search").rho is None


@pytest.mark.parametrize(
    ("space", "options", "words"),
    [
        ("swin-dan", {"eta_kc": 0.1}, "--eta-kc goes with"),
        ("swin-dan", {"adjoined": False}, "--no-adjoined goes with"),
        ("swin-dan", {"fractions": (0.5,)}, "--fractions goes with"),
        ("swin-dan", {"selection": "bernoulli"}, "--selection bernoulli goes with"),
        ("swin-joint", {"selection": "bernoulli"}, "--selection bernoulli goes with"),
        ("swin-kcr", {"selection": "bernoulli", "fractions": (0.5,)}, "has none"),
        ("swin-kcr", {"flops_weight": 0.1}, "goes with --no-adjoined"),
        ("swin-kcr", {"alphas": (1, 2)}, "no compression factor"),
        ("swin-kcr", {"width": "inner"}, "keeps the whole stream"),
        ("swin-kcr", {"rho": 1.5}, "from 0 to 1"),
    ],
)
def test_options_that_no_run_can_use_are_refused(space: str, options: dict[str, Any], words: str) -> None:
    config = SearchConfig(space=space, **options)
    with pytest.raises(UserError, match=words):
        resolve(config)


def test_kept_channels_that_do_not_fit_are_refused() -> None:
    space = make_space("vit-kcr", METHODS["kcr"], Settings(), [BlockShape(0, 48, 4, 12, 96)])
    for indices, words in (
        (range(23), "holds 23 indices, the choice is 24"),
        ([*range(23), 48], "from 0 to 47"),
        ([*range(22), 30, 29], "must rise"),
    ):
        with pytest.raises(UserError, match=words):
            space.block_slices([{"channels": 24}], [{"kept_channels": list(indices)}])


def test_only_joints_factors_wait_for_lambda() -> None:
    step = Step(0.25, 1, 4)
    for method, options, pace in (("kcr", {}, 1.0), ("joint", {}, 0.25), ("joint", {"flops_weight": 0.2}, 1.0)):
        assert search_of(tiny_vit(), method, **options).pace(step) == pace
