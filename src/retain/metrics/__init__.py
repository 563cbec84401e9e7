"""Scores of answers, the accuracy matrix, its metrics, and comparisons between runs."""

from retain.metrics.scores import SCORES, score

__all__ = ["SCORES", "score"]
