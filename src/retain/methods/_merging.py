"""What the merging methods share: a bank's adapters as states of true changes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from retain.adapters.bank import AdapterBank
from retain.adapters.lora import LoraLinear
from retain.merge.base import Merged, merger
from retain.merge.parts import Part, chunks
from retain.methods._parts import trained_names
from retain.types import RetainError


def check_sites(bank: AdapterBank, who: str) -> None:
    """Merging knows low-rank and dense changes; other kinds of adapter are refused by name."""
    if bank.kind != "lora":
        raise RetainError(f"{who}: it merges LoRA adapters, not adapters of kind {bank.kind!r}")


def check_merger(name: str, params: Mapping[str, Any], at: str) -> None:
    """The merger's name and parameters, before anything is trained."""
    merger(name, f"{at}.merger: ").check(params, at=f"{at}.params: ")


def scale(bank: AdapterBank) -> float:
    """alpha / r of the bank's LoRA."""
    return next(s.spec.scale for s in bank.sites.values() if isinstance(s, LoraLinear))


def changes(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """An adapter with the scale in B, so that B A is the change of the weight."""
    s = scale(bank)
    return {k: t.float() * s if k.endswith(".lora_B") else t.float() for k, t in bank.state(name).items()}


def load_changes(bank: AdapterBank, name: str, state: Mapping[str, Tensor]) -> None:
    """The inverse of `changes`."""
    s = scale(bank)
    bank.load(name, {k: t / s if k.endswith(".lora_B") else t for k, t in state.items()})


def rank(bank: AdapterBank) -> int:
    """The one rank of the bank's LoRA."""
    return next(site.spec.rank for site in bank.sites.values() if isinstance(site, LoraLinear))


def seeded(name: str, params: Mapping[str, Any], rng: Generator) -> dict[str, Any]:
    """Parameters with a seed from the run's own randomness, where the merger draws and the recipe names none."""
    if "seed" not in merger(name).params or "seed" in params:
        return dict(params)
    return {**params, "seed": int(torch.randint(1 << 30, (), generator=rng))}


def store(bank: AdapterBank, prefix: str, parts: Mapping[str, Part], rng: Generator) -> list[str]:
    """Parts of any rank as adapters `prefix-1`, `prefix-2`, … of the bank's rank; older ones of that prefix go."""
    pieces = chunks(parts, rank(bank))
    names = [f"{prefix}-{i + 1}" for i in range(len(pieces))]
    for old in [n for n in bank.names if n.startswith(f"{prefix}-")]:
        bank.remove(old)
    for name, piece in zip(names, pieces):
        bank.add(name, rng, paths={key.rpartition(".")[0] for key in piece})
        load_changes(bank, name, piece)
    return names


def load_merged(bank: AdapterBank, name: str, merged: Merged) -> None:
    """A merge of at most the bank's rank into one adapter."""
    (piece,) = chunks(merged.parts, rank(bank))
    load_changes(bank, name, piece)


def told(merged: Merged) -> dict[str, Any]:
    """What the events of a run say of a merge."""
    errors = list(merged.errors.values()) or [0.0]
    return {"modules": len(merged.parts), "mean_error": sum(errors) / len(errors), "max_error": merged.error}


def learned(bank: AdapterBank) -> dict[str, dict[str, Tensor]]:
    """The changes of the adapters that train and are not new: a new one's B is zero."""
    states = {name: changes(bank, name) for name in trained_names(bank)}
    return {
        n: s for n, s in states.items() if any(t.any() for k, t in s.items() if not k.endswith(".lora_A"))
    }
