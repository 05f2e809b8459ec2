"""The commands that README.md and docs/ print: in code blocks and in code among words."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
STARTS = r"(?:python|pip|uv run|torchrun|srun|[A-Z]+=\")"  # a shell variable that later commands use is one of them
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n?)+", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A line to type. page: where it stands, relative to the checkout."""

    page: str
    text: str


def commands_of(page: Path) -> list[Command]:
    """In the order in which they are printed, each once."""
    text = page.read_text()
    found: list[tuple[int, str]] = []
    for block in FENCE.finditer(text):
        if block[1] in ("", "bash", "sh"):
            found += [(block.start(), line) for line in lines(block[2])]
    text = FENCE.sub(lambda block: " " * len(block[0]), text)
    for block in INDENTED.finditer(text):
        found += [(block.start(), line) for line in lines(re.sub(r"^    ", "", block[0], flags=re.MULTILINE))]
    text = INDENTED.sub(lambda block: " " * len(block[0]), text)
    for span in re.finditer(rf"`({STARTS}\s[^`]*)`", text):
        found.append((span.start(), span[1]))
    name = str(page.relative_to(ROOT))
    return [Command(name, line) for line in dict.fromkeys(line for _, line in sorted(found, key=lambda f: f[0]))]


def lines(block: str) -> list[str]:
    """The commands of a block: continued lines joined, remarks left out."""
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    typed = [re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines()]
    return [re.sub(r"\s+", " ", line) for line in typed if re.match(STARTS, line)]


def all_commands() -> list[Command]:
    return [command for page in PAGES for command in commands_of(page)]
