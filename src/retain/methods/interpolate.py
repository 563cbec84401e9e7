"""Interpolation: at the end of a task the weights go back a part of the way to where the task began.

    theta = (1 - r) theta_before + r theta_after

Wortsman et al., "Robust fine-tuning of zero-shot models" (WiSE-FT), CVPR 2022 (arXiv 2109.01903): along the straight
line between a model and its fine-tuned self there are often weights that are good at both. Here the line is drawn
anew in every task, and the next task starts from the point that was taken.

    ratio: 0.5                     the same r in every task; 1 is off, bit for bit
    choose: [0.25, 0.5, 0.75, 1]   the r with the least loss on kept examples

With `choose`, `keep` training examples of every task are kept. L(r) is the mean answer loss of a task's kept
examples, averaged over the tasks that trained the adapter in question, the new one included; test and validation
data are never read. The new task's examples have been trained on, which favours a large r. The cost is a forward
pass per ratio over keep * tasks examples; equal losses go to the larger r.

Differs: WiSE-FT interpolates a whole model; here what trains is (LoRA factors, projector, prompts), tensor by tensor.
For LoRA that is a point between the factors, not between the products B A, which `merge_after_task` averages and
truncates. An adapter that is trained for the first time has nothing before it and keeps its weights: with a fresh
adapter per task nothing is ever interpolated, and the events say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from retain.method import FULL_PARAMS, Context, Method, register
from retain.methods._parts import micro_batches, take, trained_names
from retain.types import Example, RetainError
from retain.values import Share, Size


def between(before: Tensor, after: Tensor, ratio: float) -> Tensor:
    """(1 - ratio) before + ratio after, in fp32."""
    return torch.lerp(before.float(), after.float(), ratio)


@register
@dataclass
class Interpolate(Method):
    """The weights between before and after a task. `ratio` None: 0.5, unless `choose` lists several to choose from."""

    name: ClassVar[str] = "interpolate"
    about: ClassVar[str] = "the weights between before and after each task"
    source: ClassVar[str] = "arXiv:2109.01903"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"end_task": "settles"}

    ratio: Share | None = None
    choose: list[Share] = field(default_factory=list)
    keep: Size = 16

    before: dict[str, Tensor] = field(
        init=False, default_factory=dict
    )  # of adapters that earlier tasks trained
    trained: dict[str, list[str]] = field(
        init=False, default_factory=dict
    )  # task -> adapters that it trained
    kept: dict[str, list[Example]] = field(init=False, default_factory=dict)  # task -> its examples

    def __post_init__(self) -> None:
        if self.ratio is not None and self.choose:
            raise RetainError(f"interpolate: ratio ({self.ratio!r}) or choose ({self.choose!r}), not both")

    def begin_task(self, ctx: Context) -> None:
        old = {name for names in self.trained.values() for name in names}
        live = ctx.model.adapters.trainable()
        self.before = {k: p.detach().clone() for k, p in live.items() if k.split("/", 1)[0] in old}

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        names, task = trained_names(ctx.model.adapters), ctx.task.name
        if self.choose:
            rows = take(len(ctx.task.train), self.keep, ctx.rng("interpolate-keep"))
            self.kept = {**self.kept, task: [ctx.task.train[i] for i in rows]}
        self.trained = {**self.trained, task: sorted({*self.trained.get(task, []), *names})}
        live = {k: p for k, p in ctx.model.adapters.trainable().items() if k in self.before}
        told: dict[str, Any] = {"kind": "interpolated", "task": task, "method": self.name}
        if live:
            after = {k: p.detach().clone() for k, p in live.items()}
            losses = self._losses(ctx, live, after) if self.choose else {}
            fixed = 0.5 if self.ratio is None else self.ratio
            ratio = min(losses, key=lambda r: (losses[r], -r)) if losses else fixed
            self._place(live, after, ratio)
            told |= {"ratio": ratio} | (
                {"losses": {f"{r:g}": v for r, v in losses.items()}} if losses else {}
            )
        new = [n for n in names if n not in {k.split("/", 1)[0] for k in live}]
        ctx.log(**told, **({"new": new, "ratio_of_new": 1.0} if new else {}))
        self.before = {}

    def _place(self, live: dict[str, Parameter], after: dict[str, Tensor], ratio: float) -> None:
        """The live tensors at a point of the line; at 1 the trained weights, bit for bit."""
        for key, p in live.items():
            p.copy_(after[key] if ratio == 1 else between(self.before[key].to(p.device), after[key], ratio))

    def _losses(
        self, ctx: Context, live: dict[str, Parameter], after: dict[str, Tensor]
    ) -> dict[float, float]:
        """Ratio to its mean loss over the kept examples of the tasks that trained one of the adapters at hand."""
        at_hand = {k.split("/", 1)[0] for k in live}
        tasks = [t for t, names in self.trained.items() if at_hand & set(names) and t in self.kept]
        out = {}
        for ratio in sorted(set(self.choose)):
            self._place(live, after, ratio)
            out[ratio] = sum(_loss(ctx, self.kept[t]) for t in tasks) / len(tasks)
        if bad := [r for r, v in out.items() if not math.isfinite(v)]:
            raise RetainError(
                f"interpolate: the loss of task {ctx.task.name!r} is not finite at ratio {bad[0]:g}; lower optim.lr"
            )
        return out


def _loss(ctx: Context, examples: Sequence[Example]) -> float:
    """Mean answer loss over the answer tokens of the examples, under the mix that is on."""
    return sum(
        float(ctx.model(b).loss) * share for b, share in micro_batches(ctx, examples, range(len(examples)))
    )
