"""The house as docs/design.md draws it: rooms in order, no circle, no foreign method name, short argument lists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from search_spaces.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
# From the top floor down: a room imports from its own floor's files and from the floors below.
COMMANDS = "commands"  # the files that stand in nas/ itself, config.py aside
ROOMS = (
    COMMANDS, "sweeps", "stages", "config", "methods", "searchers", "objectives", "prices", "training", "pictures",
    "runs", "networks", "data", "machine",
)  # fmt: skip
PACKAGES = ("nas", "supernets", "search_spaces")  # the same, of packages
MOST_PARAMETERS = 7


def sources(*packages: str) -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in packages
        for path in sorted((ROOT / package).rglob("*.py"))
    }


MODULES = sources(*PACKAGES)


def imported(path: Path) -> Iterator[str]:
    """The modules of this repository that a file imports, wherever in it: for types alone, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in MODULES or node.module in MODULES:
                    yield name if name in MODULES else node.module


def floor(module: str) -> int:
    """How high a module stands; the ground is 0."""
    package, *rest = module.split(".")
    below = len(ROOMS) * PACKAGES.index(package)
    if package != "nas":
        return -below
    room = rest[0] if rest and rest[0] in ROOMS else COMMANDS
    return -ROOMS.index(room)


def test_every_folder_of_nas_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "nas").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS) - {COMMANDS, "config"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module: str) -> None:
    upwards = [other for other in imported(MODULES[module]) if floor(other) > floor(module)]
    assert upwards == [], f"{module} stands below what it imports"


def test_there_is_no_circle() -> None:
    arrows = {module: set(imported(path)) - {module} for module, path in MODULES.items()}
    while leaves := {module for module, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {module: targets for module, targets in arrows.items() if module not in leaves}
    assert not arrows, f"files that import each other: {', '.join(sorted(arrows))}"


def own_files(method: str) -> set[str]:
    """The modules that may name a method: its own, and the tables of methods."""
    return {f"search_spaces.{method}", f"nas.methods.{method}", "search_spaces.registry", "nas.methods.table"}


def names_of(method: str, text: str) -> list[str]:
    """Where a text names a method: its name or a space of it in quotes, in an import, or (no English word) at all."""
    found = re.findall(rf"""["'](?:\w+-)?{method}(?:-nano)?["']""", text)
    found += re.findall(rf"^\s*(?:from|import)\s.*\b(?:search_spaces|methods)\.{method}\b.*$", text, re.MULTILINE)
    if method not in ("an", "joint", "free"):
        prose = re.sub(r"docs/\w+\.md", "", text)
        found += re.findall(rf"(?i)\b{method}\b|{method}_|_{method}", prose)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_no_file_names_a_method_that_is_not_its_own(method: str) -> None:
    foreign = {
        module: found
        for module, path in MODULES.items()
        if module not in own_files(method) and (found := names_of(method, path.read_text()))
    }
    assert foreign == {}


def test_what_names_a_method_is_seen() -> None:
    for text in (
        'if space.method.name == "kcr":',
        "from search_spaces.kcr import KCR",
        "# as in KCR",
        "kcr_options = 1",
    ):
        assert names_of("kcr", text)
    assert names_of("an", 'get_space("swin-an-nano")') and not names_of("an", "# an architecture, kept as an option")
    assert not names_of("kcr", "the reason is in docs/kcr.md")


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("nas.stages.")])
def test_no_function_of_a_stage_takes_more_than_seven_arguments(module: str) -> None:
    for function in functions(MODULES[module]):
        arguments = function.args
        taken = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        assert len(taken) <= MOST_PARAMETERS, f"{module}.{function.name} takes {len(taken)}"
