"""The picture of a front: the best at each budget among everything that was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.pictures.candidates import MEASURED
from nas.pictures.figures import GREY, PALETTE, new_figure, tidy

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

WIDE = 2.0  # a ratio of values above which an axis is logarithmic
SCORES = {"held_out_top1": "held-out training images", "top1": "reported split"}


def front_figure(
    front: pd.DataFrame, candidates: pd.DataFrame | None, title: str, trained: bool = False
) -> Figure | None:
    """What was measured against price, candidates in grey, and the accuracy of the front's networks as they are cut.

    front: front.csv as a frame, columns price (a share of the backbone's), value, top1, held_out_top1, some of which
    may be missing. candidates: candidates.csv, columns price, value, measured. trained: by a retrain. None without a
    value.
    """
    if "price" not in front:
        return None
    panels = [name for name in ("value", "top1") if name in front and front[name].notna().any()]
    if not panels:
        return None
    figure = new_figure(1.6 + 4.6 * len(panels), 4.4, title)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if panel == "top1":
            for (column, words), color in zip(SCORES.items(), PALETTE, strict=False):
                if column in front and front[column].notna().any():
                    axes.plot(front["price"], front[column], "o-", color=color, label=words)
            tidy(axes, "price, a share of the backbone's", "top-1 (%)" if trained else "top-1 as cut (%)")
        else:
            cloud: Any = front.iloc[:0]
            if candidates is not None and {"price", "value"} <= set(candidates.columns):
                cloud = candidates.dropna(subset=["price", "value"])
                axes.plot(cloud["price"], cloud["value"], "o", color=GREY, ms=3.5, alpha=0.6, label="candidates")
            axes.plot(front["price"], front["value"], "o-", color=PALETTE[0], label="the front")
            measured = str(candidates["measured"].iloc[0]) if len(cloud) and candidates is not None else ""
            values = [*cloud["value"], *front["value"].dropna()]
            if min(values) > 0 and max(values) > WIDE * min(values):
                axes.set_yscale("log")
            tidy(axes, "price, a share of the backbone's", MEASURED.get(measured, "as measured"))
        axes.legend(fontsize=8, frameon=False)
    return figure
