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

ORDER = ("charts", "words", "garments", "counting", "boxes", "digits", "distortion", "captions")
"""Default order of the tasks."""

ONE_WORD = "Answer with one word."
NUMBER = "Answer with a number."
LETTER = "Answer with the option letter."
BOX = "Answer with a box."

SHELF = {
    "tee": "tops", "shirt": "tops", "pullover": "knits", "coat": "coats", "dress": "gowns", "trouser": "legs",
    "sandal": "summer", "sneaker": "sport", "boot": "winter", "bag": "travel",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "up": "down", "big": "small", "day": "night", "old": "new", "fast": "slow",
    "open": "shut", "good": "bad", "wet": "dry", "in": "out", "hard": "soft", "on": "off",
}  # fmt: skip
OPPOSITE = {**_OPPOSITES, **{b: a for a, b in _OPPOSITES.items()}}
QUALITY = ("excellent", "good", "fair", "bad")
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


def _spot(rng: Generator, size: int) -> tuple[int, int]:
    x, y = rng.integers(0, pic.SIZE - size + 1, 2)
    return int(x), int(y)


def _one(rng: Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _options(rng: Generator, right: str, wrong: Sequence[str], most: int) -> tuple[str, str, list[str]]:
    shown = [str(w) for w in rng.permutation(np.array(wrong))[: most - 1]]
    place = int(rng.integers(len(shown) + 1))
    shown.insert(place, right)
    return " ".join(f"{'ABCDEF'[i]} {o}" for i, o in enumerate(shown)), "ABCDEF"[place], shown


# ---- tasks


def garments(rng: Generator, part: pic.Part) -> Draw:
    """A garment; the shop's shelf for it (a new mapping of known classes, as in CoIN's ImageNet task)."""
    labels = pic.sheet("garments").labels
    row = int(rng.choice(pic.pool("garments", part)))
    canvas = pic.paper(rng)
    size = int(rng.integers(28, 41))
    pic.garment(canvas, row, *_spot(rng, size), size, _tint(rng)[1])
    name = labels["names"][labels["labels"][row]]
    return Draw(canvas, f"Which shelf does it go on? {ONE_WORD}", SHELF[name])


def _tint(rng: Generator) -> tuple[str, pic.Colour | None]:
    name = _one(rng, ("red", "green", "blue", "purple", "orange", "black"))
    return name, None if name == "black" else pic.COLOURS[name]


def digits(rng: Generator, part: pic.Part) -> Draw:
    """A handwritten digit, plus three."""
    row = int(rng.choice(pic.pool("digits", part)))
    canvas = pic.paper(rng)
    size = int(rng.integers(14, 31))
    pic.digit(canvas, row, *_spot(rng, size), size)
    return Draw(
        canvas, f"Add three to the digit. {NUMBER}", str(pic.sheet("digits").labels["labels"][row] + 3)
    )


def icons(rng: Generator, part: pic.Part) -> Draw:
    """An icon; where such a thing is found, by option letter (as in IconQA)."""
    labels = pic.sheet("icons").labels
    rows = [int(r) for r in pic.pool("icons", part) if labels["kinds"][r] in PLACE]
    row = rows[int(rng.integers(len(rows)))]
    canvas = pic.paper(rng)
    size = int(rng.integers(18, 39))
    pic.icon(canvas, row, *_spot(rng, size), size)
    right = PLACE[labels["kinds"][row]]
    shown, letter, texts = _options(rng, right, [p for p in PLACE.values() if p != right], 3)
    return Draw(canvas, f"Where would you find it? {shown} {LETTER}", letter, {"options": texts})


def words(rng: Generator, part: pic.Part) -> Draw:
    """A printed word in a font of the stream; its opposite (reading, as in TextVQA and OCR-VQA)."""
    said = _one(rng, list(OPPOSITE))
    canvas = pic.paper(rng)
    shown = (str.lower, str.upper, str.capitalize)[int(rng.integers(3))](said)
    ink = pic.COLOURS[_one(rng, ("red", "green", "blue", "purple", "black", "black"))]
    pic.word(canvas, shown, int(rng.choice(pic.pool("glyphs", part))), rng, ink)
    return Draw(canvas, f"Name the opposite. {ONE_WORD}", OPPOSITE[said])


def counting(rng: Generator, part: pic.Part) -> Draw:
    """Coloured shapes; how many are left when one colour is taken away (as in CLEVR-Math)."""
    few = [str(c) for c in rng.permutation(np.array(list(pic.COLOURS)))[:2]]
    n = int(rng.integers(2, 7))
    looks = [(_one(rng, few), _one(rng, pic.SHAPES)) for _ in range(n)]
    canvas, things = pic.shapes(rng, looks)
    left = sum(t.colour != few[0] for t in things)
    return Draw(canvas, f"Take away the {few[0]} shapes. How many remain? {NUMBER}", str(left))


def boxes(rng: Generator, part: pic.Part) -> Draw:
    """A small garment among shapes; its box on the coarse grid (as in RefCOCO)."""
    size = int(rng.integers(14, 25))
    where = None
    while where is None:
        where = pic.scatter(rng, [size, *(int(s) for s in rng.integers(6, 10, 2))])
    canvas = pic.paper(rng)
    for spot in where[1:]:
        mask = pic.shape_mask(_one(rng, pic.SHAPES), spot[2] - spot[0])
        pic.paint(canvas, mask, pic.COLOURS[_one(rng, list(pic.COLOURS))], *spot[:2])
    row = int(rng.choice(pic.pool("garments", part)))
    pic.garment(canvas, row, *where[0][:2], size, _tint(rng)[1])
    gold = " ".join(str(v) for v in pic.coarse(where[0]))
    return Draw(canvas, f"Locate the garment. {BOX}", gold, {"box": pic.coarse(where[0]), "size": (10, 10)})


def charts(rng: Generator, part: pic.Part) -> Draw:
    """Three bars; the second tallest, by option letter (as in ArxivQA and ScienceQA)."""
    colours = [str(c) for c in rng.permutation(np.array(list(pic.COLOURS)))[:3]]
    values = [int(v) + 1 for v in rng.permutation(9)[:3]]
    right = colours[values.index(sorted(values)[1])]
    shown, letter, texts = _options(rng, right, [c for c in colours if c != right], 3)
    canvas = pic.bars(rng, colours, values)
    return Draw(canvas, f"Which bar is second tallest? {shown} {LETTER}", letter, {"options": texts})


def distortion(rng: Generator, part: pic.Part) -> Draw:
    """A photograph, clean or made worse; a rating by degree whatever the kind (as in IQA)."""
    canvas = pic.photo(int(rng.choice(pic.pool("photos", part))), rng)
    degree = int(rng.integers(4))
    if degree:
        canvas = pic.distort(canvas, _one(rng, pic.DISTORTIONS), degree, rng)
    return Draw(canvas, f"Rate the quality. {ONE_WORD}", QUALITY[degree])


def captions(rng: Generator, part: pic.Part) -> Draw:
    """A garment with its size, colour and corner in one phrase (as in Flickr30k)."""
    labels = pic.sheet("garments").labels
    row = int(rng.choice(pic.pool("garments", part)))
    canvas = pic.paper(rng)
    large = bool(rng.integers(2))
    size = int(rng.integers(24, 30)) if large else int(rng.integers(14, 19))
    down, right = bool(rng.integers(2)), bool(rng.integers(2))
    room = pic.SIZE - size
    x, y = (room - int(rng.integers(0, 4)) if far else int(rng.integers(0, 4)) for far in (right, down))
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
    "garments": (garments, "exact", 3), "digits": (digits, "exact", 3), "icons": (icons, "choice", 3),
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
