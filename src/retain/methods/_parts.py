"""What several methods need and none owns: names of adapters, one mix out of a choice per sample."""

# B batch

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retain.adapters.bank import AdapterBank, Mix, Weight


def slug(text: str) -> str:
    """A text as an adapter name: letters, digits, '_' and '-' only."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "task"


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


def as_shadow(p: Tensor) -> Tensor:
    """An fp32 copy: averages live in fp32, since a 1 % step is below what bf16 resolves."""
    return p.detach().to(torch.float32, copy=True)
