"""SCAFFOLD: every client's steps are corrected by what tells its own direction from all clients' one.

Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020 (arXiv 1910.06378).

    y <- y - lr (u(y) + c - c_k)                             local steps; u: what the optimiser makes of a gradient
    c_k <- c_k - c + (x - y) / sum of lr                     option II: the mean u of this round
    c <- c + sum over the round's clients of n_k / n (c_k+ - c_k)

Differs from the paper: (1) The correction is added to the step and not to the gradient. Under SGD that is the same.
Under AdamW, with which all clients here train, (x - y) / sum of lr is a mean of steps, not of gradients: added to a
gradient a thousand times smaller it would be all that counts. (2) Clients weigh by their rows, as in the mean of the
weights, n over all clients of the stage; with equal rows that is the paper's 1/N. (3) A change counts once the server
has used the answer: a client whose answer was lost, late or left out takes its new control back, so that c stays the
mean of the c_k. Controls are zero when a stage begins, and FedAvg is what the first round is.

A client keeps two tensors for each that trains, and sends one more beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retain.federated import rules
from retain.federated.server import (
    ClientInfo,
    ClientPart,
    ServerState,
    Update,
    register,
)
from retain.federated.servers.fedavg import FedAvg
from retain.method import Context

COMMON, COUNTED, CHANGE = "common", "counted", "control"


@dataclass
class Control(ClientPart):
    """The client's half."""

    name: ClassVar[str] = "scaffold"
    stays: ClassVar[frozenset[str]] = frozenset({"own", "new", "stage", "round", "now"})
    roles: ClassVar[Mapping[str, str]] = {"begin_task": "reads", "after_step": "moves"}

    own: dict[str, Tensor] = field(init=False, default_factory=dict)  # c_k as the server has counted it
    new: dict[str, Tensor] = field(init=False, default_factory=dict)  # c_k+ of the last round it trained in
    stage: str = field(init=False, default="")
    round: int = field(init=False, default=-1)
    now: dict[str, Any] = field(init=False, default_factory=dict)  # of this fit alone

    def received(self, channels: Mapping[str, Mapping[str, Tensor]]) -> None:
        told = {k: int(t) for k, t in channels.get(COUNTED, {}).items()}
        self.now = {"common": dict(channels.get(COMMON, {})), **told}

    def begin_task(self, ctx: Context) -> None:
        live, common = ctx.model.adapters.trainable(), self.now["common"]
        if self.stage != ctx.task.name:
            self.own, self.new = {}, {}
        elif self.new and self.now["last"] == self.round:
            self.own = self.new
        self.new = {}
        shift = {}
        for key in [k for k in common if k in live]:
            own = self.own.get(key)
            shift[key] = (common[key] if own is None else common[key] - own).to(live[key].device)
        start = {k: p.detach().to("cpu", torch.float32, copy=True) for k, p in live.items()}
        self.now = {**self.now, "shift": shift, "start": start, "moved": dict.fromkeys(live, 0.0)}

    def after_step(self, ctx: Context) -> None:
        bank, shift, moved = ctx.model.adapters, self.now["shift"], self.now["moved"]
        with torch.no_grad():
            for key, p in bank.trainable().items():
                rate = ctx.rates[bank.group(key)]
                moved[key] += rate
                if key in shift:
                    p.sub_(rate * shift[key])

    def given(self, ctx: Context) -> dict[str, dict[str, Tensor]]:
        change: dict[str, Tensor] = {}
        for key, p in ctx.model.adapters.trainable().items():
            start, end = self.now["start"][key], p.detach().float().cpu()
            none = torch.zeros_like(start)
            own, common = self.own.get(key, none), self.now["common"].get(key, none)
            self.new[key] = rules.control(own, common, start, end, self.now["moved"][key])
            change[key] = self.new[key] - own
        self.stage, self.round, self.now = ctx.task.name, self.now["now"], {}
        return {CHANGE: change}


@register
@dataclass
class Scaffold(FedAvg):
    """FedAvg with controls."""

    name: ClassVar[str] = "scaffold"
    about: ClassVar[str] = "FedAvg; each client's drift is measured and taken out of its steps"
    source: ClassVar[str] = "arXiv:1910.06378"
    channels: ClassVar[tuple[str, ...]] = (CHANGE,)

    def part(self) -> ClientPart | None:
        return Control()

    def place(
        self, state: ServerState, infos: Sequence[ClientInfo], ctx: Context
    ) -> tuple[ServerState, dict[str, list[str]]]:
        """Also: what part of all rows each client stands for."""
        state, who = super().place(state, infos, ctx)
        shares = {i.client: i.n / max(1, i.crowd.rows) for i in infos}
        return replace(state, memory={**state.memory, "shares": shares}), who

    def send(self, state: ServerState, info: ClientInfo, names: Sequence[str]) -> dict[str, Tensor]:
        """The adapters, c, and which round's answer of this client was the last that counted."""
        out, memory = super().send(state, info, names), state.memory
        common: Mapping[str, Tensor] = memory.get(COMMON, {})
        last, now = memory.get(COUNTED, {}).get(info.client, -1), memory.get("round", 0)
        told = {"last": last, "now": now}
        return {
            **out,
            **{f"{COMMON}@{k}": t for k, t in common.items() if k in out},
            **{f"{COUNTED}@{k}": torch.tensor(v) for k, v in told.items()},
        }

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        memory: dict[str, Any] = dict(state.memory)
        shares, now, common = memory["shares"], memory.get("round", 0), dict(memory.get(COMMON, {}))
        for key, old in state.weights.items():
            c = common.get(key, torch.zeros_like(old))
            common[key] = rules.common_control(
                c, ((shares[u.client], u.tensor(key, CHANGE)) for u in updates)
            )
        counted = {**memory.get(COUNTED, {}), **{u.client: now for u in updates}}
        memory |= {COMMON: common, COUNTED: counted, "round": now + 1, "shares": {}}
        return ServerState(super().aggregate(state, updates).weights, memory)

    def told(self, state: ServerState) -> dict[str, Any]:
        size = sum(float(t.double().square().sum()) for t in state.memory.get(COMMON, {}).values()) ** 0.5
        return {"control": round(size, 6)}
