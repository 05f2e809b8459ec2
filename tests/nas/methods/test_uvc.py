"""UVC as a search: its gates, its steps, what it hands over, and the whole way to a compact network."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from hypothesis import given

import nas.stages.retrain
import nas.training.loop
from nas import describe
from nas.config import RetrainConfig, SearchConfig
from nas.networks.architecture import slices_of
from nas.networks.compact_file import load_compact
from nas.pictures.steps_figure import steps_figure
from nas.prices.costs import priced
from nas.prices.flops import FLOPS
from nas.searchers.minimax import Minimax
from nas.searchers.minimax_search import check_reach
from nas.searchers.primal_dual import GATE_START
from nas.stages.asked import resolve
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from nas.training.losses import cross_entropy
from nas.training.objective import Step
from search_spaces.architecture import load_architecture
from search_spaces.errors import UserError
from search_spaces.method import Settings
from search_spaces.registry import METHODS, get_space
from search_spaces.slices import BlockShape, BlockSlice, network_slice
from search_spaces.space import make_space
from supernets.compact import cut
from supernets.supernet import Supernet
from tests.nas.run_checks import assert_same_run, assert_whole, draw_pictures
from tests.nas.small import UVC_FAMILIES, small_supernet
from tests.oracle import oracle_logits
from tests.strategies import images
from tests.supernets.test_invariants import few

over_families = pytest.mark.parametrize("family", UVC_FAMILIES)
over_skips = pytest.mark.parametrize("skip", ["block", "attention", "mlp", "halves", "none"])


def search_of(supernet: Supernet, skip: str = "block", **options: Any) -> Minimax:
    """A search whose loss is the cross-entropy, with counts, gates and scores drawn from the seed."""
    space = make_space("test-uvc", METHODS["uvc"], Settings(), supernet.shapes)
    costs = priced(space, supernet.adapter.costs, FLOPS)
    own = dict(budget=0.5, gamma=0.0, seed=0, total_steps=20, warmup_steps=4, prune=True)
    objective = Minimax(supernet, costs, loss=lambda x, q, y: {"ce": cross_entropy(q, y)}, skip=skip, **own | options)
    return objective


def above_the_stem(supernet: Supernet, share: float) -> float:
    """The budget that leaves the blocks a share of theirs."""
    outer = supernet.adapter.costs.flops.at(supernet.identity().stage_widths) / supernet.flops()
    return outer + share * (1 - outer)


def disturb(objective: Minimax, seed: int) -> Minimax:
    """Counts and gates somewhere in the middle of a search."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.tensor([p.num_heads for p in objective.prices])
    dims = torch.tensor([p.head_dim for p in objective.prices]).repeat_interleave(heads)
    hidden = torch.tensor([p.hidden for p in objective.prices])
    for counts, size in (
        (objective.removed_heads, heads),
        (objective.removed_channels, dims),
        (objective.removed_hidden, hidden),
    ):
        counts.copy_(torch.rand(len(counts), generator=generator).double() * (size - 1))
    with torch.no_grad():
        objective.gates.add_(torch.randn(objective.gates.shape, generator=generator) * 2)
    return objective


@pytest.mark.slow
@over_families
@over_skips
@given(data=st.data())
@few
def test_0_2_3_whatever_a_search_selects_is_in_the_band_and_cut_exactly(
    family: str, skip: str, data: st.DataObject
) -> None:
    supernet = small_supernet(family, seed=data.draw(st.integers(0, 99)))
    budget = above_the_stem(supernet, data.draw(st.sampled_from([0.3, 0.6, 0.9])))
    objective = disturb(search_of(supernet, skip, budget=budget), data.draw(st.integers(0, 99)))
    picks, selection = objective.selection()
    subnet = objective.current_subnet()
    assert selection is not None and selection.cost == supernet.flops(subnet) <= budget * supernet.flops()
    assert selection.in_band
    removed = objective.plan().removed()
    assert sum(removed.values()) + selection.cost == supernet.flops()
    x = images(supernet.backbone)
    logits = supernet.small(x, subnet)
    compact = cut(supernet.backbone, subnet).eval()
    assert torch.allclose(compact(x), logits, rtol=1e-9, atol=1e-9)
    assert torch.allclose(oracle_logits(supernet.backbone, subnet, x), logits, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in compact.parameters()) == supernet.params(subnet)
    for name, pick, kept in zip(supernet.adapter.block_names, picks, subnet.blocks, strict=True):
        gone = pick["heads"] == pick["hidden"] == 0
        assert gone == (not kept.attn and not kept.mlp) == isinstance(compact.get_submodule(name), torch.nn.Identity)


@over_families
@over_skips
def test_a_gate_of_one_is_the_backbone_and_of_zero_the_skipped_network(family: str, skip: str) -> None:
    supernet = small_supernet(family)
    objective = search_of(supernet, skip)
    x = images(supernet.backbone)
    halves = [objective.halves(torch.full(objective.gates.shape[:2], v).double()) for v in (1.0, 0.0)]
    for keep in halves:
        mixed = supernet.small(x, objective.mixtures([{"keep": row} for row in keep]))
        blocks = [
            BlockSlice(s.embed_dim, s.num_heads, s.hidden, attn=bool(a), mlp=bool(m))
            for s, (a, m) in zip(supernet.shapes, keep.tolist(), strict=True)
        ]
        subnet = network_slice(supernet.shapes, blocks, full_stage_width=True)
        assert torch.allclose(mixed, supernet.small(x, subnet), rtol=1e-10, atol=1e-10)
        objective.multiplier.zero_()
        assert float(objective.drawn_cost([{"keep": row} for row in keep])) == supernet.flops(subnet)


def step_of(objective: Minimax, number: int) -> dict[str, torch.Tensor]:
    x = images(objective.supernet.backbone, batch=4)
    step = Step(number / 20, number, 20)
    terms = objective(x, torch.arange(4) % 5, step)
    objective.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    objective.after_step(step)
    return terms


def test_warm_up_holds_everything_and_gates_stand_at_one_half() -> None:
    objective = search_of(small_supernet("vit"))
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    assert [d["keep"].tolist() for d in objective.draw(Step(0, 3, 20))] == [[0.5, 0.5]] * 3
    assert "penalty" not in step_of(objective, 3)
    assert objective.gates.grad is not None and not objective.gates.grad.any()
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())
    assert "penalty" in step_of(objective, 4)
    assert objective.gates.grad is not None and objective.gates.grad.abs().min() > 0
    assert objective.multiplier > 1e-3 and (objective.removed_hidden > 0).all() and (objective.removed_heads > 0).all()
    assert objective.gates.detach()[0, 0].tolist() == list(GATE_START)


def test_the_smallest_groups_shrink_and_no_others() -> None:
    objective = search_of(small_supernet("vit"))
    objective.removed_hidden.fill_(5.0)
    objective.dual_hidden.fill_(1.0)
    fc2 = objective.supernet.backbone.blocks[1].mlp.fc2.weight  # type: ignore[union-attr, index]
    before = fc2.detach().clone()
    order = before.square().sum(0).argsort()
    step_of(objective, 10)
    ratio = (fc2.detach() / before).mean(0)
    expected = 1 / (1 + 2 * objective.rates.weights)
    assert torch.allclose(ratio[order[:5]], torch.tensor(expected).double())
    assert torch.equal(ratio[order[5:]], torch.ones_like(ratio[5:]))


def test_without_pruning_counts_stand_still() -> None:
    objective = search_of(small_supernet("swin"), prune=False)
    for number in range(4, 9):
        step_of(objective, number)
    assert (
        not objective.removed_heads.any()
        and not objective.removed_hidden.any()
        and not objective.removed_channels.any()
    )
    assert objective.found()["removed"].keys() == {"skipped", "heads", "channels", "neurons"}
    assert objective.found()["removed"]["neurons"] == 0


@pytest.mark.parametrize(("skip", "panels"), [("block", 6), ("halves", 7), ("attention", 6), ("none", 5)])
def test_the_picture_has_a_panel_for_everything_that_moves(skip: str, panels: int) -> None:
    objective = disturb(search_of(small_supernet("vit"), skip), 3)
    for number in range(6, 9):
        step_of(objective, number)
    rows = objective.step_rows()
    assert [row["step"] for row in rows] == [7, 8, 9] and objective.step_rows() == []
    figure = steps_figure(pd.DataFrame(rows), "title")
    assert figure is not None
    drawn = [axes for axes in figure.axes if axes.get_visible()]
    assert len(drawn) == panels
    assert [len(axes.lines) for axes in drawn] == [1, 3, *[3] * (panels - 2)]  # z; F; a line per block
    assert drawn[4].lines[1].get_ydata().tolist() == [row["neurons_1"] for row in rows]


def test_slices_of_picks() -> None:
    shape, method = BlockShape(0, 24, 3, 8, 48), METHODS["uvc"]
    whole = method.block_slice(shape, Settings(), {"heads": 3, "v_channels": 24, "hidden": 48}, {})
    assert whole == BlockSlice(24, 3, 48)
    kept = {"kept_v": [1, 7, 16], "kept_hidden": [0, 5]}
    some = method.block_slice(shape, Settings(), {"heads": 2, "v_channels": 3, "hidden": 2}, kept)
    assert some == BlockSlice(24, (0, 2), (0, 5), v_channels=((1, 7), (0,)))
    gone = method.block_slice(shape, Settings(), {"heads": 0, "v_channels": 0, "hidden": 2}, {})
    assert (gone.attn, gone.mlp, gone.hidden) == (False, True, 2)
    for picks, indices, says in (
        ({"heads": 2, "v_channels": 1, "hidden": 2}, {}, "v_channels 1 in heads 2 of 8"),
        ({"heads": 2, "v_channels": 3, "hidden": 2}, {"kept_v": [1, 2, 3]}, "lies in 1 heads, the choice is 2"),
        ({"heads": 2, "v_channels": 3, "hidden": 2}, {"kept_v": [1, 2]}, "holds 2 indices, the choice is 3"),
        ({"heads": 1, "v_channels": 2, "hidden": 2}, {"kept_v": [2, 1]}, "must rise"),
        ({"heads": 1, "v_channels": 2, "hidden": 2}, {"kept_hidden": [3, 48]}, "from 0 to 47"),
        ({"heads": 1, "v_channels": 2, "hidden": 49}, {}, "49 of 48"),
    ):
        with pytest.raises(ValueError, match=says):
            method.block_slice(shape, Settings(), picks, indices)


def test_options_that_make_no_uvc_search_are_refused() -> None:
    for flags, says in (
        (dict(budget=0.0), "give --budget or --gflops"),
        (dict(alphas=(1, 2)), "--alphas: vit-uvc-nano"),
        (dict(width="inner"), "--width inner"),
        (dict(gamma=1.0), "--gamma"),
        (dict(skip="none", arch_data="val"), "--skip none"),
        (dict(distill="none", teacher="vit_tiny_patch16_224"), "--distill none has none"),
        (dict(space="vit-dan-nano", skip="halves"), "--skip halves goes with method uvc"),
        (dict(space="vit-dan-nano", prune=False), "--no-prune goes with method uvc"),
        (dict(space="vit-dan-nano", distill="soft"), "--distill soft goes with method uvc"),
        (dict(space="vit-dan-nano", teacher="x"), "--teacher x goes with method uvc"),
    ):
        with pytest.raises(UserError, match=says):
            resolve(SearchConfig(**{"space": "vit-uvc-nano"} | flags))


def test_a_budget_below_what_gates_or_counts_alone_reach_is_refused() -> None:
    objective = search_of(small_supernet("vit"))
    check_reach(objective.costs, above_the_stem(objective.supernet, 0.04), "halves", True)
    for share, skip, prune in ((0.04, "none", True), (0.4, "attention", False)):
        with pytest.raises(UserError, match="cannot be met"):
            check_reach(objective.costs, above_the_stem(objective.supernet, share), skip, prune)


def test_published_defaults() -> None:
    space = get_space("deit-uvc")
    assert space.model == "deit_tiny_patch16_224" and get_space("t2t-uvc").model == "t2t_vit_14"
    config, _ = resolve(SearchConfig(space="deit-uvc"))
    assert (config.epochs, config.warmup_epochs, config.lr, config.weight_decay) == (30, 5, 1e-4, 0.05)
    assert (config.budget, config.distill_weight, config.distill_temperature) == (0.5, 0.1, 1.0)
    assert space.retrain["epochs"] == 120


TINY = dict(
    space="vit-uvc-nano",
    model_kwargs=("patch_size=8", "embed_dim=24", "depth=3", "num_heads=4"),
    dataset="folder",
    epochs=3,
    batch_size=16,
    val_fraction=0.2,
    warmup_epochs=1,
    workers=0,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchConfig, Path]:
    """A search from scratch on six classes of stripes."""
    root = tmp_path_factory.mktemp("uvc")
    own = dict(data_dir=draw_pictures(root / "pictures"), budget=0.6, arch_lr=0.01)
    config = SearchConfig(**TINY | own, output=root / "run")
    return config, run_search(config)


@pytest.mark.slow
def test_a_search_ends_in_the_band_and_its_architecture_retrains_to_a_compact_network(
    run: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = run
    arch = load_architecture(folder)
    assert 0.58 <= arch.flops / arch.backbone_flops <= 0.6
    assert sum(arch.search["removed"].values()) == pytest.approx(1 - arch.flops / arch.backbone_flops)
    assert arch.search["distill"] == "none"  # from scratch there is no teacher
    assert (folder / "steps.png").stat().st_size > 10_000
    header, *lines = (folder / "steps.csv").read_text().splitlines()
    assert header.startswith("step,z,expected,hard,budget,heads_0,channels_0,neurons_0") and len(lines) == 27
    monkeypatch.setattr(nas.stages.retrain, "images_per_second", lambda networks, *_: dict.fromkeys(networks, 1.0))
    data = {"dataset": "folder", "data_dir": config.data_dir, "workers": 0, "batch_size": 16, "epochs": 1}
    again = run_retrain(RetrainConfig(arch=folder, output=tmp_path / "small", **data))
    summary = json.loads((again / "summary.json").read_text())
    assert summary["compact_minus_subnet"] <= 1e-5
    rows = describe.rows_of(arch)
    assert sum(row.flops[0] for row in rows) == arch.flops
    compact, small = load_compact(again), load_architecture(again)
    assert sum(p.numel() for p in compact.parameters()) == small.params < small.backbone_params
    # UVC's own second stage, from the large network that the search left
    teacher = again / "large.safetensors"
    stage = RetrainConfig(arch=folder, output=tmp_path / "second", train="distill", teacher_checkpoint=teacher, **data)
    assert "teacher" in json.loads((run_retrain(stage) / "summary.json").read_text())


@pytest.mark.slow
def test_7_an_interrupted_search_resumes_to_the_same_run(
    run: tuple[SearchConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, undisturbed = run
    config = replace(config, output=tmp_path / "run")
    calls = iter(range(99))
    update = nas.training.loop.update_weights

    def interrupted(*args: Any) -> Any:
        if next(calls) == 20:  # in the third epoch
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch:
        patch.setattr(nas.training.loop, "update_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_search(config)
    assert_whole(tmp_path / "run")
    assert_same_run(run_search(replace(config, resume=True)), undisturbed)
    steps = [(f / "steps.csv").read_text() for f in (tmp_path / "run", undisturbed)]
    assert steps[0] == steps[1]


def test_arch_json_without_its_indices_is_refused(run: tuple[SearchConfig, Path]) -> None:
    arch = load_architecture(run[1])
    shapes = small_supernet("vit").shapes
    blocks = tuple({k: v for k, v in block.items() if k != "kept_v"} for block in arch.blocks)
    with pytest.raises(UserError, match=r"blocks\[0\].kept_v' is missing"):
        slices_of(dataclasses.replace(arch, blocks=blocks), shapes)
