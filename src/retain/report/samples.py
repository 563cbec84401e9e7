"""Concrete samples: what a run knew and lost, what several methods say to one question, how samples are
routed.

Numbers say how much was forgotten, samples say what. The choice is fixed: largest drop first, samples with a
picture first, then the order of the test split; nothing is drawn.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from retain.data.picture import broken, tried
from retain.report.figures import some
from retain.report.load import ZERO_SHOT, Group, Record, Row, Run
from retain.types import RetainError

SIDE, LARGE = 160, 1 << 13
"""A picture in a report: its longer side in pixels, and the bytes of a file from which it is made smaller."""

LONG, MANY, STAGES = 600, 8, 16
"""Characters of a text on a card, references, and moments of a sample's history."""


@dataclass(frozen=True)
class Answer:
    """What the model said at one moment (a stage, or a method's name) and what it scored."""

    when: str
    text: str
    score: float

    @property
    def right(self) -> bool:
        """At least half the points."""
        return self.score >= 50


@dataclass(frozen=True)
class Sample:
    """A test sample with its answers over time, or over methods."""

    task: str
    question: str
    references: tuple[str, ...]
    image: str | None  # a data: URI
    answers: tuple[Answer, ...]


def forgotten(run: Run, per_task: int = 2, tasks: int = 8) -> list[Sample]:
    """Samples answered right after their task was learned and wrong at the end: tasks that lost most come
    first.

    Of a task, samples with different right answers are preferred. `answers` holds the stages since the task
    was learned, at most `STAGES` of them.
    """
    rows = run.learned
    found: list[tuple[float, int, list[Record]]] = []
    for i, row in enumerate(rows[:-1]):
        after = {str(r["id"]): float(r["score"]) for r in rows[-1].each(row.task)}
        lost, drops = list[Record](), list[float]()
        for record in row.each(row.task):
            if (now := after.get(str(record["id"]))) is not None:
                drops.append(record["score"] - now)
                if drops[-1] >= 50:
                    lost.append(record)
        if lost:
            lost.sort(key=lambda r: after[str(r["id"])] - r["score"])
            drop = sum(drops) / len(drops)
            found.append((drop, i, _varied(lost, run, per_task)))
    found.sort(key=lambda entry: -entry[0])
    return [s for _, i, chosen in found[:tasks] for s in _over_time(run, rows[i].task, chosen, rows[i:])]


def side_by_side(groups: Sequence[Group], limit: int = 8) -> list[Sample]:
    """Test samples on which the methods' final models differ, one per task in turn; one run speaks for each
    group.

    All runs must have been tested on the sample; the first seed that has a complete row speaks.
    """
    speakers = [(group.label, run) for group in groups if (run := _speaker(group)) is not None]
    if len(speakers) < 2:
        return []
    first = speakers[0][1]
    out: list[Sample] = []
    for task in first.tasks:
        finals = [(label, by_id(run.rows[-1].predictions(task))) for label, run in speakers]
        ids = [i for i in finals[0][1] if all(i in final for _, final in finals)]
        differing = [i for i in ids if len({final[i]["score"] >= 50 for _, final in finals}) == 2]
        # first those where the first method (the baseline, usually) is wrong and most others are right
        differing.sort(key=lambda i: (finals[0][1][i]["score"] >= 50, -sum(f[i]["score"] for _, f in finals)))
        for record in _varied([finals[0][1][i] for i in differing], first, 1):
            answers = tuple(_answer(label, final[record["id"]]) for label, final in finals)
            out.append(_sample(first, task, record, answers))
    return out[:limit]


@dataclass(frozen=True)
class Routing:
    """Mean weight of every adapter on every task, at the end: `weights[task][k]` belongs to `adapters[k]`."""

    adapters: tuple[str, ...]
    weights: dict[str, list[float]]


def routing(run: Run) -> Routing | None:
    """How the final model routes the tasks; None where nothing is routed: one adapter, or no record."""
    if not run.learned:
        return None
    row = run.learned[-1]  # the zero-shot row has no adapter
    sums: dict[str, dict[str, float]] = {}
    names: dict[str, None] = {}
    for task in run.tasks:
        n, of_task = 0, dict[str, float]()
        for record in row.each(task):
            for name, weight in (record.get("mix") or {}).items():
                of_task[name] = of_task.get(name, 0.0) + float(weight)
                names[name] = None
            n += bool(record.get("mix"))
        if n:
            sums[task] = {name: total / n for name, total in of_task.items()}
    if len(names) < 2:
        return None
    weights = {task: [of_task.get(name, 0.0) for name in names] for task, of_task in sums.items()}
    return Routing(tuple(names), weights)


def data_uri(path: Path) -> str:
    """An image file inline; one that is large for a thumbnail (a photograph as PNG) as a JPEG.

    RetainError where it is not whole: PNG's own checksums are compared.
    """
    if wrong := broken(path):
        raise RetainError(f"cannot read {path}: {wrong}")
    kind = {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}.get(path.suffix.lower(), "png")
    raw = path.read_bytes()
    if len(raw) > LARGE and (image := tried(path)[0]) is not None:
        image.thumbnail((SIDE, SIDE))
        smaller = io.BytesIO()
        image.save(smaller, "jpeg", quality=80)
        if smaller.tell() < len(raw):
            kind, raw = "jpeg", smaller.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def short(text: str) -> str:
    """A text as a card shows it."""
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def by_id(records: Sequence[Record]) -> dict[str, Record]:
    """Predictions by sample."""
    return {str(record["id"]): record for record in records}


def _speaker(group: Group) -> Run | None:
    return next((run for run in group.runs if run.done and run.rows), None)


def _varied(records: Sequence[Record], run: Run, n: int) -> list[Record]:
    """The first n records, those with a picture first, avoiding a right answer or a question seen already."""
    order = sorted(records, key=lambda record: run.thumbnail(record) is None)
    fresh: list[Record] = []
    again: list[Record] = []  # as many as could be needed: the records may be very many
    seen: set[tuple[str, ...]] = set()
    for record in order:
        key = tuple(map(str, record["references"]))
        into = again if key in seen else fresh
        if len(into) < n:
            into.append(record)
        seen.add(key)
    return [*fresh, *again][:n]


def _over_time(run: Run, task: str, chosen: Sequence[Record], rows: Sequence[Row]) -> list[Sample]:
    """Samples of one task with what was said to them in some of the rows; every file is read once."""
    ids = {str(record["id"]) for record in chosen}
    answers: dict[str, list[Answer]] = {i: [] for i in ids}
    for row in some(rows, STAGES):
        when = "zero-shot" if row.task == ZERO_SHOT else row.task
        for record in row.each(task):
            if str(record["id"]) in ids:
                answers[str(record["id"])].append(_answer(when, record))
    return [_sample(run, task, record, tuple(answers[str(record["id"])])) for record in chosen]


def _answer(when: str, record: Record) -> Answer:
    return Answer(when, short(str(record["prediction"])), float(record["score"]))


def _sample(run: Run, task: str, record: Record, answers: tuple[Answer, ...]) -> Sample:
    picture = run.thumbnail(record)
    references = tuple(short(str(r)) for r in record["references"][:MANY])
    return Sample(
        task, short(str(record["question"])), references, data_uri(picture) if picture else None, answers
    )
