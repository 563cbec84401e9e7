"""Runs as tables: `compare` for the terminal (plain in a pipe), `results_table` as markdown for the docs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from retain.metrics.render import show
from retain.report import summary
from retain.report.load import Group, Run, group, load_runs
from retain.types import RetainError

__all__ = ["compare", "load_runs", "results_table"]

COLUMNS = ("Last", "Avg (MAA)", "New (MFT)", "BWT", "Forgetting", "FWT")
RESULT_COSTS = {
    "Train time": "train_s",
    "Peak memory": "peak_memory_bytes",
    "Trainable": "trainable_parameters",
    "Stored": "stored_bytes",
}
_TESTED = ("Last", "Avg (MAA)", "BWT", "Forgetting")


def compare(
    runs: Sequence[Run | Path | str], console: Console | None = None, against: str | None = None
) -> None:
    """Print metrics with intervals, budgets, paired tests and warnings, for runs or run folders.

    `against` names a method, a run or a folder; None: the first run's group. RetainError: it names none of
    them.
    """
    console = console or Console()
    paths = [run for run in runs if not isinstance(run, Run)]
    groups = group([*(run for run in runs if isinstance(run, Run)), *(load_runs(paths) if paths else ())])
    base = _named(groups, against)
    show(metric_rows(groups), console=console)
    _say(console, formulas(groups))
    show(cost_rows(groups), "Cost at the end, mean over seeds", console=console)
    show(
        state_rows(groups),
        "Method state / everything stored after each task, mean over seeds",
        console=console,
    )
    others = [g for g in groups if g is not base]
    if others:
        show(
            test_rows(others, base),
            f"Against {base.label} (difference; p corrected by Holm)",
            console=console,
        )
    if published := summary.beside_published(groups):
        show(published[1], f"Published ({published[0]}) and ours", console=console)
    for text in summary.warnings(groups, base):
        console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def metric_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Per group each metric as `mean ± sd [low, high]`; see `summary.Number` for the interval."""
    found = [summary.numbers(g) for g in groups]
    names = [name for name in COLUMNS if any(name in n for n in found)]
    body = []
    for g, of_group in zip(groups, found, strict=True):
        cells = [_with_interval(of_group.get(name)) for name in names]
        body.append([g.label, str(len(summary.counted(g))), *cells])
    return [["method", "seeds", *names], *body]


def formulas(groups: Sequence[Group]) -> str:
    """The formula of every metric shown, one per line."""
    known = next((n for g in groups if (n := summary.numbers(g))), {})
    lines = [f"  {name} = {known[name].formula}" for name in COLUMNS if name in known]
    kind = "sd over seeds; [95 % interval]: over seeds, over test samples for a single run"
    return "\n".join([*lines, f"  ± {kind}"]) if lines else ""


def cost_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Final budgets; entries that no run has are left out."""
    entries = [c for c in summary.COSTS if any(summary.mean_cost(g, c.key) is not None for g in groups)]
    body = [[g.label, *(summary.written(c, summary.mean_cost(g, c.key)) for c in entries)] for g in groups]
    return [["method", *(c.words for c in entries)], *body]


def state_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Bytes of the method's state, and of adapters and state together, row by row: what grows with the tasks."""
    n_rows = max(len(run.learned) for g in groups for run in g.runs)
    body = []
    for g in groups:
        cells = []
        for i in range(n_rows):
            budgets = [run.learned[i].budget for run in summary.counted(g) if i < len(run.learned)]
            pairs = [[summary.cost(b, k) for b in budgets] for k in ("method_state_bytes", "stored_bytes")]
            known = [[v for v in values if v is not None] for values in pairs]
            cells.append(" / ".join(summary.size(sum(v) / len(v)) if v else "–" for v in known))
        body.append([g.label, *cells])
    return [["method", *map(str, range(1, n_rows + 1))], *body]


def test_rows(groups: Sequence[Group], against: Group) -> list[list[str]]:
    """Paired differences; the last column says over what was paired, or why nothing could be."""
    body = []
    for g in groups:
        test = summary.paired(g, against)
        found = [test.named(name) for name in _TESTED]
        cells = []
        for c in found:
            p = "" if c is None or c.p_holm is None else f" (p {c.p_holm:.3f})"
            cells.append("–" if c is None else f"{c.difference:+.2f}{p}")
        how = next((f"{c.test}, n = {c.n}" for c in found if c is not None and c.test), test.reason)
        body.append([g.label, *cells, how])
    return [["method", *_TESTED, "test"], *body]


def results_table(runs: Sequence[Run], labels: Mapping[str, str] | None = None) -> str:
    """The results as a markdown table: mean ± sd over seeds per method, in the order of the runs.

    `labels` names the method of a run folder otherwise than by its parts. Routed: `summary.routing`.
    """
    groups = group(runs)
    unseen = any(run.matrix is not None and run.matrix.unseen for run in runs)
    names = ("Last", *(["Unseen"] if unseen else []), "Avg (MAA)", "New (MFT)", "BWT", "Forgetting")
    routed = {
        g.label: [v for r in summary.counted(g) if (v := summary.routing(r)) is not None] for g in groups
    }
    costs = {c.key: c for c in summary.COSTS}
    head = ["Method", *names, *(["Routed"] if any(routed.values()) else []), *RESULT_COSTS, "Seeds"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for g in groups:
        found = summary.numbers(g)
        cells = [_mean_sd(found.get(name)) for name in names]
        cells += [_spread(routed[g.label])] if any(routed.values()) else []
        cells += [summary.written(costs[key], summary.mean_cost(g, key)) for key in RESULT_COSTS.values()]
        label = (labels or {}).get(g.runs[0].path.name, g.label)
        lines.append(_line([label, *cells, str(len(summary.counted(g)))]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _mean_sd(number: summary.Number | None) -> str:
    return "–" if number is None or number.value is None else _told(number.value, number.sd)


def _spread(values: Sequence[float]) -> str:
    return (
        _told(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)
        if values
        else "–"
    )


def _told(mean: float, sd: float | None) -> str:
    return f"{mean:.1f}" + (f" ± {sd:.1f}" if sd is not None else "")


def _with_interval(number: summary.Number | None) -> str:
    if number is None or number.value is None or number.low is None or number.high is None:
        return _mean_sd(number)
    return f"{_mean_sd(number)} [{number.low:.1f}, {number.high:.1f}]"


def _named(groups: Sequence[Group], name: str | None) -> Group:
    """The group of that method, run or folder."""
    if not groups:
        raise RetainError("no run to compare")
    if name is None:
        return groups[0]
    for g in groups:
        if name == g.label or any(name in (run.name, run.path.name, str(run.path)) for run in g.runs):
            return g
    choices = [g.label for g in groups] + [run.path.name for g in groups for run in g.runs]
    raise RetainError(f"against: no method or run {name!r} among those given; choose from {choices}")


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
