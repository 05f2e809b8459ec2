"""An architecture block by block, beside its backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from search_spaces.architecture import Architecture

PICTURE = "architecture.png"
PARTS = {
    "stream": "stream channels",
    "heads": "heads",
    "qk": "q and k,\nchannels in a head",
    "v": "v,\nchannels in a head",
    "neurons": "hidden neurons",
    "flops": "FLOPs",
}
INSIDE = ("qk", "v")  # of a head: in the picture where they are choices
CHOSEN = {"stream": "stream", "heads": "heads", "qk": "qk", "v": "v", "hidden": "neurons"}  # choices that are widths


@dataclass(frozen=True)
class Row:
    """One block, or with block None another part of the network. Pairs are (kept, of the backbone's).

    qk: channels of q and k in each kept head; v: of v, where heads differ their mean, rounded down. value_channels: of
    v in all heads together.
    """

    name: str
    flops: tuple[int, int]
    block: int | None = None
    choices: Mapping[str, float] = field(default_factory=dict)
    stream: tuple[int, int] = (0, 0)
    heads: tuple[int, int] = (0, 0)
    qk: tuple[int, int] = (0, 0)
    v: tuple[int, int] = (0, 0)
    value_channels: tuple[int, int] = (0, 0)
    mlp_channels: tuple[int, int] = (0, 0)
    neurons: tuple[int, int] = (0, 0)

    @property
    def words(self) -> str:
        """Its choices."""
        return ", ".join(f"{name} {value:g}" for name, value in self.choices.items())


def are_widths(rows: Sequence[Row]) -> bool:
    """Whether the blocks' choices are widths of their own, so that whoever sees those needs no choices beside them."""
    return all(row.choices.keys() <= CHOSEN.keys() for row in rows)


def mlp_apart(rows: Sequence[Row]) -> bool:
    """Whether some MLP reads and writes other channels than its block."""
    return any(row.mlp_channels != row.stream for row in rows if row.mlp_channels[0])


def name_of(arch: Architecture, rows: Sequence[Row]) -> str:
    """The space and, where a factor or a count has one, the width."""
    return arch.space if are_widths(rows) else f"{arch.space}, {arch.width} width"


def title_of(arch: Architecture, rows: Sequence[Row]) -> str:
    """Of the picture."""
    flops = f"{arch.flops / 1e9:.4g} of {arch.backbone_flops / 1e9:.4g} GFLOPs (MACs)"
    return (
        f"{name_of(arch, rows)}: {flops}, {100 * arch.flops / arch.backbone_flops:.1f} %; outlines are the backbone's"
    )


def architecture_figure(rows: Sequence[Row], title: str) -> Figure:
    """A panel for each of stream, heads, neurons and FLOPs, and of q/k and v where they are choices.

    A row per block, the backbone's in outline; beside it what is kept, as a number.
    """
    from nas.pictures.figures import PALETTE, new_figure

    blocks = [row for row in rows if row.block is not None]
    parts = [part for part in PARTS if part not in INSIDE or any(part in row.choices for row in blocks)]
    figure = new_figure(2.1 * len(parts) + 2.1, 1.5 + 0.24 * max(len(blocks), 6), title)
    figure.set_layout_engine("constrained", w_pad=0.1)  # a number belongs to the bar on its left
    panels: Any = figure.subplots(1, len(parts), sharey=True)
    for axes, part in zip(panels, parts, strict=True):
        _panel(axes, blocks, part, PALETTE[list(PARTS).index(part) % len(PALETTE)])
    panels[0].set_yticks(range(len(blocks)))
    panels[0].set_ylim(len(blocks) - 0.4, -0.6)
    bare = are_widths(blocks)
    panels[0].set_yticklabels([str(row.block) if bare else f"{row.block}: {row.words}" for row in blocks])
    panels[0].set_ylabel("block" if bare else "block: its choices", fontsize=9)
    return figure


def _panel(axes: Axes, blocks: Sequence[Row], part: str, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    words, places = PARTS[part], range(len(blocks))
    kept, of = ([getattr(row, part)[k] / (1e6 if part == "flops" else 1) for row in blocks] for k in (0, 1))
    axes.barh(places, of, height=0.8, color="none", edgecolor="#8a8a8a", linewidth=0.8)
    axes.barh(places, kept, height=0.8, color=color)
    beside = axes.get_yaxis_transform()
    for place, value in zip(places, kept, strict=True):
        text = f"{value:.3g}" if part == "flops" else f"{value:g}"
        axes.text(1.02, place, text, transform=beside, va="center", fontsize=7.5, color="#444444")
    if part == "stream" and mlp_apart(blocks):
        for place, row in zip(places, blocks, strict=True):
            axes.plot([row.mlp_channels[0]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.6)
        words += "\n(line: of the MLP)"
    axes.set_xlabel(f"M{words} (MACs)" if part == "flops" else words, fontsize=9)
    axes.set_xlim(0, 1.02 * max(of, default=1) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=part != "flops"))
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
