"""--augment: what its sets hold, what overrides what, and what the log says of it."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from nas.config import RetrainConfig, SearchConfig, with_defaults
from nas.data.augmentation import STRENGTHS, augmentation_line, in_effect
from nas.data.loaders import loader_spec
from nas.data.transforms import LoaderSpec, Transform
from nas.stages.goal import resolve
from search_spaces.errors import UserError
from search_spaces.registry import SPACES, get_space

SPEC = LoaderSpec(batch_size=8, input_size=(3, 24, 24), mean=(0.5,) * 3, std=(0.2,) * 3)


def filled(space: str = "swin-dan", trained: bool = False, **options: Any) -> SearchConfig:
    config = with_defaults(SearchConfig(space=space, **options), get_space(space), "search", trained)
    config.check()
    return config


def spec_of(config: SearchConfig) -> LoaderSpec:
    return loader_spec(config, timm.create_model("vit_tiny_patch16_224", img_size=32), (3, 32, 32))


@pytest.mark.parametrize("space", ["swin-dan", "vit-kcr", "vit-free", "swin-dan-nano", "deit-uvc"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_set_replaces_the_spaces_own_and_an_option_replaces_either(space: str, strength: str) -> None:
    found = in_effect(filled(space, augment=strength))
    held = STRENGTHS[strength]
    assert found == dict(held) | {"aa": None if held["aa"] == "none" else held["aa"]}
    own = in_effect(filled(space, augment=strength, hflip=0.25, mixup=0.3, scale=(0.7, 0.9)))
    assert own == found | {"hflip": 0.25, "mixup": 0.3, "scale": (0.7, 0.9)}


@pytest.mark.parametrize("name", SPACES)
def test_without_it_from_scratch_every_spaces_own_set_is_as_it_was(name: str) -> None:
    found, own = filled(name), dict(SPACES[name].training) | dict(SPACES[name].search)
    for option in STRENGTHS["none"]:
        assert getattr(found, option) == own.get(option)
    assert not found.no_aug and found.augment is None


@pytest.mark.parametrize(("name", "light"), [("swin-dan", True), ("vit-kcr", True), ("vit-dan-nano", False)])
def test_from_a_checkpoint_a_set_for_hundreds_of_epochs_gives_way_to_the_light_one(name: str, light: bool) -> None:
    own = filled(name)
    for trained in (
        filled(name, checkpoint="mine.pth"),
        filled(name, model="local-dir:mine"),
        filled(name, trained=True),
    ):
        assert (in_effect(trained) == in_effect(filled(name, augment="light"))) == light
        assert (in_effect(trained) == in_effect(own)) == (not light)
    assert filled(name, checkpoint="mine.pth", augment="strong").mixup == 0.8
    assert filled(name, checkpoint="mine.pth", mixup=0.1).mixup == 0.1


def test_options_that_were_filled_once_are_not_filled_anew() -> None:
    """A run that goes on has its options from config.yaml."""
    for flags in (dict(augment="none"), dict(augment="none", hflip=0.5), dict(checkpoint="m"), dict(augment="strong")):
        once = filled(**flags)
        assert with_defaults(once, get_space("swin-dan"), "search") == once


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (40, 40)])
@pytest.mark.parametrize("flips", [None, 1.0])
def test_none_is_the_largest_square_in_the_middle_and_what_single_options_make_of_it(flips: Any, size: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, (w, h) = Image.fromarray(pixels), size
    spec = dataclasses.replace(spec_of(filled(augment="none", hflip=flips)), train_interpolation="bicubic")
    x, y = (w - 40) // 2, (h - 40) // 2
    middle = image.crop((x, y, x + 40, y + 40)).resize((32, 32), Image.Resampling.BICUBIC)
    if flips:
        middle = middle.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.array_equal(
        np.asarray(Transform(spec, True, as_bytes=True)(image)), np.asarray(middle).transpose(2, 0, 1)
    )


def test_aa_none_leaves_no_colour_jitter_over() -> None:
    assert spec_of(filled(aa="none")).color_jitter == 0
    assert spec_of(filled(aa="none", color_jitter=0.2)).color_jitter == 0.2
    steps = [type(step).__name__ for step in Transform(spec_of(filled(aa="none")), True, as_bytes=True).steps]
    assert "ColorJitter" not in steps and "RandAugment" not in steps
    steps = [
        type(s).__name__ for s in Transform(dataclasses.replace(SPEC, color_jitter=0.4), True, as_bytes=True).steps
    ]
    assert "ColorJitter" in steps


@pytest.mark.parametrize(
    ("mode", "steps"),
    [(None, "RandomResizedCropAndInterpolation"), ("rkrc", "CenterCropOrPad"), ("rkrr", "RandomCropOrPad")],
)
def test_the_crop_modes_are_timms(mode: Any, steps: str) -> None:
    transform = Transform(spec_of(filled(train_crop_mode=mode, augment="light")), True, as_bytes=True)
    assert steps in [type(step).__name__ for step in transform.steps]
    assert torch.as_tensor(transform(Image.new("RGB", (50, 30)))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            dict(no_aug=True, augment="strong"),
            "--no-aug and --augment strong both say",
        ),
        (dict(no_aug=True, train_crop_mode="rkrc"), "--train-crop-mode rkrc: --no-aug crops nothing"),
    ],
)
def test_contradictions_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        filled(**flags)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (dict(augment="none"), "augmentation (none): the square in the middle"),
        (dict(augment="light"), "augmentation (light): crops of 0.5 to 1 of the area, horizontal flips 0.5"),
        (
            dict(augment="strong"),
            "augmentation (strong): crops of 0.08 to 1 of the area, horizontal flips 0.5, rand-m9-mstd0.5-inc1,"
            " erasing 0.25, mixup 0.8, CutMix 1",
        ),
        (dict(), "augmentation (strong): crops of 0.08 to 1 of the area, horizontal flips 0.5, rand-m9"),
        (dict(augment="light", hflip=0.0), "augmentation: crops of 0.5 to 1 of the area"),
        (dict(augment="none", vflip=0.5), "augmentation: the square in the middle, vertical flips 0.5"),
        (
            dict(augment="light", color_jitter=0.3, train_crop_mode="rkrr", cutmix_minmax=(0.2, 0.8)),
            "augmentation: rkrr 0.5 to 1, horizontal flips 0.5, colour jitter 0.3, CutMix of sides 0.2 to 0.8",
        ),
    ],
)
def test_what_is_done_is_said(flags: dict[str, Any], line: str) -> None:
    assert augmentation_line(filled(**flags)).startswith(line)


def test_a_retrain_starts_as_its_search_did(tmp_path: Any) -> None:
    from search_spaces.architecture import save_architecture
    from tests.nas.finished import finished_run

    arch, _ = finished_run(tmp_path / "run")
    for checkpoint, light in ((None, False), ("mine.pth", True)):
        arch = dataclasses.replace(arch, space="swin-dan", search={"checkpoint": checkpoint} if checkpoint else {})
        save_architecture(arch, tmp_path / "arch.json")
        config, _, _ = resolve(RetrainConfig(arch=tmp_path / "arch.json", data_dir=tmp_path))
        assert (config.mixup, config.aa) == ((0.0, "none") if light else (0.8, "rand-m9-mstd0.5-inc1"))
