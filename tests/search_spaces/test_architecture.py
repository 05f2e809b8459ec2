"""arch.json: what is written is read back, and whatever is wrong with it is named by its field."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from search_spaces.architecture import SCHEMA, Architecture, load_architecture, save_architecture, to_json
from search_spaces.errors import UserError

ARCH = Architecture(
    space="swin-dan-nano",
    method="dan",
    model="swin_tiny_patch4_window7_224",
    model_kwargs={"img_size": 32, "depths": [2, 1], "drop_rate": 0.1, "class_token": False},
    input_size=(3, 32, 32),
    num_classes=10,
    width="stream",
    stage_widths=(24, 96),
    blocks=({"alpha": 2}, {"alpha": 4, "kept_count": [0, 3, 5]}, {"alpha": 1, "fraction": 0.75}),
    flops=123,
    params=45,
    backbone_flops=678,
    backbone_params=90,
    permutation={"stream0": [2, 0, 1], "blocks.0.heads": [1, 0]},
    search={"seed": 42, "budget": None},
)


def written(folder: Path, **changes: Any) -> Path:
    """An arch.json with some fields changed; a value of `gone` takes the field out."""
    data = json.loads(to_json(ARCH)) | changes
    path = folder / "arch.json"
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not gone}))
    return path


gone = object()


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    save_architecture(ARCH, tmp_path / "arch.json")
    assert load_architecture(tmp_path / "arch.json") == ARCH
    assert load_architecture(tmp_path) == ARCH  # the folder will do
    assert [p.name for p in tmp_path.iterdir()] == ["arch.json"]
    bare = replace(ARCH, permutation={}, search={}, basis={"streams": [0, 1], "sha256": "0a" * 32})
    save_architecture(bare, tmp_path / "arch.json")  # over the old one
    assert load_architecture(tmp_path) == bare


def test_an_older_schema_is_read(tmp_path: Path) -> None:
    """Schema 1 knew no basis."""
    assert load_architecture(written(tmp_path, schema=1, basis=gone)) == ARCH and ARCH.basis == {}


def test_the_text_is_json_with_a_line_per_block() -> None:
    text = to_json(ARCH)
    assert json.loads(text) == json.loads(json.dumps(asdict(ARCH)))
    assert '    {"alpha": 2},\n' in text
    assert text.endswith("}\n")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no schema": ({"schema": gone}, "no field 'schema'"),
    "schema of text": ({"schema": "1"}, "field 'schema' is '1'"),
    "schema of truth": ({"schema": True}, "field 'schema' is True"),
    "schema of nothing": ({"schema": 0}, "field 'schema' is 0"),
    "newer schema": ({"schema": SCHEMA + 1, "version": "8.1"}, f"field 'schema' is {SCHEMA + 1}.*version 8.1, upgrade"),
    "unknown field": ({"colour": 1}, "unknown field 'colour'"),
    "width of no name": ({"width": "narrow"}, "field 'width' is 'narrow'; expected stream or inner"),
    "no FLOPs": ({"flops": 0}, "field 'flops' is 0; expected at least 1"),
    "no classes": ({"num_classes": -1}, r"field 'num_classes' is -1; expected 0 \(no classifier\) or more"),
    "two sizes": ({"input_size": [32, 32]}, r"field 'input_size' is \[32, 32\]; expected \[channels, height, width\]"),
    "sizes of text": ({"input_size": [3, "32", 32]}, "field 'input_size'"),
    "no stage": ({"stage_widths": []}, "field 'stage_widths'"),
    "a stage of nothing": ({"stage_widths": [0, 96]}, "field 'stage_widths'"),
    "half a channel": ({"stage_widths": [1.5, 96]}, "field 'stage_widths'"),
    "no block": ({"blocks": []}, "field 'blocks' is empty"),
    "a block of a number": ({"blocks": [{"alpha": 1}, 3]}, r"field 'blocks\[1\]' is 3; expected an object"),
    "a choice of text": ({"blocks": [{"alpha": "two"}]}, r"field 'blocks\[0\].alpha' is \"two\"; expected a number"),
    "a negative index": ({"blocks": [{"alpha": 1, "kept_x": [0, -1]}]}, r"field 'blocks\[0\].kept_x'"),
    "no permutation": ({"permutation": {"stream0": [0, 2]}}, "field 'permutation.stream0'.*expected a permutation"),
    "an index twice": ({"permutation": {"stream0": [0, 0, 1]}}, "field 'permutation.stream0'"),
    "a basis of nothing": ({"basis": {"streams": [0]}}, "field 'basis' is .*; expected the rotated stages, of 2"),
    "a stage that is not there": ({"basis": {"streams": [2], "sha256": "0" * 64}}, "field 'basis' is .*, of 2"),
    "a stage below the first": ({"basis": {"streams": [-1], "sha256": "0" * 64}}, "field 'basis'"),
    "a stage of text": ({"basis": {"streams": ["0"], "sha256": "0" * 64}}, "field 'basis'"),
    "a stage of a list": ({"basis": {"streams": [[0]], "sha256": "0" * 64}}, "field 'basis'"),
    "a stage of truth": ({"basis": {"streams": [True], "sha256": "0" * 64}}, "field 'basis'"),
    "stages of a number": ({"basis": {"streams": 1, "sha256": "0" * 64}}, "field 'basis'"),
    "more than a basis": ({"basis": {"streams": [0], "sha256": "0" * 64, "x": 1}}, "field 'basis'"),
    "half a hash": ({"basis": {"streams": [0], "sha256": "0" * 32}}, r"field 'basis\.sha256'.*64 hexadecimal digits"),
    "no hash": ({"basis": {"streams": [0], "sha256": "g" * 64}}, r"field 'basis\.sha256'"),
    "a hash of a number": ({"basis": {"streams": [0], "sha256": 7}}, r"field 'basis\.sha256'"),
    "a permutation of text": ({"permutation": {"stream0": "012"}}, "field 'permutation.stream0'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_by_its_field(mistake: str, tmp_path: Path) -> None:
    changes, says = MISTAKES[mistake]
    path = written(tmp_path, **changes)
    with pytest.raises(UserError, match=says) as error:
        load_architecture(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in asdict(ARCH) if name != "schema"])
def test_every_field_must_be_there_and_of_its_type(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"field '{name}' is missing; expected"):
        load_architecture(written(tmp_path, **{name: gone}))
    for wrong in (None, True, 1.5):
        with pytest.raises(UserError, match=f"field '{name}' is .*; expected"):
            load_architecture(written(tmp_path, **{name: wrong}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not readable as JSON"),
        (to_json(ARCH)[:200].encode(), "truncated"),
        (b"\x80\x81", "not readable as JSON"),
        (b"[]", "no field 'schema'"),
        (b"null", "no field 'schema'"),
        (b'{"state_dict": 1}', "not an arch.json"),
    ],
)
def test_what_is_no_architecture_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "arch.json").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load_architecture(tmp_path / "arch.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.json", tmp_path):
        with pytest.raises(UserError, match=r"\.json: no such file; give --arch"):
            load_architecture(path)
