"""Weights on disk: safetensors, or a torch file read without its pickled code."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nas.machine.files import write_atomically
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
BACKBONE = "supernet.backbone."  # where an objective's state dict holds the weights


def save_weights(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, atomically."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    write_atomically(path, lambda p: save_file(tensors, p, dict(metadata or {})))


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
        if state.get("basis"):
            raise UserError(
                f"{path}: these weights stand in a rotated basis; give large.safetensors or supernet.safetensors of a"
                " finished run, which are timm's own (--resume finishes this one)"
            )
        own = {n.removeprefix(BACKBONE): t for n, t in state["objective"].items() if n.startswith(BACKBONE)}
        state = state.get("ema") or own
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} holds no state dict; expected tensors by parameter name")
    return {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in state.items()}
