"""One run as plain values for the templates: what is shown, in words and numbers, before any HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from retain.metrics.intervals import Array
from retain.report import figures, samples, summary
from retain.report.federated import federated_view, stage_matrix, staged
from retain.report.figures import Axis, Line
from retain.report.load import Group, Run
from retain.report.training import Points, Training, smooth, thin, training

HEADLINE = ("Last", "Avg (MAA)", "New (MFT)", "BWT", "Forgetting", "FWT", "Zero-shot", "Unseen")
View = dict[str, Any]

MANY = 24
"""Rows of the matrix from which a curve has no dots, an axis fewer labels, and a sample's history is thinned."""

NAMED = 1_000
"""Cells from which a matrix names them when they are pointed at (script.js), not each in its own HTML."""

CELLS = 24_000
"""Cells of a page from which matrices are drawn as pictures, a pixel a cell: a browser lays out no more in a second."""


def run_view(run: Run) -> View:
    """Everything that one run's sections show; parts without data are empty and leave their section out."""
    learned = len(run.learned)
    status = "complete" if run.done else f"unfinished: {learned} of {len(run.tasks)} tasks"
    view: View = {"name": run.path.name, "label": run.label, "done": run.done, "status": status}
    view |= {"progress": summary.progress_of(run), "facts": facts(run), "lead": lead(run)}
    view["metrics"] = headline(run)
    if run.matrix is not None:
        m = run.matrix
        view["heat"] = heat(m.rows[: m.done + 1], m.tasks, m.unseen, m.values[: m.done + 1])
        view["heat_words"] = "Each row is the model after one more task, each column a test set."
        view["curves"] = curves(run)
        view["bars"] = bars(run)
        view["gains"] = any(bar["change"] > 0 for bar in view["bars"])
    if staged(run):
        names, values = stage_matrix(run)
        view["heat"] = heat(names, run.tasks, (), values)
        for row in view["heat"]["rows"]:
            row["cells"] = [{**cell, "kind": "after"} for cell in row["cells"]]
        view["heat_words"] = "Each row is the model after one more stage, each column a test set."
        view |= {"curves": [], "bars": [], "metrics": [m for m in view["metrics"] if m.value is not None]}
    view["federated"] = federated_view(run)
    view["published"] = summary.beside_published([Group(run.label, (run,))])
    view["forgotten"] = samples.forgotten(run)
    view["routing"] = routing_heat(run)
    view["budget"] = budget_rows(run)
    view["training"] = training_view(training(run))
    view["folded"] = folded(run)
    return view


def facts(run: Run) -> list[str]:
    """One line under the title: seed, model, stream, sizes."""
    model, stream = run.config.get("model", {}), run.config.get("stream", {})
    out = [f"seed {run.seed}"]
    if isinstance(model, Mapping) and model.get("name"):
        out.append(f"model {model['name']}")
    if isinstance(stream, Mapping) and stream:
        out.append(f"stream {stream.get('name') or ('mine' if 'tasks' in stream else next(iter(stream)))}")
    if run.tasks:
        out.append(f"{len(run.tasks)} tasks")
    if (wall := summary.cost(run.budget, "wall_s")) is not None:
        out.append(summary.duration(wall))
    return out


def lead(run: Run) -> Markup:
    """The run in a sentence or two."""
    m = run.matrix
    if m is None or m.done == 0:
        return Markup("")
    found = {x.name: x.value for x in summary.metrics_of(run)}
    last, bwt = found.get("Last"), found.get("BWT")
    text = Markup("")
    if last is not None:
        many = f"{len(m.tasks)} tasks" if len(m.tasks) > 1 else "one task"
        text += Markup("After {} the model scores <b>{:.1f}</b> on average").format(many, last)
    if last is not None and bwt is not None:
        way = "below" if bwt < 0 else "above"
        text += Markup(
            ", and earlier tasks stand <b>{:.1f}</b> points {} where they stood right after they were learned"
        )
        text = Markup(str(text)).format(abs(bwt), way)
    text += "." if text else ""
    changes = [(bar["change"], bar) for bar in bars(run)]
    worst = min(changes, key=lambda c: c[0], default=None)
    if worst is not None and worst[0] <= -5:
        bar = worst[1]
        text += Markup(" Most was lost on <b>{}</b>: {:.0f} → {:.0f}.").format(
            bar["name"], bar["new"], bar["last"]
        )
    return text


def headline(run: Run) -> list[Any]:
    """The metrics of the tiles, without those that this stream cannot have (no unseen task, one task)."""
    found = {m.name: m for m in summary.metrics_of(run)}
    chosen = [found[name] for name in HEADLINE if name in found]
    return [m for m in chosen if m.value is not None or not m.reason.startswith("needs ")]


def heat(labels: Sequence[str], tasks: Sequence[str], unseen: Sequence[str], values: Array) -> View:
    """A matrix for the template: cells with their value (None: not evaluated), kind and tooltip."""
    names = [*tasks, *unseen]
    rows = []
    for i, label in enumerate(labels):
        cells = []
        for j, name in enumerate(names):
            value = float(values[i, j])
            kind = (
                "unseen" if j >= len(tasks) else "learned" if i == j + 1 else "before" if i <= j else "after"
            )
            when = "zero-shot" if i == 0 else f"after {label}"
            shown = None if math.isnan(value) else value
            title = "" if values.size > NAMED else f"{name} {when}: {value:.1f}"
            cells.append({"value": shown, "kind": kind, "title": title})
        rows.append({"label": label, "cells": cells})
    return {"columns": [{"name": n, "unseen": n in unseen} for n in names], "rows": rows, "picture": ""}


def pictured(view: View | None) -> View | None:
    """The same matrix as a picture, a pixel a cell: for a page that would hold too many of them."""
    if view is None:
        return None
    values = [[cell["value"] for cell in row["cells"]] for row in view["rows"]]
    return {**view, "picture": figures.matrix_png(values)}


def n_cells(view: View | None) -> int:
    """Cells of a matrix."""
    return len(view["rows"]) * len(view["columns"]) if view else 0


def routing_heat(run: Run) -> View | None:
    """Tasks by adapters, in percent, in the form of a matrix."""
    found = samples.routing(run)
    if found is None:
        return None
    rows, many = [], len(found.weights) * len(found.adapters) > NAMED
    for task, weights in found.weights.items():
        shown = [min(100.0, max(0.0, 100 * w)) for w in weights]
        cells = [
            {"value": v, "kind": "after", "title": "" if many else f"{task} by {name}: {v:.1f} %"}
            for v, name in zip(shown, found.adapters, strict=True)
        ]
        rows.append({"label": task, "cells": cells})
    columns = [{"name": n, "unseen": False} for n in found.adapters]
    return {"columns": columns, "rows": rows, "picture": ""}


def curves(run: Run) -> list[View]:
    """A small plot per task: its score in every row, from zero-shot on."""
    m = run.matrix
    assert m is not None
    out = []
    x = Axis(0, max(1, m.done), [(0, "0"), (m.done, str(m.done))] if m.done else [(0, "0")])
    for j, task in enumerate(m.all_tasks):
        points = [(float(i), float(v)) for i, v in enumerate(m.values[: m.done + 1, j]) if not np.isnan(v)]
        since = [p for p in points if p[0] >= j + 1] if j < len(m.tasks) else []
        before = [p for p in points if p[0] <= j + 1] if since else points
        few = len(points) <= MANY
        lines = [Line(before, "faint", task, dots=few and not since), Line(since, "s1", task, dots=few)]
        words = f"{since[0][1]:.0f} → {since[-1][1]:.0f}" if since else "not learned"
        if len(since) == 1:
            words = f"{since[0][1]:.0f}"
        marks = [j + 1.0] if since else []
        label = f"{task}: score after each task; " + ", ".join(
            f"{v:.0f}" for _, v in figures.some(points, MANY)
        )
        out.append(
            {"name": task, "words": words, "plot": figures.plot(lines, x, figures.SCORE, label, marks=marks)}
        )
    return out


def bars(run: Run) -> list[View]:
    """Per learned task: the score right after it was learned and the one at the end."""
    m = run.matrix
    if m is None or m.done == 0:
        return []
    out = []
    for j, task in enumerate(m.tasks[: m.done]):
        new, last = float(m.values[j + 1, j]), float(m.values[m.done, j])
        if not (math.isnan(new) or math.isnan(last)):
            out.append({"name": task, "new": new, "last": last, "change": last - new})
    return out


def budget_rows(run: Run) -> View | None:
    """The budget after every complete row; entries that no row has are left out."""
    rows = [row for row in run.rows if row.done and row.budget]
    entries = [c for c in summary.COSTS if any(summary.cost(row.budget, c.key) is not None for row in rows)]
    if not entries:
        return None
    cells = [[summary.written(c, summary.cost(row.budget, c.key)) for c in entries] for row in rows]
    body = [{"label": row.label, "cells": each} for row, each in zip(rows, cells, strict=True)]
    return {"columns": [c.words for c in entries], "rows": body}


def group_budget(groups: Sequence[Group]) -> View:
    """The final budgets of several groups."""
    entries = [c for c in summary.COSTS if any(summary.mean_cost(g, c.key) is not None for g in groups)]
    rows = [
        {"label": g.label, "cells": [summary.written(c, summary.mean_cost(g, c.key)) for c in entries]}
        for g in groups
    ]
    return {"columns": [c.words for c in entries], "rows": rows}


# -- training -------------------------------------------------------------------------------------------


def training_view(t: Training) -> View | None:
    """Loss, learning rates and method logs as plots."""
    if not (t.loss or t.rates or t.logs or t.tables or t.verdicts):
        return None
    end = max([stage[2] for stage in t.stages] or [1.0])
    x = Axis(0, end)
    out: View = {
        "loss": None,
        "rates": None,
        "rate_names": "",
        "logs": [],
        "tables": [],
        "verdicts": t.verdicts,
    }
    if t.loss:
        y = figures.axis([v for _, v in t.loss], log=True)
        lines = [Line(thin(t.loss), "raw"), Line(thin(_smooth_by_stage(t)), "s1")]
        out["loss"] = figures.plot(lines, x, y, "training loss over the steps of the stream", bands=t.stages)
    if t.rates:
        out["rates"], out["rate_names"] = _lines(t.rates, x, t, "learning rate")
    for who, fields in t.logs.items():
        shown = []
        for name, curves_of in fields.items():
            plot, names = _lines(
                curves_of, Axis(0, end, [(0, "0"), (end, f"{end:.0f} steps")]), t, name, short=True
            )
            shown.append({"name": name.replace("_", " "), "plot": plot, "names": names})
        out["logs"].append((who, shown))
    for who, records in t.tables.items():
        columns = list(dict.fromkeys(key for record in records for key in record))
        rows = [[record.get(column, "") for column in columns] for record in records]
        out["tables"].append((who, {"columns": columns, "rows": rows}))
    return out


def _smooth_by_stage(t: Training) -> Points:
    """The loss smoothed within each task, so that a new task does not start with the old one's average."""
    out: Points = []
    for _, start, end in t.stages:
        out += smooth([p for p in t.loss if start <= p[0] < end])
    return out


def _lines(
    curves_of: Mapping[str, Points], x: Axis, t: Training, label: str, *, short: bool = False
) -> tuple[Markup, Markup]:
    lines = [
        Line(thin(points, 200), f"s{k % figures.SERIES + 1}", name)
        for k, (name, points) in enumerate(curves_of.items())
    ]
    y = figures.axis([v for line in lines for _, v in line.points])
    names = figures.legend(list(curves_of)) if len(curves_of) > 1 else Markup("")
    bands = [("", start, end) for _, start, end in t.stages] if short else t.stages
    plot = figures.plot(
        lines, x, y, label, bands=() if short else bands, marks=[b[1] for b in bands[1:]] if short else ()
    )
    return plot, names


def folded(run: Run) -> list[tuple[str, str]]:
    """Config, environment and data as text."""
    parts = [("Config", run.config), ("Environment", run.environment), ("Data", run.data)]
    return [
        (name, yaml.safe_dump(_plain(body), sort_keys=False, allow_unicode=True))
        for name, body in parts
        if body
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
