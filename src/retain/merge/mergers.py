"""The rules of the mergers, from averages to CoPA: one module of all adapters in, the merged module out.

merged = ties([state_a, state_b], density=0.2)          `base.py` makes a function of whole states of each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from retain.merge.axes import (
    Prune,
    Signs,
    Space,
    Trim,
    above,
    blend,
    by_rank,
    generators,
    in_space,
    largest,
    nth_smallest,
    random,
)
from retain.merge.base import register_merger
from retain.merge.parts import Low, Part, dense, inner, scaled, total
from retain.types import RetainError
from retain.values import Seed, Share

# -- sums ------------------------------------------------------------------------------------------------


@register_merger("the weighted mean of the changes", "arXiv:2203.05482", normalised=True)
def average(parts: Sequence[Part], weights: Sequence[float]) -> Part:
    """sum_n w_n dW_n / sum_n w_n (Wortsman et al. 2022): exact, not the mean of the factors."""
    return total(parts, weights)


@register_merger("a weighted sum of the changes", "arXiv:2212.04089")
def task_arithmetic(
    parts: Sequence[Part], weights: Sequence[float], *, lam: float = 1.0, space: Space = "deltas"
) -> Part:
    """lam sum_n w_n dW_n (Ilharco et al. 2023). In `factors`: (sum B)(sum A), with cross terms, as PEFT `linear`."""
    if space == "deltas":
        return total(parts, [lam * w for w in weights])
    return scaled(in_space(parts, weights, space, lambda t, w: blend(t, w, _whole, "sum")), lam)


@register_merger("a weighted sum, truncated to the largest rank", "arXiv:2212.04089", keep="svd")
def svd(parts: Sequence[Part], weights: Sequence[float], *, lam: float = 1.0) -> Part:
    """Task arithmetic, kept as the best adapter of one rank (Eckart and Young), as PEFT `svd`."""
    return total(parts, [lam * w for w in weights])


@register_merger("the great circle between two", "Shoemake, SIGGRAPH 1985", exactly=2)
def slerp(parts: Sequence[Part], weights: Sequence[float], *, parallel: Share = 0.9995) -> Part:
    """sin((1-t) w)/sin(w) dW_1 + sin(t w)/sin(w) dW_2, cos(w) = <dW_1, dW_2> / |dW_1||dW_2|, per module.

    t is the second adapter's share of the weights. Above `parallel` in cosine (or with a zero change) it is
    the straight line.
    """
    share = weights[1] / (weights[0] + weights[1]) if weights[0] + weights[1] else 0.5
    norms = math.sqrt(inner(parts[0], parts[0]) * inner(parts[1], parts[1]))
    cosine = max(-1.0, min(1.0, inner(parts[0], parts[1]) / norms)) if norms else 1.0
    if abs(cosine) > parallel:
        return total(parts, [1 - share, share])
    angle = math.acos(cosine)
    return total(
        parts, [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]
    )


@register_merger("old and new in turn, each new one with a fixed share", "arXiv:2312.08977", in_order=True)
def coma(parts: Sequence[Part], weights: Sequence[float], *, new: Share = 0.4) -> Part:
    """avg_t = (1 - new) avg_{t-1} + new dW_t, in the order given (CoMA, Marouf et al. 2024)."""
    shares = [1.0]
    for _ in parts[1:]:
        shares = [s * (1 - new) for s in shares] + [new]
    return total(parts, [s * w for s, w in zip(shares, weights)])


# -- prune x signs x space -------------------------------------------------------------------------------


def _whole(t: Tensor, n: int) -> Tensor:
    return t


def _trimmed(density: float, trim: str, borders: Sequence[float] | None) -> Prune:
    """The largest entries of a module, or those above a border that holds for all modules."""
    if trim == "module":
        return lambda t, n: largest(t, density)
    if borders is None:
        raise RetainError(
            "trim: 'model' needs all modules at once: call the merger with states, not one part"
        )
    known = borders
    return lambda t, n: above(t, known[n])


def _pruned(
    parts: Sequence[Part], weights: Sequence[float], space: Space, prune: Prune, signs: Signs, lam: float
) -> Part:
    return scaled(in_space(parts, weights, space, lambda taus, w: blend(taus, w, prune, signs)), lam)


@register_merger("the largest entries of each, summed", "arXiv:2306.01708")
def magnitude_prune(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.2,
    lam: float = 1.0,
    space: Space = "deltas",
    trim: Trim = "module",
    borders: Sequence[float] | None = None,
) -> Part:
    """lam sum_n w_n top(dW_n): the int(density * numel) largest entries of every module, or of the model (`trim`)."""
    return _pruned(parts, weights, space, _trimmed(density, trim, borders), "sum", lam)


@register_merger("the largest entries, one sign per entry, mean of those that agree", "arXiv:2306.01708")
def ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.2,
    lam: float = 1.0,
    signs: Literal["total", "frequency"] = "total",
    space: Space = "deltas",
    trim: Trim = "module",
    borders: Sequence[float] | None = None,
) -> Part:
    """Trim, elect, disjoint mean (Yadav et al., NeurIPS 2023).

    The paper keeps the largest entries of the whole model (`trim: model`), PEFT and mergekit those of every module
    (the default). `borders` are found by the merger.

    PEFT elects before it weighs; here an adapter's weight counts in the election, and 0 is no vote. With
    equal positive weights both are the same.
    """
    return _pruned(parts, weights, space, _trimmed(density, trim, borders), signs, lam)


def _dare(
    parts: Sequence[Part],
    weights: Sequence[float],
    density: float,
    lam: float,
    seed: int,
    space: Space,
    signs: Signs,
) -> Part:
    rngs = generators(parts, seed)
    return _pruned(parts, weights, space, lambda t, n: random(t, density, rngs[n]), signs, lam)


@register_merger("random entries, rescaled, summed", "arXiv:2311.03099")
def dare(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.2,
    lam: float = 1.0,
    seed: Seed = 0,
    space: Space = "deltas",
) -> Part:
    """lam sum_n w_n m_n dW_n / density, m_n ~ Bernoulli(density) (Yu et al., ICML 2024); density = 1 - p."""
    return _dare(parts, weights, density, lam, seed, space, "sum")


@register_merger("random entries, rescaled, one sign per entry", "arXiv:2311.03099")
def dare_ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.2,
    lam: float = 1.0,
    signs: Literal["total", "frequency"] = "total",
    seed: Seed = 0,
    space: Space = "deltas",
) -> Part:
    """DARE's pruning, TIES' election and disjoint mean."""
    return _dare(parts, weights, density, lam, seed, space, signs)


@register_merger("entries drawn by rank, rescaled, one sign per entry", "arXiv:2406.11617")
def della(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.7,
    window: Share = 0.14,
    lam: float = 1.1,
    signs: Signs = "total",
    seed: Seed = 0,
    space: Space = "deltas",
) -> Part:
    """DELLA (Deep et al. 2024): in each row larger entries are likelier to stay; then TIES (`signs: sum` for none).

    Defaults are the authors' README's: drop 0.3, window 0.14, lam 1.1. Near density 0 and 1 the window
    narrows, where the released code stops with an error.
    """
    rngs = generators(parts, seed)
    return _pruned(parts, weights, space, lambda t, n: by_rank(t, density, window, rngs[n]), signs, lam)


@register_merger("TIES on coordinates in a basis that all share", "arXiv:2410.19735", space="knots")
def knots_ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.2,
    lam: float = 0.6,
    signs: Literal["total", "frequency"] = "total",
    trim: Trim = "module",
    borders: Sequence[float] | None = None,
) -> Part:
    """KnOTS (Stoica et al., ICLR 2025) with TIES, defaults of the release's configs. The result has rank N r.

    The release trims over all layers at once (`trim: model`); the default is per module.
    """
    return _pruned(parts, weights, "knots", _trimmed(density, trim, borders), signs, lam)


@register_merger("DARE-TIES on coordinates in a basis that all share", "arXiv:2410.19735")
def knots_dare_ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.9,
    lam: float = 0.7,
    signs: Literal["total", "frequency"] = "total",
    seed: Seed = 0,
) -> Part:
    """KnOTS with DARE-TIES, defaults of the release's configs (p = 0.1, nothing trimmed)."""
    return _dare(parts, weights, density, lam, seed, "knots", signs)


# -- competition of parameters ---------------------------------------------------------------------------


def _unit(t: Tensor) -> Tensor:
    """Min-max to [0, 1]; a constant becomes 0."""
    low, high = t.min(), t.max()
    return (t - low) / (high - low) if high > low else torch.zeros_like(t)


@register_merger("entries weigh by their size and their agreement", "arXiv:2410.02396")
def pcb(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    ratio: Share = 0.1,
    lam: float = 1.2,
    clip: Annotated[float, Field(ge=0, le=0.5)] = 1e-4,
    space: Space = "deltas",
) -> Part:
    """PCB-Merging (Du et al., NeurIPS 2024), as released:

        c_n   = tau_n with |tau_n| clipped to its [clip, 1 - clip] quantiles
        intra = exp(N unit(|c_n|)^2),  inter = tanh(tau_n sum_m tau_m)
        s_n   = unit(intra inter, floored at its (1 - ratio) quantile)
        tau   = lam sum_n w_n s_n c_n / sum_n s_n

    Clipped vectors are summed and sized up, agreement is asked of those that are not; the upper quantile is the
    release's, one entry lower than the lower one's mirror. Differs: per module, the release flattens the whole
    model; a constant vector has unit 0, where the release divides 0 by 0. The paper writes softmax instead (not
    verified). tanh makes it depend on the scale of the changes.
    """

    def balance(taus: list[Tensor], w: Sequence[float]) -> Tensor:
        together = sum(taus[1:], taus[0].clone())
        top, below = torch.zeros_like(together), torch.zeros_like(together)
        for tau, weight in zip(taus, w):
            clipped = _clipped(tau, clip)
            s = _competition(clipped.abs(), tau * together, len(taus), ratio)
            top.addcmul_(clipped, s, value=weight)
            below += s
        return top.div_(below.clamp_(min=1e-12))

    return scaled(in_space(parts, weights, space, balance), lam)


def _clipped(tau: Tensor, clip: float) -> Tensor:
    """The sizes of entries clipped to their quantiles, signs kept."""
    size, n = tau.abs(), tau.numel()
    low, high = (nth_smallest(size, max(0, int(i))) for i in (clip * n, (1 - clip) * n - 1))
    return size.clamp_(low, high).mul_(tau.sign())


def _competition(size: Tensor, agreement: Tensor, N: int, ratio: float) -> Tensor:
    n = size.numel()
    s = _unit(size).square_().mul_(N).exp_().mul_(agreement.tanh_())
    return _unit(s.clamp_(min=nth_smallest(s, min(n - 1, int((1 - ratio) * n)))))


# -- CoPA ------------------------------------------------------------------------------------------------


@register_merger("pruned factors, tail directions raised, normalised across adapters", "arXiv:2502.17159")
def copa(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: Share = 0.2,
    lam: float = 2.0,
    form: Literal["sum", "product"] = "sum",
    floor: Share = 0.0,
    scale: bool = True,
    normalise: bool = True,
) -> Part:
    """CoPA-Merging = DIR-Merging = RobustMerge (Zeng et al., NeurIPS 2025), per module and rank slot i:

        A~, B~ = top(A, density), top(B, density)              entry by entry, over each whole matrix
        S_i    = sum_j |A_ij| / sum_j |A~_ij|                  from A alone, applied to B's columns
        S~_i^n = S_i^n / sum_m S_i^m
        sum       dW = lam sum_n w_n B~_n diag(S~^n) A~_n                        (eq. 5 and algorithm 1; exact)
        product   B = lam sum_n w_n B~_n diag(S~^n),  A = lam sum_n A~_n         (as released: cross terms, lam twice)

    `floor: 0.8` lifts every S to its adapter's own 80th percentile, as released and not in the paper. A row
    of A that was pruned whole has S = 0, where the formula divides by zero. Slots that a smaller adapter
    lacks have S = 0 too. Dense changes (projector, biases) are averaged, as released. Without `scale` S is 1,
    without `normalise` S~ is S (the paper's ablation). The release keeps one entry more of each matrix.
    """
    low = [p for p in parts if isinstance(p, Low)]
    if len(low) < len(parts):
        if low:
            raise RetainError("copa needs factors, but one adapter has a dense change here (DoRA?)")
        if not sum(weights):
            raise RetainError(f"copa averages dense changes: the weights {list(weights)} may not sum to 0")
        return total(parts, [w / sum(weights) for w in weights])
    R = max(p.rank for p in low)
    A = [_grown(largest(p.A, density), R, 0) for p in low]
    B = [_grown(largest(p.B, density), R, 1) for p in low]
    S = [_grown(mass_ratio(p.A, a[: p.rank], floor, scale), R, 0) for p, a in zip(low, A)]
    if normalise:
        whole = sum(S[1:], S[0].clone())
        S = [torch.where(whole > 0, s / whole.clamp(min=1e-30), 0.0) for s in S]
    B = [b * s for b, s in zip(B, S)]
    if form == "sum":
        return scaled(total([Low(b, a) for b, a in zip(B, A)], weights), lam)
    return Low(
        lam * sum((w * b for w, b in zip(weights[1:], B[1:])), weights[0] * B[0]), lam * sum(A[1:], A[0])
    )


def mass_ratio(A: Tensor, pruned: Tensor, floor: float = 0.0, scale: bool = True) -> Tensor:
    """S (R,): a row's absolute sum before and after pruning; 0 where nothing is left."""
    left = pruned.abs().sum(1)
    S = A.abs().sum(1) / left.clamp(min=1e-30) if scale else torch.ones_like(left)
    alive = left > 0
    if floor and alive.any():
        n = int(alive.sum())
        S = S.clamp(min=nth_smallest(S[alive], min(n - 1, int(floor * n))))
    return torch.where(alive, S, 0.0)


def _grown(t: Tensor, n: int, dim: int) -> Tensor:
    lack = n - t.shape[dim]
    if not lack:
        return t
    size = list(t.shape)
    size[dim] = lack
    return torch.cat([t, t.new_zeros(size)], dim)


# -- Fisher ----------------------------------------------------------------------------------------------


@register_merger(
    "entries weigh by their Fisher information", "arXiv:2111.09832", normalised=True, per_module=("fishers",)
)
def fisher(
    parts: Sequence[Part], weights: Sequence[float], *, fishers: Sequence[Part] = (), lam: float = 1.0
) -> Part:
    """lam sum_n w_n F_n theta_n / sum_n w_n F_n (Matena and Raffel 2022; CoFiMA, Marouf et al. 2024).

    `fishers` are states like the adapters', one each: of the factors (then A and B are averaged on their own)
    or, as `path.weight`, of the dense change. Where every F is 0 it is the mean by weights.
    """
    if len(fishers) != len(parts):
        raise RetainError(f"fisher: {len(fishers)} Fishers for {len(parts)} adapters")
    if all(isinstance(x, Low) for x in (*parts, *fishers)):
        A = _precise([p.A for p in parts], weights, [f.A for f in fishers])  # type: ignore[union-attr]
        return Low(_precise([p.B for p in parts], weights, [f.B for f in fishers]) * lam, A)  # type: ignore[union-attr]
    for n, f in enumerate(fishers, 1):
        if isinstance(f, Low):  # the product of two factors' Fishers is no Fisher of their product
            raise RetainError(
                f"fisher: the Fisher of adapter {n} is of factors, but a change or another Fisher here is dense; "
                "give all of them for the dense change, as path.weight"
            )
    return scaled(_precise([dense(p) for p in parts], weights, [dense(f) for f in fishers]), lam)


def _precise(thetas: Sequence[Tensor], weights: Sequence[float], F: Sequence[Tensor]) -> Tensor:
    for what, ts in (("change", thetas), ("Fisher", F)):
        for n, t in enumerate(ts, 1):
            if t.shape != thetas[0].shape:
                raise RetainError(
                    f"fisher: the {what} of adapter {n} is {tuple(t.shape)}, the first change {tuple(thetas[0].shape)}; "
                    "factors must have one rank (or give Fishers of the dense change, as path.weight)"
                )
            if not torch.isfinite(t).all():
                raise RetainError(f"fisher: the {what} of adapter {n} holds values that are not finite")
    top, below, plain = (torch.zeros_like(thetas[0]) for _ in range(3))
    for theta, w, f in zip(thetas, weights, F):
        top += w * f * theta
        below += w * f
        plain += w * theta
    return torch.where(below > 0, top / below.clamp(min=1e-30), plain)
