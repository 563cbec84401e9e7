"""A run folder read back, finished or not: rows, predictions, budgets, events, config, environment.

Reading is tolerant where an interrupted run leaves holes (a cut line, a row without DONE, no matrix.json) and
strict where a file is simply wrong: then the error names it. Nothing here writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from retain.files import parse_json
from retain.metrics import AccuracyMatrix
from retain.run import records
from retain.run.continual import saved_matrix
from retain.run.store import TUNED, RunDir, safe
from retain.run.store import Row as RowDir
from retain.types import RetainError

ZERO_SHOT = "zero_shot"
NOT_THE_METHOD = frozenset({"seed", "out", "reuse", "track", "name"})
"""Keys of a config that do not make another experiment: runs that differ only here are seeds of one group."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One row of the matrix on disk: the state after learning `task` (`zero_shot`: before learning any)."""

    index: int
    task: str
    folder: RowDir
    budget: Record

    @property
    def done(self) -> bool:
        """Whether everything of this row was saved."""
        return self.folder.done

    @property
    def label(self) -> str:
        """The task, or the words for the row before any."""
        return "zero-shot" if self.task == ZERO_SHOT else self.task

    @cached_property
    def trained(self) -> frozenset[str]:
        """The adapters that this row's task trained; empty where that was not recorded."""
        file = self.folder.path / "fit.json"
        return (
            frozenset(records.read(file, records.Fit).get("trained", ())) if file.is_file() else frozenset()
        )

    def predictions(self, task: str) -> list[Record]:
        """The predictions on one task, in the order of its test split; empty where it was not evaluated."""
        return list(self.each(task))

    def each(self, task: str) -> Iterator[Record]:
        """The same, one after the other: a long file is not held."""
        return self.folder.each_answer(task) if self.folder.predictions(task).is_file() else iter(())


@dataclass(frozen=True)
class Run:
    """One run folder. `matrix` is None before the first row is complete."""

    path: Path
    name: str
    seed: int
    method: tuple[str, ...]
    config: Record
    environment: Record
    data: Record
    rows: tuple[Row, ...]
    matrix: AccuracyMatrix | None
    done: bool
    published: Record = field(default_factory=dict)  # a paper's table for this benchmark; empty: none

    @property
    def label(self) -> str:
        """The method in words, e.g. `lora + replay`; the run's name where no method is recorded."""
        return " + ".join(self.method) or self.name

    @property
    def tasks(self) -> list[str]:
        """All tasks that are evaluated: learned ones in their order, then the others."""
        return list(self.matrix.all_tasks) if self.matrix is not None else list(self.data)

    @property
    def learned(self) -> list[Row]:
        """Complete rows after a task, in order."""
        return [row for row in self.rows if row.done and row.task != ZERO_SHOT]

    @property
    def budget(self) -> Record:
        """The budget of the last complete row: cumulative over the run so far."""
        return next((row.budget for row in reversed(self.rows) if row.done and row.budget), {})

    @cached_property
    def events(self) -> list[Record]:
        """All events in order. A step that was repeated after a resume is kept once, as it was last."""
        path = self.path / "events.jsonl"
        records = read_events(path) if path.is_file() else []
        last = {_key(i, record): i for i, record in enumerate(records)}
        return [record for i, record in enumerate(records) if last[_key(i, record)] == i]

    @property
    def group_key(self) -> str:
        """Equal for runs that share everything but the seed (and where they were written)."""
        rest = {key: value for key, value in self.config.items() if key not in NOT_THE_METHOD}
        return json.dumps([list(self.method), rest], sort_keys=True, default=str)

    def thumbnail(self, record: Record) -> Path | None:
        """The test image of a prediction, where one was kept; never a path that leaves the run folder."""
        name = record.get("image")
        if not isinstance(name, str) or "\0" in name:
            return None
        path = (self.path / name).resolve()
        return path if path.is_relative_to(self.path.resolve()) and path.is_file() else None


@dataclass(frozen=True)
class Group:
    """Runs of one method and config, one per seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order of the runs."""
        return [run.seed for run in self.runs]


def load_run(path: Path) -> Run:
    """One run folder. RetainError: not a run folder (names what is missing), another format, broken JSON."""
    head = _head(path)
    config = head.get("config", {})
    data = records.read_table(path / "data.json", records.Data) if (path / "data.json").is_file() else {}
    run = RunDir.read(path)
    whole = saved_matrix(run) if (path / "matrix.json").is_file() else None
    tasks = list(whole.all_tasks) if whole is not None else _in_order(path, list(data))
    rows = tuple(_rows(run, tasks))
    matrix = whole if whole is not None else partial_matrix(rows, tasks)
    return Run(
        path=path,
        name=str(head.get("name", path.name)),
        seed=head.get("seed", config.get("seed", 0)),
        method=tuple(_parts(head.get("method", config.get("method", [])))),
        config=config,
        environment=_optional(path / "environment.json", records.Environment),
        data=data,
        rows=rows,
        matrix=matrix,
        done=(path / "DONE").exists(),
        published=_optional(path / "published.json", records.Published),
    )


def load_runs(paths: Sequence[Path | str]) -> list[Run]:
    """Run folders in the order given, each once; at least one, or RetainError."""
    if not paths:
        raise RetainError("no run folder given: name at least one, such as runs/pocket-lora")
    unique = {Path(path).resolve(): Path(path) for path in reversed(paths)}
    found = [path for path in reversed(unique.values()) if len(paths) == 1 or not _beside(path)]
    if not found:
        raise RetainError(f"no run folder among {[str(p) for p in paths][:5]}")
    return [load_run(path) for path in found]


def _beside(path: Path) -> bool:
    """Whether a path is no run but something else of ours that `runs/*` names: a page, its data, a folder of `reuse`."""
    page = path.is_file() and path.suffix in (".html", ".json")
    return page or (path / TUNED).is_file()


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs that share all but the seed, together; groups in order of their first run, with distinct names."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.group_key, []).append(run)
    members = list(by_key.values())
    labels = [runs[0].label for runs in members]
    names = [_stem(runs[0]) if labels.count(label) > 1 else label for runs, label in zip(members, labels)]
    distinct = [n if names.count(n) == 1 else f"{n} ({runs[0].path.name})" for n, runs in zip(names, members)]
    return [Group(label, tuple(runs)) for label, runs in zip(distinct, members)]


def read_events(path: Path) -> list[Record]:
    """Lines of events.jsonl. It is a log: a line that is cut (by a kill) or cannot be sorted in is left out."""
    found: list[Record] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = parse_json(line, records.FLAT, whole=_whole)
        except ValueError:
            continue
        if records.is_a(event, records.Event):
            found.append(event)
    return found


def _whole(digits: str) -> float:
    """A whole number of a log; one that no float holds is infinite."""
    return int(digits) if len(digits) < 19 else float(digits)


def _key(i: int, record: Record) -> tuple[Any, ...]:
    if "step" in record:
        who = (record.get("who"), record.get("method"), record.get("name"))
        return (record.get("kind"), *map(str, who), record.get("task"), record["step"])
    return (i,)


def _stem(run: Run) -> str:
    return run.name.removesuffix(f"-seed{run.seed}").removesuffix(f"-{run.seed}")


def _head(path: Path) -> Record:
    """run.json, or an error that says what is missing and where the runs may be."""
    if not path.is_dir():
        what = "a run is a folder, this is a file" if path.exists() else "no such folder"
        raise RetainError(f"{path}: {what}")
    if not (path / "run.json").is_file():
        inside = sorted(child.parent.name for child in path.glob("*/run.json"))
        hint = f"; it holds the runs {inside}: name one, or {path}/*" if inside else ""
        raise RetainError(f"{path}: not a run folder: run.json is missing{hint}")
    return RunDir(path, main=False).head


def _in_order(path: Path, tasks: list[str]) -> list[str]:
    """The tasks in the order in which the zero-shot row evaluated them."""
    events = path / "events.jsonl"
    cells = [e for e in read_events(events) if e.get("kind") == "cell"] if events.is_file() else []
    seen = list(dict.fromkeys(str(e.get("task")) for e in cells))
    return sorted(tasks, key=lambda task: seen.index(task) if task in seen else len(seen))


def _parts(spec: Any) -> list[str]:
    """Names of the parts of a method as a recipe writes them: a name, {name: options}, or a list of these."""
    if isinstance(spec, str):
        return [spec]
    if isinstance(spec, Mapping):
        return [str(name) for name in spec]
    return [name for part in spec for name in _parts(part)] if isinstance(spec, list | tuple) else [str(spec)]


def partial_matrix(rows: Sequence[Row], tasks: Sequence[str]) -> AccuracyMatrix | None:
    """The matrix of an unfinished run, from the predictions of its complete rows; None before the first.

    Tasks that are not learned yet stand with the unseen ones, so that metrics speak of what has been learned.
    """
    done = [row for row in rows if row.done]
    learned = [row.task for row in done if row.task in tasks]
    if not done or not tasks:
        return None
    matrix = AccuracyMatrix.empty(learned or tasks, [t for t in tasks if t not in learned] if learned else ())
    for row in done:
        found = {task: [(str(r["id"]), float(r["score"])) for r in row.each(task)] for task in tasks}
        scores = {task: [score for _, score in pairs] for task, pairs in found.items() if pairs}
        ids = {task: [i for i, _ in found[task]] for task in scores}
        at = 0 if row.task == ZERO_SHOT else [*learned, row.task].index(row.task) + 1
        at = min(at, len(matrix.tasks))  # joint training is no task of the stream: it fills the last row
        matrix = matrix.with_row(at, scores, ids)
    return matrix


def _rows(run: RunDir, tasks: Sequence[str]) -> list[Row]:
    """Rows on disk. Folder names are made safe for a file system; `tasks` are the names as given."""
    known = {safe(task): task for task in tasks}
    rows = []
    for folder in run.rows():
        index = int(folder.path.name.split("-", 1)[0])
        task = known.get(folder.name, folder.name)
        rows.append(Row(index, task if index else ZERO_SHOT, folder, folder.budget()))
    return rows


def _optional(path: Path, shape: Any) -> Record:
    return records.read(path, shape) if path.is_file() else {}
