"""The mean of the products B A instead of the means of A and B, kept as the best factors of the clients' rank.

    dW = sum_k n_k / n B_k A_k                               of rank K r: what the clients' models say together
    B, A <- the nearest of rank r                            Eckart and Young 1936

The mean of factors has cross terms B_i A_j of clients that never met. A round's event tells how far each of the two is
from dW, over all modules: `error_of_products` is what the rank costs here, `error_of_factors` what FedAvg would have
lost. Tensors that are no pair of LoRA factors (a projector, a bias, experts with their router) are averaged as in
FedAvg. Factors are chosen near the clients' mean (`rules.product_mean`), so that clients that agree keep theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from retain.federated import rules
from retain.federated.server import ServerState, Update, mean, register, with_key
from retain.federated.servers.fedavg import FedAvg


def pairs(keys: Sequence[str]) -> list[str]:
    """The modules `adapter/path` that have lora_A and lora_B and nothing else: their change is B A."""
    leaves: dict[str, set[str]] = {}
    for key in keys:
        path, _, leaf = key.rpartition(".")
        leaves.setdefault(path, set()).add(leaf)
    return [path for path, found in leaves.items() if found == {"lora_A", "lora_B"}]


@register
@dataclass
class SvdAvg(FedAvg):
    """The mean of products, re-factored."""

    name: ClassVar[str] = "svd_avg"
    about: ClassVar[str] = "the mean of the clients' products B A, as factors of one rank"
    source: ClassVar[str] = "Eckart and Young 1936"

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        weights = dict(state.weights)
        products, factors, whole = 0.0, 0.0, 0.0
        paths = pairs(list(weights))
        for path in paths:
            A, B = f"{path}.lora_A", f"{path}.lora_B"
            found = rules.product_mean(
                [u.tensor(A) for u in updates], [u.tensor(B) for u in updates], [float(u.n) for u in updates]
            )
            weights[A], weights[B] = found.A_RI, found.B_OR
            products += (found.error * found.size) ** 2
            factors += (found.error_of_factors * found.size) ** 2
            whole += found.size**2
        done = {f"{path}.{leaf}" for path in paths for leaf in ("lora_A", "lora_B")}
        for key, having in with_key(updates):
            if key not in done:
                weights[key] = mean(having, key)
        errors = {
            "error_of_products": round((products / whole) ** 0.5, 6) if whole else 0.0,
            "error_of_factors": round((factors / whole) ** 0.5, 6) if whole else 0.0,
        }
        return ServerState(weights, {**state.memory, "errors": errors})

    def told(self, state: ServerState) -> dict[str, Any]:
        return dict(state.memory["errors"])
