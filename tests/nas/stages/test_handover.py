"""Section 2.8: an architecture found with one number of classes is retrained with another."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import nas.stages.retrain
import nas.stages.search
from nas.config import RetrainConfig, SearchConfig
from nas.networks.backbone import Start, TimmModel, starting_backbone
from nas.networks.opening import meta_supernet
from nas.networks.weights import load_weights
from nas.stages.retrain import run_retrain
from nas.stages.search import run_search
from search_spaces.architecture import load_architecture
from search_spaces.registry import get_space
from supernets.importance import permute
from supernets.supernet import Supernet
from tests.nas.tiny import VIT

WNIDS = ImageNetInfo("imagenet-1k").label_names()
FEW, MORE = (3, 10, 500, 999), (3, 10, 77, 500, 640, 999)  # ImageNet's indices of the two datasets' classes
KWARGS = tuple(f"{k}={v}" for k, v in VIT[1].items())


def write_folder(root, classes):
    random = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 2)):
        for index in classes:
            folder = root / part / WNIDS[index]
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search on four ImageNet classes from a checkpoint of a thousand: (folder of the run, checkpoint, root)."""
    root = tmp_path_factory.mktemp("handover")
    torch.manual_seed(0)
    base = timm.create_model(VIT[0], num_classes=1000, **VIT[1])
    with torch.no_grad():  # else timm starts every bias at 0 and every norm at 1
        for p in base.parameters():
            p.add_(0.02 * torch.randn_like(p))
    save_file(base.state_dict(), root / "base.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.stages.search, "plot_run", lambda folder: [])
        config = SearchConfig(
            space="vit-dan-nano",
            model=VIT[0],
            model_kwargs=KWARGS,
            checkpoint=root / "base.safetensors",
            basis="order",
            importance="magnitude",
            dataset="folder",
            data_dir=write_folder(root / "few", FEW),
            budget=0.6,
            epochs=1,
            batch_size=8,
            workers=0,
            output=root / "search",
        )
        return run_search(config), root / "base.safetensors", root


def retrain(monkeypatch, folder, data, output, **more):
    """Run stage 2 and return the weights it began with, and what it said."""
    begun = []
    fit = nas.stages.retrain.fit

    def watched(training, *rest):
        backbone = training.objective.supernet.backbone
        begun.append({name: t.clone() for name, t in backbone.state_dict().items()})
        fit(training, *rest)

    monkeypatch.setattr(nas.stages.retrain, "fit", watched)
    monkeypatch.setattr(nas.stages.retrain, "images_per_second", lambda *a: {})
    monkeypatch.setattr(nas.stages.retrain, "plot_run", lambda folder: [])
    config = RetrainConfig(
        arch=folder, dataset="folder", data_dir=data, epochs=1, batch_size=8, workers=0, output=output, **more
    )
    run_retrain(config)
    return begun[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_other_classes_start_from_the_permuted_original_weights(searched, monkeypatch, tmp_path, capsys):
    folder, checkpoint, _root = searched
    data = write_folder(tmp_path / "more", MORE)
    begun = retrain(monkeypatch, folder, data, tmp_path / "run")
    said = capsys.readouterr().out
    assert "kept the rows of the dataset's 6 ImageNet classes" in said and "from the original weights" in said

    found = load_architecture(folder)
    assert any(order != sorted(order) for order in found.permutation.values()), "the permutation permutes nothing"
    base, _, fresh = starting_backbone(*VIT, 6, Start(checkpoint=checkpoint), [WNIDS[i] for i in MORE])
    rows = load_weights(checkpoint)["head.weight"][list(MORE)]
    assert not fresh and torch.equal(base.head.weight, rows)
    permute(Supernet(base), found.permutation)
    assert same(begun, base.state_dict())

    arch = load_architecture(tmp_path / "run")
    assert (found.num_classes, arch.num_classes) == (4, 6)
    meta = meta_supernet(TimmModel(*VIT), 6, get_space("vit-dan-nano"))
    assert (arch.backbone_flops, arch.backbone_params) == (meta.flops(), meta.params())
    width = arch.stage_widths[0]
    assert arch.flops - found.flops == 2 * width and arch.params - found.params == 2 * (width + 1)
    assert (arch.blocks, arch.permutation) == (found.blocks, found.permutation)


def test_the_same_classes_start_where_the_search_arrived_unless_asked_otherwise(searched, monkeypatch, tmp_path):
    folder, checkpoint, root = searched
    begun = retrain(monkeypatch, folder, root / "few", tmp_path / "supernet")
    assert same(begun, load_weights(folder / "supernet.safetensors"))
    begun = retrain(monkeypatch, folder, root / "few", tmp_path / "base", init="base")
    base, _, _ = starting_backbone(*VIT, 4, Start(checkpoint=checkpoint), [WNIDS[i] for i in FEW])
    permute(Supernet(base), load_architecture(folder).permutation)
    assert same(begun, base.state_dict())


def test_the_averaged_weights_begin_in_the_order_that_the_weights_are_in(searched, monkeypatch, tmp_path):
    _, checkpoint, root = searched

    def begun(training, *_):
        weights, averaged = training.objective.supernet.backbone.state_dict(), training.ema.module.state_dict()
        assert same(weights, averaged) and not same(weights, load_weights(checkpoint))
        raise KeyboardInterrupt

    monkeypatch.setattr(nas.stages.retrain, "fit", begun)
    own = dict(model=VIT[0], model_kwargs=KWARGS, checkpoint=checkpoint, basis="order", model_ema=True)
    data = dict(dataset="folder", data_dir=root / "few", epochs=1, batch_size=8, workers=0)
    with pytest.raises(KeyboardInterrupt):
        run_retrain(RetrainConfig(space="vit-an-nano", alpha=2, output=tmp_path / "run", **own, **data))


def test_the_supernet_may_be_asked_for_with_other_classes(searched, monkeypatch, tmp_path, capsys):
    folder, _, _ = searched
    data = write_folder(tmp_path / "more", MORE)
    begun = retrain(monkeypatch, folder, data, tmp_path / "run", init="supernet")
    assert "head.weight: 4 classes in" in capsys.readouterr().out
    arrived = load_weights(folder / "supernet.safetensors")
    body = [name for name in arrived if not name.startswith("head.")]
    assert all(torch.equal(begun[name], arrived[name]) for name in body)
    assert begun["head.weight"].shape == (6, 16)
