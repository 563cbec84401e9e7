"""LoraHub: adapters tuned alone, summed with weights that a few examples choose, without gradients.

Huang et al., "LoraHub", 2023 (arXiv 2307.13269). Each task tunes an adapter of its own from the base model. After
task t the weights of all t are searched for:

    min_w  L(w) + l1 mean|w|,   w in [-1.5, 1.5]^t,   merged = (sum w_n B_n)(sum w_n A_n)

or, with `space: deltas`, sum w_n B_n A_n.

L is the mean answer loss over `shots` training examples of every task so far, each task counting the same. They are
kept, so this is rehearsal of a few examples. The budget is `steps` evaluations of L per task, forward only: task t
costs steps * t * shots samples. The search is seeded and starts from the base model, w = 0.

Differs: the paper composes adapters for one new task that it has five examples of; in a stream the merge answers for
all tasks so far, so L is over all of them. The optimiser is `retain.merge.search`'s; `steps`, `l1` and the box are
from memory and unverified. The projector's changes are summed with the same weights.
"""

# N adapters

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import retain.methods._merging as merging
from retain.adapters.bank import Mix
from retain.merge.parts import split
from retain.merge.search import lorahub
from retain.method import Context, Method, register
from retain.methods._parts import micro_batches, own_adapter, take
from retain.models.base import Model
from retain.stream import Stream
from retain.types import Example
from retain.values import Count, NotNegative, Positive


@register
@dataclass
class LoraHub(Method):
    """Adapters trained alone; after every task the weights of their sum are searched for on a few examples."""

    name: ClassVar[str] = "lorahub"
    about: ClassVar[str] = "each task alone, then weights of the sum found on a few examples"
    source: ClassVar[str] = "arXiv:2307.13269"
    roles: ClassVar[Mapping[str, str]] = {"end_task": "derives"}

    steps: Annotated[int, Field(ge=1, le=100_000)] = 40
    shots: Count = 5
    l1: NotNegative = 0.05
    box: Positive = 1.5
    space: Literal["factors", "deltas"] = "factors"

    adapter_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order
    kept: dict[str, list[Example]] = field(init=False, default_factory=dict)  # task -> its shots
    weights: dict[str, float] = field(init=False, default_factory=dict)  # adapter -> the last weight found

    def check(self, model: Model, stream: Stream) -> None:
        merging.check_sites(model.adapters, "lorahub")

    def adapt(self, ctx: Context) -> Mix:
        self.adapter_of = own_adapter(ctx, self.adapter_of, "lorahub")
        return Mix({self.adapter_of[ctx.task.name]: 1.0})

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        bank, names, train = ctx.model.adapters, list(self.adapter_of.values()), ctx.task.train
        shots = [train[i] for i in take(len(train), self.shots, ctx.rng("lorahub-shots"))]
        self.kept = {**self.kept, ctx.task.name: shots}
        batches = [micro_batches(ctx, examples, range(len(examples))) for examples in self.kept.values()]
        bank.mix = Mix({names[-1]: 1.0})  # or an older merge could not be replaced

        def stored(state: Mapping[str, Tensor]) -> list[str]:
            return merging.store(bank, "merged", split(state), ctx.rng("lorahub-store"))

        def loss(state: Mapping[str, Tensor]) -> float:
            with bank.using(Mix(dict.fromkeys(stored(state), 1.0))):
                each = [sum(share * float(ctx.model(b).loss) for b, share in micros) for micros in batches]
                return sum(each) / len(each)

        merged, found = lorahub(
            [merging.changes(bank, name) for name in names],
            loss=loss,
            steps=self.steps,
            l1=self.l1,
            box=self.box,
            space="factors" if self.space == "factors" else "deltas",
            seed=int(torch.randint(1 << 30, (), generator=ctx.rng("lorahub-search"))),
        )
        bank.mix = Mix(dict.fromkeys(stored(merged), 1.0))
        bank.freeze(*bank.names)
        self.weights = dict(zip(names, found))
        ctx.log(
            kind="merge", task=ctx.task.name, merger="lorahub", weights=self.weights, evaluations=self.steps
        )
