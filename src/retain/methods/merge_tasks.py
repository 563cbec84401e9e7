"""Each task tunes an adapter alone, from the base model; what answers is the merge of all so far.

    theta_t = base + dW_t, trained on task t alone            merged_t = merge(dW_1, …, dW_t)

The setting of RobustMerge/CoPA-Merging (Zeng et al., NeurIPS 2025, arXiv 2502.17159) and of most merging
papers, in a stream: row t of the matrix is the merge of the first t tasks, so the last row is the paper's.
`merger` names any function of `retain.merge`, `params` its parameters, `weights` one number per task of the
stream.

The bank has one rank, a merge may have any: it is stored as several adapters `merged-1`, `merged-2`, … whose
sum it is, without loss (`keep: cat`), or truncated to `rank` (`keep: svd`; the error is logged).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

import retain.methods._merging as merging
from retain.adapters.bank import Mix
from retain.merge.base import merger
from retain.method import Context, Method, register
from retain.methods._parts import own_adapter
from retain.models.base import Model
from retain.stream import Stream
from retain.types import RetainError
from retain.values import CountOrOff


@register
@dataclass
class MergeTasks(Method):
    """Adapters trained alone, merged after every task."""

    name: ClassVar[str] = "merge_tasks"
    about: ClassVar[str] = "each task alone, then all adapters merged into one"
    source: ClassVar[str] = "arXiv:2502.17159"
    roles: ClassVar[Mapping[str, str]] = {"end_task": "derives"}

    merger: str = "copa"
    params: dict[str, Any] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    keep: Literal["cat", "svd"] = "cat"
    rank: CountOrOff = 0

    adapter_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order

    def __post_init__(self) -> None:
        merging.check_merger(self.merger, self.params, "merge_tasks")
        self.weights = [float(w) for w in self.weights]

    def check(self, model: Model, stream: Stream) -> None:
        merging.check_sites(model.adapters, "merge_tasks")
        of, n = merger(self.merger), len(stream)
        if self.weights and len(self.weights) != n:
            raise RetainError(f"merge_tasks.weights: {len(self.weights)} numbers for {n} tasks")
        if of.exactly and of.exactly != n:
            raise RetainError(f"merge_tasks: {of.name} takes {of.exactly} adapters, the stream has {n} tasks")

    def adapt(self, ctx: Context) -> Mix:
        self.adapter_of = own_adapter(ctx, self.adapter_of, "merge_tasks")
        return Mix({self.adapter_of[ctx.task.name]: 1.0})

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        bank, names, of = ctx.model.adapters, list(self.adapter_of.values()), merger(self.merger)
        if of.exactly and len(names) != of.exactly:
            return  # too few yet: this row answers with the task's own adapter
        params = merging.seeded(self.merger, self.params, ctx.rng("merge_tasks-draw"))
        merged = of.run(
            [merging.changes(bank, n) for n in names],
            self.weights[: len(names)] or None,
            keep="cat" if self.keep == "cat" else "svd",
            rank=self.rank,
            names=names,
            **params,
        )
        bank.mix = Mix({names[-1]: 1.0})  # or an older merge could not be replaced
        stored = merging.store(bank, "merged", merged.parts, ctx.rng("merge_tasks-store"))
        bank.freeze(*bank.names)
        bank.mix = Mix(dict.fromkeys(stored, 1.0))
        ctx.log(kind="merge", task=ctx.task.name, merger=of.name, **merging.told(merged))
