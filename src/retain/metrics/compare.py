"""Is run A better than run B? Paired tests over samples (two runs) and over seeds (two lists of runs).

Over samples: both runs answered the same test samples, so a sample is a pair. Interval: that of the metrics, of the
differences (`retain.metrics.intervals`). p: paired permutation, which swaps the two runs' scores of a sample, in all rows at
once, with probability 1/2 (Noreen 1989). It speaks about these two trained models, not about the methods.

Over seeds: pairs are runs of equal seed. Interval and p from the paired t-test, or p by sign flips of the
differences. It speaks about the methods, as far as so few seeds can.

Many comparisons: `holm` (Holm 1979) keeps the chance of any false finding at the level.
"""

# R resamples, N samples of one task, K pairs

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from retain.metrics.formulas import DEFINITIONS, Definition, one_cell
from retain.metrics.intervals import SAME, Array, interval
from retain.metrics.matrix import LEVEL, AccuracyMatrix, same_stream, shares_of, span_of, value_of
from retain.types import RetainError

PERMUTATIONS = 10_000
_EXACT = 12  # up to 2^12 sign patterns are enumerated


@dataclass(frozen=True)
class Comparison:
    """A minus B for one metric or task, in score units. `p` is two-sided; `p_holm` corrects over the list it
    is in.

    Where the comparison cannot be made all numbers are None and `reason` says why.
    """

    name: str
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    n: int = 0
    test: str = ""
    reason: str = ""


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down: the k-th smallest of m p becomes max over j <= k of min(1, (m - j + 1) p_j)."""
    order = np.argsort(p, kind="stable")
    out, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        out[i] = running
    return out


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons with `p_holm` filled in over all that have a p."""
    having = [c.p for c in comparisons if c.p is not None]
    values = iter(holm(having))
    return [c if c.p is None else replace(c, p_holm=next(values)) for c in comparisons]


def _p(null: Array, seen: float, exact: bool) -> float:
    """Share of |null| >= |seen| (with a tolerance for rounding); the seen pattern counts as one draw if not
    exact.
    """
    hits = int((np.abs(null) >= abs(seen) - 1e-9).sum())
    return hits / len(null) if exact else (hits + 1) / (len(null) + 1)


def _flipped_sums(d_K: Array, rng: np.random.Generator, permutations: int) -> tuple[Array, bool]:
    """Sums of differences under sign flips, (R,), and whether these are all 2^K patterns."""
    k = len(d_K)
    if k <= _EXACT:
        return np.array(list(itertools.product((-1.0, 1.0), repeat=k))).reshape(-1, k) @ d_K, True
    parts = [rng.choice((-1.0, 1.0), size=(r, k)) @ d_K for r in _steps(permutations, k)]
    return np.concatenate(parts), False


def _steps(total: int, width: int) -> list[int]:
    """Split `total` rows of `width` numbers into chunks of at most 32 MB."""
    step = max(1, 4_000_000 // width)
    return [min(step, total - start) for start in range(0, total, step)]


def permutation_p(
    differences: Sequence[float], rng: np.random.Generator, permutations: int = PERMUTATIONS
) -> float:
    """Two-sided sign-flip p of the mean of K paired differences; exact up to 12 non-zero ones."""
    d = np.asarray(differences, dtype=np.float64)
    d = d[d != 0]  # a zero stays a zero under any sign
    if not len(d):
        return 1.0
    null, exact = _flipped_sums(d, rng, permutations)
    return _p(null, float(d.sum()), exact)


# ------------------------------------------------------------------------------------- two runs, over samples


def _pairs(a: AccuracyMatrix, b: AccuracyMatrix, task: str) -> tuple[Array, Array] | None:
    """(T + 1, N) scores of both runs, samples in a's order; None where either has no per-sample scores."""
    if task not in a.samples or task not in b.samples:
        return None
    rows_a, rows_b = a.samples[task], b.samples[task]
    ids_a, ids_b = a.ids.get(task), b.ids.get(task)
    if ids_a is not None and ids_b is not None and ids_a != ids_b:
        if len(set(ids_a)) < len(ids_a) or set(ids_a) != set(ids_b):
            only = sorted(set(ids_a) ^ set(ids_b))[:3]
            raise RetainError(f"task {task!r}: the two runs were tested on different samples, e.g. {only}")
        place = {s: i for i, s in enumerate(ids_b)}
        rows_b = rows_b[:, [place[s] for s in ids_a]]
    if rows_a.shape != rows_b.shape:
        raise RetainError(
            f"task {task!r}: {rows_a.shape[1]} samples in one run, {rows_b.shape[1]} in the other"
        )
    return rows_a, rows_b


def _swap_cells(
    a: AccuracyMatrix, b: AccuracyMatrix, rng: np.random.Generator, n: int
) -> tuple[Array, Array]:
    """Cells of both runs with each sample's pair swapped at random, (R, T + 1, T + U) each."""
    cells_a, cells_b = (np.full((n, *a.values.shape), np.nan) for _ in range(2))
    for j, task in enumerate(a.all_tasks):
        if pair := _pairs(a, b, task):
            centre, half = (pair[0] + pair[1]).mean(axis=1) / 2, (pair[0] - pair[1]) / 2
            k = half.shape[1]
            shift = np.concatenate([rng.choice((-1.0, 1.0), size=(r, k)) @ half.T / k for r in _steps(n, k)])
            cells_a[:, :, j], cells_b[:, :, j] = centre + shift, centre - shift
    return cells_a, cells_b


def _aligned(a: AccuracyMatrix, b: AccuracyMatrix) -> tuple[AccuracyMatrix, AccuracyMatrix]:
    """Both runs with the samples that both have, in a's order; without them where only one has."""
    pairs = {task: pair for task in a.all_tasks if (pair := _pairs(a, b, task))}
    one, two = (replace(m, samples={k: p[i] for k, p in pairs.items()}, ids={}) for i, m in enumerate((a, b)))
    return one, two


def _over_samples(
    name: str, seen: float, found: tuple[float, float] | None, swap: Array, n: int
) -> Comparison:
    if np.isnan(swap).any():
        return Comparison(name, seen, n=n, reason="no per-sample scores in some cell: no interval, no test")
    low, high = found or (None, None)
    p = _p(swap, seen, exact=False)
    return Comparison(name, seen, low, high, p, None, n, "paired permutation over samples")


def compare_runs(
    a: AccuracyMatrix,
    b: AccuracyMatrix,
    rng: np.random.Generator,
    permutations: int = PERMUTATIONS,
    *,
    level: float = LEVEL,
) -> list[Comparison]:
    """A minus B for every metric, then for every task in the last row; p corrected by Holm over the whole
    list.

    Both runs must have learned the same tasks in the same order and been tested on the same samples (matched
    by id).
    """
    same_stream([a, b])
    a, b = _aligned(a.ended(), b.ended())
    swap_a, swap_b = _swap_cells(a, b, rng, permutations)
    t, u = len(a.tasks), len(a.unseen)
    total = sum(len(v[0]) for v in a.samples.values())
    out = []
    for d in DEFINITIONS:
        (x, why_a), (y, why_b) = value_of(a, d), value_of(b, d)
        if x is None or y is None:
            out.append(Comparison(d.name, None, reason=why_a or why_b))
            continue
        found = _difference(a, b, d, x - y, level)
        out.append(_over_samples(d.name, x - y, found, d.value(swap_a, t, u) - d.value(swap_b, t, u), total))
    for j, task in enumerate(a.all_tasks):
        seen = float(a.values[t, j] - b.values[t, j])
        if math.isnan(seen):
            out.append(
                Comparison(f"{task} (last)", None, reason="not evaluated after the last task in both runs")
            )
            continue
        n = a.samples[task].shape[1] if task in a.samples else 0
        found = _difference(a, b, one_cell(t, j), seen, level) if n else None
        out.append(_over_samples(f"{task} (last)", seen, found, swap_a[:, t, j] - swap_b[:, t, j], n))
    return corrected(out)


def _difference(
    a: AccuracyMatrix, b: AccuracyMatrix, d: Definition, seen: float, level: float
) -> tuple[float, float] | None:
    """The interval of A - B, from the function that gives each run's own."""
    ours, theirs = shares_of(a, d), shares_of(b, d)
    if ours is None or theirs is None:
        return None
    (low_a, high_a), (low_b, high_b) = span_of(a, d), span_of(b, d)
    return interval(
        seen, [x.minus(y) for x, y in zip(ours, theirs, strict=True)], level, (low_a - high_b, high_a - low_b)
    )


# ------------------------------------------------------------------------------------ two methods, over seeds


def paired_t(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Low, high and two-sided p of the mean of K >= 2 paired differences by Student's t (K - 1)."""
    d = np.asarray(differences, dtype=np.float64)
    mean, error = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(len(d))
    if np.ptp(d) <= SAME * max(
        1.0, float(np.abs(d).max())
    ):  # every pair differs by the same amount, but for rounding
        return mean, mean, 1.0 if abs(mean) <= SAME else 0.0
    half = float(stats.t.ppf((1 + level) / 2, len(d) - 1)) * error
    return mean - half, mean + half, 2 * float(stats.t.sf(abs(mean) / error, len(d) - 1))


def compare_seeds(
    a: Sequence[AccuracyMatrix],
    b: Sequence[AccuracyMatrix],
    rng: np.random.Generator,
    test: Literal["t", "permutation"] = "t",
    level: float = LEVEL,
) -> list[Comparison]:
    """Mean of A minus mean of B per metric over pairs of equal seed (a[k] with b[k]); p corrected by Holm.

    The interval is the t-interval in both cases. A permutation p of K pairs cannot be below 2 / 2^K (K = 5:
    0.0625).
    """
    if len(a) != len(b) or len(a) < 2:
        raise RetainError(
            f"{len(a)} and {len(b)} runs: give at least 2 pairs, run k of one with run k of the other"
        )
    same_stream([*a, *b])
    a, b = [m.ended() for m in a], [m.ended() for m in b]
    out = []
    for d in DEFINITIONS:
        values = [(value_of(x, d), value_of(y, d)) for x, y in zip(a, b, strict=True)]
        reason = next((r for pair in values for v, r in pair if v is None), "")
        if reason:
            out.append(Comparison(d.name, None, n=len(a), reason=reason))
            continue
        diff = [float(x[0] or 0.0) - float(y[0] or 0.0) for x, y in values]
        low, high, p = paired_t(diff, level)
        p = permutation_p(diff, rng) if test == "permutation" else p
        out.append(
            Comparison(d.name, float(np.mean(diff)), low, high, p, None, len(a), f"paired {test} over seeds")
        )
    return corrected(out)
