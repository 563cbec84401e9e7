"""EWC, LwF and the fixed average, transcribed with loops over single numbers."""

from __future__ import annotations

import math


def ewc(
    theta: list[float], old: list[list[float]], fisher: list[list[float]], lam: float
) -> tuple[float, list[float]]:
    """lam/2 sum_k sum_i F_ki (theta_i - theta_ki)^2 and its gradient (one anchor per task)."""
    value, grad = 0.0, [0.0] * len(theta)
    for anchor, F in zip(old, fisher, strict=True):
        for i, x in enumerate(theta):
            value += lam / 2 * F[i] * (x - anchor[i]) ** 2
            grad[i] += lam * F[i] * (x - anchor[i])
    return value, grad


def softmax(row: list[float], T: float) -> list[float]:
    top = max(row)
    e = [math.exp((x - top) / T) for x in row]
    return [x / sum(e) for x in e]


def lwf(logits: list[list[float]], teacher: list[list[float]], T: float) -> float:
    """T^2 mean over tokens of sum_v p_v (log p_v - log q_v), p the teacher's (Li and Hoiem 2018)."""
    total = 0.0
    for z, z_old in zip(logits, teacher, strict=True):
        p, q = softmax(z_old, T), softmax(z, T)
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return T * T * total / len(logits)


def ema(start: list[float], weights: list[list[float]], beta: float) -> list[float]:
    """theta*_t = beta theta*_{t-1} + (1 - beta) theta_t, from the weights before training."""
    E = list(start)
    for w in weights:
        E = [beta * e + (1 - beta) * x for e, x in zip(E, w, strict=True)]
    return E
