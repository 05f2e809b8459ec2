"""The picture of a search that measures candidates: what each one gave, and the best so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.pictures.figures import MARKERS, PALETTE, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURED = {
    "kl": "KL(large ‖ cut) (nats per image)",
    "top1": "missed by top-1 (%)",
    "loss": "cross-entropy (nats per image)",
    "features": "error of the features (share of their variance)",
}
ORIGINS = ("importance", "random", "crossover", "mutation")  # of a candidate of evolution
WIDE = 2.0  # a ratio of values above which an axis is logarithmic
NAMED = 12  # combinations of stage widths that the legend has room for


def candidates_figure(candidates: pd.DataFrame, title: str) -> Figure | None:
    """A point per candidate in the order of measurement, where it came from or its stage widths by colour; less is
    better.

    candidates: candidates.csv as a frame, columns candidate, value, measured, stage_widths, of evolution origin, of a
    front budget. The best so far is a line, of each budget its own; the best of all has a ring. None without a
    candidate.
    """
    import pandas as pd

    if not {"candidate", "value", "measured", "stage_widths"} <= set(candidates.columns):
        return None
    numbers = candidates[["candidate", "value"]].apply(pd.to_numeric, errors="coerce")
    frame = candidates.assign(**numbers).dropna(subset=["candidate", "value", "stage_widths"])
    if frame.empty:
        return None
    frame = frame.assign(widths=frame["stage_widths"].map(widths_of))
    figure = new_figure(8.0, 4.6, title)
    axes = figure.subplots()
    least = int(frame["value"].to_numpy().argmin())
    best = frame[["candidate", "value"]].to_numpy()[least]
    line: dict[str, Any] = {"where": "post", "color": "black", "lw": 1.3, "zorder": 2, "label": "best so far"}
    for budget, own in frame.groupby("budget") if "budget" in frame else [(None, frame)]:
        axes.step(own["candidate"], own["value"].cummin(), **line)
        line["label"] = "_"
        if budget is not None:
            at = (float(own["candidate"].iloc[0]), float(own["value"].iloc[0]))
            axes.annotate(f"{float(str(budget)):g}", at, textcoords="offset points", xytext=(-2, 6), fontsize=7.5)
    ring: dict[str, Any] = {"ms": 13, "mfc": "none", "mec": "black", "mew": 1.4, "zorder": 4}
    axes.plot([best[0]], [best[1]], "o", **ring, label=f"the best: {best[1]:.3g}")
    if "origin" in frame:
        _points_of(axes, frame)
    else:
        _points(axes, frame)
    words = MEASURED.get(str(frame["measured"].iloc[0]), str(frame["measured"].iloc[0]))
    if frame["value"].min() > 0 and frame["value"].max() > WIDE * frame["value"].min():
        _log_axis(axes, frame["value"].max() / frame["value"].min())
        words += ", log scale"
    tidy(axes, "candidate, in the order of measurement", words)
    _whole_numbers(axes)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def widths_of(text: Any) -> tuple[float, ...]:
    """The stage widths of a row: "64", or "48 96"."""
    return tuple(float(word) for word in str(text).split() if word.replace(".", "", 1).isdigit())


def _points_of(axes: Axes, frame: pd.DataFrame) -> None:
    """A colour and a marker for each origin."""
    for origin, color, marker in zip(ORIGINS, PALETTE, MARKERS, strict=False):
        own = frame[frame["origin"] == origin]
        if not own.empty:
            style: dict[str, Any] = {"color": color, "marker": marker, "ms": 5.5, "ls": "", "mec": "#333333"}
            axes.plot(own["candidate"], own["value"], **style, mew=0.4, zorder=3, label=origin)


def _points(axes: Axes, frame: pd.DataFrame) -> None:
    """Dark to light by the widths, the narrowest first; each combination with a marker, too."""
    import matplotlib
    import numpy as np

    found = sorted(set(frame["widths"]))
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, len(found)))
    every = -(-len(found) // NAMED)
    header = "stage width" if len(found[0]) == 1 else "stage widths"
    axes.plot([], [], ls="", label=header if every == 1 else f"{header}, one in {every}")
    for i, (widths, color) in enumerate(zip(found, shades, strict=True)):
        own = frame[frame["widths"] == widths]
        label = ", ".join(f"{w:g}" for w in widths) if i % every == 0 else "_"
        style: dict[str, Any] = {"color": color, "marker": MARKERS[i % len(MARKERS)], "ms": 6.5, "ls": ""}
        axes.plot(own["candidate"], own["value"], **style, mec="#333333", mew=0.5, zorder=3, label=label)


def _log_axis(axes: Axes, ratio: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio > 10 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
