"""Merging, transcribed from the papers with loops over single numbers. A matrix is a list of rows."""

from __future__ import annotations

import math

Matrix = list[list[float]]


def product(B: Matrix, A: Matrix) -> Matrix:
    return [[sum(B[o][k] * A[k][i] for k in range(len(A))) for i in range(len(A[0]))] for o in range(len(B))]


def add(*ms: Matrix) -> Matrix:
    return [[sum(m[o][i] for m in ms) for i in range(len(ms[0][0]))] for o in range(len(ms[0]))]


def times(c: float, m: Matrix) -> Matrix:
    return [[c * x for x in row] for row in m]


def top(m: Matrix, density: float) -> Matrix:
    """The int(density * n) largest magnitudes stay (no two are equal in the tests)."""
    sizes = sorted((abs(x) for row in m for x in row), reverse=True)
    keep = int(density * len(sizes))
    return [[x if abs(x) in sizes[:keep] else 0.0 for x in row] for row in m]


def ties(taus: list[Matrix], density: float, lam: float, how: str = "total") -> Matrix:
    """Trim, elect, disjoint mean (TIES, Yadav et al. 2023, algorithm 1)."""
    trimmed = [top(t, density) for t in taus]
    out = times(0.0, taus[0])
    for o, row in enumerate(out):
        for i in range(len(row)):
            values = [t[o][i] for t in trimmed]
            votes = values if how == "total" else [math.copysign(1, v) if v else 0.0 for v in values]
            sign = 1 if sum(votes) >= 0 else -1
            agree = [v for v in values if v * sign > 0]
            out[o][i] = lam * sum(agree) / len(agree) if agree else 0.0
    return out


def copa_sum(factors: list[tuple[Matrix, Matrix]], density: float, lam: float) -> Matrix:
    """RobustMerge eq. 2 to 5: lam sum_n B~_n S~_n A~_n."""
    return times(lam, add(*[_term(b, s, a) for b, s, a in _copa(factors, density, 0.0)]))


def copa_product(factors: list[tuple[Matrix, Matrix]], density: float, lam: float, floor: float) -> Matrix:
    """As released: A = lam sum A~, B = lam sum B~ s / sum s, S floored at its own percentile."""
    parts = _copa(factors, density, floor)
    A = times(lam, add(*[a for _, _, a in parts]))
    B = times(lam, add(*[[[x * s[k] for k, x in enumerate(row)] for row in b] for b, s, _ in parts]))
    return product(B, A)


def _copa(
    factors: list[tuple[Matrix, Matrix]], density: float, floor: float
) -> list[tuple[Matrix, list[float], Matrix]]:
    pruned = [(top(B, density), top(A, density)) for B, A in factors]
    S = []
    for (_, A), (_, a) in zip(factors, pruned):
        s = [sum(map(abs, full)) / sum(map(abs, left)) for full, left in zip(A, a)]
        if floor:
            bound = sorted(s)[math.floor(floor * len(s))]
            s = [max(x, bound) for x in s]
        S.append(s)
    whole = [sum(s[k] for s in S) for k in range(len(S[0]))]
    return [(b, [x / w for x, w in zip(s, whole)], a) for (b, a), s in zip(pruned, S)]


def _term(B: Matrix, s: list[float], A: Matrix) -> Matrix:
    return product([[x * s[k] for k, x in enumerate(row)] for row in B], A)


def pcb(taus: list[list[float]], ratio: float, lam: float, clip: float) -> list[float]:
    """PCB-Merging as released, on flat vectors."""
    N, d = len(taus), len(taus[0])
    together = [sum(t[j] for t in taus) for j in range(d)]
    scales, clipped = [], []
    for t in taus:
        order = sorted(map(abs, t))
        low, high = order[int(d * clip)], order[int(d * (1 - clip) - 1)]
        clipped.append([math.copysign(min(max(abs(x), low), high), x) for x in t])
        size = _unit([abs(x) for x in clipped[-1]])
        beta = [math.exp(N * u * u) * math.tanh(x * s) for u, x, s in zip(size, t, together)]
        bound = sorted(beta)[min(d - 1, int((1 - ratio) * d))]
        scales.append(_unit([max(b, bound) for b in beta]))
    return [
        lam * sum(t[j] * s[j] for t, s in zip(clipped, scales)) / max(sum(s[j] for s in scales), 1e-12)
        for j in range(d)
    ]


def _unit(v: list[float]) -> list[float]:
    low, high = min(v), max(v)
    return [(x - low) / (high - low) for x in v]


def slerp(a: list[float], b: list[float], t: float) -> list[float]:
    norm = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    angle = math.acos(sum(x * y for x, y in zip(a, b)) / norm)
    return [(math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle) for x, y in zip(a, b)]


def cofima(
    old: list[float], new: list[float], F_old: list[float], F_new: list[float], lam: float
) -> list[float]:
    """avg = [(1 - lam) F_old old + lam F_new new] / [(1 - lam) F_old + lam F_new]; CoMA where both are 0."""
    out = []
    for x, y, f, g in zip(old, new, F_old, F_new):
        below = (1 - lam) * f + lam * g
        out.append(((1 - lam) * f * x + lam * g * y) / below if below else (1 - lam) * x + lam * y)
    return out


def keep_probabilities(row: list[float], density: float, window: float) -> list[float]:
    """DELLA: (density - e) + 2 e rank, rank of the magnitude within the row from 0 to 1."""
    e = window / 2
    order = sorted(range(len(row)), key=lambda j: abs(row[j]))
    rank = {j: k / (len(row) - 1) for k, j in enumerate(order)}
    return [(density - e) + 2 * e * rank[j] for j in range(len(row))]


def model_tailor(
    W0: Matrix,
    W1: Matrix,
    xs: Matrix,
    sparsity: float,
    *,
    code: bool = False,
    decorate: bool = True,
    sign: float = -1.0,
    w: float = 0.5,
    damp: float = 0.01,
    block: int = 128,
) -> Matrix:
    """Model Tailor, by the inverse of what is left of H at every column:

    column j reset by e:  W_k += sign e [H_F^-1]_jk / [H_F^-1]_jj  for k in F = {j, j + 1, …}

    What is reset is chosen when a block of columns comes: by what tuning moved there, whatever compensation has done
    since, and (`code`) by the weights as they are then.
    """
    n, out_n = len(W0[0]), len(W0)
    H = [[2 / len(xs) * sum(x[i] * x[j] for x in xs) for j in range(n)] for i in range(n)]
    for j in range(n):
        H[j][j] = H[j][j] or 1.0
    mean = sum(H[j][j] for j in range(n)) / n
    for j in range(n):
        H[j][j] += damp * mean
    left = [_inverse([row[j:] for row in H[j:]])[0] for j in range(n)]  # first rows, F shrinking
    moved = [[abs(b - a) for a, b in zip(r0, r1)] for r0, r1 in zip(W0, W1)]
    out = [list(row) for row in W1]
    reset: set[tuple[int, int]] = set()
    for j in range(n):
        if j % block == 0:
            columns = range(j, min(j + block, n))
            order = []
            for o in range(out_n):
                here = [moved[o][c] for c in columns]
                felt = [(out[o][c] ** 2 if code else moved[o][c] ** 2 / 2) / left[c][0] for c in columns]
                score = [w * a + (1 - w) * b for a, b in zip(_z(here), _z(felt))]
                order += [(s, o, c) for s, c in zip(score, columns)]
            reset |= {(o, c) for _, o, c in sorted(order)[: round(sparsity * len(order))]}
        for o in range(out_n):
            if (o, j) in reset:
                lost = out[o][j] - W0[o][j]
                out[o][j] = W0[o][j]
                for k in range(j + 1, n):
                    out[o][k] += (sign * lost * left[j][k - j] / left[j][0]) if decorate else 0.0
    return out


def _z(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    sd = math.sqrt(sum((x - mean) ** 2 for x in row) / len(row))
    return [(x - mean) / max(sd, 1e-12) for x in row]


def _inverse(m: Matrix) -> Matrix:
    """Gauss and Jordan with pivots."""
    n = len(m)
    rows = [[*row, *(float(i == j) for j in range(n))] for i, row in enumerate(m)]
    for j in range(n):
        best = max(range(j, n), key=lambda i: abs(rows[i][j]))
        rows[j], rows[best] = rows[best], rows[j]
        rows[j] = [x / rows[j][j] for x in rows[j]]
        for i in range(n):
            if i != j:
                rows[i] = [a - rows[i][j] * b for a, b in zip(rows[i], rows[j])]
    return [row[n:] for row in rows]
