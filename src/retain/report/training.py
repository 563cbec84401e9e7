"""events.jsonl as curves: loss and learning rates over the whole stream, and whatever methods logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from retain.report.load import Record, Run

Points = list[tuple[float, float]]
_OURS = frozenset(
    {"time", "kind", "task", "step", "loss", "losses", "first", "lr", "who", "method", "name", "row", "n"}
    | {"verdict"}
)
_LOOP = frozenset(
    {"step", "stage", "cell", "row", "note", "round", "client_left_out"}
)  # kinds of event that are not a method's
_SHORT = 200  # rows of a table of logs, the last ones


@dataclass
class Training:
    """Curves over the step of the stream (tasks one after another, from 0).

    `stages` are (task, first step, end). `logs[who][field][line]` are points; a field that is a number has
    one line "". `verdicts` are (who, task, sentence): what a method says of its own work.
    """

    stages: list[tuple[str, float, float]] = field(default_factory=list)
    loss: Points = field(default_factory=list)
    rates: dict[str, Points] = field(default_factory=dict)
    logs: dict[str, dict[str, dict[str, Points]]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    verdicts: list[tuple[str, str, str]] = field(default_factory=list)


def training(run: Run) -> Training:
    """Read all events of a run."""
    events = run.events
    starts, out = _stages(events), Training()
    out.stages = [(task, start, end) for task, (start, end) in starts.items()]
    for event in events:
        at = starts.get(str(event.get("task")), (0.0, 0.0))[0]
        if event.get("kind") == "step":
            _add_step(out, event, at)
        if isinstance(said := event.get("verdict"), str):
            out.verdicts.append(
                (str(event.get("method", event.get("who", ""))), str(event.get("task", "")), said)
            )
    for who, records in _logs(events).items():
        _add_log(out, who, records, starts)
    return out


def smooth(points: Points, weight: float = 0.8) -> Points:
    """Exponential average, corrected for its start: s_t = w s_{t-1} + (1 - w) x_t, divided by 1 - w^t."""
    out, state = [], 0.0
    for t, (x, y) in enumerate(points, 1):
        state = weight * state + (1 - weight) * y
        out.append((x, state / (1 - weight**t)))
    return out


def thin(points: Points, n: int = 400) -> Points:
    """At most n points: means of equal stretches."""
    if len(points) <= n:
        return points
    edges = [round(k * len(points) / n) for k in range(n + 1)]
    parts = [points[a:b] for a, b in pairwise(edges) if b > a]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def _stages(events: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """First and end step of each task on the axis of the stream."""
    lengths: dict[str, float] = {}
    for event in events:
        step = event.get("step")
        if event.get("kind") == "step" and isinstance(step, int | float):
            task = str(event.get("task"))
            lengths[task] = max(lengths.get(task, 0.0), float(step))
    out, at = {}, 0.0
    for task, n in lengths.items():
        out[task] = (at, at + n)
        at += n
    return out


def _add_step(out: Training, event: Record, at: float) -> None:
    step = float(event.get("step", 0))
    losses, first = event.get("losses"), event.get("first")
    if isinstance(losses, list) and isinstance(first, int | float):
        out.loss += [(at + first + k, v) for k, v in enumerate(losses) if _finite(v)]
    elif _finite(event.get("loss")):
        out.loss.append((at + step, float(event["loss"])))
    rates = event.get("lr")
    for name, value in (rates if isinstance(rates, Mapping) else {"": rates}).items():
        if _finite(value):
            out.rates.setdefault(str(name), []).append((at + step, float(value or 0)))
    terms = {k: v for k, v in event.items() if k not in _OURS}
    _add_fields(out, "loss terms", terms, at + step)


def _logs(events: Sequence[Record]) -> dict[str, list[Record]]:
    """What methods logged: every event that is not the loop's own, under its method and kind."""
    out: dict[str, list[Record]] = {}
    for event in events:
        kind = event.get("kind", "log")
        if kind in _LOOP:
            continue
        who = event.get("who", event.get("method"))
        what = str(kind).replace("_", " ")
        words = [what] if not who else [str(who)] if kind == "log" else [str(who), what]
        out.setdefault(", ".join(words), []).append(event)
    return out


def _add_log(
    out: Training, who: str, records: Sequence[Record], starts: Mapping[str, tuple[float, float]]
) -> None:
    """Logs with a step become curves; the few without (what was grouped, merged, stored) a table."""
    with_step = [r for r in records if isinstance(r.get("step"), int | float)]
    for record in with_step if len(with_step) > 3 else []:
        at = starts.get(str(record.get("task")), (0.0, 0.0))[0] + float(record["step"])
        _add_fields(out, who, {k: v for k, v in record.items() if k not in _OURS}, at)
    rest = [r for r in records if r not in with_step] if len(with_step) > 3 else list(records)
    rows = [row for record in rest for row in _table_rows(record)]
    if rows:
        out.tables[who] = rows[-_SHORT:]


def _add_fields(out: Training, who: str, fields: Mapping[str, Any], at: float) -> None:
    """A number is a curve, {key: number} one per key, {key: {field: number}} one plot per field."""
    for name, value in fields.items():
        lines = value if isinstance(value, Mapping) else {"": value}
        for line, entry in lines.items():
            inner = isinstance(entry, Mapping)
            for part, number in entry.items() if inner else (("", entry),):
                if _finite(number):
                    curves = out.logs.setdefault(who, {}).setdefault(str(part) if inner else name, {})
                    curves.setdefault(str(line), []).append((at, float(number)))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _table_rows(record: Record) -> list[dict[str, str]]:
    """A log as rows of text: one, or one per key where a field is {key: {field: value}}."""
    body = {k: v for k, v in record.items() if k not in ("time", "kind", "who", "method", "verdict")}
    tables = [
        k
        for k, v in body.items()
        if isinstance(v, Mapping) and any(isinstance(e, Mapping) for e in v.values())
    ]
    if len(tables) != 1:
        return [_flat(body)]
    inner = body.pop(tables[0])
    return [_flat(body) | {tables[0]: str(key)} | _flat({"": entry}) for key, entry in inner.items()]


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= _flat(value, f"{name}." if name else "")
        else:
            out[name] = f"{value:.4g}" if isinstance(value, float) else str(value)
    return out
