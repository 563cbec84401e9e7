"""Which rows every step of a task takes: all random numbers are drawn before the first, lengths are asked for as steps come.

So a run over two hundred thousand rows begins at once, and a continued one asks for the lengths that it still needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from retain.method import Context
from retain.models.base import Model
from retain.types import Examples


class Sizes(Protocol):
    """What is asked of `retain.run.train.Optim`."""

    @property
    def batch_size(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> float: ...
    @property
    def group_by_length(self) -> bool: ...


GROUP = 8  # batches that samples of similar length are sought in


class Order(Sequence[list[int]]):
    """The rows of step after step.

    `rows_N` are the samples in the order of the epochs. With `shuffles`, one for each run of `GROUP` batches, those of
    a run are sorted by length before they are cut into batches, and the batches shuffled by it.
    """

    def __init__(
        self, rows_N: Tensor, size: int, shuffles: Sequence[Sequence[int]], model: Model, examples: Examples
    ) -> None:
        self.rows_N, self.size, self.shuffles, self.model, self.examples = (
            rows_N,
            size,
            shuffles,
            model,
            examples,
        )
        self._run: tuple[int, list[list[int]]] = (-1, [])  # the last run that was asked for

    def __len__(self) -> int:
        return math.ceil(len(self.rows_N) / self.size)

    def __getitem__(self, step):  # type: ignore[no-untyped-def]  # Sequence's overloads add nothing here
        if isinstance(step, slice):
            return [self[k] for k in range(*step.indices(len(self)))]
        n = len(self)
        if not -n <= step < n:
            raise IndexError(f"step {step} of {n}")
        step %= n
        if not self.shuffles:
            return self.rows_N[step * self.size : (step + 1) * self.size].tolist()
        k = step // GROUP
        if self._run[0] != k:
            self._run = (k, self._sorted(k))
        return self._run[1][step % GROUP]

    def _sorted(self, k: int) -> list[list[int]]:
        """The batches of a run."""
        width = GROUP * self.size
        rows = self.rows_N[k * width : (k + 1) * width].tolist()
        rows.sort(key=lambda i: self.model.length(self.examples[i]))
        return [rows[i * self.size : (i + 1) * self.size] for i in self.shuffles[k]]


def batches(model: Model, examples: Examples, ctx: Context, optim: Sizes, n_steps: int) -> Order:
    """The rows of every step: epoch after epoch, each in a random order of its own.

    With `group_by_length`, samples of similar length meet in one batch (sorted within runs of 8 batches, then
    the batches are shuffled), which saves padding.
    """
    rng, n, size = ctx.rng("order"), len(examples), optim.batch_size
    total = n_steps * size if optim.steps is not None else min(n_steps * size, math.ceil(n * optim.epochs))
    epochs = [torch.randperm(n, generator=rng).to(torch.int32) for _ in range(math.ceil(total / n))]
    rows_N = torch.cat(epochs)[:total]
    shuffles = []
    if optim.group_by_length:
        for start in range(0, total, GROUP * size):
            n_batches = math.ceil(min(GROUP * size, total - start) / size)
            shuffles.append(torch.randperm(n_batches, generator=rng).tolist())
    return Order(rows_N, size, shuffles, model, examples)
