"""DISCO: clients whose instructions are alike share a LoRA subspace; the deployed model blends all, per sample.

Guo et al., "Federated Continual Instruction Tuning", ICCV 2025 (arXiv 2503.12897; Ghy0501/FCIT). The maths is in
`retain.methods.disco`, whose router answers; this is its federated form.

    token first   mu_k: mean feature of client k's samples, sent before it trains
    match         c* = argmax_c cos(mu_k, mu_c); at tau and above it trains subspace c*, else a new one
    aggregate     (A_c, B_c) <- sum over the clients of c of n_k / n (A_k, B_k);  mu_c, n_c take the tokens in
    projector     the mean over all clients of the round, whatever their subspace

Differs from the released code: (1) a client is matched by its own token before it trains, in every round; there by the
last batch of its first round, keyed by its place in a list. (2) Two new and mutually similar clients of one round share
one new subspace, dissimilar ones get one each; there both train the same slot, and one update is lost. (3) A token
counts once its client has answered. (4) Clients get the one subspace they train and the projector, not all of them.
Clients of one unit whose subspace nobody else trains leave it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from retain.adapters.bank import Mix
from retain.federated.server import (
    ClientInfo,
    Server,
    ServerState,
    Update,
    adapters_of,
    mean,
    own,
    register,
    with_key,
)
from retain.method import Context, Method, Stack
from retain.methods._parts import slug
from retain.methods.disco import Disco, Token, organise
from retain.types import RetainError


@dataclass
class Slot(Method):
    """The client half: the one subspace that it was sent is trained, with weight 1."""

    name: ClassVar[str] = "disco_client"

    def adapt(self, ctx: Context) -> Mix:
        (name,) = ctx.model.adapters.names
        ctx.model.adapters.train_only(name)
        return Mix({name: 1.0})


@register
@dataclass
class DiscoServer(Server):
    """Subspaces by identity token."""

    name: ClassVar[str] = "disco"
    about: ClassVar[str] = "like clients share a LoRA subspace; every sample blends all"
    source: ClassVar[str] = "arXiv:2503.12897"
    of: ClassVar[str] = "disco"
    asks_token: ClassVar[bool] = True
    whole_bank: ClassVar[bool] = False

    def client(self, method: Method) -> Method:
        rest = [p for p in method.parts if p.name != self.of]
        return Stack(Slot(), *rest) if rest else Slot()

    def begin(self, ctx: Context, method: Method) -> ServerState:
        """All subspaces with their tokens; the projector is one, that of the newest."""
        bank, disco = ctx.model.adapters, _disco(method)
        names = list(disco.count)
        weights = {f"{n}/{k}": t.float().cpu() for n in names for k, t in bank.state(n).items()}
        newest = disco.group_of[next(reversed(disco.group_of))] if names else ""
        tokens = {n: _plain(t) for n, t in zip(names, disco.cache, strict=True)}
        memory = {"tokens": tokens, "newest": newest, "options": [disco.tau, disco.image_weight], "new": 0}
        return ServerState(_one_projector(weights, newest, ctx), {**memory, "asked": {}, "slots": {}})

    def place(
        self, state: ServerState, infos: Sequence[ClientInfo], ctx: Context
    ) -> tuple[ServerState, dict[str, list[str]]]:
        memory, weights, bank = dict(state.memory), dict(state.weights), ctx.model.adapters
        tau, image_weight = memory["options"]
        names, cache = list(memory["tokens"]), [_token(t) for t in memory["tokens"].values()]
        asked = {info.client: _known(info) for info in infos}
        _, slots = organise(cache, list(asked.values()), tau, image_weight)
        while len(names) <= max(slots):
            number = len(names) + 1
            while (name := f"{number:02d}-{slug(ctx.task.name)}") in bank.names:
                number += 1  # that of a client which never answered is still there
            names.append(name)
            bank.add(name, ctx.rng("disco" if not memory["new"] else f"disco-{memory['new']}"))
            memory["new"] += 1
            fresh = {f"{name}/{k}": t.float().cpu() for k, t in bank.state(name).items()}
            weights = {**weights, **_one_projector({**weights, **fresh}, memory["newest"], ctx, only=name)}
            memory["newest"] = memory["newest"] or name
        placed = {client: names[slot] for client, slot in zip(asked, slots, strict=True)}
        memory["projector"] = _projector_keys(weights, names[0], ctx)
        memory |= {"asked": {c: _plain(t) for c, t in asked.items()}, "slots": placed}
        return ServerState(weights, memory), {client: [name] for client, name in placed.items()}

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        slots, tokens = state.memory["slots"], dict(state.memory["tokens"])
        new = {key: mean(having, key) for key, having in with_key(updates)}
        for u in sorted(updates, key=lambda u: -u.n):
            token, slot = _token(state.memory["asked"][u.client]), slots[u.client]
            tokens[slot] = _plain(_token(tokens[slot]).joined(token) if slot in tokens else token)
        kept = {k: t for k, t in {**state.weights, **new}.items() if k.split("/", 1)[0] in tokens}
        tokens = {n: tokens[n] for n in adapters_of(kept)}
        biggest = max(updates, key=lambda u: u.n)
        memory = {**state.memory, "tokens": tokens, "newest": slots[biggest.client], "asked": {}, "slots": {}}
        return ServerState(_mean_projector(kept, updates, slots, memory["projector"]), memory)

    def deploy(self, state: ServerState, ctx: Context, method: Method) -> None:
        bank, disco, tokens = ctx.model.adapters, _disco(method), state.memory["tokens"]
        bank.mix = Mix({state.memory["newest"]: 1.0})
        for name in [n for n in bank.names if n not in tokens]:
            bank.remove(name)  # of a client that never answered
        super().deploy(state, ctx, method)
        bank.train_only(state.memory["newest"])
        disco.image_mean = {n: _token(t).image_F for n, t in tokens.items()}
        disco.text_mean = {n: _token(t).text_D for n, t in tokens.items()}
        disco.count = {n: t["n"] for n, t in tokens.items()}
        disco.group_of = {**disco.group_of, ctx.task.name: state.memory["newest"]}

    def told(self, state: ServerState) -> dict[str, Any]:
        return {"subspaces": {n: t["n"] for n, t in state.memory["tokens"].items()}}


def _disco(method: Method) -> Disco:
    found = next((p for p in method.parts if isinstance(p, Disco)), None)
    assert found is not None  # Server.check
    return found


def _known(info: ClientInfo) -> Token:
    if info.token is None:
        raise RetainError(f"client {info.client!r} sent no identity token")
    return replace(info.token, n=info.n)


def _plain(token: Token) -> dict[str, Any]:
    return {"image": token.image_F.cpu(), "text": token.text_D.cpu(), "n": token.n}


def _token(plain: Mapping[str, Any]) -> Token:
    return Token(plain["image"], plain["text"], plain["n"])


def _projector_keys(weights: Mapping[str, Tensor], name: str, ctx: Context) -> list[str]:
    return [k for k in own(weights, name) if ctx.model.adapters.group(k) == "projector"]


def _one_projector(
    weights: Mapping[str, Tensor], source: str, ctx: Context, only: str = ""
) -> dict[str, Tensor]:
    """The projector of one subspace in all of them (or in one): it is one, trained through the whole stream."""
    out = dict(weights)
    if source:
        for name in [only] if only else adapters_of(weights):
            for key in _projector_keys(weights, source, ctx):
                out[f"{name}/{key}"] = weights[f"{source}/{key}"].clone()
    return out


def _mean_projector(
    weights: Mapping[str, Tensor], updates: Sequence[Update], slots: Mapping[str, str], keys: Sequence[str]
) -> dict[str, Tensor]:
    """The projector as the mean over all clients, in every subspace."""
    out, n = dict(weights), sum(u.n for u in updates)
    for key in keys:
        total = torch.zeros((), dtype=torch.float64)
        for u in updates:
            total = total + u.tensor(f"{slots[u.client]}/{key}").double() * (u.n / n)
        for name in adapters_of(weights):
            out[f"{name}/{key}"] = total.float()
    return out
