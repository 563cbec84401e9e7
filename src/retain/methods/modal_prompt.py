"""Soft prompts per task, chosen for every sample by its image and its text.

Zeng et al., "ModalPrompt", EMNLP 2025 (arXiv 2410.05849); code: github.com/AuroraZengfh/ModalPrompt.

Task t has a prompt P_t (L, D) and a projection g_t; only these two train, the model and all older ones are
frozen.

    p_t = mean over rows of g_t(P_t)                                the prototype
    s_i = lam cos(v, p_i) + (1 - lam) cos(u, p_i)                   guidance by image v and instruction u, frozen
    training    [the K - 1 old prompts with the largest s, P_t]     (all of them, by age, while there are fewer)
    inference   the min(K, t) prompts with the largest s, of all
    L = L_answer + [1 - mean cos(v, p_t)] + [1 - mean cos(u, p_t)]

Prompts stand after BOS, ascending, so that the best is nearest to the input (`retain.adapters.prompt`). K is
`adapter.at_once` and L `adapter.tokens` (paper's code: 3 and 10). No task identity is needed, and inference costs K
prompts however many tasks there are.

The paper's own equations could not be read: the formulas are those of the released code. Differs from it: (1)
there the last task's prompt never trains (a slice that ends at -0); here every prompt does. (2) Prompts are
parameters of their own, not vocabulary rows that are reset before each step. (3) Every sample has its own prompts;
ports route a batch by its first sample. (4) Text-only samples are guided by their text, in training and at
inference; the image term is taken over the samples that have images. There they train with a blank image and
get no prompts at inference. (5) u is CLIP's projected text embedding, as the paper says; the code takes it before
the projection. Where no CLIP model guides, v and u lie in two spaces, and the projection has one output for each.
(6) The projector is frozen; whether theirs moved depends on which lines were commented out. (7) Nominal learning
rate 2e-4, effective 2e-5 in their scripts, since every trained name falls into the projector's group; here
`optim.lr` holds.
"""

# B batch, L rows of a prompt, D width, F image features, G text features, K prompts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from retain.adapters.bank import Mix
from retain.adapters.prompt import SITE, prompts_of
from retain.method import Context, Method, register
from retain.methods._parts import own_adapter
from retain.models.base import Model
from retain.types import Batch, Guide, Output
from retain.values import NotNegative, Share


def prototype(tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean over a prompt's rows of Linear - SiLU - Linear: (F,), or (F + G,) where the features share no space."""
    hidden_LD = F.silu(F.linear(tensors["tokens"], tensors["in_weight"], tensors["in_bias"]))
    return F.linear(hidden_LD, tensors["out_weight"], tensors["out_bias"]).mean(0)


def cosines(guide: Guide, p_K: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines (B, K) of each sample's image, and of its text, with each prototype. Row by row.

    A prototype of width F = G is compared with both; one of width F + G in its two parts.
    """
    n_image, n_text = guide.image_BF.shape[1], guide.text_BD.shape[1]
    image = (guide.image_BF[:, None] * F.normalize(p_K[:, :n_image], dim=-1)).sum(-1)
    text = (guide.text_BD[:, None] * F.normalize(p_K[:, -n_text:], dim=-1)).sum(-1)
    return image, text


def prototype_losses(guide: Guide, p: Tensor) -> tuple[Tensor, Tensor]:
    """1 - mean cosine with the images (of the samples that have one), and with the texts."""
    image_B1, text_B1 = cosines(guide, p[None])
    shown_B = guide.image_BF.abs().sum(1) > 0
    image = 1 - image_B1[shown_B].mean() if bool(shown_B.any()) else image_B1.sum() * 0
    return image, 1 - text_B1.mean()


def chosen(score_BK: Tensor, names: Sequence[str], n: int, last: str | None = None) -> Mix:
    """The `n` best prompts of each sample, ascending, then `last`: weights 1/m, 2/m, …, 1 say the order."""
    n = min(n, len(names))
    m = n + (last is not None)
    weights: dict[str, float | Tensor] = {}
    if n:
        best_Bn = score_BK.argsort(dim=1, descending=True, stable=True)[:, :n].flip(1)
        w_n = (torch.arange(1, n + 1) / m).to(score_BK)
        w_BK = torch.zeros_like(score_BK).scatter_(1, best_Bn, w_n.expand(len(score_BK), -1))
        weights = {names[i]: w_BK[:, i] for i in sorted(set(best_Bn.flatten().tolist()))}
    return Mix(weights if last is None else {**weights, last: 1.0})


@register
@dataclass
class ModalPrompt(Method):
    """A prompt and its prototype per task; the best are transferred in training and fused at inference."""

    name: ClassVar[str] = "modal_prompt"
    about: ClassVar[str] = "soft prompts per task, chosen by image and text"
    source: ClassVar[str] = "arXiv:2410.05849"
    kinds: ClassVar[tuple[str, ...]] = ("prompt",)
    roles: ClassVar[Mapping[str, str]] = {"end_task": "reads"}

    image_weight: Share = 0.5  # lam
    prototype_weight: NotNegative = 1.0

    prompt_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order
    prototypes: dict[str, Tensor] = field(init=False, default_factory=dict)  # of the learned prompts, fp32

    def adapt(self, ctx: Context) -> Mix:
        self.prompt_of = own_adapter(ctx, self.prompt_of, "modal_prompt")
        return Mix({self.prompt_of[ctx.task.name]: 1.0})

    @torch.no_grad()
    def batch_mix(self, ctx: Context, batch: Batch) -> Mix | None:
        current = self.prompt_of[ctx.task.name]
        old = [n for n in self.prompt_of.values() if n != current]
        room = _at_once(ctx.model) - 1
        if len(old) < room:  # by age
            return Mix({n: (i + 1) / (len(old) + 1) for i, n in enumerate([*old, current])})
        return chosen(self._scores(ctx.model, batch, old), old, room, current)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        if not self.prototype_weight:
            return 0.0
        p = _prototype(ctx.model, self.prompt_of[ctx.task.name])
        image, text = prototype_losses(ctx.model.guide(batch), p)
        return (image + text) * self.prototype_weight

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        name = self.prompt_of[ctx.task.name]
        self.prototypes = {**self.prototypes, name: _prototype(ctx.model, name)}

    @torch.no_grad()
    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        if not self.prototypes:
            return None
        names = list(self.prototypes)
        return chosen(self._scores(ctx.model, batch, names), names, _at_once(ctx.model))

    def _scores(self, model: Model, batch: Batch, names: Sequence[str]) -> Tensor:
        """Guidance of every sample towards each prompt: (B, K)."""
        if not names:
            return torch.zeros(len(batch), 0)
        image, text = cosines(model.guide(batch), torch.stack([self.prototypes[n] for n in names]))
        return self.image_weight * image + (1 - self.image_weight) * text


def _prototype(model: Model, name: str) -> Tensor:
    """A prompt's prototype where the guide's features are: on the CPU."""
    prefix = f"{SITE}."
    tensors = {k.removeprefix(prefix): p for k, p in model.adapters.parameters(name).items()}
    with torch.autocast(model.device.type, enabled=False):  # cosines in fp32, whatever the forward runs in
        return prototype(tensors).cpu()


def _at_once(model: Model) -> int:
    site = prompts_of(model.adapters)
    assert site is not None, "continual.check refuses other kinds"
    return site.spec.at_once
