"""Architecture and arch.json: what search.py writes and retrain.py reads."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from search_spaces.errors import UserError
from search_spaces.method import WIDTHS

SCHEMA = 2  # 2: basis


@dataclass(frozen=True)
class Architecture:
    """One candidate picked for each choice of each block, and what is needed to rebuild the network.

    blocks: per block the candidate of each choice by name and, where a choice is no prefix, the kept indices
    under "kept_<choice>". permutation: importance order by dimension name, applied to the original weights
    before slicing (section 2.7); empty when none was used. basis: where the stream was rotated, the stages ("streams")
    and the SHA-256 of what basis.safetensors beside arch.json holds ("sha256"), the orders among it. num_classes is a
    fact of the search, not part of what binds the architecture (section 2.8). flops in MACs.
    """

    space: str
    method: str
    model: str
    model_kwargs: Mapping[str, Any]
    input_size: tuple[int, int, int]
    num_classes: int
    width: str
    stage_widths: tuple[int, ...]
    blocks: tuple[Mapping[str, Any], ...]
    flops: int
    params: int
    backbone_flops: int
    backbone_params: int
    permutation: Mapping[str, list[int]] = field(default_factory=dict)
    basis: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    version: str = "0.1.0"
    schema: int = SCHEMA

    @classmethod
    def load(cls, path: str | Path) -> "Architecture":
        """That of an arch.json, or of the folder that holds one; errors as in load_architecture."""
        return load_architecture(Path(path))


def to_json(arch: Architecture) -> str:
    """The text of arch.json: one line per field, one per block, one per permuted dimension."""
    lines = []
    for name, value in asdict(arch).items():
        if name in ("blocks", "permutation") and value:
            rows = value if name == "blocks" else value.items()
            is_map = name == "permutation"
            text = [f"{json.dumps(r[0])}: {json.dumps(r[1])}" if is_map else json.dumps(r) for r in rows]
            opening, closing = ("{", "}") if is_map else ("[", "]")
            value_text = opening + "\n    " + ",\n    ".join(text) + "\n  " + closing
        else:
            value_text = json.dumps(value)
        lines.append(f"  {json.dumps(name)}: {value_text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def save_architecture(arch: Architecture, path: Path) -> None:
    """Write arch.json atomically. UserError where the disk will not have it."""
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(to_json(arch))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}; the file that was there is untouched") from error


# field -> (accepted JSON types, how to say it)
_EXPECTED: dict[str, tuple[tuple[type, ...], str]] = {
    "space": ((str,), "a string"),
    "method": ((str,), "a string"),
    "model": ((str,), "a timm model name"),
    "model_kwargs": ((dict,), "an object"),
    "input_size": ((list,), "[channels, height, width]"),
    "num_classes": ((int,), "a whole number"),
    "width": ((str,), " or ".join(WIDTHS)),
    "stage_widths": ((list,), "a list of whole numbers"),
    "blocks": ((list,), "a list of objects"),
    "flops": ((int,), "a whole number"),
    "params": ((int,), "a whole number"),
    "backbone_flops": ((int,), "a whole number"),
    "backbone_params": ((int,), "a whole number"),
    "permutation": ((dict,), "an object of index lists"),
    "basis": ((dict,), "an object of streams and sha256, or an empty one"),
    "search": ((dict,), "an object"),
    "version": ((str,), "a string"),
}


def load_architecture(path: Path) -> Architecture:
    """Read and validate arch.json. UserError names the file, the field and what was expected."""
    if path.is_dir():
        folder, path = path, path / "arch.json"
        several = sorted(each.name for each in folder.glob("arch-*.json"))
        if several and not path.is_file():
            raise UserError(f"{folder} holds a front, {', '.join(several)}; name one of these files")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give --arch the arch.json that search.py wrote")
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); the file is truncated or not an arch.json") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise UserError(f"{path}: no field 'schema'; this is not an arch.json of this toolkit")
    if not isinstance(data["schema"], int) or isinstance(data["schema"], bool) or data["schema"] < 1:
        raise UserError(f"{path}: field 'schema' is {data['schema']!r}; expected a whole number")
    if data["schema"] > SCHEMA:
        raise UserError(
            f"{path}: field 'schema' is {data['schema']}, this toolkit reads up to {SCHEMA};"
            f" it was written by version {data.get('version')}, upgrade to that"
        )
    if data["schema"] < 2:
        data.setdefault("basis", {})
    data["schema"] = SCHEMA
    for name, (types, words) in _EXPECTED.items():
        if name not in data:
            raise UserError(f"{path}: field '{name}' is missing; expected {words}")
        if not isinstance(data[name], types) or isinstance(data[name], bool):
            raise UserError(f"{path}: field '{name}' is {_short(data[name])}; expected {words}")
    unknown = set(data) - {f.name for f in fields(Architecture)}
    if unknown:
        raise UserError(f"{path}: unknown field '{min(unknown)}'; this toolkit writes schema {SCHEMA}")
    _check_values(path, data)
    for name in ("input_size", "stage_widths", "blocks"):
        data[name] = tuple(data[name])
    return Architecture(**data)


def _check_values(path: Path, data: dict[str, Any]) -> None:
    def whole(values: list[Any], at_least: int) -> bool:
        return all(isinstance(v, int) and not isinstance(v, bool) and v >= at_least for v in values)

    if data["width"] not in WIDTHS:
        raise UserError(f"{path}: field 'width' is {data['width']!r}; expected {' or '.join(WIDTHS)}")
    if data["num_classes"] < 0:
        raise UserError(f"{path}: field 'num_classes' is {data['num_classes']}; expected 0 (no classifier) or more")
    for name in ("flops", "params", "backbone_flops", "backbone_params"):
        if data[name] < 1:
            raise UserError(f"{path}: field '{name}' is {data[name]}; expected at least 1")
    if len(data["input_size"]) != 3 or not whole(data["input_size"], 1):
        raise UserError(
            f"{path}: field 'input_size' is {_short(data['input_size'])}; expected [channels, height, width]"
        )
    if not data["stage_widths"] or not whole(data["stage_widths"], 1):
        raise UserError(f"{path}: field 'stage_widths' is {_short(data['stage_widths'])}; expected whole numbers")
    if not data["blocks"]:
        raise UserError(f"{path}: field 'blocks' is empty; expected one object per transformer block")
    for i, block in enumerate(data["blocks"]):
        if not isinstance(block, dict):
            raise UserError(f"{path}: field 'blocks[{i}]' is {_short(block)}; expected an object")
        for name, value in block.items():
            good = whole(value, 0) if isinstance(value, list) else isinstance(value, int | float)
            if not good:
                raise UserError(f"{path}: field 'blocks[{i}].{name}' is {_short(value)}; expected a number or indices")
    _check_basis(path, data["basis"], len(data["stage_widths"]))
    for name, order in data["permutation"].items():
        if not isinstance(order, list) or not whole(order, 0) or sorted(order) != list(range(len(order))):
            raise UserError(f"{path}: field 'permutation.{name}' is {_short(order)}; expected a permutation")


def _check_basis(path: Path, basis: dict[str, Any], stages: int) -> None:
    if not basis:
        return
    streams, digest = basis.get("streams"), basis.get("sha256")
    known = isinstance(streams, list) and all(type(s) is int and 0 <= s < stages for s in streams)
    if set(basis) != {"streams", "sha256"} or not known:
        raise UserError(
            f"{path}: field 'basis' is {_short(basis)}; expected the rotated stages, of {stages}, under 'streams',"
            " and 'sha256'"
        )
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise UserError(f"{path}: field 'basis.sha256' is {_short(digest)}; expected 64 hexadecimal digits")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
