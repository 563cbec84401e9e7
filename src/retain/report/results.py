"""docs/results.md: many runs as one page, stream by stream and order by order: the table, paired tests,
scores per task, budgets, what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retain.metrics import Comparison
from retain.report import summary
from retain.report.load import Group, Run, group, load_runs
from retain.report.tables import results_table, state_rows
from retain.types import RetainError

BASELINES = ("lora", "replay", "merge_task_arithmetic", "merge_average")
METRICS = ("Last", "Forgetting")
MERGED = ("Last", "Unseen")
"""What is tested: on a stream with unseen tasks, the learned and the unseen ones at the end."""


def write_results(folder: Path, out: Path, command: str = "make pocket-table") -> Path:
    """Fill the part between `<!-- begin:measured -->` and its end in `out` from the finished runs under `folder`.

    `command` is what the page says it was made by.
    """
    runs = load_runs(sorted(p.parent for p in folder.glob("*/DONE")))
    sections: dict[str, list[Run]] = {"": []}  # the pocket's default order first
    for run in runs:
        sections.setdefault(section_name(run), []).append(run)
    parts = [
        f"Made from {len(runs)} runs by `{command}`; mean ± sample standard deviation over seeds. Routed: share "
        "of test samples that an adapter trained on their task answered, after the last task (a blend counts as its "
        "heaviest adapter). Stored: adapters and method state at the end.\n"
    ]
    for title, members in sections.items():
        if members:
            parts += _section(title, _named(group(members)))
    begin, end = "<!-- begin:measured -->", "<!-- end:measured -->"
    text = out.read_text(encoding="utf8") if out.is_file() else f"# Results\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise RetainError(f"{out}: the markers {begin} and {end} are missing")
    head, tail = text.split(begin)[0], text.split(end)[1]
    out.write_text(f"{head}{begin}\n" + "\n".join(parts) + f"\n{end}{tail}", encoding="utf8")
    return out


def _section(title: str, groups: Sequence[Group]) -> list[str]:
    """Everything about the runs of one stream and order of the tasks."""
    matrix = groups[0].runs[0].matrix
    tasks = ", ".join(matrix.tasks) if matrix else ""
    tasks += f"; never trained on: {', '.join(matrix.unseen)}" if matrix and matrix.unseen else ""
    return [
        *([f"## {title}\n\nTasks: {tasks}.\n"] if title else []),
        "<!-- table -->",  # the README shows the first
        table(groups).rstrip(),
        "<!-- /table -->\n",
        *(tests(groups, name) for name in BASELINES if any(g.label == name for g in groups)),
        per_task(groups),
        budgets(groups),
        state(groups),
    ]


def recipe_name(run: Run) -> str:
    """The recipe's name as the folder says it: NAME-SEED, or NAME.ORDER-SEED for another order of the tasks."""
    return (run.path.name.rpartition("-")[0] or run.path.name).partition(".")[0]


def section_name(run: Run) -> str:
    """Which part of the page a run belongs to; empty for the pocket stream in its default order."""
    stream, order = next(iter(run.config.get("stream", {"pocket": {}}))), order_name(run)
    words = ([f"Stream `{stream}`"] if stream != "pocket" else []) + ([f"Order `{order}`"] if order else [])
    return ", ".join(words)


def order_name(run: Run) -> str:
    """The order of the tasks as the folder says it; empty for the default."""
    return run.path.name.rpartition("-")[0].partition(".")[2]


def table(groups: Sequence[Group]) -> str:
    """One row per method, best Last first."""
    return results_table(
        [run for g in sorted(groups, key=_last, reverse=True) for run in g.runs], labels=_labels(groups)
    )


def tests(groups: Sequence[Group], baseline: str) -> str:
    """Every method against one baseline: difference, 95 % interval, p; over seeds where two or more are shared."""
    against = next(g for g in groups if g.label == baseline)
    matrix = against.runs[0].matrix
    names = MERGED if matrix and matrix.unseen else METRICS
    lines = [
        f"**Against `{baseline}`** (difference, 95 % interval, p; over samples it speaks of these runs only):\n"
    ]
    lines += ["| method | " + " | ".join(names) + " | paired |", "|---|" + "---|" * len(names) + "---|"]
    for g in groups:
        if g is against:
            continue
        made = summary.paired(g, against)
        found = [made.named(name) for name in names]
        how = next((f"{c.test}, n = {c.n}" for c in found if c and c.test), made.reason or "–")
        lines.append(f"| {g.label} | " + " | ".join(_tested(c) for c in found) + f" | {how} |")
    return "\n".join(lines) + "\n"


def _tested(c: Comparison | None) -> str:
    if c is None or c.difference is None or c.low is None or c.high is None or c.p is None:
        return "–"
    return f"{c.difference:+.1f} [{c.low:+.1f}, {c.high:+.1f}], p = {c.p:.3f}"


def per_task(groups: Sequence[Group]) -> str:
    """Score on each task at the end, and right after it was learned in brackets: means over seeds."""
    tasks = groups[0].runs[0].tasks
    lines = ["**Per task**: at the end of the stream, and (right after the task), mean over seeds:\n"]
    lines += ["| method | " + " | ".join(tasks) + " |", "|---|" + "---:|" * len(tasks)]
    for g in groups:
        mean = summary.mean_matrix(g)
        if mean is None:
            continue
        last, cells = mean.mean[-1], []
        for j in range(len(tasks)):
            new = (
                mean.mean[j + 1][j] if j < len(mean.tasks) else float("nan")
            )  # an unseen task is never learned
            at_end = last[j] if last[j] == last[j] else mean.mean[0][j]  # zero-shot has its first row only
            cells.append(
                f"{at_end:.0f}" + (f" ({new:.0f})" if new == new and j + 1 < len(mean.mean) - 1 else "")
            )
        lines.append(f"| {g.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def budgets(groups: Sequence[Group]) -> str:
    """What each method took, mean over seeds."""
    costs = [c for c in summary.COSTS if any(summary.mean_cost(g, c.key) is not None for g in groups)]
    lines = [
        "**Budgets**, mean over seeds:\n",
        "| method | " + " | ".join(c.words for c in costs) + " |",
    ]
    lines.append("|---|" + "---:|" * len(costs))
    for g in groups:
        cells = [summary.written(c, summary.mean_cost(g, c.key)) for c in costs]
        lines.append(f"| {g.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def state(groups: Sequence[Group]) -> str:
    """What each method keeps after each task: bytes of its state, and of adapters and state together."""
    head, *rows = state_rows(groups)
    lines = ["**Method state / everything stored after each task**, mean over seeds:\n"]
    lines += [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]
    return "\n".join(lines) + "\n"


def _named(groups: Sequence[Group]) -> list[Group]:
    return [Group(recipe_name(g.runs[0]), g.runs) for g in groups]


def _labels(groups: Sequence[Group]) -> dict[str, str]:
    return {run.path.name: g.label for g in groups for run in g.runs}


def _last(g: Group) -> float:
    found = summary.numbers(g).get("Last")
    return found.value if found and found.value is not None else -1.0
