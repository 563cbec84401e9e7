"""Scores by stage where a stage may teach several tasks, or tasks again: FCIT's Last and Avg.

    A_s = mean over the tasks seen up to stage s of a_{s,j},   Last = A_S,   Avg = 1/S sum_s A_s

With one new task per stage they are Last and Avg of the matrix. How FCIT averages a capability's data sets could not
be verified: here every task counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageScore:
    """A stage: the tasks seen up to it, and their mean score after it."""

    name: str
    seen: tuple[str, ...]
    mean: float


def stage_scores(
    names: Sequence[str], seen: Sequence[Sequence[str]], scores: Sequence[Mapping[str, float]]
) -> list[StageScore]:
    """One entry per stage; `scores` are those of every task after it."""
    return [
        StageScore(name, tuple(tasks), sum(row[t] for t in tasks) / len(tasks))
        for name, tasks, row in zip(names, seen, scores, strict=True)
    ]


def last_and_avg(stages: Sequence[StageScore]) -> tuple[float, float]:
    """Last and Avg; there is at least one stage."""
    means = [s.mean for s in stages]
    return means[-1], sum(means) / len(means)
