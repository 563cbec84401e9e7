"""How sure a number is that was measured on test samples: a t-interval that contains its estimate.

A metric of a run is a sum over tasks of a mean over samples of what each sample contributes (its *share*), also where
it takes the best of several rows. So the estimate is x = sum_j mean_n z_jn, its variance is that of independent means
(Welch), and its degrees of freedom are Satterthwaite's:

    V = sum_j v_j,  v_j = s_j^2 / N_j      df = V^2 / sum_j v_j^2 / (N_j - 1)      x -+ t_df sqrt(V)

**The best of several rows.** The largest of noisy numbers is too large, and drawing samples again makes it larger
still, so a bootstrap interval may lie above its own estimate. Here such a metric is taken twice. *Held*: the row that
is best on all samples (this is the estimate, too high by chance). *Crossed*: for each half of the samples, the row that
is best on the other half, so that the samples which choose are not those which count; too low if anything. The interval
reaches from below the lower one to above the upper one, so the estimate is inside. Where one row is clearly best they
are the same. In a difference A - B the lower end is crossed A less held B, the upper end held A less crossed B. Leaving
out one sample at a time instead of half covers far less: 60 % where 95 % are meant.

Coverage was simulated beside bootstrap intervals: `scripts/coverage.py`, docs/metrics.md.
"""

# N samples of one task, K rows to choose the best of

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
SAME = 1e-9
"""Sums of equal scores in another order differ by less, relatively."""


class Shares(NamedTuple):
    """What each sample of one task adds to a metric, (N,): to its estimate, and to what it is at least and at most."""

    held: Array
    low: Array
    high: Array

    def minus(self, other: Shares) -> Shares:
        """Of the difference between two runs that answered the same samples; equal answers differ by nothing."""
        if all(np.array_equal(a, b) for a, b in zip(self, other, strict=True)):
            return Shares(*(a - b for a, b in zip(self, other, strict=True)))
        return Shares(self.held - other.held, self.low - other.high, self.high - other.low)


def best_row(scores_KN: Array) -> Shares:
    """Each sample's score in the best of K rows: best on all samples; at least: on the half that it is not in.

    The halves are every other sample. Rows that are equally good share. One sample has no other half.
    """
    held = _of_best(scores_KN.sum(axis=1), scores_KN)
    crossed = held.copy()
    if len(held) > 1:
        for half in (0, 1):
            crossed[half::2] = _of_best(scores_KN[:, 1 - half :: 2].sum(axis=1), scores_KN[:, half::2])
    return Shares(held, crossed, held)


def _of_best(sums_K: Array, scores_KN: Array) -> Array:
    top = float(sums_K.max())
    best_K = sums_K >= top - SAME * max(1.0, abs(top))
    out: Array = scores_KN[best_K].mean(axis=0)
    return out


def interval(
    value: float, shares: Sequence[Shares], level: float, span: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float] | None:
    """The interval of a sum of means of shares, around `value` (their held sum); it contains `value`.

    A point where no share varies. None where a task has one sample: nothing says how sure that is. `span` is what
    the number can be at all.
    """
    if any(len(s.held) < 2 for s in shares):
        return None
    half = _half([s.held for s in shares], level)
    low, high = value - half, value + half
    if any(s.low is not s.held for s in shares):
        low = min(low, _mean(s.low for s in shares) - _half([s.low for s in shares], level))
    if any(s.high is not s.held for s in shares):
        high = max(high, _mean(s.high for s in shares) + _half([s.high for s in shares], level))
    return min(value, max(low, span[0])), max(value, min(high, span[1]))


def _mean(parts: Iterable[Array]) -> float:
    return float(sum(z.mean() for z in parts))


def _half(parts: Sequence[Array], level: float) -> float:
    """Half the width: t_df sqrt(V)."""
    degrees = np.array([len(z) - 1.0 for z in parts])
    v = np.array([z.var(ddof=1) / len(z) for z in parts])
    v[[float(np.ptp(z)) <= SAME * max(1.0, float(np.abs(z).max())) for z in parts]] = (
        0.0  # rounding is no spread
    )
    if not v.any():
        return 0.0
    df = float(v.sum() ** 2 / (v**2 / degrees).sum())
    return float(stats.t.ppf((1 + level) / 2, df)) * math.sqrt(float(v.sum()))
