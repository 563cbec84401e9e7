"""Soft prompts: rows of trained embeddings that a `Mix` puts before a sample's own, and a projection that says
what a prompt is for.

    [BOS] P_1 … P_n [system prompt, images, question, answer]      P_k (L, D), n at most `at_once`
    prototype of P = mean over its L rows of g(P),  g = Linear(D, D) - SiLU - Linear(D, F)

The place, after BOS and before the system prompt, is that of the released ModalPrompt (arXiv 2410.05849). A
weight of the mix says whether a prompt is there (0: it is not) and where: ascending, so that the largest
stands nearest to the input; equal weights stand in the mix's order. Rows are not scaled: half an embedding is
no half effect. Weights are numbers or one per sample, and samples may get different numbers of prompts.

Every prompt is a Parameter of its own, each row a copy of a randomly drawn token embedding. (The released code
adds rows to the vocabulary and resets the frozen ones before each step: the last task's prompt never trained,
and the last step leaked into old ones.) What the projection maps to, and why, is the affair of the method.
"""

# B batch, T tokens, S tokens with prompts, L rows of a prompt, D width, K prompts, F features, U prompt rows at most

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from retain.adapters.bank import AdapterBank, Mix
from retain.types import Batch, RetainError
from retain.values import ranged

SITE = "prompt"  # the name of the site in its bank


@ranged("adapter")
@dataclass(frozen=True)
class PromptSpec:
    """Soft prompts of `tokens` rows each, at most `at_once` of them before a sample (ModalPrompt: 10 and 3)."""

    kind: ClassVar[str] = "prompt"

    tokens: Annotated[int, Field(ge=1, le=65_536)] = 10
    at_once: Annotated[int, Field(ge=1, le=65_536)] = 3

    def in_front(self, n_tasks: int) -> int:
        """Tokens before a sample once there is a prompt for each of so many tasks."""
        return self.tokens * min(n_tasks, self.at_once)

    @property
    def room(self) -> int:
        """Tokens of the context that are kept for prompts."""
        return self.tokens * self.at_once


@dataclass(frozen=True, eq=False)
class Places:
    """Where everything stands once prompts are in front: column by column of the longer rows."""

    names: tuple[str, ...]
    source_BS: Tensor  # rows of the flat [B * T embeddings; K * L prompt rows]
    old_BS: Tensor  # the column that it was; any column where there was none
    prompt_BS: Tensor  # whether a prompt stands here
    real_BS: Tensor  # whether anything stands here
    n_B: Tensor  # prompt tokens of each row

    def moved(self, at_M: Tensor) -> Tensor:
        """Flat places (M,) of tokens of the shorter rows as places of the longer ones, ascending."""
        own_BS = self.real_BS & ~self.prompt_BS
        return (own_BS & torch.isin(self.source_BS, at_M)).flatten().nonzero().squeeze(1)


class Prompts(nn.Module):
    """The one site of a bank of prompts. It is no part of the model: the model asks it (`placed`, `fill`).

    `embed` is the table that rows are drawn from, `width` says F when the first prompt is made.
    """

    layer: int | None = None
    group: str = "prompt"
    no_peft: ClassVar[str] = (
        "soft prompts (adapter.kind: prompt) are no LoRA, and PEFT's prompt tuning puts them before BOS, not after it"
    )

    def __init__(self, spec: PromptSpec, embed: nn.Module, width: Callable[[], int]) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self._embed = (embed,)  # a tuple: the base's table is no part of this module
        self.bank: AdapterBank
        kinds = ("tokens", "in_weight", "in_bias", "out_weight", "out_bias")
        self.kept = nn.ModuleDict({kind: nn.ParameterDict() for kind in kinds})

    def create(self, name: str, rng: Generator | None) -> None:
        table: Any = self._embed[0]
        rows = torch.randint(0, table.weight.shape[0], (self.spec.tokens,), generator=rng)
        tokens_LD = table(rows.to(table.weight.device)).detach().float().clone()
        D, F = tokens_LD.shape[1], self.width()
        fresh = {"tokens": tokens_LD, "in_weight": torch.empty(D, D), "in_bias": torch.empty(D)}
        fresh |= {"out_weight": torch.empty(F, D), "out_bias": torch.empty(F)}
        for kind, value in fresh.items():
            if kind != "tokens":  # as nn.Linear: uniform within 1 / sqrt(D), weight and bias
                value.uniform_(-1 / math.sqrt(D), 1 / math.sqrt(D), generator=rng)
            self._of(kind)[name] = Parameter(value.to(tokens_LD.device))

    def remove(self, name: str) -> None:
        for kind in self.kept:
            del self._of(kind)[name]

    def tensors(self, name: str) -> dict[str, Parameter]:
        return {kind: self._of(kind)[name] for kind in self.kept}

    def _of(self, kind: str) -> Any:
        return self.kept[kind]

    # -- where things stand ----------------------------------------------------------------------------------

    def weights(self, mix: Mix, B: int) -> tuple[tuple[str, ...], Tensor]:
        """The prompts that any sample gets, and their weights (B, K) on the CPU."""
        on = {n: w for n, w in mix.weights.items() if isinstance(w, Tensor) or w != 0}
        columns = []
        for name, w in on.items():
            column = torch.as_tensor(w, dtype=torch.float32).detach().cpu()
            if column.ndim and len(column) != B:
                raise RetainError(f"the mix weighs {name!r} for {len(column)} samples, the batch has {B}")
            columns.append(column.expand(B))
        return tuple(on), torch.stack(columns, dim=1) if columns else torch.zeros(B, 0)

    def count(self, mix: Mix, B: int) -> Tensor:
        """Prompt tokens before each of B samples: (B,)."""
        return (self.weights(mix, B)[1] != 0).sum(1) * self.spec.tokens

    def places(self, mix: Mix, mask_BT: Tensor, start_B: Tensor, left: bool) -> Places | None:
        """Everything's place for rows whose real tokens `mask_BT` says; None where no sample gets a prompt.

        `start_B` is how many tokens (BOS) stay before the prompts; `left` keeps the padding on the left.
        """
        B, T = mask_BT.shape
        names, w_BK = self.weights(mix, B)
        many_B, L = (w_BK != 0).sum(1), self.spec.tokens
        if not int(many_B.sum()):
            return None
        if int(many_B.max()) > self.spec.at_once:
            raise RetainError(
                f"a mix puts {int(many_B.max())} prompts before a sample; adapter.at_once is {self.spec.at_once}"
            )
        n_B, length_B = many_B * L, mask_BT.sum(1)
        S = int((n_B + length_B).max())
        first_B = mask_BT.argmax(1)
        shift_B = S - n_B - length_B if left else torch.zeros_like(n_B)
        at_BS = torch.arange(S) - shift_B[:, None]  # counted from the row's first real token
        prompt_BS = (at_BS >= start_B[:, None]) & (at_BS < (start_B + n_B)[:, None])
        behind_BS = at_BS >= (start_B + n_B)[:, None]
        old_BS = first_B[:, None] + at_BS - behind_BS * n_B[:, None]
        # absent prompts first, then ascending: the row's own are the last of the sorted columns
        order_BK = w_BK.masked_fill(w_BK == 0, -torch.inf).argsort(dim=1, stable=True)
        slot_BS = (at_BS - start_B[:, None]).clamp(min=0)
        which_BS = (len(names) - many_B[:, None] + slot_BS // L).clamp(0, len(names) - 1)
        row_BS = order_BK.gather(1, which_BS) * L + slot_BS % L
        old_BS = old_BS.clamp(0, T - 1)
        source_BS = torch.where(prompt_BS, B * T + row_BS, torch.arange(B)[:, None] * T + old_BS)
        real_BS = (at_BS >= 0) & (at_BS < (n_B + length_B)[:, None])
        return Places(names, source_BS, old_BS, prompt_BS, real_BS, n_B)

    def fill(self, embeds_BTD: Tensor, places: Places) -> Tensor:
        """The embeddings with the prompts in their places: (B, S, D)."""
        tokens = [self._of("tokens")[n].to(embeds_BTD.dtype) for n in places.names]
        flat = torch.cat([embeds_BTD.flatten(0, 1), *tokens])
        # not flat[…]: its backward adds up in the order of threads, so that two runs would differ in their last bits
        rows = flat.index_select(0, places.source_BS.flatten().to(flat.device))
        return rows.view(*places.source_BS.shape, -1)


def attach(
    embed: nn.Module, spec: PromptSpec, width: Callable[[], int], signature: Mapping[str, object]
) -> AdapterBank:
    """A bank of prompts for a language model with this embedding table."""
    site = Prompts(spec, embed, width)
    site.bank = bank = AdapterBank({SITE: site}, {**signature, spec.kind: asdict(spec)}, spec.kind)
    return bank


def prompts_of(bank: AdapterBank) -> Prompts | None:
    """The site of a bank of prompts; None where it holds another kind."""
    site = bank.sites.get(SITE)
    return site if isinstance(site, Prompts) else None


def tokens_in_front(bank: AdapterBank, mix: Mix, B: int) -> int:
    """Tokens that a mix puts before B samples together: 0 unless the bank holds prompts."""
    site = prompts_of(bank)
    return 0 if site is None else int(site.count(mix, B).sum())


def placed(batch: Batch, site: Prompts, start_B: Tensor) -> Batch:
    """The batch behind the prompts of the bank's mix: mask, labels and positions of the longer rows.

    `input_ids` stay as they are: prompts have no ids. The model embeds them and asks `Prompts.fill`.
    """
    mask_BT, left = batch.inputs["attention_mask"], bool(batch.meta["left"])
    places = site.places(site.bank.mix, mask_BT, start_B, left)
    if places is None:
        return batch
    old_BS, prompt_BS, n_B1 = places.old_BS, places.prompt_BS, places.n_B[:, None]
    inputs = {**batch.inputs, "attention_mask": places.real_BS.to(mask_BT.dtype)}
    if "position_ids" in inputs:  # (B, T), or (3, B, T) where positions have three axes
        was = inputs["position_ids"]
        moved = was.gather(-1, old_BS.expand(*was.shape[:-1], -1))
        at_BS = places.real_BS.cumsum(1) - 1  # a prompt follows BOS, so its position is its place
        behind_BS = at_BS >= (start_B[:, None] + n_B1)
        inputs["position_ids"] = torch.where(prompt_BS, at_BS, moved + behind_BS * n_B1)
    labels_BS = None
    if batch.labels_BT is not None:
        labels_BS = batch.labels_BT.gather(1, old_BS).masked_fill(prompt_BS | ~places.real_BS, -100)
    following = [n + int(more) for n, more in zip(batch.meta["next_position"], places.n_B, strict=True)]
    padded = not bool(places.real_BS.all())
    meta = {**batch.meta, "padded": padded, "next_position": following, "places": places}
    return replace(batch, inputs=inputs, labels_BT=labels_BS, meta=meta)
