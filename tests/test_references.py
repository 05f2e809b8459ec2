"""Every reference leads somewhere: sections, equations and invariants of docs/design.md, paths, modules, links.

Read are comments, docstrings, messages that name a page, README.md and docs/. Each kind of fault is made up once
below, so that a check that no longer sees it fails.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("nas", "search_spaces", "supernets", "benchmarks", "tests")
SOURCES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "docs/*.py", *(f"{package}/**/*.py" for package in PACKAGES))
    for path in ROOT.glob(pattern)
)
PAGES = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))]
OTHERS = [Path(name) for name in (".ci/run", ".gitignore", "pyproject.toml", "constraints.txt", "nas/sweeps/page.html")]
DESIGN = Path("docs/design.md")

INTEGER, NUMBER = r"\d+", r"\d+(?:\.\d+)?"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Passage:
    """A run of comment lines, a string, or a page. where: its file and first line. known: its section numbers."""

    where: str
    text: str
    known: frozenset[str]


def several(number: str) -> str:
    """A list of numbers: "2.1", "2.1 and 2.2", "(3.1) to (3.8)"."""
    return rf"\(?{number}\)?(?:(?:,| and| to|, and) \(?{number}\)?)*"


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def read(path: Path) -> str:
    return (ROOT / path).read_text()


@cache
def numbered(page: Path) -> frozenset[str]:
    """The numbers of a page's headings."""
    return frozenset(re.findall(rf"^#+ ({NUMBER})\.? ", FENCE.sub("", read(page)), re.MULTILINE))


@cache
def invariants_of_design() -> frozenset[str]:
    part = re.split(r"^## ", read(DESIGN), flags=re.MULTILINE)[4]
    assert part.startswith("4. Invariants")
    return frozenset(re.findall(r"^(\d+)\. ", "\n".join(part.splitlines()[1:]), re.MULTILINE))


@cache
def equations_of_design() -> frozenset[str]:
    return frozenset(re.findall(r"\((3\.\d)\)", read(DESIGN)))


def in_source(path: Path, source: str) -> Iterator[Passage]:
    """What a Python file says in words: docstrings, comments, and of its other strings the pages that they name."""
    bare: set[ast.expr] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr):
            bare.add(node.value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            where = f"{path}:{node.lineno}"
            if node in bare:
                yield Passage(where, node.value, numbered(DESIGN))
            elif path.parts[0] != "tests":
                yield from (Passage(where, page, frozenset()) for page in re.findall(r"docs/\w+\.md", node.value))
    run: list[str] = []  # of comments alone on their lines; one behind code stands for itself
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, words = token.start[0], token.string.lstrip("# ")
            alone = token.line.lstrip().startswith("#")
            if run and not (alone and line == last + 1):
                yield Passage(f"{path}:{last + 1 - len(run)}", "\n".join(run), numbered(DESIGN))
                run = []
            if alone:
                run, last = [*run, words], line
            else:
                yield Passage(f"{path}:{line}", words, numbered(DESIGN))
    if run:
        yield Passage(f"{path}:{last + 1 - len(run)}", "\n".join(run), numbered(DESIGN))


@cache
def passages() -> list[Passage]:
    found = [passage for path in SOURCES for passage in in_source(path, read(path))]
    return found + [Passage(str(page), read(page), numbered(page)) for page in PAGES]


def lost_sections(passage: Passage) -> list[str]:
    """A comment's "section 2.6" is a heading of docs/design.md, a page's one of its own.

    Not checked: a published paper's section, whose authors ("Yuan et al.") stand in the same sentence.
    """
    found = []
    for sentence in re.split(r"(?<!\bal)\.\s", one_line(passage.text)):
        if re.search(r"\bdesign(?:\.md)?,? (?:section )?\d", sentence):
            found.append(f'"design N" for "section N": {sentence}')
        if "et al." not in sentence:
            for match in re.finditer(rf"\b[Ss]ections? ({several(NUMBER)})", sentence):
                found += [f"section {n}" for n in re.findall(NUMBER, match[1]) if n not in passage.known]
    return found


def lost_equations(passage: Passage) -> list[str]:
    """The thesis's equations are those that docs/design.md writes out."""
    text = one_line(passage.text)
    named = [match[1] for match in re.finditer(rf"\b[Ee]quations? ({several(NUMBER)})", text)]
    numbers = [n for match in named for n in re.findall(NUMBER, match)] + re.findall(r"\((3\.\d+)\)", text)
    return [f"equation ({n})" for n in dict.fromkeys(numbers) if n not in equations_of_design()]


def lost_invariants(passage: Passage) -> list[str]:
    found = [match[1] for match in re.finditer(rf"\b[Ii]nvariants? ({several(INTEGER)})", one_line(passage.text))]
    return [f"invariant {n}" for match in found for n in re.findall(INTEGER, match) if n not in invariants_of_design()]


def lost_paths(passage: Passage) -> list[str]:
    """Files and folders of the repository, written with their folder; of tests the bare name will do."""
    found = []
    for path in re.findall(rf"(?<![\w/.-])(?:docs|{'|'.join(PACKAGES)})/[\w./*<>-]*", passage.text):
        pattern = re.sub(r"<\w+>|\b[A-Z]{4,}(?=\.)", "*", path.rstrip("./-"))  # NAME.py stands for any
        if not any(ROOT.glob(pattern)):
            found.append(path)
    for name in re.findall(r"(?<![\w/])test_\w+\.py", passage.text):
        if not any((ROOT / "tests").rglob(name)):
            found.append(name)
    return found


def exists(dotted: str) -> bool:
    """A module, or a word in one: nas.plot, nas.networks.compact_file.load_compact."""
    place = ROOT
    for name in dotted.split("."):
        if (place / name).is_dir():
            place /= name
        elif (place / f"{name}.py").is_file():
            place /= f"{name}.py"
        else:
            source = place if place.is_file() else place / "__init__.py"
            return source.is_file() and re.search(rf"\b{name}\b", source.read_text()) is not None
    return True


def lost_modules(passage: Passage) -> list[str]:
    package = rf"(?:{'|'.join(PACKAGES)})"
    names = re.findall(rf"(?<![\w./-]){package}(?:\.[A-Za-z_]\w*)+", passage.text)
    for module, imported in re.findall(rf"\bfrom ({package}[\w.]*) import ([\w, ]+)", passage.text):
        names += [f"{module}.{name}" for name in re.findall(r"\w+", imported)]
    return [name for name in names if not exists(name)]


def outside(passage: Passage) -> list[str]:
    """What lies on somebody's machine and not in the repository."""
    return re.findall(r"(?:\.\./)+shared\S*|(?<![\w/.])shared/\S*|(?<!\w)/(?:home|root|tmp)/\S*", passage.text)


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-{sum(a.startswith(slug) for a in found)}")
    return found


def lost_links(page: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        name, _, anchor = target.partition("#")
        path = (ROOT / page.parent / name).resolve()
        if re.match(r"[a-z]+:", target):
            continue
        inside = not name or (path.is_relative_to(ROOT) and path.exists())
        own = text if not name else path.read_text() if inside and path.suffix == ".md" else ""
        if not inside or (anchor and anchor not in anchors(own)):
            found.append(target)
    return found


Check = Callable[[Passage], list[str]]
CHECKS: tuple[Check, ...] = (lost_sections, lost_equations, lost_invariants, lost_paths, lost_modules, outside)


@pytest.mark.parametrize("check", CHECKS)
def test_references_lead_somewhere(check: Check) -> None:
    faults = [f"{passage.where}: {fault}" for passage in passages() for fault in check(passage)]
    assert not faults, "\n" + "\n".join(faults)


def test_links_and_their_anchors_lead_somewhere() -> None:
    assert [f"{page}: {target}" for page in PAGES for target in lost_links(page, read(page))] == []


def test_nothing_else_points_outside() -> None:
    others = [Passage(str(path), read(path), frozenset()) for path in OTHERS]
    assert [f"{passage.where}: {fault}" for passage in others for fault in outside(passage)] == []


SOURCE = """
LR = 0.01  # a tenth of what was published
# The published recipe
# (section 2.5), in epochs.
EPOCHS = 30

class Options:
    rate: float
    '''of the gates
    (docs/uvc.md)'''

raise ValueError(f"{EPOCHS} is no value: docs/options.md, nas/none.py")
"""


def test_comments_docstrings_and_messages_are_read() -> None:
    found = {passage.where: one_line(passage.text) for passage in in_source(Path("nas/made_up.py"), SOURCE)}
    assert found == {
        "nas/made_up.py:2": "a tenth of what was published",
        "nas/made_up.py:3": "The published recipe (section 2.5), in epochs.",
        "nas/made_up.py:9": "of the gates (docs/uvc.md)",
        "nas/made_up.py:12": "docs/options.md",
    }


def test_the_numbers_of_the_design_are_read() -> None:
    assert numbered(DESIGN) >= {"1", "2", "3", "4", *(f"2.{i}" for i in range(1, 16))}
    assert invariants_of_design() >= {str(i) for i in range(13)}
    assert equations_of_design() >= {f"3.{i}" for i in range(1, 9)}


GOOD = (
    "sections 2.1 and 2.2, section 2.15; equations (3.1) to (3.8), equation 3.7, (3.5); invariants 7 and 8",
    "Tokens as in Yuan et al., Tokens-to-Token ViT, section 9.1, and as in section 2.1.",
    "nas/cli.py, docs/*.md, tests/nas/ and search_spaces/registry.py; results/tests/none.py; benchmarks/NAME.py",
    "nas.plot, nas.networks.compact_file.load_compact; from supernets.compact import cut",
    "a folder that all nodes share: /shared/run",
)
BAD = (
    (lost_sections, "cut as in section\n2.16"),
    (lost_sections, "sections 2.1 and 9"),
    (lost_sections, "Yuan et al. say so. See section 9.1."),
    (lost_sections, "solved exactly (design section 2.6)"),
    (lost_sections, "solved exactly (design 2.6)"),
    (lost_equations, "lambda(t), equation (3.9)"),
    (lost_equations, "equations 3.4 and 4.1"),
    (lost_equations, "the mixture of (3.15)"),
    (lost_invariants, "held by invariants 1 and 13"),
    (lost_paths, "moved to nas/no_such_file.py."),
    (lost_paths, "as docs/no_such_page.md says"),
    (lost_paths, "every one of tests/nas/none_*.py"),
    (lost_paths, "what test_no_such_thing.py does not test"),
    (lost_modules, "python -m nas.no_such_command"),
    (lost_modules, "nas.networks.compact_file.no_such_function"),
    (lost_modules, "from supernets.compact import cut, no_such_function"),
    (outside, "as ../shared/page.md says"),
    (outside, "the weights of shared/weights"),
    (outside, "written to /tmp/run"),
    (outside, "from /home/me/data"),
)


@pytest.mark.parametrize("text", GOOD)
def test_good_references_are_let_through(text: str) -> None:
    passage = Passage("made up", text, numbered(DESIGN))
    assert [fault for check in CHECKS for fault in check(passage)] == []


@pytest.mark.parametrize(("check", "text"), BAD)
def test_each_fault_is_found_by_its_own_check_alone(check: Check, text: str) -> None:
    passage = Passage("made up", text, numbered(DESIGN))
    assert [(c, len(c(passage))) for c in CHECKS if c(passage)] == [(check, 1)]


@pytest.mark.parametrize(
    "link", ["[a](nowhere.md)", "[a](method.md#nowhere)", "[a](#nowhere)", "[a](../../outside.md)", "[a](../nas/none)"]
)
def test_a_lost_link_is_found(link: str) -> None:
    page = "# Page\n\n## 1. A heading: `code`, and more\n\n[b](#1-a-heading-code-and-more) [c](method.md#1-words)\n\n"
    assert lost_links(Path("docs/page.md"), page) == []
    assert len(lost_links(Path("docs/page.md"), page + link)) == 1
    assert lost_links(Path("docs/page.md"), f"{page}`{link}`\n\n```\n{link}\n```\n") == []
