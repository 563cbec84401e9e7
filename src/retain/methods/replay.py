"""Replay: some examples of old tasks are kept and trained on again beside the new ones.

CoIN's form: N random examples per old task, the next task trains on its own data and the union of all
buffers, shuffled, each once, unweighted (N in 100, 500, 1000). `per_task` is that; `reservoir` keeps one
buffer of fixed size that is a uniform sample of everything met so far (Vitter, "Random sampling with a
reservoir", ACM TOMS 1985, algorithm R).

    ratio = 0      every buffered example once per epoch (CoIN)
    ratio = r      the buffer is repeated until it makes up a share r of the joined data

With `optim.epochs` replayed examples lengthen the task; with `optim.steps` the budget stays and new
examples are seen less often. `size: 0` is off, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from retain.method import Context, Method, register
from retain.methods._parts import take
from retain.types import Example, Examples, joined
from retain.values import CountOrOff


def n_replayed(n_new: int, n_buffer: int, ratio: float) -> int:
    """How many old examples join `n_new` new ones: all buffered, or a share `ratio` of the joined data."""
    return n_buffer if ratio == 0 else round(n_new * ratio / (1 - ratio))


def reservoir_slots(n_new: int, n_met: int, size: int, rng: torch.Generator) -> list[int]:
    """Algorithm R: for each new example the slot it takes, or -1. `n_met` were met before."""
    met = torch.arange(n_met, n_met + n_new)
    draw = (torch.rand(n_new, generator=rng, dtype=torch.float64) * (met + 1)).long()
    slots = torch.where(met < size, met, draw)
    return torch.where(slots < size, slots, -1).tolist()


@register
@dataclass
class Replay(Method):
    """A buffer of old examples, mixed into the new ones."""

    name: ClassVar[str] = "replay"
    about: ClassVar[str] = "old examples are trained on again"
    source: ClassVar[str] = "arXiv:2403.08350"
    stays: ClassVar[frozenset[str]] = frozenset({"buffer", "n_met"})  # examples are what may not leave

    size: CountOrOff = 200
    strategy: Literal["reservoir", "per_task"] = "reservoir"
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0

    buffer: list[Example] = field(init=False, default_factory=list)
    n_met: int = field(init=False, default=0)

    def data(self, ctx: Context, examples: Examples) -> Examples:
        if not self.size or not self.buffer:
            return examples
        rng, n = ctx.rng("replay"), n_replayed(len(examples), len(self.buffer), self.ratio)
        rows: list[int] = []
        while len(rows) < n:
            rows += take(len(self.buffer), n - len(rows), rng)
        return joined(examples, [self.buffer[i] for i in rows])

    def end_task(self, ctx: Context) -> None:
        if not self.size:
            return
        new, rng = ctx.task.train, ctx.rng("replay-keep")
        if self.strategy == "per_task":
            self.buffer = [*self.buffer, *(new[i] for i in take(len(new), self.size, rng))]
        else:
            self._reservoir(new, rng)
        self.n_met += len(new)

    def _reservoir(self, new: Examples, rng: torch.Generator) -> None:
        buffer = list(self.buffer)
        for example, slot in zip(new, reservoir_slots(len(new), self.n_met, self.size, rng), strict=True):
            if slot == len(buffer):
                buffer.append(example)
            elif slot >= 0:
                buffer[slot] = example
        self.buffer = buffer
