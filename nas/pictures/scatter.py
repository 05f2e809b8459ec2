"""Accuracy against cost: points, fronts, seeds, the line of uniform compression, the literature.

Drawn as nas/pictures/figures.py draws: readable in greyscale, no global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nas.pictures.figures import GREY, MARKERS, PALETTE, STROKES, X_AXES, new_figure, tidy
from search_spaces.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BESIDE, NEAR = 12, 36  # points from a label to its point: without a leader; only to keep clear of a line
SOURCE_WIDTH = 48  # letters of a line of sources in the legend
Y_AXES = {"top1": "top-1 (%)", "top5": "top-5 (%)"}
WHOLE = ("original", "previous", "large")  # roles of networks that nothing was cut from in their run
ROLES = {
    "original": "original network, as it was",
    "previous": "compact network of the round before",
    "large": "large network, trained",
    "subnet": "subnet, before retraining",
    "refitted": "compact, refitted, before retraining",
    "compact": "compact, retrained",
}
KEYS = ["space", "role", "split", "config"]  # what makes a point; its rows are seeds


def pareto_figure(
    points: pd.DataFrame,
    title: str,
    *,
    x: str = "gflops",
    y: str = "top1",
    uniform: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
    on: str = "",
) -> Figure:
    """Accuracy against cost: per configuration the mean of its rows, and bars to their lowest and highest.

    points: columns `x` (gflops in GFLOPs (MACs), params a count, images_per_s, latency in ms) and `y` (percent), and,
    where known, space (marker and colour), role (original, previous, large, subnet, refitted or compact), split (what
    the accuracy was measured on), config (rows that agree in space, role, split and config differ in their seed;
    absent: every row stands for itself), label (words beside the point), this (a row to put a ring around). uniform:
    the same columns, joined by a line: networks that compress every block alike. published: columns network, gflops,
    params_m, top1, source, in grey, never in a front, their sources in the legend. A front is drawn per split:
    accuracies on two splits are not to be compared. on: the device that milliseconds are of. Rows that lack x or y
    are not drawn. Raises UserError for an unknown axis, or when no row has both.
    """
    import pandas as pd

    for name, known in ((x, X_AXES), (y, Y_AXES)):
        if name not in known:
            raise UserError(f"cannot draw {name!r} on this axis; expected one of {', '.join(known)}")
    rows = _rows(points, x, y)
    if rows.empty:
        raise UserError(f"{title}: no network has both {x} and {y}; nothing to draw")
    figure = new_figure(8.6, 6.4, title)
    axes = figure.add_subplot(label="pareto")
    marks = _over_seeds(rows)
    alike = _over_seeds(_rows(uniform, x, y)) if uniform is not None else marks.iloc[:0]
    grey = _published_rows(published, x, y) if published is not None else marks.iloc[:0]
    ringed = _this_run(rows, marks)
    costs = pd.concat([marks["x"], alike["x"], grey["x"]])
    if costs.min() > 0 and costs.max() > 20 * costs.min():
        _log_axis(axes)
    if len(grey):
        words = "\n".join(textwrap.wrap(f"the literature: {'; '.join(dict.fromkeys(grey['source']))}", SOURCE_WIDTH))
        axes.plot(grey["x"], grey["y"], "o", color=GREY, ms=3.5, zorder=1, label=words)
    if len(alike):
        axes.plot(alike["x"], alike["y"], "x:", color="#444444", lw=1.3, zorder=2, label="every block alike")
        _bars(axes, alike, "#444444")
    _fronts(axes, pd.concat([marks, alike]), x)
    _points(axes, marks)
    if len(ringed):
        ring: dict[str, Any] = {"ms": 15, "mfc": "none", "mec": "black", "mew": 1.4}
        axes.plot(ringed["x"], ringed["y"], "o", **ring, zorder=5, label="this run")
    axes.margins(0.08)
    tidy(axes, f"{X_AXES[x]}, {on}" if on else X_AXES[x], Y_AXES[y])
    _legend(axes, marks)
    # Radii in points, as drawn; the labels of one's own points come first and find the better places.
    kinds = ((ringed, 8.0, 8.0, "black"), (marks, 5.0, 8.0, "black"), (alike, 4.0, 8.0, "black"))
    labels, spots = [], []
    for frame, radius, size, color in (*kinds, (grey, 2.5, 6.5, "#6b6b6b")):
        for at_x, at_y, words in zip(*(frame[c].tolist() for c in ("x", "y", "label")), strict=True):
            spots.append((at_x, at_y, radius))
            labels += [(at_x, at_y, words, size, color)] if words else []
    place_labels(axes, labels, spots)
    return figure


def _rows(points: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """Rows that have both values, as columns x and y, with every optional column filled in."""
    import pandas as pd

    words = dict.fromkeys(("space", "role", "split", "label"), "")
    frame = points.reindex(columns=list(dict.fromkeys([*points.columns, *words, "this"])))
    for name, otherwise in words.items():
        frame[name] = frame[name].astype(object).where(frame[name].notna(), otherwise)
    frame = frame.assign(this=frame["this"].eq(True))
    if "config" not in frame:
        frame = frame.assign(config=[str(i) for i in range(len(frame))])
    values = {c: pd.to_numeric(points[c], errors="coerce") if c in points else float("nan") for c in (x, y)}
    frame = frame[[*words, "this", "config"]].assign(x=values[x], y=values[y])
    return frame.assign(x=frame["x"] / (1e6 if x == "params" else 1)).dropna(subset=["x", "y"])


def _published_rows(published: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    import pandas as pd

    columns = {"params": "params_m"}.get(x, x), y
    if not {"network", *columns} <= set(published.columns):
        return pd.DataFrame({"x": [], "y": [], "label": []}, dtype=float)
    costs, scores = (pd.to_numeric(published[c], errors="coerce") for c in columns)
    source = published.get("source", "no source given")
    rows = pd.DataFrame({"x": costs, "y": scores, "label": published["network"], "source": source})
    return rows.dropna(subset=["x", "y"])


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per configuration: x and y as means, their lowest and highest, seeds how many there were."""
    ends = {"": "mean", "_low": "min", "_high": "max"}
    spread = {f"{c}{end}": (c, how) for c in "xy" for end, how in ends.items()}
    facts = {"seeds": ("x", "size"), "label": ("label", "first"), "this": ("this", "any")}
    marks = rows.groupby(KEYS, sort=False).agg(**(spread | facts))
    return marks.reset_index().sort_values("x", kind="stable")


def _this_run(rows: pd.DataFrame, marks: pd.DataFrame) -> pd.DataFrame:
    """The rows to put a ring around, labelled; a mark that is exactly such a row gives up its own label."""
    alone = marks["this"] & (marks["seeds"] == 1)
    marks["label"] = marks["label"].where(~alone, "")
    ringed = rows[rows["this"]].merge(marks[[*KEYS, "seeds"]])
    words = ringed["label"].where(ringed["label"] != "", ringed["role"])
    said = (ringed["seeds"] > 1) & (ringed["label"] != "")  # by the mean's label
    return ringed.assign(label=("this run: " + words).where(~said & (words != ""), "this run"))


def _marker(i: int, role: str) -> dict[str, Any]:
    """The space decides marker and colour, the role how the marker is filled."""
    color, marker = PALETTE[i % 6], MARKERS[(i + i // 6) % 6]
    fill = {"original": "right", "previous": "top", "large": "left", "subnet": "none", "refitted": "bottom"}.get(
        role, "full"
    )
    return {"color": color, "marker": marker, "fillstyle": fill, "markeredgecolor": color, "markersize": 8}


def _bars(axes: Axes, marks: pd.DataFrame, color: str) -> None:
    """From the lowest to the highest seed, where there are several."""
    several = marks[marks["seeds"] > 1]
    if len(several):
        ends = [(several[c], several[f"{c}_low"], several[f"{c}_high"]) for c in "xy"]
        # the mean of equal costs may differ from them in the last bit
        reach = [[(mean - low).clip(lower=0), (high - mean).clip(lower=0)] for mean, low, high in ends]
        style: dict[str, Any] = {"fmt": "none", "ecolor": color, "capsize": 3, "elinewidth": 1.2, "zorder": 3}
        axes.errorbar(several["x"], several["y"], xerr=reach[0], yerr=reach[1], **style)


def _points(axes: Axes, marks: pd.DataFrame) -> None:
    for i, space in enumerate(dict.fromkeys(marks["space"])):
        for role, group in marks[marks["space"] == space].groupby("role"):
            style = _marker(i, str(role))  # the underscore keeps it out of the legend, which splits the two
            axes.plot(group["x"], group["y"], ls="", zorder=4, label=f"_{space} {role}", **style)
            _bars(axes, group, PALETTE[i % 6])


def _fronts(axes: Axes, marks: pd.DataFrame, x: str) -> None:
    """The best accuracy to be had at a cost, per split, as a staircase."""
    from nas.pictures.pareto import pareto_front

    more_is_better = x == "images_per_s"
    for i, (split, group) in enumerate(marks.groupby("split")):
        front = pareto_front(group, {"x": "max" if more_is_better else "min", "y": "max"}).sort_values("x")
        steps = "steps-pre" if more_is_better else "steps-post"
        style: dict[str, Any] = {"color": "black", "lw": 1.2, "ls": STROKES[i % 6], "drawstyle": steps}
        words = f"front on the {split!s}" if split else "front"
        axes.plot(front["x"], front["y"], **style, zorder=2, label=words)


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, marks: pd.DataFrame) -> None:
    """Below the axes, where it hides nothing: spaces by marker, roles by filling, then lines."""
    from matplotlib.lines import Line2D

    entries: list[Any] = []
    for i, space in enumerate(dict.fromkeys(marks["space"])):
        entries += [Line2D([], [], ls="", **_marker(i, "compact"), label=space)] if space else []
    for role, words in ROLES.items():
        if (marks["role"] == role).any():
            style = _marker(0, role) | {"color": "#444444", "markeredgecolor": "#444444"}
            entries.append(Line2D([], [], ls="", **style, label=words))
    entries += axes.get_legend_handles_labels()[0]
    if (marks["seeds"] > 1).any():
        words = "mean of several seeds, lowest to highest"
        entries.append(Line2D([], [], color="#444444", marker="_", ls="-", lw=1.2, label=words))
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11)}
    axes.legend(handles=entries, ncols=3, frameon=False, fontsize=8, **place)


def place_labels(
    axes: Axes,
    texts: Sequence[tuple[float, float, str, float, str]],
    spots: Sequence[tuple[float, float, float]],
) -> None:
    """Write (x, y, words, size, colour) near its point, clear of every (x, y, radius) and earlier label.

    Sizes and radii in points. Tries ever wider circles around the point, and among the near ones first a
    place that no line of the axes crosses either. Right beside its point a label is nearer to it than to any
    other; further out a thin line leads back. A label that the axes have no room for is left out, the last
    ones first. Fixes the figure's layout.
    """
    import numpy as np
    from matplotlib.transforms import Bbox

    figure: Any = axes.get_figure()
    figure.draw_without_rendering()  # the layout has to be final before pixels mean anything
    figure.set_layout_engine("none")
    scale, inside, renderer = figure.dpi / 72, axes.get_window_extent(), figure.canvas.get_renderer()
    lines = _strokes(axes)
    at = axes.transData.transform([(x, y) for x, y, _ in spots])
    radii = [radius * scale for _, _, radius in spots]
    taken = [Bbox([p - r, p + r]) for p, r in zip(at, radii, strict=True)]
    turns = [(np.cos(a), np.sin(a)) for a in np.radians(range(0, 360, 15))]
    circles = [(r, np.array(turn)) for r in (7, BESIDE, 18, 26, NEAR, 48, 64, 84) for turn in turns]
    for x, y, words, size, color in texts:
        spot = axes.transData.transform((x, y))
        others = at[np.abs(at - spot).max(axis=1) > 0.5]
        text = axes.text(x, y, words, fontsize=size)
        half = np.array(text.get_window_extent(renderer).size) / 2
        text.remove()
        places: list[tuple[int, Any, Bbox]] = []
        for radius, direction in circles:
            if places and radius > NEAR:
                break
            centre = spot + direction * (radius * scale + half)
            box = Bbox([centre - half, centre + half])
            if not _within(box, inside) or box.count_overlaps(taken):
                continue
            if radius <= BESIDE:
                gaps = np.linalg.norm(np.maximum(np.abs(others - centre) - half, 0), axis=1)
                if (gaps < 1.5 * radius * scale).any():
                    continue
            places.append((radius, centre, box))
            if not any(line.intersects_bbox(box, filled=False) for line in lines):
                places = places[-1:]
                break
        if not places:
            continue
        radius, centre, box = places[0]
        taken.append(box.padded(1.5 * scale))
        style: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": size,
            "color": color,
            "zorder": 6,
        }
        if radius > BESIDE:
            style["arrowprops"] = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkB": 3}
        offset = tuple((centre - spot) / scale)
        note = axes.annotate(words, (x, y), xytext=offset, textcoords="offset points", **style)
        note.set_in_layout(False)


def _strokes(axes: Axes) -> list[Any]:
    """Every line and error bar as it is drawn, in pixels; markers alone are none."""
    paths: list[tuple[Any, Any]] = [
        (line, line.get_path()) for line in axes.get_lines() if line.get_linestyle() != "None"
    ]
    paths += [(bars, path) for bars in axes.collections for path in bars.get_paths()]
    return [artist.get_transform().transform_path(path) for artist, path in paths]


def _within(box: Any, outer: Any) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)
