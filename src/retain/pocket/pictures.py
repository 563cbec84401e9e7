"""Draws small pictures from the shipped sources: garments, digits, words, shapes, icons, charts, photographs.

Everything is numpy and Pillow's PNG reader, integer or rounded arithmetic, and a generator that the caller
owns, so that a picture has the same bytes on every machine. A canvas is (40, 40, 3) uint8. Where the sources
come from is in `assets/NOTICE.md`; `build_assets.py` made them. Parts keep sources apart: `base` is what the
pocket model was trained on, `train`, `valid` and `test` belong to the stream.
"""

# N images, H height, W width

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
SIZE = 40
"""Side of a canvas in pixels."""
GRID = 8
"""Pitch on which things are placed."""
CELL = 4
"""Side of a coarse box cell: coordinates run over 0..10."""

Part = Literal["base", "train", "valid", "test"]
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, the last two exclusive."""

COLOURS: dict[str, Colour] = {
    "red": (216, 38, 32), "green": (30, 150, 50), "blue": (40, 70, 220), "yellow": (238, 205, 30),
    "purple": (140, 45, 165), "orange": (245, 130, 20), "black": (20, 20, 24),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DISTORTIONS = ("blur", "noise", "blocks", "dark", "pixels", "fog")
PLACES = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Sheet:
    """Equal cells cut from one PNG, with their labels."""

    cells: np.ndarray  # (N, H, W) or (N, H, W, C)
    labels: dict[str, Any]


@cache
def sheet(name: str) -> Sheet:
    """One of garments, digits, icons, photos, glyphs; read once per process."""
    labels = json.loads((ASSETS / f"{name}.json").read_text())
    pixels = np.asarray(Image.open(ASSETS / f"{name}.png"))
    h, w, columns = labels["height"], labels["width"], labels["columns"]
    cells = pixels.reshape(pixels.shape[0] // h, h, columns, w, *pixels.shape[2:]).swapaxes(1, 2)
    return Sheet(cells.reshape(-1, h, w, *pixels.shape[2:])[: labels["count"]], labels)


@cache
def pool(name: str, part: Part) -> np.ndarray:
    """Rows of a sheet that belong to a part. No source image of `base` is used by the stream.

    Garments and digits are cut by image. Between base and stream, icons are cut by icon, fonts by font and
    photographs by photograph; within the stream, photographs are cut by crop.
    """
    labels = sheet(name).labels
    rows = np.arange(labels["count"])
    if name == "glyphs":
        owner = np.array([p == "base" for p in labels["parts"]])
        fonts = np.flatnonzero(owner == (part == "base"))
        return fonts
    if name == "icons":
        base = rows % 3 != 2
    elif name == "photos":
        base = np.array([labels["parts"][s] == "base" for s in labels["source"]])
    else:  # garments come interleaved by class, digits in the order they were collected
        base = rows < labels["count"] * (0.65 if name == "garments" else 0.6)
    if part == "base":
        return np.asarray(rows[base])
    mine = rows[~base]
    if name == "icons":
        return np.asarray(mine)
    turn = (np.arange(len(mine)) // 10 if name == "garments" else np.arange(len(mine))) % 10
    return np.asarray(mine[{"train": turn < 6, "valid": turn == 6, "test": turn > 6}[part]])


# ---- canvases


def paper(rng: Generator, low: int = 200, high: int = 256) -> np.ndarray:
    """A blank canvas of a pale random colour."""
    return np.broadcast_to(rng.integers(low, high, 3, dtype=np.uint8), (SIZE, SIZE, 3)).copy()


def stretch(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear resize in integers, (H, W[, C]) uint8."""
    ys = _axis(image.shape[0], height)
    xs = _axis(image.shape[1], width)
    rows = _blend(image.astype(np.int32), *ys, axis=0)
    return _blend(rows, *xs, axis=1).astype(np.uint8)


@cache
def _axis(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    at = np.clip(((2 * np.arange(new) + 1) * old * 64) // new - 64, 0, (old - 1) * 128)
    low = at // 128
    return low, np.minimum(low + 1, old - 1), (at % 128).astype(np.int32)


def _blend(x: np.ndarray, low: np.ndarray, high: np.ndarray, part: np.ndarray, axis: int) -> np.ndarray:
    shape = [1] * x.ndim
    shape[axis] = -1
    part = part.reshape(shape)
    mixed: np.ndarray = (x.take(low, axis) * (128 - part) + x.take(high, axis) * part + 64) >> 7
    return mixed


def paint(canvas: np.ndarray, mask: np.ndarray, colour: Colour | np.ndarray, x: int, y: int) -> Box:
    """Lay a colour (or pixels) on the canvas through a mask of 0..255; returns the box of the mask's cell."""
    h, w = mask.shape
    spot = canvas[y : y + h, x : x + w]
    alpha = mask.astype(np.int32)[..., None]
    spot[:] = (spot * (255 - alpha) + np.asarray(colour, np.int32) * alpha + 127) // 255
    return x, y, x + w, y + h


def coarse(box: Box) -> tuple[int, int, int, int]:
    """A pixel box on the 10 x 10 grid: first corner rounded down; the second, exclusive, rounded up."""
    return box[0] // CELL, box[1] // CELL, -(-box[2] // CELL), -(-box[3] // CELL)


# ---- garments, digits


def garment(canvas: np.ndarray, row: int, x: int, y: int, size: int, tint: Colour | None = None) -> Box:
    """A garment of the sheet, its brightness as ink: dark on the paper, or tinted."""
    image = stretch(sheet("garments").cells[row], size, size)
    shade = (255 - image.astype(np.int32))[..., None]
    ink = np.asarray(tint if tint else (30, 30, 40), np.int32)
    pixels = (ink * (160 + shade * 95 // 255) + shade * 40) // 300
    mask = np.minimum(image.astype(np.int32) * 3, 255)
    return paint(canvas, mask, np.minimum(pixels, 255), x, y)


def digit(canvas: np.ndarray, row: int, x: int, y: int, size: int, ink: Colour = (20, 20, 30)) -> Box:
    """A handwritten digit of the sheet, enlarged."""
    return paint(canvas, stretch(sheet("digits").cells[row], size, size), ink, x, y)


# ---- words


@cache
def letter_mask(char: str, font: int) -> np.ndarray:
    """One letter in a cell of 16 x 8, squeezed where its font draws it wider; capitals are 8 pixels high."""
    labels = sheet("glyphs").labels
    row = 2 * font * len(labels["chars"]) + labels["chars"].index(char)
    wide = labels["advance"][row] - 1
    cell = sheet("glyphs").cells[row][:, 1:wide]
    if cell.shape[1] > 8:
        return stretch(cell, 16, 8)
    left = (8 - cell.shape[1]) // 2
    return np.pad(cell, ((0, 0), (left, 8 - cell.shape[1] - left)))


def word(canvas: np.ndarray, text: str, font: int, rng: Generator, ink: Colour = (20, 20, 30)) -> list[Box]:
    """A printed word of at most five letters, eight pixels each; the boxes of its letters."""
    x = GRID * int(rng.integers(0, SIZE // GRID - len(text) + 1))
    y = GRID * int(rng.integers(0, 4))
    return [paint(canvas, letter_mask(c, font), ink, x + GRID * i, y) for i, c in enumerate(text)]


# ---- shapes


@cache
def shape_mask(kind: str, size: int) -> np.ndarray:
    """A filled shape in a square of that side, 0 or 255."""
    at = 2 * np.arange(size) + 1 - size
    x, y = at[None, :], at[:, None]
    r2 = x * x + y * y
    inside = {
        "circle": r2 <= size * size,
        "ring": (r2 <= size * size) & (r2 >= size * size // 4),
        "square": np.ones((size, size), bool),
        "triangle": 2 * abs(x) <= y + size,
        "cross": (abs(x) <= size // 3) | (abs(y) <= size // 3),
    }[kind]
    return (inside * 255).astype(np.uint8)


@dataclass(frozen=True)
class Thing:
    """A shape on a canvas: what it is and where."""

    kind: str
    colour: str
    box: Box

    @property
    def centre(self) -> tuple[int, int]:
        """Twice the centre in pixels: x and y."""
        return self.box[0] + self.box[2], self.box[1] + self.box[3]

    @property
    def place(self) -> str:
        """One of PLACES."""
        x, y = self.centre
        return f"{'top' if y < SIZE else 'bottom'} {'left' if x < SIZE else 'right'}"


def snap(rng: Generator, size: int) -> tuple[int, int]:
    """A place for a square of that side: whole cells of the grid, with the play that is left inside them.

    Pictures keep to a grid of eight pixels, the patches of the pocket's tower: a small one, trained as
    briefly, does not learn to recognise things at every offset.
    """
    cells = -(-size // GRID)
    spot = rng.integers(0, SIZE // GRID - cells + 1, 2) * GRID + rng.integers(0, cells * GRID - size + 1, 2)
    return int(spot[0]), int(spot[1])


def scatter(rng: Generator, sizes: list[int], tries: int = 60) -> list[Box] | None:
    """Boxes of these sides in cells of their own; None where no room was found."""
    boxes: list[Box] = []
    taken: set[tuple[int, int]] = set()
    for size in sizes:
        for _ in range(tries):
            x, y = snap(rng, size)
            cells = {(i // GRID, j // GRID) for i in range(x, x + size) for j in range(y, y + size)}
            if not cells & taken:
                boxes.append((x, y, x + size, y + size))
                taken |= cells
                break
        else:
            return None
    return boxes


def shapes(rng: Generator, looks: list[tuple[str, str]]) -> tuple[np.ndarray, list[Thing]]:
    """Shapes of the given (colour, kind), each 7, 8 or 15 pixels wide, scattered on pale paper."""
    boxes = None
    while boxes is None:
        boxes = scatter(rng, [int(s) for s in rng.choice([7, 8, 8, 15], len(looks))])
    canvas = paper(rng)
    things = [Thing(kind, colour, box) for (colour, kind), box in zip(looks, boxes, strict=True)]
    for thing in things:
        paint(
            canvas, shape_mask(thing.kind, thing.box[2] - thing.box[0]), COLOURS[thing.colour], *thing.box[:2]
        )
    return canvas, things


# ---- icons, charts


def icon(canvas: np.ndarray, row: int, x: int, y: int, size: int = 20) -> Box:
    """An icon of the sheet with its transparency."""
    image = sheet("icons").cells[row]
    if size != image.shape[0]:
        image = stretch(image, size, size)
    return paint(canvas, image[..., 3], image[..., :3], x, y)


def bars(rng: Generator, colours: list[str], values: list[int]) -> tuple[np.ndarray, list[Box]]:
    """A bar chart, four pixels per unit, one bar per colour from left to right; and where the bars are."""
    canvas = paper(rng, 225)
    left = GRID * int(rng.integers(0, SIZE // GRID - len(colours) + 1))
    width = int(rng.integers(6, 9))
    for i, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x = left + GRID * i
        canvas[SIZE - 4 * value :, x : x + width] = COLOURS[colour]
    return canvas, [
        (left + GRID * i, SIZE - 4 * v, left + GRID * i + GRID, SIZE) for i, v in enumerate(values)
    ]


# ---- photographs


def photo(row: int, rng: Generator | None = None) -> np.ndarray:
    """A crop; with a generator it may be mirrored."""
    pixels = sheet("photos").cells[row]
    return np.asarray((pixels[:, ::-1] if rng is not None and rng.integers(2) else pixels).copy())


def distort(pixels: np.ndarray, kind: str, degree: int, rng: Generator) -> np.ndarray:
    """A photograph made worse: kind is one of DISTORTIONS, degree is 1, 2 or 3."""
    x = pixels.astype(np.int32)
    if kind == "blur":
        for _ in range((2, 5, 10)[degree - 1]):
            x = _smooth(_smooth(x, 0), 1)
    elif kind == "noise":
        x = x + rng.integers(-128, 128, x.shape, dtype=np.int32) * (30, 60, 110)[degree - 1] // 100
    elif (
        kind == "blocks"
    ):  # a JPEG-like block transform: each block keeps its mean and a faint, coarse remainder
        step = (24, 44, 80)[degree - 1]
        mean = _pool(x, 8)
        x = mean + (x - mean) // step * step // 2
    elif kind == "dark":
        x = x * (50, 30, 15)[degree - 1] // 100
    elif kind == "pixels":
        x = _pool(x, (2, 4, 5)[degree - 1])
    elif kind == "fog":
        x = 235 + (x - 235) * (50, 30, 16)[degree - 1] // 100
    else:
        raise ValueError(f"distortion {kind!r} is none of {DISTORTIONS}")
    return np.clip(x, 0, 255).astype(np.uint8)


def _smooth(x: np.ndarray, axis: int) -> np.ndarray:
    padded = np.concatenate([x.take([0], axis), x, x.take([-1], axis)], axis)
    n = x.shape[axis]
    left, right = padded.take(range(n), axis), padded.take(range(2, n + 2), axis)
    mixed: np.ndarray = (left + 2 * x + right + 2) >> 2
    return mixed


def _pool(x: np.ndarray, side: int) -> np.ndarray:
    n = SIZE // side
    mean = x.reshape(n, side, n, side, 3).sum((1, 3)) // (side * side)
    blocks: np.ndarray = mean.repeat(side, 0).repeat(side, 1)
    return blocks
