"""What a server makes of its clients' tensors: pure functions, one tensor of K clients in, one out.

    average        sum_k w_k x_k / sum_k w_k                                 McMahan et al. 2017, arXiv 1602.05629
    median         of every entry                                            Yin et al. 2018, arXiv 1803.01498
    trimmed_mean   of every entry, without the b K largest and smallest      the same
    krum           the client whose K - f - 2 nearest are nearest            Blanchard et al. 2017, arXiv 1703.02757
    clip_factor    min(1, C / |x_k - x|), and `gaussian` noise               McMahan et al. 2018, arXiv 1710.06963
    momentum       m <- b m + D,  x <- x + s m                               Hsu et al. 2019, arXiv 1909.06335
    adaptive       x <- x + s m / (sqrt(v) + tau): Adam, Yogi, Adagrad       Reddi et al. 2021, arXiv 2003.00295
    control        c_k <- c_k - c + (x - y_k) / sum of learning rates        Karimireddy et al. 2020, arXiv 1910.06378
    product_mean   the mean of the products B_k A_k as factors of rank r     Eckart and Young 1936

D is the pseudo-gradient, mean - x. Sums are made in fp64, results have the type of what came in. Inputs are finite:
who sends anything else is left out before (`retain.federated.admit`). Nothing here depends on the order of the clients
beyond rounding in fp64; `krum` breaks ties by it, so a server puts them in the order of their names.
"""

# K clients, O out features, I in features, R rank

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from retain.merge.parts import Low, inner, svd, total
from retain.types import RetainError

# -- one value per entry ---------------------------------------------------------------------------------


def average(new: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k w_k x_k / sum_k w_k. `new` may be a generator: one tensor at a time is in memory beside the sum."""
    whole, out, like = math.fsum(weights), None, None
    if not whole > 0 or min(weights) < 0:
        raise RetainError(
            f"the clients' weights {list(weights)} must not be negative, and their sum must be positive"
        )
    for x, w in zip(new, weights, strict=True):
        like = x
        out = x.double() * (w / whole) if out is None else out.add_(x.double(), alpha=w / whole)
    assert out is not None and like is not None  # the weights' sum is positive
    return out.to(like.dtype)


def median(new: Sequence[Tensor]) -> Tensor:
    """The median of every entry; of an even number the mean of the two in the middle (`torch.median` takes the lower)."""
    return _middle(new, (len(new) - 1) // 2)


def trimmed_mean(new: Sequence[Tensor], share: float) -> Tensor:
    """The mean of every entry without the `trimmed(K, share)` largest and as many smallest."""
    return _middle(new, trimmed(len(new), share))


def trimmed(n: int, share: float) -> int:
    """How many of n values are left out at each end: floor(share n), 29 of 100 at 0.29, where 0.29 * 100 is below 29."""
    if not 0 <= share < 0.5:
        raise RetainError(
            f"a trimmed mean leaves out a share of at least 0 and below 0.5 at each end, not {share}"
        )
    return min(math.floor(share * n + 1e-9), (n - 1) // 2)


def _middle(new: Sequence[Tensor], cut: int) -> Tensor:
    """The mean of every entry without `cut` values at each end."""
    kept = torch.stack(list(new)).sort(0).values[cut : len(new) - cut]
    return kept.double().mean(0).to(kept.dtype)


# -- one client of many ----------------------------------------------------------------------------------


def add_gram(gram_KK: Tensor, new: Sequence[Tensor], old: Tensor) -> Tensor:
    """The inner products of all updates x_k - x over the tensors so far, with one more tensor (or rows of one).

    Start with `torch.zeros(K, K, dtype=torch.float64)`. Updates and not weights are multiplied: they are small, so
    that their distances are not lost in the weights' own length.
    """
    moved = torch.stack([(x.double() - old.double()).flatten() for x in new])
    return gram_KK + moved @ moved.T


def norms(gram_KK: Tensor) -> list[float]:
    """|x_k - x| of every client over all tensors."""
    out: list[float] = gram_KK.diagonal().clamp_min(0).sqrt().tolist()
    return out


def distances(gram_KK: Tensor) -> Tensor:
    """|x_i - x_j|^2 (K, K) from the inner products, symmetric to the bit, 0 where rounding would make it negative."""
    square_K = gram_KK.diagonal()
    out = (square_K[:, None] + square_K[None, :] - (gram_KK + gram_KK.T)).clamp_min(0)
    return out.fill_diagonal_(0)


def tolerates(n: int, byzantine: int) -> int:
    """How many wrong clients of n `krum` can bear, at most `byzantine`: the proof needs 2 f + 2 < n."""
    return max(0, min(byzantine, (n - 3) // 2))


def krum(square_KK: Tensor, byzantine: int, keep: int = 1) -> list[int]:
    """The `keep` clients with the lowest score, best first: Krum with 1, multi-Krum with more.

    The score of a client is the sum of its squared distances to its K - f - 2 nearest, at least one. Two clients that
    are each other's only nearest tie: the first in the order given wins, as in the paper, where identifiers decide.
    """
    n = len(square_KK)
    near = max(1, n - byzantine - 2)
    others = square_KK + torch.diag(
        torch.full((n,), math.inf, dtype=square_KK.dtype, device=square_KK.device)
    )
    scores = others.sort(1).values[:, : min(near, n - 1)].sum(1).tolist()
    return sorted(range(n), key=lambda k: scores[k])[: max(1, keep)]


# -- clipping and noise ----------------------------------------------------------------------------------


def clip_factor(norm: float, bound: float) -> float:
    """min(1, C / norm): what an update is multiplied by to be no longer than C."""
    return 1.0 if norm <= bound else bound / norm


def gaussian(shape: Sequence[int], std: float, rng: Generator | None) -> Tensor:
    """Normal noise in fp64 from a generator; from the operating system's randomness where it is None.

    A generator can be started again by whoever knows its seed, and the noise be taken away: that is for experiments.
    """
    if rng is not None:
        return torch.randn(tuple(shape), generator=rng, dtype=torch.float64) * std
    n = math.prod(shape)
    half = (n + 1) // 2
    bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64).reshape(2, half) >> np.uint64(11)
    u, v = (bits[0] + 1.0) * 2.0**-53, bits[1] * 2.0**-53  # u in (0, 1], v in [0, 1): Box and Muller 1958
    r = np.sqrt(-2 * np.log(u))
    both = np.concatenate([r * np.cos(2 * np.pi * v), r * np.sin(2 * np.pi * v)])[:n]
    return torch.from_numpy(both * std).reshape(tuple(shape))


# -- the server as an optimiser --------------------------------------------------------------------------

Second = Literal["adam", "yogi", "adagrad"]
"""How the mean square follows D^2."""


def momentum(old: Tensor, mean: Tensor, m: Tensor | None, lr: float, beta: float) -> tuple[Tensor, Tensor]:
    """FedAvgM: m <- beta m + (mean - x), x <- x + lr m; the new x and m. lr 1 and beta 0 give the mean.

    m is None in the first round.
    """
    delta = mean.double() - old.double()
    m_new = delta if m is None else beta * m.double() + delta
    return (old.double() + lr * m_new).to(old.dtype), m_new.to(old.dtype)


def adaptive(
    kind: Second,
    old: Tensor,
    mean: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: float,
    tau: float,
    beta1: float,
    beta2: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """FedAdam, FedYogi, FedAdagrad (Algorithm 2): the new x, m and v.

        m <- beta1 m + (1 - beta1) D            v <- beta2 v + (1 - beta2) D^2                      adam
        x <- x + lr m / (sqrt(v) + tau)         v <- v - (1 - beta2) D^2 sign(v - D^2)              yogi
                                                v <- v + D^2                                        adagrad

    They begin with m = 0 and v = tau^2 (`at_rest`). There is no correction of the bias, as in the paper; Flower's
    FedAdam has one and begins with v = 0.
    """
    delta = mean.double() - old.double()
    square = delta.square()
    m_new = beta1 * m.double() + (1 - beta1) * delta
    v_old = v.double()
    if kind == "adam":
        v_new = beta2 * v_old + (1 - beta2) * square
    elif kind == "yogi":
        v_new = v_old - (1 - beta2) * square * torch.sign(v_old - square)
    else:
        v_new = v_old + square
    x = old.double() + lr * m_new / (v_new.sqrt() + tau)
    return x.to(old.dtype), m_new.to(old.dtype), v_new.to(old.dtype)


def at_rest(like: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """m = 0 and v = tau^2 (Algorithm 2: v_-1 >= tau^2)."""
    return torch.zeros_like(like), torch.full_like(like, tau * tau)


# -- controls against drift ------------------------------------------------------------------------------


def control(own: Tensor, common: Tensor, start: Tensor, end: Tensor, rate: float) -> Tensor:
    """SCAFFOLD's option II: c_k <- c_k - c + (x - y_k) / rate, `rate` the sum of the learning rates of all steps.

    It is the mean direction of the local steps without their correction: of gradients under SGD, of what the optimiser
    makes of them under any other. A rate of 0 (a tensor that did not move) leaves c_k as it is.
    """
    if not rate:
        return own.clone()
    out = own.double() - common.double() + (start.double() - end.double()) / rate
    return out.to(own.dtype)


def common_control(common: Tensor, changes: Iterable[tuple[float, Tensor]]) -> Tensor:
    """c <- c + sum over the round's clients of w_k (c_k+ - c_k), w_k a client's share of all clients (1/N in the paper).

    All clients, not the round's: c stays the mean of all c_k.
    """
    out = common.double()
    for share, change in changes:
        out = out.add(change.double(), alpha=share)
    return out.to(common.dtype)


# -- products instead of factors -------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Factors of one rank, and how far they and the mean of the factors are from the mean of the products (relative)."""

    A_RI: Tensor
    B_OR: Tensor
    error: float
    error_of_factors: float
    size: float  # |mean of the products|, Frobenius: what the errors are relative to


GAUGE = 1e-3
"""Smallest over largest singular value of the change of factors in `product_mean`: B is no more than 1000 times as large."""


def product_mean(A: Sequence[Tensor], B: Sequence[Tensor], weights: Sequence[float]) -> Product:
    """The mean of the products B_k A_k as factors of the clients' rank, the best ones there are.

    B A = (B M^-1) (M A) for every M, so that the factors can be chosen: M = A_mean V brings A as near to the mean of the
    clients' A as the product allows. Clients that agree keep their factors, and the next round trains on from what an
    optimiser knows. All products zero: the mean of the factors, exactly.
    """
    mean_A, mean_B = average(A, weights), average(B, weights)
    whole = math.fsum(weights)
    parts = [Low(b.double(), a.double()) for a, b in zip(A, B, strict=True)]
    mean = total(parts, [w / whole for w in weights])
    square = max(0.0, inner(mean, mean))
    if not (size := math.sqrt(square)):
        return Product(mean_A, mean_B, 0.0, 0.0, 0.0)
    assert isinstance(mean, Low)
    if mean.rank <= (rank := mean_A.shape[0]):  # one client: nothing is lost, nothing is turned
        return Product(mean_A, mean_B, 0.0, 0.0, size)
    apart = Low(mean_B.double(), mean_A.double())
    off = max(0.0, square - 2 * inner(mean, apart) + inner(apart, apart))
    U_OR, S_R, V_RI = svd(mean, rank)
    lost = max(0.0, square - float(S_R.square().sum()))
    P_RR, d_R, Q_RR = torch.linalg.svd(mean_A.double() @ V_RI.T)
    d_R = d_R.clamp_min(GAUGE * float(d_R[0])) if float(d_R[0]) else torch.ones_like(d_R)
    A_new, B_new = (P_RR * d_R) @ Q_RR @ V_RI, (U_OR * S_R) @ (Q_RR.T / d_R) @ P_RR.T
    return Product(
        A_new.to(mean_A.dtype), B_new.to(mean_B.dtype), math.sqrt(lost) / size, math.sqrt(off) / size, size
    )
