"""The data doctor: what is wrong with a stream before it costs a night of training.

Errors make a number meaningless (an image that does not decode, an empty reference, a test row that is in the
training data, a scorer that the answers cannot satisfy); warnings are worth a look. Images are compared by
their pixels, texts without case and spacing.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from retain.data import picture
from retain.stream import Stream, Task
from retain.types import Example, ImageSource

LONG_QUESTION, LONG_ANSWER = 4000, 2000  # characters: about a thousand tokens
RATIONALE = 400  # characters of a question beyond which an answer inside it is likely to be explained there
SHOWN = 5  # findings of one kind and split that are listed one by one

Level = Literal["error", "warning"]
_Seen = tuple[str, str, int]  # an image's hash, or what is wrong with it; its frames


@dataclass(frozen=True)
class Finding:
    """One thing to look at. `row` counts from 1 within its split."""

    level: Level
    task: str
    split: str
    row: int
    id: str
    field: str
    message: str


def diagnose(stream: Stream | Sequence[Task]) -> list[Finding]:
    """All findings over all tasks, errors first."""
    tasks = stream.all if isinstance(stream, Stream) else tuple(stream)
    rows = list(_rows(tasks))
    found = [f for row in rows for f in (*_example(row), *_scorable(row))]
    found += [*_empty(tasks), *_repeated(rows), *_leaks(rows), *_balance(tasks)]
    return sorted(found, key=lambda f: (f.level != "error", f.task, f.split, f.field, f.row))


def finding_rows(findings: Sequence[Finding]) -> list[list[str]]:
    """A table as text; each kind is listed a few times per split, then counted."""
    shown = _shortened(findings)
    body = [[f.level, f.task, f.split, str(f.row or ""), f.id, f.field, f.message] for f in shown]
    return [["level", "task", "split", "row", "id", "field", "what"], *body]


@dataclass(frozen=True, eq=False)
class _Row:
    """One example where it stands, its images decoded once: a hash of each, or what is wrong with it."""

    task: Task
    split: str
    number: int
    example: Example
    images: tuple[str, ...]
    broken: tuple[str, ...]
    moving: tuple[str, ...]  # images of several frames or pages, and how many
    content: str  # a hash of images and prompt

    def finding(self, level: Level, field: str, message: str) -> Finding:
        return Finding(level, self.task.name, self.split, self.number, self.example.id, field, message)

    @property
    def place(self) -> str:
        return f"{self.task.name}, {self.split}, row {self.number}"


def _rows(tasks: Sequence[Task]) -> Iterator[_Row]:
    known: dict[Path, _Seen] = {}  # a file that many rows show is decoded once
    for task in tasks:
        for split, examples in (("train", task.train), ("valid", task.valid), ("test", task.test)):
            for number, e in enumerate(examples, 1):
                read = [_decoded(image, known) for image in e.images]
                names = [
                    image.name if isinstance(image, Path) else f"image {i}"
                    for i, image in enumerate(e.images, 1)
                ]
                hashes = tuple(found for found, _, _ in read if found)
                broken = tuple(f"{name}: {p}" for name, (_, p, _) in zip(names, read, strict=True) if p)
                moving = tuple(f"{name}: {n}" for name, (_, _, n) in zip(names, read, strict=True) if n > 1)
                turns = [f"{m.role}:{_plain(m.text)}" for m in e.prompt]
                content = hashlib.sha256("\n".join([*hashes, *broken, *turns]).encode()).hexdigest()
                yield _Row(task, split, number, e, hashes, broken, moving, content)


def _decoded(image: ImageSource, known: dict[Path, _Seen]) -> _Seen:
    if not isinstance(image, Path):
        return _decode(image)
    if image not in known:
        known[image] = _decode(image)
    return known[image]


def _decode(image: ImageSource) -> _Seen:
    """Opened exactly as training opens it."""
    shown, problem = picture.tried(image)
    if shown is None:
        return "", problem, 0
    array = np.asarray(shown)
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest(), "", picture.frames(image)


# -- one row ---------------------------------------------------------------------------------------------


def _example(row: _Row) -> Iterator[Finding]:
    """What one row shows on its own."""
    e, finding = row.example, row.finding
    if not e.id.strip():
        yield finding("error", "id", "the id is empty")
    for problem in row.broken:
        yield finding("error", "image", f"does not decode: {problem}")
    for several in row.moving:
        yield finding("warning", "image", f"only the first frame or page is shown: {several} are there")
    if not e.question.strip():
        yield finding("error", "question", "the question is empty")
    if not any(t.strip() for t in e.targets):
        yield finding("error", "answer", "the answer is empty: nothing can be learned from it or score on it")
    if len(e.question) > LONG_QUESTION:
        text = f"{len(e.question):,} characters: may not fit the model's context"
        yield finding("warning", "question", text)
    if len(e.answer) > LONG_ANSWER:
        yield finding("warning", "answer", f"{len(e.answer):,} characters")
    yield from _given_away(row)


OPTIONS = re.compile(
    r"^\s*(?:[(\[]?[A-Za-z0-9][)\].:]\s+\S.*|[-*•]\s+\S.*|(?:options?|choices?|answers?|choose|pick|select)\b.*[:?].*)$",
    re.IGNORECASE,
)
LIST = re.compile(
    r"(?:\bfrom|\bof|:|\()\s*(?:[\w' -]+\s*[,/;|]\s*)+(?:or\s+|and\s+)?[\w' -]+|\b[\w' -]+\s+or\s+[\w' -]+",
    re.IGNORECASE,
)


def _given_away(row: _Row) -> Iterator[Finding]:
    """The answer's own text in the question, outside of a list of options."""
    e, finding = row.example, row.finding
    answer = _plain(e.answer)
    if len(answer) < 3 or answer in {"yes", "no"}:
        return
    listed = {_plain(str(o)) for o in e.meta.get("options", ())}
    lines = [line for line in e.question.splitlines() if not OPTIONS.match(line)]
    text = _plain(LIST.sub(" ", "\n".join(lines)))
    if answer in listed or not re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text):
        return
    if len(e.question) >= RATIONALE:
        yield finding(
            "error",
            "question",
            f"the answer {_cut(e.answer)} is given away in a text of {len(e.question)} characters",
        )
    else:
        yield finding("warning", "question", f"the answer {_cut(e.answer)} occurs in the question")


# -- scorer and answer -----------------------------------------------------------------------------------

BOX = re.compile(r"(?:-?\d+(?:\.\d+)?[^\d.-]+){3}-?\d+(?:\.\d+)?")
NUMBER = re.compile(r"\d")
LETTER = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:]+\s*.*)?", re.DOTALL)


def _scorable(row: _Row) -> Iterator[Finding]:
    """Whether a perfect answer could score: each scorer needs something of the reference."""
    e, finding, scorer = row.example, row.finding, row.task.score.name
    answers = [t for t in e.targets if t.strip()]
    if not answers:
        return
    if scorer == "iou" and "box" not in e.meta and not any(BOX.search(a) for a in answers):
        yield finding(
            "error", "answer", f"score 'iou' needs a box of four numbers; {_cut(answers[0])} has none"
        )
    elif scorer == "number" and not any(NUMBER.search(a) for a in answers):
        yield finding("error", "answer", f"score 'number' needs a number; {_cut(answers[0])} has none")
    elif scorer == "choice":
        options = [_plain(str(o)) for o in e.meta.get("options", ())]
        letters = [m[1].upper() for a in answers if (m := LETTER.fullmatch(a.strip()))]
        if not letters and not any(_plain(a) in options for a in answers):
            yield finding(
                "error",
                "answer",
                f"score 'choice' needs an option letter or an option; {_cut(answers[0])} is none",
            )
        elif options and letters and all(ord(letter) - 65 >= len(options) for letter in letters):
            yield finding(
                "error", "options", f"the answer {letters[0]!r} is beyond the {len(options)} options"
            )
        elif not options:
            yield finding("warning", "options", "no options are given: any letter is taken as a valid answer")
    elif scorer == "exact" and all(len(a.split()) > 12 for a in answers):
        yield finding(
            "warning",
            "answer",
            f"score 'exact' on an answer of {len(answers[0].split())} words: hardly ever met",
        )


# -- between splits and tasks ----------------------------------------------------------------------------


def _empty(tasks: Sequence[Task]) -> Iterator[Finding]:
    for task in tasks:
        if not task.test:
            yield Finding("error", task.name, "test", 0, "", "", "the split is empty")


def _repeated(rows: Sequence[_Row]) -> Iterator[Finding]:
    """Within a split: the same id, or the same images and question, a second time."""
    ids: dict[tuple[str, str, str], int] = {}
    contents: dict[tuple[str, str, str], int] = {}
    for row in rows:
        first = ids.setdefault((row.task.name, row.split, row.example.id), row.number)
        if first != row.number:
            yield row.finding("error", "id", f"the id of row {first} again")
        first = contents.setdefault((row.task.name, row.split, row.content), row.number)
        if first != row.number:
            yield row.finding("warning", "question", f"the same images and question as row {first}")


def _leaks(rows: Sequence[_Row]) -> Iterator[Finding]:
    """Test rows that were, or will be, trained on: the same images and question; the same image alone."""
    contents: dict[str, str] = {}
    images: dict[str, str] = {}
    for row in rows:
        if row.split != "test":
            contents.setdefault(row.content, row.place)
            for image in row.images:
                images.setdefault(image, row.place)
    for row in rows:
        if row.split != "test":
            continue
        if row.content in contents:
            yield row.finding(
                "error", "question", f"leak: images and question are in {contents[row.content]}"
            )
        elif shared := next((images[h] for h in row.images if h in images), ""):
            yield row.finding("warning", "image", f"the image is also in {shared}")


def _balance(tasks: Sequence[Task]) -> Iterator[Finding]:
    """Tasks far from the median size, and tasks that one answer nearly fills."""
    sizes = [len(t.train) for t in tasks if len(t.train)]
    middle = statistics.median(sizes) if sizes else 0
    for task in tasks:
        n = len(task.train)
        if n and (n * 5 < middle or n > 5 * middle):
            text = f"{n} rows, the median task has {middle:.0f}: out of balance"
            yield Finding("warning", task.name, "train", 0, "", "", text)
        answers = [_plain(e.answer) for e in task.test]
        if len(answers) >= 20:
            most = max(set(answers), key=answers.count)
            share = answers.count(most) / len(answers)
            if share > 0.8:
                text = f"{share:.0%} of the answers are {_cut(most)}: always saying it scores as much"
                yield Finding("warning", task.name, "test", 0, "", "answer", text)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


def _shortened(findings: Sequence[Finding]) -> list[Finding]:
    """At most `SHOWN` of one kind (place and first words of the message), then a line with the count."""
    kinds: dict[tuple[str, ...], list[Finding]] = defaultdict(list)
    for f in findings:
        kinds[f.level, f.task, f.split, f.field, re.sub(r"[\d'\":(].*", "", f.message)].append(f)
    out: list[Finding] = []
    for group in kinds.values():
        out += group[:SHOWN]
        if len(group) > SHOWN:
            last = group[SHOWN]
            text = f"… and {len(group) - SHOWN} rows more, such as row {last.row}"
            out.append(Finding(last.level, last.task, last.split, 0, "", last.field, text))
    return out
