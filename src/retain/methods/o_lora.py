"""O-LoRA: one LoRA per task, old ones frozen, and a penalty that keeps the new one's input directions off the old ones'.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023
(arXiv 2310.14152). All adapters are on, in training and at inference; the newest alone is trained:

    y = W x + sum_{i <= t} (alpha/r) B_i A_i x
    L = L_new + weight sum_layers sum_{i < t} |A_i A_t^T|_1  +  l2_weight sum over tensors of the new adapter ||.||_2

|.|_1 sums the absolute values of all r x r entries, as the released code does. `weight: 0.5` and `l2_weight: 0` are
the release's defaults (its T5 runs on text); MCITlib's port to LLaVA has 0.05, and trains with the new adapter alone
(`forward: current`) while all of them answer. The constants belong to the sum over layers, old tasks and entries, so
they are not comparable between models: tune them.

Differs from the released code: one product per shape of A over all layers and all old adapters at once, instead of a
product and a norm per tensor; fp32 whatever the compute type. The projector, which is no LoRA, grows by a summed
delta per task; the penalty does not meet it.
"""

# G sites of one shape, R ranks of all old adapters together, r rank, D input features

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from retain.adapters.bank import AdapterBank, Mix
from retain.method import FULL_PARAMS, Context, Method, register
from retain.methods._parts import own_adapter
from retain.types import Batch, Output
from retain.values import NotNegative


def overlap(A_GrD: Tensor, old_GRD: Tensor) -> Tensor:
    """sum |A_old A^T| over sites, old ranks and new ranks: one batched product."""
    with torch.autocast(A_GrD.device.type, enabled=False):
        return torch.bmm(old_GRD, A_GrD.float().mT).abs().sum()


def by_shape(bank: AdapterBank, name: str) -> dict[tuple[int, ...], list[str]]:
    """The keys of an adapter's A, those of one shape together, in the order of the sites."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for key, p in bank.parameters(name).items():
        if key.endswith(".lora_A"):
            groups.setdefault(tuple(p.shape), []).append(key)
    return groups


def stacked(bank: AdapterBank, name: str, olds: Sequence[str]) -> list[Tensor]:
    """The frozen A of all old adapters, one (G, R, D) tensor per shape, for `overlap`."""
    states = [bank.parameters(old) for old in olds]
    return [
        torch.stack([torch.cat([s[key].detach().float() for s in states]) for key in keys])
        for keys in by_shape(bank, name).values()
    ]


@register
@dataclass
class OLora(Method):
    """A new adapter per task beside all old ones, pushed away from their input directions."""

    name: ClassVar[str] = "o_lora"
    about: ClassVar[str] = "one LoRA per task, all summed, kept orthogonal"
    source: ClassVar[str] = "arXiv:2310.14152"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"end_task": "derives"}
    ends_alone: ClassVar[bool] = True

    weight: NotNegative = 0.5
    l2_weight: NotNegative = 0.0
    forward: Literal["all", "current"] = "all"

    adapter_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order
    old: list[Tensor] = field(
        init=False, default_factory=list
    )  # during a task: the old A by shape, (G, R, D)

    def adapt(self, ctx: Context) -> Mix:
        self.adapter_of = own_adapter(ctx, self.adapter_of, "o_lora")
        current = self.adapter_of[ctx.task.name]
        return Mix({current: 1.0}) if self.forward == "current" else self._all()

    def begin_task(self, ctx: Context) -> None:
        current = self.adapter_of[ctx.task.name]
        olds = [name for name in self.adapter_of.values() if name != current]
        self.old = stacked(ctx.model.adapters, current, olds) if olds and self.weight else []

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        bank, name = ctx.model.adapters, self.adapter_of[ctx.task.name]
        total: Tensor | float = 0.0
        if self.old:
            live = bank.parameters(name)
            groups = zip(by_shape(bank, name).values(), self.old, strict=True)
            total = self.weight * sum(
                (overlap(torch.stack([live[k] for k in keys]), old) for keys, old in groups), torch.zeros(())
            )
        if self.l2_weight:
            norms = torch._foreach_norm(list(bank.parameters(name).values()))
            total = total + self.l2_weight * torch.stack(norms).sum()
        return total

    def end_task(self, ctx: Context) -> None:
        self.old = []
        ctx.model.adapters.mix = self._all()

    def _all(self) -> Mix:
        return Mix(dict.fromkeys(self.adapter_of.values(), 1.0))
