"""Sequential LoRA: one adapter is trained on every task in turn, and forgets.

Hu et al., "LoRA", ICLR 2022 (arXiv 2106.09685); as "LoRA FT" the lower baseline of CoIN (arXiv
2403.08350): one LoRA and the projector, each task starts from the previous task's weights with a new
optimizer, plain cross entropy.

Differs from the CoIN scripts: no dropout unless `adapter.dropout` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from retain.adapters.bank import Mix
from retain.method import Context, Method, register


@register
@dataclass
class Lora(Method):
    """One adapter for all tasks."""

    name: ClassVar[str] = "lora"
    about: ClassVar[str] = "one LoRA, trained on every task in turn"
    source: ClassVar[str] = "arXiv:2106.09685"

    def adapt(self, ctx: Context) -> Mix:
        bank = ctx.model.adapters
        if "lora" not in bank.names:
            bank.add("lora", ctx.rng("lora"))
        bank.train_only("lora")
        return Mix({"lora": 1.0})
