"""Learning without forgetting: on new inputs, the model is asked to answer as it did before the task.

Li and Hoiem, "Learning without Forgetting", TPAMI 2018 (arXiv 1606.09282).

    L = L_new + weight T^2 mean over answer tokens of KL( softmax(z_old / T) || softmax(z / T) )

z_old: the logits of the model as it was when the task began, on the new task's examples: with the mix that it would
have answered with then, routed per sample where the stack has a router. Adapters of old tasks are in the bank; of
those that train on a copy is kept there, so the teacher costs one more forward per micro-batch (and the router's) and
no second model. Copies are dropped at the end of the task. The first task has no teacher.

Differs from Continual-NExT (T = 2, weight 0.001 in code, 0.0001 in its documentation): theirs caches the
teacher's logits before training, and reads them at label positions without the shift by one; ours at the
positions that predict the answer tokens. What LLaCA's own LwF row used is not known.
"""

# N answer tokens, V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from retain.method import Context, Method, register
from retain.methods._parts import renamed, trained_names
from retain.types import Batch, Output
from retain.values import NotNegative


def distillation(logits_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), mean over answer tokens, in fp32."""
    student = F.log_softmax(logits_NV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


@register
@dataclass
class LwF(Method):
    """Distillation from the model at the start of the task, on the new task's own inputs."""

    name: ClassVar[str] = "lwf"
    about: ClassVar[str] = "answers on new inputs stay close to the old model's"
    source: ClassVar[str] = "arXiv:1606.09282"
    asks_before: ClassVar[bool] = True
    ends_alone: ClassVar[bool] = True

    weight: NotNegative = 1.0
    temperature: Annotated[float, Field(ge=1e-6)] = 2.0

    teacher: dict[str, str] = field(init=False, default_factory=dict)  # trained adapter -> its copy

    def begin_task(self, ctx: Context) -> None:
        if not self.weight or not ctx.seen:
            return
        bank = ctx.model.adapters
        self.teacher = {name: f"lwf-{name}" for name in trained_names(bank)}
        for name, copy in self.teacher.items():
            bank.add(copy, ctx.rng("lwf"), like=name)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        if not self.teacher:
            return 0.0
        bank = ctx.model.adapters
        ctx.model.train(False)  # the teacher answers without dropout
        with torch.no_grad():
            old = bank.mix if ctx.before is None else ctx.before(batch)
            with bank.using(renamed(old, lambda n: self.teacher.get(n, n))):
                teacher_NV = ctx.model(batch).logits_NV
        ctx.model.train(True)
        return distillation(out.logits_NV, teacher_NV, self.temperature) * self.weight

    def end_task(self, ctx: Context) -> None:
        for copy in self.teacher.values():
            ctx.model.adapters.remove(copy)
        self.teacher = {}
