"""Pictures show what the files say, whatever the files lack. Drawn from synthetic run folders."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import nas.plot
from nas.figures import candidate_text, choices_figure, curves_figure
from nas.plot import find_runs, main, plot_all, plot_pareto, plot_run, run_points
from nas.scatter import pareto_figure
from search_spaces.errors import UserError

ALPHAS, FRACTIONS = (1, 2, 4, 8), (1.0, 0.75, 0.5, 0.25)
BLOCKS, EPOCHS, BACKBONE = 12, 30, 0.0112  # GFLOPs
PUBLISHED = pd.DataFrame(
    {
        "network": [
            "Swin-B",
            "Swin-B-DAN",
            "T2T-ViT-14",
            "AutoFormer-small",
            "DeiT-Small",
            "NVP-S",
            "LightViT-B",
        ],
        "params_m": [88, 38.66, 21.5, 22.9, None, 21, 35.2],
        "gflops": [15.4, 6.96, 4.8, 5.1, 4.6, 4.2, 3.9],
        "top1": [85.2, 85.27, 81.5, 81.7, 79.8, 82.2, 82.1],
    }
)


def choice_rows(seed=0, choices=None):
    """choices.csv as a search writes it: the first two blocks allow no 8; probabilities sharpen with time."""
    rng = np.random.default_rng(seed)
    rows = []
    for name, candidates in (choices or {"alpha": ALPHAS}).items():
        for block in range(BLOCKS):
            offered = candidates[:3] if block < 2 else candidates
            eta = rng.normal(size=len(offered))
            for epoch in range(1, EPOCHS + 1):
                p = np.exp(5 * epoch / EPOCHS * eta)
                for candidate, probability in zip(offered, p / p.sum(), strict=True):
                    rows.append((epoch, block, name, candidate, probability))
    return pd.DataFrame(rows, columns=["epoch", "block", "choice", "candidate", "probability"])


def log_rows(budget=0.5, penalty=0.3):
    t = np.arange(1, EPOCHS + 1) / EPOCHS
    lam = np.minimum(4 * t * t, 1.0)
    ce, kl = 0.4 + 1.8 * np.exp(-3 * t), lam * 0.3 * np.exp(-t)
    return pd.DataFrame(
        {
            "epoch": np.arange(1, EPOCHS + 1),
            "t": t,
            "loss": ce + kl + lam * penalty,
            "loss_ce": ce,
            "loss_kl": kl,
            "loss_penalty": lam * penalty,
            "large_top1": 98 - 80 * np.exp(-6 * t),
            "large_top5": 100 - 60 * np.exp(-8 * t),
            "subnet_top1": 96 - 85 * np.exp(-5 * t),
            "subnet_top5": 99 - 70 * np.exp(-7 * t),
            "expected_gflops": BACKBONE * (budget + 0.2 * np.exp(-4 * t)),
            "selected_gflops": BACKBONE * np.where(t < 0.4, 0.6, budget - 0.01),
            "tau": 5 * (0.1 / 5) ** t,
            "lam": lam,
            "lr": 1e-3 * (1 + np.cos(np.pi * t)) + 1e-6,
            "arch_lr": 0.02,
            "multiplier": 2 * t,
        }
    )


def make_run(folder, *, stage="search", space="swin-dan-nano", dataset="digits", budget=0.5, seed=42, top1=95.0):
    """A run's folder with every file that search.py or retrain.py leaves."""
    folder.mkdir(parents=True)
    options = {"space": space, "dataset": dataset, "seed": seed, "budget": budget, "output": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    choices = choice_rows(seed)
    last = choices[choices.epoch == EPOCHS]
    picks = last.loc[last.groupby("block").probability.idxmax()].sort_values("block").candidate
    log_rows(budget).to_csv(folder / "log.csv", index=False)
    arch = {"schema": 1, "space": space, "method": "dan", "blocks": [{"alpha": int(a)} for a in picks]}
    arch |= {"backbone_flops": int(BACKBONE * 1e9), "search": {"budget": budget, "seed": seed}}
    (folder / "arch.json").write_text(json.dumps(arch))
    large = {"params": 600_000, "gflops": BACKBONE, "top1": 98.0, "top5": 100.0, "images_per_s_32": 2000.0}
    small = {
        "params": int(6e5 * budget),
        "gflops": BACKBONE * budget,
        "top1": top1,
        "images_per_s_32": 3500.0,
    }
    facts = {
        "stage": stage,
        "space": space,
        "dataset": dataset,
        "seed": seed,
        "budget": budget,
        "large": large,
    }
    if stage == "search":
        choices.to_csv(folder / "choices.csv", index=False)
        facts |= {"split": "val", "subnet": small | {"top1": top1 - 1}}
    else:
        facts |= {"subnet": small, "compact": small}
    (folder / "summary.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Every figure by the path it would be written to, without the seconds that rendering takes."""
    figures = {}

    def record(figure, path):
        figures[path] = figure
        return [path]

    monkeypatch.setattr(nas.plot, "save", record)
    return figures


def texts(axes):
    return [t.get_text() for t in axes.texts]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def panel(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def luminance(color):
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(color), (0.2126, 0.7152, 0.0722)))


# --- choices ---


def test_height_of_a_band_is_the_probability_in_every_block_and_epoch():
    frame = choice_rows()
    (axes,) = choices_figure(frame, [], "run").axes
    bands = {band.get_label(): band.get_paths()[0] for band in axes.collections}
    assert len(bands) == BLOCKS * len(ALPHAS)
    for row in frame.sample(60, random_state=0).itertuples():
        corners = bands[f"block {row.block}: {row.candidate}"].vertices
        inside = corners[np.abs(corners[:, 0] - row.epoch) <= 0.5]
        at_edges = [inside[np.isclose(inside[:, 0], row.epoch + side)] for side in (-0.5, 0.5)]
        # Neighbouring epochs share an edge: this epoch's height is among those met there.
        heights = [np.abs(np.subtract.outer(e[:, 1], e[:, 1])).ravel() for e in at_edges]
        assert all(np.isclose(h, 0.84 * row.probability, atol=1e-9).any() for h in heights)


def test_chosen_candidates_stand_beside_their_rows_with_their_last_probability():
    frame = choice_rows()
    picks = [{"alpha": 2}] * BLOCKS  # not the likeliest everywhere: a budget may decide otherwise
    (axes,) = choices_figure(frame, picks, "run").axes
    last = frame[(frame.epoch == EPOCHS) & (frame.candidate == 2)].set_index("block").probability
    expected = [f"2  ({100 * last[b]:.0f} %)" for b in range(BLOCKS)]
    assert texts(axes) == [*expected, "chosen (probability)"]
    likeliest = texts(choices_figure(frame, [], "run").axes[0])
    best = frame[frame.epoch == EPOCHS].groupby("block").probability.idxmax()
    assert [t.split()[0] for t in likeliest[:-1]] == [str(frame.candidate[i]) for i in best]
    assert likeliest[-1] == "likeliest (probability)"


def test_a_panel_per_choice_with_the_largest_network_first_and_darkest():
    frame = choice_rows(choices={"alpha": ALPHAS, "fraction": FRACTIONS})
    figure = choices_figure(frame, [], "run")
    legends = [axes.get_legend() for axes in figure.axes]
    assert ["compression factor α" in legends[0].get_title().get_text(), len(legends)] == [True, 2]
    assert [t.get_text() for t in legends[0].get_texts()] == ["1", "2", "4", "8"]
    assert [t.get_text() for t in legends[1].get_texts()] == ["1", "0.75", "0.5", "0.25"]
    for legend in legends:
        shades = [luminance(patch.get_facecolor()[:3]) for patch in legend.get_patches()]
        assert np.all(np.diff(shades) > 0.08), "in greyscale the candidates would look alike"


def test_choices_without_a_column_or_a_row_are_not_drawn():
    frame = choice_rows()
    assert choices_figure(frame.drop(columns="probability"), [], "run") is None
    assert choices_figure(frame.assign(probability=math.nan), [], "run") is None
    assert choices_figure(frame.iloc[:0], [], "run") is None


@pytest.mark.parametrize(
    ("value", "text"), [(4, "4"), (4.0, "4"), ("0.75", "0.75"), (np.bool_(True), "True"), ("skip", "skip")]
)
def test_a_candidate_reads_the_same_from_csv_and_json(value, text):
    assert candidate_text(value) == text


# --- curves ---


def test_curves_show_every_column_of_the_log_and_the_budget():
    log = log_rows(budget=0.45)
    figure = curves_figure(log, "swin-dan-nano on digits", BACKBONE, 0.45)
    assert figure.get_suptitle() == "swin-dan-nano on digits"
    loss, accuracy, cost = (panel(figure, name) for name in ("loss", "accuracy", "cost"))
    for axes, label, column in (
        (loss, "total", "loss"),
        (loss, "cross-entropy", "loss_ce"),
        (loss, "λ · KL", "loss_kl"),
        (loss, "FLOPs penalty", "loss_penalty"),
        (accuracy, "large, top-1", "large_top1"),
        (accuracy, "subnet, top-1", "subnet_top1"),
        (accuracy, "subnet, top-5", "subnet_top5"),
        (cost, "expected under the probabilities", "expected_gflops"),
        (cost, "architecture selected now", "selected_gflops"),
        (panel(figure, "schedule tau"), "tau", "tau"),
        (panel(figure, "schedule lr"), "choices", "arch_lr"),
        (panel(figure, "schedule multiplier"), "multiplier", "multiplier"),
    ):
        np.testing.assert_array_equal(lines(axes)[label].get_ydata(), log[column])
        np.testing.assert_array_equal(lines(axes)[label].get_xdata(), log["epoch"])
    levels = [float(line.get_ydata()[0]) for line in cost.get_lines() if len(line.get_ydata()) == 2]
    assert levels == pytest.approx([BACKBONE, 0.45 * BACKBONE])
    assert texts(cost) == ["backbone", "budget\n(0.45)"]
    assert cost.get_ylabel() == "GFLOPs (MACs)"


def test_lines_of_a_panel_differ_without_their_colour():
    figure = curves_figure(log_rows(), "run", BACKBONE, 0.5)
    for name in ("loss", "accuracy", "cost"):
        drawn = [line for line in panel(figure, name).get_lines() if len(line.get_ydata()) > 2]
        assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == len(drawn) > 1


def test_a_penalty_far_under_the_cross_entropy_gets_a_log_axis_and_zeros_are_left_out():
    log = log_rows(penalty=2e-3)
    log.loc[0, ["loss_kl", "loss_penalty"]] = 0.0
    axes = panel(curves_figure(log, "run"), "loss")
    assert (axes.get_yscale(), axes.get_ylabel()) == ("log", "training loss (log scale)")
    assert math.isnan(lines(axes)["FLOPs penalty"].get_ydata()[0])
    assert panel(curves_figure(log_rows(), "run"), "loss").get_yscale() == "linear"


@pytest.mark.parametrize("column", [c for c in log_rows().columns if c not in ("epoch", "t")])
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_curves_without_a_column_lack_that_line_and_no_other(column, how):
    log = log_rows()
    whole = curves_figure(log, "run", BACKBONE, 0.5)
    changed = log.drop(columns=column) if how == "absent" else log.assign(**{column: math.nan})
    partial = curves_figure(changed, "run", BACKBONE, 0.5)

    def count(figure):
        return sum(len(line.get_ydata()) > 2 for axes in figure.axes for line in axes.get_lines())

    assert count(partial) == count(whole) - 1


def test_a_log_without_an_epoch_or_a_curve_is_not_drawn():
    assert curves_figure(log_rows().drop(columns="epoch"), "run") is None
    assert curves_figure(log_rows()[["epoch", "t"]], "run") is None
    assert curves_figure(log_rows().iloc[:0], "run") is None


def test_kernel_complexity_has_a_panel_where_it_was_measured():
    log = log_rows()
    assert not [axes for axes in curves_figure(log, "run").axes if "complexity" in axes.get_label()]
    kc = np.linspace(0.5, 0.3, len(log))
    measured = log.assign(kc=3 * kc, kc_normalised=kc, tnn=kc / 10, trace=2.0)
    figure = curves_figure(measured, "run")
    for name, expected in (("kc", 3 * kc), ("kc_normalised", kc), ("truncated", kc / 20)):
        np.testing.assert_allclose(lines(panel(figure, f"complexity {name}"))[name].get_ydata(), expected)


def test_a_retraining_has_no_cost_panel():
    log = log_rows().drop(columns="expected_gflops").assign(selected_gflops=0.005)
    labels = [axes.get_label() for axes in curves_figure(log, "run", BACKBONE, 0.5).axes]
    assert "loss" in labels
    assert "cost" not in labels


# --- Pareto ---


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
    points = random_points().assign(split=["validation", "test", "test"] * 5)
    (axes,) = pareto_figure(points, "run").axes
    for split in ("validation", "test"):
        own = points[points.split == split]
        front = lines(axes)[f"front on the {split} split"]
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
    (axes,) = pareto_figure(random_points(), "run", published=PUBLISHED).axes
    grey = lines(axes)["published results"]
    np.testing.assert_allclose(grey.get_xydata(), PUBLISHED[["gflops", "top1"]])
    red, green, blue = (int(grey.get_color()[i : i + 2], 16) for i in (1, 3, 5))
    assert red == green == blue
    assert not set(PUBLISHED.gflops) & set(lines(axes)["front"].get_xdata())
    (axes,) = pareto_figure(random_points(), "run", x="params", published=PUBLISHED).axes
    np.testing.assert_allclose(lines(axes)["published results"].get_xdata(), PUBLISHED.params_m.dropna())


def test_costs_decades_apart_get_a_log_axis_with_plain_numbers():
    points = pd.DataFrame({"gflops": [0.01, 4.0], "top1": [40.0, 80.0]})
    figure = pareto_figure(points, "run")
    assert figure.axes[0].get_xscale() == "log"
    assert pareto_figure(points.assign(gflops=[1.0, 4.0]), "run").axes[0].get_xscale() == "linear"
    ticks = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert {"0.1", "1"} <= set(ticks)


def test_points_that_lack_a_value_are_left_out_and_none_left_is_an_error(tmp_path):
    points = pd.DataFrame({"gflops": [1.0, None, 3.0], "top1": [70.0, 75.0, None]})
    (marks,) = (li for li in pareto_figure(points, "run").axes[0].get_lines() if li.get_label() == "_ ")
    np.testing.assert_allclose(marks.get_xydata(), [[1.0, 70.0]])
    with pytest.raises(UserError, match="no network has both images_per_s and top1"):
        plot_pareto(points, tmp_path / "pareto", "run", x="images_per_s")
    with pytest.raises(UserError, match="expected one of gflops, params, images_per_s"):
        plot_pareto(points, tmp_path / "pareto", "run", x="latency")
    assert not list(tmp_path.iterdir())


# --- folders ---


def test_a_run_is_drawn_from_its_files_and_leaves_nothing_else(tmp_path):
    from PIL import Image

    run = make_run(tmp_path / "run")
    before = {path.name for path in run.iterdir()}
    written = plot_run(run)
    assert [path.name for path in written] == ["choices.png", "curves.png", "pareto.png", "pareto.pdf"]
    assert {path.name for path in run.iterdir()} == before | {path.name for path in written}
    for path in written[:3]:
        image = Image.open(path)
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert np.asarray(image.convert("L")).std() > 5
    pdf = written[3].read_bytes()
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype /Image" not in pdf, "the PDF holds pixels, not vectors"


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        plot_pareto(pd.DataFrame({"gflops": [1.0], "top1": [70.0]}), tmp_path / name, "run")
    for suffix in ("png", "pdf"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    run = make_run(tmp_path / "run")
    (run / "choices.png").write_bytes(b"old")

    def full_disk(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(UserError, match="No space left"):
        plot_run(run)
    assert (run / "choices.png").read_bytes() == b"old"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["config.yaml", "arch.json", "log.csv", "choices.csv", "summary.json"])
@pytest.mark.parametrize("damage", ["absent", "empty", "cut"])
def test_what_a_damaged_file_does_not_hold_is_left_out(tmp_path, drawn, name, damage):
    run = make_run(tmp_path / "run")
    if damage == "absent":
        (run / name).unlink()
    else:
        (run / name).write_bytes(b"" if damage == "empty" else (run / name).read_bytes()[:37])
    gone = {"log.csv": {"curves"}, "choices.csv": {"choices"}, "summary.json": {"pareto"}}.get(name, set())
    assert {path.stem for path in plot_run(run)} == {"choices", "curves", "pareto"} - gone
    assert all(figure.get_suptitle().startswith("swin-dan-nano on digits") for figure in drawn.values())


@pytest.mark.parametrize("key", ["stage", "space", "dataset", "seed", "budget", "split", "large", "subnet"])
def test_a_summary_may_lack_any_key(tmp_path, drawn, key):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    del summary[key]
    (run / "summary.json").write_text(json.dumps(summary))
    assert "pareto" in {path.stem for path in plot_run(run)}


def test_this_run_is_ringed_among_the_runs_beside_it_on_the_same_dataset(tmp_path, drawn):
    own = make_run(tmp_path / "own", budget=0.5)
    make_run(tmp_path / "beside", budget=0.3, top1=92.0)
    make_run(tmp_path / "retrained", stage="retrain", budget=0.3, top1=93.5)
    make_run(tmp_path / "elsewhere", dataset="cifar10", budget=0.4, top1=60.0)
    plot_run(own)
    (axes,) = drawn[own / "pareto.png"].axes
    ring = lines(axes)["this run"].get_xydata()
    np.testing.assert_allclose(ring, [[BACKBONE, 98.0], [BACKBONE * 0.5, 94.0]])
    points = lines(axes)
    np.testing.assert_allclose(sorted(points["_swin-dan-nano subnet"].get_ydata()), [91.0, 94.0])
    np.testing.assert_allclose(points["_swin-dan-nano compact"].get_ydata(), [93.5])
    assert points["_swin-dan-nano subnet"].get_fillstyle() != points["_swin-dan-nano compact"].get_fillstyle()
    assert "published results" not in points
    assert {"this run: budget 0.5", "budget 0.3"} <= set(texts(axes))
    assert "swin-dan-nano on digits" in drawn[own / "pareto.png"].get_suptitle()


def test_the_literature_stands_behind_imagenet_runs_alone(tmp_path, drawn, monkeypatch):
    PUBLISHED.to_csv(tmp_path / "published.csv", index=False)
    monkeypatch.setattr(nas.plot, "PUBLISHED", tmp_path / "published.csv")
    for dataset in ("imagenet", "imagenet100"):
        run = make_run(tmp_path / dataset, dataset=dataset, space="swin-dan")
        plot_run(run)
        (axes,) = drawn[run / "pareto.png"].axes
        assert ("published results" in lines(axes)) == (dataset == "imagenet")


def test_runs_share_a_configuration_when_only_their_seed_differs(tmp_path):
    runs = [make_run(tmp_path / f"seed{s}", seed=s) for s in (1, 2)] + [make_run(tmp_path / "other", budget=0.3)]
    one, two, other = ([p["config"] for p in run_points(run) if p["role"] == "subnet"] for run in runs)
    assert one == two != other
    assert [p["split"] for p in run_points(runs[0])] == ["validation"] * 2


def test_networks_compressed_alike_are_joined(tmp_path, drawn):
    for alpha, top1 in ((2, 96.0), (4, 94.0), (8, 90.0)):
        run = make_run(tmp_path / f"an{alpha}", stage="retrain", space="swin-an-nano", budget=1 / alpha, top1=top1)
        arch = json.loads((run / "arch.json").read_text()) | {
            "method": "an",
            "blocks": [{"alpha": alpha}] * 12,
        }
        (run / "arch.json").write_text(json.dumps(arch))
    make_run(tmp_path / "dan", stage="retrain", budget=0.5, top1=97.0)
    plot_all(tmp_path)
    (axes,) = drawn[tmp_path / "pareto.png"].axes
    np.testing.assert_allclose(lines(axes)["every block alike"].get_ydata(), [90.0, 94.0, 96.0])
    assert {"α = 2", "α = 4", "α = 8"} <= set(texts(axes))
    (axes,) = drawn[tmp_path / "an4" / "pareto.png"].axes
    assert "this run: α = 4" in texts(axes)


def test_everything_below_a_folder_is_drawn_and_a_sweep_gets_its_own_picture(tmp_path, drawn):
    sweep = tmp_path / "sweep"
    trials = [make_run(sweep / f"trial{i}", budget=b) for i, b in enumerate((0.3, 0.5))]
    (sweep / "trials.csv").write_text("trial,status,search\n0,done,trial0\n1,done,trial1\n")
    (sweep / "config.yaml").write_text("space: swin-dan-nano\n")
    single = make_run(tmp_path / "single", dataset="cifar10")
    make_run(tmp_path / ".hidden" / "run")
    assert find_runs(tmp_path) == [single, *trials]
    written = plot_all(tmp_path)
    assert written == [*drawn, sweep / "index.html"]
    assert {p.parent for p in written} == {tmp_path, sweep, single, *trials}
    assert {p.name for p in written if p.parent == sweep} == {"pareto.png", "pareto.pdf", "index.html"}
    assert {p.stem for p in written if p.parent == tmp_path} == {"pareto-digits", "pareto-cifar10"}
    (axes,) = drawn[sweep / "pareto.png"].axes
    assert "this run" not in lines(axes)
    np.testing.assert_allclose(lines(axes)["_swin-dan-nano subnet"].get_xdata(), [0.3 * BACKBONE, 0.5 * BACKBONE])


def test_runs_of_other_folders_join_the_picture_once(tmp_path, drawn, capsys):
    sweep, other = tmp_path / "sweep", tmp_path / "other"
    for i, budget in enumerate((0.3, 0.5)):
        make_run(sweep / f"trial{i}", budget=budget)
    make_run(other / "more", budget=0.7)
    make_run(other / "elsewhere", dataset="cifar10")
    assert main([str(sweep), "--with", str(other), str(tmp_path)]) == 0
    (axes,) = drawn[sweep / "pareto.png"].axes
    marks = lines(axes)["_swin-dan-nano subnet"].get_xdata()
    np.testing.assert_allclose(marks, [0.3 * BACKBONE, 0.5 * BACKBONE, 0.7 * BACKBONE])
    assert {p.parent.parent for p in drawn} <= {tmp_path, sweep}
    assert main([str(sweep), "--with", str(tmp_path / "nowhere")]) == 2


def test_command_prints_what_it_drew(tmp_path, drawn, capsys):
    run = make_run(tmp_path / "run")
    assert main([str(tmp_path), "--x", "params"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(path) for path in drawn]
    assert run / "pareto-params.png" in drawn
    assert drawn[run / "pareto-params.png"].axes[0].get_xlabel() == "parameters (M)"


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_command_without_runs_says_so_in_one_line(tmp_path, capsys, name):
    assert main([str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert str(tmp_path / name) in captured.err


def test_importing_the_module_loads_no_library():
    code = "import sys, nas.plot; print({'matplotlib', 'pandas', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
