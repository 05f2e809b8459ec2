"""Where a search by gradient begins: the solution likely, E[F] at the budget, at the price of what it lost."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nas.searchers.start
from nas.networks.backbone import Start
from nas.prices.costs import PricedSpace, priced
from nas.prices.flops import FLOPS
from nas.prices.selection import cost_band
from nas.searchers.exchange import Program
from nas.searchers.gradient import Gradient, Solution
from nas.searchers.importance import Importance, first_proposal
from nas.searchers.losses import losses_of, slice_losses, tails
from nas.searchers.nested import NestedGradient
from nas.searchers.searcher import Question
from nas.searchers.start import LIKELY, apart, at_budget, begin, by_blocks, by_halves, likely, stream_lost, to_begin
from nas.training.losses import kl_divergence
from search_spaces.errors import UserError
from search_spaces.joint import Joint
from search_spaces.kcr import KCR
from search_spaces.method import Picks, Settings
from search_spaces.slices import BlockSlice, network_slice
from search_spaces.space import make_space
from supernets.importance import magnitude_scores
from supernets.supernet import Supernet
from tests.nas.free import free_costs
from tests.nas.searchers.test_losses import tables
from tests.nas.small import small_costs, small_supernet
from tests.strategies import images

TRAINED = Start(checkpoint=Path("weights"))


def run_of(supernet: Supernet, costs: PricedSpace, budget: float | None = 0.5, **options: Any) -> Any:
    """A run as far as it is looked at. options: of the search; `start`, `weights` of the preparation, `folder`."""
    known = dict(start=None, resume=False, seed=0, supernet=None) | options
    prepared = SimpleNamespace(
        supernet=supernet,
        fresh_classifier=True,  # magnitudes: no images
        start=known.pop("weights", TRAINED),
        folder=known.pop("folder", None),
        device=torch.device("cpu"),
        plan=SimpleNamespace(images=8, labels=True),
    )
    return SimpleNamespace(options=SimpleNamespace(**known), question=Question(costs, budget), prepared=prepared)


def search_of(supernet: Supernet, costs: PricedSpace, budget: float | None = 0.5) -> Gradient:
    kind = NestedGradient if costs.space.method.halves else Gradient
    return kind(supernet, costs, budget=budget, gamma=0.0, seed=0, total_steps=10)


def joint_costs(supernet: Supernet) -> PricedSpace:
    space = make_space("small-joint", Joint(), Settings(), supernet.shapes)
    return priced(space, supernet.adapter.costs, FLOPS)


@pytest.fixture
def by_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The searcher by importance, from made-up losses and without a measurement."""

    def solution(self: Importance, run: Any) -> Any:
        halves = run.question.priced.halves
        names, lost = tables(halves)
        program = Program(halves, losses_of(halves, names, lost), run.question.budget)
        return program, first_proposal(program)

    monkeypatch.setattr(Importance, "solution", solution)


@pytest.mark.parametrize("number", [1, 2, 5, 60])
def test_the_own_candidate_is_likely_and_the_others_fall_with_their_distance(number: int) -> None:
    generator = np.random.default_rng(number)
    for own in {0, number // 2, number - 1}:
        distances = generator.random(number)
        distances[own] = 0.0
        p = np.array(likely(apart(distances, own)))
        assert p.sum() == pytest.approx(1.0) and (p > 0).all()
        assert p[own] == pytest.approx(LIKELY if number > 1 else 1.0, abs=1e-6)
        order = np.argsort(apart(distances, own))
        assert (np.diff(p[order]) <= 1e-12).all()


def test_of_equally_far_candidates_the_nearer_in_rank_is_likelier() -> None:
    p = likely(apart(np.zeros(5), 1))
    assert p[1] == pytest.approx(LIKELY) and p[0] == pytest.approx(p[2]) and p[2] > p[3] > p[4]


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("kind", ["stream", "inner", "joint"])
@pytest.mark.parametrize("basis", ["own", "rotated"])
def test_a_solution_by_blocks_leaves_out_the_least_within_the_budget(family: str, kind: str, basis: str) -> None:
    supernet = small_supernet(family, basis=basis)
    costs = joint_costs(supernet) if kind == "joint" else small_costs(supernet, kind)
    found = by_blocks(run_of(supernet, costs, 0.7))
    scores = magnitude_scores(supernet)
    slices = [[o.slice for o in options] for options in costs.options]
    names = supernet.adapter.block_names
    losses = slice_losses(names, supernet.shapes, slices, scores, stream_lost(supernet, scores))
    every = list(itertools.product(*(range(len(options)) for options in costs.options)))
    problem, (low, high) = costs.uniform(), cost_band(costs.full, 0.7)
    fits = [p for p in every if low <= problem.cost(p) <= high] or [p for p in every if problem.cost(p) <= high]

    def lost_with(picks: Sequence[int]) -> float:
        return sum(float(own[k]) for own, k in zip(losses, picks, strict=True))

    taken = [[o.picks for o in options].index(p) for options, p in zip(costs.options, found.picks, strict=True)]
    assert tuple(taken) in fits and lost_with(taken) == pytest.approx(min(map(lost_with, fits)), abs=1e-5)
    probabilities = found.probabilities(found.price)
    for i, block in enumerate(costs.space.candidates):
        for name, candidates in block.items():
            p = probabilities[costs.space.label(i, name)]
            own = candidates.index(found.picks[i][name])
            assert p[own] == pytest.approx(LIKELY if len(p) > 1 else 1.0, abs=1e-6) and sum(p) == pytest.approx(1.0)


@pytest.mark.parametrize("basis", ["own", "rotated"])
def test_a_slice_leaves_out_what_is_beyond_it(basis: str) -> None:
    supernet = small_supernet("swin", basis=basis)
    scores = magnitude_scores(supernet)
    lost = stream_lost(supernet, scores)
    for stage, beyond in lost.items():
        assert beyond[0] == pytest.approx(1.0) and beyond[-1] == 0.0 and (np.diff(beyond) <= 0).all()
        own = scores[f"stream.{stage}"] if basis == "own" else supernet.basis.energy[stage]
        assert beyond == pytest.approx(tails(own) / float(own.sum()))
    names, shapes = supernet.adapter.block_names, supernet.shapes
    E, H, M = shapes[0].embed_dim, shapes[0].num_heads, shapes[0].hidden
    kept = [
        BlockSlice(E, H, M),
        BlockSlice(E, H, M, attn=False, mlp=False),
        BlockSlice(E, 1, M),
        BlockSlice(E // 2, H, M),
        BlockSlice(E, H, M, mlp_stream=E // 2),
    ]
    (losses, *_) = slice_losses(names, shapes, [kept, *[[BlockSlice(E, H, M)]] * (len(names) - 1)], scores, lost)
    heads, hidden = scores[f"{names[0]}.heads"], scores[f"{names[0]}.hidden"]
    whole = sum(float(scores[f"{n}.{part}"].sum()) for n in names for part in ("heads", "hidden"))
    own, half = float(heads.sum() + hidden.sum()), float(lost[0][E // 2])
    expected = [0.0, own, float(heads[1:].sum()), half * own, half * float(hidden.sum())]
    assert losses == pytest.approx(np.array(expected) / whole)


@pytest.mark.parametrize("family", ["vit", "swin", "t2t"])
def test_a_solution_by_halves_is_that_of_its_program_and_likely(family: str, by_tables: None) -> None:
    supernet, budget = small_supernet(family), 0.9 if family == "t2t" else 0.5
    objective = search_of(supernet, free_costs(supernet), budget)
    costs = objective.costs
    found = by_halves(run_of(supernet, costs, budget))
    price = costs.price.network(costs.space.shapes, costs.network, objective.subnet_of([dict(p) for p in found.picks]))
    assert (budget - 0.03) * costs.full <= price <= budget * costs.full
    probabilities = found.probabilities(found.price)
    assert set(probabilities) == set(objective.choices.labels)
    for (i, *_), name in objective.choices.once():
        p = probabilities[costs.space.label(i, name)]
        own = costs.space.candidates[i][name].index(found.picks[i][name])
        assert p[own] == pytest.approx(LIKELY, abs=1e-6) == max(p)
    at_budget(objective, found)
    at_start = float(objective.expected_fraction().detach())
    assert at_start == pytest.approx(budget, abs=0.03)
    objective.began = [dict(picks) for picks in found.picks]
    entries = [picks for picks, _ in objective.finalists()]
    assert objective.began in entries and objective.found() == {"start": "importance"}
    assert entries[0] == objective.selection()[0]


def test_where_it_began_is_measured_last_if_it_is_not_among_the_likeliest() -> None:
    supernet = small_supernet("swin")
    objective = search_of(supernet, small_costs(supernet, "stream"), 0.6)
    without = objective.finalists()
    rows = [[o.picks for o in options] for options in objective.costs.options]
    picked = [picks for picks, _ in without]
    began = next(list(p) for p in itertools.product(*rows) if list(p) not in picked)
    objective.began = [dict(picks) for picks in began]
    *others, (last, selection) = objective.finalists()
    assert others == without and last == began
    supernet_flops = supernet.flops(network_slice(supernet.shapes, objective.costs.space.block_slices(began)))
    assert selection is not None and selection.cost == supernet_flops


@pytest.mark.parametrize("space", ["factors", "widths"])
def test_divergence_and_share_are_of_the_subnet_as_it_is_cut(space: str) -> None:
    supernet = small_supernet("vit")
    costs = free_costs(supernet) if space == "widths" else small_costs(supernet, "stream")
    objective, picks = search_of(supernet, costs), costs.space.random(1)
    batches = [images(supernet.backbone, size, seed=size) for size in (2, 3)]
    x, subnet = torch.cat(batches), network_slice(supernet.shapes, costs.space.block_slices(picks))
    expected = float(kl_divergence(supernet.large(x), supernet.small(x, subnet)).detach())
    assert objective.divergence(picks, batches) == pytest.approx(expected, rel=1e-5) and expected > 0
    assert objective.share(picks) == supernet.flops(subnet) / supernet.flops()


def test_a_start_is_written_and_a_resume_reads_it(
    by_tables: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    supernet = small_supernet("vit")
    batch = images(supernet.backbone), torch.zeros(2)
    monkeypatch.setattr(nas.searchers.start, "calibration_images", lambda *_: [batch])

    def begun(**options: Any) -> Gradient:
        objective = search_of(supernet, free_costs(supernet))
        begin(run_of(supernet, objective.costs, folder=tmp_path, **options), objective)
        return objective

    first = begun()
    assert first.began is not None and first.budget is not None
    lost, saved = first.divergence(first.began, [batch[0]]), 1 - first.share(first.began)
    assert float(first.multiplier) == pytest.approx(lost / saved, rel=1e-6) and saved >= 1 - first.budget
    assert "the search begins at the solution by importance" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "start.json").read_text())) == {"picks", "probabilities", "price"}
    monkeypatch.setattr(Importance, "solution", None)  # a resume looks for none
    again = begun(resume=True)
    assert again.began == first.began
    for name, value in first.choices.state_dict().items():
        assert torch.equal(again.choices.state_dict()[name], value)
    assert torch.equal(again.multiplier, first.multiplier)
    (tmp_path / "start.json").unlink()
    (tmp_path / "checkpoint.pt").touch()
    assert begun(resume=True).began is None  # it began without


def wanted(costs: PricedSpace, objective: Any, budget: float | None = 0.5, **options: Any) -> bool:
    return to_begin(run_of(objective.supernet, costs, budget, **options), objective) is not None


def test_trained_weights_under_a_budget_begin_at_a_solution_and_nothing_else() -> None:
    supernet = small_supernet("vit")
    costs = small_costs(supernet, "stream")
    objective = search_of(supernet, costs)
    assert wanted(costs, objective) and wanted(costs, objective, start="importance")
    assert not wanted(costs, objective, start="uniform")
    assert not wanted(costs, objective, weights=Start())
    assert not wanted(costs, objective, budget=None)
    with pytest.raises(UserError, match="--start importance asks what trained weights"):
        wanted(costs, objective, start="importance", weights=Start())


def test_counts_of_channels_alone_begin_alike() -> None:
    from nas.objectives.kernel import KernelTerm
    from nas.searchers.channels import TopK

    supernet = small_supernet("vit")
    for method, begins in ((KCR(), False), (Joint(), True)):
        space = make_space("small", method, Settings(fractions=(1.0, 0.5)), supernet.shapes)
        costs = priced(space, supernet.adapter.costs, FLOPS)
        kernel = KernelTerm(0.1, 0.5)
        objective = TopK(supernet, costs, kernel=kernel, budget=0.9, gamma=0.0, seed=0, total_steps=1)
        assert wanted(costs, objective) == begins
        if not begins:
            with pytest.raises(UserError, match="small chooses no widths"):
                wanted(costs, objective, start="importance")


def picks_equal(a: Sequence[Picks], b: Sequence[Picks]) -> bool:
    return [dict(p) for p in a] == [dict(p) for p in b]


def test_a_solution_survives_its_file() -> None:
    solution = Solution([{"alpha": 2}, {"alpha": 1}], {"block0/alpha": [0.6, 0.4]}, 0.1)
    again = Solution(**json.loads(json.dumps({k: getattr(solution, k) for k in ("picks", "probabilities", "price")})))
    assert picks_equal(again.picks, solution.picks) and again == solution
