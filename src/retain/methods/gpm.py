"""Gradient projection memory: weights may change only where inputs of old tasks do not look.

Saha et al., "Gradient Projection Memory for Continual Learning", ICLR 2021 (arXiv 2103.09762); on adapters as in
PGP (Qiao et al., ICLR 2024), whose LoRA version was taken out of the released code. For a linear layer y = W x, the
answers to old x stay when dW x = 0. After each task, from the inputs R (N, D) of the layer on some training samples:

    M <- M and the fewest strongest right singular vectors of R - R M M^T such that |R M|^2 >= threshold |R|^2
    dW <- dW - dW M M^T                                              in every step of every later task

A LoRA is two linear layers: A sees the input x of the adapted layer, B sees A x. With `factors: both` each keeps its
own memory, and (B + dB)(A + dA) x = B A x for every x that the memory spans. `factors: A` protects A alone, by analogy
with the prompt version: B still moves, so old answers move with it. The projector is one layer; its bias, whose input
is the constant 1 of every task, is frozen after the first task.

Not only the gradient but the accumulated update is projected (`_projection`), or Adam and weight decay would undo the
protection. The inputs are those of single samples, so that no padding is among them; layers that read one tensor
(q, k, v) share a memory. Memories belong to an adapter's name: a new adapter is free.

`threshold`: 0.94 to 0.97 in convolutional networks, 0.5 to 0.97 on prompts; which value LoRA wants is not known, and
ours is not tuned. 0 is off. The memory is fp32 and grows up to D x D for each input. List this part after those that
replace the final weights (`llaca`, `ema`).
"""

# N rows, D input features, K directions, r rank

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retain.method import FULL_GRADS, FULL_PARAMS, Context, Method, register
from retain.methods._parts import take
from retain.methods._projection import Group, grown, guarded, project_grads, project_update
from retain.models.base import Model
from retain.stream import Stream
from retain.types import RetainError
from retain.values import Count, Share


class Reader:
    """Keeps up to `n_tokens` rows of every site's input per forward; a tensor that several sites read is kept once."""

    def __init__(self, n_tokens: int, rng: torch.Generator) -> None:
        self.n_tokens, self.rng = n_tokens, rng
        self.kept: dict[str, list[Tensor]] = {}
        self.leader: dict[str, str] = {}  # site -> the first site that read the same tensor
        self.last: tuple[Tensor, str] | None = None

    def __call__(self, path: str, x: Tensor) -> None:
        if self.last is None or self.last[0] is not x:
            self.last = (x, path)
            rows_ND = x.detach().reshape(-1, x.shape[-1])
            chosen = torch.tensor(take(len(rows_ND), self.n_tokens, self.rng), device=x.device)
            self.kept.setdefault(path, []).append(rows_ND[chosen].float())
        self.leader[path] = self.last[1]


@register
@dataclass
class GPM(Method):
    """Updates leave the directions that old inputs span."""

    name: ClassVar[str] = "gpm"
    about: ClassVar[str] = "updates leave the directions of old inputs"
    source: ClassVar[str] = "arXiv:2103.09762"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_GRADS, FULL_PARAMS})

    threshold: Share = 0.95
    n_samples: Count = 125
    n_tokens: Count = 32
    factors: Literal["both", "A"] = "both"

    memory: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter/site, adapter/site.lora_B
    leader: dict[str, str] = field(init=False, default_factory=dict)
    guards: list[Group] = field(init=False, default_factory=list)  # during a task

    def check(self, model: Model, stream: Stream) -> None:
        if model.adapters.kind != "lora":
            raise RetainError(
                f"gpm: it knows the inputs of LoRA only, not of adapter.kind: {model.adapters.kind}"
            )

    def begin_task(self, ctx: Context) -> None:
        live = ctx.model.adapters.trainable()
        bases = {key: basis for key in live if (basis := self._basis(key)) is not None}
        self.guards = guarded(live, bases)

    def grads(self, ctx: Context) -> None:
        if self.guards:
            project_grads(self.guards, ctx.model.adapters.trainable())

    def after_step(self, ctx: Context) -> None:
        if self.guards:
            project_update(self.guards, ctx.model.adapters.trainable())

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        self.guards = []
        if not self.threshold:
            return
        reader = self._read(ctx)
        rows_of = {path: torch.cat(rows) for path, rows in reader.kept.items()}
        self.leader = {**self.leader, **reader.leader}
        for key, path, rows_ND in self._inputs(ctx, rows_of):
            self.memory = {**self.memory, key: grown(self.memory.get(key), rows_ND, self.threshold)}
            share = self.memory[key].shape[1] / self.memory[key].shape[0]
            ctx.log(kind="gpm", task=ctx.task.name, site=path, memory=key, share=round(share, 4))

    def _basis(self, key: str) -> Tensor | None:
        """The directions that a trainable tensor may not change along; None: all are free."""
        adapter, rest = key.split("/", 1)
        path, kind = rest.rsplit(".", 1)
        if kind == "lora_B":
            return self.memory.get(key) if self.factors == "both" else None
        kept = self.memory.get(f"{adapter}/{self.leader.get(path, path)}")
        return torch.ones(1, 1) if kept is not None and kind == "bias" else kept

    def _inputs(self, ctx: Context, rows_of: dict[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """Memory key, site and rows for every trained matrix; sites that share an input have it once."""
        done = set[str]()
        for key, p in ctx.model.adapters.trainable().items():
            adapter, rest = key.split("/", 1)
            path, kind = rest.rsplit(".", 1)
            leader = self.leader.get(path, path)
            if leader not in rows_of or kind == "bias":
                continue
            shared = f"{adapter}/{leader}"
            if kind in ("lora_A", "weight") and shared not in done:
                done.add(shared)
                yield shared, path, rows_of[leader]
            if kind == "lora_A" and self.factors == "both":
                yield f"{adapter}/{path}.lora_B", path, rows_of[leader] @ p.float().mT

    def _read(self, ctx: Context) -> Reader:
        """One sample at a time: no padding is among the rows."""
        reader = Reader(self.n_tokens, ctx.rng("gpm-tokens"))
        rows = take(len(ctx.task.train), self.n_samples, ctx.rng("gpm"))
        with ctx.model.adapters.reading(reader):
            for row in rows:
                ctx.model(ctx.model.collate([ctx.task.train[row]], answers=True, turns=ctx.turns))
        return reader
