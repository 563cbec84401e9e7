"""AccuracyMatrix: what a run scored on every task after every task, and the metrics with intervals.

Row 0 is the model before the first task (zero-shot), row i after learning task i. Columns are the learned
tasks in their order, then the unseen ones. A cell that was not evaluated is nan, and a metric that needs it
is None with a reason. Formulas: `formulas.py`. Everything is in the scorer's units, 0..100.
"""

# T learned tasks, U unseen tasks, N samples of one task

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from retain.metrics.formulas import DEFINITIONS, Definition, Metric
from retain.metrics.intervals import Array, Shares, interval
from retain.types import RetainError

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Scores of a run.

    `values` is (T + 1, T + U), nan where not evaluated. `samples[task]`, where given, is (T + 1, N): the
    score of each test sample in each row (a row is all nan where not evaluated), whose row means are the
    column of `values`; `ids[task]` are the N sample ids. Raises RetainError where these do not fit together.
    """

    tasks: tuple[str, ...]
    values: Array
    unseen: tuple[str, ...] = ()
    samples: Mapping[str, Array] = field(default_factory=dict)
    ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "unseen", tuple(self.unseen))
        object.__setattr__(self, "values", _frozen(self.values))
        object.__setattr__(self, "samples", {k: _frozen(v) for k, v in self.samples.items()})
        object.__setattr__(self, "ids", {k: tuple(v) for k, v in self.ids.items()})
        _check(self)

    # ----------------------------------------------------------------------------------------------- building

    @classmethod
    def empty(cls, tasks: Sequence[str], unseen: Sequence[str] = ()) -> AccuracyMatrix:
        """A matrix without a single score, to be filled by `with_row`."""
        return cls(tuple(tasks), np.full((len(tasks) + 1, len(tasks) + len(unseen)), np.nan), tuple(unseen))

    @classmethod
    def from_scores(
        cls,
        tasks: Sequence[str],
        unseen: Sequence[str],
        rows: Mapping[int, Mapping[str, float | Sequence[float]]],
        ids: Mapping[str, Sequence[str]] | None = None,
    ) -> AccuracyMatrix:
        """The matrix of finished rows: row number (0 = zero-shot) to task to mean or per-sample scores."""
        matrix = cls.empty(tasks, unseen)
        for after in sorted(rows):
            matrix = matrix.with_row(after, rows[after], ids)
        return matrix

    def with_row(
        self,
        after: int,
        scores: Mapping[str, float | Sequence[float]],
        ids: Mapping[str, Sequence[str]] | None = None,
    ) -> AccuracyMatrix:
        """A copy with scores of row `after` (0 = zero-shot): per task a mean, or one score per sample.

        Tasks that are not named keep their cells. Per-sample scores of a task must be of the same samples in
        all rows.
        """
        if not 0 <= after <= len(self.tasks):
            raise RetainError(f"row {after}: this matrix has rows 0 (zero-shot) to {len(self.tasks)}")
        values, samples = self.values.copy(), dict(self.samples)
        known = dict(self.ids)
        for task, given in scores.items():
            column = self.column(task)
            if isinstance(given, int | float):
                values[after, column] = given
                if task in samples:  # a mean replaces the samples it would contradict
                    samples[task] = self._sample_row(task, after, np.full(samples[task].shape[1], np.nan))
                continue
            samples[task] = self._sample_row(task, after, np.asarray(given, dtype=np.float64))
            values[after, column] = samples[task][after].mean()
            if ids is not None and task in ids:
                known[task] = _same_ids(task, known.get(task), tuple(ids[task]))
        return replace(self, values=values, samples=samples, ids=known)

    def _sample_row(self, task: str, after: int, scores_N: Array) -> Array:
        rows = self.samples.get(task, np.full((len(self.tasks) + 1, len(scores_N)), np.nan)).copy()
        if not len(scores_N) or rows.shape[1] != len(scores_N):
            raise RetainError(
                f"task {task!r}, row {after}: {len(scores_N)} sample scores, others have {rows.shape[1]}; "
                "score the same test set in every row"
            )
        rows[after] = scores_N
        return rows

    def upto(self, n: int) -> AccuracyMatrix:
        """The run as if it had stopped after its n-th task: for metrics while a stream is still running."""
        keep = self.tasks[:n] + self.unseen
        columns = [self.column(task) for task in keep]
        return AccuracyMatrix(
            self.tasks[:n],
            self.values[: n + 1, columns],
            self.unseen,
            {k: v[: n + 1] for k, v in self.samples.items() if k in keep},
            {k: v for k, v in self.ids.items() if k in keep},
        )

    def ended(self) -> AccuracyMatrix:
        """What metrics are taken from: itself; where no task was learned, with the first row as its last too.

        A model that learned nothing ends as it began, so it has a Last, and something to be compared by.
        """
        if self.done:
            return self
        values, samples = self.values.copy(), {k: v.copy() for k, v in self.samples.items()}
        for rows in (values, *samples.values()):
            rows[-1] = rows[0]
        return replace(self, values=values, samples=samples)

    # ------------------------------------------------------------------------------------------------ reading

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """Column names: the learned tasks, then the unseen ones."""
        return self.tasks + self.unseen

    @property
    def rows(self) -> tuple[str, ...]:
        """Row names: "zero-shot", then the task just learned."""
        return ("zero-shot", *self.tasks)

    @property
    def done(self) -> int:
        """How many tasks have been learned: the last row with a score in it."""
        filled = np.flatnonzero(~np.isnan(self.values).all(axis=1))
        return int(filled[-1]) if len(filled) else 0

    def column(self, task: str) -> int:
        """The column of a task; an error that lists the choices otherwise."""
        if task not in self.all_tasks:
            raise RetainError(f"no task {task!r} in this matrix; choose from {list(self.all_tasks)}")
        return self.all_tasks.index(task)

    def cell(self, after: int, task: str) -> float:
        """Score on `task` after the `after`-th task (0 = zero-shot); nan where not evaluated."""
        return float(self.values[after, self.column(task)])

    # ------------------------------------------------------------------------------------------------ metrics

    def metrics(self, *, level: float = LEVEL) -> list[Metric]:
        """All metrics, with their intervals where each task that counts has the scores of at least two samples.

        All rows answered the same samples, so the interval of a difference between rows is that of the
        difference; tasks are independent (`retain.metrics.intervals`). It covers which samples were tested, not
        training noise: for that run several seeds and `aggregate`.
        """
        m = self.ended()
        return [_metric(m, d, level) for d in DEFINITIONS]

    def metric(self, name: str) -> Metric:
        """One metric by name."""
        found = {m.name: m for m in self.metrics()}
        if name not in found:
            raise RetainError(f"no metric {name!r}; choose from {list(found)}")
        return found[name]

    # --------------------------------------------------------------------------------------------------- disk

    def to_data(self, *, samples: bool = True) -> dict[str, Any]:
        """Plain data for a JSON file; None for what was not evaluated. `samples=False`: only the means."""
        data: dict[str, Any] = {"tasks": list(self.tasks), "unseen": list(self.unseen)}
        data["values"] = _plain(self.values)
        if samples:
            data["samples"] = {k: [_row_or_none(r) for r in v] for k, v in self.samples.items()}
            data["ids"] = {k: list(v) for k, v in self.ids.items()}
        return data

    def to_json(self, *, samples: bool = True) -> str:
        """`to_data` as the text of a JSON file."""
        return json.dumps(self.to_data(samples=samples), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, source: str | Mapping[str, Any]) -> AccuracyMatrix:
        """The inverse of `to_json`, exact to the last bit; takes its data or the text of the file."""
        data = json.loads(source) if isinstance(source, str) else source
        missing = sorted({"tasks", "values"} - set(data))
        if missing:
            raise RetainError(f"not an accuracy matrix: {missing} missing; found {sorted(data)}")
        samples = {k: _rows(v) for k, v in data.get("samples", {}).items()}
        values = np.array(data["values"], dtype=np.float64)  # null becomes nan
        return cls(tuple(data["tasks"]), values, tuple(data.get("unseen", ())), samples, data.get("ids", {}))


# ----------------------------------------------------------------------------------------------------- checks


def _frozen(values: Any) -> Array:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


def _check(m: AccuracyMatrix) -> None:
    shape = (len(m.tasks) + 1, len(m.all_tasks))
    if not m.tasks or len(set(m.all_tasks)) < len(m.all_tasks):
        raise RetainError(f"task names must be there and differ: {list(m.all_tasks)}")
    if m.values.shape != shape:
        raise RetainError(
            f"values have shape {m.values.shape}, but {len(m.tasks)} learned and {len(m.unseen)} "
            f"unseen tasks need {shape} (row 0 is zero-shot, nan where not evaluated)"
        )
    for task, rows in m.samples.items():
        column = m.values[:, m.column(task)]
        if rows.ndim != 2 or len(rows) != shape[0]:
            raise RetainError(f"samples of task {task!r} have shape {rows.shape}, need ({shape[0]}, N)")
        holes = np.isnan(rows).any(axis=1) & ~np.isnan(rows).all(axis=1)
        if holes.any():
            i = int(np.flatnonzero(holes)[0])
            n = int(np.isnan(rows[i]).sum())
            raise RetainError(f"task {task!r}, row {i}: {n} of {rows.shape[1]} sample scores are nan")
        means = rows.mean(axis=1)
        wrong = ~np.isnan(means) & ~np.isclose(means, column, rtol=0, atol=1e-6)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            raise RetainError(
                f"task {task!r}, row {i}: the samples' mean is {means[i]:.6f}, the cell {column[i]:.6f}"
            )
        if task in m.ids and len(m.ids[task]) != rows.shape[1]:
            raise RetainError(f"task {task!r}: {len(m.ids[task])} ids for {rows.shape[1]} samples")


def _same_ids(task: str, old: tuple[str, ...] | None, given: tuple[str, ...]) -> tuple[str, ...]:
    if old is not None and old != given:
        raise RetainError(f"task {task!r}: sample ids differ from those of an earlier row; keep one order")
    return given


def _plain(values: Array) -> list[list[float | None]]:
    return [[None if math.isnan(v) else float(v) for v in row] for row in values]


def _row_or_none(row_N: Array) -> list[float] | None:
    return None if np.isnan(row_N).all() else [float(v) for v in row_N]


def _rows(rows: Sequence[Sequence[float] | None]) -> Array:
    n = max((len(r) for r in rows if r is not None), default=0)
    return np.array([[math.nan] * n if r is None else r for r in rows], dtype=np.float64)


# ------------------------------------------------------------------------------------------------- intervals


def shares_of(m: AccuracyMatrix, d: Definition) -> list[Shares] | None:
    """What each sample of each task adds to a metric; None where a cell that it needs has no sample scores."""
    t, u = len(m.tasks), len(m.unseen)
    need = d.needs(t, u)
    blank = np.full((t + 1, 1), np.nan)  # of a task that does not count
    scores = [m.samples.get(task, blank) for task in m.all_tasks]
    if any(np.isnan(rows[need[:, j]]).any() for j, rows in enumerate(scores)):
        return None
    return d.shares(scores, t, u)


def span_of(m: AccuracyMatrix, d: Definition) -> tuple[float, float]:
    """What the metric can be: bounded where all sample scores are within 0..100."""
    inside = not any(((s < 0) | (s > 100)).any() for s in m.samples.values())  # nan is neither
    return d.span(len(m.tasks), len(m.unseen)) if inside else (-math.inf, math.inf)


def value_of(m: AccuracyMatrix, definition: Definition) -> tuple[float | None, str]:
    """A metric's value, or None and the reason."""
    t, u = len(m.tasks), len(m.unseen)
    if reason := definition.impossible(t, u):
        return None, reason
    missing = np.argwhere(definition.needs(t, u) & np.isnan(m.values))
    if len(missing):
        i, j = missing[0]
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        where = "zero-shot" if i == 0 else f"after {m.rows[i]}"
        return None, f"not evaluated: {m.all_tasks[j]} {where}{more}"
    return float(definition.value(m.values, t, u)), ""


def _metric(m: AccuracyMatrix, d: Definition, level: float) -> Metric:
    value, reason = value_of(m, d)
    shares = None if value is None else shares_of(m, d)
    found = None if value is None or shares is None else interval(value, shares, level, span_of(m, d))
    low, high = found or (None, None)
    return Metric(d.name, value, d.formula, low, high, reason, d.up)


# ------------------------------------------------------------------------------------------------- over seeds


@dataclass(frozen=True)
class Spread:
    """A number over seeds: mean, sample standard deviation (n - 1) and t-interval; None where it does not
    exist.
    """

    name: str
    formula: str
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    n: int
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Aggregate:
    """Several runs of one stream: per cell `mean` and `std` (T + 1, T + U), and a Spread per metric."""

    tasks: tuple[str, ...]
    unseen: tuple[str, ...]
    n: int
    mean: Array
    std: Array  # nan with one run
    metrics: tuple[Spread, ...]


def spread(name: str, formula: str, values: Sequence[float], level: float = LEVEL) -> Spread:
    """Mean, s = sqrt(sum (x - mean)^2 / (n - 1)), mean +- t_{n-1} s / sqrt(n)."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Spread(name, formula, mean, None, None, None, n, "one run has no spread")
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * std / math.sqrt(n)
    return Spread(name, formula, mean, std, mean - half, mean + half, n)


def same_stream(matrices: Sequence[AccuracyMatrix]) -> None:
    """Raise RetainError unless there is a matrix and all have the same tasks in the same order."""
    if not matrices:
        raise RetainError("no accuracy matrix given")
    first = matrices[0]
    for i, m in enumerate(matrices[1:], 1):
        if (m.tasks, m.unseen) != (first.tasks, first.unseen):
            raise RetainError(
                f"run {i} has tasks {list(m.all_tasks)}, run 0 has {list(first.all_tasks)}; "
                "cells line up only for the same tasks in the same order"
            )


def aggregate(matrices: Sequence[AccuracyMatrix], level: float = LEVEL) -> Aggregate:
    """Mean and spread over runs (seeds), per metric and per cell. A cell missing in any run is nan."""
    same_stream(matrices)
    cells = np.stack([m.values for m in matrices])
    n, ended = len(matrices), [m.ended() for m in matrices]
    std = cells.std(axis=0, ddof=1) if n > 1 else np.full(cells.shape[1:], np.nan)
    spreads = []
    for d in DEFINITIONS:
        pairs = [value_of(m, d) for m in ended]
        values = [v for v, _ in pairs if v is not None]
        if len(values) < n:
            reason = next(r for _, r in pairs if r)
            spreads.append(Spread(d.name, d.formula, None, None, None, None, n, reason))
        else:
            spreads.append(spread(d.name, d.formula, values, level))
    first = matrices[0]
    return Aggregate(first.tasks, first.unseen, n, cells.mean(axis=0), std, tuple(spreads))
