"""The picture of a minimax search: multiplier, FLOPs, and every block's counts and gates over the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nas.pictures.figures import PALETTE, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BY_BLOCK = {
    "heads": "heads removed, s / H",
    "channels": "V channels removed, mean r / d",
    "neurons": "neurons removed, s / M",
    "keep_attention": "P(attention is kept)",
    "keep_mlp": "P(MLP is kept)",
}


def steps_figure(steps: pd.DataFrame, title: str) -> Figure | None:
    """z; F/F_full, expected and as the architecture would be now; and a panel of lines, dark to light by block.

    steps: steps.csv as a frame, columns step, z, expected, hard, budget and <name>_<block>. A panel whose lines all
    stand still at keeping is left out, the second of two gates that are one as well. None without steps.
    """
    import pandas as pd

    steps = steps.apply(pd.to_numeric, errors="coerce")
    if not {"step", "z", "expected", "hard", "budget"} <= set(steps.columns) or steps.empty:
        return None
    panels = {name: [str(c) for c in steps if str(c).rpartition("_")[0] == name] for name in BY_BLOCK}
    keeps = [steps[panels[name]].to_numpy() for name in ("keep_attention", "keep_mlp")]
    words = dict(BY_BLOCK)
    if keeps[0].shape == keeps[1].shape and (keeps[0] == keeps[1]).all():
        del panels["keep_mlp"]
        words["keep_attention"] = "P(block is kept)"
    shown = [n for n, c in panels.items() if c and not (n.startswith("keep") and (steps[c] == 1).all(axis=None))]
    columns = (len(shown) + 3) // 2
    figure = new_figure(4.2 * columns, 6.2, title)
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    axes[0].plot(steps["step"], steps["z"], color=PALETTE[0], lw=1.4)
    tidy(axes[0], "step", "multiplier z")
    for name, stroke, label in (("hard", "-", "as decided now"), ("expected", "--", "expected over the gates")):
        axes[1].plot(steps["step"], steps[name], stroke, color=PALETTE[name == "expected"], lw=1.4, label=label)
    axes[1].plot(steps["step"], steps["budget"], ":", color="#555555", lw=1.2, label="budget")
    axes[1].set_ylim(0, 1.05)
    axes[1].legend(fontsize=7, frameon=False)
    tidy(axes[1], "step", "F / F_full")
    for place, name in zip(axes[2:], shown, strict=False):
        _by_block(place, steps, panels[name], words[name])
    for place in axes[2 + len(shown) :]:
        place.set_visible(False)
    return figure


def _by_block(axes: Axes, steps: pd.DataFrame, columns: list[str], words: str) -> None:
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    for i, column in enumerate(columns):
        block = column.rpartition("_")[2]
        color = shades(0.05 + 0.9 * i / max(1, len(columns) - 1))
        axes.plot(steps["step"], steps[column], color=color, lw=1.2, label=f"block {block}")
    axes.set_ylim(-0.03, 1.03)
    if len(columns) <= 12:
        axes.legend(fontsize=6, frameon=False, ncols=2)
    tidy(axes, "step", words)
