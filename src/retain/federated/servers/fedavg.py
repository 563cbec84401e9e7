"""FedAvg: the mean of the clients' adapters, weighed by their samples.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017 (arXiv
1602.05629).

    theta <- sum_k n_k / n theta_k          over the round's clients, every tensor on its own

On LoRA this averages A and B apart, as all released federated code does: the mean of factors is not the mean of the
products B A (`svd_avg` averages those, and tells the error of both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from retain.federated.server import Server, ServerState, Update, mean, register, with_key


@register
@dataclass
class FedAvg(Server):
    """The weighted mean of every tensor."""

    name: ClassVar[str] = "fedavg"
    about: ClassVar[str] = "the mean of the clients' adapters, by samples"
    source: ClassVar[str] = "arXiv:1602.05629"

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        new = {key: mean(having, key) for key, having in with_key(updates)}
        return ServerState({**state.weights, **new}, state.memory)
