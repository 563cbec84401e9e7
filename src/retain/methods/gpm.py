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
ours is not tuned. 0 is off. The memory is fp32 and grows up to D x D for each input. Beside it, while inputs are read,
there are at most 1,024 rows of each (`_projection.Sketch`), whatever `n_samples` and `n_tokens`.

In a stack the weights are held before others follow them and inputs are read at the final weights (`retain.order`). A
part that rewrites the final weights is refused: what it writes lies in protected directions too.
"""

# N rows, D input features, K directions, r rank

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from retain.method import FULL_GRADS, FULL_PARAMS, Context, Method, register
from retain.methods._parts import take
from retain.methods._projection import Group, Sketch, guarded, project_grads, project_update, spanned
from retain.models.base import Model
from retain.stream import Stream
from retain.types import RetainError
from retain.values import Count, Share

BIAS = "1"  # the basis of a bias: its input is the constant 1


class Reader:
    """Hands up to `n_tokens` rows of every site's input per forward to sketches, one for each tensor that is read.

    `inputs`: site -> adapters that train there; `factors`: site -> those of their lora_A whose outputs are read too.
    """

    def __init__(
        self,
        n_tokens: int,
        rng: torch.Generator,
        inputs: Mapping[str, Sequence[str]],
        factors: Mapping[str, Mapping[str, Tensor]],
        memory: Mapping[str, Tensor],
    ) -> None:
        self.n_tokens, self.rng, self.memory = n_tokens, rng, memory
        self.inputs, self.factors = inputs, factors
        self.sketches: dict[str, Sketch] = {}  # by memory key
        self.site: dict[str, str] = {}  # memory key -> a site that reads it
        self.leader: dict[str, str] = {}  # site -> the first site that read the same tensor
        self.last: tuple[Tensor, str, Tensor] | None = None
        self.done = set[str]()

    def __call__(self, path: str, x: Tensor) -> None:
        if self.last is None or self.last[0] is not x:
            rows_ND = x.detach().reshape(-1, x.shape[-1])
            chosen = torch.tensor(take(len(rows_ND), self.n_tokens, self.rng), device=x.device)
            self.last, self.done = (x, path, rows_ND[chosen].float()), set()
        _, leader, rows_ND = self.last
        self.leader[path] = leader
        for adapter in self.inputs.get(path, ()):
            if (key := f"{adapter}/{leader}") not in self.done:
                self.done.add(key)
                self._add(key, path, rows_ND)
        for adapter, A in self.factors.get(path, {}).items():
            self._add(f"{adapter}/{path}.lora_B", path, rows_ND @ A.float().mT)

    def _add(self, key: str, path: str, rows_ND: Tensor) -> None:
        if key not in self.sketches:
            basis = self.memory.get(key)
            none = rows_ND.new_zeros(rows_ND.shape[1], 0)
            self.sketches[key] = Sketch(none if basis is None else basis.to(rows_ND.device))
            self.site[key] = path
        self.sketches[key].add(rows_ND)


@register
@dataclass
class GPM(Method):
    """Updates leave the directions that old inputs span."""

    name: ClassVar[str] = "gpm"
    about: ClassVar[str] = "updates leave the directions of old inputs"
    source: ClassVar[str] = "arXiv:2103.09762"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_GRADS, FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"grads": "writes", "after_step": "writes", "end_task": "reads"}

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
        self.memory = {key: basis.to(ctx.model.device) for key, basis in self.memory.items()}
        self.guards = guarded(live, {key: name for key in live if (name := self._basis(key)) is not None})

    def grads(self, ctx: Context) -> None:
        if self.guards:
            project_grads(self.guards, ctx.model.adapters.trainable(), self._bases(ctx))

    def after_step(self, ctx: Context) -> None:
        if self.guards:
            project_update(self.guards, ctx.model.adapters.trainable(), self._bases(ctx))

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        self.guards = []
        if not self.threshold:
            return
        reader = self._read(ctx)
        self.leader = {**self.leader, **reader.leader}
        for key in list(reader.sketches):
            sketch = reader.sketches.pop(key)
            self.memory = {**self.memory, key: (basis := sketch.grown(self.threshold))}
            told = {"share": round(basis.shape[1] / basis.shape[0], 4), "dropped": round(sketch.dropped, 6)}
            ctx.log(kind="gpm", task=ctx.task.name, site=reader.site[key], memory=key, **told)

    def joined(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        """The union: what is protected for one client is protected for all. Bases by site, at most D directions each."""
        memory = {}
        for key in dict.fromkeys(key for s in states for key in s["memory"]):
            memory[key] = spanned([s["memory"][key] for s in states if key in s["memory"]])
        return {
            "memory": memory,
            "leader": {k: v for s in states for k, v in s["leader"].items()},
            "guards": [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if any(isinstance(group["basis"], Tensor) for group in self.guards):
            self.guards = self._from_stacks(self.guards)

    def _from_stacks(self, old: list[Group]) -> list[Group]:
        """Groups of a checkpoint from before bases were shared: tensors of one shape with a copy of their bases each."""
        starts = {k: t for group in old for k, t in zip(group["keys"], group["start"], strict=True)}
        return guarded(starts, {k: name for k in starts if (name := self._basis(k)) is not None})

    def _basis(self, key: str) -> str | None:
        """The name of the directions that a trainable tensor may not change along; None: all are free."""
        adapter, rest = key.split("/", 1)
        path, kind = rest.rsplit(".", 1)
        name = key if kind == "lora_B" else f"{adapter}/{self.leader.get(path, path)}"
        if (kind == "lora_B" and self.factors != "both") or name not in self.memory:
            return None
        if kind == "bias":
            return BIAS
        return name if self.memory[name].shape[1] else None

    def _bases(self, ctx: Context) -> dict[str, Tensor]:
        return {**self.memory, BIAS: torch.ones(1, 1, device=ctx.model.device)}

    def _read(self, ctx: Context) -> Reader:
        """One sample at a time: no padding is among the rows."""
        inputs, factors = dict[str, list[str]](), dict[str, dict[str, Tensor]]()
        for key, p in ctx.model.adapters.trainable().items():
            adapter, rest = key.split("/", 1)
            path, kind = rest.rsplit(".", 1)
            if kind in ("lora_A", "weight"):
                inputs.setdefault(path, []).append(adapter)
            if kind == "lora_A" and self.factors == "both":
                factors.setdefault(path, {})[adapter] = p
        reader = Reader(self.n_tokens, ctx.rng("gpm-tokens"), inputs, factors, self.memory)
        rows = take(len(ctx.task.train), self.n_samples, ctx.rng("gpm"))
        with ctx.model.adapters.reading(reader):
            for row in rows:
                ctx.model(ctx.model.collate([ctx.task.train[row]], answers=True, turns=ctx.turns))
        return reader
