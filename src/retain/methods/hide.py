"""HiDe-LLaVA: one LoRA per task; the top layers blend them per sample, the layers below sum them.

Guo et al., "HiDe-LLaVA", ACL 2025 (arXiv 2503.12941; Ghy0501/HiDe-LLaVA). Task t trains its own LoRA on the
frozen base, earlier ones off; the projector alone is trained through the whole stream. CKA between the tasks'
models is high in every layer but the top (`retain analyse cka` measures it), hence at inference

    top_k layers     W h + s sum_c d_c B_c A_c h       d = softmax(r / T),
                     r_c = a cos(image, v_c) + b cos(text, u_c), v_c and u_c the mean features of task c
    layers below     W h + s B A h with A = sum_c A_c, B = sum_c B_c         fusion: factor_sum (as released)
                     W h + s sum_c B_c A_c h                                 fusion: delta_sum (exact)

`factor_sum` holds cross terms B_i A_j that grow with the number of tasks; the released numbers have them, so it
is the default. The sums over all layers are kept in the bank as the adapter `fused`: alone, it is the paper's
"merge all" row; `top_k` = all layers is "expand all". `coefficient` is the paper's eps_i, one for all tasks.

Differs from the authors' code: (1) anchors are plain fp32 means of all training samples, on every process; there
they start from a random vector that counts as a sample, and a bf16 counter stops at 8,192. (2) Only learned
tasks take part in the softmax; there, random anchors of tasks to come do too, and there are always six.
(3) Every sample is routed on its own, not by the batch's mean. (4) The top layer is the model's last one, not
number 31. (5) The text feature is the guide's (CLIP's projected embedding, unit length before the mean), not
CLIP's pooled output. (6) A starts uniform as in PEFT, within 10 % of the released sd of 0.01 at width 4096.
The learned routers that are declared there and never used are left out.
"""

# B batch, F image features, D text features, K tasks

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from retain.adapters.bank import Mix, Weight
from retain.method import Context, Method, register
from retain.methods._parts import (
    carry_projector,
    check_guide,
    check_language_only,
    mean_features,
    own_adapter,
    similarity,
    take,
)
from retain.models.base import Model
from retain.stream import Stream
from retain.types import Batch, Guide, RetainError, State
from retain.values import CountOrOff, NotNegative, zero_or

FUSED = "fused"


def expansion(
    guide: Guide, image_KF: Tensor, text_KD: Tensor, a: float, b: float, temperature: float
) -> Tensor:
    """d (B, K): how much each task's LoRA counts at the top layers. Temperature 0: the best task alone."""
    r_BK = similarity(guide, image_KF, text_KD, a, b)
    if not temperature:
        return torch.nn.functional.one_hot(r_BK.argmax(-1), r_BK.shape[-1]).to(r_BK.dtype)
    return torch.softmax(r_BK / temperature, dim=-1)


def factor_sum(
    states: Sequence[State], coefficient: float = 1.0, onto: State | None = None
) -> dict[str, Tensor]:
    """A = sum_c A_c and B = coefficient sum_c B_c at every LoRA layer, added to a sum so far (`onto`).

    The rest (the projector) is the last state's.
    """
    out = dict(states[-1])
    for key, last in states[-1].items():
        kind = key.rpartition(".")[2]
        if kind in ("lora_A", "lora_B"):
            total = torch.stack([s[key].float() for s in states]).sum(0)
            total = total * coefficient if kind == "lora_B" else total
            out[key] = (total if onto is None else onto[key].float() + total).to(last.dtype)
    return out


@register
@dataclass
class Hide(Method):
    """A LoRA per task: blended per sample at the top, fused below."""

    name: ClassVar[str] = "hide"
    about: ClassVar[str] = "one LoRA per task: routed at the top layers, fused below"
    source: ClassVar[str] = "arXiv:2503.12941"
    roles: ClassVar[Mapping[str, str]] = {"end_task": "derives"}

    top_k: CountOrOff = 1
    fusion: Literal["factor_sum", "delta_sum"] = "factor_sum"
    temperature: Annotated[float, zero_or(1e-6)] = 0.1
    image_weight: NotNegative = 0.5  # a
    text_weight: NotNegative = 0.5  # b
    coefficient: float = 1.0  # eps_i
    anchor_samples: CountOrOff = 0  # 0: the whole training set

    adapter_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order
    image_anchor: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter -> (F,)
    text_anchor: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter -> (D,)

    def check(self, model: Model, stream: Stream) -> None:
        if self.top_k > model.n_layers:
            raise RetainError(f"hide.top_k: {self.top_k} is more than the model's {model.n_layers} layers")
        if self.fusion == "delta_sum":  # `fused` holds what is outside the layers, and is not there
            check_language_only(model.adapters, "hide with fusion: delta_sum")
        check_guide(model, stream, self.name)

    def adapt(self, ctx: Context) -> Mix:
        before = list(self.adapter_of.values())
        self.adapter_of = own_adapter(ctx, self.adapter_of, "hide")
        name = self.adapter_of[ctx.task.name]
        if before and name not in before:
            carry_projector(ctx.model.adapters, before[-1], name)
        return Mix({name: 1.0})

    def end_task(self, ctx: Context) -> None:
        name, bank, n = self.adapter_of[ctx.task.name], ctx.model.adapters, len(ctx.task.train)
        again = name in self.image_anchor
        rows = take(n, self.anchor_samples, ctx.rng("hide-anchor")) if self.anchor_samples else range(n)
        image_F, text_D = mean_features(ctx, rows)
        self.image_anchor = {**self.image_anchor, name: image_F}
        self.text_anchor = {**self.text_anchor, name: text_D}
        if self.fusion == "factor_sum":
            sum_so_far = bank.state(FUSED) if FUSED in bank.names and not again else None
            news = [name] if sum_so_far else list(self.adapter_of.values())
            fused = factor_sum([bank.state(n) for n in news], self.coefficient, sum_so_far)
            if FUSED not in bank.names:
                bank.add(FUSED, ctx.rng("hide"))
            bank.load(FUSED, fused)

    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        if not self.image_anchor:
            return None
        top, fused, n = self._top(ctx, batch), self.fusion == "factor_sum", ctx.model.n_layers
        below = {FUSED: 1.0} if fused else dict.fromkeys(self.image_anchor, self.coefficient)
        layers = {i: below if i < n - self.top_k else top for i in range(n)}
        return Mix({FUSED: 1.0} if fused else {self._newest: 1.0}, layers)

    def _top(self, ctx: Context, batch: Batch) -> Mapping[str, Weight]:
        names = list(self.image_anchor)  # the learned tasks; those to come have no anchor
        if len(names) == 1:
            return {names[0]: 1.0}
        image_KF, text_KD = (
            torch.stack([a[n] for n in names]) for a in (self.image_anchor, self.text_anchor)
        )
        guide = ctx.model.guide(batch)
        anchors = (image_KF.to(guide.image_BF), text_KD.to(guide.text_BD))
        d_BK = expansion(guide, *anchors, self.image_weight, self.text_weight, self.temperature)
        return dict(zip(names, d_BK.t().contiguous().to(ctx.model.device), strict=True))

    @property
    def _newest(self) -> str:
        return next(reversed(self.adapter_of.values()))
