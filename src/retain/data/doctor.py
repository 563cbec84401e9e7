"""The data doctor: what is wrong with a stream before it costs a night of training.

Errors make a number meaningless (an image that does not decode, an empty reference, a test row that is in the
training data, a reference that its own scorer gives nothing); warnings are worth a look. Images are compared by
their pixels, texts without case and spacing. Every reference is scored as if it were the answer, cut to
`max_new_tokens` where a `Reader` is at hand: what gets less than full marks is told. A `Reader` is what the doctor
needs of a model: its processor, without weights.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from retain.data import picture
from retain.data.marks import Marks, best_marks, cut_marks, some
from retain.stream import Doubt, Stream, Task
from retain.types import Example, Examples, ImageSource, RetainError

LONG_QUESTION, LONG_ANSWER = 4000, 2000  # characters: about a thousand tokens
RATIONALE = 400  # characters of a question beyond which an answer inside it is likely to be explained there
SHOWN = 5  # findings of one kind and split that are listed one by one
MEASURED = 96  # rows of a split that are measured by the model's processor, unless it has no more
EXTREMES = 8  # of a larger split: so many of the longest texts, and of the narrowest pictures, are among them
LOOKED_AT = 2000  # rows whose pictures' shapes are read to find those

Level = Literal["error", "warning"]
_Seen = tuple[str, str, int]  # an image's hash, or what is wrong with it; its frames


@dataclass(frozen=True)
class Lengths:
    """Tokens of one example: its prompt without the images' tokens, those, and its answer without the end."""

    prompt: int
    image: int
    answer: int


class Reader(Protocol):
    """A model's processor, as far as the doctor needs one."""

    def measure(self, example: Example) -> Lengths:
        """Its tokens. RetainError where the processor refuses the example."""

    def cut(self, text: str, n_tokens: int) -> str:
        """What is left of an answer that may have so many tokens."""

    def remarks(self, example: Example) -> Iterable[str]:
        """What the model will not see of an example as its author meant it (a picture whose edges are cropped)."""


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


@dataclass(frozen=True)
class Checked:
    """One task, looked at: what scoring its references gave on the test split, and the tokens of a sample of rows."""

    task: Task
    marks: Marks | None  # of the test split; None where it cannot be scored
    compat: Marks | None
    lengths: tuple[Lengths, ...]


@dataclass(frozen=True)
class Examination:
    """All findings, errors first, and what was measured of each task on the way."""

    findings: list[Finding]
    tasks: tuple[Checked, ...]


def diagnose(stream: Stream | Sequence[Task], reader: Reader | None = None) -> list[Finding]:
    """All findings over all tasks, errors first."""
    return examine(stream, reader).findings


def examine(stream: Stream | Sequence[Task], reader: Reader | None = None) -> Examination:
    """Everything there is to find, with or without a model's processor."""
    tasks = stream.all if isinstance(stream, Stream) else tuple(stream)
    rows = list(_rows(tasks))
    found = [f for row in rows for f in _example(row)]
    found += [*_empty(tasks), *_repeated(rows), *_leaks(rows), *_balance(tasks)]
    checked = []
    for task in tasks:
        of_splits = [_scored(task, split, examples, reader, found) for split, examples in _splits(task)]
        lengths = tuple(_measured(task, reader, found)) if reader else ()
        checked.append(Checked(task, *of_splits[-1], lengths))
    findings = sorted(found, key=lambda f: (f.level != "error", f.task, f.split, f.field, f.row))
    return Examination(findings, tuple(checked))


def finding_rows(findings: Sequence[Finding]) -> list[list[str]]:
    """A table as text; each kind is listed a few times per split, then counted."""
    shown = _shortened(findings)
    body = [[f.level, f.task, f.split, str(f.row or ""), f.id, f.field, f.message] for f in shown]
    return [["level", "task", "split", "row", "id", "field", "what"], *body]


def _splits(task: Task) -> tuple[tuple[str, Examples], ...]:
    return ("train", task.train), ("valid", task.valid), ("test", task.test)


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
        for split, examples in _splits(task):
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
    r"(?:\bfrom|\bof|:|\()\s*(?:[\w' -]{1,200}\s*[,/;|]\s*)+(?:or\s+|and\s+)?[\w' -]+"
    r"|\b[\w' -]{1,200}\s+or\s+[\w' -]+",
    re.IGNORECASE,
)
READ = 100_000  # characters of a question that are searched for the answer


def _given_away(row: _Row) -> Iterator[Finding]:
    """The answer's own text in the question, outside of a list of options."""
    e, finding = row.example, row.finding
    answer = _plain(e.answer)
    if len(answer) < 3 or answer in {"yes", "no"}:
        return
    listed = {_plain(str(o)) for o in e.meta.get("options", ())}
    lines = [line for line in e.question[:READ].splitlines() if not OPTIONS.match(line)]
    text = _plain(LIST.sub(" ", "\n".join(lines)))
    if answer in listed or not _as_words(answer, text):
        return
    if len(e.question) >= RATIONALE:
        yield finding(
            "error",
            "question",
            f"the answer {_cut(e.answer)} is given away in a text of {len(e.question)} characters",
        )
    else:
        yield finding("warning", "question", f"the answer {_cut(e.answer)} occurs in the question")


def _as_words(answer: str, text: str) -> bool:
    """Whether the answer stands in a text with no letter or digit beside it."""
    at = text.find(answer)
    while at >= 0:
        beside = text[at - 1 : at] + text[at + len(answer) : at + len(answer) + 1]
        if not re.search(r"\w", beside):
            return True
        at = text.find(answer, at + 1)
    return False


# -- references and scorers ------------------------------------------------------------------------------


def _scored(
    task: Task, split: str, examples: Examples, reader: Reader | None, found: list[Finding]
) -> tuple[Marks | None, Marks | None]:
    """Score every reference as if it were the answer; findings are added. Marks by the scorer, and by the released one.

    The released scorer is asked of what is evaluated only: training rows often have one answer of the ten.
    """
    if not examples:
        return None, None

    def tell(level: Level, row: int | None, field: str, message: str) -> None:
        ident = "" if row is None else examples[row].id
        found.append(Finding(level, task.name, split, 0 if row is None else row + 1, ident, field, message))

    known: set[int] = set()  # rows of which the scorer itself says why nothing can score
    for doubt in _doubts(task, examples, tell):
        tell(doubt.level, doubt.row, doubt.field, doubt.message)
        if doubt.level == "error" and doubt.row is not None:
            known.add(doubt.row)
    scorers = [
        ("answer", task.score),
        *([("compat", task.compat)] if task.compat and split != "train" else []),
    ]
    marks: list[Marks | None] = [None, None]
    for i, (field, score) in enumerate(scorers):
        try:
            whole = marks[i] = best_marks(score, examples)
            if reader is not None:
                marks[i] = cut_marks(
                    score, examples, whole, lambda text: reader.cut(text, task.max_new_tokens)
                )
        except RetainError as error:
            tell("error", None, field, f"score {score.name!r} cannot score this split: {error}")
            marks[i] = None
            continue
        _tell_marks(task, examples, field, score.name, whole, marks[i] or whole, known, tell)
    return marks[0], marks[1]


class _Tell(Protocol):
    def __call__(self, level: Level, row: int | None, field: str, message: str) -> None: ...


def _doubts(task: Task, examples: Examples, tell: _Tell) -> Iterable[Doubt]:
    """What the scorer itself says about the references; a scorer need not say anything."""
    ask = getattr(task.score, "doubts", None)
    try:
        return list(ask(examples)) if ask is not None else []
    except RetainError as error:
        tell("error", None, "answer", str(error))
        return []


def _tell_marks(
    task: Task,
    examples: Examples,
    field: str,
    name: str,
    whole: Marks,
    cut: Marks,
    known: set[int],
    tell: _Tell,
) -> None:
    """One finding for each row whose references get nothing, or only until they are cut; one for all that get less."""
    released = field == "compat"
    zero: Level = "warning" if released else "error"
    partial = []
    for row, (mark, text) in enumerate(zip(whole.best, whole.text, strict=True)):
        if not text or row in known:
            continue
        if mark <= 0:
            tell(zero, row, field, f"score {name!r} gives the reference {_cut(text)} itself 0 of 100")
        elif cut.best[row] < mark - 1e-9:
            left = f"cut to {_cut(cut.text[row])} it gets {cut.best[row]:.3g} of {mark:.3g} by {name!r}"
            level: Level = "error" if cut.best[row] <= 0 and not released else "warning"
            tell(
                level,
                row,
                "max_new_tokens",
                f"the reference has more than {task.max_new_tokens} tokens: {left}",
            )
        elif mark < 100 - 1e-9:
            partial.append(row)
    if partial:
        n, row = len(partial), partial[0]
        mean = statistics.fmean(whole.best[r] for r in partial)
        text = f"the best reference itself gets {mean:.1f} of 100 by {name!r} on average over {n} of {len(examples)} rows"
        tell("warning", row, field, f"{text}; here {_cut(whole.text[row])} gets {whole.best[row]:.1f}")


# -- the model's processor -------------------------------------------------------------------------------


def _measured(task: Task, reader: Reader, found: list[Finding]) -> Iterator[Lengths]:
    """Tokens of a sample of every split; what the processor refuses, or shows otherwise than meant, is a finding."""
    for split, examples in _splits(task):
        for i in sample(examples):
            e = examples[i]

            def tell(level: Level, message: str, split: str = split, i: int = i, e: Example = e) -> None:
                found.append(Finding(level, task.name, split, i + 1, e.id, "model", message))

            try:
                yield reader.measure(e)
                for remark in reader.remarks(e):
                    tell("warning", remark)
            except RetainError as error:
                tell("error", f"the model's processor refuses it: {error}")


def sample(examples: Examples) -> list[int]:
    """Rows that are measured: all of a small split, else some, the longest texts, the narrowest pictures."""
    n = len(examples)
    if n <= MEASURED:
        return list(range(n))
    drawn = set(some(range(n), MEASURED - 2 * EXTREMES))
    long = sorted(range(n), key=lambda i: -sum(len(m.text) for m in examples[i].messages))[:EXTREMES]
    looked = some(range(n), LOOKED_AT)
    narrow = sorted(looked, key=lambda i: -max(map(_narrowness, examples[i].images), default=0.0))[:EXTREMES]
    return sorted(drawn | set(long) | set(narrow))


def _narrowness(image: ImageSource) -> float:
    """The longer side over the shorter one, by the header alone; 0 for what cannot be opened."""
    if isinstance(image, Path):
        seen, _ = picture.looked_at(image)
        if seen is None:  # a broken picture is a finding of its own
            return 0.0
        w, h = seen.size
        seen.close()
    elif isinstance(image, np.ndarray):
        h, w = image.shape[:2]
    else:
        w, h = image.size
    return float(max(w, h) / max(1, min(w, h)))


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
        answers = Counter(_plain(e.answer) for e in task.test)
        if len(task.test) >= 20:
            most, count = answers.most_common(1)[0]
            share = count / len(task.test)
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
