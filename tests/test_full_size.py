"""The full-size spaces with their published defaults on 600 photographs: only the model is small, the epochs few.

Swin, the default, runs every method; a family that is trained by the same code runs those whose defaults are its own,
and one more.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from safetensors.torch import save_file

from nas import commands
from nas.config import RetrainConfig
from nas.data.augmentation import STRENGTHS
from nas.runs.folder import saved_config
from nas.sweeps.options import SweepConfig
from search_spaces.families import FAMILIES
from search_spaces.registry import SPACES
from supernets import t2t_vit  # noqa: F401  registers T2T-ViT with timm
from tests.nas.run_checks import assert_whole
from tests.photographs import class_folders

CLASSES, EPOCHS = 20, 2
OF_OTHERS = {
    "vit": {"an", "dan", "free"},
    "deit": {"uvc", "free"},
    "t2t": {"dan", "uvc", "free"},
    "eva": {"joint", "free"},
    "cait": {"dan", "free"},
    "swinv2": {"dan"},
    "beit": {"free"},
    "relpos": {"free"},
}
FULL_SIZE = [
    space
    for space in SPACES.values()
    if not space.nano and space.method.name in OF_OTHERS.get(space.family, {space.method.name})
]
COMMANDS = {"search.py": commands.search, "retrain.py": commands.retrain}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("photographs"), CLASSES, train=30, val=5)


# The nano networks, shorter: an epoch is to cost seconds.
SHORTER: dict[str, dict[str, Any]] = {
    "swin": dict(depths=(1, 1)),
    "swinv2": dict(depths=(1, 1)),
    "t2t": dict(depth=3),
}


def small_model(family: str, folder: Path) -> list[str]:
    """Options that name a small network of the family, with weights to start from."""
    nano = FAMILIES[family]
    model, kwargs = nano.nano, dict(nano.nano_kwargs) | SHORTER.get(family, dict(depth=3, patch_size=8))
    weights = folder / "small.safetensors"
    save_file(timm.create_model(model, num_classes=CLASSES, **kwargs).state_dict(), weights)
    words = [f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in kwargs.items()]
    return ["--model", model, "--model-kwargs", *words, "--checkpoint", str(weights)]


def published_augmentation(own: dict[str, Any]) -> list[str]:
    """The space's own as options: from weights of one's own the default is lighter."""
    words = []
    for name in STRENGTHS["strong"]:
        value = own.get(name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    COMMANDS[script]()


@pytest.mark.slow
@pytest.mark.parametrize("space", FULL_SIZE, ids=lambda space: space.name)
def test_both_stages_run_on_photographs(
    space: Any, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, epochs = ["--data-dir", str(photographs)], ["--epochs", str(EPOCHS)]
    trains = space.search["epochs"] > 0  # a search by importance does not
    model, found, trained = small_model(space.family, tmp_path), tmp_path / "search", tmp_path / "retrain"
    alpha = ["--alpha", "2"] if space.method.name == "an" else []
    run(
        "search.py",
        monkeypatch,
        "--space",
        space.name,
        *model,
        *data,
        *(epochs if trains else []),
        *alpha,
        *published_augmentation(dict(space.training) | dict(space.search)),
        "--output",
        str(found),
    )
    augmented = published_augmentation(dict(space.training) | dict(space.retrain))
    run("retrain.py", monkeypatch, "--arch", str(found), *data, *epochs, *augmented, "--output", str(trained))
    for folder, kind, own in ((found, SweepConfig, space.search), (trained, RetrainConfig, space.retrain)):
        assert_whole(folder)
        config: Any = saved_config(kind, folder)
        published = dict(space.training) | dict(own)
        changed = {
            k: getattr(config, k) for k, v in published.items() if hasattr(config, k) and getattr(config, k) != v
        }
        open_until_the_start_is_known = set() if trains and kind is SweepConfig else {"lr"}
        assert set(changed) <= {"epochs", "pretrained"} | open_until_the_start_is_known, (
            changed
        )  # a user's who names none
        assert config.aa is None if not trains else config.aa.startswith("rand-m9")
    assert (trained / "compact.safetensors").is_file()
