"""HiDe-LLaVA (arXiv 2503.12941), DISCO (arXiv 2503.12897) and CKA (Kornblith et al. 2019), written from the formulas.

One sample, one layer, one pair of samples at a time, in float64 and without any of our code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def cos(a: Array, b: Array) -> float:
    return float(a @ b / math.sqrt(float(a @ a) * float(b @ b)))


def softmax(scores: Sequence[float]) -> list[float]:
    e = [math.exp(s - max(scores)) for s in scores]
    return [x / sum(e) for x in e]


def hide_weights(
    image: Array, text: Array, V: Sequence[Array], U: Sequence[Array], a: float, b: float, T: float
) -> list[float]:
    """d of one sample: r_c = a cos(image, v_c) + b cos(text, u_c), softmax over the learned tasks."""
    return softmax([(a * cos(image, v) + b * cos(text, u)) / T for v, u in zip(V, U, strict=True)])


def blended(
    W: Array, bias: Array, h: Array, A: Sequence[Array], B: Sequence[Array], d: Sequence[float], s: float
) -> Array:
    """W h + s sum_c d_c B_c A_c h of one token."""
    return W @ h + bias + s * sum(dc * (Bc @ (Ac @ h)) for dc, Ac, Bc in zip(d, A, B, strict=True))


def factor_sum(W: Array, bias: Array, h: Array, A: Sequence[Array], B: Sequence[Array], s: float) -> Array:
    """W h + s (sum_c B_c)(sum_c A_c) h of one token."""
    return W @ h + bias + s * (sum(B) @ (sum(A) @ h))


def disco(
    W: Array, bias: Array, h: Array, A: Sequence[Array], B: Sequence[Array], alpha: Sequence[float], s: float
) -> Array:
    """As printed: s Bbar diag(alpha_1 I, …, alpha_T I) Abar h."""
    rank = A[0].shape[0]
    D = np.diag(np.repeat(alpha, rank))
    return W @ h + bias + s * (np.concatenate(B, axis=1) @ D @ np.concatenate(A, axis=0) @ h)


def dko(cache: list[tuple[Array, int]], mu: Array, n: int, tau: float) -> int:
    """Dynamic knowledge organisation, one upload; changes the cache and returns the entry."""
    if cache:
        scores = [cos(mu, m) for m, _ in cache]
        best = scores.index(max(scores))
        if scores[best] >= tau:
            m, k = cache[best]
            cache[best] = ((k * m + n * mu) / (k + n), k + n)
            return best
    cache.append((mu, n))
    return len(cache) - 1


def hsic(K: Array, L: Array) -> float:
    n = len(K)
    H = np.eye(n) - np.ones((n, n)) / n
    return float(((H @ K @ H) * (H @ L @ H)).sum())


def cka(K: Array, L: Array) -> float:
    return hsic(K, L) / math.sqrt(hsic(K, K) * hsic(L, L))


def rbf(X: Array) -> Array:
    """exp(-d^2 / (2 sigma^2)), sigma^2 the median of the non-zero squared distances."""
    n = len(X)
    d = np.array([[float(((X[i] - X[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
    return np.exp(-d / (2 * np.median(d[d > 0])))
