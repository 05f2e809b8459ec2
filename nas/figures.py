"""The pictures of a run, drawn from frames: choices over epochs, curves, accuracy against cost.

Colours are Okabe and Ito's, or run evenly from dark to light; every line and point also differs in stroke or
marker, so that a greyscale print and a colour-blind reader lose nothing. No pyplot: figures are plain objects
on the Agg canvas, with no global state and no window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search_spaces.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#8a8a8a"
DPI = 150
BESIDE, NEAR = 12, 36  # points from a label to its point: without a leader; only to keep clear of a line
X_AXES = {"gflops": "GFLOPs (MACs)", "params": "parameters (M)", "images_per_s": "images/s"}
Y_AXES = {"top1": "top-1 (%)", "top5": "top-5 (%)"}
CHOICES = {
    "alpha": "compression factor α",
    "fraction": "fraction of channels kept",
    "channels": "channels of the MLP",
    "channel": "a channel of the MLP",
}
TERMS = {
    "ce": "cross-entropy",
    "kl": "λ · KL",
    "penalty": "FLOPs penalty",
    "tnn": "truncated nuclear norm",
    "distill": "distillation",
}
SCHEDULES = {
    "temperature τ": ("tau",),
    "weight λ": ("lam",),
    "learning rate": ("lr", "arch_lr"),
    "multiplier z": ("multiplier",),
}
RATES = {"lr": "weights", "arch_lr": "choices"}
ROLES = {"large": "large network", "subnet": "subnet, before retraining", "compact": "compact, retrained"}
KEYS = ["space", "role", "split", "config"]  # what makes a point; its rows are seeds


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def _tidy(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.grid(True, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def candidate_text(value: Any) -> str:
    """A candidate as the reader writes it: 4, 0.75, True; the same for 4.0 and "4"."""
    if str(value) in ("True", "False"):
        return str(value)
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def choices_figure(choices: pd.DataFrame, picks: Sequence[Mapping[str, Any]], title: str) -> Figure | None:
    """How sure each block became of each candidate: a panel per choice, a row per block, epochs to the right.

    choices: columns epoch, block, choice, candidate, probability (0 to 1); the candidates in the search
    space's order, the largest network first. Within a block's row the height of a colour is the candidate's
    probability, so a row that ends in one colour has decided. picks: the candidates of arch.json by block and
    choice name, written beside the rows with their last probability; empty: the likeliest are. None when no
    row is complete.
    """
    import pandas as pd

    columns = ["epoch", "block", "choice", "candidate", "probability"]
    if not set(columns) <= set(choices.columns):
        return None
    numbers = choices[["epoch", "block", "probability"]].apply(pd.to_numeric, errors="coerce")
    frame = choices[columns].assign(**numbers).dropna()
    if frame.empty:
        return None
    frame = frame.assign(candidate=frame["candidate"].map(candidate_text))
    names, blocks = list(dict.fromkeys(frame["choice"])), int(frame["block"].max()) + 1
    figure = _figure(0.6 + 6.2 * len(names), 1.9 + 0.27 * max(blocks, 6), title)
    panels = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, names, strict=True):
        _choice_panel(axes, frame[frame["choice"] == name], str(name), blocks, picks)
    panels[0].set_ylabel("transformer block, first to last", fontsize=9)
    return figure


def _choice_panel(axes: Axes, frame: pd.DataFrame, name: str, blocks: int, picks: Sequence[Mapping[str, Any]]) -> None:
    import matplotlib
    import numpy as np
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation

    candidates = _in_order(frame)
    shades = np.linspace(0.05, 0.98, len(candidates)) if len(candidates) > 1 else [0.05]
    colors = dict(zip(candidates, matplotlib.colormaps["viridis"](shades), strict=True))
    epochs = sorted(frame["epoch"].unique())
    x = np.ravel([[e - 0.5, e + 0.5] for e in epochs])  # an epoch is as wide as it lasts
    beside = axes.get_yaxis_transform()
    for block in range(blocks):
        rows = frame[frame["block"] == block]
        if rows.empty:
            continue
        shares = rows.pivot_table(index="epoch", columns="candidate", values="probability", aggfunc="last")
        shares = shares.reindex(index=epochs, columns=candidates).fillna(0.0)
        upper = np.full(len(epochs), float(block) - 0.42)
        for candidate in candidates:
            lower = upper + 0.84 * shares[candidate].to_numpy()
            band = axes.fill_between(x, np.repeat(upper, 2), np.repeat(lower, 2), lw=0, color=colors[candidate])
            band.set_label(f"block {block}: {candidate}")
            upper = lower
        last = shares.iloc[-1]
        picked = picks[block].get(name) if block < len(picks) else None
        taken = str(last.idxmax()) if picked is None else candidate_text(picked)
        text = f"{taken}  ({100 * last.get(taken, 0.0):.0f} %)"
        axes.text(1.012, block, text, transform=beside, va="center", fontsize=8)
    figure: Any = axes.get_figure()
    above = axes.transAxes + ScaledTranslation(0, 6 / 72, figure.dpi_scale_trans)
    header = "chosen (probability)" if picks else "likeliest (probability)"
    axes.text(1.012, 1.0, header, transform=above, fontsize=8, color="#444444")
    axes.set(xlim=(x[0], x[-1]), ylim=(blocks - 0.5, -0.5), yticks=range(blocks))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", fontsize=9)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.spines[:].set_visible(False)
    handles = [Patch(facecolor=colors[c], edgecolor="#444444", linewidth=0.5, label=c) for c in candidates]
    axes.legend(
        handles=handles,
        title=f"{CHOICES.get(name, name)}: the height of its colour in a row is its probability",
        ncols=max(len(handles), 1),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        bbox_transform=above,
        frameon=False,
        fontsize=8,
        title_fontsize=9,
    )


def _in_order(frame: pd.DataFrame) -> list[str]:
    """The candidates of all blocks by size, in the direction the space lists them; words as listed."""
    seen = list(dict.fromkeys(frame["candidate"]))
    try:
        first = frame[(frame["epoch"] == frame["epoch"].min()) & (frame["block"] == frame["block"].min())]
        listed = [float(c) for c in dict.fromkeys(first["candidate"])]
        return sorted(seen, key=float, reverse=len(listed) > 1 and listed[0] > listed[-1])
    except ValueError:
        return seen


def curves_figure(
    log: pd.DataFrame, title: str, backbone_gflops: float | None = None, budget: float | None = None
) -> Figure | None:
    """Loss terms, accuracy on the validation split, GFLOPs (MACs) and schedules over epochs.

    log: log.csv as a frame; a column it lacks leaves its line out. backbone_gflops: of the large network.
    budget: the share of them that the architecture may take. None when there is no epoch or nothing to draw.
    """
    import pandas as pd

    log = log.apply(pd.to_numeric, errors="coerce").dropna(axis=1, how="all")
    if "epoch" not in log.columns:
        return None
    log = log.dropna(subset=["epoch"]).sort_values("epoch")
    names = [str(c) for c in log.columns]
    moving = "expected_gflops" in names or ("selected_gflops" in names and log["selected_gflops"].nunique() > 1)
    panels = {
        "loss": any(c == "loss" or c.startswith("loss_") for c in names),
        "accuracy": any(c.startswith(("large_top", "subnet_top")) for c in names),
        "cost": moving,
        "schedules": any(c in names for columns in SCHEDULES.values() for c in columns),
    }
    shown = [name for name, there in panels.items() if there]
    if not shown:
        return None
    rows, columns = (len(shown) + 1) // 2, min(len(shown), 2)
    figure = _figure(5.4 * columns, 3.6 * rows + 0.4, title)
    grid = figure.add_gridspec(rows, columns)
    for i, name in enumerate(shown):
        cell = grid[i // 2, :] if i == len(shown) - 1 and len(shown) == 3 else grid[i // 2, i % 2]
        if name == "schedules":
            _schedules(figure, cell, log)
            continue
        axes = figure.add_subplot(cell, label=name)
        if name == "loss":
            _losses(axes, log)
        elif name == "accuracy":
            _accuracies(axes, log)
        else:
            _costs(axes, log, backbone_gflops, budget)
        _epochs(axes, log)
    return figure


def _line(axes: Axes, log: pd.DataFrame, column: str, label: str, i: int, **style: Any) -> None:
    """One column over epochs; the i-th stroke, colour and marker."""
    every = max(1, len(log) // 8)
    # Markers start at different epochs, so that lines on top of each other can be told apart.
    own: dict[str, Any] = {"color": PALETTE[i % 6], "linestyle": STROKES[i % 6], "marker": MARKERS[i % 6]}
    own |= {"linewidth": 1.5, "markersize": 4, "markevery": (i % every, every)}
    axes.plot(log["epoch"], log[column], label=label, **(own | style))


def _epochs(axes: Axes, log: pd.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(log) > 1:
        axes.set_xlim(log["epoch"].min(), log["epoch"].max())


def _losses(axes: Axes, log: pd.DataFrame) -> None:
    columns = [str(c) for c in log.columns if str(c).startswith("loss_")]
    # A penalty of 1e-12 per MAC lies decades under the cross-entropy and would vanish on a linear axis.
    levels = [log[c][log[c] > 0].median() for c in columns if (log[c] > 0).any()]
    log_scale = bool(levels) and max(levels) > 50 * min(levels) and bool((log[columns] >= 0).all(axis=None))
    if "loss" in log:
        _line(axes, log, "loss", "total", 0, color="black", linewidth=2.0, marker="")
    for i, column in enumerate(columns):
        term = column.removeprefix("loss_")
        # Zero has no place on a log axis: the term starts where it starts to act.
        drawn = log.assign(**{column: log[column].where(log[column] > 0)}) if log_scale else log
        _line(axes, drawn, column, TERMS.get(term, term), i, linestyle=STROKES[(i + 1) % 6])
    axes.set_yscale("log" if log_scale else "linear")
    _tidy(axes, "epoch", "training loss (log scale)" if log_scale else "training loss")
    axes.set_title("Loss and its terms", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _accuracies(axes: Axes, log: pd.DataFrame) -> None:
    for i, who in enumerate(("large", "subnet")):
        for top, light in (("top1", 1.0), ("top5", 0.55)):
            if f"{who}_{top}" in log:
                stroke = "-" if top == "top1" else ":"
                words = f"{who}, {top.replace('top', 'top-')}"
                _line(axes, log, f"{who}_{top}", words, i, linestyle=stroke, alpha=light)
    _tidy(axes, "epoch", "accuracy (%)")
    axes.set_title("Accuracy on the validation split", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower right")


def _costs(axes: Axes, log: pd.DataFrame, backbone_gflops: float | None, budget: float | None) -> None:
    if "expected_gflops" in log:
        _line(axes, log, "expected_gflops", "expected under the probabilities", 0)
    if "selected_gflops" in log:
        _line(axes, log, "selected_gflops", "architecture selected now", 1, drawstyle="steps-post")
    if backbone_gflops is not None:
        lines = [("backbone", backbone_gflops, "-", "bottom")]
        if budget is not None:
            lines.append((f"budget\n({budget:.4g})", budget * backbone_gflops, "--", "center"))
        for words, height, stroke, side in lines:
            axes.axhline(height, color="#555555", linestyle=stroke, linewidth=1.2)
            axes.text(1.01, height, words, transform=axes.get_yaxis_transform(), va=side, fontsize=8)
        axes.set_ylim(0, 1.12 * backbone_gflops)
    _tidy(axes, "epoch", X_AXES["gflops"])
    axes.set_title("Cost of the subnet", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def _schedules(figure: Figure, cell: Any, log: pd.DataFrame) -> None:
    """A strip per schedule, one above the other: their units have nothing in common."""
    strips = {words: [c for c in names if c in log] for words, names in SCHEDULES.items()}
    strips = {words: names for words, names in strips.items() if names}
    grid = cell.subgridspec(len(strips), 1, hspace=0.08)
    for i, (words, names) in enumerate(strips.items()):
        axes = figure.add_subplot(grid[i], label=f"schedule {names[0]}")
        for k, name in enumerate(names):
            _line(axes, log, name, RATES.get(name, name), k, marker="")
        if words == "learning rate":
            axes.set_yscale("log" if bool((log[names].min() > 0).all()) else "linear")
            axes.legend(fontsize=7, frameon=False, ncols=2)
        last = i == len(strips) - 1
        _tidy(axes, "epoch" if last else "", words)
        axes.tick_params(which="both", labelbottom=last, labelsize=7)
        axes.yaxis.label.set(fontsize=8, rotation=0, ha="right", va="center")
        axes.margins(y=0.15)
        _epochs(axes, log)
        if i == 0:
            axes.set_title("Schedules", fontsize=10)


def pareto_figure(
    points: pd.DataFrame,
    title: str,
    *,
    x: str = "gflops",
    y: str = "top1",
    uniform: pd.DataFrame | None = None,
    published: pd.DataFrame | None = None,
) -> Figure:
    """Accuracy against cost: per configuration the mean of its rows, and bars to their lowest and highest.

    points: columns `x` (gflops in GFLOPs (MACs), params a count, images_per_s) and `y` (percent), and, where
    known, space (marker and colour), role (large, subnet or compact), split (what the accuracy was measured
    on), config (rows that agree in space, role, split and config differ in their seed; absent: every row
    stands for itself), label (words beside the point), this (a row to put a ring around). uniform: the same
    columns, joined by a line: networks that compress every block alike. published: columns network, gflops,
    params_m, top1, in grey, never in a front. A front is drawn per split: accuracies on two splits are not to
    be compared. Rows that lack x or y are not drawn. Raises UserError for an unknown axis, or when no row has
    both.
    """
    import pandas as pd

    for name, known in ((x, X_AXES), (y, Y_AXES)):
        if name not in known:
            raise UserError(f"cannot draw {name!r} on this axis; expected one of {', '.join(known)}")
    rows = _rows(points, x, y)
    if rows.empty:
        raise UserError(f"{title}: no network has both {x} and {y}; nothing to draw")
    figure = _figure(8.6, 6.4, title)
    axes = figure.add_subplot(label="pareto")
    marks = _over_seeds(rows)
    alike = _over_seeds(_rows(uniform, x, y)) if uniform is not None else marks.iloc[:0]
    grey = _published_rows(published, x, y) if published is not None else marks.iloc[:0]
    ringed = _this_run(rows, marks)
    costs = pd.concat([marks["x"], alike["x"], grey["x"]])
    if costs.min() > 0 and costs.max() > 20 * costs.min():
        _log_axis(axes)
    if len(grey):
        axes.plot(grey["x"], grey["y"], "o", color=GREY, ms=3.5, zorder=1, label="published results")
    if len(alike):
        axes.plot(alike["x"], alike["y"], "x:", color="#444444", lw=1.3, zorder=2, label="every block alike")
        _bars(axes, alike, "#444444")
    _fronts(axes, pd.concat([marks, alike]), x)
    _points(axes, marks)
    if len(ringed):
        ring: dict[str, Any] = {"ms": 15, "mfc": "none", "mec": "black", "mew": 1.4}
        axes.plot(ringed["x"], ringed["y"], "o", **ring, zorder=5, label="this run")
    axes.margins(0.08)
    _tidy(axes, X_AXES[x], Y_AXES[y])
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
    return pd.DataFrame({"x": costs, "y": scores, "label": published["network"]}).dropna(subset=["x", "y"])


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
    fill = {"large": "left", "subnet": "none"}.get(role, "full")
    return {"color": color, "marker": marker, "fillstyle": fill, "markeredgecolor": color, "markersize": 8}


def _bars(axes: Axes, marks: pd.DataFrame, color: str) -> None:
    """From the lowest to the highest seed, where there are several."""
    several = marks[marks["seeds"] > 1]
    if len(several):
        reach = [[several[c] - several[f"{c}_low"], several[f"{c}_high"] - several[c]] for c in "xy"]
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
    from nas.pareto import pareto_front

    more_is_better = x == "images_per_s"
    for i, (split, group) in enumerate(marks.groupby("split")):
        front = pareto_front(group, {"x": "max" if more_is_better else "min", "y": "max"}).sort_values("x")
        steps = "steps-pre" if more_is_better else "steps-post"
        style: dict[str, Any] = {"color": "black", "lw": 1.2, "ls": STROKES[i % 6], "drawstyle": steps}
        words = f"front on the {split!s} split" if split else "front"
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
