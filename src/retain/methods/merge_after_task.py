"""Continual merging: after each task the tuned adapter is merged with the one before the task, and goes on.

    theta_t: tuned from merged_{t-1}          merged_t = merge(merged_{t-1}, theta_t)

With the default merger, `coma`, it is CoMA (Marouf et al., ECCV 2024, arXiv 2312.08977): avg_t = (1 - new)
avg_{t-1} + new theta_t. Any merger of `retain.merge` may stand there; `weights` are those of [before, after].

Changes (B A), not factors, are merged, then truncated to the bank's rank; the error is logged. An adapter
that was new in this task has nothing before it. `params: {new: 1}` is off, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import retain.methods._merging as merging
from retain.merge.base import merger
from retain.method import FULL_PARAMS, Context, Method, register
from retain.models.base import Model
from retain.stream import Stream
from retain.types import RetainError


@register
@dataclass
class MergeAfterTask(Method):
    """The adapter before and after a task become one. Stands after the part that owns the adapter."""

    name: ClassVar[str] = "merge_after_task"
    about: ClassVar[str] = "the adapter before and after each task merged into one"
    source: ClassVar[str] = "arXiv:2312.08977"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"end_task": "rewrites"}

    merger: str = "coma"
    params: dict[str, Any] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)

    before: dict[str, dict[str, Tensor]] = field(init=False, default_factory=dict)  # adapter -> its state

    def __post_init__(self) -> None:
        merging.check_merger(self.merger, self.params, "merge_after_task")
        self.weights = [float(w) for w in self.weights]
        if len(self.weights) not in (0, 2):
            raise RetainError(f"merge_after_task.weights: two (before, after), not {self.weights}")

    def check(self, model: Model, stream: Stream) -> None:
        merging.check_sites(model.adapters, "merge_after_task")

    def begin_task(self, ctx: Context) -> None:
        self.before = merging.learned(ctx.model.adapters)

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        bank = ctx.model.adapters
        params = merging.seeded(self.merger, self.params, ctx.rng("merge_after_task"))
        for name, old in self.before.items():
            states = [old, merging.changes(bank, name)]
            merged = merger(self.merger).run(
                states,
                self.weights or None,
                keep="svd",
                rank=merging.rank(bank),
                names=["before", "after"],
                **params,
            )
            merging.load_merged(bank, name, merged)
            ctx.log(
                kind="merge", task=ctx.task.name, merger=self.merger, adapter=name, **merging.told(merged)
            )
        self.before = {}
