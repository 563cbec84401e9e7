"""(epsilon, delta) of a server that clips every client's update and adds Gaussian noise to their sum.

    sum_k min(1, C / |x_k - x|) (x_k - x)  +  N(0, (z C)^2)          one round; C the bound, z the noise multiplier

The unit is a client with all of its rows. Three assumptions about who takes part, and they are not the same promise:

    known     Whoever looks may know the clients of every round: a published schedule, or a seed that others have.
              Nothing is gained by sampling; R rounds with a client are one Gaussian of z / sqrt(R), exactly
              (Balle and Wang 2018, arXiv 1805.06530). With or without a client: C is what it can change.
    fixed     m of N clients are drawn uniformly in every round, and nobody outside learns who. This is how retain
              samples. A client against another one: 2 C is what that can change (Wang et al. 2019, arXiv 1808.00087).
    poisson   Every client is drawn on its own with the probability m / N, in secret. Most papers compute this one; it
              is smaller, and no round of a fixed number of clients has it (Mironov et al. 2019, arXiv 1908.10530).

The sums are those of `dp-accounting` (Google), of the extra `federated`. They do not cover what a generator that is not
cryptographic gives away, nor the gaps of floating-point noise (Mironov 2012), nor anything that leaves beside adapters.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from retain.types import RetainError

Sampling = Literal["known", "fixed", "poisson"]
LEAST, MOST = 1e-2, 1e6
"""Noise multipliers for which the sums are made: one round at LEAST costs an epsilon of 5,000, which promises nothing."""
ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512, 1024]
"""Of Renyi's divergence: each gives a bound, the least is told. Between whole numbers the sums may not converge."""


@dataclass(frozen=True)
class Rounds:
    """Some rounds of one kind: `per_round` of `clients` took part. Under `known` only those with the client count."""

    rounds: int
    clients: int = 1
    per_round: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 0 or not 1 <= self.per_round <= self.clients:
            raise RetainError(
                f"privacy: {self.rounds} rounds with {self.per_round} of {self.clients} clients do not exist"
            )


def epsilon(noise: float, delta: float, spent: Sequence[Rounds], sampling: Sampling = "known") -> float:
    """Epsilon at `delta` after all these rounds (of several stages, too), with the noise multiplier `noise`.

    Without noise, or with less than `LEAST`, it is infinite; without a round 0. RetainError where the library is missing.
    """
    if sampling not in get_args(Sampling):
        raise RetainError(f"privacy: {sampling!r} is none of {list(get_args(Sampling))}")
    if not 0 < delta < 1 or not noise >= 0:
        raise RetainError(
            f"privacy: delta must be above 0 and below 1 and noise not negative, not {delta} and {noise}"
        )
    dp, spent = accountant(), [s for s in spent if s.rounds]
    if not spent:
        return 0.0
    if noise < LEAST:
        return math.inf
    noise = min(noise, MOST)  # more noise spends less: what is told stays a bound
    if sampling == "known":
        one = noise / math.sqrt(sum(s.rounds for s in spent))
        return float(dp.get_epsilon_gaussian(one, delta))
    fixed = sampling == "fixed"
    relation = dp.NeighboringRelation.REPLACE_ONE if fixed else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    # the theorem's multiplier is relative to the sensitivity, which is 2 C when one client stands for another
    gauss = dp.GaussianDpEvent(noise / 2 if fixed else noise)
    whole = dp.rdp.RdpAccountant(ORDERS, relation)
    for s in spent:
        if fixed:
            event = dp.SampledWithoutReplacementDpEvent(s.clients, s.per_round, gauss)
        else:
            event = dp.PoissonSampledDpEvent(s.per_round / s.clients, gauss)
        whole.compose(event, s.rounds)
    found = float(whole.get_epsilon(delta))
    if (
        fixed
    ):  # the theorem's bound is loose where a large share takes part; without its gain it is a bound as well
        found = min(
            found, float(dp.get_epsilon_gaussian(noise / 2 / math.sqrt(sum(s.rounds for s in spent)), delta))
        )
    return found


def accountant() -> Any:
    """The library that counts. RetainError where it is not installed."""
    try:
        return importlib.import_module("dp_accounting")
    except ImportError as error:
        raise RetainError(
            f"noise is told with its epsilon, which needs dp-accounting ({error}): pip install 'retain[federated]'"
        ) from None
