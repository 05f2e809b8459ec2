"""DAN's mixture (invariant 5): one-hot it is the subnet, gated it is the sum of slices, and that sum is (3.5)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nas.prices.costs import PricedSpace
from nas.searchers.choices import ChoiceLogits, gates, mixture_of
from nas.searchers.gradient import Gradient
from nas.searchers.gumbel import step_generator
from search_spaces.an import AN
from search_spaces.method import Settings
from search_spaces.slices import network_slice
from search_spaces.space import make_space
from supernets.elastic import BlockMixture, Term, mixed_block
from supernets.supernet import Gates, Small, Supernet
from tests.nas.small import FAMILIES, hard_draw, oracle_of, small_costs, small_supernet, soft_draw, soft_etas
from tests.strategies import images

TIGHT = 1e-10  # of the largest entry, float64
over_families = pytest.mark.parametrize("family", FAMILIES)
over_widths = pytest.mark.parametrize("width", ["stream", "inner"])
over_bases = pytest.mark.parametrize("basis", ["own", "rotated"])
NORMS = [{"scale_attn_norm": True}, {"scale_mlp_norm": True}]  # timm's, between a gate and the projection after it


def mixtures(supernet: Supernet, costs: PricedSpace, draw: Sequence[dict[str, Tensor]]) -> list[BlockMixture]:
    """As the search makes them."""
    return Gradient(supernet, costs, budget=None, gamma=0.0, seed=0, total_steps=1).mixtures(list(draw))


def on_slices(costs: PricedSpace, draw: Sequence[dict[str, Tensor]]) -> list[BlockMixture]:
    """One term per candidate, whatever the width."""
    return [
        BlockMixture(tuple(Term(o.slice, weight=g) for o, g in zip(options, block["alpha"], strict=True)))
        for options, block in zip(costs.options, draw, strict=True)
    ]


def logits_and_gradients(
    supernet: Supernet, small: Small, x: Tensor, extra: Sequence[Tensor] = (), gates: Gates = None
) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """Logits, and the gradients of a random projection of them in every parameter and in `extra`; None is zero."""
    names, parameters = zip(*supernet.named_parameters(), strict=True)
    trained = [p for p in parameters if p.requires_grad]
    logits = supernet.small(x, small, gates)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    wanted = [*trained, *extra]
    found = torch.autograd.grad((logits * direction).sum(), wanted, allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]
    by_name = dict(zip([n for n, p in zip(names, parameters, strict=True) if p.requires_grad], grads, strict=False))
    return logits.detach(), by_name, grads[len(trained) :]


def assert_close(a: Tensor, b: Tensor, what: str, tolerance: float = TIGHT) -> None:
    a, b = a.detach(), b.detach()
    scale = max(float(a.abs().max()), 1e-4)
    difference = float((a - b).abs().max())
    assert difference <= tolerance * scale, f"{what}: {difference:.2e} of {scale:.2e}"


def assert_same(first: tuple, second: tuple) -> None:
    assert_close(first[0], second[0], "logits")
    assert first[1].keys() == second[1].keys()
    for name, grad in first[1].items():
        assert_close(grad, second[1][name], name)
    for i, (a, b) in enumerate(zip(first[2], second[2], strict=True)):
        assert_close(a, b, f"gradient of eta, block {i}")


@over_families
@pytest.mark.parametrize(("width", "full"), [("stream", False), ("stream", True), ("inner", False)])
@over_bases
@pytest.mark.parametrize("seed", range(3))
def test_5_one_hot_mixture_is_the_subnet(family: str, width: str, full: bool, basis: str, seed: int) -> None:
    """At the subnet's own stage widths, or at full ones."""
    supernet = small_supernet(family, seed, basis)
    costs, x = small_costs(supernet, width, full_stage_width=full), images(supernet.backbone, seed=seed)
    picks = costs.space.random(seed)
    subnet = network_slice(supernet.shapes, costs.space.block_slices(picks), full)
    draw = hard_draw(costs, picks)
    gates = costs.stage_gates(draw)
    assert (gates is None) == (full or width == "inner")
    if gates is not None:
        assert [int(gate.sum()) for gate in gates] == list(subnet.stage_widths)
        assert any(w < e for w, e in zip(subnet.stage_widths, supernet.identity().stage_widths, strict=True)) or seed
    mixture = logits_and_gradients(supernet, mixtures(supernet, costs, draw), x, gates=gates)
    assert_same(mixture, logits_and_gradients(supernet, subnet, x))
    assert_close(mixture[0], oracle_of(family, supernet, subnet, x), "oracle", 1e-9)
    untouched = [name for name, grad in mixture[1].items() if "blocks" in name and grad.abs().max() == 0]
    assert not untouched  # every tensor of every block took part


@over_families
@over_widths
def test_width_decides_between_slices_and_one_gated_pass(family: str, width: str) -> None:
    supernet = small_supernet(family)
    costs = small_costs(supernet, width)
    for block, mixture in enumerate(mixtures(supernet, costs, soft_draw(soft_etas(costs, 0)))):
        options = costs.options[block]
        assert len(options) >= 2
        if width == "stream" or costs.network.blocks[block].norm_after_gate:
            assert [t.slice for t in mixture.terms] == [o.slice for o in options]
            assert all(t.weight is not None and t.head_gate is None for t in mixture.terms)
        else:
            (term,) = mixture.terms
            assert term.slice == options[0].slice  # alpha 1: the widest
            assert term.head_gate is not None and term.hidden_gate is not None


@over_families
@over_bases
def test_gated_pass_equals_the_sum_over_slices(family: str, basis: str) -> None:
    supernet = small_supernet(family, basis=basis)
    costs, x = small_costs(supernet, "inner"), images(supernet.backbone)
    etas = soft_etas(costs, 3)  # of g alone the gradients differ by a constant, which a sum of one cannot feel
    gated = logits_and_gradients(supernet, mixtures(supernet, costs, soft_draw(etas)), x, etas)
    assert_same(gated, logits_and_gradients(supernet, on_slices(costs, soft_draw(etas)), x, etas))
    assert all(grad.abs().max() > 0 for grad in gated[2])


@pytest.mark.parametrize("norm", NORMS, ids=lambda kwargs: next(iter(kwargs)))
def test_norms_between_gate_and_projection_fall_back_to_slices(norm: dict[str, bool]) -> None:
    supernet = small_supernet("vit", **norm)
    costs, x = small_costs(supernet, "inner"), images(supernet.backbone)
    picks = costs.space.random(1)
    made = mixtures(supernet, costs, hard_draw(costs, picks))
    assert [len(m.terms) for m in made] == [len(options) for options in costs.options]
    subnet = network_slice(supernet.shapes, costs.space.block_slices(picks), full_stage_width=True)
    assert_same(logits_and_gradients(supernet, made, x), logits_and_gradients(supernet, subnet, x))
    # and rightly so: the gated pass would give something else
    draw = soft_draw(soft_etas(costs, 0))
    forced = [
        mixture_of([o.slice for o in options], block["alpha"], small_supernet("vit").adapter.costs.blocks[0])
        for options, block in zip(costs.options, draw, strict=True)
    ]
    assert all(len(m.terms) == 1 for m in forced)
    a, b = supernet.small(x, forced), supernet.small(x, mixtures(supernet, costs, draw))
    assert (a - b).abs().max() > 1e-3 * b.abs().max()


@over_families
@over_widths
@over_bases
def test_soft_mixture_is_equation_3_5(family: str, width: str, basis: str) -> None:
    """z' = sum_i g_i (z + MSA_i), out = sum_i g_i (z' + MLP_i): each candidate alone, summed by hand."""
    supernet = small_supernet(family, basis=basis)
    costs, adapter = small_costs(supernet, width), supernet.adapter
    made = mixtures(supernet, costs, soft_draw(soft_etas(costs, 1)))
    generator = torch.Generator().manual_seed(0)
    for i, (block, shape) in enumerate(zip(adapter.blocks(), supernet.shapes, strict=True)):
        tokens = (adapter.costs.blocks[i].mlp_tokens,)
        grid = tuple(getattr(block, "input_resolution", tokens))  # Swin's stream is (B, H, W, E)
        z = torch.randn(2, *grid, shape.embed_dim, generator=generator, dtype=torch.float64)

        def run(mixture: BlockMixture, x: Tensor, block=block, shape=shape) -> Tensor:
            return mixed_block(adapter, block, shape, mixture, x)

        weights = soft_draw(soft_etas(costs, 1))[i]["alpha"]

        def alone(x: Tensor, half: str, i=i, run=run, weights=weights) -> Tensor:
            other = {"attn": "mlp", "mlp": "attn"}[half]
            outs = [run(BlockMixture((Term(replace(o.slice, **{other: False})),)), x) for o in costs.options[i]]
            return sum(g * out for g, out in zip(weights, outs, strict=True))

        assert_close(run(made[i], z), alone(alone(z, "attn"), "mlp"), f"block {i}")


@over_families
@over_widths
@over_bases
def test_5_the_same_alpha_everywhere_is_an(family: str, width: str, basis: str) -> None:
    supernet = small_supernet(family, basis=basis)
    dan = small_costs(supernet, width).space
    an = make_space("small-an", AN(), Settings(width=width), supernet.shapes)
    for alpha in (1, 2):
        picks = [{"alpha": alpha}] * len(supernet.shapes)
        subnet = network_slice(supernet.shapes, dan.block_slices(picks))
        assert subnet == network_slice(supernet.shapes, an.block_slices(picks))
        full = supernet.identity().stage_widths
        assert subnet.stage_widths == (tuple(w // alpha for w in full) if width == "stream" else full)
        x = images(supernet.backbone)
        assert_close(supernet.small(x, subnet), oracle_of(family, supernet, subnet, x), "oracle", 1e-9)


def test_gate_of_a_unit_is_the_weight_of_the_candidates_that_keep_it() -> None:
    g = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    expected = torch.tensor([1.0, 0.8, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64)  # kept by all, by two, by one
    torch.testing.assert_close(gates(g, [6, 2, 1]), expected)


def test_one_draw_per_block_and_step() -> None:
    costs = small_costs(small_supernet("vit"), "stream")
    logits = ChoiceLogits(costs.space)
    assert [len(eta) for eta in logits.eta] == [4, 4, 4]
    first, again = (logits.sample(1.0, step_generator(3, 8)) for _ in range(2))
    later = logits.sample(1.0, step_generator(3, 9))
    for block in range(3):
        assert torch.equal(first[block]["alpha"], again[block]["alpha"])
        assert not torch.equal(first[block]["alpha"], later[block]["alpha"])
        assert float(first[block]["alpha"].sum()) == pytest.approx(1.0, abs=1e-6)
    assert not torch.equal(first[0]["alpha"], first[1]["alpha"])


def test_argmax_takes_the_likeliest_and_the_first_of_equals() -> None:
    costs = small_costs(small_supernet("vit"), "stream")
    logits = ChoiceLogits(costs.space)
    assert logits.argmax() == [{"alpha": 1}] * 3
    with torch.no_grad():
        logits.eta[1][2] = 0.5
    assert logits.argmax() == [{"alpha": 1}, {"alpha": 3}, {"alpha": 1}]
    assert float(logits.probabilities()[1]["alpha"][2]) == pytest.approx(math.exp(0.5) / (3 + math.exp(0.5)))
