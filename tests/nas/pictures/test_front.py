"""The picture of a front: its members on all candidates, accuracies beside, whatever a table lacks."""

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb

from nas.pictures.candidates import candidates_figure
from nas.pictures.front import front_figure
from tests.nas.synthetic import lines

FRONT = pd.DataFrame(
    {
        "price": [0.2, 0.5],
        "value": [0.4, 0.05],
        "top1": [50.0, 60.0],
        "held_out_top1": [51.0, 62.0],
        "budget": [0.2, 0.5],
    }
)
CANDIDATES = pd.DataFrame(
    {"candidate": [1, 2, 3, 4], "price": [0.2, 0.19, 0.5, 0.49], "value": [0.4, 0.9, 0.05, 0.3], "measured": "kl",
     "stage_widths": 64, "budget": [0.2, 0.2, 0.5, 0.5]}
)  # fmt: skip


def test_the_front_lies_on_the_grey_candidates_and_has_its_accuracies_beside() -> None:
    figure = front_figure(FRONT, CANDIDATES, "run")
    assert figure is not None
    measured, scores = figure.axes
    drawn = lines(measured)
    np.testing.assert_allclose(drawn["the front"].get_xydata(), [(0.2, 0.4), (0.5, 0.05)])
    np.testing.assert_allclose(drawn["candidates"].get_xydata(), CANDIDATES[["price", "value"]])
    red, green, blue = to_rgb(drawn["candidates"].get_color())
    assert red == green == blue
    assert measured.get_yscale() == "log" and "KL" in measured.get_ylabel()
    assert set(lines(scores)) == {"held-out training images", "reported split"}


def test_what_was_not_measured_has_no_panel() -> None:
    figure = front_figure(FRONT.assign(value=np.nan), None, "run")
    assert figure is not None and len(figure.axes) == 1
    assert front_figure(FRONT.drop(columns="price"), CANDIDATES, "run") is None
    assert front_figure(FRONT[["price", "budget"]], CANDIDATES, "run") is None


def test_candidates_of_a_front_have_a_best_so_far_for_each_budget() -> None:
    (axes,) = candidates_figure(CANDIDATES, "run").axes
    steps = [line.get_ydata() for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
    np.testing.assert_allclose(steps, [[0.4, 0.4], [0.05, 0.05]])
    assert {text.get_text() for text in axes.texts} == {"0.2", "0.5"}


def test_candidates_of_evolution_are_told_apart_by_origin() -> None:
    origins = ["importance", "random", "crossover", "mutation"]
    drawn = lines(candidates_figure(CANDIDATES.drop(columns="budget").assign(origin=origins), "run").axes[0])
    assert set(origins) <= set(drawn)
    assert len({drawn[origin].get_marker() for origin in origins}) == 4
