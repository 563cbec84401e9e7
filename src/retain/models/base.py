"""What a model must offer to be tuned: the protocol that the loop, the methods and the routers see.

Any Hugging Face image-text-to-text model fits through `retain.models.hf`. A family's oddities stay behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import device

from retain.adapters.bank import AdapterBank
from retain.types import Batch, Example, Guide, Output

Turns = Literal["all", "last"]
"""Which answers of a conversation are learned: those of all assistant turns, or the last one."""


@runtime_checkable
class Model(Protocol):
    """A frozen multimodal language model whose only moving parts are in `adapters`."""

    adapters: AdapterBank
    n_layers: int
    device: device

    def collate(self, examples: Sequence[Example], *, answers: bool, turns: Turns = "all") -> Batch:
        """Ready-made tensors. With answers: padded right, labels on answer tokens. Without: padded left, prompt only."""
        ...

    def length(self, example: Example) -> int:
        """Tokens of prompt and answer, image tokens included: batches are grouped by it and plans count with it."""
        ...

    def __call__(self, batch: Batch) -> Output:
        """Mean cross entropy over the batch's answer tokens, and their logits."""
        ...

    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        """Greedy answers under the bank's mix, one per sample, equal to generating each sample alone."""
        ...

    def guide(self, batch: Batch) -> Guide:
        """Frozen, unit-length image (B, F) and text (B, D) features: what routers compare."""
        ...

    def train(self, mode: bool = True) -> object:
        """Training mode: adapter dropout on."""
        ...

    def fingerprint(self) -> str:
        """A short hash of the base model: family, config and weights. Adapters of another base are refused by it."""
        ...

    def n_parameters(self) -> int:
        """Parameters of the frozen base."""
        ...

    def flops_per_token(self) -> float:
        """Forward FLOPs per token (2 x the parameters that a token passes), for budgets."""
        ...
