"""What an arch.json stands for, block by block, as a table and as a picture.

    python -m nas.describe results/<run>/arch.json

prints for every block its choices, the stream channels, heads, channels inside the heads, MLP channels and hidden
neurons that it keeps, its FLOPs and their share of the network's; then the stem, patch merging and the classifier. The
picture (architecture.png beside arch.json, or --output) sets what each block keeps beside what the backbone has. No
weights are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nas.cli import errors
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
        f" {arch.num_classes} classes"
    )


def show(path: Path, output: Path | None) -> Path:
    """Print the table, draw the picture; its path."""
    from nas.pictures.run import save

    arch = load_architecture(path)
    folder = path if path.is_dir() else path.parent
    rows = rows_of(arch)
    print_rows(arch, rows)
    return save(architecture_figure(rows, title_of(arch, rows)), output or folder / PICTURE)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit code 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m nas.describe", description="Show an architecture block by block.")
    parser.add_argument("arch", type=Path, help="arch.json, or the folder of a run")
    parser.add_argument("--output", type=Path, help="the picture, .png or .pdf (default: architecture.png beside it)")
    options = parser.parse_args(arguments)
    with errors(parser.prog):
        if options.output is not None and options.output.suffix not in (".png", ".pdf"):
            raise UserError(f"--output {options.output}: expected a name that ends in .png or .pdf")
        print(show(options.arch, options.output))


if __name__ == "__main__":
    main()
