"""The basis of a run: found on its training images, the same for a seed, written down before it is applied."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import nas.training.basis
from nas.networks.basis_file import BASIS, basis_of, read_basis
from nas.training.basis import PERMUTATION, Standing, find_basis
from nas.training.calibration import calibration_images, deciding_images, images_from, to_score
from nas.training.plan import BasisPlan
from nas.training.prepared import Prepared
from search_spaces.architecture import Architecture
from supernets.basis import Basis
from supernets.supernet import Supernet
from tests.nas import tiny
from tests.nas.small import small_supernet
from tests.oracle import randomise

ROTATE = BasisPlan("rotate", (0,))
SWIN = dict(img_size=16, embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=2)


def network() -> Supernet:
    return Supernet(randomise(tiny.supernet().backbone, 0))


def swin() -> Supernet:
    torch.manual_seed(0)
    return Supernet(randomise(timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, **SWIN), 0))


def run(folder: Path, plan: BasisPlan = ROTATE, net: Supernet | None = None, **options: Any) -> tuple[Any, Prepared]:
    """Options and a run before it trains, on 32 images unless the plan says otherwise."""
    folder.mkdir(exist_ok=True)
    plan = replace(plan, images=plan.images or 32)
    known = {name: options.pop(name) for name in ("fresh_classifier",) if name in options}
    config = tiny.config(folder, **dict(calibration_images=24) | options)
    return config, tiny.prepared(config, net or network(), plan=plan, **known)


def found(folder: Path, *args: Any, **options: Any) -> Basis:
    """What find_basis writes down."""
    assert find_basis(*run(folder, *args, **options)).basis
    return read_basis(folder)


def same(a: Basis, b: Basis) -> bool:
    first, second = a.tensors(), b.tensors()
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def test_a_seed_has_one_basis(tmp_path: Path) -> None:
    first = found(tmp_path / "a")
    torch.manual_seed(99)  # whatever was drawn before
    assert same(first, found(tmp_path / "b"))
    other = found(tmp_path / "c", seed=7)
    assert not torch.allclose(first.streams[0], other.streams[0])  # other 24 of the 32 images


def test_loader_processes_make_no_difference(tmp_path: Path) -> None:
    assert same(found(tmp_path / "none", workers=0), found(tmp_path / "two", workers=2))


def test_the_batch_makes_none_but_for_rounding(tmp_path: Path) -> None:
    first, second = found(tmp_path / "a", batch_size=8), found(tmp_path / "b", batch_size=5)
    assert torch.allclose(first.streams[0], second.streams[0], atol=1e-3)


def test_it_is_written_down_before_it_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nas.training.basis, "rewrite", stop)
        with pytest.raises(KeyboardInterrupt):
            find_basis(*run(tmp_path / "run"))
    written = (tmp_path / "run" / BASIS).read_bytes()
    for name in ("calibrate", "taylor_pass", "magnitude_scores"):
        monkeypatch.setattr(nas.training.basis, name, stop)  # a resume computes nothing
    options, prepared = run(tmp_path / "run", resume=True)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = prepared.supernet.eval().large(x)
    standing = find_basis(options, prepared)
    assert standing.basis["streams"] == [0] and (tmp_path / "run" / BASIS).read_bytes() == written
    assert torch.allclose(prepared.supernet.large(x), expected, rtol=1e-4, atol=1e-5)
    assert prepared.supernet.adapter.streams.keys() == {0} and prepared.supernet.basis is not None


def test_a_new_run_does_not_take_what_lies_there(tmp_path: Path) -> None:
    first = found(tmp_path, seed=7)
    assert not same(first, found(tmp_path, seed=8))


def test_what_is_recorded_opens_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standing = find_basis(*run(tmp_path))
    assert standing.permutation == {} and [p.name for p in tmp_path.iterdir()] == [BASIS]
    arch = Architecture(
        "vit-dan-nano", "dan", *tiny.VIT, (3, 16, 16), 4, "stream", (16,), ({"alpha": 2},) * 2, 1, 1, 1, 1,
        basis=standing.basis,
    )  # fmt: skip
    assert basis_of(arch, tmp_path) is not None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("stream rotated: the first half of its channels holds ")
    assert line.endswith("% of the energy; heads and neurons sorted by importance (magnitude)")


HEADS = {f"blocks.{i}.{part}" for i in range(2) for part in ("heads", "hidden")}


@pytest.mark.parametrize("importance", ["none", "magnitude", "taylor", "error"])
def test_heads_and_neurons_are_ordered_by_importance(importance: str, tmp_path: Path) -> None:
    basis = found(tmp_path, importance=importance)
    assert basis.streams.keys() == basis.energy.keys() == {0} and not basis.qk and not basis.v
    assert basis.orders.keys() == (set() if importance == "none" else HEADS)
    assert all(sorted(order) == list(range(len(order))) for order in basis.orders.values())


def test_importances_differ_and_the_rotation_does_not(tmp_path: Path) -> None:
    found_by = {kind: found(tmp_path / kind, importance=kind) for kind in ("none", "magnitude", "taylor", "error")}
    rotations = [basis.streams[0] for basis in found_by.values()]
    assert all(torch.equal(q, rotations[0]) for q in rotations)
    hidden = [basis.orders["blocks.0.hidden"] for kind, basis in found_by.items() if kind != "none"]
    assert hidden[0] != hidden[1] != hidden[2] != hidden[0]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_new_classifier_is_ordered_by_magnitude(
    fresh: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found(tmp_path, fresh_classifier=fresh)
    assert f"importance ({'magnitude' if fresh else 'taylor'})" in capsys.readouterr().out


@pytest.mark.parametrize("importance", ["magnitude", "error"])
def test_a_stage_that_is_not_rotated_is_ordered(importance: str, tmp_path: Path) -> None:
    basis = found(tmp_path, BasisPlan("rotate", (1,)), swin(), importance=importance)
    assert basis.streams.keys() == {1}
    assert {name for name in basis.orders if name.startswith("stream")} == {"stream.0"}
    assert basis.orders["stream.0"] != sorted(basis.orders["stream.0"])


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "error"])
def test_an_order_is_a_permutation_alone(importance: str, tmp_path: Path) -> None:
    options, prepared = run(tmp_path, BasisPlan("order"), importance=importance)
    standing = find_basis(options, prepared)
    assert standing.basis == {} and standing.permutation.keys() == HEADS | {"stream.0"}
    assert [p.name for p in tmp_path.iterdir()] == [PERMUTATION]
    assert json.loads((tmp_path / PERMUTATION).read_text()) == standing.permutation
    assert prepared.supernet.basis is None and not prepared.supernet.adapter.streams
    again = find_basis(*run(tmp_path, BasisPlan("order"), importance=importance, resume=True))
    assert again == standing


def test_nothing_is_nothing(tmp_path: Path) -> None:
    options, prepared = run(tmp_path, BasisPlan())
    before = {name: t.clone() for name, t in prepared.supernet.state_dict().items()}
    assert find_basis(options, prepared) == Standing()
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[name], t) for name, t in prepared.supernet.state_dict().items())


def pixels(batches: Any) -> Tensor:
    return torch.cat([images for images, _ in batches])


def first_images(loader: Any, count: int) -> Tensor:
    return pixels(images_from(loader, tiny.CPU, 0, count))


def test_images_are_the_training_part_as_it_is_evaluated(tmp_path: Path) -> None:
    """All of it, in an order drawn from the seed; no crop, flip or colour changes them."""
    _, prepared = run(tmp_path, color_jitter=0.9, hflip=1.0, batch_size=12)
    loader = prepared.loaders.calibration(0)
    assert (loader.num_images, loader.batch_size) == (32, 32)
    first = first_images(loader, 99)
    assert first.shape == (32, 3, 16, 16)
    assert torch.equal(first, first_images(prepared.loaders.calibration(0), 99))
    other = first_images(prepared.loaders.calibration(1), 99)
    assert not torch.equal(first, other)
    rows = [{tuple(image.flatten().tolist()) for image in part} for part in (first, other)]
    assert rows[0] == rows[1]
    mean, std = prepared.loaders.stats()
    images = tiny.noise(32)
    plain = [torch.from_numpy(np.array(images.read(i))).permute(2, 0, 1) / 255 for i in range(32)]
    expected = sorted(tuple(((image - mean) / std).flatten().tolist()) for image in plain)
    assert float((torch.tensor(expected) - torch.tensor(sorted(rows[0]))).abs().max()) < 1e-5


@pytest.mark.parametrize("count", [1, 12, 13, 32, 99])
def test_so_many_images_and_no_more(count: int, tmp_path: Path) -> None:
    _, prepared = run(tmp_path, batch_size=12)
    loader = prepared.loaders.calibration(0)
    assert len(first_images(loader, count)) == min(count, 32)


@pytest.mark.parametrize("deciding", [0, 1, 13, 32, 40])
def test_images_that_decide_are_first_and_calibrate_nothing(deciding: int, tmp_path: Path) -> None:
    """With their labels; in batches of their own, which need not be those of the loader."""
    images = 70
    options, prepared = run(tmp_path, BasisPlan(deciding=deciding, images=images - deciding))
    prepared = replace(prepared, loaders=tiny.loaders(options, prepared.supernet, images))
    whole = list(images_from(prepared.loaders.calibration(options.seed), tiny.CPU, 0, 99))
    deciders = list(deciding_images(options, prepared))
    others = list(calibration_images(options, prepared, images - deciding))
    for batches, part in ((deciders, slice(0, deciding)), (others, slice(deciding, None))):
        for i in (0, 1):
            expected = torch.cat([batch[i] for batch in whole])[part]
            assert torch.equal(torch.cat([batch[i] for batch in batches]) if batches else expected[:0], expected)
        assert all(0 < len(images) <= 32 for images, _ in batches)
    few = pixels(calibration_images(options, prepared, 5))
    assert torch.equal(few, pixels(others)[:5])


@pytest.mark.slow
def test_labels_are_drawn_anew_for_every_batch() -> None:
    """One image, again and again, gets each label as often as it is likely; a seed has its own."""
    supernet = small_supernet("vit")
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batches = [(image, torch.zeros(1, dtype=torch.long))] * 400

    def labels(seed: int) -> list[int]:
        return [int(y) for _, y in to_score(supernet, batches, False, seed)[0]]

    found = torch.bincount(torch.tensor(labels(0)), minlength=5) / 400
    torch.testing.assert_close(found, supernet.large(image).softmax(1)[0].detach().float(), atol=0.1, rtol=0)
    assert labels(0) == labels(0) != labels(1)
