"""FedProx: FedAvg whose clients are pulled to the weights that the round began with.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020 (arXiv 1812.06127).

    L_k = L + mu/2 |theta - theta_round|^2

over the adapters that train. mu = 0.01 is the argument's default in FCIT's code, which parses it and never uses it.
mu = 0 is FedAvg, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from retain.federated.server import ClientPart, register
from retain.federated.servers.fedavg import FedAvg
from retain.method import Context
from retain.methods.ewc import Springs
from retain.types import Batch, Output
from retain.values import NotNegative


@dataclass
class Pull(ClientPart):
    """The proximal term."""

    name: ClassVar[str] = "fedprox"
    stays: ClassVar[frozenset[str]] = frozenset({"anchor"})
    roles: ClassVar[Mapping[str, str]] = {"begin_task": "reads"}

    mu: NotNegative = 0.01
    anchor: dict[str, Tensor] = field(init=False, default_factory=dict)  # of this round

    def begin_task(self, ctx: Context) -> None:
        live = ctx.model.adapters.trainable()
        self.anchor = {k: p.detach().to(torch.float32, copy=True) for k, p in live.items()} if self.mu else {}

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        if not self.anchor:
            return 0.0
        live, anchor = ctx.model.adapters.trainable(), list(self.anchor.values())
        ones = [a.new_ones(()) for a in anchor]
        return Springs.apply(self.mu, ones, anchor, *live.values())  # type: ignore

    def given(self, ctx: Context) -> dict[str, dict[str, Tensor]]:
        self.anchor = {}  # a client keeps nothing of it
        return {}


@register
@dataclass
class FedProx(FedAvg):
    """FedAvg with a proximal term at the clients."""

    name: ClassVar[str] = "fedprox"
    about: ClassVar[str] = "FedAvg; clients are pulled to the global weights"
    source: ClassVar[str] = "arXiv:1812.06127"

    mu: NotNegative = 0.01

    def part(self) -> ClientPart | None:
        return Pull(self.mu)
