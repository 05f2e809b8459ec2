"""What accuracy on held-out images decides at the end of a search: the stage widths."""

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

import nas.searchers.decide
from nas.searchers.gradient import Gradient
from search_spaces.registry import SPACES
from supernets.supernet import Supernet
from tests.nas.small import small_costs


def searched(budget: float | None = 0.25, full_stage_width: bool = False) -> Gradient:
    """A search over the nano Swin, its logits drawn."""
    space = SPACES["swin-dan-nano"]
    supernet = Supernet(timm.create_model(space.model, num_classes=10, **space.model_kwargs))
    costs = small_costs(supernet, "stream", full_stage_width=full_stage_width)
    objective = Gradient(supernet, costs, budget=budget, gamma=0.0, seed=0, total_steps=10)
    generator = torch.Generator().manual_seed(0)
    for eta in objective.choices.eta:
        eta.data = torch.randn(len(eta), generator=generator)
    return objective


def decide(objective: Gradient, top1: list[float] | None, monkeypatch: pytest.MonkeyPatch, n: int = 1000) -> Any:
    """The decision when the finalists have these accuracies on n images; None: nothing is held out."""

    def measured(networks: dict[str, Any], *_: Any) -> dict[str, float]:
        assert top1 is not None
        return {f"{name}_top1": value for name, value in zip(networks, top1, strict=True)}

    monkeypatch.setattr(nas.searchers.decide, "top_k", measured)
    loaders = SimpleNamespace(val=SimpleNamespace(num_images=n), held_out="held out")
    prepared: Any = SimpleNamespace(supernet=objective.supernet, loaders=loaders, device=torch.device("cpu"))
    finalists = objective.finalists() if top1 is not None else [objective.selection()]
    taken, measured = nas.searchers.decide.decide([objective.subnet_of(p) for p, _ in finalists], prepared, Any)
    return *finalists[taken], measured


def test_the_likeliest_within_a_standard_error_of_the_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = searched()
    entries = objective.finalists()
    assert len(entries) > 2 and entries[0] == objective.selection()
    far = [2.0] * (len(entries) - 3)
    for top1, expected in (
        ([20.0, 20.9, 20.0, *far], 0),  # the standard error of 20.9 % on 1000 images is 1.3
        ([10.0, 19.8, 20.9, *far], 1),
        ([10.0, 19.0, 20.9, *far], 2),
    ):
        picks, selection, measured = decide(objective, top1, monkeypatch)
        assert (picks, selection) == entries[expected]
        assert [row["taken"] for row in measured].index(True) == expected
        assert [row["held_out_top1"] for row in measured] == top1
        assert [row["flops"] for row in measured] == [s.cost for _, s in entries if s is not None]
        assert len({tuple(row["stage_widths"]) for row in measured}) == len(entries)
    few_images, *_ = decide(objective, [10.0, 19.0, 20.9, *far], monkeypatch, n=400)
    assert few_images == entries[1][0]


def test_where_there_is_one_combination_or_no_held_out_image_the_probabilities_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for objective, top1 in (
        (searched(), None),
        (searched(budget=None), []),
        (searched(full_stage_width=True), []),
    ):
        picks, selection, measured = decide(objective, top1, monkeypatch)
        assert (picks, selection) == objective.selection() and measured == []
