"""An architecture block by block, beside its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"stream": "stream channels", "heads": "heads", "neurons": "hidden neurons", "flops": "FLOPs"}


@dataclass(frozen=True)
class Row:
    """One block, or with block None another part of the network. Pairs are (kept, of the backbone's)."""

    name: str
    flops: tuple[int, int]
    block: int | None = None
    choices: str = ""
    stream: tuple[int, int] = (0, 0)
    heads: tuple[int, int] = (0, 0)
    value_channels: tuple[int, int] = (0, 0)
    mlp_channels: tuple[int, int] = (0, 0)
    neurons: tuple[int, int] = (0, 0)


def architecture_figure(rows: Sequence[Row], title: str) -> Figure:
    """A panel for each of stream, heads, neurons and FLOPs; a row per block, the backbone's in outline."""
    from nas.pictures.figures import PALETTE, new_figure

    blocks = [row for row in rows if row.block is not None]
    figure = new_figure(10.5, 1.5 + 0.24 * max(len(blocks), 6), title)
    panels: Any = figure.subplots(1, len(PARTS), sharey=True)
    for axes, (part, words), color in zip(panels, PARTS.items(), PALETTE, strict=False):
        kept, of = ([getattr(row, part)[k] / (1e6 if part == "flops" else 1) for row in blocks] for k in (0, 1))
        places = range(len(blocks))
        axes.barh(places, of, height=0.8, color="none", edgecolor="#8a8a8a", linewidth=0.8)
        axes.barh(places, kept, height=0.8, color=color)
        if part == "stream" and any(row.mlp_channels != row.stream for row in blocks):
            for place, row in zip(places, blocks, strict=True):
                axes.plot([row.mlp_channels[0]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.6)
            words += "\n(line: of the MLP)"
        axes.set_xlabel(f"M{words} (MACs)" if part == "flops" else words, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(blocks)))
    panels[0].set_ylim(len(blocks) - 0.4, -0.6)
    panels[0].set_yticklabels([f"{row.block}: {row.choices}" for row in blocks])
    panels[0].set_ylabel("block: its choices", fontsize=9)
    return figure
