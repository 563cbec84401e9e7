"""One adapter per task, and a rule that picks one (or a blend) for each sample at inference.

The frame of most architecture-based methods (Progressive Networks' descendants; EProj, HiDe-LLaVA and
DISCO all route by frozen features). Routing compares a sample's frozen image and text features with each
task's mean of them:

    s_k = w cos(image, mean image of task k) + (1 - w) cos(text, mean text of task k)
    temperature = 0: the best task's adapter;   temperature = T: a blend with weights softmax(s / T)

`router`: `guide` (above), `oracle` (the true task's adapter, an unseen task gets the base model), `last`
(the newest adapter), `none` (another part of the stack routes). `init`: a new adapter starts `fresh` or
from the `previous` one.

No paper's code is followed to the letter here; the methods that refine this frame have their own files.
"""

# B batch, F image features, D text features, K tasks

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from retain.adapters.bank import Mix
from retain.method import Context, Method, register
from retain.methods._parts import check_guide, mean_features, one_of, own_adapter, similarity, take
from retain.models.base import Model
from retain.stream import Stream
from retain.types import Batch, Guide
from retain.values import Count, Share, zero_or


@register
@dataclass
class LoraPerTask(Method):
    """A new adapter for each task; a router at inference."""

    name: ClassVar[str] = "lora_per_task"
    about: ClassVar[str] = "one LoRA per task, chosen per sample"
    source: ClassVar[str] = ""

    init: Literal["fresh", "previous"] = "fresh"
    router: Literal["guide", "oracle", "last", "none"] = "guide"
    temperature: Annotated[float, zero_or(1e-6)] = 0.0
    image_weight: Share = 0.5
    anchor_samples: Count = 1000  # drawn from the task's training set; a mean moves little after that

    adapter_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter, in learning order
    image_anchor: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter -> (F,)
    text_anchor: dict[str, Tensor] = field(init=False, default_factory=dict)  # adapter -> (D,)

    def owns(self, hook: str) -> list[str]:
        return [] if hook == "route" and self.router == "none" else super().owns(hook)

    def check(self, model: Model, stream: Stream) -> None:
        if self.router == "guide":
            check_guide(model, stream, self.name)

    def adapt(self, ctx: Context) -> Mix:
        like = next(reversed(self.adapter_of.values()), None) if self.init == "previous" else None
        self.adapter_of = own_adapter(ctx, self.adapter_of, "lora_per_task", like=like)
        return Mix({self.adapter_of[ctx.task.name]: 1.0})

    def end_task(self, ctx: Context) -> None:
        if self.router != "guide":
            return
        rows = take(len(ctx.task.train), self.anchor_samples, ctx.rng("lora_per_task-anchor"))
        image_F, text_D = mean_features(ctx, rows)
        name = self.adapter_of[ctx.task.name]
        self.image_anchor = {**self.image_anchor, name: image_F}
        self.text_anchor = {**self.text_anchor, name: text_D}

    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        if self.router == "oracle":
            name = self.adapter_of.get(ctx.task.name)
            return Mix({name: 1.0}) if name else Mix()
        if self.router == "last" or not self.image_anchor:
            return None
        names = list(self.image_anchor)
        score_BK = self._scores(ctx.model.guide(batch), names).to(ctx.model.device)
        if not self.temperature:
            return one_of([names[k] for k in score_BK.argmax(-1).tolist()], score_BK.device)
        w_BK = torch.softmax(score_BK / self.temperature, dim=-1)
        return Mix({n: w_BK[:, k] for k, n in enumerate(names)})

    def _scores(self, guide: Guide, names: list[str]) -> Tensor:
        device = guide.text_BD.device
        anchors = (self.image_anchor, self.text_anchor)
        image_KF, text_KD = (torch.stack([a[n] for n in names]).to(device) for a in anchors)
        return similarity(guide, image_KF, text_KD, self.image_weight, 1 - self.image_weight)
