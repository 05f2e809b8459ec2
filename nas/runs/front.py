"""The files of a run that answers for several budgets: arch-0.20.json of a search, compact-0.20/ of a retrain."""

import csv
from pathlib import Path

from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError

FRONT = "front.csv"


def named(budget: float) -> str:
    """A budget in a file's name; those of more than two digits keep theirs."""
    short = f"{budget:.2f}"
    return short if float(short) == budget else repr(budget)


def architecture_file(budget: float) -> str:
    """The best architecture at a budget."""
    return f"arch-{named(budget)}.json"


def compact_folder(budget: float) -> str:
    """What a retrain leaves of it: a folder as a run's, with its arch.json and compact.safetensors."""
    return f"compact-{named(budget)}"


def is_front(folder: Path) -> bool:
    """Whether a path is the folder of a search for several budgets."""
    return (folder / FRONT).is_file() and any(folder.glob("arch-*.json")) and not (folder / "arch.json").exists()


def read_front(folder: Path) -> dict[float, Architecture]:
    """The architecture at each budget, the lowest first. UserError where the table or a file is not as it has to be."""
    path, found = folder / FRONT, dict[float, Architecture]()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(float(row["budget"]), row["file"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected columns budget and file, as a search with --front writes ({error!r})"
        ) from None
    for budget, name in sorted(rows):
        found[budget] = load_architecture(folder / name)
    if not found:
        raise UserError(f"{path} names no architecture")
    first = next(iter(found.values()))
    for budget, arch in found.items():
        for field in ("space", "model", "model_kwargs", "basis", "permutation", "width"):
            if getattr(arch, field) != getattr(first, field):
                own = folder / architecture_file(budget)
                raise UserError(f"{own}: field '{field}' is not that of the others in {path}")
    return found


def member_folder(folder: Path, budget: float) -> Path:
    """The folder of the compact network at a budget. UserError names those there are."""
    path = folder / compact_folder(budget)
    if path.is_dir():
        return path
    there = sorted(each.name.removeprefix("compact-") for each in folder.glob("compact-*") if each.is_dir())
    others = f"there are {', '.join(there)}" if there else "retrain.py --arch FRONT leaves some"
    raise UserError(f"{folder} holds no compact network at budget {budget:g}; {others}")
