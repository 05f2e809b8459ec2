"""The picture of an architecture shows what its rows say, and its choices where no panel does."""

import numpy as np

from nas.pictures.architecture import Row, architecture_figure, title_of
from nas.pictures.rows import rows_of
from tests.nas.finished import finished_run, free_architecture
from tests.nas.synthetic import texts

DEPTH = 12


def bars(axes):
    """Widths of the backbone's outlines, and of what is kept."""
    wide = [patch.get_width() for patch in axes.patches]
    return wide[: len(wide) // 2], wide[len(wide) // 2 :]


def ticks(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_free_widths_have_a_panel_each_and_no_choices_beside_the_blocks():
    arch = free_architecture(DEPTH)
    rows = rows_of(arch)
    figure = architecture_figure(rows, title_of(arch, rows))
    words = [" ".join(axes.get_xlabel().split()) for axes in figure.axes]
    assert words == [
        "stream channels", "heads", "q and k, channels in a head", "v, channels in a head", "hidden neurons",
        "MFLOPs (MACs)",
    ]  # fmt: skip
    assert ticks(figure) == [str(block) for block in range(DEPTH)]
    assert figure.axes[0].get_ylabel() == "block"
    removed = {"qk": "heads", "v": "heads"}  # with the heads goes what is inside
    for axes, (name, whole) in zip(
        figure.axes, {"stream": 192, "heads": 3, "qk": 64, "v": 64, "hidden": 768}.items(), strict=False
    ):
        kept = [block[name] if block[removed.get(name, name)] else 0 for block in arch.blocks]
        assert bars(axes) == ([whole] * DEPTH, kept)
        assert texts(axes) == [str(number) for number in kept]
        assert not axes.get_lines()  # no other width of the MLP's, though one is removed
    outlines, kept = bars(figure.axes[-1])
    np.testing.assert_allclose([1e6 * m for m in kept], [row.flops[0] for row in rows[:DEPTH]])
    np.testing.assert_allclose([1e6 * m for m in outlines], [row.flops[1] for row in rows[:DEPTH]])
    share = f"{100 * arch.flops / arch.backbone_flops:.1f} %"
    assert figure.get_suptitle().startswith("vit-free: ") and share in figure.get_suptitle()


def test_factors_stand_beside_their_blocks(tmp_path):
    arch, _ = finished_run(tmp_path)
    rows = rows_of(arch)
    figure = architecture_figure(rows, title_of(arch, rows))
    assert len(figure.axes) == 4 and figure.axes[0].get_ylabel() == "block: its choices"
    assert ticks(figure) == ["0: alpha 2", "1: alpha 1", "2: alpha 2"]
    assert figure.get_suptitle().startswith("swin-dan-nano, stream width: ")


def test_other_channels_of_the_mlp_are_a_line():
    whole = dict(flops=(5, 9), choices={"fraction": 0.5}, stream=(8, 8))
    rows = [Row("block 0", block=0, mlp_channels=(4, 8), **whole), Row("block 1", block=1, **whole)]
    axes = architecture_figure(rows, "run").axes[0]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[4, 4], [0, 0]]
    assert axes.get_xlabel().endswith("(line: of the MLP)")
