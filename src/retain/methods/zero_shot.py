"""The base model without any training: the floor that every table starts from.

Nothing is learned (`stages` is empty) and no adapter is on. In CoIN this is LLaVA after its first stage,
never instruction-tuned (Chen et al., CoIN, NeurIPS 2024 datasets and benchmarks; zackschen/CoIN, issue
27).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from retain.adapters.bank import Mix
from retain.method import Context, Method, register
from retain.stream import Stream, Task


@register
@dataclass
class ZeroShot(Method):
    """No training, no adapter."""

    name: ClassVar[str] = "zero_shot"
    about: ClassVar[str] = "the base model, untrained"
    source: ClassVar[str] = ""

    def stages(self, stream: Stream) -> Sequence[Task]:
        return ()

    def adapt(self, ctx: Context) -> Mix:
        return Mix()
