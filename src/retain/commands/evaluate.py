"""Score the saved answers of a run again, also with another scorer. Nothing is generated or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from retain import config
from retain.assemble import build_stream
from retain.metrics import score
from retain.run.continual import DATA, changes
from retain.run.evaluate import score as score_answers
from retain.run.store import Row, RunDir
from retain.stream import Task
from retain.types import RetainError


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix: the mean that was stored, and the mean now."""

    after: str
    task: str
    n: int
    stored: float
    now: float
    scorer: str
    compat: float | None
    changed: str = ""  # what of the task is no more as the run had it


def rescore(
    folder: Path, tasks: Sequence[str] = (), after: int | None = None, scorer: str | None = None
) -> list[Cell]:
    """Every finished cell of the run, or only some tasks and one row.

    `now` is by the data, the answer key and the scorers as they are now; a cell says where they changed since.
    """
    run = RunDir.read(folder)
    stream = build_stream(config.parse(run.config, run.path / "config.yaml"))
    changed = changes(run, stream)
    chosen = [stream.named(name) for name in tasks] or list(stream.all)
    if scorer:
        chosen = [replace(task, score=score(scorer), compat=None) for task in chosen]
    rows = [row for row in run.rows() if row.done and after in (None, row.index)]
    if not rows:
        done = [row.index for row in run.rows() if row.done]
        raise RetainError(f"{folder}: no finished row {'' if after is None else after}; there are {done}")
    return [_cell(row, task, changed.get(task.name, "")) for row in rows for task in chosen]


def _cell(row: Row, task: Task, changed: str) -> Cell:
    path = row.predictions(task.name)
    saved = {line["id"]: line for line in row.answers(task.name)}
    missing = [e.id for e in task.test if e.id not in saved]
    if missing:
        raise RetainError(
            f"{path}: no answer for the test row {missing[0]!r}; the data changed since the run"
        )
    lines = [saved[e.id] for e in task.test]
    if not changed and any(
        line.get("references") != list(e.targets) for line, e in zip(lines, task.test, strict=True)
    ):
        changed = DATA
    scored = score_answers(task, [line["prediction"] for line in lines])
    compat = [p.compat for p in scored if p.compat is not None]
    return Cell(
        after=row.name,
        task=task.name,
        n=len(scored),
        stored=_mean([line["score"] for line in lines]),
        now=_mean([p.score for p in scored]),
        scorer=task.score.name,
        compat=_mean(compat) if compat else None,
        changed=changed,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cell_rows(cells: Sequence[Cell]) -> list[list[str]]:
    """A table as text; with a last column where the answer key is another than the run's."""
    head = ["after", "task", "samples", "scorer", "stored", "now", "compat"]
    told = any(c.changed for c in cells)
    body = [
        [
            c.after,
            c.task,
            str(c.n),
            c.scorer,
            f"{c.stored:.2f}",
            f"{c.now:.2f}",
            "" if c.compat is None else f"{c.compat:.2f}",
            *([c.changed and f"{c.changed} changed"] if told else []),
        ]
        for c in cells
    ]
    return [[*head, *(["since the run"] if told else [])], *body]
