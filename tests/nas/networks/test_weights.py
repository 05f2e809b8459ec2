"""What is taken as weights (docs/weights.md): of which wrappers, names, sizes; and what a refusal says."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nas.config import SearchConfig
from nas.networks.backbone import Start, starting_backbone
from nas.networks.opening import model_of, start_of
from nas.networks.weights import load_weights
from search_spaces.errors import UserError
from search_spaces.registry import get_space
from tests.nas.finished import finished_run

VIT = ("vit_tiny_patch16_224", dict(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2))
DEIT = ("deit_tiny_patch16_224", VIT[1])
DISTILLED = ("deit_tiny_distilled_patch16_224", VIT[1])
SWIN = (
    "swin_tiny_patch4_window7_224",
    dict(img_size=32, embed_dim=12, depths=(2, 2), num_heads=(2, 4), window_size=4),
)
T2T = ("t2t_vit_7", dict(img_size=32, embed_dim=24, depth=2, num_heads=2, token_dim=8))
CLASSES = 5
Model = tuple[str, dict[str, Any]]
State = dict[str, Tensor]


def made(model: Model, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    network = timm.create_model(model[0], **dict(num_classes=CLASSES) | model[1] | more).eval()
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return network


def started(model: Model, path: Path, **more: Any) -> tuple[Any, list[str], bool]:
    network, lines, fresh = starting_backbone(model[0], model[1] | more, CLASSES, Start(checkpoint=path, seed=1))
    return network.eval(), lines, fresh


def holds(network: nn.Module, state: Mapping[str, Tensor]) -> bool:
    own = network.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: t.contiguous() for name, t in state.items()}


PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "encoder.",
    "_orig_mod.module.",
    "module._orig_mod.",
)
PREFIXES += ("model.backbone.", "module.model.net.", "model.encoder._orig_mod.", "network.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["safetensors", "torch"])
@pytest.mark.parametrize("model", [VIT, SWIN, T2T], ids=lambda m: m[0])
def test_prefixes_in_any_nesting(model: Model, form: str, prefix: str, tmp_path: Path) -> None:
    state, path = made(model).state_dict(), tmp_path / f"w.{form}"
    (save_file if form == "safetensors" else torch.save)(prefixed(prefix)(state), path)
    network, lines, fresh = started(model, path)
    assert holds(network, state) and not lines and not fresh


@pytest.mark.parametrize(
    "key", ["state_dict", "model", "model_state_dict", "net", "ema", "ema_state_dict", "model_ema"]
)
@pytest.mark.parametrize("around", ["beside", "nested"])
def test_keys_of_training_scripts(key: str, around: str, tmp_path: Path) -> None:
    state, other = made(VIT).state_dict(), made(VIT, seed=3).state_dict()
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    saved: dict[str, Any] = {"epoch": 3, "optimizer": optimizer, key: state}
    if "ema" in key:  # rather than the last weights
        saved["model"] = other
    torch.save(saved if around == "beside" else {"state_dict": {"model": saved}}, tmp_path / "w.pt")
    assert holds(started(VIT, tmp_path / "w.pt")[0], state)


def test_a_lightning_file(tmp_path: Path) -> None:
    """The module's own name for the network, a loss beside it, an average of the weights, hyperparameters."""
    state, other = made(VIT).state_dict(), made(VIT, seed=3).state_dict()
    saved = {"epoch": 3, "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 0.1}, "loops": {}}
    names = prefixed("model.")(state) | {"criterion.weight": torch.ones(3)}
    torch.save(saved | {"state_dict": names}, tmp_path / "w.ckpt")
    network, lines, _ = started(VIT, tmp_path / "w.ckpt")
    assert holds(network, state) and lines == [f"not used from {tmp_path / 'w.ckpt'}: criterion.weight"]
    torch.save(saved | {"state_dict": prefixed("model.")(other) | prefixed("ema_model.")(state)}, tmp_path / "w.ckpt")
    assert holds(started(VIT, tmp_path / "w.ckpt")[0], state)
    parts = {("" if name.startswith("head.") else "backbone.") + name: t for name, t in state.items()}
    torch.save(saved | {"state_dict": parts}, tmp_path / "w.ckpt")
    assert holds(started(VIT, tmp_path / "w.ckpt")[0], state)


def test_a_file_is_what_its_content_says(tmp_path: Path) -> None:
    state = made(VIT).state_dict()
    torch.save(state, tmp_path / "torch.safetensors")
    save_file(dict(state), tmp_path / "safe.pth")
    for name in ("torch.safetensors", "safe.pth"):
        assert holds(started(VIT, tmp_path / name)[0], state)


def test_a_folder(tmp_path: Path) -> None:
    state = made(VIT).state_dict()
    with pytest.raises(UserError, match="holds no weights; give --checkpoint one file"):
        load_weights(tmp_path)
    torch.save(state, tmp_path / "a.pth")
    assert holds(started(VIT, tmp_path)[0], state)
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"holds a\.pth, b\.pth; give --checkpoint one file"):
        load_weights(tmp_path)
    save_file(dict(state), tmp_path / "model.safetensors")
    assert holds(started(VIT, tmp_path)[0], state)


def test_timms_own_folders_as_a_model(tmp_path: Path) -> None:
    from timm.models._hub import save_for_hf

    network = made(VIT)
    network.pretrained_cfg = dict(network.pretrained_cfg) | dict(mean=(0.1, 0.2, 0.3), num_classes=CLASSES)
    save_for_hf(network, tmp_path, model_args=VIT[1], safe_serialization=True)
    options = SearchConfig(model=f"local-dir:{tmp_path}", model_kwargs=("drop_rate=0.1",), pretrained=True)
    model, start = model_of(options, get_space("vit-dan")), start_of(options, 0)
    assert model.name == VIT[0] and model.kwargs["embed_dim"] == 24 and model.kwargs["drop_rate"] == 0.1
    json.dumps(dict(model.kwargs))  # as arch.json holds it
    loaded, lines, _ = starting_backbone(model.name, model.kwargs, CLASSES, start)
    assert holds(loaded, network.state_dict()) and not lines
    assert tuple(loaded.pretrained_cfg["mean"]) == (0.1, 0.2, 0.3)  # type: ignore[index,operator]
    for wrong in ("local-dir:nowhere", f"local-dir:{tmp_path / 'config.json'}"):
        with pytest.raises(UserError, match=r"no config\.json as timm writes it"):
            model_of(SearchConfig(model=wrong), get_space("vit-dan"))


def test_a_compact_network_is_no_backbone(tmp_path: Path) -> None:
    finished_run(tmp_path)
    with pytest.raises(UserError, match=r"search\.py --arch FOLDER compresses it further"):
        model_of(SearchConfig(model=f"local-dir:{tmp_path}"), get_space("swin-dan"))


# Hugging Face Transformers


def transformers_names(state: State, family: str, modules: bool) -> State:
    """A state dict of timm's as Transformers names it, in its files or (modules) in its modules since version 5."""
    renamed: State = {}
    for name, t in state.items():
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        name = name.replace("patch_embed.norm.", "embeddings.norm.").replace(
            "pos_embed", "embeddings.position_embeddings"
        )
        name = name.replace("cls_token", "embeddings.cls_token").replace("dist_token", "embeddings.distillation_token")
        if name.startswith("norm."):
            name = "layernorm." + name.removeprefix("norm.")
        name = name.replace(".norm1.", ".layernorm_before.").replace(".norm2.", ".layernorm_after.")
        if not modules:
            name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        name = name.replace(".attn.proj.", ".attention.o_proj." if modules else ".attention.output.dense.")
        inner = "attention" if family != "swin" else "self"
        table = "relative_position_bias" if modules else "self"
        name = name.replace(".attn.relative_", f".attention.{table}.relative_")
        if family == "swin":
            if "downsample" in name:
                stage = int(name.split(".")[1])
                name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
            name = name.replace("layers.", "encoder.layers.").replace("head.fc.", "classifier.")
        else:
            name = name.replace("blocks.", "layers." if modules else "encoder.layer.")
        if name.startswith("head_dist."):
            name = name.replace("head_dist.", "distillation_classifier.")
        elif name.startswith("head."):
            name = name.replace("head.", "cls_classifier." if family == "deit" else "classifier.")
        else:
            name = name if "classifier" in name else f"{family}.{name}"
        if ".attn.qkv." not in name:
            renamed[name] = t
            continue
        for part, rows in zip(("query", "key", "value"), t.chunk(3), strict=True):
            to = f".attention.{part[0]}_proj." if modules else f".attention.{inner}.{part}."
            renamed[name.replace(".attn.qkv.", to)] = rows.clone()
    return renamed


@pytest.mark.parametrize("modules", [False, True], ids=["files", "modules"])
@pytest.mark.parametrize(("family", "model"), [("vit", VIT), ("deit", DISTILLED), ("swin", SWIN)])
def test_names_of_transformers(family: str, model: Model, modules: bool, tmp_path: Path) -> None:
    state = made(model).state_dict()
    names = transformers_names(state, family, modules)
    save_file(names, tmp_path / "model.safetensors")
    torch.save({"state_dict": prefixed("model._orig_mod.")(names)}, tmp_path / "wrapped.ckpt")
    for path in (tmp_path, tmp_path / "wrapped.ckpt"):
        network, lines, fresh = started(model, path)
        assert holds(network, state) and not lines and not fresh


@pytest.mark.parametrize("family", ["vit", "deit", "swin"])
@pytest.mark.parametrize("saved", ["save_pretrained", "torch.save"])
def test_networks_of_transformers_themselves(family: str, saved: str, tmp_path: Path) -> None:
    """Random ones, logits against logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small: dict[str, Any] = dict(image_size=32, num_labels=CLASSES, initializer_range=0.3)
    vit = small | dict(
        patch_size=16, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        layer_norm_eps=1e-6,
    )  # fmt: skip
    swin = small | dict(patch_size=4, embed_dim=12, depths=[2, 2], num_heads=[2, 4], window_size=4)
    model, make, config = {
        "vit": (VIT, transformers.ViTForImageClassification, transformers.ViTConfig(**vit)),
        "deit": (DISTILLED, transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig(**vit)),
        "swin": (SWIN, transformers.SwinForImageClassification, transformers.SwinConfig(**swin)),
    }[family]
    theirs = make(config).eval()
    if saved == "save_pretrained":
        theirs.save_pretrained(tmp_path)
    else:
        torch.save({"model": theirs.state_dict()}, tmp_path / "w.pt")
    network, lines, fresh = started(model, tmp_path)
    assert not lines and not fresh
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x).logits, rtol=1e-4, atol=1e-4)


# Other sizes


def test_a_distillation_token_more_or_less(tmp_path: Path) -> None:
    with_token, without = made(DISTILLED), made(DEIT)
    torch.save(with_token.state_dict(), tmp_path / "with.pt")
    torch.save(without.state_dict(), tmp_path / "without.pt")
    network, lines, fresh = started(DEIT, tmp_path / "with.pt")
    assert "dist_token: left out" in lines[0] and not fresh
    assert torch.equal(network.pos_embed, with_token.pos_embed[:, [0, *range(2, 6)]])
    assert torch.equal(network.head.weight, with_token.head.weight)
    network, lines, fresh = started(DISTILLED, tmp_path / "without.pt")
    assert "begins as the class token" in lines[0] and not fresh
    assert torch.equal(network.dist_token, without.cls_token) and torch.equal(network.head_dist.bias, without.head.bias)
    assert torch.equal(network.pos_embed[:, 2:], without.pos_embed[:, 1:])


@pytest.mark.parametrize("model", [VIT, SWIN], ids=lambda m: m[0])
@pytest.mark.parametrize("channels", [1, 4])
def test_other_input_channels_as_timm_adapts_them(model: Model, channels: int, tmp_path: Path) -> None:
    large = made(model)
    torch.save(large.state_dict(), tmp_path / "w.pt")
    network, lines, _ = started(model, tmp_path / "w.pt", in_chans=channels)
    assert lines == [
        f"patch_embed.proj.weight: 3 input channels in {tmp_path / 'w.pt'}, {channels} here; adapted as timm does"
    ]
    if channels == 1:
        grey = torch.randn(2, 1, 32, 32)
        torch.testing.assert_close(network(grey), large(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (VIT, dict(img_size=(48, 32))), (VIT, dict(img_size=64, patch_size=8)), (DISTILLED, dict(img_size=(32, 64))),
        (SWIN, dict(img_size=64)), (SWIN, dict(img_size=(64, 48), window_size=8)), (SWIN, dict(window_size=(2, 4))),
        (T2T, dict(img_size=64)),
    ],
)  # fmt: skip
def test_other_image_and_window_sizes(model: Model, size: dict[str, Any], tmp_path: Path) -> None:
    torch.save(made(model).state_dict(), tmp_path / "w.pt")
    network, lines, fresh = started(model, tmp_path / "w.pt", **size)
    height, width = (size.get("img_size", 32),) * 2 if isinstance(size.get("img_size", 32), int) else size["img_size"]
    assert network(torch.randn(1, 3, height, width)).isfinite().all() and not lines and not fresh


def test_positions_that_are_not_square(tmp_path: Path) -> None:
    """As they are; at another size where the size that they were made for is said, as in timm's own config.json."""
    wide = made(VIT, img_size=(32, 64))
    torch.save(wide.state_dict(), tmp_path / "w.pt")
    assert holds(started(VIT, tmp_path / "w.pt", img_size=(32, 64))[0], wide.state_dict())
    overlay = dict(input_size=(3, 32, 64))
    network, _, _ = started(VIT, tmp_path / "w.pt", img_size=(48, 64), pretrained_cfg_overlay=overlay)
    from timm.layers import resample_abs_pos_embed

    expected = resample_abs_pos_embed(wide.pos_embed, [3, 4], [2, 4])
    torch.testing.assert_close(network.pos_embed.detach(), expected.detach())


# Refused


class OfAScript:
    """An object that a training script pickles."""


@pytest.mark.parametrize("older", [False, True])
def test_a_class_in_the_file_is_named(older: bool, tmp_path: Path) -> None:
    saved = {"model": made(VIT).state_dict(), "config": OfAScript()}
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=not older)
    with pytest.raises(UserError) as refused:
        load_weights(tmp_path / "w.pt")
    words = str(refused.value)
    assert f"{OfAScript.__module__}.OfAScript" in words and "torch.save(model.state_dict(), 'weights.pt')" in words
    assert "\x1b" not in words and "\n" not in words


@pytest.mark.parametrize("model", [VIT, DISTILLED, SWIN, T2T], ids=lambda m: m[0])
def test_what_nothing_fits_is_refused_with_both_names(model: Model, tmp_path: Path) -> None:
    torch.save({f"of_something.{i}": torch.zeros(3) for i in range(6)}, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"it holds of_something\.0, of_something\.1, .* and 2 more") as refused:
        started(model, tmp_path / "w.pt")
    if model != T2T:
        first = ", ".join([*timm.create_model(model[0], **model[1]).state_dict()][:3])
        assert f"wanted are {first}" in str(refused.value)


@pytest.mark.parametrize(
    "saved", [{"a": [1, 2]}, [torch.zeros(2)], torch.zeros(2), {}, {"model": {}}, {"epoch": 3, "w": torch.ones(1)}, 7]
)
def test_what_is_no_state_dict_is_refused(saved: Any, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt holds no state dict"):
        load_weights(tmp_path / "w.pt")
