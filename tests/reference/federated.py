"""What a server makes of K clients' vectors, transcribed from the papers with loops over single numbers."""

from __future__ import annotations

import math
from statistics import NormalDist


def mean(x: list[list[float]], n: list[float]) -> list[float]:
    """sum_k n_k x_k / sum_k n_k (McMahan et al. 2017)."""
    return [sum(w * row[i] for w, row in zip(n, x, strict=True)) / sum(n) for i in range(len(x[0]))]


def trimmed(x: list[list[float]], cut: int) -> list[float]:
    """The mean of every coordinate after the `cut` smallest and largest are dropped (Yin et al. 2018, Definition 2)."""
    out = []
    for i in range(len(x[0])):
        column = sorted(row[i] for row in x)[cut : len(x) - cut]
        out.append(sum(column) / len(column))
    return out


def middle(x: list[list[float]]) -> list[float]:
    """The median of every coordinate (Yin et al. 2018, Definition 1)."""
    out = []
    for i in range(len(x[0])):
        column = sorted(row[i] for row in x)
        k = len(column)
        out.append((column[(k - 1) // 2] + column[k // 2]) / 2)
    return out


def krum_scores(x: list[list[float]], f: int) -> list[float]:
    """s(i): the sum of |x_i - x_j|^2 over the n - f - 2 nearest j other than i (Blanchard et al. 2017, section 4)."""
    out = []
    for i, a in enumerate(x):
        d = sorted(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) for j, b in enumerate(x) if j != i)
        out.append(sum(d[: len(x) - f - 2]))
    return out


def fedavgm(x: float, means: list[float], start: float, lr: float, beta: float) -> list[float]:
    """Hsu et al. 2019, section 4.2: dw = w - mean; v <- beta v + dw; w <- w - lr v. `means` are shifts from w."""
    out, v, w = [], start, x
    for shift in means:
        v = beta * v - shift
        w = w - lr * v
        out.append(w)
    return out


def fedopt(
    kind: str, x: float, shifts: list[float], eta: float, tau: float, b1: float, b2: float, v: float
) -> list[float]:
    """Reddi et al. 2021, Algorithm 2, for one number: Delta_t is given, v is v_-1."""
    out, m = [], 0.0
    for delta in shifts:
        m = b1 * m + (1 - b1) * delta
        if kind == "adagrad":
            v = v + delta**2
        elif kind == "yogi":
            sign = (v > delta**2) - (v < delta**2)
            v = v - (1 - b2) * delta**2 * sign
        else:
            v = b2 * v + (1 - b2) * delta**2
        x = x + eta * m / (math.sqrt(v) + tau)
        out.append(x)
    return out


def gaussian_delta(eps: float, sigma: float) -> float:
    """Delta of one Gaussian mechanism of sensitivity 1 at eps (Balle and Wang 2018, Theorem 8)."""
    cdf = NormalDist().cdf
    return cdf(1 / (2 * sigma) - eps * sigma) - math.exp(eps) * cdf(-1 / (2 * sigma) - eps * sigma)
