"""References scored as if they were answers, and the best answer that never looks.

What a scorer gives to a reference itself is the most that a model can get; what it gives to the best constant answer
is what a model gets without reading the question.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from retain.stream import Score, Task
from retain.types import Example, Examples

T = TypeVar("T")

FULL = 100.0
TRIED = 10  # different references of an example that are tried, the most frequent first
TRIED_POOLED = 2  # the same for a scorer of whole corpora, which is asked of all examples at once
CANDIDATES, CANDIDATES_POOLED = 30, 8  # constant answers that are tried
CHOSEN_ON, SCORED_ON = 1000, 5000  # rows that the best of them is chosen on, and scored on


@dataclass(frozen=True)
class Marks:
    """By row: the most that a reference gets as an answer, and that answer ("" where every reference is blank)."""

    best: tuple[float, ...]
    text: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Of the rows that have a reference."""
        return fmean([b for b, t in zip(self.best, self.text, strict=True) if t] or [0.0])


def best_marks(score: Score, examples: Examples) -> Marks:
    """The best of each example's references."""
    return _best(score, examples, [_references(e) for e in examples])


def cut_marks(score: Score, examples: Examples, whole: Marks, cut: Callable[[str], str]) -> Marks:
    """The same of references that are cut first. Only rows whose best reference loses something are scored again."""
    known: dict[str, str] = {}

    def shortened(text: str) -> str:
        if text not in known:
            known[text] = cut(text)
        return known[text]

    rows = [i for i, text in enumerate(whole.text) if text and shortened(text) != text]
    if not rows:
        return whole
    pooled = _pooled(score)
    asked = list(range(len(examples))) if pooled else rows
    texts = [[shortened(t) for t in _references(examples[i])] for i in asked]
    again = _best(score, [examples[i] for i in asked], texts)
    at = {i: k for k, i in enumerate(asked)}
    best, text = list(whole.best), list(whole.text)
    for i in rows:
        best[i], text[i] = again.best[at[i]], again.text[at[i]]
    return Marks(tuple(best), tuple(text))


def _pooled(score: Score) -> bool:
    """Whether an example's score depends on the others; one that does not say is taken to."""
    return bool(getattr(score, "pooled", True))


def _references(example: Example) -> list[str]:
    """Its different references, the most frequent first."""
    return [t for t, _ in Counter(example.targets).most_common() if t.strip()]


def _best(score: Score, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> Marks:
    best, said = [0.0] * len(examples), [t[0] if t else "" for t in texts]
    pooled = _pooled(score)
    for k in range(TRIED_POOLED if pooled else TRIED):
        rows = [i for i, t in enumerate(texts) if len(t) > k and best[i] < FULL]
        if not rows:
            break
        asked = range(len(examples)) if pooled else rows
        tried = [texts[i][min(k, len(texts[i]) - 1)] if texts[i] else "" for i in asked]
        marks = dict(zip(asked, score(tried, [examples[i] for i in asked]), strict=True))
        for i in rows:
            if marks[i] > best[i]:
                best[i], said[i] = float(marks[i]), texts[i][k]
    return Marks(tuple(best), tuple(said))


@dataclass(frozen=True)
class Constant:
    """The best answer that is the same for every row, its score, and on how many rows."""

    text: str
    score: float
    rows: int


def best_constant(task: Task) -> Constant | None:
    """The majority baseline of a task: the best of the most frequent references of its test split, as its scorer counts."""
    pooled = _pooled(task.score)
    counts = Counter(t for e in task.test for t in set(e.targets) if t.strip())
    if not counts:
        return None
    ranked = counts.most_common()
    n = CANDIDATES_POOLED if pooled else CANDIDATES
    often = [t for t, c in ranked if c > 1][:n]
    rare = [t for t, c in ranked if c == 1]
    candidates = often + some(rare, n - len(often))
    few = some(task.test, CHOSEN_ON)
    means = {t: fmean(task.score([t] * len(few), few)) for t in candidates}
    text = max(candidates, key=lambda t: means[t])  # the more frequent one of equals
    rows = some(task.test, SCORED_ON)
    return Constant(text, fmean(task.score([text] * len(rows), rows)), len(rows))


def some(items: Sequence[T], n: int) -> list[T]:
    """At most n of them in order, drawn by chance, the same ones at every call: every k-th would fall in step with
    data that alternate.
    """
    if len(items) <= n:
        return list(items)
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), max(0, n)))]


def top_answers(task: Task, n: int) -> tuple[list[tuple[str, float]], int]:
    """The most frequent answers of the test split with their shares, and how many different ones there are."""
    counts = Counter(" ".join(e.answer.split()) for e in task.test)
    total = max(1, len(task.test))
    return [(text, count / total) for text, count in counts.most_common(n)], len(counts)
