"""The picture of how like a small network's stream is to the large one's, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nas.pictures.figures import MARKERS, PALETTE, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "blocks.png"


def blocks_figure(cosines: Mapping[str, Sequence[float]], title: str) -> Figure:
    """cosines: {network: a value per block}."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(6.0, 3.6, title)
    axes = figure.subplots()
    for i, (name, values) in enumerate(cosines.items()):
        axes.plot(range(len(values)), values, color=PALETTE[i], marker=MARKERS[i], ms=4, lw=1.4, label=name)
    axes.set_ylim(min(0.0, *(min(values) for values in cosines.values())), 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False)
    tidy(axes, "after block", "cosine similarity to the large network")
    return figure
