"""Every picture is seen as a viewer shows it, by the doctor and by training alike, and what is broken is one sentence."""

from __future__ import annotations

import ast
import io
import json
import os
import random
import re
import socket
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features
from typer.testing import CliRunner

import own_data
import retain
import tiny
from limits import CPU
from retain.cli import app
from retain.data import picture, read
from retain.data.doctor import diagnose
from retain.metrics.scores import score
from retain.models.encode import open_image
from retain.run.store import RunDir, load_state, save_state
from retain.stream import Task
from retain.types import Example, ImageSource, Message, RetainError, digest

RAMP = np.arange(256)
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
ODD = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def file_of(image: Image.Image, kind: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def lazily(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw))


def seen(source: ImageSource) -> np.ndarray:
    shown = picture.opened(source, "row 1")
    assert shown.mode == "RGB"
    return np.asarray(shown)


# -- orientation -----------------------------------------------------------------------------------------

AVIF = ["avif"] if features.check("avif") else []  # not in every build of Pillow
TURNED = ["jpeg", "png", "webp", "tiff", *AVIF, "mpo"]


@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind: str, orientation: int) -> None:
    """By Pillow's own `exif_transpose` on the same bytes; TIFF and AVIF are turned while they load."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = file_of(Image.fromarray(ODD), kind, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(lazily(raw)).convert("RGB"))
    assert np.array_equal(seen(lazily(raw)), want)
    assert want.shape[:2] == ((9, 6) if orientation >= 5 else (6, 9))
    if kind in {"png", "tiff"}:  # lossless: the eight ways to lie, from their definition
        upright = {
            1: ODD, 2: ODD[:, ::-1], 3: ODD[::-1, ::-1], 4: ODD[::-1], 5: ODD.swapaxes(0, 1),
            6: np.rot90(ODD, -1), 7: np.rot90(ODD, 2).swapaxes(0, 1), 8: np.rot90(ODD),
        }  # fmt: skip
        assert np.array_equal(seen(lazily(raw)), upright[orientation])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01"]
)
def test_broken_exif_hides_no_picture(exif: bytes) -> None:
    raw = file_of(Image.fromarray(ODD), "png", exif=exif)
    assert np.array_equal(seen(lazily(raw)), ODD)


@pytest.mark.parametrize("value", [0, 9])
def test_an_orientation_that_does_not_exist_turns_nothing(value: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert np.array_equal(seen(lazily(file_of(Image.fromarray(ODD), "png", exif=exif.tobytes()))), ODD)


# -- more than 8 bits ------------------------------------------------------------------------------------


def ramp(top: int, kind: Any = np.uint16) -> np.ndarray:
    """256 values from 0 to `top`, evenly."""
    return (RAMP * top / 255).round().astype(kind)[None].repeat(3, 0)


def packed_tiff(values: np.ndarray, bits: int, white_is_zero: bool = False) -> bytes:
    """A TIFF by hand: Pillow writes neither 12 bits nor white as zero."""
    if bits == 12:
        flat = values.astype(np.uint16).reshape(-1, 2)
        three = np.stack([flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255], 1)
        data = three.astype(np.uint8).tobytes()
    else:
        data = values.astype(f"<u{bits // 8}").tobytes()
    height, width = values.shape
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


RAMPS: dict[str, Callable[[], Any]] = {
    "png 16": lambda: lazily(file_of(Image.fromarray(ramp(65535)), "png")),
    "tiff 16": lambda: lazily(file_of(Image.fromarray(ramp(65535)), "tiff")),
    "tiff 16 big-endian": lambda: lazily(file_of(Image.fromarray(ramp(65535, ">u2")), "tiff")),
    "tiff 16 lzw": lambda: lazily(file_of(Image.fromarray(ramp(65535)), "tiff", compression="tiff_lzw")),
    "jpeg 2000 16": lambda: lazily(file_of(Image.fromarray(ramp(65535)), "jpeg2000")),
    "pgm 16": lambda: lazily(file_of(Image.fromarray(ramp(65535)), "ppm")),
    "pgm 12": lambda: lazily(b"P5 256 3 4095\n" + ramp(4095, ">u2").tobytes()),
    "pgm 12 in text": lambda: lazily(b"P2 256 3 4095\n" + " ".join(map(str, ramp(4095).flatten())).encode()),
    "tiff 12": lambda: lazily(packed_tiff(ramp(4095), 12)),
    "tiff white is zero": lambda: lazily(packed_tiff(65535 - ramp(65535), 16, white_is_zero=True)),
    "12 in 16 png": lambda: lazily(file_of(Image.fromarray(ramp(4095)), "png")),
    "10 in 16 png": lambda: lazily(file_of(Image.fromarray(ramp(1023)), "png")),
    "14 in 16 tiff": lambda: lazily(file_of(Image.fromarray(ramp(16383)), "tiff")),
    "8 in 16": lambda: lazily(file_of(Image.fromarray(ramp(255)), "png")),
    "tiff 32": lambda: lazily(file_of(Image.fromarray(ramp(10**9, np.int32)), "tiff")),
    "signed": lambda: Image.fromarray(ramp(65535, np.int32) - 32768),
    "mode I": lambda: Image.fromarray(ramp(65535, np.int32)),
    "mode I of 8 bits": lambda: Image.fromarray(ramp(255, np.int32)),
    "mode I;16L": lambda: Image.frombytes("I;16L", (256, 3), ramp(65535, "<u2").tobytes()),
    "mode I;16B": lambda: Image.frombytes("I;16B", (256, 3), ramp(65535, ">u2").tobytes()),
    "float 0..1": lambda: lazily(file_of(Image.fromarray((ramp(65535) / 65535).astype(np.float32)), "tiff")),
    "float 0..255": lambda: Image.fromarray(ramp(255, np.float32)),
    "float 0..4095": lambda: Image.fromarray(ramp(4095, np.float32)),
    "float 0..10.5": lambda: Image.fromarray((RAMP / 255 * 10.5).astype(np.float32)[None]),
    "float -1..1": lambda: Image.fromarray((RAMP / 127.5 - 1).astype(np.float32)[None]),
    "float beyond 16 bits": lambda: Image.fromarray((RAMP * 1e6).astype(np.float32)[None]),
    "array 16": lambda: ramp(65535),
    "array 16 big-endian": lambda: ramp(65535, ">u2"),
    "array 12 in 16": lambda: ramp(4095),
    "array float64 0..1": lambda: ramp(65535) / 65535,
    "array float16 0..255": lambda: ramp(255, np.float16),
    "array uint8": lambda: ramp(255, np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_stays_a_ramp(name: str) -> None:
    shown = seen(RAMPS[name]())
    assert shown.shape[1:] == (256, 3)
    assert np.array_equal(shown, np.broadcast_to(RAMP[None, :, None], shown.shape))


def test_a_dark_file_of_known_depth_stays_dark() -> None:
    """PGM, JPEG 2000 and a 12-bit TIFF say their range; only a file of 16 bits may hold fewer."""
    dark = np.full((4, 6), 100, np.uint16)
    assert seen(lazily(b"P5 6 4 4095\n" + dark.astype(">u2").tobytes())).max() == round(100 / 4095 * 255)
    assert seen(lazily(packed_tiff(dark, 12))).max() == round(100 / 4095 * 255)
    assert seen(lazily(file_of(Image.fromarray(dark), "jpeg2000"))).max() == 0
    middle = np.full((4, 6), 32768, np.uint16)
    assert seen(lazily(file_of(Image.fromarray(middle), "png"))).max() == 128


def test_colour_of_16_bits_keeps_its_upper_half() -> None:
    """Pillow reads no more of it; a viewer shows no more either."""
    wide = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    assert np.array_equal(seen(lazily(png_of(wide.astype(">u2").tobytes(), 7, 5, 16, 2))), wide >> 8)


def test_what_is_no_number_is_black() -> None:
    values = ramp(65535) / np.float32(65535)
    values[0, 200], values[0, 100], values[1, 100] = np.nan, np.inf, -np.inf
    shown = seen(Image.fromarray(values.astype(np.float32)))
    assert shown[0, 200].max() == 0 and shown[0, 100].min() == 255 and shown[1, 100].max() == 0
    assert np.array_equal(shown[2, :, 0], RAMP)
    assert seen(Image.fromarray(np.full((2, 2), np.nan, np.float32))).max() == 0
    assert seen(Image.fromarray(np.full((2, 2), 1e9, np.float32))).max() == 0  # flat


def test_one_bit_is_black_and_white() -> None:
    bits = PHOTO[..., 0] > 127
    want = bits[..., None] * np.full(3, 255, np.uint8)
    image = Image.fromarray(bits)
    for source in (
        bits,
        bits[..., None],
        image,
        lazily(file_of(image, "png")),
        lazily(file_of(image, "tiff")),
    ):
        assert np.array_equal(seen(source), want)


# -- transparency ----------------------------------------------------------------------------------------


def png_of(
    data: bytes, width: int, height: int, depth: int, colour: int, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG by hand, for the depths that Pillow does not write."""
    lines = len(data) // height
    rows = b"".join(b"\0" + data[i * lines : (i + 1) * lines] for i in range(height))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""),
    ]  # fmt: skip
    pack = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pack)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return colour * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)


ALPHA = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
ALPHA[0], ALPHA[1] = 0, 255
RGBA = np.dstack([PHOTO, ALPHA])
LA = np.dstack([PHOTO[..., 0], ALPHA])

TRANSPARENT: dict[str, tuple[Callable[[], Any], np.ndarray]] = {
    "RGBA png": (lambda: lazily(file_of(Image.fromarray(RGBA), "png")), on_white(PHOTO, ALPHA)),
    "RGBA webp": (lambda: lazily(file_of(Image.fromarray(RGBA), "webp", lossless=True, exact=True)), on_white(PHOTO, ALPHA)),
    "RGBA tiff": (lambda: lazily(file_of(Image.fromarray(RGBA), "tiff")), on_white(PHOTO, ALPHA)),
    "RGBA 16 png": (
        lambda: lazily(png_of((RGBA.astype(np.uint16) * 257).astype(">u2").tobytes(), 17, 13, 16, 6)),
        on_white(PHOTO, ALPHA),
    ),
    "RGBA array": (lambda: RGBA, on_white(PHOTO, ALPHA)),
    "RGBA uint16 array": (lambda: RGBA.astype(np.uint16) * 257, on_white(PHOTO, ALPHA)),
    "RGBA float array": (lambda: RGBA / 255, on_white(PHOTO, ALPHA)),
    "LA png": (lambda: lazily(file_of(Image.fromarray(LA), "png")), on_white(LA[..., [0, 0, 0]], ALPHA)),
    "LA 16 png": (
        lambda: lazily(png_of((LA.astype(np.uint16) * 257).astype(">u2").tobytes(), 17, 13, 16, 4)),
        on_white(LA[..., [0, 0, 0]], ALPHA),
    ),
    "LA array": (lambda: LA, on_white(LA[..., [0, 0, 0]], ALPHA)),
    "La": (lambda: Image.fromarray(LA).convert("La"), on_white(LA[..., [0, 0, 0]], ALPHA)),
    "RGBa": (lambda: Image.fromarray(RGBA).convert("RGBa"), on_white(PHOTO, ALPHA)),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_lies_on_white(name: str) -> None:
    make, want = TRANSPARENT[name]
    shown = seen(make())
    seen_where = (
        ALPHA[..., None] > 8 if name in {"La", "RGBa"} else True
    )  # premultiplied: faint colours are coarse
    assert np.abs((shown - want) * seen_where).max() <= (16 if name in {"La", "RGBa"} else 1.01)
    assert (shown[0] == 255).all()
    if name not in {"La", "RGBa"}:
        assert np.array_equal(shown[1], want[1])


def test_one_transparent_colour_lies_on_white() -> None:
    """PNG's tRNS tells a colour as it is stored, at every depth."""
    grey = np.array([[0, 1, 2, 3]], np.uint8)
    two = png_of(bytes([0b00011011]), 4, 1, 2, 0, (b"tRNS", struct.pack(">H", 2)))
    assert seen(lazily(two))[0, :, 0].tolist() == [0, 85, 255, 255]
    four = png_of(bytes([0x0F, 0x5A]), 4, 1, 4, 0, (b"tRNS", struct.pack(">H", 5)))
    assert seen(lazily(four))[0, :, 0].tolist() == [0, 255, 255, 170]
    read_before = picture.looked_at(four)[0]
    assert read_before is not None and digest(read_before)
    assert seen(read_before)[0, :, 0].tolist() == [0, 255, 255, 170]
    eight = png_of(grey.tobytes(), 4, 1, 8, 0, (b"tRNS", struct.pack(">H", 1)))
    assert seen(lazily(eight))[0, :, 0].tolist() == [0, 255, 2, 3]
    one = png_of(bytes([0b01000000]), 4, 1, 1, 0, (b"tRNS", struct.pack(">H", 0)))
    assert seen(lazily(one)).min() == 255
    wide = np.array([[0, 300, 30000, 65535]], ">u2")
    sixteen = png_of(wide.tobytes(), 4, 1, 16, 0, (b"tRNS", struct.pack(">H", 300)))
    assert seen(lazily(sixteen))[0, :, 0].tolist() == [0, 255, 117, 255]
    rgb = np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)
    colour = png_of(rgb.tobytes(), 2, 1, 8, 2, (b"tRNS", struct.pack(">HHH", 9, 9, 9)))
    assert seen(lazily(colour))[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    deep = (rgb.astype(np.uint16) * 257).astype(">u2")
    colour = png_of(deep.tobytes(), 2, 1, 16, 2, (b"tRNS", struct.pack(">HHH", 2313, 2313, 2313)))
    assert seen(lazily(colour))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_palettes_with_transparency_lie_on_white() -> None:
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 3]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    colours = [[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]]
    white = [255, 255, 255]
    assert seen(image)[0].tolist() == colours
    for kind in ("png", "gif"):
        found = seen(lazily(file_of(image, kind, transparency=2)))[0].tolist()
        assert found == [*colours[:2], white, colours[3]]
    half = seen(lazily(file_of(image, "png", transparency=bytes([255, 0, 128]))))[0].tolist()
    assert half[:2] == [colours[0], white] and half[3] == colours[3]
    assert np.abs(np.subtract(half[2], [162, 167, 172])).max() <= 1
    image.putpalette([10, 20, 30, 255, 40, 50, 60, 0, 70, 80, 90, 255, 100, 110, 120, 0], "RGBA")
    assert seen(image)[0].tolist() == [colours[0], white, colours[2], white]
    assert seen(image.convert("RGBA").convert("PA"))[0].tolist()[1] == white


# -- colours ---------------------------------------------------------------------------------------------


def test_other_colours_become_rgb() -> None:
    smooth = Image.fromarray(np.stack([ramp(255, np.uint8)[:, ::16]] * 3, -1)).resize((32, 32))
    for mode, kind in (
        ("CMYK", "jpeg"),
        ("CMYK", "tiff"),
        ("YCbCr", "jpeg"),
        ("L", "jpeg"),
        ("YCbCr", "tiff"),
    ):
        raw = file_of(smooth.convert(mode), kind)
        assert np.abs(seen(lazily(raw)).astype(int) - np.asarray(smooth)).max() <= 6, (mode, kind)
    assert np.abs(seen(smooth.convert("HSV")).astype(int) - np.asarray(smooth)).max() <= 2
    red = Image.new("RGB", (4, 4), (200, 30, 60))
    lab = ImageCms.profileToProfile(
        red, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab is not None
    for source in (lab, lazily(file_of(lab, "tiff"))):
        assert np.abs(seen(source).astype(int) - [200, 30, 60]).max() <= 3


@pytest.mark.parametrize(
    "mode", sorted({*Image.MODES, "I;16", "I;16B", "I;16L", "I;16N", "La", "RGBa", "PA", "LAB", "HSV"})
)
def test_every_mode_of_pillow_is_opened(mode: str) -> None:
    assert seen(Image.new(mode, (5, 4))).shape == (4, 5, 3)


# -- animations ------------------------------------------------------------------------------------------

FRAMES = [Image.fromarray(np.full((6, 8, 3), shade, np.uint8)) for shade in (10, 120, 240)]


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", *AVIF])
def test_an_animation_shows_its_first_frame_and_the_doctor_says_so(kind: str, tmp_path: Path) -> None:
    how = {"lossless": True} if kind == "webp" else {}
    raw = file_of(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:], **how)
    path = tmp_path / f"moves.{kind}"
    path.write_bytes(raw)
    for source in (path, lazily(raw)):
        assert np.abs(seen(source).astype(int) - 10).max() <= 3
        assert picture.frames(source) == 3
        assert np.abs(seen(source).astype(int) - 10).max() <= 3  # counting moved nothing
        example = Example("m", (Message("user", "What?", 1), Message("assistant", "grey")), (source,))
        found = [f for f in diagnose([Task("t", [example], [example], score("exact"))]) if f.field == "image"]
        notes = [f for f in found if "first frame" in f.message]
        assert len(notes) == 2 and {(f.level, f.row, f.id) for f in notes} == {("warning", 1, "m")}
        assert ": 3 " in notes[0].message


def test_a_still_picture_has_no_note(tmp_path: Path) -> None:
    for kind in ("gif", "png", "jpeg", "webp", "tiff", "bmp"):
        assert picture.frames(lazily(file_of(FRAMES[0], kind))) == 1
    assert picture.frames(lazily(file_of(FRAMES[0], "mpo", save_all=True, append_images=FRAMES[1:]))) == 1
    assert (
        picture.frames(PHOTO)
        == picture.frames(Image.fromarray(PHOTO))
        == picture.frames(tmp_path / "gone")
        == 1
    )


# -- arrays and Pillow images ----------------------------------------------------------------------------


def test_arrays_are_opened_by_shape_and_kind() -> None:
    grey = PHOTO[..., 0]
    for same in (grey, grey[..., None], np.repeat(grey[..., None], 3, 2)):
        assert np.array_equal(seen(same), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(seen(PHOTO), PHOTO) and np.array_equal(seen(PHOTO[::2, ::-1]), PHOTO[::2, ::-1])
    assert np.array_equal(seen(PHOTO / 255), PHOTO) and np.array_equal(seen(PHOTO.astype(np.float32)), PHOTO)
    assert np.array_equal(seen(PHOTO.astype(np.uint16) * 257), PHOTO)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (np.zeros((3, 9, 9), np.uint8), r"H x W x 1 to 4 channels.*not uint8 of shape \(3, 9, 9\)"),
        (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
        (np.zeros((4,), np.uint8), r"\(4,\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\)"),
        (np.zeros((0, 4), np.uint8), r"\(0, 4\)"),
        (np.zeros((4, 4, 0), np.uint8), r"\(4, 4, 0\)"),
        (np.zeros((4, 4), np.int64), "uint8, uint16, bool or float is needed, not int64"),
        (np.zeros((4, 4), np.int8), "not int8"),
        (np.zeros((4, 4), np.uint32), "not uint32"),
        (np.zeros((4, 4), complex), "not complex128"),
        (np.zeros((4, 4), object), "not object"),
        (np.full((4, 4), "x"), "not <U1"),
        (np.full((4, 4), -0.5), r"0..1 or in 0..255, and these are from -0.5 to -0.5"),
        (np.full((4, 4), 300.0), "to 300"),
        (np.full((4, 4), np.nan), "nan"),
        ("a.png", "not str"),
        (None, "not NoneType"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_shape_and_kind(source: Any, said: str) -> None:
    with pytest.raises(RetainError, match=rf"row 1: cannot read image .*{said}"):
        picture.opened(source, "row 1")


def test_the_callers_own_image_is_left_as_it_was() -> None:
    for image in (Image.fromarray(PHOTO), Image.fromarray(RGBA), Image.fromarray(PHOTO).quantize(8)):
        before, mine = digest(image), picture.opened(image, "x")
        mine.paste("red", (0, 0, 17, 13))
        assert digest(image) == before


# -- one opening for all ---------------------------------------------------------------------------------


def photographs() -> dict[str, ImageSource]:
    """One of each kind that looked different to different readers."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "turned": lazily(file_of(Image.fromarray(ODD), "png", exif=exif)),
        "16 bits": lazily(file_of(Image.fromarray(ramp(65535)), "png")),
        "alpha": lazily(file_of(Image.fromarray(RGBA), "png")),
        "array": ramp(65535) / 65535,
    }


@pytest.mark.parametrize("name", photographs())
def test_doctor_training_state_and_thumbnail_see_the_same(name: str, tmp_path: Path) -> None:
    source = photographs()[name]
    want = seen(source)
    example = Example("e", (Message("user", "What?", 1), Message("assistant", "x")), (source,))
    twin = Example("f", (Message("user", "What?", 1), Message("assistant", "x")), (want,))
    assert np.array_equal(np.asarray(open_image(source, "e")), want)
    found = diagnose([Task("t", [example, twin], [example], score("exact"))])
    assert any("the same images and question as row 1" in f.message for f in found)  # one hash of the pixels
    encode = tiny.model().encode
    assert encode(example).images[0].key == encode(twin).images[0].key
    save_state(tmp_path / "state", [example])
    kept: Example = load_state(tmp_path / "state", "cpu")[0]
    assert np.array_equal(seen(kept.images[0]), want)
    run = RunDir.open(tmp_path / "run", {})
    thumbnail = run.sample("t", example)
    assert thumbnail is not None
    small = Image.fromarray(want)
    small.thumbnail((160, 160))
    assert np.array_equal(np.asarray(Image.open(run.path / thumbnail)), np.asarray(small))


@pytest.mark.parametrize("kind", ["uint16", ">u2", "bool", "float16", "float64"])
def test_arrays_of_every_kind_are_saved_with_a_state(kind: str, tmp_path: Path) -> None:
    pixels = (
        (ramp(65535) / 65535 > 0.5)
        if kind == "bool"
        else (ramp(255) / 255 if "float" in kind else ramp(65535))
    )
    example = Example("e", (Message("user", "What?", 1), Message("assistant", "x")), (pixels.astype(kind),))
    save_state(tmp_path / "state", [example])
    assert np.array_equal(seen(load_state(tmp_path / "state", "cpu")[0].images[0]), seen(pixels.astype(kind)))


def test_nobody_else_opens_a_picture() -> None:
    """The embedded stream reads its own sheets, and one script drew them."""
    package, own = (
        Path(retain.__file__).parent,
        {"data/picture.py", "pocket/pictures.py", "pocket/build_assets.py"},
    )
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).as_posix() in own:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in {"fromarray", "frombytes", "exif_transpose"}, path
                assert not (node.attr == "open" and ast.unparse(node.value) in {"Image", "PILImage"}), path
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "convert"
            ):
                raise AssertionError(f"{path}:{node.lineno} converts a picture on its own")


def test_a_digest_tells_pictures_apart_that_look_different() -> None:
    """The same stored pixels with another palette, transparent colour or orientation are another picture."""
    image = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 3]))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    other = image.copy()
    other.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 121])
    clear = image.copy()
    clear.info["transparency"] = 2
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = lazily(file_of(Image.fromarray(ODD), "png", exif=exif))
    upright = lazily(file_of(Image.fromarray(ODD), "png"))
    found = [digest(i) for i in (image, other, clear, turned, upright)]
    assert len(set(found)) == 5
    assert digest(image.copy()) == found[0] and digest(upright) == digest(Image.fromarray(ODD))


# -- what is broken --------------------------------------------------------------------------------------


def test_every_class_of_exception_becomes_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the header and, lazily, at the pixels."""
    path = tmp_path / "a.png"
    path.write_bytes(file_of(Image.fromarray(ODD), "png"))
    (tmp_path / "d.json").write_text('[{"image": "a.png", "text": "What?", "answer": "x"}]')
    errors = [
        struct.error("unpack"), EOFError("no more"), SyntaxError("broken"), OverflowError("big"), ValueError(),
        zlib.error("z"), MemoryError(), Image.DecompressionBombError("bomb"), OSError("two\nlines"), IndexError(),
        KeyError("k"), SystemError("tile"), TypeError("t"), RecursionError("r"), AttributeError("a"),
        ZeroDivisionError(), NotImplementedError(), RuntimeError("r"), AssertionError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), PermissionError(13, "Permission denied"),
    ]  # fmt: skip
    for error in errors:

        def fail(*args: Any, error: Exception = error, **more: Any) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr("PIL.ImageFile.ImageFile.load", fail)
            with pytest.raises(RetainError) as raised:
                open_image(path, "example 'e7'")
            assert (
                "'e7'" in str(raised.value)
                and str(path) in str(raised.value)
                and "\n" not in str(raised.value)
            )
            with pytest.raises(RetainError, match=r"'e7'.*9 x 6"):
                open_image(lazily(path.read_bytes()), "example 'e7'")
            example = Example("e7", (Message("user", "What?", 1), Message("assistant", "x")), (path,))
            found = [f for f in diagnose([Task("t", [], [example], score("exact"))]) if f.field == "image"]
            assert [(f.level, f.row) for f in found] == [("error", 1)] and "a.png" in found[0].message
        with monkeypatch.context() as patched:
            patched.setattr(Image, "open", fail)
            patched.setattr(read, "glanced", lambda *args: None)
            with pytest.raises(RetainError, match=r"d\.json, row 1, field 'image': 'a\.png': "):
                read.examples(tmp_path / "d.json")


def test_what_is_no_picture_is_refused_at_its_header(tmp_path: Path) -> None:
    eps = file_of(Image.fromarray(ODD), "eps")  # Pillow would start Ghostscript on it
    for name, raw, said in (
        ("a.png", eps, "not an image .corrupt, or another kind of file, such as EPS"),
        ("b.png", b"<svg/>", "not an image"),
        ("c.png", b"", "not an image"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(RetainError, match=said):
            picture.opened(tmp_path / name, "x")
        assert re.search(said, picture.looked_at(raw)[1])
    with pytest.raises(RetainError, match=r"gone\.png: no such file"):
        picture.opened(tmp_path / "gone.png", "x")
    (tmp_path / "d.json").write_text(f'[{{"image": "{"x" * 300}.png", "text": "What?", "answer": "x"}}]')
    with pytest.raises(RetainError, match=r"row 1.*File name too long"):
        read.examples(tmp_path / "d.json")


@pytest.mark.parametrize("name", ["png", "gif", "bmp", "tiff", "jpeg", "webp"])
def test_a_bomb_is_refused_before_it_goes_off(name: str) -> None:
    """A header that promises 65,000 x 65,000 pixels, or as many as the format can say."""
    raw = bytearray(file_of(Image.fromarray(ODD), name))
    if name == "tiff":
        raw = bytearray(
            packed_tiff(np.zeros((2, 2), np.uint16), 16).replace(
                struct.pack("<HHII", 256, 4, 1, 2), struct.pack("<HHII", 256, 4, 1, 2**31 - 1)
            )
        )
    elif name == "jpeg":
        at = raw.index(b"\xff\xc0") + 5
        raw[at : at + 4] = struct.pack(">HH", 65000, 65000)
    elif name == "webp":
        at = raw.index(b"VP8 ") + 14
        raw[at : at + 4] = struct.pack("<HH", 16383, 16383)
    else:
        at, how = {"png": (16, ">II"), "gif": (6, "<HH"), "bmp": (18, "<ii")}[name]
        raw[at : at + struct.calcsize(how)] = struct.pack(how, 65000, 65000)
        if name == "png":
            raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    wrong = picture.looked_at(bytes(raw))[1]
    assert wrong.startswith("too large") or "pixels; at most 90,000,000" in wrong or name == "webp"
    image = None if wrong else lazily(bytes(raw))
    assert image is None or picture.tried(image)[0] is None


def test_pillows_warnings_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Made errors by the caller, they would refuse a picture that is shown; printed, they would fill the screen."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)  # Pillow warns above, and refuses above twice as many
    path = tmp_path / "a.png"
    path.write_bytes(file_of(Image.fromarray(PHOTO), "png"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(seen(path), PHOTO)
        image, wrong = picture.looked_at(path)
        assert image is not None and wrong == "" and picture.frames(path) == 1
        image.close()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert picture.looked_at(path)[1].startswith("too large: ")
    assert picture.tried(path)[1].startswith("too large: ")


def spoiled(raw: bytes, rng: random.Random) -> bytes:
    """Cut off, or a few bytes of it changed, most of them near the front where the structure is."""
    data = bytearray(raw)
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.choice([0, 1, 1, 2, 8]) if data else 0):
        near = min(64, len(data)) if rng.random() < 0.5 else len(data)
        data[rng.randrange(near)] = rng.choice([0, 255, 0x7F, 0x80, rng.randrange(256)])
    return bytes(data)


def whole_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb, rgba, bits = Image.fromarray(PHOTO), Image.fromarray(RGBA), Image.fromarray(PHOTO[..., 0] > 127)
    few, wide = rgb.quantize(16), Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257)
    moving = {"save_all": True, "append_images": [Image.fromarray(255 - PHOTO)]}
    return {
        "png": file_of(rgb, "png", exif=exif),
        "png 16": file_of(wide, "png"),
        "png palette": file_of(few, "png", transparency=3),
        "apng": file_of(rgb, "png", **moving),
        "jpeg": file_of(rgb, "jpeg", exif=exif),
        "jpeg progressive": file_of(rgb, "jpeg", progressive=True),
        "jpeg cmyk": file_of(rgb.convert("CMYK"), "jpeg"),
        "webp": file_of(rgb, "webp", exif=exif),
        "webp lossless": file_of(rgba, "webp", lossless=True),
        "webp moving": file_of(rgb, "webp", **moving),
        "gif": file_of(few, "gif", **moving),
        "bmp": file_of(rgb, "bmp"),
        "bmp palette": file_of(few, "bmp"),
        "tiff": file_of(rgb, "tiff", exif=exif),
        "tiff pages": file_of(rgb, "tiff", **moving),
        "tiff 16": file_of(wide, "tiff"),
        "tiff lzw": file_of(rgba, "tiff", compression="tiff_lzw"),
        "tiff jpeg": file_of(rgb, "tiff", compression="jpeg"),
        "tiff fax": file_of(bits, "tiff", compression="group4"),
        "ppm": file_of(rgb, "ppm"),
        "jpeg 2000": file_of(rgb, "jpeg2000"),
        "tga": file_of(rgba, "tga", compression="tga_rle"),
    }


@pytest.mark.parametrize("name", whole_files())
def test_spoiled_files_are_pictures_or_one_sentence(name: str, tmp_path: Path) -> None:
    """No other exception, no hanging, no warning on the screen; a second attempt ends as the first did."""
    raw, rng, path = whole_files()[name], random.Random(name), tmp_path / "spoiled"
    assert picture.tried(lazily(raw))[1] == ""
    broken, began = 0, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            data = spoiled(raw, rng)
            path.write_bytes(data)
            first, wrong = picture.tried(path)
            image, at_header = picture.looked_at(data)
            assert (first is None) == bool(wrong) and "\n" not in wrong + at_header
            if image is not None:
                assert picture.frames(image) >= 1
                again, once_more = picture.tried(image), picture.tried(image)
                assert (again[0] is None) == (once_more[0] is None) == (first is None)
            assert picture.frames(path) >= 1
            broken += first is None
    assert broken > 0
    assert time.process_time() - began < CPU, "limits.CPU: one of 40 small files hung"


CUT = "cannot be decoded (OSError: image file is truncated"


def cut_shop(folder: Path, parquet: bool) -> Path:
    """A recipe whose third row has an image with a whole header and half its pixels."""
    recipe = own_data.shop(folder, own_data.model_dir(folder / "model"))
    rows = json.loads((folder / "colour_train.json").read_text())
    for i, row in enumerate(rows):
        path = folder / "images" / row["image"]
        raw = path.read_bytes()[: -30 if i == 2 else None]
        path.write_bytes(raw)
        question, answer = (turn["value"] for turn in row["conversations"])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows[i] = {"id": row["id"], "images": [{"bytes": raw, "path": None}], "messages": turns}
    if parquet:
        arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        writer.write_table(arrow.Table.from_pylist(rows), folder / "colour_train.parquet")
        recipe.write_text(recipe.read_text().replace("colour_train.json", "colour_train.parquet"))
    return recipe


@pytest.mark.parametrize("parquet", [False, True])
def test_half_a_picture_is_named_by_doctor_and_run(parquet: bool, tmp_path: Path) -> None:
    """With row and file; nothing is trained or written."""
    recipe = cut_shop(tmp_path, parquet)
    told = CliRunner().invoke(app, ["doctor", str(recipe)])
    assert told.exit_code == 1 and "colour-train-2" in told.output and CUT in " ".join(told.output.split())
    stopped = CliRunner().invoke(app, ["run", str(recipe)])
    file = "colour_train.parquet, row 3, field 'images[0]'" if parquet else "images/colour_train_2.png"
    assert stopped.exit_code == 2 and stopped.stderr.count("error:") == 1
    for words in (
        "task 'colour', train, row 3: example 'colour-train-2' (",
        "row 3): cannot read image",
        file,
        CUT,
    ):
        assert words in stopped.stderr
    assert not (tmp_path / "run").exists()


def test_a_broken_image_has_no_digest() -> None:
    """It fails now and again: Pillow itself shows a black rest the second time."""
    raw = file_of(Image.fromarray(PHOTO), "png")
    image, wrong = picture.looked_at(raw[: len(raw) // 2])
    assert image is not None and wrong == ""
    example = Example("p", (Message("user", "What?", 1), Message("assistant", "x")), (image,))
    for _ in range(2):
        with pytest.raises(RetainError, match=r"^example 'p': cannot read an image of 17 x 13 pixels: "):
            digest(example)
    with pytest.raises(
        RetainError, match=r"^example 'p': cannot read image \(a Pillow image, PNG, 17 x 13\)"
    ):
        open_image(image, "example 'p'")


def test_what_passed_a_larger_limit_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stream.max_pixels` is asked at the header; doctor and training follow."""
    monkeypatch.setattr(picture, "_allowed", {100})
    (tmp_path / "a.png").write_bytes(file_of(Image.fromarray(PHOTO), "png"))
    with pytest.raises(
        RetainError, match=r"a\.png: 17 x 13 = 221 pixels; at most 100 are taken \(max_pixels\)"
    ):
        picture.opened(tmp_path / "a.png", "x")
    assert picture.looked_at(tmp_path / "a.png", 220)[0] is None
    assert picture.looked_at(tmp_path / "a.png", 221)[0] is not None
    assert picture.opened(tmp_path / "a.png", "x").size == (17, 13)


@pytest.mark.parametrize("how", ["pipe", "device", "folder", "socket", "loop"])
def test_what_is_no_file_is_not_waited_for(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.png"
    with socket.socket(socket.AF_UNIX) as end:
        make: dict[str, Callable[[], Any]] = {
            "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir,
            "socket": lambda: end.bind("a.png"), "loop": lambda: path.symlink_to(path),
        }  # fmt: skip
        make[how]()
        with pytest.raises(RetainError, match=r"a\.png: (no such file|Too many levels)"):
            picture.opened(path, "x")
        assert picture.looked_at(path)[0] is None and picture.frames(path) == 1
        (tmp_path / "d.json").write_text('[{"image": "a.png", "text": "What?", "answer": "x"}]')
        with pytest.raises(RetainError, match="row 1, field 'image'"):
            read.examples(tmp_path / "d.json")


def test_no_format_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file is called: an EPS starts no Ghostscript, also where the user has opened it with Pillow himself."""
    import subprocess

    started: list[Any] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
    raw = file_of(Image.fromarray(ODD), "eps")
    (tmp_path / "a.png").write_bytes(raw)
    for source in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        assert picture.tried(source)[0] is None
    assert picture.looked_at(raw)[0] is None and not started


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "ICO"])
def test_ordinary_formats_are_taken(name: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, name)
    image, wrong = picture.looked_at(buffer.getvalue())
    assert wrong == "" and image is not None and picture.opened(image, "x").mode == "RGB"
