"""The metrics of continual learning, each with its formula beside its name, since papers use one word for
many things.

A[i, j] is the score on task j after learning task i (1..T); A[0, j] is the zero-shot score. All but one
metric are weighted sums of cells, so a metric is a matrix of weights: what it needs is where the weights are
not zero, and what a test sample adds to it is one product.

Sources: Last, Avg (MAA), New (MFT): SEFE and MCITlib; BWT, FWT: Lopez-Paz and Ranzato, NeurIPS 2017 (arXiv
1706.08840), with the zero-shot score as FWT's baseline; BWT (CoIN): CoIN, NeurIPS 2024; Forgetting: Chaudhry
et al., ECCV 2018 (arXiv 1801.10112); Forgetting (LLaCA): ICML 2025, equal to (New - Last) T / (T - 1).
"""

# T learned tasks, U unseen tasks, N samples of one task

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retain.metrics.intervals import Array, Shares, best_row

Weights = Callable[[int, int], Array]
"""(T, U) in, weights of shape (T + 1, T + U) out."""


@dataclass(frozen=True)
class Metric:
    """One number of a run. `value` is None where it cannot be computed; `reason` says why.

    `low` and `high` bound the 95 % interval over samples (`intervals.py`); None without two samples of each task. `up`:
    higher is better.
    """

    name: str
    value: float | None
    formula: str
    low: float | None = None
    high: float | None = None
    reason: str = ""
    up: bool = True


@dataclass(frozen=True)
class Definition:
    """A metric: name, formula, the cells it needs, and its value for (..., T + 1, T + U) matrices.

    `shares` takes each task's (T + 1, N) scores and says what its samples add, for the tasks that count: the
    held means sum to the value. `span` is what scores of 0..100 can make of it.
    """

    name: str
    formula: str
    needs: Callable[[int, int], NDArray[np.bool_]]
    value: Callable[[Array, int, int], Array]
    shares: Callable[[Sequence[Array], int, int], list[Shares]]
    span: Callable[[int, int], tuple[float, float]]
    up: bool = True
    tasks: int = 1  # fewest learned tasks
    unseen: int = 0  # fewest unseen tasks

    def impossible(self, n_tasks: int, n_unseen: int) -> str:
        """Why no matrix of this size has the metric; "" where it may."""
        if n_tasks < self.tasks:
            return f"needs at least {self.tasks} learned tasks, there is {n_tasks}"
        if n_unseen < self.unseen:
            return "needs an unseen task, there is none"
        return ""


def _linear(
    name: str, formula: str, weights: Weights, *, up: bool = True, tasks: int = 1, unseen: int = 0
) -> Definition:
    def needs(t: int, u: int) -> NDArray[np.bool_]:
        return np.not_equal(weights(t, u), 0)

    def value(cells: Array, t: int, u: int) -> Array:
        w = weights(t, u)
        used = w != 0  # cells that do not count may be nan
        out: Array = cells[..., used] @ w[used]
        return out

    def shares(scores: Sequence[Array], t: int, u: int) -> list[Shares]:
        w, out = weights(t, u), []
        for j in np.flatnonzero((w != 0).any(axis=0)).tolist():
            used = w[:, j] != 0
            z_N = w[used, j] @ scores[j][used]
            out.append(Shares(z_N, z_N, z_N))
        return out

    def span(t: int, u: int) -> tuple[float, float]:
        w = weights(t, u)
        return 100 * float(w[w < 0].sum()), 100 * float(w[w > 0].sum())

    return Definition(name, formula, needs, value, shares, span, up, tasks, unseen)


def _zeros(t: int, u: int) -> Array:
    return np.zeros((t + 1, t + u))


def last(t: int, u: int) -> Array:
    """mean_j A[T, j]"""
    w = _zeros(t, u)
    w[t, :t] = 1 / t
    return w


def average(t: int, u: int) -> Array:
    """mean_i mean_{j<=i} A[i, j]"""
    w = _zeros(t, u)
    for i in range(1, t + 1):
        w[i, :i] = 1 / (t * i)
    return w


def new(t: int, u: int) -> Array:
    """mean_i A[i, i]"""
    w = _zeros(t, u)
    w[range(1, t + 1), range(t)] = 1 / t
    return w


def backward(t: int, u: int) -> Array:
    """sum_{i<T} (A[T, i] - A[i, i]), not divided."""
    w = _zeros(t, u)
    w[t, : t - 1] += 1
    w[range(1, t), range(t - 1)] -= 1
    return w


def forward(t: int, u: int) -> Array:
    """mean_{i>1} (A[i-1, i] - A[0, i])"""
    w = _zeros(t, u)
    w[range(1, t), range(1, t)] += 1 / (t - 1)
    w[0, 1:t] -= 1 / (t - 1)
    return w


def zero_shot(t: int, u: int) -> Array:
    """mean_j A[0, j]"""
    w = _zeros(t, u)
    w[0, :t] = 1 / t
    return w


def unseen_last(t: int, u: int) -> Array:
    """mean_u A[T, u] over the unseen tasks"""
    w = _zeros(t, u)
    w[t, t:] = 1 / u
    return w


def one_cell(row: int, column: int) -> Definition:
    """A[row, column] as a metric of its own."""

    def weights(t: int, u: int) -> Array:
        w = _zeros(t, u)
        w[row, column] = 1
        return w

    return _linear(f"A[{row}, {column}]", f"A[{row}, {column}]", weights)


def _needs_since_learned(t: int, u: int) -> NDArray[np.bool_]:
    need = np.zeros((t + 1, t + u), dtype=np.bool_)
    for j in range(t - 1):
        need[j + 1 :, j] = True
    return need


def forgetting(cells: Array, t: int, u: int) -> Array:
    """mean_{i<T} (max_{i<=k<T} A[k, i] - A[T, i]); k starts where task i is learned and stops before T.

    Stopping before T (as Chaudhry et al.) lets a gain show as a negative number.
    """
    drops = [cells[..., j + 1 : t, j].max(axis=-1) - cells[..., t, j] for j in range(t - 1)]
    out: Array = np.mean(drops, axis=0)
    return out


def _forgetting_shares(scores: Sequence[Array], t: int, u: int) -> list[Shares]:
    out = []
    for j in range(t - 1):
        best, last_N = best_row(scores[j][j + 1 : t]), scores[j][t]
        held = (best.held - last_N) / (t - 1)
        out.append(Shares(held, (best.low - last_N) / (t - 1), held))
    return out


DEFINITIONS: tuple[Definition, ...] = (
    _linear("Last", "mean_j A[T,j]", last),
    _linear("Avg (MAA)", "mean_i mean_{j<=i} A[i,j]", average),
    _linear("New (MFT)", "mean_i A[i,i]", new),
    _linear("BWT", "mean_{i<T} (A[T,i] - A[i,i])", lambda t, u: backward(t, u) / (t - 1), tasks=2),
    _linear("BWT (CoIN)", "1/T sum_{i<=T} (A[T,i] - A[i,i])", lambda t, u: backward(t, u) / t, tasks=2),
    Definition(
        "Forgetting",
        "mean_{i<T} (max_{i<=k<T} A[k,i] - A[T,i])",
        _needs_since_learned,
        forgetting,
        _forgetting_shares,
        lambda t, u: (-100.0, 100.0),
        up=False,
        tasks=2,
    ),
    _linear(
        "Forgetting (LLaCA)",
        "mean_{i<T} (A[i,i] - A[T,i])",
        lambda t, u: -backward(t, u) / (t - 1),
        up=False,
        tasks=2,
    ),
    _linear("FWT", "mean_{i>1} (A[i-1,i] - A[0,i])", forward, tasks=2),
    _linear("Zero-shot", "mean_j A[0,j]", zero_shot),
    _linear("Unseen", "mean_u A[T,u], u not learned", unseen_last, unseen=1),
)
"""All metrics, in the order they are printed. T: the number of learned tasks."""
