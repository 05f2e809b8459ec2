"""A compact network on disk: compact.safetensors beside its arch.json, enough to rebuild it without the supernet."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.machine.files import write_text
from nas.networks.backbone import build, classifier_names
from nas.networks.weights import load_weights, save_weights
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.method import Picks, Settings, picks_of
from search_spaces.registry import METHODS, get_space
from search_spaces.slices import BlockShape, NetworkSlice, network_slice
from search_spaces.space import block_slices
from supernets.adapter import adapter_for
from supernets.compact import shrink
from supernets.supernet import Supernet

WEIGHTS = "compact.safetensors"
TIMM_CONFIG = "config.json"  # timm's own file; its architecture is the entry point of nas/timm_entry.py
TIMM_NAME = "compact"
PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # of images, in timm's words


def describe(
    supernet: Supernet,
    space: str,
    model: str,
    model_kwargs: Mapping[str, Any],
    picks: Sequence[Picks],
    width: str = "stream",
    kept: Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> Architecture:
    """The architecture of one candidate per choice and block, without a search; stages as wide as their widest slice.

    space: whose method the choices are of. model, model_kwargs: arguments of timm.create_model that make the
    supernet's backbone again. picks: {"alpha": 2} per block, in order. kept: where the method keeps no prefix, the
    indices per block, {"kept_channels": [0, 3, ...]}. Raises UserError when they do not fit.
    """
    method = get_space(space).method
    indices = kept if kept is not None else [{} for _ in picks]
    blocks = block_slices(space, method, Settings(width=width), supernet.shapes, picks, indices)
    subnet = network_slice(supernet.shapes, blocks)
    entries = tuple(dict(pick) | {k: list(v) for k, v in own.items()} for pick, own in zip(picks, indices, strict=True))
    return Architecture(
        space=space,
        method=method.name,
        model=model,
        model_kwargs=model_kwargs,
        input_size=supernet.adapter.input_size,
        num_classes=int(supernet.backbone.num_classes),  # type: ignore[arg-type]
        width=width,
        stage_widths=subnet.stage_widths,
        blocks=entries,
        flops=supernet.flops(subnet),
        params=supernet.params(subnet),
        backbone_flops=supernet.flops(),
        backbone_params=supernet.params(),
    )


def slices_of(arch: Architecture, shapes: tuple[BlockShape, ...]) -> NetworkSlice:
    """The subnet that an arch.json describes, over a backbone's blocks. UserError when they do not fit."""
    if arch.method not in METHODS:
        raise UserError(f"arch.json: unknown method {arch.method!r}; expected one of {', '.join(METHODS)}")
    method = METHODS[arch.method]
    for i, block in enumerate(arch.blocks):
        for name in method.choice_names:
            if name not in block:
                raise UserError(f"arch.json: field 'blocks[{i}].{name}' is missing; {arch.method} chooses it")
        for name in method.kept_names:
            if not isinstance(block.get(name), list):
                raise UserError(f"arch.json: field 'blocks[{i}].{name}' is missing; expected the indices kept")
    kept = [{k: v for k, v in block.items() if isinstance(v, list)} for block in arch.blocks]
    blocks = block_slices(
        arch.space,
        method,
        Settings(width=arch.width),
        shapes,
        [picks_of(block, method.choice_names) for block in arch.blocks],
        kept,
    )
    _check_stage_widths(arch, shapes, [b.stream for b in blocks])
    return NetworkSlice(tuple(blocks), arch.stage_widths)


def _check_stage_widths(arch: Architecture, shapes: tuple[BlockShape, ...], streams: list[int]) -> None:
    stages = 1 + max(shape.stage for shape in shapes)
    if len(arch.stage_widths) != stages:
        raise UserError(
            f"arch.json: field 'stage_widths' has {len(arch.stage_widths)} entries, {arch.model} has {stages}"
        )
    for stage, width in enumerate(arch.stage_widths):
        blocks = [i for i, shape in enumerate(shapes) if shape.stage == stage]
        low, high = max(streams[i] for i in blocks), shapes[blocks[0]].embed_dim
        if not low <= width <= high:
            raise UserError(f"arch.json: field 'stage_widths[{stage}]' is {width}; expected {low} to {high}")


def save_compact(compact: nn.Module, folder: Path, arch: Architecture, data: Mapping[str, Any] | None = None) -> Path:
    """Write compact.safetensors, arch.json and the config.json by which timm opens the folder.

    data: how its images are prepared (mean, std, interpolation, crop_pct), where that is not the backbone's own way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_architecture(arch, folder / "arch.json")
    path = folder / WEIGHTS
    save_weights(compact.state_dict(), path, {"num_classes": str(arch.num_classes)})
    net: Any = compact
    own = {name: net.pretrained_cfg.get(name) for name in PREPARATION}
    own |= {"input_size": arch.input_size, "fixed_input_size": True, "num_classes": arch.num_classes}
    if max(arch.input_size[1:]) <= 64:
        own["crop_pct"] = 1.0  # as in training: nas.setup
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
    classifier, 0 takes none. model_kwargs: arguments of the timm model that replace the architecture's, such as
    img_size (position embeddings and tables are resized as timm does) or drop_path_rate.
    Raises UserError when a file is missing, truncated or does not belong to the other.
    """
    arch = load_architecture(folder)
    weights = load_weights(folder / WEIGHTS) if pretrained else {}
    classes = [t.shape[0] for name, t in weights.items() if name in ("head.weight", "head.fc.weight")]
    if pretrained and not classes:
        raise UserError(f"{folder / WEIGHTS} holds no classifier (head.weight or head.fc.weight)")
    trained_with = classes[0] if classes else arch.num_classes
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
    if num_classes == 0:
        compact.reset_classifier(0)
    if (folder / TIMM_CONFIG).is_file():
        saved = json.loads((folder / TIMM_CONFIG).read_text())["pretrained_cfg"]
        lists = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        compact.pretrained_cfg = compact.default_cfg = dict(compact.pretrained_cfg) | lists
    return compact.to(device).eval()  # type: ignore[no-any-return]


def build_compact(arch: Architecture, num_classes: int, model_kwargs: Mapping[str, Any] | None = None) -> nn.Module:
    """The compact network's modules, with timm's initial weights cut to size."""
    model = build(arch.model, dict(arch.model_kwargs) | dict(model_kwargs or {}), num_classes=num_classes)
    return shrink(model, slices_of(arch, adapter_for(model).shapes))
