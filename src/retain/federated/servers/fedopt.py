"""FedAvgM, FedAdam, FedYogi, FedAdagrad: the server takes a step of an optimiser along the clients' mean change.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019 (arXiv
1909.06335); Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295, Algorithm 2).

    D = sum_k n_k / n theta_k - theta                        the pseudo-gradient, every tensor on its own
    theta <- theta + lr m(D) / (sqrt(v(D)) + tau)            m, v: moments over the rounds of a stage

Defaults are the arguments of FCIT's code (lr 1e-3, tau 1e-3, betas 0.9 and 0.99), which parses them and never uses
them. There is no correction of the bias, as in the paper. Moments begin anew with every stage: they would push the
adapters of a new task along the way of the last one. FedAvgM with lr 1 and momentum 0 is FedAvg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from retain.federated import rules
from retain.federated.server import Server, ServerState, Update, mean, register, with_key
from retain.values import Positive

Beta = Annotated[float, Field(ge=0, lt=1)]
"""How much of a moment is kept from round to round."""


@register
@dataclass
class FedAvgM(Server):
    """m <- momentum m + D, theta <- theta + lr m."""

    name: ClassVar[str] = "fedavgm"
    about: ClassVar[str] = "FedAvg with momentum at the server"
    source: ClassVar[str] = "arXiv:1909.06335"

    lr: Positive = 1.0
    momentum: Beta = 0.9

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        weights, m = dict(state.weights), dict(state.memory.get("m", {}))
        for key, having in with_key(updates):
            weights[key], m[key] = rules.momentum(
                state.weights[key], mean(having, key), m.get(key), self.lr, self.momentum
            )
        return ServerState(weights, {**state.memory, "m": m})


@dataclass
class Adaptive(Server):
    """The three that divide by the root of a mean square: they differ in how it follows D^2."""

    kind: ClassVar[rules.Second] = "adam"
    source: ClassVar[str] = "arXiv:2003.00295"

    def rates(self) -> dict[str, Any]:
        """lr, tau, beta1 and beta2 of `rules.adaptive`."""
        raise NotImplementedError

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        weights, rates = dict(state.weights), self.rates()
        m: dict[str, Tensor] = dict(state.memory.get("m", {}))
        v: dict[str, Tensor] = dict(state.memory.get("v", {}))
        for key, having in with_key(updates):
            old = state.weights[key]
            if key not in m:
                m[key], v[key] = rules.at_rest(old, rates["tau"])
            weights[key], m[key], v[key] = rules.adaptive(
                self.kind, old, mean(having, key), m[key], v[key], **rates
            )
        return ServerState(weights, {**state.memory, "m": m, "v": v})


@register
@dataclass
class FedAdam(Adaptive):
    """v <- beta2 v + (1 - beta2) D^2."""

    name: ClassVar[str] = "fedadam"
    about: ClassVar[str] = "Adam at the server, on the clients' mean change"

    lr: Positive = 1e-3
    tau: Positive = 1e-3
    beta1: Beta = 0.9
    beta2: Beta = 0.99

    def rates(self) -> dict[str, Any]:
        return {"lr": self.lr, "tau": self.tau, "beta1": self.beta1, "beta2": self.beta2}


@register
@dataclass
class FedYogi(FedAdam):
    """v <- v - (1 - beta2) D^2 sign(v - D^2)."""

    name: ClassVar[str] = "fedyogi"
    about: ClassVar[str] = "Yogi at the server: as Adam, the mean square falls slowly"
    kind: ClassVar[rules.Second] = "yogi"


@register
@dataclass
class FedAdagrad(Adaptive):
    """v <- v + D^2; without momentum, as the paper has it."""

    name: ClassVar[str] = "fedadagrad"
    about: ClassVar[str] = "Adagrad at the server, on the clients' mean change"
    kind: ClassVar[rules.Second] = "adagrad"

    lr: Positive = 1e-3
    tau: Positive = 1e-3

    def rates(self) -> dict[str, Any]:
        return {"lr": self.lr, "tau": self.tau, "beta1": 0.0, "beta2": 0.0}
