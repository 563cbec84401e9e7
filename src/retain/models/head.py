"""What a model does behind its body: the output embeddings, and whatever its own forward does to the logits.

Soft caps (Gemma 2), scales (Cohere, Granite) and their kin stand in the forward of each class, after its head. So that
forward itself is run, with the body replaced by one that says the hidden states; where the probe shows that it adds
nothing, the head alone.
"""

# N positions, D width, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Said(dict[str, Any]):
    """A body's output that holds hidden states and says None to every other question."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self["last_hidden_state"] if key == 0 else self.get(key)


class _Body(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.said = _Said(last_hidden_state=hidden)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.said


class Head:
    """Hidden states (…, D) to logits (…, V), as the model's own forward makes them."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.layer: nn.Module = hf.get_output_embeddings()
        self.plain = self._adds_nothing()

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.plain:
            logits: Tensor = self.layer(hidden)
            return logits
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        return self._whole(flat)[0].view(*hidden.shape[:-1], -1)

    def _whole(self, hidden_1ND: Tensor) -> Tensor:
        """The model's own forward behind its body."""
        parts, name = self.hf._modules, self.hf.base_model_prefix
        body = parts[name]
        parts[name] = _Body(hidden_1ND)
        try:
            logits: Tensor = self.hf(inputs_embeds=hidden_1ND).logits
        finally:
            parts[name] = body
        return logits

    @torch.no_grad()
    def _adds_nothing(self) -> bool:
        """Whether head and forward agree to the bit, on hidden states large enough for a soft cap to show."""
        weight: Any = self.layer.weight
        if weight.is_meta:
            return True
        noise = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0))
        hidden = (noise * 8).to(weight.device, weight.dtype)
        return torch.equal(self._whole(hidden), self.layer(hidden))
