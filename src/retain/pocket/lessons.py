"""What the pocket base model is trained on: pictures with generic questions, and text-only exercises.

Each lesson draws one picture from `base` sources and returns it with a caption and every question it can
answer. The stream of `retain.pocket.stream` uses other images, other wordings and other mappings; its
answer words appear here only as text to be copied, so that a new task is a new question and not a new
alphabet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.random import Generator

from retain.pocket import pictures as pic

QA = tuple[str, str]
LETTERS = "ABCDEF"
NUMBERS = [str(n) for n in range(100)]
GARMENT_COLOURS = ["red", "green", "blue", "purple", "orange", "black"]
FEET = {"sandal", "sneaker", "boot"}
_WORDS = """
hot cold up down big small day night old new fast slow open shut good bad wet dry in out left right on off
yes no hard soft high low near far full empty rich poor early late dark light long short man cat dog sun
moon red blue tree fish bird milk cake shoe hat car bus ship door bed star book king lamp ring rain snow
wind fire ice salt gold hand foot head nose bone leaf seed root rock sand lake sea hill road town shop farm
park wall roof gate tool rope game ball song drum horn bell coin card note word line page pen map box bag
cup pan pot jar tin can fork knife
"""
WORDS = _WORDS.split()
_TEXT_ONLY = """
tops knits coats gowns legs summer sport winter travel shelf department belongs goes opposite remain remove
take away add three second tallest middle shortest rate quality fair excellent poor good bad locate find
garment garments bound caption describe picture write sentence one two four five six seven eight nine ten
with answer the option letter using single word phrase number box where would you it farm kitchen wardrobe
road garden garage stage stadium sky room shown next above below beside over under between next to and a an
of is are there in photo please name reply give how many more than fewer which what kind most least first
last both neither none all some harms differs different same odd even sum total minus plus times equal
larger smaller count after before left right if printed written handwritten grade class sort group store
place paper pale bright looks like small large wears go does on its this that these those object objects
thing things does not can see seen coordinates corner corners score degree level damage clean image images
icon icons chart bar bars figure value values colour colours shape
"""
TEXT_ONLY = _TEXT_ONLY.split()


@dataclass(frozen=True)
class Lesson:
    """One picture, what it shows in words, and what may be asked about it."""

    image: np.ndarray
    caption: str
    qa: list[QA]
    marks: list[tuple[pic.Box, str]] = field(default_factory=list)
    """Where each thing is, and in words what it is: what the image tower is first taught."""


def lexicon() -> list[str]:
    """All words of the base's text exercises, in a fixed order."""
    icons = pic.sheet("icons").labels
    words = [
        *WORDS,
        *TEXT_ONLY,
        *pic.sheet("garments").labels["names"],
        *icons["names"],
        *sorted(set(icons["kinds"])),
    ]
    words += [*pic.COLOURS, *pic.SHAPES, *pic.DISTORTIONS, "weak", "medium", "strong", "nothing", "yes", "no"]
    return list(dict.fromkeys(words))


def pick(rng: Generator, items: list[str] | tuple[str, ...] | np.ndarray) -> str:
    """One item as a plain string."""
    return str(items[int(rng.integers(len(items)))])


def options(rng: Generator, right: str, others: list[str], most: int = 4) -> tuple[str, str]:
    """`A cat B dog C sun` with the right answer among them, and its letter."""
    wrong = [o for o in dict.fromkeys(others) if o != right]
    n = min(int(rng.integers(2, most + 1)), len(wrong) + 1)
    chosen = [wrong[i] for i in rng.permutation(len(wrong))[: n - 1]]
    place = int(rng.integers(n))
    chosen.insert(place, right)
    return " ".join(f"{LETTERS[i]} {c}" for i, c in enumerate(chosen)), LETTERS[place]


def ask(rng: Generator, questions: list[str], answer: str, others: list[str]) -> list[QA]:
    """The same fact as a short answer, an option letter, and a yes/no question."""
    q = pick(rng, questions)
    shown, letter = options(rng, answer, others)
    line = pick(rng, ["", " Reply with a letter.", " Choose one."])
    wrong = pick(rng, [o for o in others if o != answer] or [answer])
    said = answer if rng.integers(2) else wrong
    return [
        (q + pick(rng, ["", "", " Short answer.", " Use one word."]), answer),
        (f"{q} {shown}{line}", letter),
        (f"{q} Is it {said}?", "yes" if said == answer else "no"),
    ]


def box_text(box: pic.Box) -> str:
    """A box as four numbers 0..10."""
    return " ".join(str(v) for v in pic.coarse(box))


# ---- pictures


def garments(rng: Generator) -> Lesson:
    """One garment, tinted or dark, sometimes beside another or small with a box to find."""
    names: list[str] = pic.sheet("garments").labels["names"]
    labels: list[int] = pic.sheet("garments").labels["labels"]
    rows = rng.choice(pic.pool("garments", "base"), 2, replace=False)
    canvas = pic.paper(rng)
    if rng.integers(4) == 0:
        both = [names[labels[r]] for r in rows]
        marks = [
            (pic.garment(canvas, int(row), 24 * i, 8 * int(rng.integers(0, 4)), 16), both[i])
            for i, row in enumerate(rows)
        ]
        qa = ask(rng, ["What is on the left?", "Left garment?"], both[0], names)
        qa += ask(rng, ["What is on the right?", "Right garment?"], both[1], names)
        return Lesson(canvas, f"a {both[0]} beside a {both[1]}", qa, marks)
    size = int(rng.choice([16, 24, 32, 32, 32, 40])) - int(rng.integers(2))
    x, y = pic.snap(rng, size)
    colour = pick(rng, GARMENT_COLOURS)
    tint = None if colour == "black" else pic.COLOURS[colour]
    box = pic.garment(canvas, int(rows[0]), x, y, size, tint)
    name = names[labels[rows[0]]]
    qa = ask(rng, ["What is this?", "Which garment is it?", "What can you see?"], name, names) * 2
    qa += ask(rng, ["What colour is it?", "Colour of the garment?"], colour, GARMENT_COLOURS)
    qa += [
        ("Is it worn on the feet?", "yes" if name in FEET else "no"),
        (f"Box of the {name}?", box_text(box)),
    ]
    return Lesson(canvas, f"a {colour} {name}", qa, [(box, f"{name} {colour}")])


def digits(rng: Generator) -> Lesson:
    """One to three handwritten digits."""
    labels = pic.sheet("digits").labels["labels"]
    rows = rng.choice(pic.pool("digits", "base"), int(rng.choice([1, 1, 2])), replace=False)
    canvas = pic.paper(rng)
    values = [str(labels[r]) for r in rows]
    marks = []
    for i, row in enumerate(rows):
        size = 16 if len(rows) == 2 else int(rng.choice([16, 24]))
        x, y = pic.snap(rng, size)
        box = pic.digit(canvas, int(row), 24 * i if len(rows) == 2 else x, y, size)
        marks.append((box, f"digit{values[i]}"))
    read = " ".join(values)
    qa: list[QA] = [
        (pick(rng, ["Read the digits.", "Which digits are written?", "What is written?"]), read)
    ] * 2
    qa.append((pick(rng, ["How many digits?", "Number of digits?"]), str(len(values))))
    if len(values) == 1:
        qa += ask(rng, ["Which digit is it?", "Read the digit."], values[0], NUMBERS[:10])
        qa.append((f"Box of the {values[0]}?", box_text(box)))
    else:
        qa += [("Which digit is on the left?", values[0]), ("Which digit is on the right?", values[-1])]
        qa.append(("Which digit is the smallest?", min(values)))
    return Lesson(canvas, f"the digits {read}", qa, marks)


def words(rng: Generator) -> Lesson:
    """A printed word or a string of letters in a base font."""
    real = rng.integers(5) < 3
    text = (
        pick(rng, _short())
        if real
        else "".join(pick(rng, pic.sheet("glyphs").labels["chars"][26:52]) for _ in range(rng.integers(1, 5)))
    )
    shown = (str.lower, str.upper, str.capitalize)[int(rng.integers(3))](text)
    canvas = pic.paper(rng)
    colour = pick(rng, [c for c in pic.COLOURS if c != "yellow"]) if rng.integers(2) else "black"
    font = int(rng.choice(pic.pool("glyphs", "base")))
    where = pic.word(canvas, shown, font, rng, pic.COLOURS[colour])
    marks = [(box, f"letter_{c} {colour}") for box, c in zip(where, text, strict=True)]
    if real:
        marks.append(((where[0][0], where[0][1], where[-1][2], where[0][3]), f"word_{text}"))
    spelled = " ".join(text)
    qa: list[QA] = [(pick(rng, ["Spell it.", "Which letters?", "Spell the text."]), spelled)]
    if real:
        qa += ask(rng, ["Read the word.", "Which word is it?", "What does it say?"], text, _short()) * 2
    else:
        qa += [("Which letters?", spelled), ("Spell the text.", spelled)]
    qa += [("First letter?", text[0]), ("Last letter?", text[-1]), ("How many letters?", str(len(text)))]
    qa.append(("What colour is the text?", colour))
    caption = f"the {colour} text {text if real else spelled}"
    return Lesson(canvas, caption, qa, marks)


@cache
def _short() -> list[str]:
    return [
        w
        for w in lexicon()
        if len(w) <= 4 and w.isalpha() and (w in WORDS or w in pic.sheet("icons").labels["names"])
    ]


def scenes(rng: Generator) -> Lesson:
    """One to six coloured shapes: counts, colours, places, boxes, relations."""
    n = int(rng.choice([1, 2, 2, 3, 4, 5, 6]))
    few = [pick(rng, list(pic.COLOURS)) for _ in range(3)]
    kinds = [pick(rng, pic.SHAPES) for _ in range(3)]
    looks = [(pick(rng, few), pick(rng, kinds)) for _ in range(n)]
    canvas, things = pic.shapes(rng, looks)
    colour, kind = pick(rng, [*few, pick(rng, list(pic.COLOURS))]), pick(rng, [*kinds, pick(rng, pic.SHAPES)])
    numbers = NUMBERS[:8]
    of_colour, of_kind = sum(c == colour for c, _ in looks), sum(k == kind for _, k in looks)
    qa = ask(rng, ["How many shapes?", "Count the shapes."], str(n), numbers)
    qa += ask(rng, [f"How many {colour} shapes?", f"Count the {colour} shapes."], str(of_colour), numbers)
    qa += ask(rng, [f"How many {kind} shapes?", f"Count the {kind} shapes."], str(of_kind), numbers)
    qa.append((f"Is there a {colour} {kind}?", "yes" if (colour, kind) in looks else "no"))
    for thing in things:
        name = f"{thing.colour} {thing.kind}"
        if looks.count((thing.colour, thing.kind)) == 1:
            qa += ask(
                rng, [f"Where is the {name}?", f"Position of the {name}?"], thing.place, list(pic.PLACES)
            )[:2]
            qa += [(f"Box of the {name}?", box_text(thing.box))] * 2
        if sum(k == thing.kind for _, k in looks) == 1:
            qa += ask(rng, [f"What colour is the {thing.kind}?"], thing.colour, list(pic.COLOURS))
        if sum(c == thing.colour for c, _ in looks) == 1:
            qa += ask(rng, [f"Which shape is {thing.colour}?"], thing.kind, list(pic.SHAPES))
    return Lesson(
        canvas, _scene_caption(rng, things, qa), qa, [(t.box, f"{t.colour} {t.kind}") for t in things]
    )


def _scene_caption(rng: Generator, things: list[pic.Thing], qa: list[QA]) -> str:
    names = [f"a {t.colour} {t.kind}" for t in things]
    if len(things) == 1:
        text = f"{names[0]} at the {things[0].place}"
    elif len(things) == 2:
        a, b = things
        dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
        word = (
            ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        )
        text = f"{names[0]} {word} {names[1]}"
        start = f"{things[0].colour} {things[0].kind}"
        if start != f"{b.colour} {b.kind}":
            qa += [(f"What is the {start} doing? {names[0]} is", f"{word} {names[1]}")]
    else:
        return f"{len(things)} shapes"
    qa += [(pick(rng, ["Tell me what you see.", "Say what is here.", "What is in the picture?"]), text)] * 2
    return text


def icons(rng: Generator) -> Lesson:
    """One icon, or two to four on a grid."""
    labels = pic.sheet("icons").labels
    pool = pic.pool("icons", "base")
    base = [str(labels["names"][r]) for r in pool]
    kinds = sorted(set(labels["kinds"]))
    canvas = pic.paper(rng)
    if rng.integers(2):
        row = int(rng.choice(pool))
        size = int(rng.choice([16, 24, 32]))
        x, y = pic.snap(rng, size)
        box = pic.icon(canvas, row, x, y, size)
        name, kind = str(labels["names"][row]), str(labels["kinds"][row])
        qa = ask(rng, ["What is this icon?", "Name the icon.", "What is this?"], name, base)
        qa += ask(rng, ["What kind of icon is it?", "Which kind is it?"], kind, kinds)
        qa.append((f"Box of the {name}?", box_text(box)))
        return Lesson(canvas, f"an icon of a {name}", qa, [(box, f"icon_{name} kind_{kind}")])
    n = int(rng.integers(2, 5))
    few = rng.choice(pool, int(rng.integers(1, 4)))
    rows = [int(rng.choice(few)) for _ in range(n)]
    spots = rng.permutation(4)[:n]
    marks = [
        (
            pic.icon(canvas, row, 24 * int(spot % 2), 24 * int(spot // 2), 16),
            f"icon_{labels['names'][row]} kind_{labels['kinds'][row]}",
        )
        for row, spot in zip(rows, spots, strict=True)
    ]
    names = [str(labels["names"][r]) for r in rows]
    i = int(rng.integers(n))
    place = pic.PLACES[int(spots[i])]
    qa = ask(rng, [f"What is at the {place}?", f"Which icon is at the {place}?"], names[i], base)
    if names.count(names[i]) == 1:
        qa += ask(rng, [f"Where is the {names[i]}?"], place, list(pic.PLACES))[:2]
    qa += [("How many icons?", str(n)), (f"How many icons are a {names[i]}?", str(names.count(names[i])))]
    qa.append(("Are all icons the same?", "yes" if len(set(names)) == 1 else "no"))
    return Lesson(canvas, "icons of " + " and ".join(dict.fromkeys(names)), qa, marks)


def charts(rng: Generator) -> Lesson:
    """Three or four coloured bars of different heights."""
    n = int(rng.integers(2, 5))
    colours = [list(pic.COLOURS)[i] for i in rng.permutation(7)[:n]]
    values = [int(v) + 1 for v in rng.permutation(9)[:n]]
    canvas, boxes = pic.bars(rng, colours, values)
    value = dict(zip(colours, values, strict=True))
    one, two = (colours[int(i)] for i in rng.permutation(n)[:2])
    order = sorted(colours, key=value.__getitem__)
    qa = ask(rng, ["Which bar is tallest?", "Colour of the tallest bar?"], order[-1], colours)
    qa += ask(rng, ["Which bar is shortest?"], order[0], colours)
    qa += ask(
        rng, [f"Value of the {one} bar?", f"How tall is the {one} bar?"], str(value[one]), NUMBERS[1:10]
    )
    qa.append((f"Is {one} taller than {two}?", "yes" if value[one] > value[two] else "no"))
    qa += [
        ("How many bars?", str(n)),
        ("List the bar colours.", " ".join(colours)),
        ("Which bar is leftmost?", colours[0]),
    ]
    marks = [(box, f"{c} value{v}") for box, (c, v) in zip(boxes, value.items(), strict=True)]
    listed = " ".join(f"{c} {v}" for c, v in value.items())
    return Lesson(canvas, f"a chart with bars {listed}", qa, marks)


def photos(rng: Generator) -> Lesson:
    """A photograph, unharmed or made worse."""
    labels = pic.sheet("photos").labels
    row = int(rng.choice(pic.pool("photos", "base")))
    subject = str(labels["names"][labels["source"][row]]).split("_")[0]
    canvas = pic.photo(row, rng)
    kind, strength = "nothing", "none"
    if rng.integers(7):
        kind, degree = pick(rng, pic.DISTORTIONS), int(rng.integers(1, 4))
        strength = ("weak", "medium", "strong")[degree - 1]
        canvas = pic.distort(canvas, kind, degree, rng)
    kinds = [*pic.DISTORTIONS, "nothing"]
    qa = ask(rng, ["What is wrong with the photo?", "What spoils the photo?"], kind, kinds) * 2
    qa += ask(
        rng,
        ["How strong is it?", "How strong is the damage?"],
        strength,
        ["none", "weak", "medium", "strong"],
    )
    subjects = sorted(
        {str(labels["names"][labels["source"][r]]).split("_")[0] for r in pic.pool("photos", "base")}
    )
    qa += ask(rng, ["What does the photo show?"], subject, subjects)[:2]
    marks = [((0, 0, pic.SIZE, pic.SIZE), f"photo_{subject} {kind} {strength}")]
    return Lesson(canvas, f"a photo of {subject} with {strength} {kind}", qa, marks)


def mark_words() -> list[str]:
    """Every word that a mark may have, in a fixed order."""
    icons, photos = pic.sheet("icons").labels, pic.sheet("photos").labels
    words = [*pic.COLOURS, *pic.SHAPES, *pic.sheet("garments").labels["names"], *pic.DISTORTIONS]
    words += [
        "nothing",
        "none",
        "weak",
        "medium",
        "strong",
        *(f"kind_{k}" for k in sorted(set(icons["kinds"]))),
    ]
    words += [f"{w}{n}" for w in ("digit", "value", "count") for n in range(10)]
    words += [f"letter_{c}" for c in "abcdefghijklmnopqrstuvwxyz"] + [f"word_{w}" for w in _short()]
    words += [f"icon_{n}" for n in icons["names"]] + [f"photo_{n.split('_')[0]}" for n in photos["names"]]
    return words


LESSONS: dict[str, tuple[Callable[[Generator], Lesson], float]] = {
    "garments": (garments, 1.0), "digits": (digits, 0.8), "words": (words, 1.6), "scenes": (scenes, 1.8),
    "icons": (icons, 1.1), "charts": (charts, 1.0), "photos": (photos, 0.8),
}  # fmt: skip
"""Lessons and how often they come up."""


def lesson(rng: Generator, name: str | None = None) -> Lesson:
    """A lesson drawn by its share, or the named one."""
    if name is None:
        share = np.array([w for _, w in LESSONS.values()])
        name = list(LESSONS)[int(rng.choice(len(share), p=share / share.sum()))]
    return LESSONS[name][0](rng)


# ---- text only


def text(rng: Generator) -> QA:
    """A question without a picture: copying, options, small sums, counting, spelling."""
    words = lexicon()
    some = [words[int(i)] for i in rng.choice(len(words), int(rng.integers(2, 6)), replace=False)]
    turn = int(rng.integers(12))
    if turn < 3:
        if rng.integers(3) == 0:
            some = [w.capitalize() if w in TEXT_ONLY else w for w in some]
        said = " ".join(some[: int(rng.integers(1, 6))])
        return pick(rng, [f"Repeat: {said}", f"Say {said}", f"Write {said}", f"{said} Repeat it."]), said
    if turn < 5:
        shown, letter = options(rng, some[0], some[1:] or words[:3])
        return (
            (f"{shown} Which is {some[0]}?", letter)
            if rng.integers(2)
            else (f"{shown} Read {letter}", some[0])
        )
    if turn == 5:
        a, b = (int(v) for v in rng.integers(0, 10, 2))
        return (f"{a} plus {b}?", str(a + b)) if rng.integers(2) or a < b else (f"{a} minus {b}?", str(a - b))
    if turn == 6:
        a = int(rng.integers(0, 20))
        return (
            (f"Next number after {a}?", str(a + 1))
            if rng.integers(2)
            else (f"Number before {a + 1}?", str(a))
        )
    if turn == 7:
        n = int(rng.integers(1, 7))
        return f"How many: {' '.join([some[0]] * n)}", str(n)
    if turn == 8:
        said = pick(rng, _short())
        return (f"Spell {said}", " ".join(said)) if rng.integers(2) else (f"{' '.join(said)} makes", said)
    if turn == 9:
        names, kinds = (pic.sheet("icons").labels[k] for k in ("names", "kinds"))
        i = int(rng.integers(len(names)))
        return f"What kind is {names[i]}?", kinds[i]
    if turn == 10:
        i = int(rng.integers(len(some)))
        return f"{' '.join(some)} Which word is number {i + 1}?", some[i]
    said = " ".join(pick(rng, NUMBERS[:10]) for _ in range(4)) if rng.integers(2) else pick(rng, NUMBERS)
    return f"Repeat: {said}", said
