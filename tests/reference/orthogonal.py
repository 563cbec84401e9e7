"""O-LoRA's penalty and gradient projection memory, transcribed with loops over single numbers."""

from __future__ import annotations

import math

Matrix = list[list[float]]


def o_lora(new: list[Matrix], old: list[list[Matrix]]) -> float:
    """sum over layers, old tasks, rows of the old A and rows of the new A of |<row, row>|."""
    total = 0.0
    for layer, A in enumerate(new):
        for adapter in old:
            for a in adapter[layer]:
                for b in A:
                    total += abs(sum(x * y for x, y in zip(a, b, strict=True)))
    return total


def norms(tensors: list[list[float]]) -> float:
    """sum over tensors of their Euclidean norm."""
    return sum(math.sqrt(sum(x * x for x in t)) for t in tensors)


def removed(rows: Matrix, basis: Matrix) -> Matrix:
    """Each row without its part along the orthonormal vectors: x - sum_k <x, u_k> u_k."""
    out = []
    for row in rows:
        rest = list(row)
        for u in basis:
            along = sum(x * y for x, y in zip(row, u, strict=True))
            rest = [r - along * y for r, y in zip(rest, u, strict=True)]
        out.append(rest)
    return out


def energy(rows: Matrix) -> float:
    return sum(x * x for row in rows for x in row)


def n_new_directions(rows: Matrix, basis: Matrix, sigma: list[float], threshold: float) -> int:
    """The fewest directions, strongest first, with captured + theirs >= threshold of all energy (Saha et al. 2021).

    `sigma` are the singular values of the rows without what the basis spans.
    """
    total, n = energy(rows), 0
    captured = total - energy(removed(rows, basis))
    while n < len(sigma) and captured < threshold * total - 1e-12 * total:
        captured += sigma[n] ** 2
        n += 1
    return n
