"""The picture of a rotated basis: how much of each stage's stream its first channels hold (section 2.7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nas.pictures.figures import PALETTE, new_figure, tidy

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Shares = Mapping[int, NDArray[np.float64]]


def spectra(path: Path) -> tuple[Shares, Shares]:
    """Of each rotated stage the share of its energy in every rotated channel and, falling, in every old one."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, dict[int, NDArray[np.float64]]] = {"energy": {}, "before": {}}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, no mapping
                kind, _, stage = name.partition(".")
                if kind in found:
                    found[kind][int(stage)] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError):
        return {}, {}
    return found["energy"], found["before"]


def spectrum_figure(energy: Shares, before: Shares, title: str) -> Figure | None:
    """The share of the energy that a prefix holds: rotated, and if channels were only sorted. None without a stage.

    energy, before: per stage (E,), shares that sum to one. The first rotated channel is the mean, which norms take
    away; it has little or no share.
    """
    import numpy as np

    if not energy:
        return None
    figure = new_figure(6.4, 4.6, title)
    axes = figure.subplots()
    for i, (stage, shares) in enumerate(sorted(energy.items())):
        color, words = PALETTE[i % len(PALETTE)], "stream" if len(energy) == 1 else f"stage {stage}"
        x = np.arange(len(shares) + 1) / len(shares)
        half = float(shares[: len(shares) // 2].sum())
        label = f"{words}, {len(shares)} channels, rotated: {half:.1%} in the first half"
        axes.plot(x, np.concatenate([[0.0], shares.cumsum()]), "-", color=color, lw=1.5, label=label)
        if stage in before:
            old = np.concatenate([[0.0], np.sort(before[stage])[::-1].cumsum()])
            axes.plot(x, old, "--", color=color, lw=1.1, label=f"{words}, channels sorted by energy")
    axes.axvline(0.5, color="#bbbbbb", lw=0.8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    tidy(axes, "share of the channels kept", "share of the energy that the readers see")
    return figure
