"""Every picture is opened here, as a viewer shows it: upright, whole, on white, its first frame, as 8-bit RGB.

- **Orientation** in EXIF or XMP is applied; a block that cannot be read says nothing.
- **More than 8 bits** are scaled, never clipped. Where the file says its range, that is the range (PGM, JPEG 2000, TIFF
  of 12 bits); else a whole-numbered image has the smallest range of 8, 10, 12, 14 or 16 bits that holds all its values
  (12 bits come in files of 16), and one with values outside of those is stretched from its smallest to its largest.
- **Floats** in 0..1 have that range, whole numbers are taken as above, anything else is stretched from its smallest to
  its largest value; what is not a number is black. In an array floats are 0..1 or 0..255 and nothing else: such an array
  can be mended where it is made.
- **Transparency** of any kind (alpha, a transparent colour, a palette with alpha) lies on white.
- **Animations** and files of several pages show their first frame; `frames` says that there are more.
- CMYK, YCbCr, LAB, HSV and palettes become RGB by Pillow's own formulas. Colour profiles are not applied, as no
  processor of Hugging Face applies them.

Whatever Pillow raises, of any class and however late, becomes one RetainError.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PILImage

from retain.types import ImageSource, RetainError

# H height, W width, C channels

MAX_PIXELS = 90_000_000
"""Pixels of one image, about Pillow's own warning: more is a mistake or a decompression bomb."""

WHERE = "where it was read"
"""In the `info` of a Pillow image: what an error calls it, such as a file, a row and a field."""

_allowed = {MAX_PIXELS}  # the limits that files were looked at with: what passed then is opened later

RANGES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
"""The largest values of the bit depths that cameras, scanners and detectors have."""

STRETCHED = {"PPM", "JPEG2000"}
"""Formats whose decoder brings every depth beyond 8 bits to 16: their range is known, however dark they are."""

FORMATS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF", "ICO", "PCX", "QOI", "PSD", "SGI",
    "TGA",
)  # fmt: skip
"""Formats that are opened: pixels and nothing else. Pillow knows more, and some of them run another program (EPS starts
Ghostscript) or are read only by a program's stub (WMF, GRIB, HDF5, MPEG), whatever a file is called.
"""

OTHERS = {"MPO", None}
"""What Pillow calls a JPEG of several pictures, and one that was made in memory."""

WIDE = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
"""Pillow's modes of more than 8 bits, all of one channel."""

TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""How to undo each orientation of EXIF (CIPA DC-008, tag 274)."""

WHITE_IS_ZERO = 262  # TIFF: PhotometricInterpretation 0; Pillow inverts 8 bits itself, more than 8 not


def opened(source: ImageSource, where: str) -> PILImage.Image:
    """RGB pixels of an image, a copy that the caller may change.

    Raises RetainError, which names `where` (a row or an example) and the file, for whatever cannot be shown.
    """
    image, wrong = tried(source)
    if image is None:
        raise RetainError(f"{where}: cannot read image {_name(source)}: {wrong}")
    return image


def tried(source: ImageSource) -> tuple[PILImage.Image | None, str]:
    """RGB pixels of an image and "", or nothing and what is wrong with it."""
    try:
        with _quiet():
            return _rgb(source), ""
    except Exception as error:  # Pillow's readers raise nearly every class there is on a broken file
        return None, _why(error)


def _rgb(source: ImageSource) -> PILImage.Image:
    if isinstance(source, np.ndarray):
        return _of_array(source)
    if isinstance(source, PILImage.Image):
        shown = _shown(source)
        return shown.copy() if shown is source else shown
    if not isinstance(source, Path):
        raise RetainError(f"a path, an array or a Pillow image is needed, not {type(source).__name__}")
    with _open(source) as image:
        return _shown(image)


def _open(source: Path | bytes) -> PILImage.Image:
    """A file's image, not decoded, where it is of a format that is taken."""
    if isinstance(source, Path) and not source.is_file():  # a pipe or a device would be waited for
        raise RetainError("no such file")
    return PILImage.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_taken())


@cache
def _taken() -> list[str]:
    """The formats of `FORMATS` that this Pillow was built with."""
    PILImage.init()
    return [f for f in FORMATS if f in PILImage.OPEN]


def looked_at(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[PILImage.Image | None, str]:
    """The image of a file's path or bytes, opened but not decoded, and "", or nothing and what its header shows wrong."""
    try:
        with _quiet():  # our own limit says it better
            image = _open(source)
    except Exception as error:
        return None, _why(error)
    wrong = _refused(image) or _too_large(*image.size, max_pixels)
    if wrong:
        image.close()
        return None, wrong
    allow(max_pixels)
    image.info[RAW] = _raw_mode(image)  # others may load it before it is shown
    return image, ""


def broken(path: Path) -> str:
    """What is wrong with a picture file by its own marks: PNG's checksums are compared; "" for nothing."""
    try:
        with _quiet(), _open(path) as image:
            image.verify()
    except Exception as error:  # as above
        return _why(error)
    return ""


def allow(max_pixels: int) -> None:
    """Files were looked at with this limit: what passed then is opened later."""
    _allowed.add(max_pixels)


def frames(source: ImageSource) -> int:
    """How many frames or pages an image has, of which the first is shown; 1 where nobody can tell."""
    if isinstance(source, np.ndarray):
        return 1
    try:
        with _quiet():
            if isinstance(source, PILImage.Image):
                return _frames(source)
            with _open(source) as image:
                return _frames(image)
    except Exception:  # the first frame was shown; a broken one behind it is not looked at
        return 1


def _frames(image: PILImage.Image) -> int:
    if image.format == "MPO":  # a photograph; what follows is its preview or its depth
        return 1
    return int(getattr(image, "n_frames", 1))


# -- words -------------------------------------------------------------------------------------------------------


def _name(source: object) -> str:
    """What an error calls an image."""
    if isinstance(source, Path):
        return str(source)
    if isinstance(source, np.ndarray):
        return f"(an array of {source.dtype} {source.shape})"
    if isinstance(source, PILImage.Image):
        name = source.info.get(WHERE) or getattr(source, "filename", "")
        return str(
            name or f"(a Pillow image, {source.format or source.mode}, {source.width} x {source.height})"
        )
    text = repr(source)
    return text if len(text) <= 60 else text[:57] + "…"


def _why(error: Exception) -> str:
    """An exception of Pillow, of the system or of ours as half a sentence."""
    said = " ".join(str(error).split())
    said = said if len(said) <= 200 else said[:199] + "…"
    if isinstance(error, RetainError):
        return said
    if isinstance(error, UnidentifiedImageError):
        return f"not an image (corrupt, or another kind of file, such as EPS, PDF or SVG); taken are {', '.join(_taken())}"
    if isinstance(error, PILImage.DecompressionBombError):
        return f"too large: {said}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for its pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"cannot be decoded ({type(error).__name__}{': ' if said else ''}{said})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings (corrupt EXIF, large images) concern nobody who gets the picture, or our error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- Pillow images -----------------------------------------------------------------------------------------------


def _too_large(width: int, height: int, most: int) -> str:
    n = width * height
    return f"{width} x {height} = {n:,} pixels; at most {most:,} are taken (max_pixels)" if n > most else ""


def _refused(image: PILImage.Image) -> str:
    if image.format in FORMATS or image.format in OTHERS:
        return ""
    return f"{image.format} is no format that is taken; save it as PNG"


def _shown(image: PILImage.Image) -> PILImage.Image:
    """An open image as a viewer shows it."""
    width, height = image.size
    if wrong := _refused(image) or _too_large(width, height, max(_allowed)):
        raise RetainError(wrong)
    raw = _raw_mode(image)  # before the pixels are loaded: Pillow forgets it then
    try:
        image.load()
    except Exception:
        image.close()  # asked again, Pillow would show what it has, the rest of it black
        raise
    method = TURNS.get(_orientation(image))
    shown = _of_wide(image) if image.mode in WIDE else _on_white(image, raw)
    return shown if method is None else shown.transpose(method)


def _orientation(image: PILImage.Image) -> int:
    """EXIF's orientation, after loading: TIFF and AVIF are turned by Pillow then, and PNG may say it at its end."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a broken EXIF block hides no picture: viewers show it as it lies
        return 1
    return found if isinstance(found, int) else 1


SHORT = {"L;2": 3, "L;4": 15}
"""Raw modes of PNG whose pixels Pillow brings to 8 bits (of "RGB;16B" it keeps the upper half), their colours not."""

RAW = "raw mode"


def _raw_mode(image: PILImage.Image) -> str:
    """The raw mode of a file's pixels, such as "L;4" or "RGB;16B"; "" where there is none, or no more."""
    if RAW in image.info:
        return str(image.info[RAW])
    tile = getattr(image, "tile", None)
    args = tile[0][3] if tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _on_white(image: PILImage.Image, raw: str) -> PILImage.Image:
    """An image of 8 bits or less as RGB, what is transparent in it on white."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # a large file is not held twice
    if image.mode == "La":  # premultiplied; Pillow knows no way from here to RGBA
        image = image.convert("LA")
    colour = image.info.get("transparency")
    if raw in SHORT and isinstance(colour, int):
        image = _with(image, colour * 255 // SHORT[raw])
    elif raw == "RGB;16B" and isinstance(colour, tuple):
        image = _with(image, tuple(int(c) >> 8 for c in colour))
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    shown = PILImage.new("RGB", layer.size, "white")
    shown.paste(layer, mask=layer.getchannel("A"))
    return shown


def _with(image: PILImage.Image, colour: int | tuple[int, ...]) -> PILImage.Image:
    """A copy with another transparent colour: the image may be the caller's."""
    out = image.copy()
    out.info["transparency"] = colour
    return out


def _of_wide(image: PILImage.Image) -> PILImage.Image:
    """An image of more than 8 bits: scaled, inverted where its TIFF says so, on white where its PNG says so."""
    values_HW = np.asarray(image)
    grey_HW = _scaled(values_HW, _declared(image))
    if getattr(image, "tag_v2", {}).get(WHITE_IS_ZERO) == 0:
        grey_HW = 255 - grey_HW
    clear = image.info.get("transparency")
    if isinstance(clear, int) and values_HW.dtype.kind in "iu":
        grey_HW = np.where(values_HW == clear, np.uint8(255), grey_HW)
    return PILImage.fromarray(grey_HW).convert("RGB")


def _declared(image: PILImage.Image) -> int:
    """The largest value that the file's own words allow, 0 where they leave it open."""
    if image.format in STRETCHED:
        return RANGES[-1]
    bits = getattr(image, "tag_v2", {}).get(258)  # TIFF: BitsPerSample
    bits = bits[0] if isinstance(bits, tuple) and bits else bits
    return int(2**bits - 1) if isinstance(bits, int) and 8 < bits < 16 else 0


# -- numbers -----------------------------------------------------------------------------------------------------


CHUNK = 1 << 20  # values that are held as 8-byte floats at a time


def _scaled(values: np.ndarray[Any, Any], declared: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Numbers of any range as 0..255 by the rule at the top of this file."""
    if not values.size:
        return values.astype(np.uint8)
    if values.dtype.kind == "f":
        return _stretched(values, *_float_range(values))
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > RANGES[-1]:
        return _stretched(values, low, high)
    top = declared or _range(high)
    table = np.minimum((np.arange(max(top, high) + 1) * 255 + top // 2) // top, 255).astype(np.uint8)
    out: np.ndarray[Any, np.dtype[np.uint8]] = table[values]
    return out


def _range(high: float) -> int:
    return next(top for top in RANGES if high <= top)


def _float_range(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    if low >= 0 and high <= RANGES[-1] and bool((finite == np.rint(finite)).all()):
        return 0.0, float(_range(high))
    return low, high


def _stretched(values: np.ndarray[Any, Any], low: float, high: float) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`low` becomes 0 and `high` 255; infinities are the ends, what is no number is 0."""
    width = float(high) - float(low) or 1.0  # a flat image is black
    out = np.empty(values.shape, np.uint8)
    rows = max(1, CHUNK // max(1, values[0].size))
    for i in range(0, len(values), rows):
        scaled = (values[i : i + rows].astype(np.float64) - float(low)) * (255.0 / width)
        out[i : i + rows] = np.rint(np.nan_to_num(scaled, nan=0.0).clip(0, 255))
    return out


# -- arrays ------------------------------------------------------------------------------------------------------

CHANNELS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def _of_array(pixels: np.ndarray[Any, Any]) -> PILImage.Image:
    """H x W, or H x W x C of grey, grey and alpha, RGB, RGBA; uint8, uint16, bool or float."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    known = kind in "bf" or (kind == "u" and size <= 2)
    if pixels.ndim not in (2, 3) or channels not in CHANNELS or not pixels.size or not known:
        raise RetainError(
            f"an array of H x W or H x W x 1 to 4 channels (grey, grey and alpha, RGB, RGBA) of uint8, uint16, bool or "
            f"float is needed, not {pixels.dtype} of shape {pixels.shape}"
        )
    if kind == "f":
        eight = _of_floats(pixels)
    elif kind == "b":
        eight = pixels.astype(np.uint8) * np.uint8(255)
    else:
        eight = pixels if size == 1 else _scaled(pixels)
    flat = eight[:, :, 0] if eight.ndim == 3 and channels == 1 else eight
    return _on_white(PILImage.fromarray(np.ascontiguousarray(flat)), "")


def _of_floats(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    low, high = float(pixels.min()), float(pixels.max())  # NaN if there is one
    if not (low >= 0 and high <= 255):
        raise RetainError(f"floats are in 0..1 or in 0..255, and these are from {low:g} to {high:g}")
    return _stretched(pixels, 0, 1 if high <= 1 else 255)
