"""Rows cut into the files of clients: the arithmetic of a skew, on numpy's legacy generator.

`by_quantity` is FCIT's (Guo et al., ICCV 2025, arXiv 2503.12897; Ghy0501/FCIT): one draw p ~ Dir(beta 1_K), a shuffle,
and the next floor(p_k n) rows for client k; what flooring leaves over is dropped. The others are ours, and drop nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

# K clients, n rows of a unit

Indices = NDArray[np.int64]


def owned(*who: object) -> RandomState:
    """A generator of its own for whoever asks."""
    text = "/".join(map(str, who)).encode("utf8", "surrogatepass")
    return RandomState(np.frombuffer(hashlib.sha256(text).digest(), "<u4").astype(np.uint32))


def of_round(seed: int, stage: int, round_: int) -> RandomState:
    """The release's generator for seed 0; one of its own for any other."""
    if seed == 0:
        return RandomState((10 * stage + round_) % 2**32)
    return owned("round", seed, stage, round_)


def drawn(beta: float, k: int, rng: RandomState) -> NDArray[np.float64]:
    """Shares of k from a symmetric Dirichlet; its limits, one takes all or equal shares, where floats do not hold it."""
    if k == 1:
        return np.ones(1)  # numpy's can be 1 - 1e-16, of which flooring would drop a row
    with np.errstate(all="ignore"):
        share_K = rng.dirichlet([beta] * k)
    if abs(share_K.sum() - 1) < 1e-6:  # not NaN either
        return share_K
    return np.eye(k)[rng.randint(k)] if beta < 1 else np.full(k, 1 / k)


def by_quantity(n: int, clients: int, beta: float, rng: RandomState) -> list[Indices]:
    """FCIT: each client's share of n rows is drawn, floored, and taken in blocks off a shuffle. The rest is dropped."""
    share_K = drawn(beta, clients, rng)
    order = shuffled(np.arange(n), rng)
    return blocks(order, np.cumsum((share_K * n).astype(np.int64)))


def by_pool(
    pools: Sequence[Indices],
    clients: int,
    beta: float,
    rng: RandomState,
    fixed: Sequence[NDArray[np.float64]] | None = None,
) -> list[Indices]:
    """Every pool is shared among clients on its own, by a draw of its own or by `fixed` shares. Nothing is dropped."""
    files: list[list[Indices]] = [[] for _ in range(clients)]
    for k, pool in enumerate(pools):
        share_K = drawn(beta, clients, rng) if fixed is None else fixed[k]
        ends = np.floor(np.cumsum(share_K) * len(pool)).astype(np.int64)
        ends[np.flatnonzero(share_K)[-1:]] = len(pool)  # a sum of 1 - 1e-16 is 1
        for file, block in zip(files, blocks(shuffled(pool, rng), np.maximum.accumulate(ends))):
            file.append(block)
    return [np.concatenate(file) for file in files]


def even(n: int, clients: int) -> Indices:
    """Where each client's block ends when all have as many of n rows, or one less."""
    return np.array([(k + 1) * n // clients for k in range(clients)], np.int64)


def blocks(order: Indices, ends: Indices) -> list[Indices]:
    """Consecutive blocks by where they end; what is behind the last is nobody's."""
    return np.split(order, ends)[:-1]


def shuffled(rows: Indices, rng: RandomState) -> Indices:
    """The rows in a random order."""
    rows = rows.copy()
    rng.shuffle(rows)
    return rows
