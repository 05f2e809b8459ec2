"""A training state on the disk: whole or not there, versioned, never a plain pickle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nas.machine.files import write_atomically
from nas.networks.weights import UNREADABLE
from search_spaces.errors import UserError, reason

FORMAT = 2  # 1: only of whole epochs


class Unreadable(UserError):
    """A checkpoint that is torn, or none."""


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
        raise Unreadable(f"{path} is not a readable checkpoint: truncated or foreign ({reason(error)})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is not a checkpoint of this toolkit (no format field)")
    if state["format"] > FORMAT:
        raise UserError(f"{path} has format {state['format']}, this toolkit reads up to {FORMAT}; upgrade it")
    return state
