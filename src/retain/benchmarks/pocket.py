"""The pocket stream: eight small visual instruction tasks, drawn from a seed, for the shipped pocket model.

Made here in the manner of CoIN (Chen et al., NeurIPS 2024, arXiv:2403.08350) and UCIT (Guo et al., ACL 2025,
arXiv:2503.12941): one perception domain and one question a task, some tasks sharing an answer-format line.
What is asked of a picture is new to the base model: it knows a sneaker, but not on which shelf this shop puts
sneakers. Images come from sources that the base never saw (see `retain.data.pictures.pool`); train, valid and
test share no image. `docs/pocket.md` is the card, with measured figures.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from retain.data import pictures as pic
from retain.metrics.scores import score
from retain.stream import Stream, Task
from retain.types import Example, Message, RetainError

ORDER = ("charts", "icons", "garments", "counting", "boxes", "digits", "distortion", "captions")
"""Default order of the tasks."""

ONE_WORD = "Answer with one word."
NUMBER = "Answer with a number."
LETTER = "Answer with the option letter."
BOX = "Answer with a box."

SHELF = {
    "tee": "tops", "shirt": "tops", "pullover": "knits", "coat": "knits", "dress": "gowns", "trouser": "legs",
    "sandal": "summer", "sneaker": "sport", "boot": "winter", "bag": "travel",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "up": "down", "big": "small", "day": "night", "old": "new", "fast": "slow",
    "open": "shut", "good": "bad", "wet": "dry", "in": "out", "hard": "soft", "on": "off",
}  # fmt: skip
OPPOSITE = {**_OPPOSITES, **{b: a for a, b in _OPPOSITES.items()}}
REMEDY = {
    "blur": "glasses", "noise": "broom", "blocks": "hammer", "dark": "lamp", "pixels": "scissors",
    "fog": "wind", "nothing": "none",
}  # fmt: skip
ICONS_A_PLACE = 3
INKS = ("red", "green", "blue", "yellow")
PLACE = {
    "animal": "farm", "food": "kitchen", "clothes": "wardrobe", "vehicle": "road", "tool": "garage",
    "music": "stage", "sport": "stadium", "weather": "sky", "home": "room", "plant": "garden",
}  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """One picture with its question, reference and what the scorer needs."""

    image: np.ndarray
    question: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)


def _one(rng: Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


# ---- tasks


def garments(rng: Generator, part: pic.Part) -> Draw:
    """A garment; the shop's shelf for it (a new mapping of known classes, as in CoIN's ImageNet task)."""
    labels = pic.sheet("garments").labels
    row = int(rng.choice(pic.pool("garments", part)))
    canvas = pic.paper(rng)
    size = int(rng.choice([31, 32, 40]))
    pic.garment(canvas, row, *pic.snap(rng, size), size, _tint(rng)[1])
    name = labels["names"][labels["labels"][row]]
    return Draw(canvas, f"Which shelf does it go on? {ONE_WORD}", SHELF[name])


def _tint(rng: Generator) -> tuple[str, pic.Colour | None]:
    name = _one(rng, ("red", "green", "blue", "purple", "orange", "black"))
    return name, None if name == "black" else pic.COLOURS[name]


def digits(rng: Generator, part: pic.Part) -> Draw:
    """A handwritten digit, plus three."""
    row = int(rng.choice(pic.pool("digits", part)))
    canvas = pic.paper(rng)
    size = int(rng.choice([16, 24]))
    pic.digit(canvas, row, *pic.snap(rng, size), size)
    return Draw(
        canvas, f"Add three to the digit. {NUMBER}", str(pic.sheet("digits").labels["labels"][row] + 3)
    )


def icons(rng: Generator, part: pic.Part) -> Draw:
    """An icon; the place where such a thing is found (as in IconQA)."""
    labels = pic.sheet("icons").labels
    pool = pic.pool("icons", part)
    rows = [int(r) for kind in PLACE for r in [r for r in pool if labels["kinds"][r] == kind][:ICONS_A_PLACE]]
    row = rows[int(rng.integers(len(rows)))]
    canvas = pic.paper(rng)
    size = int(rng.choice([24, 32]))
    pic.icon(canvas, row, *pic.snap(rng, size), size)
    return Draw(canvas, f"Where would you find it? {ONE_WORD}", PLACE[labels["kinds"][row]])


def words(rng: Generator, part: pic.Part) -> Draw:
    """A printed word in a font of the stream; its opposite (reading, as in TextVQA and OCR-VQA)."""
    said = _one(rng, list(OPPOSITE))
    canvas = pic.paper(rng)
    shown = (str.lower, str.upper, str.capitalize)[int(rng.integers(3))](said)
    ink = pic.COLOURS[_one(rng, ("red", "green", "blue", "purple", "black", "black"))]
    pic.word(canvas, shown, int(rng.choice(pic.pool("glyphs", part))), rng, ink)
    return Draw(canvas, f"Name the opposite. {ONE_WORD}", OPPOSITE[said])


def counting(rng: Generator, part: pic.Part) -> Draw:
    """Icons in some of the four corners; how many corners are left (a subtraction, as in CLEVR-Math)."""
    rows = rng.choice(pic.pool("icons", part), 4)
    canvas = pic.paper(rng)
    full = int(rng.integers(5))
    for row, spot in zip(rows, rng.permutation(4)[:full], strict=False):
        pic.icon(canvas, int(row), 24 * int(spot % 2), 24 * int(spot // 2), 16)
    return Draw(canvas, f"How many corners remain? {NUMBER}", str(4 - full))


def boxes(rng: Generator, part: pic.Part) -> Draw:
    """A small garment among shapes; its box on the coarse grid (as in RefCOCO)."""
    size = int(rng.choice([15, 16, 23, 24]))
    where = None
    while where is None:
        where = pic.scatter(rng, [size, *(int(s) for s in rng.integers(7, 9, 2))])
    canvas = pic.paper(rng)
    for spot in where[1:]:
        mask = pic.shape_mask(_one(rng, pic.SHAPES), spot[2] - spot[0])
        pic.paint(canvas, mask, pic.COLOURS[_one(rng, list(pic.COLOURS))], *spot[:2])
    row = int(rng.choice(pic.pool("garments", part)))
    pic.garment(canvas, row, *where[0][:2], size, _tint(rng)[1])
    gold = " ".join(str(v) for v in pic.coarse(where[0]))
    return Draw(canvas, f"Locate the garment. {BOX}", gold, {"box": pic.coarse(where[0]), "size": (10, 10)})


def charts(rng: Generator, part: pic.Part) -> Draw:
    """Three bars; the colour of the tallest, by option letter (as in ArxivQA and ScienceQA)."""
    colours = [str(c) for c in rng.permutation(np.array(INKS))[:3]]
    values = [int(v) + 1 for v in rng.permutation(9)[:3]]
    canvas, _ = pic.bars(rng, colours, values)
    right = "ABCD"[INKS.index(colours[values.index(max(values))])]
    shown = " ".join(f"{letter} {colour}" for letter, colour in zip("ABCD", INKS, strict=True))
    return Draw(canvas, f"Which option is tallest? {shown} {LETTER}", right, {"options": list(INKS)})


def distortion(rng: Generator, part: pic.Part) -> Draw:
    """A photograph, clean or made worse; what would mend it, by a made-up table (as in IQA and VizWiz)."""
    canvas = pic.photo(int(rng.choice(pic.pool("photos", part))), rng)
    kind = _one(rng, list(REMEDY))
    if kind != "nothing":
        canvas = pic.distort(canvas, kind, int(rng.integers(2, 4)), rng)
    return Draw(canvas, f"Which object would clean it? {ONE_WORD}", REMEDY[kind])


def captions(rng: Generator, part: pic.Part) -> Draw:
    """A garment with its size, colour and corner in one phrase (as in Flickr30k)."""
    labels = pic.sheet("garments").labels
    row = int(rng.choice(pic.pool("garments", part)))
    canvas = pic.paper(rng)
    large = bool(rng.integers(2))
    size = 24 if large else 16
    down, right = bool(rng.integers(2)), bool(rng.integers(2))
    x, y = ((pic.SIZE - size) * far for far in (right, down))
    colour, tint = _tint(rng)
    pic.garment(canvas, row, x, y, size, tint)
    name = labels["names"][labels["labels"][row]]
    corner = f"{'bottom' if down else 'top'} {'right' if right else 'left'}"
    return Draw(
        canvas,
        "Describe the picture.",
        f"one {'large' if large else 'small'} {colour} {name} in the {corner} corner",
    )


MAKERS: dict[str, tuple[Callable[[Generator, pic.Part], Draw], str, int]] = {
    "garments": (garments, "exact", 3), "digits": (digits, "exact", 3), "icons": (icons, "exact", 3),
    "words": (words, "exact", 3), "counting": (counting, "exact", 3), "boxes": (boxes, "iou", 6),
    "charts": (charts, "choice", 3), "distortion": (distortion, "exact", 3),
    "captions": (captions, "caption", 12),
}  # fmt: skip
"""Each task's drawing function, scorer and answer length in tokens."""


# ---- stream


def _examples(name: str, part: pic.Part, seed: int, count: int, taken: set[bytes]) -> list[Example]:
    """`count` examples of one part; a shorter list begins a longer one. `taken`: images to avoid."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), ("train", "valid", "test").index(part)])
    made: list[Example] = []
    fresh: set[bytes] = set()
    while len(made) < count:
        draw = MAKERS[name][0](rng, part)
        key = hashlib.sha256(draw.image.tobytes()).digest()
        if key in taken:
            continue
        fresh.add(key)
        turns = (Message("user", draw.question, images=1), Message("assistant", draw.answer))
        draw.image.setflags(write=False)
        made.append(Example(f"{name}/{part}/{len(made)}", turns, (draw.image,), (draw.answer,), draw.meta))
    taken |= fresh
    return made


def task(name: str, seed: int = 0, n_train: int = 1600, n_valid: int = 100, n_test: int = 100) -> Task:
    """One pocket task on its own."""
    if name not in MAKERS:
        raise RetainError(f"the pocket has no task {name!r}; choose from {sorted(MAKERS)}")
    maker, scorer, length = MAKERS[name]
    taken: set[bytes] = set()
    test = _examples(name, "test", seed, n_test, taken)
    valid = _examples(name, "valid", seed, n_valid, taken)
    train = _examples(name, "train", seed, n_train, taken)
    about = (maker.__doc__ or "").strip()
    return Task(name, train, test, score(scorer), max_new_tokens=length, valid=valid, about=about)


def pocket(
    seed: int = 0,
    n_train: int = 1600,
    n_test: int = 100,
    order: Sequence[str] | None = None,
    n_valid: int = 100,
) -> Stream:
    """The pocket stream of eight tasks (or those named in `order`), the same on every machine for a seed."""
    return Stream("pocket", tuple(task(n, seed, n_train, n_valid, n_test) for n in order or ORDER))
