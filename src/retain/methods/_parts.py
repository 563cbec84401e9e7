"""What several methods need and none owns: names of adapters, features of tasks, one mix out of a choice per
sample.
"""

# B batch, F image features, D text features, K tasks

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from retain.adapters.bank import AdapterBank, Mix, Weight
from retain.method import Context
from retain.models.base import Model
from retain.stream import Stream
from retain.types import Batch, Examples, Guide, RetainError


def slug(text: str) -> str:
    """A text as an adapter name: letters, digits, '_' and '-' only."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "task"


def own_adapter(
    ctx: Context, adapter_of: Mapping[str, str], who: str, *, like: str | None = None
) -> dict[str, str]:
    """Adapters by task with one for the task at hand among them, new (or a copy of `like`) if need be; it alone trains."""
    bank, task, names = ctx.model.adapters, ctx.task.name, dict(adapter_of)
    if task not in names:
        names[task] = f"{len(names) + 1:02d}-{slug(task)}"
        bank.add(names[task], ctx.rng(who), like=like)
    bank.train_only(names[task])
    return names


def trained_names(bank: AdapterBank) -> list[str]:
    """The adapters that train now, in the bank's order."""
    return list(dict.fromkeys(key.split("/", 1)[0] for key in bank.trainable()))


def one_of(choice_B: Sequence[str], device: torch.device) -> Mix:
    """Each sample uses the adapter it chose. A batch of one kind costs one adapter."""
    names = sorted(set(choice_B))
    if len(names) == 1:
        return Mix({names[0]: 1.0})
    return Mix({n: torch.tensor([float(c == n) for c in choice_B], device=device) for n in names})


def renamed(mix: Mix, name_of: Callable[[str], str]) -> Mix:
    """The same mix with other adapters in the places of some."""

    def turn(weights: dict[str, Weight]) -> dict[str, Weight]:
        return {name_of(n): w for n, w in weights.items()}

    return Mix(turn(dict(mix.weights)), {i: turn(dict(w)) for i, w in mix.by_layer.items()})


def take(n_of: int, n: int, rng: torch.Generator) -> list[int]:
    """`n` different rows out of `n_of` in random order, or all of them where there are fewer."""
    return torch.randperm(n_of, generator=rng)[:n].tolist()


def micro_batches(ctx: Context, examples: Examples, rows: Sequence[int]) -> list[tuple[Batch, float]]:
    """One batch of answers as the micro-batches that training takes, each with its share of the answer tokens.

    The sum of share times loss, and of its gradient, is that of the whole batch.
    """
    size = ctx.micro_size or len(rows)
    batches = [
        ctx.model.collate([examples[r] for r in rows[i : i + size]], answers=True, turns=ctx.turns)
        for i in range(0, len(rows), size)
    ]
    n_answer = sum(b.n_answer for b in batches)
    return [(b, b.n_answer / n_answer) for b in batches]


def as_shadow(p: Tensor) -> Tensor:
    """An fp32 copy: averages live in fp32, since a 1 % step is below what bf16 resolves."""
    return p.detach().to(torch.float32, copy=True)


# -- routing by frozen features ------------------------------------------------------------------------------


def similarity(
    guide: Guide, image_KF: Tensor, text_KD: Tensor, image_weight: float, text_weight: float
) -> Tensor:
    """Weighted sum of the cosines of every sample with every task's anchors: (B, K). Row by row."""
    image_BK = (guide.image_BF[:, None] * F.normalize(image_KF, dim=-1)).sum(-1)
    text_BK = (guide.text_BD[:, None] * F.normalize(text_KD, dim=-1)).sum(-1)
    return image_weight * image_BK + text_weight * text_BK


@torch.no_grad()
def mean_features(ctx: Context, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean image (F,) and text (D,) features of rows of the task's training set.

    Sums in fp32 over batches and a division at the end: it starts from nothing and never stops moving, whatever
    the batch size and the number of rows (a bf16 counter ends at 8,192).
    """
    image, text, size = [], [], ctx.micro_size or ctx.batch_size
    for i in range(0, len(rows), size):
        examples = [ctx.task.train[r] for r in rows[i : i + size]]
        guide = ctx.model.guide(ctx.model.collate(examples, answers=False))
        image.append(guide.image_BF.float().sum(0))
        text.append(guide.text_BD.float().sum(0))
    return torch.stack(image).sum(0) / len(rows), torch.stack(text).sum(0) / len(rows)


def check_guide(model: Model, stream: Stream, who: str) -> None:
    """Raise RetainError if the model gives no features of this stream's samples to route by."""
    for task in stream:
        for example in task.train[:1]:
            try:
                model.guide(model.collate([example], answers=False))
            except RetainError as error:
                raise RetainError(f"{who}: it routes by frozen features, and {error}") from None


def check_language_only(bank: AdapterBank, who: str) -> None:
    """Raise RetainError if there is LoRA outside the language model's layers, which a mix by layer cannot name."""
    outside = [path for path, site in bank.sites.items() if site.group == "lora" and site.layer is None]
    if outside:
        raise RetainError(
            f"{who}: adapter.targets puts LoRA on {outside[0]!r}, outside the language model's layers; "
            "use targets: language"
        )


def carry_projector(bank: AdapterBank, old: str, new: str) -> None:
    """The projector of one adapter into another: it is trained through the whole stream."""
    trained = {k: t for k, t in bank.state(old).items() if bank.group(k) == "projector"}
    bank.load(new, {**bank.state(new), **trained})
