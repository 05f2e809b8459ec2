"""Choices and curves show what the tables say, whatever the tables lack."""

import math

import numpy as np
import pandas as pd
import pytest

from nas.pictures.figures import candidate_text, choices_figure, curves_figure
from tests.nas.synthetic import (
    ALPHAS,
    BACKBONE,
    BLOCKS,
    EPOCHS,
    FRACTIONS,
    choice_rows,
    lines,
    log_rows,
    luminance,
    panel,
    texts,
)


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


def test_what_blocks_choose_alike_is_one_row_as_high_as_theirs():
    frame = choice_rows(choices={"hidden": ALPHAS, "stream": range(72, 17, -1)})
    frame["last_block"] = frame["block"]
    shared = frame[frame.choice == "stream"]
    shared = shared[shared.block.isin([2, 6])].assign(last_block=lambda rows: rows["block"].map({2: 5, 6: BLOCKS - 1}))
    frame = pd.concat([frame[frame.choice == "hidden"], shared])
    hidden, stream = choices_figure(frame, [{"stream": 40, "hidden": 4}] * BLOCKS, "run").axes
    assert len(texts(hidden)) == BLOCKS + 1 and len(texts(stream)) == 2 + 1
    places = {text.get_text().split()[0]: text.get_position()[1] for text in stream.texts[:2]}
    assert places == {"40": pytest.approx((6 + BLOCKS - 1) / 2)}  # the later of the two that say so
    for block, last in ((2, 5), (6, BLOCKS - 1)):
        corners = np.concatenate(
            [b.get_paths()[0].vertices for b in stream.collections if b.get_label().startswith(f"block {block}:")]
        )
        assert corners[:, 1].min() == pytest.approx(block - 0.42) and corners[:, 1].max() == pytest.approx(last + 0.42)
    legend = stream.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["72", "58", "45", "32", "18"]  # some of many
    assert legend.get_title().get_text() == "channels of the stage's stream, 55 candidates"


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


def test_a_single_epoch_is_seen_in_every_panel():
    figure = curves_figure(log_rows().iloc[:1], "run")
    drawn = [line for axes in figure.axes for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert len(drawn) > 8
    assert all(line.get_marker() not in ("", "None") and line.get_markevery() == 1 for line in drawn)


def test_the_accuracies_are_called_after_their_images_in_older_logs_too():
    log = log_rows().rename(columns=lambda name: name.removeprefix("held_out_"))
    log["held_out_subnet_top1"] = log["subnet_top1"].where(log["epoch"] > 20)  # a run that went on with this version
    expected, log["subnet_top1"] = log["subnet_top1"], log["subnet_top1"].where(log["epoch"] <= 20)
    figure = curves_figure(log, "run", held_out="held-out training images, perhaps seen by the checkpoint")
    axes = panel(figure, "accuracy")
    assert axes.get_title() == "Accuracy on held-out training images,\nperhaps seen by the checkpoint"
    np.testing.assert_array_equal(lines(axes)["subnet, top-1"].get_ydata(), expected)
    assert panel(curves_figure(log, "run"), "accuracy").get_title() == "Accuracy on held-out training images"


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
        (accuracy, "large, top-1", "held_out_large_top1"),
        (accuracy, "subnet, top-1", "held_out_subnet_top1"),
        (accuracy, "subnet, top-5", "held_out_subnet_top5"),
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


@pytest.mark.slow
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
