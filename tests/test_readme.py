"""The README's code, run as it stands but on a tiny network, and the pages that the code writes."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import tyro

from nas import config
from nas.config import Common, RetrainConfig, SearchConfig, SweepConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = "dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=7)"


def test_library_lines_run_and_leave_a_network(tmp_path: Path) -> None:
    from PIL import Image

    from nas.networks.compact_file import load_compact
    from search_spaces.architecture import load_architecture

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for old, new in (('"deit_small_patch16_224", {}', f'"deit_small_patch16_224", {TINY}'), ("pretrained=True, ", "")):
        assert code.count(old) == 1
        code = code.replace(old, new)
    code += "\nassert p.shape == q.shape == (1, 7) and not torch.equal(p, q)\n"
    Image.new("RGB", (50, 40), (200, 30, 60)).save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "indices=tensor" in done.stdout
    arch = load_architecture(tmp_path / "small")
    network = load_compact(tmp_path / "small")
    assert [b["alpha"] for b in arch.blocks] == [1, 2]
    assert sum(p.numel() for p in network.parameters()) == arch.params < arch.backbone_params


def test_every_option_has_a_line_of_help() -> None:
    classes = [c for c in ast.parse(Path(str(config.__file__)).read_text()).body if isinstance(c, ast.ClassDef)]
    silent = []
    for cls in classes:
        for statement, after in zip(cls.body, [*cls.body[1:], ast.Pass()], strict=True):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            if isinstance(statement, ast.AnnAssign) and not text:
                silent.append(ast.unparse(statement.target))
    assert not silent, f"no docstring after {', '.join(silent)}"


@pytest.mark.parametrize("kind", [Common, SearchConfig, SweepConfig, RetrainConfig])
def test_every_option_is_in_the_docs(kind: type[Common]) -> None:
    page = (ROOT / "docs" / "options.md").read_text()
    options = [f.name for f in fields(kind) if tyro.conf.Suppress not in get_args(f.type)]
    missing = [name for name in options if f"`--{name.replace('_', '-')}`" not in page]
    assert not missing, f"run python docs/tables.py: {', '.join(missing)}"


def test_the_tables_are_what_the_code_says() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import tables
    finally:
        sys.path.remove(str(ROOT / "docs"))
    for name, parts in tables.sections().items():
        page = (ROOT / "docs" / name).read_text()
        assert page == tables.filled(page, parts), f"docs/{name} is out of date: run python docs/tables.py"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
