"""A folder that vanishes for a while costs time and no image; one that stays away costs the images, once."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from nas.data.images import Images, Source
from nas.data.loader import eval_loader
from nas.data.patience import Patience, there
from nas.data.transforms import LoaderSpec
from search_spaces.errors import UserError

SPEC = LoaderSpec(batch_size=4, input_size=(3, 8, 8), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "train" / "ant"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
    return folder


def images_of(folder: Path) -> Images:
    def read(i: int) -> Image.Image:
        return Image.open(folder / f"{i}.png").convert("RGB")

    return Images(Source(read, lambda i: str(folder / f"{i}.png"), np.zeros(8, dtype=np.int64), None))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_comes_back_loses_no_image(
    workers: int, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = eval_loader(images_of(pictures), SPEC.__class__(**SPEC.__dict__ | {"workers": workers}), "cpu")
    os.rename(tmp_path / "train", tmp_path / "gone")
    back = threading.Timer(1.5, os.rename, (tmp_path / "gone", tmp_path / "train"))
    back.start()
    start = time.monotonic()
    assert sum(len(labels) for _, labels in loader) == 8 and len(loader.corrupt) == 0
    assert time.monotonic() - start >= 1.0
    if not workers:
        assert "ant is gone; waiting up to 600 s" in caplog.text


def test_a_folder_that_stays_away_is_waited_for_once(pictures: Path, tmp_path: Path) -> None:
    loader = eval_loader(images_of(pictures), SPEC, "cpu")
    loader._loader.dataset.patience = Patience(seconds=0.5, poll=0.1)
    os.rename(tmp_path / "train", tmp_path / "gone")
    start = time.monotonic()
    with pytest.raises(UserError, match="4 of 8 images cannot be read"):
        list(loader)
    assert 0.5 <= time.monotonic() - start < 1.5


def test_an_image_that_is_broken_or_missing_by_itself_is_not_waited_for(pictures: Path) -> None:
    (pictures / "3.png").unlink()
    (pictures / "5.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    images, patience = images_of(pictures), Patience(poll=100.0)
    for i, error in ((3, FileNotFoundError), (5, UnidentifiedImageError)):
        with pytest.raises(error):
            patience.read(images, i)
    tar = pictures.parent / "ants.tar"
    tar.write_bytes(b"")
    assert there(tar / "ant") and there(pictures) and not there(pictures.parent / "bee")
