"""Scores of answers, the accuracy matrix, its metrics, and comparisons between runs."""

from retain.metrics.compare import Comparison, compare_runs, compare_seeds, holm
from retain.metrics.formulas import DEFINITIONS, Metric
from retain.metrics.matrix import AccuracyMatrix, Aggregate, Spread, aggregate
from retain.metrics.scores import SCORES, score

__all__ = [
    "DEFINITIONS",
    "SCORES",
    "AccuracyMatrix",
    "Aggregate",
    "Comparison",
    "Metric",
    "Spread",
    "aggregate",
    "compare_runs",
    "compare_seeds",
    "holm",
    "score",
]
