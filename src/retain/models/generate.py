"""Greedy decoding of a batch, equal to decoding each sample alone.

The prompt runs once with padding on the left and logits at the last position only; then one token per step
over the key-value cache. Rows leave the cache, and the adapter mix, as they finish. Hugging Face's `generate`
keeps finished rows to the end and knows no mix per sample. A batch without padding needs no mask.
"""

# B batch, T tokens, S tokens seen so far, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from retain.types import Batch

if TYPE_CHECKING:
    from retain.models.hf import HFModel


def greedy(model: HFModel, batch: Batch, max_new_tokens: int) -> list[list[int]]:
    """The most likely next token until EOS (left out) or `max_new_tokens`; token ids per sample.

    `batch` must be padded on the left (`collate(..., answers=False)`).
    """
    answers: list[list[int]] = [[] for _ in batch.examples]
    cache = DynamicCache(config=model.text_config)
    bank, full = model.adapters, model.adapters.mix
    mask_BS = batch.inputs["attention_mask"].to(model.device)
    padded = bool(batch.meta["padded"])
    position_B = torch.tensor(batch.meta["next_position"], device=model.device)
    last_BV = model.prefill(batch, cache)
    alive = list(range(len(answers)))
    for step in range(max_new_tokens):
        token_B = last_BV.argmax(-1)
        going = []
        for row, (sample, token) in enumerate(zip(alive, token_B.tolist(), strict=True)):
            if token not in model.eos:
                answers[sample].append(token)
                going.append(row)
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=model.device)
            cache.batch_select_indices(rows)
            token_B, position_B, mask_BS = token_B[rows], position_B[rows], mask_BS[rows]
            alive = [alive[row] for row in going]
        mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(alive), 1)], dim=1)
        with bank.using(full.select(torch.tensor(alive))):
            last_BV = model.decode(token_B, position_B, mask_BS if padded else None, cache)
        position_B = position_B + 1
    return answers


def next_logits(hidden_BTD: Tensor, head: torch.nn.Module) -> Tensor:
    """Logits of the last position only: (B, V)."""
    logits: Tensor = head(hidden_BTD[:, -1])
    return logits
