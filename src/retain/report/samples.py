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

from retain.data.picture import tried
from retain.report.figures import some
from retain.report.load import ZERO_SHOT, Group, Record, Row, Run

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

    Of a task, samples with different right answers are preferred. `answers` holds every stage since the task
    was learned.
    """
    rows = run.learned
    found: list[tuple[float, list[Sample]]] = []
    for i, row in enumerate(rows[:-1]):
        before, after = row.predictions(row.task), by_id(rows[-1].predictions(row.task))
        pairs = [(old, after[old["id"]]) for old in before if old["id"] in after]
        lost = [(old, new) for old, new in pairs if old["score"] - new["score"] >= 50]
        if lost:
            chosen = _varied(
                [old for old, _ in sorted(lost, key=lambda p: p[1]["score"] - p[0]["score"])], run, per_task
            )
            drop = sum(old["score"] - new["score"] for old, new in pairs) / len(pairs)
            found.append((drop, [_over_time(run, row.task, record, rows[i:]) for record in chosen]))
    found.sort(key=lambda entry: -entry[0])
    return [sample for _, samples in found[:tasks] for sample in samples]


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
    mixes = {task: [r["mix"] for r in row.predictions(task) if r.get("mix")] for task in run.tasks}
    names = list(dict.fromkeys(name for of_task in mixes.values() for mix in of_task for name in mix))
    if len(names) < 2:
        return None
    weights = {
        task: [sum(float(mix.get(name, 0.0)) for mix in of_task) / len(of_task) for name in names]
        for task, of_task in mixes.items()
        if of_task
    }
    return Routing(tuple(names), weights)


def data_uri(path: Path) -> str:
    """An image file inline; one that is large for a thumbnail (a photograph as PNG) as a JPEG."""
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
    seen: set[tuple[str, ...]] = set()
    for record in order:
        key = tuple(map(str, record["references"]))
        if key not in seen:
            seen.add(key)
            fresh.append(record)
    return [*fresh, *(record for record in order if record not in fresh)][:n] if fresh else []


def _over_time(run: Run, task: str, record: Record, rows: Sequence[Row]) -> Sample:
    answers = []
    for row in some(rows, STAGES):
        found = by_id(row.predictions(task)).get(str(record["id"]))
        if found is not None:
            answers.append(_answer("zero-shot" if row.task == ZERO_SHOT else row.task, found))
    return _sample(run, task, record, tuple(answers))


def _answer(when: str, record: Record) -> Answer:
    return Answer(when, short(str(record["prediction"])), float(record["score"]))


def _sample(run: Run, task: str, record: Record, answers: tuple[Answer, ...]) -> Sample:
    picture = run.thumbnail(record)
    references = tuple(short(str(r)) for r in record["references"][:MANY])
    return Sample(task, short(str(record["question"])), references, data_uri(picture) if picture else None, answers)
