"""Experts with a learned router, all of them trained on every task in turn: CoIN's MoELoRA baseline.

Chen et al., "CoIN", NeurIPS 2024 datasets and benchmarks (arXiv 2403.08350). The layer is
`retain.adapters.moe`: y = W x + (alpha/r) sum_e softmax(R x)_e B_e A_e x, per token and dense. Nothing is frozen from
task to task, no task identity is used, and nothing is routed by hand: one adapter, one router per layer, plain
cross entropy.

Differs from the CoIN scripts: rank 16 instead of 128 unless the recipe says so (8 experts in both), no dropout unless
`adapter.dropout` asks for it. MCITlib has 6 experts of rank 3. A user reports that it forgets as plain LoRA does
(zackschen/CoIN, issue 30); LLaCA's rows of it were made with 2 experts and scripts that fail as shipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from retain.adapters.bank import Mix
from retain.method import Context, Method, register


@register
@dataclass
class MoeLora(Method):
    """One adapter of experts for all tasks."""

    name: ClassVar[str] = "moe_lora"
    about: ClassVar[str] = "LoRA experts weighed per token by a learned router"
    source: ClassVar[str] = "arXiv:2403.08350"
    kinds: ClassVar[tuple[str, ...]] = ("moe",)

    def adapt(self, ctx: Context) -> Mix:
        bank = ctx.model.adapters
        if "moe" not in bank.names:
            bank.add("moe", ctx.rng("moe_lora"))
        bank.train_only("moe")
        return Mix({"moe": 1.0})
