"""The pictures of a run, drawn from frames: choices over epochs and curves; scatter.py has accuracy against cost.

Colours are Okabe and Ito's, or run evenly from dark to light; every line and point also differs in stroke or
marker, so that a greyscale print and a colour-blind reader lose nothing. No pyplot: figures are plain objects
on the Agg canvas, with no global state and no window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nas.data.split_names import HELD_OUT
from nas.runs.log_columns import held_out as held_out_columns

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#8a8a8a"
DPI = 150
X_AXES = {
    "gflops": "GFLOPs (MACs)", "params": "parameters (M)", "images_per_s": "images/s", "latency": "ms",
}  # fmt: skip
CHOICES = {
    "alpha": "compression factor α",
    "fraction": "fraction of channels kept",
    "channels": "channels of the MLP",
    "channel": "a channel of the MLP",
    "stream": "channels of the stage's stream",
    "heads": "heads",
    "qk": "channels of q and k in a head",
    "v": "channels of v in a head",
    "hidden": "hidden neurons",
}
MOST_NAMED, SOME_NAMED = 8, 5  # candidates in a legend: all of so many, so many of more
TERMS = {
    "ce": "cross-entropy",
    "kl": "λ · KL",
    "penalty": "FLOPs penalty",
    "ce_small": "cross-entropy, small",
    "tnn": "truncated nuclear norm",
    "distill": "distillation",
    "tokens": "error of tokens",
    "features": "error of features",
    "kl_smallest": "KL, smallest",
    "kl_drawn": "KL, drawn",
}
SCHEDULES = {
    "temperature τ": ("tau",),
    "weight λ": ("lam",),
    "learning rate": ("lr", "arch_lr"),
    "multiplier z": ("multiplier",),
}
EARLIER = {f"{who}_top{k}": f"held_out_{who}_top{k}" for who in ("large", "subnet") for k in (1, 5)}  # in older logs
RATES = {"lr": "weights", "arch_lr": "choices"}
COMPLEXITY = {"KC": ("kc",), "KC, trace = 1": ("kc_normalised",), "TNN / trace": ("truncated",)}


def new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    return figure


def tidy(axes: Axes, x: str, y: str) -> None:
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
    space's order, the largest network first. last_block: where blocks choose alike the last of them, and their row is
    as high as theirs together. Within a block's row the height of a colour is the candidate's probability, so a row
    that ends in one colour has decided. picks: the candidates of arch.json by block and choice name, written beside
    the rows with their last probability; empty: the likeliest are. None when no row is complete.
    """
    import pandas as pd

    columns = ["epoch", "block", "choice", "candidate", "probability"]
    if not set(columns) <= set(choices.columns):
        return None
    choices = choices.assign(last_block=choices["last_block"] if "last_block" in choices else choices["block"])
    numbers = choices[["epoch", "block", "last_block", "probability"]].apply(pd.to_numeric, errors="coerce")
    frame = choices[columns].assign(**numbers).dropna()
    if frame.empty:
        return None
    frame = frame.assign(candidate=frame["candidate"].map(candidate_text))
    names, blocks = list(dict.fromkeys(frame["choice"])), int(frame["last_block"].max()) + 1
    figure = new_figure(0.6 + (6.2 if len(names) < 4 else 4.9) * len(names), 1.9 + 0.27 * max(blocks, 6), title)
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
        upper, others = np.full(len(epochs), float(block) - 0.42), float(rows["last_block"].max()) - block
        for candidate in candidates:
            lower = upper + (0.84 + others) * shares[candidate].to_numpy()
            band = axes.fill_between(x, np.repeat(upper, 2), np.repeat(lower, 2), lw=0, color=colors[candidate])
            band.set_label(f"block {block}: {candidate}")
            upper = lower
        last = shares.iloc[-1]
        picked = picks[block].get(name) if block < len(picks) else None
        taken = str(last.idxmax()) if picked is None else candidate_text(picked)
        text = f"{taken}  ({100 * last.get(taken, 0.0):.0f} %)"
        axes.text(1.012, block + others / 2, text, transform=beside, va="center", fontsize=8)
    figure: Any = axes.get_figure()
    above = axes.transAxes + ScaledTranslation(0, 6 / 72, figure.dpi_scale_trans)
    header = "chosen (probability)" if picks else "likeliest (probability)"
    axes.text(1.012, 1.0, header, transform=above, fontsize=8, color="#444444")
    axes.set(xlim=(x[0], x[-1]), ylim=(blocks - 0.5, -0.5), yticks=range(blocks))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch", fontsize=9)
    axes.tick_params(labelsize=8, labelleft=True)
    axes.spines[:].set_visible(False)
    named, words = candidates, f"{CHOICES.get(name, name)}: the height of its colour in a row is its probability"
    if len(candidates) > MOST_NAMED:
        named = [candidates[k] for k in np.linspace(0, len(candidates) - 1, SOME_NAMED).round().astype(int)]
        words = f"{CHOICES.get(name, name)}, {len(candidates)} candidates"
    handles = [Patch(facecolor=colors[c], edgecolor="#444444", linewidth=0.5, label=c) for c in named]
    axes.legend(
        handles=handles,
        title=words,
        ncols=max(len(handles), 1),
        columnspacing=1.2,
        handlelength=1.5,
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
    log: pd.DataFrame,
    title: str,
    backbone_gflops: float | None = None,
    budget: float | None = None,
    held_out: str = HELD_OUT,
) -> Figure | None:
    """Loss terms, accuracy on the held-out images, GFLOPs (MACs) and schedules over epochs.

    log: log.csv as a frame; a column it lacks leaves its line out. backbone_gflops: of the large network.
    budget: the share of them that the architecture may take. held_out: those images, in words. None when
    there is no epoch or nothing to draw.
    """
    import pandas as pd

    log = log.apply(pd.to_numeric, errors="coerce").dropna(axis=1, how="all")
    for old, new in EARLIER.items():
        if old in log:
            log[new] = log[old].combine_first(log[new]) if new in log else log[old]
    if "epoch" not in log.columns:
        return None
    log = log.dropna(subset=["epoch"]).sort_values("epoch")
    names = [str(c) for c in log.columns]
    moving = "expected_gflops" in names or ("selected_gflops" in names and log["selected_gflops"].nunique() > 1)
    panels = {
        "loss": any(c == "loss" or c.startswith("loss_") for c in names),
        "accuracy": any(c.startswith("held_out_") and "_top" in c for c in names),
        "cost": moving,
        "complexity": "kc_normalised" in names,
        "schedules": any(c in names for columns in SCHEDULES.values() for c in columns),
    }
    shown = [name for name, there in panels.items() if there]
    if not shown:
        return None
    rows, columns = (len(shown) + 1) // 2, min(len(shown), 2)
    figure = new_figure(5.4 * columns, 3.6 * rows + 0.4, title)
    grid = figure.add_gridspec(rows, columns)
    for i, name in enumerate(shown):
        cell = grid[i // 2, :] if i == len(shown) - 1 and len(shown) % 2 and i else grid[i // 2, i % 2]
        if name == "schedules":
            _strips(figure, cell, log, SCHEDULES, "Schedules", "schedule")
            continue
        if name == "complexity":
            share = log.assign(truncated=log["tnn"] / log["trace"]) if {"tnn", "trace"} <= set(names) else log
            words = "Kernel complexity of the small network's features"
            _strips(figure, cell, share, COMPLEXITY, words, "complexity")
            continue
        axes = figure.add_subplot(cell, label=name)
        if name == "loss":
            _losses(axes, log)
        elif name == "accuracy":
            _accuracies(axes, log, held_out)
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
    if len(log) == 1:  # a line of one point is seen by its marker alone
        style.pop("marker", None)
        own["markevery"] = 1
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
    tidy(axes, "epoch", "training loss (log scale)" if log_scale else "training loss")
    axes.set_title("Loss and its terms", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _accuracies(axes: Axes, log: pd.DataFrame, held_out: str) -> None:
    for i, who in enumerate(dict.fromkeys(("large", "subnet", *held_out_columns(log.columns, "top1")))):
        for top, light in (("top1", 1.0), ("top5", 0.55)):
            column = f"held_out_{who}_{top}"
            if column in log:
                stroke = "-" if top == "top1" else ":"
                words = f"{who}, {top.replace('top', 'top-')}"
                _line(axes, log, column, words, i, linestyle=stroke, alpha=light)
    tidy(axes, "epoch", "accuracy (%)")
    axes.set_title(f"Accuracy on {held_out}".replace(", ", ",\n"), fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="best")


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
    tidy(axes, "epoch", X_AXES["gflops"])
    axes.set_title("Cost of the subnet", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="lower left")


def _strips(
    figure: Figure, cell: Any, log: pd.DataFrame, rows: Mapping[str, Sequence[str]], title: str, label: str
) -> None:
    """A strip per quantity, one above the other: their units have nothing in common."""
    strips = {words: [c for c in names if c in log] for words, names in rows.items()}
    strips = {words: names for words, names in strips.items() if names}
    grid = cell.subgridspec(len(strips), 1, hspace=0.08)
    for i, (words, names) in enumerate(strips.items()):
        axes = figure.add_subplot(grid[i], label=f"{label} {names[0]}")
        for k, name in enumerate(names):
            _line(axes, log, name, RATES.get(name, name), k, marker="")
        if words == "learning rate":
            axes.set_yscale("log" if bool((log[names].min() > 0).all()) else "linear")
            axes.legend(fontsize=7, frameon=False, ncols=2)
        last = i == len(strips) - 1
        tidy(axes, "epoch" if last else "", words)
        axes.tick_params(which="both", labelbottom=last, labelsize=7)
        axes.yaxis.label.set(fontsize=8, rotation=0, ha="right", va="center")
        axes.margins(y=0.15)
        _epochs(axes, log)
        if i == 0:
            axes.set_title(title, fontsize=10)
