"""The Pareto plot: fronts, seeds, labels, published points."""

import numpy as np
import pandas as pd
import pytest

from nas.pictures.scatter import pareto_figure
from tests.nas.synthetic import PUBLISHED, lines, texts


def random_points(n=15, seed=1):
    rng = np.random.default_rng(seed)
    gflops = rng.uniform(1, 15, n)
    return pd.DataFrame(
        {
            "gflops": gflops,
            "params": gflops * 5e6,
            "images_per_s": 4000 / gflops,
            "top1": 76 + 3 * np.log(gflops) + rng.normal(0, 1, n),
            "label": [f"budget {i / 20:g}" for i in range(n)],
        }
    )


def non_dominated(x, y):
    """Brute force: lower x and higher y."""
    pairs = list(zip(x, y, strict=True))
    return sorted(p for p in pairs if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in pairs))


@pytest.mark.parametrize(
    ("x", "sign", "scale", "label"),
    [
        ("gflops", 1, 1, "GFLOPs (MACs)"),
        ("params", 1, 1e-6, "parameters (M)"),
        ("images_per_s", -1, 1, "images/s"),
    ],
)
def test_front_is_the_non_dominated_set_for_every_cost(x, sign, scale, label):
    points = random_points()
    (axes,) = pareto_figure(points, "swin-dan on imagenet", x=x).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == (label, "top-1 (%)")
    front = lines(axes)["front"]
    expected = non_dominated(sign * points[x] * scale, points["top1"])
    got = sorted((sign * a, b) for a, b in zip(front.get_xdata(), front.get_ydata(), strict=True))
    np.testing.assert_allclose(got, expected)
    # A staircase: what a cost can buy, never a line through networks that nobody trained.
    assert front.get_drawstyle() == ("steps-pre" if x == "images_per_s" else "steps-post")


def test_fronts_of_two_splits_are_kept_apart():
    points = random_points().assign(split=["validation split", "test split", "test split"] * 5)
    (axes,) = pareto_figure(points, "run").axes
    for split in ("validation split", "test split"):
        own = points[points.split == split]
        front = lines(axes)[f"front on the {split}"]
        assert len(front.get_xdata()) == len(non_dominated(own.gflops, own.top1))
    strokes = {lines(axes)[f"front on the {s} split"].get_linestyle() for s in ("validation", "test")}
    assert len(strokes) == 2


def test_seeds_of_a_configuration_become_their_mean_with_bars_to_the_extremes():
    top1, gflops = [90.0, 94.0, 92.0], [4.0, 4.2, 4.1]
    points = pd.DataFrame({"gflops": [*gflops, 8.0], "top1": [*top1, 95.0], "config": [*"aaab"]})
    (axes,) = pareto_figure(points.assign(space="swin-dan", role="subnet"), "run").axes
    (marks,) = (line for line in axes.get_lines() if line.get_label() == "_swin-dan subnet")
    np.testing.assert_allclose(marks.get_xydata(), [[4.1, 92.0], [8.0, 95.0]])
    segments = sorted(tuple(path.vertices.ravel()) for bars in axes.collections for path in bars.get_paths())
    np.testing.assert_allclose(segments, [(4.0, 92.0, 4.2, 92.0), (4.1, 90.0, 4.1, 94.0)])
    assert "mean of several seeds, lowest to highest" in [t.get_text() for t in axes.get_legend().get_texts()]


def test_seeds_of_equal_cost_are_drawn_whatever_their_mean_rounds_to():
    points = pd.DataFrame({"gflops": [0.1] * 3, "top1": [0.7] * 3, "config": [*"aaa"]})
    assert points["gflops"].mean() > 0.1
    (axes,) = pareto_figure(points.assign(space="swin-dan", role="subnet"), "run").axes
    assert len(axes.collections) == 2


def test_uniform_line_joins_its_points_by_cost_and_counts_for_the_front():
    points = pd.DataFrame({"gflops": [4.0, 8.0], "top1": [80.0, 84.0]})
    uniform = pd.DataFrame(
        {"gflops": [15.4, 3.0, 6.0], "top1": [85.0, 79.0, 81.0], "label": ["α = 1", "α = 4", "α = 2"]}
    )
    (axes,) = pareto_figure(points, "run", uniform=uniform).axes
    line = lines(axes)["every block alike"]
    np.testing.assert_allclose(line.get_xydata(), [[3.0, 79.0], [6.0, 81.0], [15.4, 85.0]])
    assert {"α = 1", "α = 2", "α = 4"} <= set(texts(axes))
    np.testing.assert_allclose(lines(axes)["front"].get_xdata(), [3.0, 4.0, 6.0, 8.0, 15.4])


def test_labels_are_all_there_inside_the_axes_and_overlap_neither_each_other_nor_a_point():
    from matplotlib.text import Text

    points = random_points(12).assign(this=[True] + [False] * 11, space=["swin-dan"] * 6 + ["deit-dan"] * 6)
    points.loc[points.top1.idxmin(), "label"] = points.loc[points.gflops.idxmax(), "label"] = "wider than a margin"
    published = pd.concat([PUBLISHED, PUBLISHED.iloc[:1].assign(network="Swin-B at the right edge", gflops=17.0)])
    figure = pareto_figure(points, "run", published=published)
    (axes,) = figure.axes
    assert set(texts(axes)) == {f"this run: {points.label[0]}", *points.label[1:], *published.network}
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    # Not the annotation's own extent, which includes its leader: the words must not overlap.
    boxes = [Text.get_window_extent(t, renderer) for t in axes.texts]
    frame = axes.get_window_extent()
    marks = axes.transData.transform(pd.concat([points, published])[["gflops", "top1"]].to_numpy())
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
        assert not box.count_overlaps(boxes[:i] + boxes[i + 1 :]), axes.texts[i].get_text()
        assert not any(box.contains(*mark) for mark in marks), axes.texts[i].get_text()


def test_a_label_without_a_leader_is_nearest_to_its_own_point():
    from matplotlib.text import Text

    rng = np.random.default_rng(3)
    crowd = pd.DataFrame({"gflops": 4 + rng.random(14), "top1": 82 + rng.random(14)})
    crowd["label"] = [f"network {i}" for i in range(14)]
    corners = pd.DataFrame({"gflops": [3.6, 5.4], "top1": [81.0, 84.0], "label": ["", ""]})
    points = pd.concat([crowd, corners])
    figure = pareto_figure(points, "run")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    marks = axes.transData.transform(points[["gflops", "top1"]].to_numpy())
    beside = [note for note in axes.texts if note.arrow_patch is None]
    assert 3 < len(beside) < len(axes.texts) == len(crowd)
    for note in beside:
        box = Text.get_window_extent(note, figure.canvas.get_renderer())
        middle, half = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2, np.array(box.size) / 2
        gaps = np.linalg.norm(np.maximum(np.abs(marks - middle) - half, 0), axis=1)
        assert points.label.iloc[gaps.argmin()] == note.get_text()


def test_published_points_are_grey_and_never_in_the_front():
    (axes,) = pareto_figure(random_points(), "run", published=PUBLISHED.assign(source="a table")).axes
    grey = lines(axes)["the literature: a table"]
    np.testing.assert_allclose(grey.get_xydata(), PUBLISHED[["gflops", "top1"]])
    red, green, blue = (int(grey.get_color()[i : i + 2], 16) for i in (1, 3, 5))
    assert red == green == blue
    assert not set(PUBLISHED.gflops) & set(lines(axes)["front"].get_xdata())
    (axes,) = pareto_figure(random_points(), "run", x="params", published=PUBLISHED.assign(source="a table")).axes
    np.testing.assert_allclose(lines(axes)["the literature: a table"].get_xdata(), PUBLISHED.params_m.dropna())


def test_costs_decades_apart_get_a_log_axis_with_plain_numbers():
    points = pd.DataFrame({"gflops": [0.01, 4.0], "top1": [40.0, 80.0]})
    figure = pareto_figure(points, "run")
    assert figure.axes[0].get_xscale() == "log"
    assert pareto_figure(points.assign(gflops=[1.0, 4.0]), "run").axes[0].get_xscale() == "linear"
    ticks = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert {"0.1", "1"} <= set(ticks)
