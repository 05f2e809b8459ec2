"""The README's code, run as it stands but on a tiny network, and the pages that the code writes."""

import contextlib
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import tyro

import nas
from nas.cli import option_words
from nas.config import Common, RetrainConfig, SearchConfig
from nas.sweeps.options import SweepConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = "img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7"
TINY_SWIN = "model_kwargs=dict(embed_dim=16, depths=(1, 1), num_heads=(4, 8)), epochs=1, batch_size=256"


def code_of(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    return code


def run_example(page: str, folder: Path, *changes: tuple[str, str]) -> dict[str, Any]:
    """The page's Python code, with the changes to it, run in the folder; the names that it leaves."""
    code = code_of(page)
    assert not re.search(r"^(from|import) (nas\.|search_spaces|supernets)", code, re.MULTILINE)
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code, names)
    return names


def test_the_readmes_example_leaves_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_example(
        "README.md", tmp_path, ("pretrained=True", TINY), ("picks)", f"picks, model_kwargs=dict({TINY}))")
    )
    assert "indices=tensor" in capsys.readouterr().out
    arch = nas.Architecture.load(tmp_path / "small")
    assert [b["alpha"] for b in arch.blocks] == [1, 2] and arch == names["arch"]
    assert sum(p.numel() for p in names["network"].parameters()) == arch.params < arch.backbone_params


@pytest.mark.slow
def test_the_librarys_example_runs_from_the_search_to_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 30, 60)).save(tmp_path / "photo.jpg")
    names = run_example(
        "docs/library.md",
        tmp_path,
        ("budget=0.5, ", f"budget=0.5, {TINY_SWIN}, "),
        ('(found, output="trained")', '(found, output="trained", epochs=1, batch_size=256)'),
    )
    assert [name for name in nas.__all__ if f"nas.{name}" not in code_of("docs/library.md")] == []
    assert "of the FLOPs kept" in (said := capsys.readouterr().out) and "indices=tensor" in said
    for folder in ("trained", "small"):
        assert {"arch.json", "compact.safetensors", "config.json"} <= {p.name for p in (tmp_path / folder).iterdir()}
    assert sum(p.numel() for p in names["small"].parameters()) == nas.Architecture.load(tmp_path / "found").params
    assert isinstance(names["supernet"].backbone, type(names["network"]))


def tables() -> Any:
    """docs/tables.py as a module."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return tables


@pytest.mark.parametrize("kind", [SweepConfig, RetrainConfig])
def test_every_option_has_a_line_of_help(kind: type[Common]) -> None:
    text = option_words(kind)
    assert [field.name for field in fields(kind) if not text.get(field.name)] == []


@pytest.mark.parametrize("kind", [Common, SearchConfig, SweepConfig, RetrainConfig])
def test_every_option_is_in_the_docs(kind: type[Common]) -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    options = [f.name for f in fields(kind) if tyro.conf.Suppress not in get_args(f.type)]
    missing = [name for name in options if f"`--{name.replace('_', '-')}`" not in page]
    assert not missing, f"run python docs/tables.py: {', '.join(missing)}"


def test_the_tables_are_what_the_code_says() -> None:
    made = tables()
    for name, parts in made.sections().items():
        page = (ROOT / "docs" / name).read_text()
        assert page == made.filled(page, parts), f"docs/{name} is out of date: run python docs/tables.py"
