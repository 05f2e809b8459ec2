"""Spaces of free widths by hand: shown, picked, cut, saved and loaded again, in a basis."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import nas
from nas.config import RetrainConfig, SearchConfig, with_defaults
from nas.methods.table import training_of
from nas.networks.architecture import slices_of
from nas.networks.basis_file import basis_of
from nas.networks.compact_file import load_compact
from nas.spaces import costs_of, list_spaces
from search_spaces.errors import UserError
from search_spaces.registry import SPACES, get_space
from supernets.basis import rewrite
from supernets.calibration import Wanted, calibrate
from supernets.rotated import StreamNorm
from tests.oracle import randomise
from tests.strategies import images, qk_width

FREE = [name for name, space in SPACES.items() if space.method.name == "free"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-free-nano": (
        "vit_tiny_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5),
    ),
    "swin-free-nano": (
        "swin_tiny_patch4_window7_224",
        dict(img_size=20, patch_size=2, embed_dim=16, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=5),
    ),
    "t2t-free-nano": ("t2t_vit_7", dict(img_size=32, embed_dim=32, depth=3, num_heads=4, token_dim=4, num_classes=5)),
    "eva-free-nano": (
        "vit_small_patch16_dinov3", dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5),
    ),
    "beit-free-nano": (
        "beit_base_patch16_224", dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5),
    ),
    "relpos-free-nano": (
        "vit_srelpos_small_patch16_224",
        dict(img_size=16, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5),
    ),
}  # fmt: skip
over_spaces = pytest.mark.parametrize("space", MODELS)


def supernet(space: str, basis: bool) -> tuple[nas.Supernet, Any]:
    """A random network, float32; in a basis that is found on images, inside its heads too."""
    name, options = MODELS[space]
    net = nas.Supernet(randomise(timm.create_model(name, **options), 0)).eval()
    if not basis:
        return net, None
    stages = frozenset(shape.stage for shape in net.shapes)
    found = calibrate(net, images(net.backbone, 40).split(20), Wanted(stages, inside=True, error_order=True))
    rewrite(net, found)
    return net, found


def widths(net: nas.Supernet) -> list[dict[str, int]]:
    """Every block with widths of its own; the second without attention, the third without an MLP."""
    picks = []
    for i, shape in enumerate(net.shapes):
        E, H, d, M = shape.embed_dim, shape.num_heads, shape.head_dim, shape.hidden
        heads, hidden = (0 if i == 1 else H - i % 2), (0 if i == 2 else M // 2 + i)
        picks.append(
            dict(stream=3 * E // 4, heads=heads, qk=qk_width(shape, d - 1 - i), v=d - 2 + i % 2, hidden=hidden)
        )
    return picks


@over_spaces
@pytest.mark.parametrize("basis", [False, True], ids=["own", "rotated"])
def test_a_pick_is_cut_saved_and_loaded(space: str, basis: bool, tmp_path: Path) -> None:
    net, found = supernet(space, basis)
    x, kwargs = images(net.backbone, 3, 9), MODELS[space][1]
    arch = nas.pick(net, space, widths(net), model_kwargs=kwargs)
    small = nas.cut(net, arch)
    assert sum(p.numel() for p in small.parameters()) == arch.params < arch.backbone_params
    nas.save(small, tmp_path, arch, found)
    again = nas.Architecture.load(tmp_path)
    assert again.blocks == arch.blocks and again.method == "free" and again.basis == arch.basis
    assert bool(arch.basis) == basis and not arch.permutation
    if basis:
        read = basis_of(again, tmp_path)
        assert read is not None and read.digest() == found.digest() and read.v.keys() == set(net.adapter.block_names)
        turned = any(shape.qk_order for shape in net.shapes)
        assert read.qk.keys() == (set() if turned else read.v.keys())
    with torch.no_grad():
        expected = net.small(x, slices_of(arch, net.shapes))
        for network in (small, nas.load(tmp_path), load_compact(tmp_path)):
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(nas.load(tmp_path)(x), small(x))


@over_spaces
def test_its_names_are_timms(space: str) -> None:
    """In a basis too, as all blocks of a stage are as wide as it is; but for the layer that follows a stem's norm."""
    for basis in (False, True):
        net, _ = supernet(space, basis)
        small = nas.cut(net, nas.pick(net, space, widths(net), model_kwargs=MODELS[space][1]))
        own = set(small.state_dict()) - set(timm.create_model(MODELS[space][0], **MODELS[space][1]).state_dict())
        stem = net.adapter.stem_norm if basis else None
        assert all(stem is not None and name.startswith(f"{stem}.") for name in own)
        assert not [m for m in small.modules() if isinstance(m, StreamNorm)]


def test_a_network_in_another_basis_is_not_cut_or_saved_as_if_it_were_in_this(tmp_path: Path) -> None:
    net, found = supernet("vit-free-nano", True)
    arch = nas.pick(net, "vit-free-nano", widths(net), model_kwargs=MODELS["vit-free-nano"][1])
    plain, _ = supernet("vit-free-nano", False)
    with pytest.raises(UserError, match="rewrite the network in it first"):
        nas.cut(plain, arch)
    other = calibrate(plain, images(plain.backbone, 40, 8).split(20), Wanted(frozenset({0}), inside=True))
    with pytest.raises(UserError, match="stands in another basis"):
        nas.save(nas.cut(net, arch), tmp_path / "small", arch, other)
    assert other.digest() != found.digest() and not (tmp_path / "small").exists()


def test_a_basis_inside_the_heads_alone_is_named_too(tmp_path: Path) -> None:
    net, _ = supernet("vit-free-nano", False)
    found = calibrate(net, images(net.backbone, 40).split(20), Wanted(inside=True))
    rewrite(net, found)
    arch = nas.pick(net, "vit-free-nano", widths(net), model_kwargs=MODELS["vit-free-nano"][1])
    assert arch.basis == {"streams": [], "sha256": found.digest()} and not arch.permutation
    nas.save(nas.cut(net, arch), tmp_path, arch, found)
    read = basis_of(nas.Architecture.load(tmp_path), tmp_path)
    assert read is not None and read.digest() == found.digest()


MISTAKES: dict[str, tuple[dict[str, float], str]] = {
    "too many heads": (dict(heads=3), "block 1: heads 3 of 2; allowed: "),
    "too wide": (dict(qk=9), "block 1: qk 9 of 8; allowed: "),
    "no channel": (dict(v=0), "block 1: v 0 is no whole number of at least 1; allowed: "),
    "a half of a pair": (dict(qk=3), "block 1: qk 3, no multiple of the 2 channels that turn together; allowed: "),
    "another stream": (
        dict(stream=8), "block 1 has stream 8, block 0 of the same stage 12; they are to be the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_pick_that_does_not_fit_is_refused(mistake: str) -> None:
    change, says = MISTAKES[mistake]
    space = "eva-free-nano" if "pair" in mistake else "vit-free-nano"
    net, _ = supernet(space, False)
    picks: list[dict[str, float]] = [dict(pick) for pick in widths(net)]
    picks[1] |= change
    with pytest.raises(UserError, match=f"{space}: {says}"):
        nas.pick(net, space, picks, model_kwargs=MODELS[space][1])


@pytest.mark.parametrize("name", FREE)
def test_the_list_shows_what_a_search_of_the_space_offers(name: str) -> None:
    space = get_space(name)
    options = with_defaults(SearchConfig(space=name), space, "search")
    shown = costs_of(space).space
    assert shown.settings == training_of(space).settings(options, space)
    assert shown.settings.granularity == (1 if space.nano else 8)


@pytest.mark.slow
def test_the_list_has_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setattr("nas.spaces.all_spaces", lambda: {name: SPACES[name] for name in FREE})
    list_spaces()
    rows = [line for line in capsys.readouterr().out.splitlines() if "free" in line]
    assert [row.split("│")[1].strip() for row in rows] == FREE
    nano = next(row for row in rows if " vit-free-nano " in row)
    assert "stream 18 to 72; heads 6, 5, 4, 3, 2, 1, 0; qk 12, 11, 10" in nano and "hidden 288, 279" in nano


@pytest.mark.parametrize("space", SPACES.values(), ids=lambda space: space.name)
def test_every_default_of_a_space_is_of_an_option_that_waits_for_one(space: Any) -> None:
    """An option with a value of its own would never take that of the space."""
    for kind, own in ((SearchConfig, space.search), (RetrainConfig, space.retrain)):
        left_open = {field.name for field in fields(kind) if field.default is None}
        assert (dict(space.training) | dict(own)).keys() <= left_open
