"""--recipe published sets exactly what the authors ran, says so, and refuses a flag that contradicts it."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.cli import parse
from nas.config import Common, RetrainConfig, SearchConfig
from nas.machine.ranges import as_given
from nas.methods.recipe import departures, published, recipe_lines, with_recipe
from nas.objectives.distill import distilled_terms, per_class
from nas.runs.folder import saved_config
from nas.searchers.gradient import Gradient
from nas.searchers.primal_dual import AveragedSGD, Rates, Rules
from nas.searchers.supernet_search import Mixing
from nas.spaces import list_spaces, settings_of
from nas.stages.goal import resolve as resolve_retrain
from nas.stages.search import resolve, run_search
from nas.sweeps.options import SweepConfig
from nas.sweeps.trials import make_trials
from nas.training.losses import cross_entropy, kl_divergence
from nas.training.objective import Step
from search_spaces.defaults import SCALE
from search_spaces.errors import UserError
from search_spaces.registry import SPACES, get_space
from tests.nas.kernels import batches, search_of, tiny_vit
from tests.nas.methods.test_uvc import search_of as minimax_of
from tests.nas.small import small_costs, small_supernet
from tests.strategies import images

AUGMENTED = dict(
    aa="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.25, remode="pixel", hflip=0.5,
    scale=(0.08, 1.0),
)  # fmt: skip
THESIS = dict(AUGMENTED, opt="adamw", pretrained=True, sched="none", warmup_epochs=0, weight_decay=0.05, drop_path=0.1)
SWIN, T2T = dict(lr=1e-5, batch_size=64), dict(lr=1e-3, batch_size=128)
DAN = dict(
    searcher="gradient", start="uniform", epochs=100, gamma=1e-12, budget=0.0, stage_gates=False, arch_pace="constant",
    tau=(1.0,), basis="none",
)  # fmt: skip
ADJOINED = dict(
    epochs=50, train="adjoined", result="last", kl_schedule="thesis", small_ce=0.0, adjoined_teacher="current",
    basis="none",
)  # fmt: skip
KCR = dict(
    opt="adamw", pretrained=True, lr=1e-4, min_lr=1e-5, warmup_lr=1e-4, warmup_epochs=5, sched="cosine",
    weight_decay=0.01, batch_size=64, aa="rand-m9-mstd0.5", reprob=0.2, remode="pixel", mixup=0.0, cutmix=0.0,
    smoothing=0.1, hflip=0.5, scale=(0.08, 1.0), drop_path=0.0, amp=True, adjoined=False,
)  # fmt: skip
UVC = dict(
    opt="adamw", pretrained=True, sched="cosine", warmup_epochs=5, weight_decay=0.05, batch_size=256, clip_grad=1.0,
    clip_mode="norm", drop_path=0.0, aa="none", color_jitter=0.0, hflip=0.5, scale=(0.08, 1.0), reprob=0.0, mixup=0.8,
    cutmix=1.0, mixup_prob=0.8, mixup_switch_prob=0.5, smoothing=0.1, distill="soft", distill_weight=0.1,
    distill_temperature=1.0, distill_reduction="mean",
)  # fmt: skip
TABLES: dict[tuple[str, str], dict[str, Any]] = {
    ("swin-an", "search"): THESIS | SWIN | dict(searcher="uniform", basis="none"),
    ("swin-an", "retrain"): THESIS | SWIN | ADJOINED,
    ("swin-dan", "search"): THESIS | SWIN | DAN | dict(alphas=(1, 2, 4, 8)),
    ("swin-dan", "retrain"): THESIS | SWIN | ADJOINED,
    ("t2t-dan", "search"): THESIS | T2T | DAN | dict(alphas=(1, 2, 3)),
    ("t2t-dan", "retrain"): THESIS | T2T | ADJOINED,
    ("vit-kcr", "search"): KCR
    | dict(
        searcher="gradient", basis="none", selection="bernoulli", flops_weight=0.2, mask_warmup=0.3, eta_kc=0.0,
        budget=0.0,
    ),
    ("vit-kcr", "retrain"): KCR
    | dict(
        epochs=300, train="adjoined", result="last", model_ema=True, model_ema_decay=0.9995, model_ema_warmup=False
    ),
    ("deit-uvc", "search"): UVC
    | dict(
        searcher="minimax", basis="none", prune=True, skip="block", epochs=30, lr=1e-4, arch_lr=0.1, budget=0.5,
        gate_average="ramp", gate_flops="drawn", damping=0.0, reference_steps=125_125,
    ),
    ("deit-uvc", "retrain"): UVC
    | dict(epochs=120, train="distill", result="last", lr=5e-5, min_lr=1e-5, warmup_lr=1e-6),
}  # fmt: skip


def asked(stage: str, **options: Any) -> Common:
    return (SearchConfig if stage == "search" else RetrainConfig)(recipe="published", **options)


def refusal(line: str) -> str:
    """What a search says of a command line that it refuses."""
    config = parse(SearchConfig, line.split(), "search.py")
    with pytest.raises(UserError) as error:
        resolve(config)
    return str(error.value)


@pytest.mark.parametrize(("name", "stage"), TABLES)
def test_the_recipe_sets_exactly_the_table(name: str, stage: Any) -> None:
    space, table = get_space(name), TABLES[name, stage]
    assert published(space, stage) == table
    plain = asked(stage)
    known = {field.name for field in fields(plain)}
    assert table.keys() <= known
    done = with_recipe(plain, space, stage)
    assert {n: getattr(done, n) for n in known if getattr(done, n) != getattr(plain, n)} == {
        n: v for n, v in table.items() if v != getattr(plain, n)
    }
    assert with_recipe(done, space, stage) == done and departures(done, space, stage) == {}


@pytest.mark.parametrize("name", [name for name, space in SPACES.items() if space.published is not None])
@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_what_a_table_sets_can_be_told_from_what_was_not_given(name: str, stage: Any) -> None:
    """Otherwise a flag that says the opposite would be overruled in silence."""
    defaults = {field.name: field.default for field in fields(asked(stage))}
    table = published(get_space(name), stage)
    assert [n for n, v in table.items() if defaults[n] is not None and defaults[n] != v] == []
    if get_space(name).nano:
        assert not table.keys() & set(SCALE)


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("swin-dan", "--stage-gates", "--stage-gates: --recipe published sets --no-stage-gates for swin-dan"),
        ("swin-dan", "--arch-pace lambda", "--arch-pace lambda: --recipe published sets --arch-pace constant"),
        ("swin-dan", "--tau 5 0.1", "--tau 5 0.1: --recipe published sets --tau 1"),
        ("swin-dan", "--gamma 1e-9", "--gamma 1e-09: --recipe published sets --gamma 1e-12"),
        ("swin-dan", "--searcher random", "--searcher random: --recipe published sets --searcher gradient"),
        ("swin-dan", "--augment light", "--augment light: --recipe published sets the augmentation"),
        ("swin-dan", "--no-aug", "--no-aug: --recipe published sets the augmentation"),
        ("vit-kcr", "--adjoined", "--adjoined: --recipe published sets --no-adjoined for vit-kcr"),
        ("vit-kcr", "--selection topk", "--selection topk: --recipe published sets --selection bernoulli"),
        ("vit-kcr-nano", "--eta-kc 0.1", "--eta-kc 0.1: --recipe published sets --eta-kc 0"),
        ("deit-uvc", "--no-prune", "--no-prune: --recipe published sets --prune for deit-uvc"),
        ("deit-uvc", "--mixup-prob 1", "--mixup-prob 1: --recipe published sets --mixup-prob 0.8"),
        ("deit-uvc", "--distill-reduction batchmean", "sets --distill-reduction mean for deit-uvc"),
        ("deit-uvc-nano", "--damping 3", "--damping 3: --recipe published sets --damping 0"),
        ("swin-joint", "", "--recipe published: nothing published uses swin-joint"),
        ("vit-free", "", "--recipe published: nothing published uses vit-free"),
    ],
)
def test_a_flag_that_contradicts_is_refused_by_name(name: str, line: str, says: str) -> None:
    assert says in refusal(f"--space {name} --recipe published {line}")


def test_stage_two_refuses_too() -> None:
    config = parse(
        RetrainConfig, ["--space", "swin-an", "--alpha", "2", "--recipe", "published", "--small-ce", "1"], "retrain.py"
    )
    with pytest.raises(UserError, match="--small-ce 1: --recipe published sets --small-ce 0 for swin-an"):
        resolve_retrain(config)


@pytest.mark.parametrize(
    ("name", "line", "says"),
    [
        ("vit-kcr", "--stage-gates", "--stage-gates: vit-kcr narrows no stage by factors"),
        ("vit-free", "--searcher gradient --budget 0.5 --no-stage-gates", "--no-stage-gates: vit-free narrows no"),
        ("swin-an", "--tau 1", "--tau goes with a search by gradient; swin-an is searched by uniform"),
        ("deit-uvc", "--arch-pace constant", "--arch-pace constant goes with a search by gradient"),
        ("swin-dan", "--gate-average ramp", "--gate-average ramp goes with method uvc"),
        ("swin-dan", "--mask-warmup 0.3", "--mask-warmup goes with methods kcr and joint"),
        ("swin-dan", "--tau 0", "--tau 0; expected one temperature above 0, or two"),
        ("swin-dan", "--tau 5 1 0.1", "--tau 5 1 0.1; expected one temperature"),
        ("vit-kcr", "--mask-warmup 1", "--mask-warmup 1.0; expected a share from 0 to below 1"),
        ("deit-uvc", "--damping -1", "--damping -1.0; expected 0 or more"),
        ("deit-uvc", "--reference-steps 0", "--reference-steps 0; expected at least 1"),
        ("deit-uvc", "--skip none --gate-flops drawn", "--gate-flops is about gates; --skip none has none"),
        ("deit-uvc", "--distill hard --distill-reduction mean", "--distill-reduction mean is of soft distillation"),
    ],
)
def test_switches_where_they_do_nothing_are_refused(name: str, line: str, says: str) -> None:
    assert says in refusal(f"--space {name} {line}")


def test_size_and_length_may_be_ones_own_and_are_said_to_be() -> None:
    config, space = resolve(SearchConfig(space="swin-dan", recipe="published", budget=0.5, epochs=6))
    assert departures(config, space, "search") == {"epochs": 100, "budget": 0.0}
    assert (config.stage_gates, config.gamma, config.lr) == (False, 1e-12, 1e-5)
    lines = recipe_lines(config, space, "search")
    assert "--no-stage-gates" in lines[0] and "--epochs" not in lines[0]
    assert lines[1] == "other than published: --epochs 6 (published: 100), --budget 0.5 (published: 0)"
    config, space = resolve(SearchConfig(space="deit-uvc", recipe="published", gflops=0.5))
    assert departures(config, space, "search") == {"gflops": 0.5}


def test_from_a_checkpoint_augmentation_and_rate_stay_published(tmp_path: Path) -> None:
    config, _ = resolve(SearchConfig(space="swin-dan", recipe="published", checkpoint=tmp_path / "mine.safetensors"))
    assert (config.aa, config.mixup) == ("rand-m9-mstd0.5-inc1", 0.8)  # not light, as the toolkit's own
    options: dict[str, Any] = dict(space="swin-an", alpha=2, checkpoint=tmp_path / "mine.safetensors")
    retrain, _, _ = resolve_retrain(RetrainConfig(recipe="published", **options))
    assert (retrain.lr, retrain.basis, retrain.sched) == (1e-5, "none", "none")
    assert resolve_retrain(RetrainConfig(**options))[0].lr is None  # the toolkit's own tries rates


@pytest.mark.parametrize("name", ["swin-dan-nano", "vit-uvc-nano", "vit-kcr-nano", "vit-free-nano"])
def test_what_is_so_anyway_may_be_said_as_earlier_runs_have_it_in_their_options(name: str, tmp_path: Path) -> None:
    said: dict[str, Any] = dict(adjoined=True, selection="topk", mixup_prob=1.0, model_ema_warmup=True)
    checkpoint = tmp_path / "mine.safetensors"
    config, _ = resolve(SearchConfig(space=name, checkpoint=checkpoint, **said))
    assert not config.alone()
    with pytest.raises(UserError, match="--no-adjoined goes with" if "kcr" not in name else "--flops-weight"):
        resolve(SearchConfig(space=name, adjoined=False, flops_weight=-1.0, checkpoint=checkpoint))


def test_the_toolkits_recipe_is_the_default_and_changes_nothing() -> None:
    for name in ("swin-dan", "vit-kcr-nano", "deit-uvc", "swin-joint"):
        config, space = resolve(SearchConfig(space=name))
        assert config.recipe == "toolkit" and recipe_lines(config, space, "search") == ()
        assert (config.tau, config.arch_pace, config.stage_gates, config.gate_average) == (None,) * 4


@pytest.mark.slow
def test_a_run_records_its_recipe_goes_on_with_it_and_hands_it_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    small: dict[str, Any] = dict(model_kwargs=("depth=2", "embed_dim=24", "num_heads=4"), batch_size=512, epochs=1)
    small |= dict(output=folder, workers=0, seed=1)
    run_search(SearchConfig(space="vit-dan-nano", recipe="published", **small))
    said = capsys.readouterr().out
    assert "--recipe published sets" in said and "--tau 1;" in said and "--recipe published" in said.splitlines()[-1]
    search = json.loads((folder / "arch.json").read_text())["search"]
    assert (search["recipe"], search["stage_gates"], search["arch_pace"]) == ("published", False, "constant")
    assert search["tau"] == [1.0] and search["basis"] == "none"
    saved = saved_config(SearchConfig, folder)
    assert (saved.recipe, saved.tau, saved.gamma) == ("published", (1.0,), 1e-12)
    before = (folder / "arch.json").read_bytes()
    run_search(replace(saved, resume=True))
    assert (folder / "arch.json").read_bytes() == before


def test_a_sweep_takes_it_and_stage_two_follows() -> None:
    line = "--space vit-dan-nano --sweep recipe=toolkit,published --retrain-trials --output x"
    config = parse(SweepConfig, line.split(), "search.py")
    trials = make_trials(config)
    assert [t.resolved().stage_gates for t in trials] == [None, False]
    assert [t.retrain.recipe for t in trials if t.retrain is not None] == ["toolkit", "published"]


def test_tau_pace_and_stage_gates_do_what_they_say() -> None:
    net = small_supernet("vit")
    costs = small_costs(net, "stream", alphas=(1, 2, 3))
    own: dict[str, Any] = dict(budget=None, gamma=0.0, seed=0, total_steps=8)
    toolkit = Gradient(net, costs, **own)
    ours = Gradient(net, costs, mixing=Mixing((1.0,), "constant", stage_gates=False), **own)
    start, middle, end = (Step(t, 0, 8) for t in (0.0, 0.25, 1.0))
    assert [toolkit.tau(s) for s in (start, end)] == pytest.approx([5.0, 0.1])
    assert [ours.tau(s) for s in (start, middle, end)] == [1.0, 1.0, 1.0]
    two = Gradient(net, costs, mixing=Mixing((2.0, 0.5)), **own)
    assert [two.tau(s) for s in (start, Step(0.5, 0, 8), end)] == pytest.approx([2.0, 1.0, 0.5])
    assert [toolkit.pace(s) for s in (start, middle, end)] == [0.0, 0.25, 1.0]
    assert [ours.pace(s) for s in (start, middle, end)] == [1.0, 1.0, 1.0]
    draw = ours.draw(middle)
    assert ours.stage_gates(draw) is None and toolkit.stage_gates(draw) is not None
    x, y = images(net.backbone).double(), torch.zeros(2, dtype=torch.long)
    x = x[:2]
    p, q = net.large(x), net.small(x, ours.mixtures(draw))
    terms = ours(x, y, middle)
    assert float(terms["kl"]) == pytest.approx(0.25 * float(kl_divergence(p, q)), rel=1e-5)
    assert float(terms["kl"]) != pytest.approx(float(toolkit(x, y, middle)["kl"]), rel=1e-3)


@pytest.mark.parametrize("fractions", [(1.0, 0.5), None])
def test_before_the_masks_every_channel_is_kept_and_nothing_is_chosen(fractions: Any) -> None:
    objective = search_of(tiny_vit(), "kcr", fractions=fractions, flops_weight=0.2, mask_warmup=0.3, eta_kc=0.0)
    (x, y), *_ = batches(1)
    before, after = Step(0.29, 2, 10), Step(0.3, 3, 10)
    terms = objective(x, y, before)
    assert float(terms["ce"]) == pytest.approx(float(cross_entropy(objective.supernet.large(x), y)), rel=1e-5)
    assert float(terms["penalty"]) == 0.0 and objective.pace(before) == 0.0
    torch.stack(list(terms.values())).sum().backward()
    assert all(float(p.grad.abs().max()) == 0.0 for p in objective.architecture_parameters() if p.grad is not None)
    masked = objective(x, y, after)
    assert float(masked["penalty"]) > 0 and objective.pace(after) == 1.0
    assert float(masked["ce"]) != pytest.approx(float(terms["ce"]), rel=1e-4)


def test_the_authors_distillation_weighs_what_it_says_over_the_number_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    expert, q = (torch.randn(6, 1000, generator=generator) for _ in range(2))
    terms = distilled_terms(expert, q, torch.zeros(6, dtype=torch.long), False, 0.1, 1.0)
    theirs = 0.1 * torch.nn.functional.kl_div(  # as in their code: summed, over all logits
        q.log_softmax(1), expert.log_softmax(1), reduction="sum", log_target=True
    ) / q.numel()  # fmt: skip
    assert float(per_class(terms, q)["distill"]) == pytest.approx(float(theirs), rel=1e-5)
    assert float(terms["distill"]) == pytest.approx(1000 * float(theirs), rel=1e-5)


@pytest.mark.parametrize("window", [1, 5, 50])
def test_the_authors_gates_weigh_a_gradient_by_its_place_in_the_window(window: int) -> None:
    optimizer = AveragedSGD([torch.nn.Parameter(torch.zeros(1))], 0.1, 0.0, window, ramp=True)
    weights = [optimizer.weight(seen) for seen in range(window)]
    assert sum(weights) / window == pytest.approx(24.5)
    if window == 50:
        assert weights == pytest.approx(list(range(50)))
    gates = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for gate, ramp in zip(gates, (False, True), strict=True):
        own = AveragedSGD([gate], 0.1, 0.0, window, ramp)
        for _ in range(window):
            gate.grad = torch.ones(1)
            own.step()
    assert gates[0].item() == pytest.approx(-0.1) and gates[1].item() == pytest.approx(-0.1 * 24.5, rel=1e-5)


def test_step_sizes_are_those_of_the_reference_run() -> None:
    rules = Rules.of(SearchConfig(reference_steps=125_125, damping=0.0, gate_average="ramp", gate_flops="drawn"))
    assert rules == Rules(ramp=True, drawn=True, damping=0.0, steps=125_125)
    assert Rules.of(SearchConfig()) == Rules(ramp=False, drawn=False, damping=3.0, steps=62_500)
    rates = Rates(125_125, rules.steps)
    assert (rates.counts * 768, rates.gate_window, rates.gates(0.1)) == (
        pytest.approx(0.02),
        50,
        pytest.approx(0.1, rel=1e-3),
    )


def test_f_counts_blocks_as_they_would_be_decided_or_as_they_were_drawn() -> None:
    """The multiplier rises by F - B: with every gate leaning to keeping, decided F is whole and drawn F is not."""
    step, moved = Step(0.5, 10, 20), {}
    for drawn in (False, True):
        objective = minimax_of(small_supernet("vit"), prune=False, rules=Rules(drawn=drawn))
        keep = objective.counted(objective.draw(step)).detach()
        assert bool((keep == 1).all()) is not drawn
        before, fraction = float(objective.multiplier), float(objective.fraction(keep))
        objective.after_step(step)
        moved[drawn] = float(objective.multiplier) - before
        assert moved[drawn] == pytest.approx(objective.rates.budget * (fraction - 0.5), rel=1e-6)
    assert moved[True] < moved[False]


def test_damping_is_what_it_says() -> None:
    step, terms = Step(0.5, 10, 20), {}
    for damping in (0.0, 3.0):
        objective = minimax_of(small_supernet("vit"), rules=Rules(damping=damping))
        x = images(objective.supernet.backbone).double()[:2]
        terms[damping] = float(objective(x, torch.zeros(2, dtype=torch.long), step)["penalty"])
    # (z + damping v) v, v = F/F_full - B = 0.5
    assert terms[3.0] / terms[0.0] == pytest.approx((1e-3 + 3 * 0.5) / 1e-3, rel=1e-4)


PAPERS: dict[str, dict[str, dict[str, Any]]] = {  # what the papers' tables and text say of the full-size runs
    "swin-an": {"retrain": dict(lr=1e-5, batch_size=64, epochs=50, sched="none")},
    "swin-dan": {
        "search": dict(lr=1e-5, batch_size=64, epochs=100, sched="none", alphas=(1, 2, 4, 8), pretrained=True),
        "retrain": dict(lr=1e-5, batch_size=64, epochs=50, sched="none", train="adjoined"),
    },
    "t2t-dan": {
        "search": dict(lr=1e-3, batch_size=128, epochs=100, sched="none", alphas=(1, 2, 3), pretrained=True),
        "retrain": dict(lr=1e-3, batch_size=128, epochs=50, sched="none", train="adjoined"),
    },
    "vit-kcr": {
        "retrain": dict(
            epochs=300, opt="adamw", weight_decay=0.01, lr=1e-4, min_lr=1e-5, warmup_lr=1e-4, sched="cosine",
            model_ema=True, model_ema_decay=0.9995, aa="rand-m9-mstd0.5", reprob=0.2, remode="pixel", smoothing=0.1,
            batch_size=64, amp=True,
        ),
    },
    "deit-uvc": {
        "search": dict(
            epochs=30, warmup_epochs=5, lr=1e-4, weight_decay=0.05, sched="cosine", batch_size=256, budget=0.5,
            distill_weight=0.1, opt="adamw",
        ),
        "retrain": dict(epochs=120, weight_decay=0.05, opt="adamw"),
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", ["", "published "])
@pytest.mark.parametrize("name", PAPERS)
def test_full_size_defaults_are_what_the_papers_say_and_are_printed(
    name: str, recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.spaces.all_spaces", lambda: {name: get_space(name)})
    list_spaces(verbose=True)
    printed = dict(line.strip().split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": --" in line)
    for stage, options in PAPERS[name].items():
        assert settings_of(get_space(name))[recipe + stage].items() >= options.items()
        words = f"{printed[recipe + stage]} "
        assert [n for n, v in options.items() if f"{as_given(n, v)} " not in words] == []


def test_verbose_goes_with_the_list() -> None:
    with pytest.raises(UserError, match="--verbose goes with --list-spaces"):
        resolve(SearchConfig(verbose=True))
