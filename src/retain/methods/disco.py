"""DISCO with one client per task: tasks that ask alike share a LoRA subspace, and every sample blends all.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025 (arXiv 2503.12897; Ghy0501/FCIT); centralised as
in MCITlib (arXiv 2508.07307). Each subspace c keeps an identity token mu_c, the mean feature of the n_c samples
that it was trained on. A new task with token mu_t and n_t samples

    c* = argmax_c cos(mu_t, mu_c);   cos >= tau: it trains subspace c*, and
    mu_c* = (n_c* mu_c* + n_t mu_t) / (n_c* + n_t),  n_c* = n_c* + n_t;   else a new subspace

trains one subspace alone, weight 1. At inference, at every layer and for every sample

    W h + s sum_c alpha_c B_c A_c h,   alpha = softmax(cos(x, mu_c) / eps)

The projector is trained through the whole stream. tau = -1 is sequential LoRA; tau > 1 is one subspace per task,
and without a projector then equal to `lora_per_task` with temperature eps.

Differs from the authors' code: (1) every sample is routed on its own, not by the batch's mean. (2) Empty slots
do not exist; there they hold zero tokens and get some weight. (3) A task is matched once, by all its samples;
there by each batch, the last one decides, and between rounds tokens move to the nearest entry without a
threshold. (4) The token is the mean of the guide's text features (CLIP's projected embedding, unit length), not
of CLIP's pooled output: tau = 0.9 belongs to that and is unverified here; the logged cosines (`kind:
subspace`) show where your tasks lie. `image_weight` 0 is the paper's (text), 1 the image alone, 0.5 both.

The functions know neither model nor rounds: the server of the federated form is made of them.
"""

# B batch, F image features, D text features, K subspaces

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from retain.adapters.bank import Mix
from retain.method import Context, Method, register
from retain.methods._parts import (
    carry_projector,
    check_guide,
    check_language_only,
    mean_features,
    similarity,
    slug,
    take,
)
from retain.models.base import Model
from retain.stream import Stream
from retain.types import Batch, Guide
from retain.values import LATER, CountOrOff, Share


@dataclass(frozen=True, eq=False)
class Token:
    """An identity token: mean features of n samples."""

    image_F: Tensor
    text_D: Tensor
    n: int

    def joined(self, other: Token) -> Token:
        """The token of both sets of samples together."""
        n = self.n + other.n
        image_F = (self.n * self.image_F + other.n * other.image_F) / n
        return Token(image_F, (self.n * self.text_D + other.n * other.text_D) / n, n)


def cosines(guide: Guide, cache: Sequence[Token], image_weight: float) -> Tensor:
    """(B, K): every sample with every token, (1 - w) of the text and w of the image."""
    image_KF = torch.stack([c.image_F for c in cache]).to(guide.image_BF)
    text_KD = torch.stack([c.text_D for c in cache]).to(guide.text_BD)
    return similarity(guide, image_KF, text_KD, image_weight, 1 - image_weight)


Activation = Literal["softmax", "argmax", "cosine", "concatenation"]


def activation(cosine_BK: Tensor, eps: float, how: Activation = "softmax") -> Tensor:
    """alpha (B, K): how much each subspace counts for each sample.

    softmax(cos / eps) is the paper's. Its ablation also has the best one alone (argmax), the cosines as they are, and
    all of them with weight 1, as if they were concatenated.
    """
    if how == "softmax":
        return torch.softmax(cosine_BK / eps, dim=-1)
    if how == "argmax":
        return F.one_hot(cosine_BK.argmax(-1), cosine_BK.shape[-1]).to(cosine_BK)
    return cosine_BK if how == "cosine" else torch.ones_like(cosine_BK)


def match(token: Token, cache: Sequence[Token], tau: float, image_weight: float = 0.0) -> int | None:
    """The entry most alike, if its cosine reaches tau."""
    if not cache:
        return None
    cosine_K = _with_all(token, cache, image_weight)
    best = int(cosine_K.argmax())
    return best if float(cosine_K[best]) >= tau else None


def organise(
    cache: Sequence[Token], uploads: Sequence[Token], tau: float, image_weight: float = 0.0
) -> tuple[list[Token], list[int]]:
    """The cache after some uploads, and the entry that each of them belongs to.

    The largest upload first: two new and mutually similar ones share one new entry.
    """
    cache, slots = list(cache), [0] * len(uploads)
    for i in sorted(range(len(uploads)), key=lambda i: -uploads[i].n):
        found = match(uploads[i], cache, tau, image_weight)
        slots[i] = len(cache) if found is None else found
        if found is None:
            cache.append(uploads[i])
        else:
            cache[found] = cache[found].joined(uploads[i])
    return cache, slots


def _with_all(token: Token, cache: Sequence[Token], image_weight: float) -> Tensor:
    own = Guide(F.normalize(token.image_F, dim=-1)[None], F.normalize(token.text_D, dim=-1)[None])
    return cosines(own, cache, image_weight)[0]


@register
@dataclass
class Disco(Method):
    """A cache of subspaces, matched per task and blended per sample."""

    name: ClassVar[str] = "disco"
    about: ClassVar[str] = "like tasks share a LoRA subspace; every sample blends all"
    source: ClassVar[str] = "arXiv:2503.12897"

    tau: float = 0.9
    eps: Annotated[float, Field(ge=1e-6)] = 0.05
    image_weight: Share = 0.0
    token_samples: CountOrOff = 0  # 0: the whole training set
    activation: Activation = field(default="softmax", metadata=LATER)

    group_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order
    image_mean: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter -> (F,)
    text_mean: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter -> (D,)
    count: dict[str, int] = field(init=False, default_factory=dict)  # adapter -> n

    def check(self, model: Model, stream: Stream) -> None:
        check_language_only(model.adapters, self.name)
        check_guide(model, stream, self.name)

    @property
    def cache(self) -> list[Token]:
        """The subspaces' tokens, in the order in which they were made."""
        return [Token(self.image_mean[c], self.text_mean[c], n) for c, n in self.count.items()]

    def adapt(self, ctx: Context) -> Mix:
        if ctx.task.name not in self.group_of:
            self._place(ctx)
        name = self.group_of[ctx.task.name]
        ctx.model.adapters.train_only(name)
        return Mix({name: 1.0})

    def _place(self, ctx: Context) -> None:
        """Find or make the subspace of a new task."""
        bank, task, n = ctx.model.adapters, ctx.task.name, len(ctx.task.train)
        rows = take(n, self.token_samples, ctx.rng("disco-token")) if self.token_samples else range(n)
        token, names = Token(*mean_features(ctx, rows), len(rows)), list(self.count)
        scores = _with_all(token, self.cache, self.image_weight).tolist() if names else []
        cache, (slot,) = organise(self.cache, [token], self.tau, self.image_weight)
        reused = slot < len(names)
        if not reused:
            names.append(f"{len(names) + 1:02d}-{slug(task)}")
            bank.add(names[slot], ctx.rng("disco"))
        if self.group_of and self._newest != names[slot]:
            carry_projector(bank, self._newest, names[slot])
        told = {
            "subspace": names[slot],
            "reused": reused,
            "cosines": dict(zip(self.count, scores, strict=True)),
        }
        ctx.log(kind="subspace", task=task, **told)
        self.group_of = {**self.group_of, task: names[slot]}
        self.image_mean = {c: t.image_F for c, t in zip(names, cache, strict=True)}
        self.text_mean = {c: t.text_D for c, t in zip(names, cache, strict=True)}
        self.count = {c: t.n for c, t in zip(names, cache, strict=True)}

    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        if not self.count:
            return None
        names = list(self.count)
        if len(names) == 1 and self.activation != "cosine":
            return Mix({names[0]: 1.0})
        cosine_BK = cosines(ctx.model.guide(batch), self.cache, self.image_weight)
        alpha_BK = activation(cosine_BK, self.eps, self.activation)
        each = dict(zip(names, alpha_BK.t().contiguous().to(ctx.model.device), strict=True))
        return Mix(
            {self._newest: 1.0}, dict.fromkeys(range(ctx.model.n_layers), each)
        )  # the projector is one

    @property
    def _newest(self) -> str:
        return next(reversed(self.group_of.values()))
