"""What is learned, in which order, and how it is scored.

A `Stream` is a sequence of `Task`s with a name. `Score` is a protocol so that a scorer is any function with a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

from retain.types import Counted, Example, Examples, Lazy, RetainError, digest

PLAIN = (str, int, float, bool, list, tuple, dict, set, frozenset, type(None))
"""Values of a scorer's own attributes that count as its parameters."""


@runtime_checkable
class Score(Protocol):
    """A scorer: predictions and their examples in, one number in 0..100 per sample out, in order."""

    name: str
    formula: str

    def __call__(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]: ...


@dataclass(frozen=True)
class Doubt:
    """What keeps a scorer from judging an example as it is meant. `row` counts from 0; None: all of them.

    A scorer that can tell has a method `doubts(examples)`, which the doctor asks.
    """

    level: Literal["error", "warning"]
    row: int | None
    field: str
    message: str


@dataclass(frozen=True, eq=False)
class Task:
    """One task. `valid` is for choosing anything at all; `test` is only ever scored."""

    name: str
    train: Examples
    test: Examples
    score: Score
    max_new_tokens: int = 32
    valid: Examples = ()
    compat: Score | None = None  # the released scorer, quirks included, printed beside `score`
    about: str = ""
    meta: dict[str, object] = field(default_factory=dict)

    def digest(self, data: str | None = None) -> str:
        """Hash of everything that decides a score: the data, all that a scorer reads of a test example (references,
        box, options, tolerance, …), and both scorers with their rules and parameters.

        `data` is `data_digest()` where it is known already.
        """
        key = Counted(len(self.test), ([list(e.targets), dict(e.meta)] for e in self.test))
        return digest([data or self.data_digest(), key, _scorer(self.score), _scorer(self.compat)])

    def data_digest(self) -> str:
        """Hash of what the answers depend on: train and test examples, length, and the scorer's name."""
        parts = [e if isinstance(e, Lazy) else list(e) for e in (self.train, self.test)]
        return digest([self.name, *parts, self.score.name, self.max_new_tokens])


def _scorer(score: Score | None) -> list[object]:
    """A scorer as plain data: its name, its rule, and its parameters."""
    if score is None:
        return []
    plain = {k: v for k, v in getattr(score, "__dict__", {}).items() if isinstance(v, PLAIN)}
    return [score.name, score.formula, plain]


@dataclass(frozen=True)
class Published:
    """A paper's table for this benchmark: method -> task -> score at the end, to stand beside a run's last row."""

    source: str
    scores: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Stream(Sequence[Task]):
    """Tasks in the order they are learned. `unseen` tasks are evaluated in every row but never trained on."""

    name: str
    tasks: tuple[Task, ...]
    unseen: tuple[Task, ...] = ()
    published: Published | None = None

    def __post_init__(self) -> None:
        names = [t.name for t in self.all]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise RetainError(f"stream {self.name!r}: task names must differ, but {twice} appear twice")
        if not self.tasks:
            raise RetainError(f"stream {self.name!r} has no task")

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence's overloads add nothing here
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @property
    def all(self) -> tuple[Task, ...]:
        """Every task that is evaluated: the learned ones, then the unseen ones."""
        return self.tasks + self.unseen

    def named(self, name: str) -> Task:
        """The task of that name; an error that lists the choices otherwise."""
        for task in self.all:
            if task.name == name:
                return task
        raise RetainError(
            f"stream {self.name!r} has no task {name!r}; choose from {[t.name for t in self.all]}"
        )

    def ordered(self, names: Sequence[str]) -> Stream:
        """The same stream with its tasks in another order (a subset is allowed)."""
        return replace(self, tasks=tuple(self.named(n) for n in names))

    def on_valid(self) -> Stream:
        """The same stream scored on its `valid` examples, for choosing a hyper-parameter; `test` stays unseen."""
        without = [t.name for t in self.all if not len(t.valid)]
        if without:
            raise RetainError(
                f"stream {self.name!r}: no validation examples in {without}, so eval.split must be 'test'"
            )

        def swap(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
            return tuple(replace(t, test=t.valid, valid=()) for t in tasks)

        name = f"{self.name} (valid)"  # a paper's table speaks of test scores
        return replace(self, name=name, published=None, tasks=swap(self.tasks), unseen=swap(self.unseen))
