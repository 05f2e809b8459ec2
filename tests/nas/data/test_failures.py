"""What goes wrong with an image after it was found, or in a data loading process: one line with the image's name."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from nas.data.batches import Stream, collate
from nas.data.datasets import DataSpec, open_splits
from nas.data.images import Images, Source
from nas.data.loader import Loader, eval_loader, lost_worker, train_loader
from nas.data.transforms import LoaderSpec, Transform
from nas.failing import errors
from search_spaces.errors import UserError

SPEC = LoaderSpec(batch_size=8, input_size=(3, 24, 24), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0)


class Breaks:
    """A step of a transform that fails on the image of this brightness."""

    def __init__(self, brightness: int, error: Exception) -> None:
        self.brightness, self.error = brightness, error

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.getpixel((0, 0)) == (self.brightness,) * 3:
            raise self.error
        return image


def numbered(n: int = 40, wrong: int | None = None) -> Images:
    """n plain images, each as bright as its number; reading the one called wrong raises what no decoder should."""

    def read(i: int) -> Image.Image:
        if i == wrong:
            raise TypeError("a bug")
        return Image.new("RGB", (24, 24), (i, i, i))

    return Images(Source(read, "ant/{}.jpg".format, np.arange(n), None))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(100):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i:02d}.png")
    images = Images(open_splits(DataSpec("folder", tmp_path, val_fraction=0)).train.source)
    denied, read = {"ant/07.png"}, Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if any(path.match(name) for name in denied):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    loader = loader_of(images, training=False, workers=0)
    assert sum(len(y) for _, y in loader) == 199
    assert list(loader.corrupt.files) == [str(tmp_path / "ant" / "07.png")]
    denied |= {"bee/*.png"}
    with pytest.raises(UserError, match=r"of 200 images cannot be read .*ant/07\.png.*Permission denied") as error:
        list(loader_of(images, training=False, workers=0))
    assert_one_line(error)


def loader_of(images: Images, training: bool, workers: int) -> Loader:
    spec = dataclasses.replace(SPEC, workers=workers)
    return train_loader(images, spec, 0, "cpu") if training else eval_loader(images, spec, "cpu")


def steps(loader: Loader) -> list[Any]:
    transform = loader._loader.dataset.transform  # type: ignore[attr-defined]
    assert isinstance(transform, Transform)
    return transform.steps


def assert_one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_of_a_transform(training: bool, workers: int) -> None:
    loader = loader_of(numbered(), training, workers)
    steps(loader).insert(0, Breaks(30, ValueError("bits must be more\nthan one line")))
    doing = "augmenting" if training else "preparing"
    said = rf"ant/30\.jpg: error while {doing} it \(Breaks: ValueError: bits must be more\); replace or remove"
    with pytest.raises(UserError, match=said) as error:
        list(loader)
    assert_one_line(error)
    assert ("--aa" in str(error.value)) == training


@pytest.mark.parametrize("workers", [0, 2])
def test_what_no_decoder_should_raise(workers: int) -> None:
    with pytest.raises(UserError, match=r"ant/30\.jpg: error while reading it \(TypeError: a bug\)") as error:
        list(loader_of(numbered(wrong=30), False, workers))
    assert_one_line(error)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_make_no_batch(workers: int) -> None:
    loader = loader_of(numbered(), False, workers)
    steps(loader).append(lambda pixels: pixels[:, : 10 + int(pixels[0, 0, 0]) % 3])  # of three sizes
    with pytest.raises(UserError, match=r"error while loading images .*stack expects each tensor") as error:
        list(loader)
    assert_one_line(error)


def test_a_killed_process() -> None:
    loader = loader_of(numbered(), False, workers=2)
    steps(loader).append(lambda pixels: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises((UserError, RuntimeError)) as error:
        list(loader)
    # torch may raise it from a signal handler, outside of the loader; the commands say it in the same words
    words = str(error.value) if isinstance(error.value, UserError) else lost_worker(error.value)
    assert words is not None and "a data loading process died" in words and "--workers" in words and "\n" not in words


def test_a_command_says_in_one_line_that_a_process_died(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, errors("search.py"):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("search.py: error: a data loading process died")
    assert len(said.splitlines()) == 1
    with pytest.raises(RuntimeError, match="a bug"), errors("search.py"):
        raise RuntimeError("a bug")  # ours is not hidden


class Reader:
    """A timm reader of 40 images, which cannot decode the one called wrong."""

    dist_rank, wrong = 0, -1

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        for i in range(40):
            if i == self.wrong:
                raise OSError("truncated")
            yield Image.new("RGB", (24, 24), (i, i, i)), i


@pytest.mark.parametrize(("wrong", "doing"), [(20, "reading it (OSError: truncated)"), (-1, "augmenting it (Breaks")])
def test_a_stream_says_which_image_of_which_process(wrong: int, doing: str) -> None:
    reader, transform = Reader(), Transform(SPEC, is_training=True, as_bytes=True)
    reader.wrong = wrong
    transform.steps.insert(0, Breaks(20, ValueError("no")))
    stream = Stream(reader, transform, 0, first=0, step=1)
    data = DataLoader(stream, batch_size=8, num_workers=1, collate_fn=collate)
    loader = Loader(data, 5, 40, SPEC, 0, torch.device("cpu"))
    with pytest.raises(UserError) as error:
        list(loader)
    assert str(error.value).startswith(f"image 21 of process 1 of the stream: error while {doing}")
    assert_one_line(error)
