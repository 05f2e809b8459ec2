"""The one reading of an image, whichever data set it is of: what a viewer shows, in 8-bit RGB.

docs/data.md lists what is read how. The first picture of a file that holds several is the one that is read.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from search_spaces.errors import reason

# Formats that Pillow recognises and does not decode, and one for which it starts another program.
NOT_DECODED = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"})
EIGHT_BITS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".bmp", ".webp"})  # never more, in these files
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read, by Pillow's names, in Pillow's order."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_DECODED)


@cache
def suffixes() -> frozenset[str]:
    """How the names of files of these formats end: ".jpg", in lower case."""
    known = set(formats())
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def opened(data: bytes) -> Image.Image:
    """The image in a file's bytes, its pixels not decoded yet. Raises OSError where it is none, or damaged."""
    with _damage_as_oserror():
        try:
            return Image.open(io.BytesIO(data), formats=formats())
        except UnidentifiedImageError:  # its message names an object in memory
            raise UnidentifiedImageError("cannot identify an image that Pillow decodes") from None


def as_seen(image: Image.Image, exif: bool = True) -> Image.Image:
    """An image of any mode and depth in 8-bit RGB, turned as its EXIF data says, transparent parts on white.

    Raises OSError on a damaged file, and where numbers do not say which of them is white.
    """
    with _damage_as_oserror():
        image.load()
        turn = TURNS.get(_orientation(image)) if exif else None
        if _is_deep(image):
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = _on_white(image)
        image = image.convert("RGB")
        return image if turn is None else image.transpose(turn)


@contextmanager
def _damage_as_oserror() -> Iterator[None]:
    """Each of Pillow's decoders raises its own on a damaged file: RuntimeError, AssertionError, SyntaxError, …"""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {reason(error)}") from error


def depth(image: Image.Image) -> str | None:
    """How an image of more than 8 bits a channel is brought to 8, in words; None for the others."""
    if not _is_deep(image):
        return None
    if image.mode == "F":
        return "floats are read from 0, black, to 1, white"
    return "grey of more than 8 bits is scaled by its type: white is the largest number of so many bits"


def _is_deep(image: Image.Image) -> bool:
    """Whether a grey value has more than 8 bits. (Pillow itself brings colours to 8, by type as well.)"""
    return image.mode[:1] in ("I", "F")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled by its type: the largest number of so many bits is white, or the float 1."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # TIFF's
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # a NaN is neither
            raise OSError("floats beyond 0 to 1 do not say which number is white; save it with 8 or 16 bits")
        grey = np.rint(values * 255).astype(np.uint8)
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # of these, 16 bits in a wider type
        raise OSError("32-bit or signed integers do not say which number is white; save it with 8 or 16 bits")
    else:
        bits = 16 if image.mode == "I" else tags.get(BITS_PER_SAMPLE, (16,))[0]
        grey = (values >> (bits - 8)).astype(np.uint8)
    white_is_zero = tags.get(PHOTOMETRIC) == 0  # Pillow turns it round for 8 bits alone
    return Image.fromarray(255 - grey if white_is_zero else grey)


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparent parts as it lies on a white page."""
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image.convert("RGBA"))
    return page


def _orientation(image: Image.Image) -> int:
    """How the picture lies in the file, by EXIF; 1, upright, where nothing readable is said."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata raises whatever its reader stumbles on, and is no reason to lose the picture
        return 1
