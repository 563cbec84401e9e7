"""What a scorer is: a function over predictions and examples that carries a name and a formula.

Strict scorers never give a point to an empty answer; compat scorers replicate released code and may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from retain.stream import Doubt
from retain.types import Example, RetainError

Judge = Callable[[str, Example], float]
"""One prediction and its example in, a share in 0..1 out."""

Batch = Callable[[Sequence[str], Sequence[Example]], list[float]]
"""All predictions and examples in, one number per sample out."""

Doubts = Callable[[Sequence[Example]], Iterable[Doubt]]
"""Examples in, what of them cannot be scored as meant out."""


def no_doubts(examples: Sequence[Example]) -> Iterable[Doubt]:
    """Nothing to say."""
    return ()


READ = 50_000
"""Characters that are read of an answer and of a reference, so that scoring them takes a bounded time."""


def _shorter(example: Example) -> Example:
    return replace(example, references=tuple(t[:READ] for t in example.targets))


@dataclass(eq=False)  # not frozen: the Score protocol declares writable attributes
class Scorer:
    """A `retain.stream.Score`. `batch` does the work; `strict` says that an empty answer gets 0 before it is
    asked, `pooled` that a sample's score depends on the others; `doubts` finds references that cannot score.
    """

    name: str
    formula: str
    batch: Batch
    strict: bool = True
    pooled: bool = False
    doubts: Doubts = no_doubts

    def __call__(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """One number per sample, in order, 0..100 (`cider` and `compat_caption`: see their formulas).

        A prediction of None counts as "" (missing = wrong). Raises RetainError when the two lengths differ.
        """
        if len(predictions) != len(examples):
            raise RetainError(
                f"score {self.name!r}: {len(predictions)} predictions for {len(examples)} examples; "
                "give one prediction per example, in order ('' where the model gave none)"
            )
        texts = [(p or "")[:READ] for p in predictions]
        examples = [_shorter(e) if any(len(t) > READ for t in e.targets) else e for e in examples]
        values = self.batch(texts, examples)
        if self.strict:
            return [v if t.strip() else 0.0 for v, t in zip(values, texts, strict=True)]
        return values


def per_sample(
    name: str, formula: str, *, strict: bool = True, doubts: Doubts = no_doubts
) -> Callable[[Judge], Scorer]:
    """Turn a judge (0..1 for one sample) into a Scorer (0..100 for many)."""

    def wrap(judge: Judge) -> Scorer:
        def batch(texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
            return [100.0 * float(judge(t, e)) for t, e in zip(texts, examples, strict=True)]

        return Scorer(name, formula, batch, strict, doubts=doubts)

    return wrap


def per_corpus(name: str, formula: str, *, strict: bool = True) -> Callable[[Batch], Scorer]:
    """Turn a function over the whole test set into a Scorer; for scores that need corpus statistics."""

    def wrap(batch: Batch) -> Scorer:
        return Scorer(name, formula, batch, strict, pooled=True)

    return wrap
