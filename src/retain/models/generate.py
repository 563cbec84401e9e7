"""Greedy decoding of a batch, equal to decoding each sample alone.

The prompt runs once with padding on the left and logits at the last position only; then one token per step
over the key-value cache. Finished rows leave the cache, and the adapter mix, a quarter at a time. Hugging Face's
`generate` keeps them to the end and knows no mix per sample. A batch without padding needs no mask. What the
checkpoint's generation config asks of greedy decoding (a repetition penalty, banned words) is done by Hugging Face's
own processors, row by row on the row's own tokens, so that padding is never penalised.
"""

# B batch, T tokens, S tokens seen so far, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from retain.adapters.bank import AdapterBank
from retain.types import Batch, RetainError

KEPT = 0.75  # finished rows leave once so few are going on: to leave means to copy what the others have seen


class Decodes(Protocol):
    """What greedy decoding needs of a model."""

    adapters: AdapterBank
    device: torch.device
    eos: frozenset[int]

    def placed(self, batch: Batch) -> Batch: ...
    def cache(self, rows: int, room: int) -> Any: ...
    def prefill(self, batch: Batch, cache: Any) -> Tensor: ...
    def processors(self, prompt: int) -> Any: ...
    def decode(self, token_B: Tensor, position_B: Tensor, mask_BS: Tensor | None, cache: Any) -> Tensor: ...


def greedy(model: Decodes, batch: Batch, max_new_tokens: int) -> list[list[int]]:
    """The most likely next token until EOS (left out) or `max_new_tokens`; token ids per sample.

    `batch` must be padded on the left (`collate(..., answers=False)`).
    """
    seen_BT = batch.inputs["attention_mask"].bool()
    said = [ids[seen] for ids, seen in zip(batch.inputs["input_ids"], seen_BT, strict=True)]
    asked = [model.processors(len(ids)) for ids in said]
    batch = model.placed(batch)
    answers: list[list[int]] = [[] for _ in batch.examples]
    bank, full = model.adapters, model.adapters.mix
    mask_BT = batch.inputs["attention_mask"].to(model.device)
    B, T = mask_BT.shape
    mask_BS = F.pad(mask_BT, (0, max_new_tokens), value=1) if batch.meta["padded"] else None
    position_B = torch.tensor(batch.meta["next_position"], device=model.device)
    cache = model.cache(B, T + max_new_tokens)
    last_BV = model.prefill(batch, cache)
    if not (whole_B := last_BV.amax(-1).isfinite()).all():  # a nan would be read as a token, and scored
        example = batch.examples[int((~whole_B).nonzero()[0])]
        raise RetainError(
            f"example {example.id!r}: the model's answer is not finite: its weights are finite, and so large that they "
            "overflow on the way; lower optim.lr, or compute wider (model.dtype, eval.precision: fp32)"
        )
    rows, unfinished, mix = list(range(B)), set(range(B)), full  # rows: the samples in the cache
    for step in range(max_new_tokens):
        if any(asked):
            last_BV = torch.stack(
                [
                    asked[i](torch.cat([said[i], torch.tensor(answers[i], dtype=torch.long)])[None].to(row_V.device),
                             row_V[None].float())[0]
                    for i, row_V in zip(rows, last_BV, strict=True)
                ]
            )  # fmt: skip
        token_B = last_BV.argmax(-1)
        for sample, token in zip(rows, token_B.tolist(), strict=True):
            if token in model.eos:
                unfinished.discard(sample)
            elif sample in unfinished:
                answers[sample].append(token)
        if not unfinished or step + 1 == max_new_tokens:
            break
        if len(unfinished) <= KEPT * len(rows):
            going = [i for i, sample in enumerate(rows) if sample in unfinished]
            at = torch.tensor(going, device=model.device)
            cache.batch_select_indices(at)
            token_B, position_B = token_B[at], position_B[at]
            mask_BS = None if mask_BS is None else mask_BS[at]
            rows = [rows[i] for i in going]
            mix = full.select(torch.tensor(rows))
        seen_BS = None if mask_BS is None else mask_BS[:, : T + step + 1]
        with bank.using(mix):
            last_BV = model.decode(token_B, position_B, seen_BS, cache)
        position_B = position_B + 1
    return answers


def next_logits(hidden_BTD: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of the last position only: (B, V)."""
    logits: Tensor = head(hidden_BTD[:, -1])
    return logits
