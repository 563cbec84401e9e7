"""write_report(): run folders in, one self-contained HTML page out.

One run gets its story: metrics, matrix, curves, what was forgotten, cost, training. Several runs get a
comparison, with the story of each folded below. Nothing is fetched when the page is opened; everything that
came from a run is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from retain.metrics.intervals import Array
from retain.report import figures, samples, summary
from retain.report.figures import Axis, Line
from retain.report.load import Group, Run, group, load_runs
from retain.report.view import CELLS, MANY, View, group_budget, heat, n_cells, pictured, run_view
from retain.types import RetainError

COMPARED = ("Last", "Avg (MAA)", "New (MFT)", "BWT", "Forgetting", "FWT")


def write_report(runs: Sequence[Path | str], out: Path | str) -> Path:
    """Write the report of one run, or the comparison of several, to `out`; returns `out`.

    Unfinished runs are reported as far as they came and marked so. RetainError: no run folder given, a path
    that is none, or `out` cannot be written.
    """
    loaded, out = load_runs(runs), Path(out)
    page = _one(loaded[0]) if len(loaded) == 1 else _several(loaded)
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(page, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise RetainError(f"cannot write the report {out}: {error.strerror or error}") from error
    return out


def _render(template: str, runs: Sequence[Run], **values: Any) -> str:
    return page(template, f"{len(runs)} run folders" if len(runs) > 1 else runs[0].path.name, **values)


def page(template: str, sources: str, **values: Any) -> str:
    """A template as one self-contained page; `sources` says in its footer what it was made from."""
    env = Environment(
        loader=PackageLoader("retain.report"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    try:
        ours = version("retain")
    except PackageNotFoundError:
        ours = "(not installed as a package)"
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return env.get_template(template).render(version=ours, made=made, sources=sources, **values)


def _one(run: Run) -> str:
    view = run_view(run)
    if n_cells(view.get("heat")) + n_cells(view["routing"]) > CELLS:
        view |= {key: pictured(view[key]) for key in ("heat", "routing") if n_cells(view.get(key))}
    return _render("run.html.j2", [run], title=run.label, run=_complete(view))


def _complete(view: View) -> View:
    """Every key that the templates ask for."""
    return {"heat": None, "heat_words": "", "curves": [], "bars": [], "gains": False, **view}


def _several(runs: Sequence[Run]) -> str:
    groups = group(runs)
    against = groups[0]
    title = f"{len(groups)} methods" if len(groups) > 3 else " · ".join(g.label for g in groups)
    minis: list[View] = [
        {"label": g.label, "heat": heat(("0-shot", *m.tasks), m.tasks, m.unseen, m.mean)}
        for g in groups
        if (m := summary.mean_matrix(g)) is not None
    ]
    tasks = runs[0].tasks
    named = ", ".join(f"{k} {t}" for k, t in figures.some(list(enumerate(tasks, 1)), MANY))
    words = f"Columns are tasks in the order they are learned: {named}"
    details = [_complete(run_view((summary.counted(g) or list(g.runs))[0])) for g in groups]
    matrices = [entry["heat"] for entry in minis] + [d[key] for d in details for key in ("heat", "routing")]
    if sum(map(n_cells, matrices)) > CELLS:
        minis = [{**entry, "heat": pictured(entry["heat"])} for entry in minis]
        details = [{**d, "heat": pictured(d["heat"]), "routing": pictured(d["routing"])} for d in details]
    return _render(
        "runs.html.j2",
        runs,
        title=title,
        facts=[f"{len(runs)} runs", *_shared(runs)],
        lead=_lead(groups),
        warnings=summary.warnings(groups, against),
        table=_table(groups),
        curves=_curves(groups),
        minis=minis,
        minis_words=f"{words}. Mean over seeds.",
        finals=_finals(groups),
        tests=_tests(groups[1:], against) if len(groups) > 1 else None,
        against=against.label,
        beside=samples.side_by_side(groups),
        budget=group_budget(groups),
        details=details,
    )


def _shared(runs: Sequence[Run]) -> list[str]:
    """Facts that all runs have in common."""
    from retain.report.view import facts

    common = [fact for fact in facts(runs[0]) if all(fact in facts(run) for run in runs[1:])]
    return [*common, f"seeds {', '.join(map(str, sorted({run.seed for run in runs})))}"] if common else []


def _lead(groups: Sequence[Group]) -> Markup:
    """Who ends highest, who keeps most."""
    done = [(g.label, n) for g in groups if summary.finished(g) and (n := summary.numbers(g))]
    last = {label: n["Last"].value for label, n in done if n["Last"].value is not None}
    if len(last) < 2:
        return Markup("")
    order = sorted(last.items(), key=lambda entry: -(entry[1] or 0.0))
    (best, top), (worst, low) = order[0], order[-1]
    if f"{top:.1f}" == f"{low:.1f}":
        return Markup("All end at <b>{:.1f}</b> on average over all tasks.").format(top)
    text = "<b>{}</b> ends highest, at <b>{:.1f}</b> on average over all tasks; {} ends lowest, at {:.1f}."
    return Markup(text).format(best, top, worst, low)


def _table(groups: Sequence[Group]) -> View:
    """Methods by metrics; the best mean of each column is marked."""
    all_numbers = [summary.numbers(g) for g in groups]
    known = next((n for n in all_numbers if n), {})
    columns = [known[name] for name in COMPARED if name in known]
    best: dict[str, float] = {}
    for column in columns:
        done = [n for g, n in zip(groups, all_numbers, strict=True) if n and summary.finished(g)]
        values = [v for n in done if (v := n[column.name].value) is not None]
        if len(values) > 1:
            best[column.name] = max(values) if column.up else min(values)
    rows = []
    for g, found in zip(groups, all_numbers, strict=True):
        cells = [_cell(found[c.name], best.get(c.name)) if found else _no_cell() for c in columns]
        entry = next(c for c in summary.COSTS if c.key == "train_s")
        time = summary.written(entry, summary.mean_cost(g, "train_s"))
        rows.append({"label": g.label, "n": len(summary.counted(g)), "cells": cells, "time": time})
    return {"columns": columns, "rows": rows}


def _cell(number: summary.Number, best: float | None) -> View:
    if number.value is None:
        return {"text": "–", "range": "", "best": False, "reason": number.reason}
    sd = f" ± {number.sd:.1f}" if number.sd is not None else ""
    between = (
        f"{number.low:.1f} to {number.high:.1f}" if number.low is not None and number.high is not None else ""
    )
    return {"text": f"{number.value:.1f}{sd}", "range": between, "best": number.value == best, "reason": ""}


def _no_cell() -> View:
    return {"text": "–", "range": "", "best": False, "reason": "no row is complete"}


def _curves(groups: Sequence[Group]) -> View | None:
    """Mean score on the tasks learned so far, one line per method."""
    lines, names, most = [], [], 1
    for k, g in enumerate(groups):
        mean = summary.mean_matrix(g)
        if mean is None:
            continue
        points = _so_far(mean.mean, len(mean.tasks))
        if points:
            most = max(most, len(mean.tasks))
            lines.append(Line(points, f"s{k % figures.SERIES + 1}", g.label, dots=len(points) <= MANY))
            names.append(g.label)
    if not lines:
        return None
    x = Axis(1, max(2, most), [(i, str(i)) for i in figures.some(range(1, most + 1), figures.LABELS)])
    y = Axis(0, 100, [(v, str(v)) for v in (0, 25, 50, 75, 100)])
    plot = figures.plot(lines, x, y, "mean score on the tasks learned so far, one line per method")
    return {"plot": plot, "names": figures.legend(names)}


def _so_far(values: Array, n_tasks: int) -> list[tuple[float, float]]:
    means = [(float(i), float(np.mean(values[i, :i]))) for i in range(1, n_tasks + 1)]
    return [(i, v) for i, v in means if not np.isnan(v)]


def _finals(groups: Sequence[Group]) -> View | None:
    """Tasks by methods, after the last task."""
    done = [g for g in groups if summary.finished(g)]
    found = [(g.label, m) for g in done if (m := summary.mean_matrix(g)) is not None]
    if len(found) < 2 or any(m.tasks + m.unseen != found[0][1].tasks + found[0][1].unseen for _, m in found):
        return None
    first = found[0][1]
    out = heat(
        [label for label, _ in found],
        first.tasks,
        first.unseen,
        np.stack([m.mean[len(m.tasks)] for _, m in found]),
    )
    for row in out["rows"]:
        for cell, column in zip(row["cells"], out["columns"], strict=True):
            value = cell["value"]
            shown = "not evaluated" if value is None else f"{value:.1f}"
            cell |= {"kind": "after", "title": f"{row['label']}, {column['name']}: {shown}"}
    return out


def _tests(groups: Sequence[Group], against: Group) -> View:
    """Differences with their Holm-corrected p; bold where p < 0.05."""
    rows = []
    for g in groups:
        test = summary.paired(g, against)
        found = [test.named(name) for name in COMPARED]
        kind = next((f"{c.test} (n = {c.n})" for c in found if c is not None and c.test), "")
        cells = []
        for c in found:
            text = "–" if c is None or c.difference is None else f"{c.difference:+.1f}"
            p = (
                ""
                if c is None or c.p_holm is None
                else f"p {'< 0.001' if c.p_holm < 1e-3 else f'= {c.p_holm:.3f}'}"
            )
            cells.append({"text": text, "p": p, "sure": bool(c and c.p_holm is not None and c.p_holm < 0.05)})
        rows.append({"label": g.label, "reason": test.reason, "cells": cells, "test": kind})
    return {"columns": COMPARED, "rows": rows}
