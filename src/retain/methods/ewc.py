"""Elastic weight consolidation: weights that mattered for old tasks are held back by a quadratic spring.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (arXiv 1612.00796).

    L = L_new + lam/2 sum_k sum_i F_ki (theta_i - theta_ki)^2,   F_k: mean squared gradient of the answer loss

The labels are the data's (the "empirical" Fisher), as in every code base we read. `anchors: all` keeps one
spring per old task; their sum is again one spring, so two tensors per weight are enough for any number of
tasks:

    F = sum_k F_k,    theta_bar = sum_k F_k theta_k / F   (the same gradient; the value differs by a constant)

`anchors: single` keeps the latest task's spring only. `per_sample` squares each sample's own gradient (the
definition); off, it squares the mean gradient of a batch, which is cheaper and smaller by about the batch
size.

Differs from the authors' neighbours, whose constants differ by 10^4: Continual-NExT has lam = 0.5 without
the half, a single anchor, and divides squared batch gradients by the number of samples; the
prompt-gradient-projection code has lam = 5000 with the half, 50 batches, one anchor per task. What LLaCA's
own EWC row used is not known. Our default lam is not tuned for your model. The springs are on tensors by
adapter name: a new adapter per task has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from retain.method import FULL_PARAMS, Context, Method, register
from retain.methods._parts import as_shadow, micro_batches, take
from retain.types import Batch, Output
from retain.values import Count, NotNegative


class Springs(torch.autograd.Function):
    """lam/2 sum F (theta - anchor)^2 over lists of tensors: fused, no host sync, its own backward."""

    @staticmethod
    def forward(ctx: Any, lam: float, fisher: list[Tensor], anchor: list[Tensor], *theta: Tensor) -> Tensor:
        d = torch._foreach_sub([t.float() for t in theta], anchor)
        ctx.pull = torch._foreach_mul(d, fisher)
        torch._foreach_mul_(d, ctx.pull)
        torch._foreach_mul_(ctx.pull, lam)
        return torch.stack([x.sum() for x in d]).sum() * (lam / 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (None, None, None, *torch._foreach_mul(ctx.pull, grads[0]))


def add_spring(F: Tensor, anchor: Tensor, F_new: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Two springs as one: summed stiffness, and the stiffness-weighted mean of where they rest."""
    total = F + F_new
    return total, torch.where(total > 0, (F * anchor + F_new * theta) / total, theta)


@register
@dataclass
class EWC(Method):
    """Diagonal-Fisher springs on the adapter's tensors."""

    name: ClassVar[str] = "ewc"
    about: ClassVar[str] = "important weights are held by springs"
    source: ClassVar[str] = "arXiv:1612.00796"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"end_task": "reads"}

    lam: NotNegative = 5000.0
    n_samples: Count = 200
    per_sample: bool = True
    anchors: Literal["single", "all"] = "all"

    fisher: dict[str, Tensor] = field(init=False, default_factory=dict)
    anchor: dict[str, Tensor] = field(init=False, default_factory=dict)

    def begin_task(self, ctx: Context) -> None:
        for store in (self.fisher, self.anchor):
            store.update({k: t.to(ctx.model.device) for k, t in store.items()})

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        if not self.lam:
            return 0.0
        held = {k: p for k, p in ctx.model.adapters.trainable().items() if k in self.fisher}
        if not held:
            return 0.0
        fisher, anchor = [self.fisher[k] for k in held], [self.anchor[k] for k in held]
        return Springs.apply(self.lam, fisher, anchor, *held.values())  # type: ignore

    def end_task(self, ctx: Context) -> None:
        if not self.lam:
            return
        live = ctx.model.adapters.trainable()
        F_new = self._fisher(ctx, live)
        for key, p in live.items():
            F, theta = F_new[key], as_shadow(p)
            if self.anchors == "all" and key in self.fisher:
                F, theta = add_spring(self.fisher[key].to(p.device), self.anchor[key].to(p.device), F, theta)
            self.fisher[key], self.anchor[key] = F, theta
        mean = torch.stack([F_new[k].mean() for k in live]).mean()
        ctx.log(kind="ewc", task=ctx.task.name, mean_fisher=mean.tolist())

    def joined(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        """Springs of several clients as one: the mean stiffness, and the stiffness-weighted mean of where they rest."""
        total, fisher, anchor = sum(weights), dict[str, Tensor](), dict[str, Tensor]()
        for key, first in states[0]["anchor"].items():
            F_k = [s["fisher"][key].double() * (w / total) for s, w in zip(states, weights, strict=True)]
            F = torch.stack(F_k).sum(0)
            pull = torch.stack([f * s["anchor"][key] for f, s in zip(F_k, states, strict=True)]).sum(0)
            fisher[key], anchor[key] = F.float(), torch.where(F > 0, pull / F, first.double()).float()
        return {"fisher": fisher, "anchor": anchor}

    def _fisher(self, ctx: Context, live: dict[str, Parameter]) -> dict[str, Tensor]:
        """Mean over draws (a sample or a batch) of the squared gradient of the answer loss."""
        total = [torch.zeros_like(p, dtype=torch.float32) for p in live.values()]
        rows = take(len(ctx.task.train), self.n_samples, ctx.rng("ewc"))
        size = 1 if self.per_sample else ctx.batch_size
        starts = range(0, len(rows), size)
        for i in starts:
            grads: list[Tensor | None] = [None] * len(total)  # of the draw, over its micro-batches
            for batch, share in micro_batches(ctx, ctx.task.train, rows[i : i + size]):
                with ctx.checkpointing():
                    loss = ctx.model(batch).loss * share
                    found = torch.autograd.grad(loss, list(live.values()), allow_unused=True)
                grads = [_sum(a, b) for a, b in zip(grads, found, strict=True)]
            pairs = [(t, g) for t, g in zip(total, grads, strict=True) if g is not None]
            if pairs:
                kept, seen = [t for t, _ in pairs], [g for _, g in pairs]
                torch._foreach_addcmul_(kept, seen, seen)
        torch._foreach_div_(total, len(starts))
        return dict(zip(live, total, strict=True))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """fp32; None is nothing."""
    if a is None or b is None:
        return a if b is None else b.float()
    return a + b.float()
