"""The numbers that tables and pages share: metrics with intervals, spread over seeds, budgets, tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from retain.metrics import Comparison, Metric, aggregate, compare_runs, compare_seeds
from retain.metrics.matrix import AccuracyMatrix, Aggregate
from retain.report.load import Group, Record, Run
from retain.types import RetainError

TOLERANCE = 0.01
"""Budgets of compared runs may differ by this share before a warning is given."""


# -- metrics --------------------------------------------------------------------------------------------


def metrics_of(run: Run) -> list[Metric]:
    """All metrics of one run with 95 % intervals over test samples."""
    return run.matrix.metrics() if run.matrix is not None else []


@dataclass(frozen=True)
class Number:
    """One metric of a group. `sd` is over seeds (None for one run); `low`..`high` is a 95 % interval.

    With one run the interval is over test samples, with several the t-interval over seeds.
    """

    name: str
    formula: str
    value: float | None
    sd: float | None
    low: float | None
    high: float | None
    up: bool
    reason: str = ""


def counted(group: Group) -> list[Run]:
    """The runs that the numbers of a group are taken over.

    The finished ones that learned the same stream as the first, one per seed (the first given); where none is
    finished, the one that came furthest, on its own.
    """
    runs = [run for run in group.runs if run.matrix is not None]
    done = [run for run in runs if run.done]
    if not done:
        return sorted(runs, key=lambda run: -len(run.learned))[:1]
    stream = [(run.matrix.tasks, run.matrix.unseen) for run in done if run.matrix is not None]
    same = [run for run, tasks in zip(done, stream, strict=True) if tasks == stream[0]]
    return list({run.seed: run for run in reversed(same)}.values())[::-1]


def finished(group: Group) -> bool:
    """Whether the numbers of the group are those of finished runs."""
    runs = counted(group)
    return bool(runs) and all(run.done for run in runs)


def numbers(group: Group) -> dict[str, Number]:
    """Every metric of a group by name, over `counted(group)`; empty where no run has a matrix."""
    runs = counted(group)
    if not runs:
        return {}
    first = metrics_of(runs[0])
    if len(runs) == 1:
        alone = [Number(m.name, m.formula, m.value, None, m.low, m.high, m.up, m.reason) for m in first]
        return {number.name: number for number in alone}
    spreads = aggregate(matrices(runs)).metrics
    return {
        s.name: Number(s.name, s.formula, s.mean, s.std, s.low, s.high, m.up, s.reason)
        for s, m in zip(spreads, first, strict=True)
    }


def matrices(runs: Sequence[Run]) -> list[AccuracyMatrix]:
    """The matrices that are there."""
    return [run.matrix for run in runs if run.matrix is not None]


def mean_matrix(group: Group) -> Aggregate | None:
    """Cells averaged over `counted(group)`; None without a matrix."""
    found = matrices(counted(group))
    return aggregate(found) if found else None


def routing(run: Run) -> float | None:
    """Share in percent of the learned tasks' test samples that an adapter trained on their task answered, after the
    last task. A blend counts as its heaviest adapter.

    None where nothing is routed: all tasks trained the same adapters, or no sample has a heaviest one that a task
    trained (a sum, a merge).
    """
    trained = {row.task: row.trained for row in run.learned}
    if len(set(trained.values())) < 2:
        return None
    hits, routed, everyone = [], False, frozenset().union(*trained.values())
    for task, own in trained.items():
        for record in run.learned[-1].predictions(task):
            mix = record.get("mix") or {}
            top = [name for name, w in mix.items() if w == max(mix.values())]
            routed |= len(top) == 1 and top[0] in everyone
            hits.append(len(top) == 1 and top[0] in own)
    return 100 * sum(hits) / len(hits) if routed else None


# -- paired tests ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Test:
    """`label` minus `against`, metric by metric; or the reason why the two cannot be compared."""

    label: str
    against: str
    comparisons: tuple[Comparison, ...]
    reason: str = ""

    def named(self, name: str) -> Comparison | None:
        """The comparison of one metric, where it was made."""
        return next((c for c in self.comparisons if c.name == name and c.difference is not None), None)


def paired(group: Group, against: Group) -> Test:
    """Over seeds where both groups share at least two, else over the samples of one run of each."""
    ours = {run.seed: run for run in counted(group)}
    theirs = {run.seed: run for run in counted(against)}
    if not ours or not theirs:
        empty = group.label if not ours else against.label
        return Test(group.label, against.label, (), f"{empty} has no matrix yet")
    if not (finished(group) and finished(against)):
        which = group.label if not finished(group) else against.label
        return Test(
            group.label, against.label, (), f"{which} is not finished: its numbers speak of fewer tasks"
        )
    seeds = sorted(ours.keys() & theirs.keys())
    rng = np.random.default_rng(0)
    try:
        if len(seeds) >= 2:
            pairs = [matrices([side[s] for s in seeds]) for side in (ours, theirs)]
            made = compare_seeds(pairs[0], pairs[1], rng)
        else:
            at = seeds[0] if seeds else None
            one = [side[at] if at is not None else next(iter(side.values())) for side in (ours, theirs)]
            a, b = matrices(one)
            made = compare_runs(a, b, rng)
    except RetainError as error:  # other tasks, another order or other samples: said, not compared
        return Test(group.label, against.label, (), str(error))
    return Test(group.label, against.label, tuple(made))


# -- a paper's table ------------------------------------------------------------------------------------


def beside_published(groups: Sequence[Group]) -> tuple[str, list[list[str]]] | None:
    """Source and rows of the published table of the groups' benchmark, and under it each group's last row.

    Tasks that a run left out are left out of every row; means are over the tasks shown, learned and unseen
    apart, and missing where a cell is. None: the benchmark has no published table.
    """
    run = next((r for g in groups for r in counted(g) if r.published and r.matrix is not None), None)
    if run is None or run.matrix is None:
        return None
    learned, unseen = run.matrix.tasks, run.matrix.unseen
    tables: dict[str, dict[str, float]] = {n: dict(v) for n, v in run.published["scores"].items()}
    for g in groups:
        mean = mean_matrix(g)
        if mean is not None and (mean.tasks, mean.unseen) == (learned, unseen):
            last = next((row for row in reversed(mean.mean) if not np.isnan(row).all()), mean.mean[0])
            tables[f"ours: {g.label}"] = dict(zip((*learned, *unseen), map(float, last), strict=True))
    means = {"seen": learned, "unseen": unseen} if unseen else {"mean": learned}
    rows = [["method", *learned, *unseen, *means]]
    for name, scores in tables.items():
        cells = [scores.get(task, math.nan) for task in (*learned, *unseen)]
        cells += [sum(scores.get(t, math.nan) for t in tasks) / len(tasks) for tasks in means.values()]
        rows.append([name, *("–" if math.isnan(c) else f"{c:.2f}" for c in cells)])
    return str(run.published.get("source", "")), rows


# -- budgets --------------------------------------------------------------------------------------------


def count(value: float) -> str:
    """A count with a suffix: 950, 12.3k, 4.1M, 2.50G."""
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if suffix == "k" else size)
            return f"{scaled:.3g}{suffix}" if scaled < 1000 else f"{scaled:.0f}{suffix}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes with a binary unit."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}"
    return f"{value:.0f} B"


def duration(value: float) -> str:
    """Seconds as 7.3 s, 3 min 12 s or 2 h 05 min."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class Cost:
    """One entry of a budget: its key in budget.json, the words, how it is written, whether it must match."""

    key: str
    words: str
    write: Callable[[float], str]
    matched: bool


COSTS = (
    Cost("trainable_parameters", "trainable parameters", count, True),
    Cost("stored_parameters", "stored parameters", count, True),
    Cost("stored_bytes", "stored bytes", size, True),
    Cost("method_state_bytes", "of it method state", size, False),
    Cost("steps", "steps", count, True),
    Cost("samples", "samples", count, True),
    Cost("tokens", "tokens", count, True),
    Cost("train_flops", "training FLOPs", count, True),
    Cost("flops", "FLOPs", count, True),
    Cost("train_s", "training time", duration, False),
    Cost("eval_s", "evaluation time", duration, False),
    Cost("wall_s", "wall time", duration, False),
    Cost("peak_memory_bytes", "peak memory", size, False),
    Cost("sent_bytes", "sent to clients", size, False),  # federated
    Cost("received_bytes", "received from clients", size, False),
)


def cost(budget: Record, key: str) -> float | None:
    """A number of a budget, None where it is not there."""
    value = budget.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None  # type: ignore[arg-type]


def mean_cost(group: Group, key: str) -> float | None:
    """A number of the final budgets, averaged over `counted(group)` where it is known."""
    values = [v for run in counted(group) if (v := cost(run.budget, key)) is not None]
    return sum(values) / len(values) if values else None


def written(entry: Cost, value: float | None) -> str:
    """A budget number in words, a dash where it is not known."""
    return "–" if value is None else entry.write(value)


def differing(group: Group, against: Group) -> list[str]:
    """Where the budgets of two groups differ by more than the tolerance: `steps 150 against 300`."""
    out = []
    for entry in COSTS:
        a, b = mean_cost(group, entry.key), mean_cost(against, entry.key)
        if not entry.matched or a is None or b is None or abs(a - b) <= TOLERANCE * max(abs(a), abs(b)):
            continue
        factor = f" ({a / b:.2f} times)" if b else ""
        out.append(f"{entry.words} {entry.write(a)} against {entry.write(b)}{factor}")
    return out


def warnings(groups: Sequence[Group], against: Group) -> list[str]:
    """What to know before believing a comparison: unequal budgets or seeds, unfinished runs."""
    out = []
    for group in groups:
        for run in group.runs:
            if not run.done:
                out.append(f"{run.path.name} is not finished: {progress_of(run)}.")
        used, twice = (
            counted(group),
            [run for run in group.runs if group.seeds.count(run.seed) > 1 and run.done],
        )
        out += [
            f"{run.path.name} repeats seed {run.seed} of {group.label} and is not counted."
            for run in twice
            if run not in used
        ]
        if group is against or not (finished(group) and finished(against)):
            continue
        if found := differing(group, against):
            text = f"Budgets of {group.label} and {against.label} differ by more than {TOLERANCE:.0%}"
            out.append(f"{text}: {'; '.join(found)}.")
        if sorted(group.seeds) != sorted(against.seeds):
            seeds = f"{sorted(group.seeds)}, {against.label} has {sorted(against.seeds)}"
            out.append(f"Seeds differ: {group.label} has {seeds}.")
    return out


def progress_of(run: Run) -> str:
    """How far a run came, e.g. `3 of 8 tasks learned and evaluated`."""
    done, total = len(run.learned), len(run.tasks)
    if not done:
        first = run.rows and run.rows[0].done
        return "only the zero-shot row is complete" if first else "no row is complete"
    return (
        f"{done} of {total} tasks learned and evaluated" if total else f"{done} tasks learned and evaluated"
    )
