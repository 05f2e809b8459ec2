"""Weights on disk: safetensors, or a torch file read without its pickled code."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.data.listing import few
from nas.machine.files import write_atomically
from nas.networks.state_dicts import unwrapped, without_wrappers
from nas.networks.transformers_names import of_transformers, timm_names
from search_spaces.errors import UserError, reason

# what torch.load raises on a file that is not its own: bytes that happen to be opcodes fail anywhere
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
)
IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar")
ZIP = b"PK"  # what a torch file begins with
BACKBONE = "supernet.backbone."  # where an objective's state dict holds the weights


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    write_atomically(path, lambda p: save_file(tensors, p, dict(metadata or {})))


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict under timm's names (docs/weights.md), from safetensors, a torch file (weights_only), or a folder.

    Out of the dictionaries and wrappers that training scripts put around it, the averaged weights first; Hugging Face
    Transformers' names of ViT, DeiT and Swin as timm has them; a training checkpoint of this toolkit as well.
    """
    path = weights_file(path)
    state = _read(path)
    if isinstance(state, dict) and "format" in state and isinstance(state.get("objective"), dict):
        if state.get("basis"):
            raise UserError(
                f"{path}: these weights stand in a rotated basis; give large.safetensors or supernet.safetensors of a"
                " finished run, which are timm's own (--resume finishes this one)"
            )
        own = {n.removeprefix(BACKBONE): t for n, t in state["objective"].items() if n.startswith(BACKBONE)}
        state = state.get("ema") or own
    tensors = unwrapped(state)
    if tensors is None:
        held = f"; it holds {few(state, 4)}" if isinstance(state, Mapping) else f"; it is a {type(state).__name__}"
        raise UserError(f"{path} holds no state dict{held}; expected tensors by parameter name")
    return timm_names(tensors) if of_transformers(tensors) else without_wrappers(tensors)


def weights_file(path: Path) -> Path:
    """The file itself, or the one of a folder, as timm and Transformers write it. UserError where there is none."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file; give --checkpoint a safetensors or torch file, or a folder with one")
    for name in IN_FOLDERS:
        if (path / name).is_file():
            return path / name
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(files) == 1:
        return files[0]
    held = f"holds {few((p.name for p in files), 4)}" if files else "holds no weights"
    raise UserError(f"{path} {held}; give --checkpoint one file ({', '.join(SUFFIXES)})")


def _read(path: Path) -> Any:
    """What a file holds, by what its first bytes say that it is."""
    with open(path, "rb") as file:
        first = file.read(9)
    if (path.suffix == ".safetensors" and not first.startswith(ZIP)) or first[8:] == b"{":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        # by the content, not the name; timm and DeiT save their options so
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        classes = _classes_in(path, str(error))
        if classes:
            raise UserError(
                f"{path} holds more than tensors: {', '.join(classes)}, which would run as code and is not loaded; save"
                " the weights alone where that class is known: torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        raise UserError(f"{path} is not a readable torch file of weights: {reason(error)}") from None


def _classes_in(path: Path, words: str) -> list[str]:
    """The classes for which torch refuses a file that it could read. words: its refusal."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except UNREADABLE:  # its older format
        found = re.findall(r"Unsupported (?:global|class): (?:GLOBAL )?([\w.]+)", words)
    return [str(name) for name in found if name != "argparse.Namespace"]
