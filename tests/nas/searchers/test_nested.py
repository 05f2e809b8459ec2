"""All candidates of free widths in one gated pass (invariant 9), and the likeliest architecture within a budget."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from timm.layers import GluMlp, SwiGLU
from torch import Tensor

from nas.prices.selection import cost_band
from nas.searchers.gumbel import step_generator
from nas.searchers.nested import NestedGradient, likeliest
from search_spaces.method import Picks
from search_spaces.slices import network_slice
from supernets.families import ADAPTED, Adapted
from supernets.supernet import Supernet
from tests.nas.free import architectures, free_costs, tiny_supernet
from tests.nas.searchers.test_choices import logits_and_gradients
from tests.nas.small import FAMILIES, hard_draw, small_supernet
from tests.oracle import randomise
from tests.strategies import images
from tests.supernets.test_new_family import ResPostAdapter, ResPostViT

over_families = pytest.mark.parametrize("family", FAMILIES)
over_bases = pytest.mark.parametrize("basis", ["own", "rotated"])
PARTS = ("heads", "qk", "v", "hidden")
REMOVED = {"all": (), "no-attention": ("heads",), "no-mlp": ("hidden",), "neither": ("heads", "hidden")}
NORMS: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "scale_attn_norm": {"scale_attn_norm": True},
    "scale_mlp_norm": {"scale_mlp_norm": True},
    "rmsnorm": {"norm_layer": "rmsnorm", "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "no_layer_scale": {"init_values": None},
}


def searched(supernet: Supernet, price: str = "flops", budget: float = 0.5, **settings: Any) -> NestedGradient:
    """A search over every width by itself, with random logits."""
    costs = free_costs(supernet, price, **settings)
    objective = NestedGradient(supernet, costs, budget=budget, gamma=0.0, seed=0, total_steps=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for eta in objective.choices.eta:
            eta.copy_(torch.randn(len(eta), generator=generator))
    return objective


def picks_of(objective: NestedGradient, seed: int, removed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """An architecture drawn at random, every half there but those removed in the second block."""
    picks = objective.costs.space.random(seed)
    for i, pick in enumerate(picks):
        pick |= {name: max(pick[name], 1) for name in ("heads", "hidden")}
        pick |= dict.fromkeys(removed, 0) if i == 1 else {}
    return picks


def close(a: Tensor, b: Tensor, largest: float) -> bool:
    """Within 1e-9 of the greatest entry; a gradient that is nothing but rounding, within 1e-13 of all gradients'."""
    return bool((a - b).abs().max() <= max(1e-9 * float(b.abs().max()), 1e-13 * largest))


def assert_gated_is_subnet(objective: NestedGradient, picks: Sequence[Picks], x: Tensor) -> None:
    supernet, space = objective.supernet, objective.costs.space
    subnet = network_slice(supernet.shapes, space.block_slices(picks))
    draw = list(hard_draw(objective.costs, picks))
    gates = objective.costs.stage_gates(draw)
    if gates is not None:
        assert [int(gate.sum()) for gate in gates] == list(subnet.stage_widths)
    made = objective.mixtures(draw)  # type: ignore[arg-type]
    assert all(len(mixture.terms) == 1 for mixture in made)
    logits, gradients, _ = logits_and_gradients(supernet, made, x, gates=gates)
    expected, own, _ = logits_and_gradients(supernet, subnet, x)
    assert close(logits, expected, 0.0)
    largest = max(float(g.abs().max()) for g in own.values())
    assert [name for name, g in own.items() if not close(gradients[name], g, largest)] == []


@over_families
@over_bases
@pytest.mark.parametrize("removed", REMOVED)
def test_9_a_one_hot_gated_pass_is_the_subnet(family: str, basis: str, removed: str) -> None:
    supernet = small_supernet(family, basis=basis)
    objective, x = searched(supernet), images(supernet.backbone)
    for seed in range(2):
        assert_gated_is_subnet(objective, picks_of(objective, seed, REMOVED[removed]), x)


@over_bases
@pytest.mark.parametrize("kind", NORMS)
def test_9_norms_behind_gates_are_over_what_exists(kind: str, basis: str) -> None:
    supernet = small_supernet("vit", basis=basis, **NORMS[kind])
    objective, x = searched(supernet), images(supernet.backbone)
    for removed in REMOVED.values():
        assert_gated_is_subnet(objective, picks_of(objective, 3, removed), x)


@pytest.mark.parametrize("kept", [*PARTS, "stream"])
def test_9_every_choice_alone(kept: str) -> None:
    """The others are fixed, and have no gate."""
    supernet = small_supernet("swin", basis="rotated")
    objective = searched(supernet, fixed=tuple({*PARTS, "stream"} - {kept}))
    assert_gated_is_subnet(objective, picks_of(objective, 5), images(supernet.backbone))
    gated = {"heads": "head_gate", "qk": "qk_gate", "v": "v_gate", "hidden": "hidden_gate", "stream": "stream_gate"}
    for mixture in objective.mixtures(objective.choices.probabilities()):
        (term,) = mixture.terms
        assert [name for name, field in gated.items() if getattr(term, field) is not None] == [kept]


@over_families
@over_bases
def test_every_logit_feels_the_loss(family: str, basis: str) -> None:
    supernet = small_supernet(family, basis=basis, **({"qk_norm": True} if family == "vit" else {}))
    objective, x = searched(supernet), images(supernet.backbone)
    draw = objective.choices.probabilities()
    logits = supernet.small(x, objective.mixtures(draw), objective.costs.stage_gates(draw))
    assert torch.isfinite(logits).all()
    eta = list(objective.choices.eta)
    for label, gradient in zip(objective.choices.labels, torch.autograd.grad(logits.sum(), eta), strict=True):
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, label


def test_blocks_of_a_stage_draw_its_width_once() -> None:
    objective = searched(small_supernet("swin"))
    assert [label for label in objective.choices.labels if "stream" in label] == ["stage0/stream", "stage1/stream"]
    draw = objective.choices.sample(1.0, step_generator(0, 0))
    assert draw[0]["stream"] is draw[1]["stream"] and draw[0]["stream"] is not draw[2]["stream"]
    assert not torch.equal(draw[0]["heads"], draw[1]["heads"])
    rows = objective.choice_rows()
    assert {(row["block"], row["last_block"]) for row in rows if row["choice"] == "stream"} == {(0, 1), (2, 2)}
    assert {(row["block"], row["last_block"]) for row in rows if row["choice"] == "v"} == {(0, 0), (1, 1), (2, 2)}


def score_of(objective: NestedGradient, picks: Sequence[Picks]) -> float:
    """The log-probability of picks; of a removed half's other choices that of the likeliest."""
    probabilities, candidates = objective.choices.probabilities(), objective.costs.space.candidates
    score = 0.0
    for (i, *_), name in objective.choices.once():
        p = probabilities[i][name].detach()
        free = name in ("qk", "v") and picks[i]["heads"] == 0
        score += float((p.max() if free else p[candidates[i][name].index(picks[i][name])]).log())
    return score


@pytest.mark.parametrize("price", ["flops", "params"])
@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("budget", [0.3, 0.6])
def test_10_the_likeliest_within_the_budget_are_those_of_all(family: str, price: str, budget: float) -> None:
    """The likeliest of each combination of stage widths, in the band if there is any, every architecture listed."""
    objective = searched(tiny_supernet(family), price, budget, granularity=8)
    costs, probabilities = objective.costs, objective.choices.probabilities()
    low, high = cost_band(costs.full, budget)
    every = list(architectures(costs))
    scores = torch.zeros(len(every))
    for (i, *_), name in objective.choices.once():
        candidates = costs.space.candidates[i][name]
        scores += probabilities[i][name].detach().log()[[candidates.index(picks[i][name]) for picks, _ in every]]
    for floor in (low, 0):
        best: dict[tuple[int, ...], float] = {}
        for (picks, cost), score in zip(every, scores.tolist(), strict=True):
            if floor <= cost <= high:
                widths = objective.subnet_of(picks).stage_widths
                best[widths] = max(best.get(widths, -1e9), score)
        if best:
            break
    found = objective.finalists()
    assert len(found) == len(best) > 2 * (family == "swin")
    for (picks, selection), (widths, score) in zip(found, sorted(best.items(), key=lambda x: -x[1]), strict=True):
        subnet = objective.subnet_of(picks)
        assert selection is not None and subnet.stage_widths == widths
        assert selection.cost == costs.price.network(costs.space.shapes, costs.network, subnet) <= high
        assert selection.in_band == (selection.cost >= low) == (floor == low)
        assert score_of(objective, picks) == pytest.approx(score, abs=1e-4)
    assert objective.selection() == found[0]


def test_combinations_come_by_falling_score() -> None:
    stages = [{8: -1.0, 16: -0.5, 24: -2.0}, {4: -0.1, 8: -0.1}]
    every = list(likeliest(stages))
    scores = [stages[0][a] + stages[1][b] for a, b in every]
    assert scores == sorted(scores, reverse=True) and len(set(every)) == 6
    assert every[:2] == [(16, 4), (16, 8)] == list(islice(likeliest(stages), 2))  # of equals the narrower first


@pytest.mark.parametrize("glu", [SwiGLU, GluMlp], ids=lambda glu: glu.__name__)
def test_9_norms_after_the_halves_are_over_what_exists(glu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose halves end in a norm, and read the stream without one."""
    monkeypatch.setitem(ADAPTED, "respost", Adapted((ResPostViT,), ResPostAdapter))
    supernet = Supernet(randomise(ResPostViT(glu), 0)).double().eval()
    objective = searched(supernet)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for removed in REMOVED.values():
        assert_gated_is_subnet(objective, picks_of(objective, 2, removed), x)
