"""A basis on disk: basis.safetensors beside its arch.json, which has the hash of what it holds."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.networks.weights import load_weights, save_weights
from search_spaces.architecture import Architecture
from search_spaces.errors import UserError
from supernets.basis import Basis

BASIS = "basis.safetensors"


def save_basis(basis: Basis, folder: Path) -> None:
    """Write basis.safetensors, atomically."""
    save_weights(basis.tensors(), folder / BASIS)


def read_basis(folder: Path) -> Basis:
    """The basis of a folder. UserError when the file is missing or is none."""
    path = folder / BASIS
    if not path.is_file():
        raise UserError(f"{path}: no such file; the architecture stands in a rotated basis, copy the file beside it")
    try:
        return Basis.of_tensors(load_weights(path))
    except ValueError as error:
        raise UserError(f"{path} is not a basis of this toolkit: {error}") from None


def recorded(basis: Basis) -> dict[str, Any]:
    """What arch.json says of the basis that it stands in."""
    return {"streams": sorted(basis.streams), "sha256": basis.digest()}


def basis_of(arch: Architecture, folder: Path) -> Basis | None:
    """The basis that an architecture stands in; None where it has none. UserError when the folder holds another."""
    if not arch.basis:
        return None
    basis, path = read_basis(folder), folder / BASIS
    found, expected = basis.digest(), arch.basis["sha256"]
    of_file = hashlib.sha256(path.read_bytes()).hexdigest()  # which the first arch.json of schema 2 name
    if expected not in (found, of_file):
        raise UserError(
            f"{path} holds a basis of SHA-256 {found[:12]}…, arch.json names {expected[:12]}…; they are of different"
            " runs: bring the basis.safetensors that was written with this arch.json"
        )
    return basis


def streams_of(basis: Mapping[str, Any]) -> tuple[int, ...]:
    """The rotated stages of an architecture's basis."""
    return tuple(basis.get("streams", ()))
