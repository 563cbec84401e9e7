"""LoraHub: the weights of adapters are searched for without gradients, on the loss of a few examples.

Huang et al., "LoraHub", 2023 (arXiv 2307.13269): minimise loss(w) + l1 mean|w| over the box [-1.5, 1.5]^N.
The merged adapter is (sum w B)(sum w A) in their form (`space: factors`, the weight on both sides), or
sum w B A.

Differs: a seeded (1+1) evolution strategy with the one-fifth rule, where the release uses a search library's
portfolio; their constants (40 steps, l1 0.05) are from memory and unverified.
"""

# N adapters

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from retain.merge.base import KEEP, Keep, kept, same_modules, same_shape, where
from retain.merge.parts import Low, Part, join, split, total
from retain.types import RetainError, State

Loss = Callable[[dict[str, Tensor]], float]
"""A merged state to a number, the smaller the better."""


def lorahub(
    states: Sequence[State],
    weights: Sequence[float] | None = None,
    *,
    loss: Loss,
    steps: int = 40,
    l1: float = 0.05,
    box: float = 1.5,
    space: Literal["factors", "deltas"] = "factors",
    seed: int = 0,
    keep: Keep = "auto",
    rank: int = 0,
) -> tuple[dict[str, Tensor], list[float]]:
    """The best merged state that `steps` evaluations of `loss` find, and its weights.

    The search starts at `weights` (default: 0 for all, the base model). Raises RetainError for a loss that is
    never finite.
    """
    if steps < 1 or box <= 0 or l1 < 0 or keep not in KEEP:
        raise RetainError(
            f"lorahub: steps >= 1, box > 0, l1 >= 0 and keep in {list(KEEP)} are needed, "
            f"not {steps}, {box}, {l1}, {keep!r}"
        )
    all_parts = [split(s) for s in states]
    names = [f"adapter {i + 1}" for i in range(len(states))]
    same_modules(all_parts, names)
    modules = {path: [p[path] for p in all_parts] for path in all_parts[0]}
    for path, parts in modules.items():
        same_shape(parts, path, names)

    def merged(w: Sequence[float]) -> dict[str, Tensor]:
        out: dict[str, Part] = {}
        for path, parts in modules.items():
            with where(path):
                ranks = [p.rank for p in parts if isinstance(p, Low)]
                out[path] = kept(combined(parts, w, space), ranks, keep, rank)[0]
        return join(out)

    def value(w: Tensor) -> float:
        return loss(merged(w.tolist())) + l1 * float(w.abs().mean())

    start = torch.zeros(len(states)) if weights is None else torch.tensor([float(w) for w in weights])
    best, cost = minimise(value, start, steps, box, torch.Generator().manual_seed(seed))
    if cost == float("inf"):
        raise RetainError(f"lorahub: the loss was not finite at any of {steps} points")
    return merged(best.tolist()), best.tolist()


def combined(parts: Sequence[Part], w: Sequence[float], space: str) -> Part:
    """One module at given weights."""
    low = [p for p in parts if isinstance(p, Low)]
    if space == "deltas" or not low:
        return total(parts, w)
    if len(low) < len(parts) or len({p.rank for p in low}) > 1:
        raise RetainError("lorahub in space 'factors' needs low-rank adapters of equal rank; use 'deltas'")
    B, A = (sum((c * t for c, t in zip(w, ts)), 0 * ts[0]) for ts in ([p.B for p in low], [p.A for p in low]))
    return Low(B, A)


def minimise(
    f: Callable[[Tensor], float], start: Tensor, steps: int, box: float, rng: torch.Generator
) -> tuple[Tensor, float]:
    """A (1+1) evolution strategy in a box: a better point widens the step, a worse one narrows it."""
    best, width = start.clamp(-box, box), box / 3
    cost = _finite(f(best))
    for _ in range(steps - 1):
        trial = (best + width * torch.randn(len(best), generator=rng)).clamp(-box, box)
        new = _finite(f(trial))
        if new <= cost:
            best, cost, width = trial, new, min(width * 1.5, box)
        else:
            width *= 1.5**-0.25
    return best, cost


def _finite(x: float) -> float:
    return x if x == x and abs(x) != float("inf") else float("inf")
