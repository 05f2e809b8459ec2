"""What becomes of a network before it trains: every combination of --basis and --importance, and every start."""

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from nas.methods.table import TRAININGS
from nas.training.options import TrainingOptions
from nas.training.plan import DECIDING, BasisPlan, Facts, plan_basis
from search_spaces.errors import UserError
from tests.nas.small import small_supernet

NONE, ORDER, ROTATE = BasisPlan(), BasisPlan("order"), BasisPlan("rotate", (0,))
TABLE: dict[tuple[str | None, str | None], tuple[BasisPlan, BasisPlan]] = {  # from scratch, from trained weights
    (None, None): (NONE, ROTATE),
    (None, "none"): (NONE, NONE),
    (None, "magnitude"): (ORDER, ROTATE),
    (None, "taylor"): (ORDER, ROTATE),
    (None, "error"): (ORDER, ROTATE),
    ("none", None): (NONE, NONE),
    ("none", "none"): (NONE, NONE),
    ("order", None): (ORDER, ORDER),
    ("order", "magnitude"): (ORDER, ORDER),
    ("order", "taylor"): (ORDER, ORDER),
    ("order", "error"): (ORDER, ORDER),
    ("rotate", None): (ROTATE, ROTATE),
    ("rotate", "none"): (ROTATE, ROTATE),
    ("rotate", "taylor"): (ROTATE, ROTATE),
    ("rotate", "error"): (ROTATE, ROTATE),
}
CONTRADICTIONS: dict[tuple[str, str], str] = {
    (
        "none",
        "magnitude",
    ): "--importance magnitude orders the network, --basis none leaves it as it is; drop one of them",
    ("none", "taylor"): "--importance taylor orders the network",
    ("none", "error"): "--importance error orders the network",
    ("order", "none"): "--basis order needs an order; --importance none has none: drop one of them",
}
STARTS = pytest.mark.parametrize("trained", [False, True])


def plan(
    family: str = "vit",
    trained: bool = True,
    images: int = 1000,
    narrowed: Collection[int] = (0,),
    rotates: bool = True,
    backbone: dict[str, Any] | None = None,
    **options: Any,
) -> BasisPlan:
    supernet = small_supernet(family, **backbone or {})
    found = plan_basis(
        TrainingOptions(**{"calibration_images": 2048, **options}),
        supernet,
        Facts(trained, images, narrowed, rotates=rotates),
    )
    assert (found.deciding, found.images, found.inside, found.weighed) == (0, images, False, False)
    return replace(found, images=0)


def test_the_table_is_complete() -> None:
    kinds, importances = (None, "rotate", "order", "none"), (None, "none", "magnitude", "taylor", "error")
    missing = {(b, i) for b in kinds for i in importances} - TABLE.keys() - CONTRADICTIONS.keys()
    assert missing == {("rotate", "magnitude")}  # which is as ("rotate", "taylor")


@STARTS
@pytest.mark.parametrize(("basis", "importance"), TABLE)
def test_every_combination_and_start(basis: str | None, importance: str | None, trained: bool) -> None:
    assert plan(trained=trained, basis=basis, importance=importance) == TABLE[basis, importance][trained]


@STARTS
@pytest.mark.parametrize(("basis", "importance"), CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(basis: str, importance: str, trained: bool) -> None:
    with pytest.raises(UserError, match=re.escape(CONTRADICTIONS[basis, importance])) as error:
        plan(trained=trained, basis=basis, importance=importance)
    assert "\n" not in str(error.value)


@STARTS
def test_a_method_that_scores_its_own_units_is_not_rotated(trained: bool) -> None:
    assert not TRAININGS["uvc"].rotates and all(t.rotates for name, t in TRAININGS.items() if name != "uvc")
    with pytest.raises(UserError, match="--basis rotate: this method scores its own units; leave it out, or take"):
        plan(trained=trained, rotates=False, basis="rotate")
    for basis in (None, "none"):
        assert plan(trained=trained, rotates=False, basis=basis, importance="none") == NONE
    assert plan(trained=trained, rotates=False) == NONE
    for options in ({"importance": "taylor"}, {"basis": "order"}, {"basis": "order", "importance": "magnitude"}):
        assert plan(trained=trained, rotates=False, **options) == ORDER  # where it is asked for


@pytest.mark.parametrize(("images", "calibration_images"), [(23, 2048), (5000, 23)])
def test_fewer_images_than_channels_are_an_order(images: int, calibration_images: int) -> None:
    found = plan(images=images, calibration_images=calibration_images)
    assert (found.kind, found.streams) == ("order", ())
    (line,) = found.lines
    assert line.startswith("stage 0 is ordered, not rotated: 23 images for 24 channels;")
    assert "--calibration-images" in line
    assert plan(images=images, calibration_images=calibration_images, importance="none", basis="rotate").kind == "none"
    assert plan(images=24, calibration_images=24) == ROTATE


def test_every_stage_is_decided_by_itself() -> None:
    """16 and 32 channels, of which 20 images are enough for the first."""
    assert plan("swin", narrowed={0, 1}) == BasisPlan("rotate", (0, 1))
    assert plan("swin", narrowed={1}) == BasisPlan("rotate", (1,))
    found = plan("swin", narrowed={1, 0}, images=20)
    assert (found.kind, found.streams) == ("rotate", (0,))
    assert len(found.lines) == 1 and found.lines[0].startswith("stage 1 is ordered, not rotated: 20 images for 32")


@pytest.mark.parametrize("family", ["vit", "swin"])
@pytest.mark.parametrize("trained", [False, True])
def test_where_nothing_is_narrowed_there_is_nothing_to_rotate(family: str, trained: bool) -> None:
    """Inner width: heads and neurons are ordered."""
    found = plan(family, trained, narrowed=(), basis="rotate")
    assert (found.kind, found.streams) == ("order", ())
    (line,) = found.lines
    assert line.startswith("nothing is rotated: ") and line.endswith("heads and neurons are ordered")
    assert plan(family, trained, narrowed=(), basis="rotate", importance="none").kind == "none"


FIXED: dict[str, tuple[str, dict[str, Any], set[int], tuple[int, ...], str]] = {
    # family, options, narrowed, rotated all the same, the reason
    "max pooling": ("vit", {"global_pool": "max"}, {0}, (), "global_pool=max takes maxima"),
    "mean and maximum": ("vit", {"global_pool": "avgmax"}, {0}, (), "global_pool=avgmax takes maxima"),
    "no last norm": ("vit", {"final_norm": False}, {0}, (), "the classifier reads the stream without a norm"),
    "max pooling of a Swin": ("swin", {"global_pool": "max"}, {0, 1}, (0,), "global_pool=max takes maxima"),
}


@pytest.mark.parametrize("case", FIXED)
def test_what_stands_against_a_rotation_is_said(case: str) -> None:
    family, options, narrowed, streams, reason = FIXED[case]
    found = plan(family, narrowed=narrowed, backbone=options)
    assert found.streams == streams and found.kind == ("rotate" if streams else "order")
    (line,) = found.lines
    assert f"stage {max(narrowed)} is ordered, not rotated: " in line and reason in line


# Free widths: cut inside the heads, refitted


def refitted(images: int = 1000, inside: bool = True, narrowed: Collection[int] = (0,), **options: Any) -> BasisPlan:
    facts = Facts(True, images, narrowed, inside, refits=True)
    return plan_basis(TrainingOptions(**{"calibration_images": 2048, **options}), small_supernet("vit"), facts)


def test_images_that_decide_are_no_others() -> None:
    assert refitted(5 * DECIDING) == BasisPlan("rotate", (0,), (), True, True, DECIDING, 4 * DECIDING)
    few = refitted(100)  # a quarter of them
    assert (few.deciding, few.images) == (25, 75)
    assert all((plan.deciding, plan.images) == (25, 75) for plan in (refitted(100, basis=b) for b in ("order", "none")))
    assert refitted(31).streams == (0,) and refitted(30).streams == ()  # 24 and 23 images left for 24 channels


def test_what_is_cut_inside_the_heads_is_rotated_there_though_no_stream_is() -> None:
    found = refitted(narrowed=())
    assert (found.kind, found.streams, found.inside, found.lines) == ("rotate", (), True, ())
    assert not refitted(inside=False).inside
    few = refitted(8)
    assert (few.kind, few.streams, few.inside) == ("rotate", (), True) and len(few.lines) == 1


@pytest.mark.parametrize("basis", ["rotate", "order", "none"])
def test_what_is_lost_is_found_wherever_units_are_ordered(basis: str) -> None:
    assert refitted(basis=basis).weighed == (basis != "none")
