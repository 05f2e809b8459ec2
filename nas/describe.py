"""What an arch.json stands for, block by block, as a table and as a picture.

    python -m nas.describe results/<run>/arch.json

prints for every block its choices, the stream channels, heads, value channels, MLP channels and hidden neurons that
it keeps, its FLOPs and their share of the network's; then the stem, patch merging and the classifier. The picture
(architecture.png beside arch.json, or --output) sets what each block keeps beside what the backbone has. No weights
are read.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nas.cli import errors
from nas.pictures.architecture import Row, architecture_figure
from search_spaces.architecture import Architecture, load_architecture
from search_spaces.errors import UserError
from search_spaces.slices import BlockShape, BlockSlice, count, identity_slice


def rows_of(arch: Architecture) -> list[Row]:
    """The rows of an architecture; their FLOPs add up to the network's. UserError when it does not fit its backbone."""
    from nas.networks.architecture import slices_of
    from nas.networks.backbone import TimmModel
    from nas.networks.basis_file import streams_of
    from nas.networks.opening import meta_supernet
    from search_spaces.registry import METHODS, get_space
    from supernets.basis import install_stages
    from supernets.flops import block_flops, whole_stages

    supernet = meta_supernet(TimmModel(arch.model, arch.model_kwargs), arch.num_classes, get_space(arch.space))
    install_stages(supernet, streams_of(arch.basis))
    subnet, costs = slices_of(arch, supernet.shapes), supernet.adapter.costs
    names = METHODS[arch.method].choice_names
    rows = []
    for i, (shape, cost, kept) in enumerate(zip(supernet.shapes, costs.blocks, subnet.blocks, strict=True)):
        choices = ", ".join(f"{name} {arch.blocks[i][name]:g}" for name in names)
        flops = block_flops(shape, cost, kept), block_flops(shape, cost, identity_slice(shape))
        rows.append(_block_row(i, shape, kept, choices, flops))
    full = supernet.identity().stage_widths
    per, widths = costs.flops, (subnet.stage_widths, full)

    def part(name: str, at: Any) -> None:
        rows.append(Row(name, (at(widths[0]), at(widths[1]))))

    part("stem", lambda w: per.constant + per.first * w[0])
    if 0 in costs.streams.keys() - whole_stages(supernet.shapes, subnet):  # a layer follows it (section 2.7)
        whole, layer = rows[-1].flops[1], costs.streams[0].flops
        rows[-1] = Row("stem", (rows[-1].flops[0] + layer[0] + layer[1] * subnet.stage_widths[0], whole))
    for s, (pair, single) in enumerate(zip(per.merge_pair, per.merge_in, strict=True)):
        part(f"merging {s + 1}", lambda w, s=s, pair=pair, single=single: w[s] * (pair * w[s + 1] + single))
    part("classifier", lambda w: per.last * w[-1])
    return rows


def _block_row(i: int, shape: BlockShape, kept: BlockSlice, choices: str, flops: tuple[int, int]) -> Row:
    from supernets.axes import head_widths, num_heads

    heads = num_heads(kept)
    return Row(
        name=f"block {i}",
        flops=flops,
        block=i,
        choices=choices,
        stream=(kept.stream if kept.attn or kept.mlp else 0, shape.embed_dim),
        heads=(heads, shape.num_heads),
        value_channels=(head_widths(kept, shape).v_total if kept.attn else 0, shape.num_heads * shape.head_dim),
        mlp_channels=(kept.num_mlp_stream() if kept.mlp else 0, shape.embed_dim),
        neurons=(count(kept.hidden) if kept.mlp else 0, shape.hidden),
    )


def print_rows(arch: Architecture, rows: Sequence[Row]) -> None:
    """The table, a heading above and the totals below."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{arch.space}, {arch.width} width: {arch.model}", title_justify="left", padding=(0, 0, 0, 1))
    blocks = [row for row in rows if row.block is not None]
    # Columns that say the same as another one for every block are left out.
    sizes = {"stream": "stream", "heads": "heads", "value_channels": "V", "mlp_channels": "MLP", "neurons": "neurons"}
    if all(row.mlp_channels == row.stream for row in blocks):
        del sizes["mlp_channels"]
    if all(row.value_channels[0] * row.heads[1] == row.heads[0] * row.value_channels[1] for row in blocks):
        del sizes["value_channels"]
    table.add_column("")
    table.add_column("choices", overflow="fold")
    for column in (*sizes.values(), "MFLOPs", "share", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    total, large = (sum(row.flops[k] for row in rows) for k in (0, 1))
    for row in rows:
        pairs = [getattr(row, name) for name in sizes]
        cells = ["" if row.block is None else f"{kept}/{of}" for kept, of in pairs]
        own = f"{100 * row.flops[0] / row.flops[1]:.1f} %" if row.flops[1] else ""
        share = f"{100 * row.flops[0] / total:.1f} %"
        table.add_row(row.name, row.choices, *cells, f"{row.flops[0] / 1e6:.3f}", share, own)
    table.add_section()
    table.add_row("network", *[""] * (1 + len(sizes)), f"{total / 1e6:.3f}", "100.0 %", f"{100 * total / large:.1f} %")
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
    share = f"{arch.flops / 1e9:.4g} of {arch.backbone_flops / 1e9:.4g} GFLOPs (MACs)"
    figure = architecture_figure(rows, f"{arch.space} ({arch.width} width): {share}; outlines are the backbone's")
    return save(figure, output or folder / "architecture.png")[0]


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
