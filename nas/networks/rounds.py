"""Compression in rounds: the compact network of a finished run is the large network of another search.

What that finds is an architecture of the same backbone, narrower still: free widths are absolute. So its arch.json is
like any other, but that `search` names under "round" the run that it goes on from, and the hashes of that run's files;
large.json beside it holds the architecture of the network whose weights supernet.safetensors and large.safetensors are.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nas.networks.architecture import slices_of
from nas.networks.backbone import TimmModel
from nas.networks.basis_file import streams_of
from nas.networks.compact_file import WEIGHTS
from search_spaces.architecture import Architecture, load_architecture, save_architecture
from search_spaces.errors import UserError
from search_spaces.slices import BlockSlice, count
from supernets.supernet import Supernet

LARGE_ARCH = "large.json"
ARCH = "arch.json"
ROUND = "round"  # in `search` of arch.json


@dataclass(frozen=True)
class Round:
    """A finished run whose compact network is compressed further. sha256: of its files, by their names."""

    folder: Path
    arch: Architecture
    sha256: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """What arch.json of the next round says of it."""
        return {"run": str(self.folder), "sha256": dict(self.sha256)}

    @property
    def model(self) -> TimmModel:
        """The compact network, as a timm model that is cut down."""
        return TimmModel(self.arch.model, dict(self.arch.model_kwargs), self.arch)

    @property
    def weights(self) -> Path:
        """The file of the compact network's weights."""
        return self.folder / WEIGHTS


def round_of(path: Path) -> Round:
    """The run of a folder, or of an arch.json in one. UserError where it left no compact network."""
    if not path.exists():
        raise UserError(f"--arch {path}: no such file or folder; give the folder of a finished run")
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name != ARCH:
        raise UserError(f"--arch {path}: expected a run's folder, or the {ARCH} in it")
    arch = load_architecture(path)
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"--arch {path}: no {WEIGHTS} there, so no compact network to go on from; train it first: python retrain.py"
            f" --arch {path}"
        )
    return Round(folder, arch, {name: _sha256(folder / name) for name in (ARCH, WEIGHTS)})


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_widths(found: Round, original: Supernet) -> None:
    """UserError with the feature where free widths do not describe a compact network. original: its backbone."""
    subnet = slices_of(found.arch, original.shapes)
    for i, (shape, kept) in enumerate(zip(original.shapes, subnet.blocks, strict=True)):
        feature = other_than_widths(kept, subnet.stage_widths[shape.stage])
        if feature:
            raise UserError(
                f"--arch {found.folder}: {found.arch.space} left block {i} with {feature}, which free widths do not"
                " describe; give a run whose blocks keep one number of channels, heads and neurons each"
            )


def other_than_widths(kept: BlockSlice, stage_width: int) -> str | None:
    """What a block has that is no width of its own, in words."""
    if not kept.attn and not kept.mlp:
        return None
    if kept.stream != stage_width:
        return f"{kept.stream} of the {stage_width} channels of its stage"
    if kept.mlp and kept.mlp_stream is not None:
        return f"an MLP that reads {count(kept.mlp_stream)} of its {kept.stream} channels"
    if kept.attn and isinstance(kept.v_channels, tuple) and len({len(v) for v in kept.v_channels}) > 1:
        return "heads that keep different numbers of v channels"
    return None


def narrowed_stem(found: Round, original: Supernet) -> dict[int, str]:
    """Why the first stage may not be rotated now: it was narrowed before, under a stem whose norm was cut with it.

    Rotated, that norm would be followed by a layer, which arch.json has only for a norm that is whole.
    """
    if original.adapter.stem_norm is None or 0 in streams_of(found.arch.basis):
        return {}
    narrow = found.arch.stage_widths[0] < original.shapes[0].embed_dim
    return {0: "an earlier round narrowed the norm that ends the stem, without a rotation"} if narrow else {}


def with_stem(arch_basis: Mapping[str, Any], large: Supernet) -> dict[str, Any]:
    """What arch.json says of a basis: the first stage is rotated, too, where an earlier round rotated it and cut it."""
    if large.adapter.stem_layer is None:
        return dict(arch_basis)
    return dict(arch_basis) | {"streams": sorted({0, *streams_of(arch_basis)})}


def save_round(found: Round, folder: Path) -> None:
    """large.json: the architecture of the large network; under "round" the run that it is of."""
    save_architecture(replace(found.arch, search={ROUND: found.record()}), folder / LARGE_ARCH)


def copy_round(source: Path, folder: Path) -> None:
    """The large.json of one folder in another."""
    save_architecture(load_architecture(source / LARGE_ARCH), folder / LARGE_ARCH)


def check_resumed(found: Round, folder: Path) -> None:
    """UserError where a run that is resumed began at another network."""
    path = folder / LARGE_ARCH
    if path.is_file() and load_architecture(path).search.get(ROUND) != found.record():
        raise UserError(
            f"{folder}: --resume from another compact network: the files of {found.folder} have changed since the run"
            " began; bring them back, or begin another run"
        )


def check_unchanged(arch: Architecture) -> None:
    """UserError where the run that an architecture's search went on from has moved, or its files have changed."""
    record = arch.search.get(ROUND)
    if not record:
        return
    folder = Path(record["run"])
    for name, expected in record["sha256"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; the search went on from that run, bring it back")
        if _sha256(folder / name) != expected:
            raise UserError(f"{folder / name} has changed since the search went on from it; bring it back as it was")


def large_model(arch: Architecture, folder: Path) -> TimmModel:
    """The large network of an architecture: timm's model or, of a further round, the one before's compact network.

    folder: that holds arch.json, and then large.json.
    """
    record, path = arch.search.get(ROUND), folder / LARGE_ARCH
    if not record:
        return TimmModel(arch.model, dict(arch.model_kwargs))
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; {ARCH} is of a search that went on from {record.get('run')}: copy the file with it"
        )
    return TimmModel(arch.model, dict(arch.model_kwargs), load_architecture(path))
