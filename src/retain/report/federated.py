"""What a federated run adds to its report: scores by stage, what travelled, and who was left out and why."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retain.files import parse_json
from retain.metrics.intervals import Array
from retain.metrics.stages import StageScore, last_and_avg, stage_scores
from retain.report.load import Run, load_runs
from retain.report.summary import size
from retain.types import RetainError

View = dict[str, Any]
SO_FAR = "seen so far"


def is_federated(run: Run) -> bool:
    """Whether clients learned."""
    return any(e.get("kind") == "round" for e in run.events)


def stages_of(run: Run) -> list[StageScore]:
    """The finished stages of a run."""
    rows = run.learned
    scores = [
        {
            t: sum(float(p["score"]) for p in found) / len(found)
            for t in run.tasks
            if (found := row.predictions(t))
        }
        for row in rows
    ]
    return stage_scores([row.task for row in rows], [row.folder.learned for row in rows], scores)


def staged(run: Run) -> bool:
    """Whether the stages are not the stream's tasks one by one, so that the matrix has no place for their rows."""
    done = [
        n for n, row in enumerate(run.learned, 1) if len(row.folder.learned) == n and row.task in run.tasks
    ]
    return is_federated(run) and len(done) < len(run.learned)


def stage_matrix(run: Run) -> tuple[list[str], Array]:
    """Scores of every task (columns, as `run.tasks`) before the first stage and after each: names, and (S + 1, T)."""
    rows = [row for row in run.rows if row.done]
    values = np.full((len(rows), len(run.tasks)), np.nan)
    for i, row in enumerate(rows):
        for j, task in enumerate(run.tasks):
            if found := row.predictions(task):
                values[i, j] = sum(float(p["score"]) for p in found) / len(found)
    return [row.label for row in rows], values


def stage_rows(run: Run) -> list[list[str]]:
    """For a terminal: every task after every stage, and the mean of the tasks seen so far."""
    names, values = stage_matrix(run)
    means = ["", *(f"{s.mean:.2f}" for s in stages_of(run))]
    body = [
        [name, *("" if np.isnan(v) else f"{v:.2f}" for v in row), mean]
        for name, row, mean in zip(names, values, means, strict=True)
    ]
    return [["after", *run.tasks, SO_FAR], *body]


def federated_view(run: Run) -> View | None:
    """The section; None for a central run."""
    if not is_federated(run) or not run.learned:
        return None
    rounds = [e for e in run.events if e.get("kind") == "round"]
    left = [e for e in run.events if e.get("kind") == "client_left_out"]
    found, rows = stages_of(run), []
    for stage in found:
        mine = [e for e in rounds if e.get("task") == stage.name]
        asked = sum(len(e.get("clients", {})) for e in mine)
        clients = {c for e in mine for c in e.get("clients", {})}
        sent, received = (sum(float(e.get(k, 0)) for e in mine) for k in ("sent", "received"))
        gone = sum(1 for e in left if e.get("task") == stage.name)
        rows.append(
            [stage.name, ", ".join(stage.seen), f"{stage.mean:.1f}", str(len(mine)), str(len(clients)),
             size(sent / asked) if asked else "–", size(received / asked) if asked else "–", str(gone)]
        )  # fmt: skip
    last, avg = last_and_avg(found)
    head = [
        "stage",
        "tasks seen",
        "their mean",
        "rounds",
        "clients",
        "to a client",
        "from a client",
        "left out",
    ]
    reasons = Counter((str(e.get("client")), str(e.get("why"))) for e in left)
    words = [
        f"{client}: {why}" + (f" ({n} times)" if n > 1 else "")
        for (client, why), n in reasons.most_common(12)
    ]
    return {"columns": head, "rows": rows, "last": f"{last:.1f}", "avg": f"{avg:.1f}", "left": words}


# -- many runs ---------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- begin:measured -->", "<!-- end:measured -->"
ACTIVATIONS = "activations.json"
"""Of a run: the mean score at its end with each way to weigh subspaces, where somebody measured it."""

Cell = tuple[str, str, float]  # recipe, setting, beta


def write_table(folder: Path, out: Path) -> Path:
    """Fill the measured part of `out` from the finished federated runs under `folder`: one table per setting."""
    runs = load_runs(sorted(p.parent for p in folder.glob("*/DONE")))
    cells: dict[Cell, list[Run]] = {}
    for run in runs:
        spec = run.config["federated"]
        cells.setdefault((_recipe(run), spec["setting"], float(spec["beta"])), []).append(run)
    settings = list(dict.fromkeys(setting for _, setting, _ in cells))
    spec = runs[0].config["federated"]
    text = [
        f"Made from {len(runs)} runs by `scripts/pocket_fed.py`: {spec['clients']} clients, {spec['per_round']} a round, "
        f"{spec['rounds']} rounds a stage. Last and Avg are FCIT's: the mean over the tasks seen so far after the last "
        "stage, and its mean over stages; mean ± sample standard deviation over seeds, their number in brackets. Bytes "
        "are those of messages, per client and round, over all stages.\n"
    ]
    for setting in sorted(settings, key=_place):
        text += [f"## {setting}\n", *_setting_table(setting, cells), ""]
    if found := _activation_table([r for r in runs if (r.path / ACTIVATIONS).is_file()]):
        text += ["## Ways to weigh subspaces\n", *found, ""]
    page = (
        out.read_text(encoding="utf8")
        if out.is_file()
        else f"# Results of federated runs\n\n{BEGIN}\n{END}\n"
    )
    if BEGIN not in page or END not in page:
        raise RetainError(f"{out}: the markers {BEGIN} and {END} are missing")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    out.write_text(f"{head}{BEGIN}\n" + "\n".join(text) + f"{END}{tail}", encoding="utf8")
    return out


ORDER = ("task_hom", "task_het", "capability_hom", "capability_het")


def _place(setting: str) -> tuple[int, str]:
    return (ORDER.index(setting) if setting in ORDER else len(ORDER), setting)


def _recipe(run: Run) -> str:
    """`disco` of runs/table_fed/disco_task_hom.beta1.0-0."""
    name = run.path.name.partition(".")[0]
    return name.removesuffix("_" + str(run.config["federated"]["setting"]))


def _setting_table(setting: str, cells: Mapping[Cell, Sequence[Run]]) -> list[str]:
    mine = {(name, beta): runs for (name, s, beta), runs in cells.items() if s == setting}
    betas = sorted({beta for _, beta in mine})
    head = [
        "method",
        *(f"{what}, beta {beta:g}" for beta in betas for what in ("Last", "Avg")),
        "to a client",
        "from a client",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name in dict.fromkeys(name for name, _ in mine):
        row, traffic = [name], list[tuple[float, float]]()
        for beta in betas:
            runs = mine.get((name, beta), ())
            pairs = [last_and_avg(stages_of(run)) for run in runs]
            row += [_spread([last for last, _ in pairs]), _spread([avg for _, avg in pairs])]
            traffic += [_traffic(run) for run in runs]
        means = [sum(t[i] for t in traffic) / len(traffic) for i in (0, 1)]
        lines.append("| " + " | ".join([*row, *(size(m) for m in means)]) + " |")
    return lines


def _traffic(run: Run) -> tuple[float, float]:
    """Bytes to and from a client in a round, everything of a stage counted."""
    asked = sum(len(e.get("clients", {})) for e in run.events if e.get("kind") == "round")
    return run.budget["sent_bytes"] / asked, run.budget["received_bytes"] / asked


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean:.1f}{sd} ({len(values)})"


def _activation_table(runs: Sequence[Run]) -> list[str]:
    """Mean Last of the same trained runs, by how subspaces are weighed when the model answers."""
    if not runs:
        return []
    told = {run.path.name: parse_json((run.path / ACTIVATIONS).read_text(encoding="utf8")) for run in runs}
    ways = list(next(iter(told.values())))
    lines = ["| setting | " + " | ".join(ways) + " | runs |", "|---|" + "---:|" * (len(ways) + 1)]
    for setting in ORDER:
        mine = [told[r.path.name] for r in runs if r.config["federated"]["setting"] == setting]
        if mine:
            means = [sum(t[w] for t in mine) / len(mine) for w in ways]
            lines.append(f"| {setting} | " + " | ".join(f"{m:.1f}" for m in means) + f" | {len(mine)} |")
    return lines
