"""Files that are whole or not there: temporary name, then rename. Weights never come from a plain pickle."""

import argparse
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from search_spaces.errors import UserError, reason

FORMAT = 1
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
BACKBONE = "supernet.backbone."  # where an objective's state dict holds the weights


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, rename it over `path`.

    Whatever goes wrong, `path` is the old file or the new one. A full disk is a UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; the file that was there is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def copy_atomically(source: Path, path: Path) -> None:
    """Give a file that is only ever replaced whole a second name: a hard link, or a copy where there are none."""

    def link_or_copy(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(path, link_or_copy)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda p: p.write_text(text))


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    write_atomically(path, lambda p: save_file(tensors, p, dict(metadata or {})))


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a training state atomically, versioned."""
    write_atomically(path, lambda p: torch.save({"format": FORMAT, **state}, p))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a training state of this toolkit; UserError when it is truncated, foreign or newer."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UNREADABLE as error:
        raise UserError(f"{path} is not a readable checkpoint: truncated or foreign ({reason(error)})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is not a checkpoint of this toolkit (no format field)")
    if state["format"] > FORMAT:
        raise UserError(f"{path} has format {state['format']}, this toolkit reads up to {FORMAT}; upgrade it")
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or a torch file (weights_only), unwrapped.

    Recognised wrappers: state_dict_ema, model_ema, state_dict, model, the averaged weights first, with whatever else
    a training script saved beside them; a training checkpoint of this toolkit; and the prefixes `module.` and
    `_orig_mod.` of DistributedDataParallel and torch.compile.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --checkpoint a safetensors or torch file")
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm and DeiT save their options so
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{path} is not a readable torch file of weights: {reason(error)}") from None
    if isinstance(state, dict) and "format" in state and isinstance(state.get("objective"), dict):
        own = {n.removeprefix(BACKBONE): t for n, t in state["objective"].items() if n.startswith(BACKBONE)}
        state = state.get("ema") or own
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict; expected tensors by parameter name")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in state.items()}
