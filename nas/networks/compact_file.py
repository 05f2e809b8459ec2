"""A compact network on disk: compact.safetensors beside its arch.json, enough to rebuild it without the supernet."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.data.listing import few
from nas.machine.files import write_text
from nas.networks.architecture import cut_down, slices_of
from nas.networks.backbone import build, classifier_names, on_meta
from nas.networks.basis_file import streams_of
from nas.networks.weights import load_weights, save_weights
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from supernets.basis import install_stages
from supernets.feature_head import FeatureHead
from supernets.supernet import Supernet

WEIGHTS = "compact.safetensors"
TIMM_CONFIG = "config.json"  # timm's own file; its architecture is the entry point of nas/timm_entry.py
TIMM_NAME = "compact"
PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of images, in timm's words


def save_compact(compact: nn.Module, folder: Path, arch: Architecture, data: Mapping[str, Any] | None = None) -> Path:
    """Write compact.safetensors, arch.json and the config.json by which timm opens the folder.

    data: how its images are prepared (mean, std, interpolation, crop_pct), where that is not the backbone's own way.
    Of a network with another number of classes than the architecture arch.json says its own, and its FLOPs and
    parameters; UserError, before anything is written, where the network is not that of the architecture otherwise.
    """
    arch = described(compact, arch)
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(arch, folder / "arch.json")
    path = folder / WEIGHTS
    save_weights(compact.state_dict(), path, {"num_classes": str(arch.num_classes)})
    net: Any = compact
    own = {name: net.pretrained_cfg.get(name) for name in PREPARATION}
    own |= {"input_size": arch.input_size, "fixed_input_size": True, "num_classes": arch.num_classes}
    if max(arch.input_size[1:]) <= 64:
        own["crop_pct"] = 1.0  # as in training: nas.data.loaders
    own |= {name: value for name, value in (data or {}).items() if value is not None}
    config = {"architecture": TIMM_NAME, "num_classes": arch.num_classes, "num_features": net.num_features}
    config["pretrained_cfg"] = {name: value for name, value in own.items() if value is not None}
    write_text(folder / TIMM_CONFIG, json.dumps(config, indent=2) + "\n")
    return path


def load_compact(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    **model_kwargs: Any,
) -> nn.Module:
    """The compact network of a folder that holds arch.json and compact.safetensors, in eval mode.

    pretrained False: timm's initial weights. num_classes: another number than it was trained with takes a new
    classifier, 0 takes none; of a network without one that is what it was cut to give: as many features as before the
    cut. model_kwargs: arguments of the timm model that replace the architecture's, such as
    img_size (position embeddings and tables are resized as timm does) or drop_path_rate.
    Raises UserError when a file is missing, truncated or does not belong to the other.
    """
    arch = load_architecture(folder)
    weights = load_weights(folder / WEIGHTS) if pretrained else {}
    classes = [t.shape[0] for name, t in weights.items() if name in ("head.weight", "head.fc.weight")]
    if pretrained and not classes:
        raise UserError(f"{folder / WEIGHTS} holds no classifier (head.weight or head.fc.weight)")
    trained_with = classes[0] if classes and arch.num_classes else arch.num_classes
    compact: Any = build_compact(arch, num_classes or trained_with, model_kwargs)
    if pretrained:
        if "img_size" in model_kwargs:
            weights = sys.modules[type(compact).__module__].checkpoint_filter_fn(weights, compact)
        fresh = num_classes is not None and num_classes != trained_with
        new = [name for name in weights if fresh and name.startswith(tuple(classifier_names(compact)))]
        own = compact.state_dict()
        try:
            compact.load_state_dict(weights | {name: own[name] for name in new})
        except RuntimeError as error:
            lines = str(error).splitlines()
            raise UserError(
                f"{folder / WEIGHTS} does not belong to {folder / 'arch.json'}: {' '.join(lines[1:3])}"
            ) from None
    if num_classes == 0 and trained_with:
        compact.reset_classifier(0)
    if (folder / TIMM_CONFIG).is_file():
        saved = json.loads((folder / TIMM_CONFIG).read_text())["pretrained_cfg"]
        lists = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        compact.pretrained_cfg = compact.default_cfg = dict(compact.pretrained_cfg) | lists
    return compact.to(device).eval()  # type: ignore[no-any-return]


def build_compact(arch: Architecture, num_classes: int, model_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """The compact network's modules, with timm's initial weights cut to size."""
    arguments = dict(arch.model_kwargs) | dict(model_kwargs or {})
    return cut_down(build(arch.model, arguments, num_classes=num_classes), arch)


def with_classes(arch: Architecture, num_classes: int) -> Architecture:
    """The architecture with so many classes, and what it and its backbone cost then."""
    with on_meta():
        supernet = Supernet(build(arch.model, arch.model_kwargs, num_classes=num_classes))
        install_stages(supernet, streams_of(arch.basis))
    subnet = slices_of(arch, supernet.shapes)
    return replace(
        arch,
        num_classes=num_classes,
        flops=supernet.flops(subnet),
        params=supernet.params(subnet),
        backbone_flops=supernet.flops(),
        backbone_params=supernet.params(),
    )


def described(compact: nn.Module, arch: Architecture) -> Architecture:
    """The architecture with the number of classes that a network has. UserError where it is another network."""
    net: Any = compact
    classifiers = [net.get_submodule(name) for name in classifier_names(net)]
    if not classifiers or not all(isinstance(layer, nn.Linear) for layer in classifiers):
        raise UserError(
            "the network has no linear classifier, and arch.json says of how many classes; give it one by"
            " reset_classifier(num_classes), or keep its state_dict() yourself"
        )
    num_classes = 0 if isinstance(classifiers[0], FeatureHead) else classifiers[0].out_features
    if num_classes != arch.num_classes:
        arch = with_classes(arch, num_classes)
    with on_meta():
        expected = _sizes(build_compact(arch, num_classes))
    found = _sizes(compact)
    differ = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    if differ:
        words = few([f"{n} {found.get(n, 'missing')}, there {expected.get(n, 'missing')}" for n in differ], 3)
        raise UserError(
            f"the network is not the one that the architecture describes: {words}; for another input size open it at"
            " that size (nas.load(FOLDER, img_size=...)) and keep its state_dict() yourself, merge adapters first"
        )
    return arch


def _sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every tensor by its name, and of the images that the modules expect."""
    tensors = {name: tuple(t.shape) for name, t in (*network.named_parameters(), *network.named_buffers())}
    images = {f"{name}.img_size": m.img_size for name, m in network.named_modules() if hasattr(m, "img_size")}
    return tensors | images
