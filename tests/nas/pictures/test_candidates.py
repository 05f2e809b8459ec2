"""What a search measured: a point per candidate, the best so far, stage widths by colour, whatever the table lacks."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from nas.pictures.candidates import NAMED, candidates_figure
from tests.nas.synthetic import lines, luminance

VALUES = (0.9, 0.4, 0.6, 0.05, 0.3)


def frame(values=VALUES, widths=(64, 72, 64, 56, 72), measured="kl"):
    rows = {"candidate": range(1, len(values) + 1), "value": values, "measured": measured, "stage_widths": widths}
    return pd.DataFrame(rows)


def test_every_candidate_is_a_point_and_the_best_so_far_a_line():
    figure = candidates_figure(frame(), "run")
    (axes,) = figure.axes
    drawn = lines(axes)
    np.testing.assert_allclose(drawn["best so far"].get_ydata(), [0.9, 0.4, 0.4, 0.05, 0.05])
    assert drawn["best so far"].get_drawstyle() == "steps-post"
    for width, at in {"56": [4], "64": [1, 3], "72": [2, 5]}.items():
        np.testing.assert_allclose(drawn[width].get_xydata(), [(i, VALUES[i - 1]) for i in at])
    np.testing.assert_allclose(drawn["the best: 0.05"].get_xydata(), [[4, 0.05]])
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "KL(large ‖ cut) (nats per image), log scale")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "best so far", "the best: 0.05", "stage width", "56", "64", "72",
    ]  # fmt: skip


def test_widths_differ_in_greyscale_and_in_marker():
    drawn = lines(candidates_figure(frame(), "run").axes[0])
    shades = [luminance(to_rgb(drawn[width].get_color())) for width in ("56", "64", "72")]
    assert np.all(np.diff(shades) > 0.08)
    assert len({drawn[width].get_marker() for width in ("56", "64", "72")}) == 3


def test_missed_hits_are_per_cent_on_a_linear_axis():
    (axes,) = candidates_figure(frame((31.0, 30.5, 32.0), (64, 64, 72), "top1"), "run").axes
    assert (axes.get_yscale(), axes.get_ylabel()) == ("linear", "missed by top-1 (%)")


def test_of_many_combinations_the_legend_names_some():
    count = 2 * NAMED + 3
    widths = [f"{48 + 8 * (i // 5)} {96 + 8 * (i % 5)}" for i in range(count)]
    figure = candidates_figure(frame(tuple(np.linspace(1, 0.5, count)), widths), "run")
    named = [text.get_text() for text in figure.legends[0].get_texts()][2:]
    assert named[:2] == ["stage widths, one in 3", "48, 96"] and len(named) - 1 <= NAMED
    points = sum(len(li.get_xdata()) for li in figure.axes[0].get_lines() if li.get_linestyle() == "None")
    assert points == count + 1  # and the ring


@pytest.mark.parametrize("column", ["candidate", "value", "measured", "stage_widths"])
def test_a_table_without_a_column_or_a_row_is_not_drawn(column):
    assert candidates_figure(frame().drop(columns=column), "run") is None
    assert candidates_figure(frame().assign(**{column: math.nan}), "run") is None or column == "measured"
    assert candidates_figure(frame().iloc[:0], "run") is None


def test_one_candidate_is_seen():
    figure = candidates_figure(frame((0.3,), (64,)), "run")
    assert "the best: 0.3" in lines(figure.axes[0])
