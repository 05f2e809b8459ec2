"""`import nas`: what it costs, what it gives, and a round trip through all of it on the smallest ViT."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import nas
from nas.config import RetrainConfig, SearchConfig
from nas.library import COMMAND_LINE, config_of
from nas.networks.architecture import slices_of
from nas.networks.basis_file import basis_of
from search_spaces.errors import UserError
from search_spaces.registry import SPACES
from tests.nas import tiny
from tests.oracle import randomise

ROOT = Path(__file__).parents[2]
KWARGS = tiny.VIT[1] | dict(num_classes=10)
FAST: dict[str, Any] = dict(epochs=1, batch_size=512)


def supernet(**options: Any) -> nas.Supernet:
    torch.manual_seed(0)
    return nas.Supernet(timm.create_model(tiny.VIT[0], **KWARGS | options)).eval()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_import_is_light_until_a_name_is_used() -> None:
    """In a process of its own."""
    heavy = ("torch", "timm", "nni", "matplotlib", "scipy", "pandas", "nas.library")
    script = f"import sys, nas; dir(nas); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_every_name_is_there_and_no_module_bears_it() -> None:
    assert set(nas.__all__) <= set(dir(nas))
    assert all(callable(getattr(nas, name)) for name in nas.__all__)
    folder = Path(str(nas.__file__)).parent
    assert timm.is_model("t2t_vit_14")
    assert [name for name in nas.__all__ if (folder / name).exists() or (folder / f"{name}.py").exists()] == []
    with pytest.raises(AttributeError, match="module 'nas' has no attribute 'serch'"):
        nas.serch  # noqa: B018


def test_from_a_search_to_a_loaded_network(tmp_path: Path) -> None:
    options = dict(model=tiny.VIT[0], model_kwargs=tiny.VIT[1], **FAST)
    found = nas.search("vit-dan-nano", alphas=[1, 2], budget=0.6, output=str(tmp_path / "found"), **options)
    assert found == tmp_path / "found"
    trained = nas.retrain(str(found), output=tmp_path / "trained", **FAST)
    arch, network = nas.Architecture.load(str(trained / "arch.json")), nas.load(str(trained))
    assert arch.flops <= 0.6 * arch.backbone_flops
    images = torch.randn(3, *arch.input_size)
    large = timm.create_model(arch.model, num_classes=10, **arch.model_kwargs)
    timm.models.load_checkpoint(large, str(trained / "large.safetensors"))
    assert not network.training
    assert torch.allclose(nas.cut(large.eval(), arch)(images), network(images), atol=1e-6)


def test_an_architecture_by_hand_is_cut_saved_and_loaded(tmp_path: Path) -> None:
    net, images = supernet(), torch.randn(2, 3, 16, 16)
    arch = nas.pick(net, "vit-dan", [{"alpha": 2}, {"alpha": 1}], model_kwargs=KWARGS)
    small = nas.cut(net, arch)
    assert sum(p.numel() for p in small.parameters()) == arch.params < arch.backbone_params == net.params()
    assert torch.equal(small(images), nas.cut(net.backbone, arch)(images))
    nas.save(small, str(tmp_path / "small"), arch)
    assert {p.name for p in (tmp_path / "small").iterdir()} == {"arch.json", "compact.safetensors", "config.json"}
    assert torch.equal(nas.load(tmp_path / "small")(images), small(images))
    assert nas.Architecture.load(tmp_path / "small") == arch
    assert torch.allclose(nas.cut(net, net.identity())(images), net.backbone(images), atol=1e-6)
    inner = nas.pick(net, "vit-dan", [{"alpha": 2}, {"alpha": 1}], width="inner", model_kwargs=KWARGS)
    assert inner.width == "inner" and inner.flops > arch.flops


@pytest.mark.parametrize("alphas", [(2, 2), (2, 1)], ids=["one width", "several widths"])
def test_a_network_that_was_rewritten_is_cut_in_its_basis(alphas: tuple[int, ...], tmp_path: Path) -> None:
    net, x = supernet(), pictures(2, seed=1)
    randomise(net.backbone, 0)
    expected = net.large(x)
    basis = nas.rewrite(net, pictures(40).split(16))
    assert torch.allclose(net.large(x), expected, rtol=1e-4, atol=1e-5)
    assert basis.orders.keys() == {f"blocks.{i}.{part}" for i in range(2) for part in ("heads", "hidden")}
    arch = nas.pick(net, "vit-dan", [{"alpha": alpha} for alpha in alphas], model_kwargs=KWARGS)
    assert arch.basis == {"streams": [0], "sha256": basis.digest()} and arch.permutation == {}
    small = nas.cut(net, arch)
    assert torch.allclose(small(x), net.small(x, slices_of(arch, net.shapes)), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="rewrite the network in it first"):
        nas.cut(supernet(), arch)
    nas.save(small, tmp_path / "small", arch, basis)
    assert torch.equal(nas.load(tmp_path / "small")(x), small(x))
    again = nas.Architecture.load(tmp_path / "small")
    written = basis_of(again, tmp_path / "small")  # by which a retrain goes
    assert again == arch and written is not None and written.digest() == basis.digest()
    with pytest.raises(UserError, match="stands in another basis"):
        nas.save(small, tmp_path / "other", arch, nas.rewrite(supernet(), pictures(16, seed=2).split(8)))
    assert not (tmp_path / "other").exists()


def test_a_stream_that_cannot_be_rotated_is_ordered(tmp_path: Path) -> None:
    net, x = supernet(final_norm=False), pictures(2, seed=1)
    randomise(net.backbone, 0)
    expected = net.large(x)
    basis = nas.rewrite(net, [])
    assert torch.allclose(net.large(x), expected, rtol=1e-4, atol=1e-5)
    arch = nas.pick(net, "vit-dan", [{"alpha": 2}] * 2, model_kwargs=KWARGS | dict(final_norm=False))
    assert arch.basis == {} and arch.permutation == basis.orders and "stream.0" in basis.orders
    nas.save(nas.cut(net, arch), tmp_path, arch, basis)
    assert {p.name for p in tmp_path.iterdir()} == {"arch.json", "compact.safetensors", "config.json"}


def test_too_few_images_leave_a_network_as_it_was() -> None:
    net = supernet()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    for images in ([], pictures(15).split(8)):
        with pytest.raises(UserError, match=r"16 channels is not rotated on \d+ images; give at least 16"):
            nas.rewrite(net, images)
    assert net.basis is None and all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_a_pick_that_could_not_be_built_again_is_refused() -> None:
    picks = [{"alpha": 2}] * 2
    for kwargs in (None, KWARGS | dict(num_heads=4), KWARGS | dict(img_size=24)):
        with pytest.raises(UserError, match="is not the supernet's backbone; give in model_kwargs"):
            nas.pick(supernet(), "vit-dan", picks, model_kwargs=kwargs)
    with pytest.raises(UserError, match="no name in timm"):
        nas.pick(nas.Supernet(timm.models.VisionTransformer(**KWARGS)), "vit-dan", picks, model_kwargs=KWARGS)
    with pytest.raises(UserError, match=r"the swin-\* spaces take SwinTransformer"):
        nas.pick(supernet(), "swin-dan", picks, model_kwargs=KWARGS)


@pytest.mark.parametrize("kind", [SearchConfig, RetrainConfig])
def test_every_default_is_a_value_of_its_option(kind: Any) -> None:
    own = {f.name: f.default for f in fields(kind) if f.name not in COMMAND_LINE}
    assert config_of(kind, "search", own) == kind()
    for space in SPACES.values():
        given = dict(space.training) | dict(space.search if kind is SearchConfig else space.retrain)
        config = config_of(kind, "search", {name: value for name, value in given.items() if name in own})
        assert all(getattr(config, name) == value for name, value in given.items() if name in own)


def test_options_are_read_as_on_the_command_line() -> None:
    options = dict(data_dir="/data", alphas=[1, 2], model_kwargs=dict(img_size=32, depths=(1, 2)), lr=1)
    config = config_of(SearchConfig, "search", options)
    assert config.data_dir == Path("/data") and config.alphas == (1, 2) and config.lr == 1.0
    assert config.model_kwargs == ("img_size=32", "depths=(1, 2)")


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "a name misspelt": (dict(bugdet=0.5), TypeError, r"nas.search\(\) has no option 'bugdet'; expected budget"),
    "a name unlike any": (dict(xyz=1), TypeError, "expected one of docs/options.md"),
    "the command line's own": (dict(list_spaces=True), TypeError, "no option 'list_spaces'"),
    "no such choice": (dict(width="wide"), UserError, r"width is 'wide'; expected .*stream.*inner"),
    "text for a number": (dict(epochs="3"), UserError, "epochs is '3'; expected int"),
    "a number for text": (dict(model=3), UserError, "model is 3; expected str"),
    "yes for a number": (dict(epochs=True), UserError, "epochs is True"),
    "one number for two": (dict(scale=(0.1,)), UserError, "scale is"),
    "a number for several": (dict(alphas=2), UserError, "alphas is 2"),
    "a value that no run can use": (dict(budget=1.5), UserError, "--budget 1.5"),
    "a space misspelt": (dict(space="swin-dna"), UserError, "unknown space 'swin-dna'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, kind, says = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=says):
        nas.search(**options)
    assert list(tmp_path.iterdir()) == []


def test_a_retrain_names_its_own_mistakes() -> None:
    with pytest.raises(TypeError, match=r"nas.retrain\(\) has no option 'budget'"):
        nas.retrain("nowhere", budget=0.5)
    with pytest.raises(UserError, match="nowhere: no such file"):
        nas.retrain("nowhere")
