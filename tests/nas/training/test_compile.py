"""--compile: one graph for the large and one for the small forward, whatever a search draws (torch's own counter)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import nas.stages.search
import nas.training.loop
from nas.config import SearchConfig
from nas.networks.backbone import build
from nas.networks.opening import model_of
from nas.networks.weights import save_weights
from nas.stages.search import run_search
from search_spaces.registry import get_space
from tests.nas.run_checks import draw_pictures

VIT = ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=4")
SWIN = ("depths=[1,1]", "embed_dim=16", "num_heads=[2,4]", "window_size=2")
EVA = ("patch_size=8", "embed_dim=24", "depth=2", "num_heads=3")
NETWORKS = {"vit": VIT, "eva": EVA, "swin": SWIN, "t2t": ("embed_dim=24", "depth=2", "num_heads=4")}
SEARCHED = ("vit-dan", "swin-joint", "t2t-kcr", "vit-uvc", "swin-free", "eva-free")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Counts the graphs that torch.compile makes, and runs them uncompiled."""
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile

    def counted(function: Callable[..., Any]) -> Any:
        return compile_(function, backend=counter, fullgraph=True)  # an error where a graph would break

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(nas.stages.search, "plot_run", lambda folder: None)
    yield counter
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHED)
def test_a_gradient_search_compiles_each_forward_once(
    name: str, counter: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[int] = []
    step = nas.training.loop.update_weights

    def watched(*arguments: Any) -> None:
        step(*arguments)
        after.append(counter.frame_count)

    monkeypatch.setattr(nas.training.loop, "update_weights", watched)
    family, method = name.split("-")
    config = SearchConfig(
        space=f"{name}-nano", model_kwargs=NETWORKS[family], dataset="folder", data_dir=pictures, workers=0,
        val_fraction=0.2, epochs=1, batch_size=16, budget=0.98 if family == "t2t" else 0.7, compile=True,
        output=tmp_path / "run",
    )  # fmt: skip
    if method == "free":  # of weights that were given
        model = model_of(config, get_space(config.space))
        backbone = build(model.name, model.kwargs, num_classes=len(list(pictures.iterdir())))
        save_weights(backbone.state_dict(), tmp_path / "start.safetensors")
        config = replace(config, searcher="gradient", start="uniform", checkpoint=tmp_path / "start.safetensors")
    run_search(config)
    assert len(after) > 6
    assert set(after) == {1 if method == "uvc" else 2}, after
