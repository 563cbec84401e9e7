"""What merging methods are made of: what is pruned, how signs are resolved, in which space.

A family of methods is a choice on each axis (`mergers.py`); nothing here knows a method's name.

    prune    largest(density) | above(border) | random(density) | by_rank(density, window)
    signs    sum | total | frequency      the elected sign is that of the sum of entries, or of their signs
    space    deltas | factors | knots     dense changes, A and B each on its own, coordinates in a shared basis
"""

# N adapters, O out features, I in features, K summed rank

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from retain.merge.parts import Low, Part, dense
from retain.types import RetainError, digest

Signs = Literal["sum", "total", "frequency"]
Space = Literal["deltas", "factors", "knots"]
Trim = Literal["module", "model"]
Prune = Callable[[Tensor, int], Tensor]
"""A tensor and the number of its adapter to the pruned tensor; may write into its argument."""


# -- prune -----------------------------------------------------------------------------------------------


def nth_smallest(values: Tensor, n: int) -> Tensor:
    """The n-th smallest entry (from 0) of a tensor, as (). Partial sorting, no indices kept."""
    flat = values.reshape(-1)
    if flat.device.type != "cpu":
        return flat.kthvalue(n + 1).values
    return torch.tensor(np.partition(flat.numpy(), n)[n], dtype=values.dtype)


def largest(t: Tensor, density: float) -> Tensor:
    """Zero all but the int(density * numel) largest entries by magnitude; equal ones at the border all stay."""
    keep = int(density * t.numel())
    if keep >= t.numel():
        return t
    if keep == 0:
        return torch.zeros_like(t)
    size = t.abs()
    return t.masked_fill(size < nth_smallest(size, t.numel() - keep), 0.0)


def above(t: Tensor, border: float) -> Tensor:
    """Zero all entries smaller than a border."""
    return t.masked_fill(t.abs() < border, 0.0)


BIN = 15  # bits of a float that a first look leaves out: bins of 2^-8 of their magnitude
BINS = 1 << (31 - BIN)


def borders_of(modules: Callable[[], Iterable[Sequence[Tensor]]], density: float) -> list[float]:
    """For each adapter the int(density * numel)-th largest magnitude of all modules together; inf for none.

    Modules are read twice, one at a time: entries are counted by magnitude, then those of the border's bin are sorted.
    """
    counts: list[Tensor] = []
    for taus in modules():
        counts = counts or [torch.zeros(BINS, dtype=torch.long) for _ in taus]
        for count, t in zip(counts, taus, strict=True):
            count += torch.bincount(_bin(t), minlength=BINS).cpu()
    keeps = [int(density * int(count.sum())) for count in counts]
    larger = [count.flip(0).cumsum(0).flip(0) for count in counts]  # entries in this bin or a larger one
    at = [int((more >= keep).nonzero().max()) for more, keep in zip(larger, keeps, strict=True)]
    inside: list[list[Tensor]] = [[] for _ in counts]
    for taus in modules():
        for found, t, bin_ in zip(inside, taus, at, strict=True):
            found.append(t.float().abs().flatten()[_bin(t) == bin_])
    out = []
    for more, keep, bin_, found in zip(larger, keeps, at, inside, strict=True):
        within = keep - int(more[bin_ + 1]) if bin_ + 1 < BINS else keep
        out.append(float(torch.cat(found).sort(descending=True).values[within - 1]) if keep else math.inf)
    return out


def _bin(t: Tensor) -> Tensor:
    return t.float().abs().flatten().view(torch.int32) >> BIN


def random(t: Tensor, density: float, rng: Generator) -> Tensor:
    """Keep each entry with probability `density` and divide it by that."""
    if density >= 1:
        return t
    if density <= 0:
        return torch.zeros_like(t)
    keep = torch.rand(t.shape, generator=rng).to(t.device) < density
    return t.mul_(keep).div_(density)


def by_rank(t: Tensor, density: float, window: float, rng: Generator) -> Tensor:
    """Larger entries of a row are likelier to stay: p = density - e + 2 e rank, divide by p.

    rank runs from 0 (smallest of the row) to 1, e = window / 2, less near the borders 0 and 1, so that the
    mean of p stays the density.
    """
    if density <= 0:
        return torch.zeros_like(t)
    e = min(window / 2, density, 1 - density)
    n = t.shape[-1]
    order = t.abs().argsort(dim=-1).argsort(dim=-1).to(t.dtype)
    p = (order / max(n - 1, 1)).mul_(2 * e).add_(density - e) if n > 1 else torch.full_like(t, density)
    keep = torch.rand(t.shape, generator=rng).to(t.device) < p
    return torch.where(keep, t / p.clamp(min=1e-12), 0.0)


def generators(parts: Sequence[Part], seed: int) -> list[Generator]:
    """One generator per adapter, from the seed and the adapter's own numbers.

    So the draw does not depend on the order of adapters, differs from module to module, and belongs to the
    seed alone. Equal adapters still get different draws.
    """
    seen: Counter[str] = Counter()
    out = []
    for part in parts:
        key = digest([part.B, part.A] if isinstance(part, Low) else part)
        seen[key] += 1
        number = int(digest([seed, key, seen[key]]), 16) >> 1
        out.append(torch.Generator().manual_seed(number))
    return out


# -- signs -----------------------------------------------------------------------------------------------


def blend(taus: list[Tensor], weights: Sequence[float], prune: Prune, signs: Signs) -> Tensor:
    """Prune, weigh, resolve signs. Writes into `taus`, so that N tensors and a few more are all it holds.

    Election (TIES, Yadav et al. 2023): per entry the sign of the weighted sum ("total") or of the sum of
    signs ("frequency"); the mean over the adapters that agree and are not zero. A weight of 0 has no vote.
    """
    for n, w in enumerate(weights):
        taus[n] = prune(taus[n], n)
        if w != 1:
            taus[n] = taus[n].mul_(w)
    if signs == "sum":
        out = taus[0].clone()
        for t in taus[1:]:
            out += t
        return out
    votes = taus[0].clone() if signs == "total" else taus[0].sign()
    for t in taus[1:]:
        votes += t if signs == "total" else t.sign()
    up = votes >= 0
    del votes
    out, count = torch.zeros_like(taus[0]), torch.zeros_like(taus[0])
    for t in taus:
        agrees = torch.where(up, t > 0, t < 0)
        count += agrees
        out += t * agrees
    return out.div_(count.clamp_(min=1))


# -- space -----------------------------------------------------------------------------------------------


def taus_in(parts: Sequence[Part], space: Space) -> list[Tensor]:
    """What an entry-wise rule sees of a module in a space that has one tensor per adapter (`deltas`, `knots`)."""
    if space == "knots" and all(len(p.shape) == 2 for p in parts):
        return shared_basis(parts)[1]
    return [dense(p) for p in parts]


def in_space(
    parts: Sequence[Part],
    weights: Sequence[float],
    space: Space,
    rule: Callable[[list[Tensor], Sequence[float]], Tensor],
) -> Part:
    """Apply an entry-wise rule in a space. Dense changes and vectors have one space: themselves."""
    low = [p for p in parts if isinstance(p, Low)]
    if space == "factors" and low:
        ranks = {p.rank for p in low}
        if len(low) < len(parts):
            raise RetainError(
                "space 'factors' needs low-rank adapters, but one is a dense change; use 'deltas'"
            )
        if len(ranks) > 1:
            raise RetainError(f"space 'factors' needs equal ranks, not {sorted(ranks)}; use 'deltas'")
        root = [math.sqrt(abs(w)) for w in weights]
        A = rule([p.A.clone() for p in low], [math.copysign(r, w) for r, w in zip(root, weights)])
        return Low(rule([p.B.clone() for p in low], root), A)
    if space == "knots" and len({len(p.shape) for p in parts} - {2}) == 0:
        U, coordinates = shared_basis(parts)
        return Low(U, rule(coordinates, weights))
    return rule([dense(p) for p in parts], weights)


def shared_basis(parts: Sequence[Part], drop: float = 1e-6) -> tuple[Tensor, list[Tensor]]:
    """KnOTS (Stoica et al. 2024, arXiv 2410.19735): [dW_1 … dW_N] = U S V^T; U (O, k) and C_n = S V_n^T (k, I).

    With low-rank parts only K x K matrices are decomposed (fp64): C_n = U^T dW_n. Directions below `drop`
    times the largest singular value are left out (the release: below 1e-5 in absolute terms).
    """
    low = [p for p in parts if isinstance(p, Low)]
    if len(low) == len(parts):
        Q, R = torch.linalg.qr(torch.cat([p.B for p in low], 1).double())
        cores = [r @ p.A.double() for r, p in zip(R.split([p.rank for p in low], 1), low)]
    else:
        cores = [dense(p).double() for p in parts]
        Q = torch.eye(cores[0].shape[0], dtype=torch.float64, device=cores[0].device)
    values, V = torch.linalg.eigh(sum((C @ C.T for C in cores[1:]), cores[0] @ cores[0].T))
    chosen = values > max(float(values[-1]), 0.0) * drop**2
    V = V[:, chosen].flip(1)
    if V.shape[1] == 0:  # every change is zero
        V = torch.eye(Q.shape[1], 1, dtype=torch.float64, device=Q.device)
    kind = (low[0].B if low else parts[0]).dtype  # type: ignore[union-attr]
    return (Q @ V).to(kind), [(V.T @ C).to(kind) for C in cores]
