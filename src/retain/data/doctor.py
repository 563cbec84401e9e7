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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as PILImage

from retain.stream import Stream, Task
from retain.types import Example, Examples, ImageSource

LONG_QUESTION, LONG_ANSWER = 4000, 2000  # characters: about a thousand tokens
RATIONALE = 400  # characters of a question beyond which an answer inside it is likely to be explained there
SHOWN = 5  # findings of one kind and split that are listed one by one

Level = Literal["error", "warning"]


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
    pixels = _Pixels()
    found = [f for task in tasks for f in _task(task, pixels)]
    found += _across(tasks, pixels)
    found += _balance(tasks)
    return sorted(found, key=lambda f: (f.level != "error", f.task, f.split, f.field, f.row))


def finding_rows(findings: Sequence[Finding]) -> list[list[str]]:
    """A table as text; each kind is listed a few times per split, then counted."""
    shown = _shortened(findings)
    body = [[f.level, f.task, f.split, str(f.row or ""), f.id, f.field, f.message] for f in shown]
    return [["level", "task", "split", "row", "id", "field", "what"], *body]


def _splits(task: Task) -> dict[str, Examples]:
    return {"train": task.train, "valid": task.valid, "test": task.test}


class _Pixels:
    """Decodes every image once and remembers the hash of its pixels, or what is wrong with it."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, str]] = {}

    def __call__(self, image: ImageSource) -> tuple[str, str]:
        """(hash, problem): one of the two is empty."""
        if not isinstance(image, Path):
            return self._read(image)
        key = str(image)
        if key not in self.known:
            self.known[key] = self._read(image)
        return self.known[key]

    def _read(self, image: ImageSource) -> tuple[str, str]:
        try:
            if isinstance(image, Path):
                with PILImage.open(image) as opened:
                    array = np.asarray(opened.convert("RGB"))
            elif isinstance(image, PILImage.Image):
                array = np.asarray(image.convert("RGB"))
            else:
                array = np.asarray(PILImage.fromarray(image).convert("RGB"))
        except (OSError, ValueError, SyntaxError, TypeError, PILImage.DecompressionBombError) as error:
            return "", str(error)
        return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest(), ""


# -- one task --------------------------------------------------------------------------------------------


def _task(task: Task, pixels: _Pixels) -> Iterator[Finding]:
    for split, examples in _splits(task).items():
        if not examples and split != "valid" and not (split == "train" and task.test):
            yield Finding("error", task.name, split, 0, "", "", "the split is empty")
        first_id: dict[str, int] = {}
        first_content: dict[str, int] = {}
        for row, e in enumerate(examples, 1):

            def finding(
                level: Level, field: str, message: str, split: str = split, row: int = row, e: Example = e
            ) -> Finding:
                return Finding(level, task.name, split, row, e.id, field, message)

            yield from _example(e, finding, pixels)
            yield from _scorable(task.score.name, e, finding)
            if e.id in first_id:
                yield finding("error", "id", f"the id of row {first_id[e.id]} again")
            first_id.setdefault(e.id, row)
            content = _content(e, pixels)
            if content in first_content:
                yield finding(
                    "warning", "question", f"the same images and question as row {first_content[content]}"
                )
            first_content.setdefault(content, row)


Report = Callable[[Level, str, str], Finding]


def _example(e: Example, finding: Report, pixels: _Pixels) -> Iterator[Finding]:
    """What one row shows on its own."""
    if not e.id.strip():
        yield finding("error", "id", "the id is empty")
    for i, image in enumerate(e.images):
        _, problem = pixels(image)
        if problem:
            name = image.name if isinstance(image, Path) else f"image {i + 1}"
            yield finding("error", "image", f"does not decode: {name}: {problem}")
    if not e.question.strip():
        yield finding("error", "question", "the question is empty")
    if not any(t.strip() for t in e.targets):
        yield finding("error", "answer", "the answer is empty: nothing can be learned from it or score on it")
    if len(e.question) > LONG_QUESTION:
        yield finding(
            "warning", "question", f"{len(e.question):,} characters: may not fit the model's context"
        )
    if len(e.answer) > LONG_ANSWER:
        yield finding("warning", "answer", f"{len(e.answer):,} characters")
    yield from _given_away(e, finding)


OPTIONS = re.compile(
    r"^\s*(?:[(\[]?[A-Za-z0-9][)\].:]\s+\S.*|[-*•]\s+\S.*|(?:options?|choices?|answers?|choose|pick|select)\b.*[:?].*)$",
    re.IGNORECASE,
)
LIST = re.compile(
    r"(?:\bfrom|\bof|:|\()\s*(?:[\w' -]+\s*[,/;|]\s*)+(?:or\s+|and\s+)?[\w' -]+|\b[\w' -]+\s+or\s+[\w' -]+",
    re.IGNORECASE,
)


def _given_away(e: Example, finding: Report) -> Iterator[Finding]:
    """The answer's own text in the question, outside of a list of options."""
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
LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]?(?:\s+.*)?")


def _scorable(scorer: str, e: Example, finding: Report) -> Iterator[Finding]:
    """Whether a perfect answer could score: each scorer needs something of the reference."""
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


def _across(tasks: Sequence[Task], pixels: _Pixels) -> Iterator[Finding]:
    """Test rows that were, or will be, trained on: the same images and question; the same image alone."""
    contents: dict[str, str] = {}
    images: dict[str, str] = {}
    for task in tasks:
        for split in ("train", "valid"):
            for row, e in enumerate(_splits(task)[split], 1):
                place = f"{task.name}, {split}, row {row}"
                contents.setdefault(_content(e, pixels), place)
                for image in _hashes(e, pixels):
                    images.setdefault(image, place)
    for task in tasks:
        for row, e in enumerate(task.test, 1):
            place = contents.get(_content(e, pixels), "")
            if place:
                yield Finding(
                    "error",
                    task.name,
                    "test",
                    row,
                    e.id,
                    "question",
                    f"leak: images and question are in {place}",
                )
                continue
            shared = next((images[h] for h in _hashes(e, pixels) if h in images), "")
            if shared:
                yield Finding(
                    "warning", task.name, "test", row, e.id, "image", f"the image is also in {shared}"
                )


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


def _content(e: Example, pixels: _Pixels) -> str:
    turns = [f"{m.role}:{_plain(m.text)}" for m in e.prompt]
    return hashlib.sha256("\n".join([*_hashes(e, pixels), *turns]).encode()).hexdigest()


def _hashes(e: Example, pixels: _Pixels) -> list[str]:
    """Hashes of the images that decode."""
    return [found for image in e.images if (found := pixels(image)[0])]


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
