"""Joint search of factor and count (section 2.4): what test_kcr.py does not test over both methods."""

import dataclasses
import itertools
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from nas.networks.architecture import slices_of
from nas.searchers.channels import TopK
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import METHODS
from search_spaces.slices import BlockShape
from tests.nas.kernels import (
    Linears,
    architectures,
    gradients,
    mixture_logits,
    search_of,
    subnet_of,
    tiny_vit,
)
from tests.nas.methods.test_kcr import HALF, few, relative

over_widths = pytest.mark.parametrize("width", ["stream", "inner"])


def test_fractions_are_of_the_slice_that_alpha_leaves() -> None:
    method, shape = METHODS["joint"], BlockShape(0, 64, 4, 16, 128)
    for width, expected in (("stream", 32), ("inner", 64)):
        picks = {"alpha": 2, "fraction": 0.5}
        kept = method.block_slice(shape, Settings(width), picks, {})
        assert (kept.stream, kept.heads, kept.hidden, kept.mlp_stream) == (expected, 2, 64, expected // 2)
    choices, dropped = method.choices(BlockShape(0, 16, 2, 8, 32), Settings())  # 16 or 8 channels
    assert choices == {"alpha": (1, 2), "fraction": (1.0, 0.5)} and "0.25 left out" in dropped[1]


@over_widths
def test_5_where_the_count_cuts_inside_a_slice(width: str) -> None:
    backbone = tiny_vit().double()
    objective = search_of(backbone, "joint", width).double()
    picks = [{"alpha": 2, "fraction": 0.75}, {"alpha": 4, "fraction": 0.5}]
    subnet = subnet_of(objective, picks, full_stage_width=False)
    counts = {"stream": [(24, 16), (12, 8)], "inner": [(48, 40), (48, 24)]}[width]
    for block, scores, (stream, count) in zip(subnet.blocks, objective.scores, counts, strict=True):
        best = sorted(sorted(range(stream), key=lambda j: -scores[j].item())[:count])
        assert (block.stream, block.mlp_stream) == (stream, tuple(best))
        assert block.mlp_stream != tuple(range(count))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mixture, small = mixture_logits(objective, x, picks), objective.supernet.small(x, subnet)
    assert relative(small, mixture) < 1e-12
    expected = gradients(backbone, small)
    for name, grad in gradients(backbone, mixture).items():
        assert torch.allclose(grad, expected[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("fractions", [(1.0, 0.5), (1.0, 0.75, 0.5, 0.25)])
@over_widths
def test_one_mlp_pass_per_alpha_or_one_for_all(width: str, fractions: tuple[float, ...]) -> None:
    objective = search_of(tiny_vit(), "joint", width, fractions=fractions)
    with Linears() as linears:
        objective.supernet.small(torch.randn(1, 3, 32, 32), objective.mixtures(objective.draw(HALF)))
    passes = 3 if width == "stream" else 1  # alpha 1, 2, 4
    assert len(linears.outputs) == 2 * 4 * passes + 1
    assert linears.outputs.count(72) >= 2


@over_widths
def test_masks_and_flops_are_means_over_both_draws(width: str) -> None:
    backbone = tiny_vit(depth=1).double()
    objective = search_of(backbone, "joint", width).double()
    draw = objective.draw(HALF)
    (mixture,) = objective.mixtures(draw)
    choices = objective.costs.space.candidates[0]
    streams = [48 // int(a) for a in choices["alpha"]] if width == "stream" else [48]
    for term, stream in zip(mixture.terms, streams, strict=True):
        expected = torch.zeros(stream)
        order = objective.scores[0][:stream].argsort(descending=True)
        for g, fraction in zip(draw[0]["fraction"], choices["fraction"], strict=True):
            count = stream if fraction == 1 else max(8, 8 * math.floor(stream * fraction / 8 + 0.5))
            expected[order[:count]] += g.detach()
        assert term.channel_gate is not None
        assert torch.allclose(term.channel_gate.detach().float(), expected, atol=1e-6)
    expected_flops = sum(
        float(draw[0]["alpha"][i] * draw[0]["fraction"][k])
        * objective.supernet.flops(subnet_of(objective, [{"alpha": a, "fraction": f}], True))
        for (i, a), (k, f) in itertools.product(enumerate(choices["alpha"]), enumerate(choices["fraction"]))
    )
    constant = objective.costs.network.flops.at(objective.supernet.identity().stage_widths)
    assert float(objective.drawn_cost(draw)) == pytest.approx(expected_flops - constant, rel=1e-5)


@over_widths
@given(seed=st.integers(0, 999), budget=st.floats(0.3, 1.0))
@settings(few, max_examples=6)
def test_selection_is_the_best_of_every_alpha_and_count(width: str, seed: int, budget: float) -> None:
    objective = search_of(tiny_vit(), "joint", width, seed=seed, budget=budget)
    assert isinstance(objective, TopK)
    full, space = objective.supernet.flops(), objective.costs.space
    logs = [{n: p.detach().double().log() for n, p in block.items()} for block in objective.choices.probabilities()]

    def score(picks: list[dict[str, float]]) -> float:
        return sum(
            float(log[name][options[name].index(pick[name])])
            for pick, log, options in zip(picks, logs, space.candidates, strict=True)
            for name in pick
        )

    priced = [(objective.supernet.flops(subnet_of(objective, p, False)), score(p)) for p in architectures(space)]
    assert len(priced) == space.size()
    below = [(f, s) for f, s in priced if f <= budget * full]
    inside = [(f, s) for f, s in below if f >= (budget - 0.02) * full]
    if not below:
        with pytest.raises(UserError, match="cannot be met"):
            objective.selection()
        return
    picks, chosen = objective.selection()
    flops = objective.supernet.flops(objective.current_subnet())
    assert chosen is not None and chosen.cost == flops <= budget * full
    assert chosen.in_band == bool(inside)
    assert score(picks) == pytest.approx(max(s for _, s in inside or below), abs=1e-5)


def test_expected_flops_are_the_mean_over_the_space() -> None:
    objective = search_of(tiny_vit(), "joint", seed=4)
    assert isinstance(objective, TopK)
    probabilities, total = objective.choices.probabilities(), 0.0
    for picks in architectures(objective.costs.space):
        p = 1.0
        for pick, block, options in zip(picks, probabilities, objective.costs.space.candidates, strict=True):
            p *= math.prod(float(block[name][options[name].index(pick[name])]) for name in pick)
        total += p * objective.supernet.flops(subnet_of(objective, picks, False))
    assert float(objective.expected_fraction()) * objective.supernet.flops() == pytest.approx(total, rel=1e-5)


def test_arch_json_holds_both_choices_and_the_channels(tmp_path: Path) -> None:
    objective = search_of(tiny_vit(), "joint", budget=0.5)
    picks, _ = objective.selection()
    subnet = objective.current_subnet()
    blocks = tuple({**pick, **kept} for pick, kept in zip(picks, objective.kept_indices(picks), strict=True))
    arch = Architecture(
        space="vit-joint",
        method="joint",
        model="vit_tiny_patch16_224",
        model_kwargs={},
        input_size=(3, 32, 32),
        num_classes=5,
        width="stream",
        stage_widths=subnet.stage_widths,
        blocks=blocks,
        flops=1,
        params=1,
        backbone_flops=1,
        backbone_params=1,
    )
    save_architecture(arch, tmp_path / "arch.json")
    read = load_architecture(tmp_path)
    assert slices_of(read, objective.supernet.shapes) == subnet
    without = tuple({k: v for k, v in block.items() if k != "kept_channels"} for block in read.blocks)
    with pytest.raises(UserError, match=r"blocks\[0\].kept_channels' is missing"):
        slices_of(dataclasses.replace(read, blocks=without), objective.supernet.shapes)
