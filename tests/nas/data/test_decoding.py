"""One reading of an image, what a viewer shows of it, for every mode, depth, format and data set."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from nas.data.batches import Stream, collate
from nas.data.datasets import DataSpec, open_splits
from nas.data.decoding import TURNS, as_seen, depth, formats, opened, suffixes
from nas.data.images import UNREADABLE, Images, Source
from nas.data.loader import Loader, eval_loader, train_loader
from nas.data.transforms import LoaderSpec, Transform
from search_spaces.errors import UserError
from tests.nas.data.inputs import picture
from tests.photographs import photograph

SPEC = LoaderSpec(batch_size=4, input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=1.0, no_aug=True)
RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)  # every grey of 16 bits, once


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def read(data: bytes, exif: bool = True) -> np.ndarray[Any, Any]:
    return np.asarray(as_seen(opened(data), exif))


def tiff(values: np.ndarray[Any, Any], bits: int, white_is_zero: bool = False) -> bytes:
    """A grey TIFF, uncompressed, of so many bits a pixel; values (H, W)."""
    height, width = values.shape
    rows = ["".join(format(int(v), f"0{bits}b") for v in row) for row in values]
    if bits == 16:
        data = values.astype("<u2").tobytes()
    else:
        data = b"".join(
            int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows
        )
    short, long = 3, 4
    tags = [(256, short, width), (257, short, height), (258, short, bits), (259, short, 1)]
    tags += [(262, short, 0 if white_is_zero else 1), (273, long, 8), (277, short, 1), (278, short, height)]
    tags += [(279, long, len(data))]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_of_grey_are_scaled_by_their_type(kind: str) -> None:
    data = saved(Image.fromarray(RAMP), kind)
    assert np.array_equal(read(data), np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, 2))
    assert depth(opened(data)) is not None


def test_twelve_bits_and_white_at_zero() -> None:
    twelve = np.array([[0, 100, 2000, 4095], [16, 17, 32, 4080]])
    assert read(tiff(twelve, 12))[..., 0].tolist() == (twelve >> 4).tolist()
    sixteen = np.array([[0, 256, 30000, 65535]])
    assert read(tiff(sixteen, 16))[..., 0].tolist() == (sixteen >> 8).tolist()
    assert read(tiff(sixteen, 16, white_is_zero=True))[..., 0].tolist() == (255 - (sixteen >> 8)).tolist()


def test_colours_of_sixteen_bits_are_scaled_as_well() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in np.stack([RAMP[::64]] * 3, -1).astype(">u2"))
    out = io.BytesIO(b"")
    out.write(b"\x89PNG\r\n\x1a\n")
    PngImagePlugin.putchunk(out, b"IHDR", struct.pack(">IIBBBBB", 256, 4, 16, 2, 0, 0, 0))
    PngImagePlugin.putchunk(out, b"IDAT", zlib.compress(rows))
    PngImagePlugin.putchunk(out, b"IEND", b"")
    assert np.array_equal(read(out.getvalue())[..., 1], (RAMP[::64] >> 8).astype(np.uint8))


def test_floats_from_0_to_1_are_read_and_others_refused() -> None:
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert read(saved(Image.fromarray(values), "TIFF"))[..., 0].ravel().tolist() == list(range(256))
    for wrong in (values * 255, values - 0.5, np.where(values > 0.5, np.nan, values)):
        with pytest.raises(OSError, match="floats beyond 0 to 1 do not say which number is white"):
            read(saved(Image.fromarray(wrong), "TIFF"))


def test_integers_of_32_bits_are_refused() -> None:
    with pytest.raises(OSError, match="32-bit or signed integers do not say"):
        read(saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_images_keep_their_pixels(mode: str) -> None:
    image = photograph(3).convert(mode)
    assert np.array_equal(np.asarray(as_seen(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_a_negative(kind: str) -> None:
    seen = read(saved(Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK"), kind))
    assert np.abs(seen.reshape(-1, 3).astype(int) - (200, 100, 50)).max() <= 3


def transparent(mode: str) -> Image.Image:
    """Red on the left; on the right the same red, which nobody sees."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (4, 0, 8, 8))
    if mode == "P":
        image = image.quantize(4)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("P", "PNG"), ("LA", "PNG")]
)
def test_transparent_parts_lie_on_white(mode: str, kind: str) -> None:
    seen = read(saved(transparent(mode), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert np.all(seen[:, 4:] == 255)
    assert np.all(seen[:, :4, 0] == (76 if mode == "LA" else 255)) and np.all(seen[:, :4, 1] < 80)


def test_a_transparent_colour_and_palette_entry_lie_on_white() -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    image.paste((9, 9, 9), (0, 0, 4, 8))
    seen = read(saved(image, "PNG", transparency=(1, 2, 3)))
    assert np.all(seen[:, 4:] == 255) and np.all(seen[:, :4] == 9)
    seen = read(saved(image.quantize(2), "GIF", transparency=image.quantize(2).getpixel((7, 7))))
    assert np.all(seen[:, 4:] == 255) and np.all(seen[:, :4] == 9)


def test_half_transparent_is_half_white_and_opaque_is_untouched() -> None:
    assert read(saved(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG"))[0, 0].tolist() == [127] * 3
    image = photograph(5).convert("RGBA")
    assert np.array_equal(np.asarray(as_seen(image)), np.asarray(photograph(5)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the upper left
    back = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    stored = Image.fromarray(upright)
    stored = stored if orientation == 1 else stored.transpose(TURNS[back])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, kind, exif=exif)
    assert np.array_equal(read(data) > 128, upright > 128)
    if kind != "TIFF":  # which Pillow turns itself
        assert np.array_equal(read(data, exif=False) > 128, np.asarray(stored) > 128)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0garbage of some length", b"Exif\0\0II*\0\xff\xff\xff\xff", b""]
)
def test_damaged_exif_loses_no_picture(exif: bytes) -> None:
    assert read(saved(photograph(1), "JPEG", exif=exif)).shape == np.asarray(photograph(1)).shape


def test_what_is_written_plainly_is_read_as_before() -> None:
    for kind in ("JPEG", "PNG", "BMP", "PPM"):
        data = saved(photograph(2), kind)
        assert np.array_equal(read(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_every_format_that_pillow_writes_and_reads_is_taken() -> None:
    written = [kind for kind in formats() if kind in Image.SAVE and kind != "SPIDER"]  # it writes floats up to 255
    assert {"JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000", "AVIF"} <= set(written)
    for kind in written:
        image = picture(1, size=(64, 64))
        for mode in ("RGB", "P", "L", "1"):
            try:
                data = saved(image.convert(mode), kind)
                break
            except (OSError, KeyError, ValueError):
                continue  # not in this mode
        assert read(data).shape[2] == 3, kind


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "ICNS", "TGA", "PPM"]
)
def test_a_damaged_file_raises_what_counts_as_unreadable(kind: str) -> None:
    whole = saved(picture(1, size=(64, 64)), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 5):
            data[at] = rng.integers(0, 256)
        data = data[: rng.integers(len(data) // 2, len(data) + 1)]
        with contextlib.suppress(*UNREADABLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read(bytes(data)).dtype == np.uint8


def test_suffixes_are_pillows_without_what_it_cannot_decode() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif", ".ppm"} <= suffixes()
    assert suffixes().isdisjoint({".txt", ".pdf", ".eps", ".ps", ".mpg", ".h5", ".hdf", ".wmf", ".tar", ""})


def test_the_first_picture_of_several_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("TIFF", "GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert read(data)[0, 0].tolist() == [255, 0, 0], kind


def on_its_side() -> Source:
    """Eight pictures, 16-bit grey but for one, each bright above when EXIF has turned it."""
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.full((16, 16), 60_000, np.uint16)
    pixels[:8] = 1_000
    data = [saved(Image.fromarray(pixels), "PNG", exif=exif) for _ in range(8)]
    return Source(lambda i: opened(data[i]), "image {}".format, np.arange(8) % 2, None)


class Reader:
    """A stream of the same pictures, as timm's readers give them when they are not to convert."""

    dist_rank = 0

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        source = on_its_side()
        yield from ((source.read(i), 0) for i in range(8))


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("path", ["training", "evaluation", "stream"])
def test_training_evaluation_and_streams_read_alike(path: str, exif: bool) -> None:
    spec, cpu = replace(SPEC, exif=exif), torch.device("cpu")
    if path == "stream":
        stream = Stream(Reader(), Transform(spec, is_training=False, as_bytes=True), 0, first=0, step=1, exif=spec.exif)
        data = DataLoader(stream, batch_size=4, num_workers=1, collate_fn=collate)
        batches: Any = Loader(data, 2, 8, spec, 0, cpu)
    else:
        make = partial(train_loader, seed=0) if path == "training" else eval_loader
        batches = make(Images(on_its_side()), spec, device="cpu")
    images = torch.cat([x for x, _ in batches])
    grey = (images * 0.2 + 0.5) * 255
    above, beneath = (60_000 >> 8, 1_000 >> 8) if exif else (1_000 >> 8, 60_000 >> 8)
    assert images.shape == (8, 3, 16, 16)
    assert torch.allclose(grey[:, :, :8], torch.tensor(float(above)), atol=0.01)
    assert torch.allclose(grey[:, :, 8:], torch.tensor(float(beneath)), atol=0.01)


def test_torchvisions_folders_are_read_alike(tmp_path: Any) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(RAMP).save(tmp_path / split / name / f"{i}.png")
    splits = open_splits(DataSpec("torch/folder", tmp_path, val_fraction=0))
    assert np.array_equal(np.asarray(splits.train[0][0])[..., 0], (RAMP >> 8).astype(np.uint8))
    (tmp_path / "train" / "a" / "new.jp2").write_bytes((tmp_path / "train" / "a" / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"torchvision reads 6 files .* where 7 images lie; they differ in .*new\.jp2"):
        open_splits(DataSpec("torch/folder", tmp_path))


def test_a_refused_image_is_named(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(100):
            picture(0, i, (8, 8)).save(tmp_path / name / f"{i}.png")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "a" / "50.tif")
    images = Images(open_splits(DataSpec("folder", tmp_path, val_fraction=0)).train.source)
    loader = eval_loader(images, SPEC, "cpu")
    assert sum(len(y) for _, y in loader) == 200
    assert [name.endswith("a/50.tif") for name in loader.corrupt.files] == [True]
    assert "which number is white" in caplog.text
