"""Every operation of every policy at every magnitude, on a picture like a photograph: what one image in many meets."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data import auto_augment

from nas.data.transforms import LoaderSpec, Transform, TransformError, policy_ops
from search_spaces.registry import SPACES
from tests.photographs import photograph

SPEC = LoaderSpec(batch_size=8, input_size=(3, 48, 48), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
DEFAULTS = sorted({policy for space in SPACES.values() if (policy := space.training.get("aa"))})
OTHERS = (
    "v0", "v0r", "original", "originalr", "3a", "augmix-m5-w4-d2",
    "rand-m9", "rand-m9-mstd0.5-mmax20-inc1", "rand-m5-tweights-inc1", "rand-m5-t3a-inc1", "rand-m5-t3aw-inc1",
)  # fmt: skip


def test_the_full_size_spaces_have_policies() -> None:
    assert set(DEFAULTS) == {"rand-m9-mstd0.5", "rand-m9-mstd0.5-inc1"}


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("policy", [*DEFAULTS, *OTHERS])
def test_every_operation_at_every_magnitude(policy: str, channels: int) -> None:
    spec = dataclasses.replace(SPEC, aa=policy, input_size=(channels, 48, 48))
    transform = Transform(spec, is_training=True, as_bytes=True)
    ops = {op.name: op for op in policy_ops(transform.steps)}
    assert len(ops) >= 3
    picture = photograph(7, (64, 48)).convert("RGB" if channels == 3 else "L")
    for op in ops.values():
        op.prob, op.magnitude_std = 1.0, 0.0
        for tenth in range(10 * int(op.magnitude_max or 10) + 1):
            op.magnitude = tenth / 10
            for _ in range(2):  # some draw a direction
                made = op(picture)
                assert (made.size, made.mode) == (picture.size, picture.mode), f"{op.name} at {op.magnitude}"


def mended(policy: str) -> Any:
    """The posterize op of a policy, sure to act and without noise."""
    transform = Transform(dataclasses.replace(SPEC, aa=policy), is_training=True, as_bytes=True)
    op = next(op for op in policy_ops(transform.steps) if op.name.startswith("Posterize"))
    op.prob, op.magnitude_std = 1.0, 0.0
    return op


@pytest.mark.parametrize(
    ("policy", "magnitude", "bits"),
    [
        ("rand-m9-inc1", 10, 1),  # asks for 0: what ended a run of a thousand photographs
        ("rand-m9-inc1", 9, 1),
        ("rand-m9-inc1", 4, 3),
        ("rand-m9-inc1", 0, 4),
        ("rand-m9-inc1-mmax20", 20, 1),  # asks for -4
        ("rand-m9", 0, 1),  # without inc the weakest magnitude keeps the least
        ("rand-m9", 10, 4),
        ("original", 10, 8),
    ],
)
def test_posterize_keeps_the_bits_it_is_asked_for_and_never_none(policy: str, magnitude: float, bits: int) -> None:
    op, picture = mended(policy), photograph(3)
    op.magnitude = magnitude
    made = np.asarray(op(picture))
    expected = picture if bits == 8 else ImageOps.posterize(picture, bits)
    assert np.array_equal(made, np.asarray(expected))
    assert made.max() > 0  # not black


def test_timm_itself_is_left_alone() -> None:
    mended("rand-m9-inc1")
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is auto_augment.posterize
    assert auto_augment.AugmentOp("PosterizeIncreasing").aug_fn is auto_augment.posterize


def test_transforms_travel_to_processes_that_are_not_forked() -> None:
    transform = Transform(dataclasses.replace(SPEC, aa=DEFAULTS[0], reprob=0.5), is_training=True, as_bytes=False)
    again = pickle.loads(pickle.dumps(transform))
    assert again(photograph(1)).shape == (3, 48, 48)


def test_an_error_says_which_step_and_why() -> None:
    transform = Transform(SPEC, is_training=False, as_bytes=True)
    transform.steps.insert(1, ImageOps.posterize)
    with pytest.raises(TransformError, match=r"posterize: TypeError: posterize\(\) missing 1 required"):
        transform(Image.new("RGB", (60, 50)))


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (8, 96)])
@pytest.mark.parametrize(
    "change",
    [{}, {"no_aug": True}, {"aa": DEFAULTS[0]}, {"reprob": 0.9}, {"crop_pct": 0.5}, {"interpolation": "random"}],
)
def test_inputs_that_are_not_square(size: tuple[int, int], change: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, input_size=(3, *size), **change)
    for width, height in ((50, 30), (30, 50), (1, 60), (60, 1), (300, 7), (2, 2)):
        for training in (True, False):
            made = Transform(spec, is_training=training, as_bytes=not spec.reprob)(photograph(2, (width, height)))
            assert made.shape == (3, *size)
