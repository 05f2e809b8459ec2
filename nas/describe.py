"""What an arch.json stands for, block by block, as a table and as a picture.

    python -m nas.describe results/<run>/arch.json
    python -m nas.describe --space NAME --grammar

prints for every block its choices, the stream channels, heads, channels inside the heads, MLP channels and hidden
neurons that it keeps, its FLOPs and their share of the network's; then the stem, patch merging and the classifier. The
picture (architecture.png beside arch.json, or --output) sets what each block keeps beside what the backbone has. No
weights are read.

With --space and --grammar: what the space offers over its default model, as nni.mutable has it, a line for every
choice; --output writes it as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nas.failing import errors
from nas.pictures.architecture import (
    INSIDE,
    PICTURE,
    Row,
    architecture_figure,
    are_widths,
    mlp_apart,
    name_of,
    title_of,
)
from nas.pictures.rows import rows_of
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from search_spaces.registry import get_space
from search_spaces.space import spell


def print_rows(arch: Architecture, rows: Sequence[Row]) -> None:
    """The table, a heading above and the totals below."""
    from rich.console import Console
    from rich.table import Table

    blocks = [row for row in rows if row.block is not None]
    table = Table(title=f"{name_of(arch, blocks)}: {arch.model}", title_justify="left", padding=(0, 0, 0, 1))
    # Columns that say the same as others for every block are left out.
    sizes = {"stream": "stream", "heads": "heads"}
    if any(part in row.choices for row in blocks for part in INSIDE):
        sizes |= {"qk": "q, k", "v": "v"}
    elif any(row.value_channels[0] * row.heads[1] != row.heads[0] * row.value_channels[1] for row in blocks):
        sizes["value_channels"] = "V"
    if mlp_apart(blocks):
        sizes["mlp_channels"] = "MLP"
    sizes["neurons"] = "neurons"
    choices = [] if are_widths(blocks) else ["choices"]
    table.add_column("")
    for column in choices:
        table.add_column(column, overflow="fold")
    for column in (*sizes.values(), "MFLOPs", "share", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    total, large = (sum(row.flops[k] for row in rows) for k in (0, 1))
    for row in rows:
        pairs = [getattr(row, name) for name in sizes]
        cells = ["" if row.block is None else f"{kept}/{of}" for kept, of in pairs]
        own = f"{100 * row.flops[0] / row.flops[1]:.1f} %" if row.flops[1] else ""
        share = f"{100 * row.flops[0] / total:.1f} %"
        said = [row.words for _ in choices]
        table.add_row(row.name, *said, *cells, f"{row.flops[0] / 1e6:.3f}", share, own)
    table.add_section()
    empty = [""] * (len(choices) + len(sizes))
    table.add_row("network", *empty, f"{total / 1e6:.3f}", "100.0 %", f"{100 * total / large:.1f} %")
    Console().print(table)
    print("MFLOPs are MACs of one image; share: of this network's; kept: of the same part of the backbone's")
    stages = " ".join(map(str, arch.stage_widths))
    print(
        f"stage widths {stages}; parameters {arch.params / 1e6:.3f} M of {arch.backbone_params / 1e6:.3f} M;"
        f" {f'{arch.num_classes} classes' if arch.num_classes else 'no classifier, features'}"
    )


def show(path: Path, output: Path | None) -> Path:
    """Print the table, draw the picture; its path."""
    from nas.pictures.run import save

    arch = load_architecture(path)
    folder = path if path.is_dir() else path.parent
    rows = rows_of(arch)
    print_rows(arch, rows)
    return save(architecture_figure(rows, title_of(arch, rows)), output or folder / PICTURE)[0]


def grammar_of(name: str) -> dict[str, Any]:
    """The nni space over a space's default model: its name and model, and {label: candidates} of every choice."""
    from nas.spaces import costs_of

    space = get_space(name)
    choices = costs_of(space).space.mutable().simplify()
    labels = {label: list(choice.values) for label, choice in choices.items()}
    return {"space": space.name, "method": space.method.name, "model": space.model, "choices": labels}


def show_grammar(name: str, output: Path | None) -> None:
    """Print a line for every choice, by its label; write all of it as JSON where that is asked for."""
    from nas.machine.files import write_json

    grammar = grammar_of(name)
    print(f"{grammar['space']} over {grammar['model']}: {len(grammar['choices'])} choices, as nni.mutable labels them")
    for label, candidates in grammar["choices"].items():
        print(f"{label}: {spell(candidates)}")
    if output is not None:
        write_json(output, grammar)
        print(output)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit code 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m nas.describe", description="Show an architecture block by block.")
    parser.add_argument("arch", type=Path, nargs="?", help="arch.json, or the folder of a run")
    parser.add_argument("--space", help="instead of arch.json: a space, with --grammar")
    parser.add_argument("--grammar", action="store_true", help="what --space offers, as nni.mutable has it")
    words = "the picture, .png or .pdf (default: architecture.png beside it); with --grammar a .json"
    parser.add_argument("--output", type=Path, help=words)
    options = parser.parse_args(arguments)
    with errors(parser.prog):
        if (options.space is None) == (options.arch is None) or options.grammar != (options.space is not None):
            raise UserError("give an arch.json (or a run's folder), or --space NAME with --grammar")
        if options.grammar:
            if options.output is not None and options.output.suffix != ".json":
                raise UserError(f"--output {options.output}: expected a name that ends in .json")
            show_grammar(options.space, options.output)
            return
        if options.output is not None and options.output.suffix not in (".png", ".pdf"):
            raise UserError(f"--output {options.output}: expected a name that ends in .png or .pdf")
        print(show(options.arch, options.output))


if __name__ == "__main__":
    main()
