"""The pocket stream: eight small visual instruction tasks, drawn from a seed, for the shipped pocket model.

Made here in the manner of CoIN (Chen et al., NeurIPS 2024, arXiv:2403.08350) and UCIT (Guo et al., ACL 2025,
arXiv:2503.12941): one perception domain and one question a task, some tasks sharing an answer-format line.
What is asked of a picture is new to the base model: it knows a sneaker, but not on which shelf this shop puts
sneakers. Images come from sources that the base never saw (see `retain.pocket.pictures.pool`); train, valid and
test share no image. `docs/pocket.md` is the card, with measured figures.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from numpy.random import Generator
from pydantic import Field

from retain.metrics.scores import score
from retain.pocket import pictures as pic
from retain.stream import Stream, Task
from retain.types import Example, Message, RetainError
from retain.values import Seed

ORDER = ("captions", "boxes", "charts", "icons", "garments", "counting", "digits", "distortion")
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
ICONS_A_PLACE = 2
PLAIN = 0.3
"""Share of questions of a kind that the base knows. With one question a task, a model learns to ignore the
question, and what came before is gone at once; real instruction data are mixed as well."""
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
    plain: tuple[str, str] | None = None
    """Another question about the same picture, of a kind that the base knows, and its answer."""


def _one(rng: Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


# ---- tasks


def garments(rng: Generator, part: pic.Part) -> Draw:
    """A garment; the shop's shelf for it (a new mapping of known classes, as in CoIN's ImageNet task)."""
    labels = pic.sheet("garments").labels
    row = int(rng.choice(pic.pool("garments", part)))
    canvas = pic.paper(rng)
    size = int(rng.choice([31, 32, 40]))
    colour, tint = _tint(rng)
    pic.garment(canvas, row, *pic.snap(rng, size), size, tint)
    shelf = SHELF[labels["names"][labels["labels"][row]]]
    plain = (f"What colour is it?\n{ONE_WORD}", colour)
    return Draw(canvas, f"Which shelf does it go on?\n{ONE_WORD}", shelf, plain=plain)


def _tint(rng: Generator) -> tuple[str, pic.Colour | None]:
    name = _one(rng, ("red", "green", "blue", "purple", "orange", "black"))
    return name, None if name == "black" else pic.COLOURS[name]


def digits(rng: Generator, part: pic.Part) -> Draw:
    """A handwritten digit, plus three."""
    row = int(rng.choice(pic.pool("digits", part)))
    canvas = pic.paper(rng)
    size = int(rng.choice([16, 24]))
    pic.digit(canvas, row, *pic.snap(rng, size), size)
    value = int(pic.sheet("digits").labels["labels"][row])
    plain = (f"Which digit is it?\n{NUMBER}", str(value))
    return Draw(canvas, f"Add three to the digit.\n{NUMBER}", str(value + 3), plain=plain)


def icons(rng: Generator, part: pic.Part) -> Draw:
    """An icon; the place where such a thing is found (as in IconQA)."""
    labels = pic.sheet("icons").labels
    pool = pic.pool("icons", part)
    rows = [int(r) for kind in PLACE for r in [r for r in pool if labels["kinds"][r] == kind][:ICONS_A_PLACE]]
    row = rows[int(rng.integers(len(rows)))]
    canvas = pic.paper(rng)
    size = int(rng.choice([24, 32]))
    pic.icon(canvas, row, *pic.snap(rng, size), size)
    kind = labels["kinds"][row]
    plain = (f"What kind of icon is it?\n{ONE_WORD}", kind)
    return Draw(canvas, f"Where would you find it?\n{ONE_WORD}", PLACE[kind], plain=plain)


def words(rng: Generator, part: pic.Part) -> Draw:
    """A printed word in a font of the stream; its opposite (reading, as in TextVQA and OCR-VQA)."""
    said = _one(rng, list(OPPOSITE))
    canvas = pic.paper(rng)
    shown = (str.lower, str.upper, str.capitalize)[int(rng.integers(3))](said)
    ink = _one(rng, ("red", "green", "blue", "purple", "black", "black"))
    pic.word(canvas, shown, int(rng.choice(pic.pool("glyphs", part))), rng, pic.COLOURS[ink])
    plain = (f"What colour is the text?\n{ONE_WORD}", ink)
    return Draw(canvas, f"Name the opposite.\n{ONE_WORD}", OPPOSITE[said], plain=plain)


def counting(rng: Generator, part: pic.Part) -> Draw:
    """Icons in some of the four corners; how many corners are left (a subtraction, as in CLEVR-Math)."""
    rows = rng.choice(pic.pool("icons", part), 4)
    canvas = pic.paper(rng)
    full = int(rng.integers(5))
    for row, spot in zip(rows, rng.permutation(4)[:full], strict=False):
        pic.icon(canvas, int(row), 24 * int(spot % 2), 24 * int(spot // 2), 16)
    plain = (f"How many icons?\n{NUMBER}", str(full))
    return Draw(canvas, f"How many corners remain?\n{NUMBER}", str(4 - full), plain=plain)


def boxes(rng: Generator, part: pic.Part) -> Draw:
    """A small garment among shapes; its box on the coarse grid (as in RefCOCO)."""
    size = int(rng.choice([23, 24]))
    where = None
    while where is None:
        where = pic.scatter(rng, [size, *(int(s) for s in rng.integers(7, 9, 2))])
    canvas = pic.paper(rng)
    for spot in where[1:]:
        mask = pic.shape_mask(_one(rng, pic.SHAPES), spot[2] - spot[0])
        pic.paint(canvas, mask, pic.COLOURS[_one(rng, list(pic.COLOURS))], *spot[:2])
    row = int(rng.choice(pic.pool("garments", part)))
    pic.garment(canvas, row, *where[0][:2], size, _tint(rng)[1])
    box = pic.coarse(where[0])
    gold = " ".join(str(v) for v in box)
    labels = pic.sheet("garments").labels
    plain = (f"Box of the {labels['names'][labels['labels'][row]]}?\n{BOX}", gold)
    return Draw(canvas, f"Locate the garment.\n{BOX}", gold, {"box": box, "size": (10, 10)}, plain)


def charts(rng: Generator, part: pic.Part) -> Draw:
    """Three bars; the colour of the tallest, by option letter (as in ArxivQA and ScienceQA)."""
    colours = [str(c) for c in rng.permutation(np.array(INKS))[:3]]
    values = [int(v) + 1 for v in rng.permutation(9)[:3]]
    canvas, _ = pic.bars(rng, colours, values)
    right, left = ("ABCD"[INKS.index(c)] for c in (colours[values.index(max(values))], colours[0]))
    shown = " ".join(f"{letter} {colour}" for letter, colour in zip("ABCD", INKS, strict=True))
    plain = (f"Which bar is leftmost? {shown}\n{LETTER}", left)
    return Draw(canvas, f"Which option is tallest? {shown}\n{LETTER}", right, {"options": list(INKS)}, plain)


def distortion(rng: Generator, part: pic.Part) -> Draw:
    """A photograph, clean or made worse; what would mend it, by a made-up table (as in IQA and VizWiz)."""
    canvas = pic.photo(int(rng.choice(pic.pool("photos", part))), rng)
    kind = _one(rng, list(REMEDY))
    if kind != "nothing":
        canvas = pic.distort(canvas, kind, int(rng.integers(2, 4)), rng)
    plain = (f"What is wrong with the photo?\n{ONE_WORD}", kind)
    return Draw(canvas, f"Which object would clean it?\n{ONE_WORD}", REMEDY[kind], plain=plain)


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
    caption = f"one {'large' if large else 'small'} {colour} {name} in the {corner} corner"
    plain = ("Say what is here.", f"a {colour} {name}")
    return Draw(canvas, "Describe the picture.", caption, plain=plain)


Pictures = Annotated[int, Field(ge=0, le=100_000)]
"""How many examples of a split: they are drawn one by one and kept in memory, 7 kB each."""

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
        question, answer = draw.question, draw.answer
        if draw.plain and rng.random() < PLAIN:
            question, answer = draw.plain
        turns = (Message("user", question, images=1), Message("assistant", answer))
        draw.image.setflags(write=False)
        made.append(Example(f"{name}/{part}/{len(made)}", turns, (draw.image,), (answer,), draw.meta))
    taken |= fresh
    return made


@lru_cache(maxsize=16)
def task(name: str, seed: int = 0, n_train: int = 1280, n_valid: int = 100, n_test: int = 64) -> Task:
    """One pocket task on its own; the same object when asked for again."""
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
    seed: Seed = 0,
    n_train: Pictures = 1280,
    n_test: Pictures = 64,
    order: Annotated[Sequence[str], Field(min_length=1)] | None = None,
    n_valid: Pictures = 100,
) -> Stream:
    """The pocket stream of eight tasks (or those named in `order`), the same on every machine for a seed."""
    return Stream(
        "pocket", tuple(task(n, seed, n_train, n_valid, n_test) for n in (ORDER if order is None else order))
    )
