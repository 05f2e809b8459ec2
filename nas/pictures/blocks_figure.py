"""The picture of how like a small network's stream is to the large one's, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.pictures.figures import MARKERS, PALETTE, STROKES, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "blocks.png"


def blocks_figure(cosines: Mapping[str, Sequence[float]], title: str) -> Figure:
    """cosines: {network: a value per block}."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.0, 3.6, title)
    axes = figure.subplots()
    for i, (name, values) in enumerate(cosines.items()):
        style: dict[str, Any] = dict(
            color=PALETTE[i], marker=MARKERS[i], linestyle=STROKES[i], ms=6 - 2 * i, lw=2 - i / 2
        )
        axes.plot(range(len(values)), values, label=name, **style)
    axes.set_ylim(min(0.0, *(min(values) for values in cosines.values())), 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes, "after block", "cosine similarity to the large network")
    return figure
