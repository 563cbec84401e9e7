"""A moving average of the weights with a fixed rate: the simplest relative of LLaCA, and its baseline.

    theta*_t = beta theta*_{t-1} + (1 - beta) theta_t    per optimizer step t;  theta*_0: before the first

theta (raw) is trained as ever and never pulled towards theta*; at the end of the task theta* takes its
place. The next task starts from theta*. `beta: 0.99` is the constant LLaCA compares with (Qiao et al.,
ICML 2025, arXiv 2410.10868). `beta: 0` is off, bit for bit. The average is fp32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from retain.method import FULL_PARAMS, Context, Method, register
from retain.methods._parts import as_shadow


@register
@dataclass
class Ema(Method):
    """A fixed-rate average, swapped in when the task ends."""

    name: ClassVar[str] = "ema"
    about: ClassVar[str] = "a fixed-rate average of the weights"
    source: ClassVar[str] = "arXiv:2410.10868"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"after_step": "reads", "end_task": "settles"}

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.99

    shadow: dict[str, Tensor] = field(init=False, default_factory=dict)

    def begin_task(self, ctx: Context) -> None:
        self.shadow = {k: as_shadow(p) for k, p in ctx.model.adapters.trainable().items()}

    @torch.no_grad()
    def after_step(self, ctx: Context) -> None:
        live = ctx.model.adapters.trainable()
        self.shadow = {k: self.shadow[k].to(p.device) for k, p in live.items()}
        torch._foreach_lerp_(list(self.shadow.values()), [p.float() for p in live.values()], 1 - self.beta)

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        for key, p in ctx.model.adapters.trainable().items():
            p.copy_(self.shadow[key])
        self.shadow = {}
