"""Servers that bear wrong clients: the median, the trimmed mean, Krum, and clipped updates with noise.

Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018 (arXiv 1803.01498); Blanchard et al., "Machine Learning
with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017 (arXiv 1703.02757); McMahan et al., "Learning
Differentially Private Recurrent Language Models", ICLR 2018 (arXiv 1710.06963). The formulas are in
`retain.federated.rules`.

Clients count alike here, whatever rows they have: a number that a client tells of itself must not be its weight. (Only
`clipped` without noise weighs by rows.) All of them treat A and B of a LoRA apart, as FedAvg does. What is honest but
rare looks like what is wrong: with few clients of very different data the median and Krum learn from the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from retain.federated import rules
from retain.federated.privacy import LEAST, Rounds, accountant, epsilon
from retain.federated.server import ClientInfo, Server, ServerState, Update, blocks, register, with_key
from retain.method import Context, Method
from retain.types import RetainError
from retain.values import Count, CountOrOff, Positive, zero_or


def by_name(updates: Sequence[Update]) -> list[Update]:
    """In the order of the clients' names: ties and sums do not depend on who answered first."""
    return sorted(updates, key=lambda u: u.client)


def each_entry(
    state: ServerState, updates: Sequence[Update], rule: Callable[[Sequence[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """A rule on every entry, some rows of all clients in memory at a time."""
    out = dict(state.weights)
    for key, having in with_key(updates):
        found = [rule(tensors) for _, tensors in blocks(having, key)]
        out[key] = torch.cat(found) if found and found[0].ndim else found[0]
    return out


@register
@dataclass
class Median(Server):
    """The median of every entry: right where fewer than half of the clients are wrong."""

    name: ClassVar[str] = "median"
    about: ClassVar[str] = "the median of every entry, whatever fewer than half of the clients send"
    source: ClassVar[str] = "arXiv:1803.01498"

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        return replace(state, weights=each_entry(state, by_name(updates), rules.median))


@register
@dataclass
class TrimmedMean(Server):
    """The mean of every entry without the largest and the smallest `share`."""

    name: ClassVar[str] = "trimmed_mean"
    about: ClassVar[str] = "the mean of every entry without its largest and smallest values"
    source: ClassVar[str] = "arXiv:1803.01498"

    share: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        weights = each_entry(state, by_name(updates), lambda x: rules.trimmed_mean(x, self.share))
        cut = rules.trimmed(len(updates), self.share)
        return ServerState(weights, {**state.memory, "cut": cut})

    def told(self, state: ServerState) -> dict[str, Any]:
        return {"left_out_at_each_end": state.memory["cut"]}


@register
@dataclass
class Krum(Server):
    """The client in the middle of the closest crowd; with `keep` above 1 the mean of so many (multi-Krum).

    `byzantine` wrong clients of K need K >= 2 byzantine + 3 answers; a round with fewer bears fewer, and its event
    says how many.
    """

    name: ClassVar[str] = "krum"
    about: ClassVar[str] = "the update whose nearest others are nearest, or the mean of several such"
    source: ClassVar[str] = "arXiv:1703.02757"

    byzantine: CountOrOff = 1
    keep: Count = 1

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        updates = by_name(updates)
        gram = torch.zeros(len(updates), len(updates), dtype=torch.float64)
        for key, old in state.weights.items():
            for rows, tensors in blocks(updates, key):
                gram = rules.add_gram(gram, tensors, old[rows] if old.ndim else old)
        bears = rules.tolerates(len(updates), self.byzantine)
        chosen = [updates[k] for k in rules.krum(rules.distances(gram), bears, self.keep)]
        weights = dict(state.weights)
        for key, having in with_key(by_name(chosen)):
            weights[key] = rules.average((u.tensor(key) for u in having), [1.0] * len(having))
        told = {"chosen": [u.client for u in chosen], "bears_wrong_clients": bears}
        return ServerState(weights, {**state.memory, "krum": told})

    def told(self, state: ServerState) -> dict[str, Any]:
        return dict(state.memory["krum"])


@register
@dataclass
class Clipped(Server):
    """FedAvg of updates that are cut to the length `bound`; with `noise`, differential privacy for clients.

    To the sum of the cut updates comes normal noise of the deviation `noise * bound`, and a round's event tells the
    epsilon that the stage has spent at `delta` (`retain.federated.privacy`: two assumptions, both told). It is for the
    adapters that are published, and it trusts this server, which sees every update. Noise comes from the run's seed, so
    that a run can be repeated: whoever knows the seed can take it away. With `secret` it comes from the operating
    system, and a run that was killed goes on with other noise.
    """

    name: ClassVar[str] = "clipped"
    about: ClassVar[str] = "updates cut to a length, with noise if asked for, and the epsilon of that"
    source: ClassVar[str] = "arXiv:1710.06963"
    bounded: ClassVar[bool] = True

    bound: Positive = 1.0
    noise: Annotated[float, zero_or(LEAST), Field(le=1e6)] = 0.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    secret: bool = False

    def check(self, method: Method) -> None:
        super().check(method)
        if not self.noise:
            return
        accountant()
        telling = [p.name for p in method.parts if type(p).joined is not Method.joined and not p.ends_alone]
        if telling:
            raise RetainError(
                f"federated.server.clipped.noise: the method {telling[0]!r} sends what it learned of a client's data "
                "beside the adapters, without noise, so that no epsilon would hold; leave it out, or set noise to 0"
            )

    def place(
        self, state: ServerState, infos: Sequence[ClientInfo], ctx: Context
    ) -> tuple[ServerState, dict[str, list[str]]]:
        """Also: among how many these clients were drawn, and where the noise comes from."""
        state, who = super().place(state, infos, ctx)
        if not self.noise:
            return state, who
        memory = dict(state.memory)
        took = dict(memory.get("took", {}))
        for info in infos:  # also who will not answer: it might have
            took[info.client] = took.get(info.client, 0) + 1
        crowd = infos[0].crowd
        kinds = [list(k) for k in memory.get("kinds", [])]
        kind = next((k for k in kinds if k[1:] == [crowd.clients, crowd.drawn]), None)
        if kind is None:
            kinds.append([1, crowd.clients, crowd.drawn])
        else:
            kind[0] += 1
        memory |= {"took": took, "kinds": kinds, "seed": ctx.rng("noise").initial_seed()}
        return replace(state, memory=memory), who

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        updates, old = by_name(updates), state.weights
        norms = [self._norm(u, old) for u in updates]
        factors = [rules.clip_factor(n, self.bound) for n in norms]
        counts = [1.0 if self.noise else float(u.n) for u in updates]
        rng, r = self._rng(state), state.memory.get("round", 0)

        def cut(key: str) -> Iterator[Tensor]:
            for u, factor in zip(updates, factors, strict=True):
                yield (u.tensor(key).double() - old[key].double()) * factor

        weights = {}
        for key, x in old.items():
            step = rules.average(cut(key), counts)
            if self.noise:
                step += rules.gaussian(x.shape, self.noise * self.bound / len(updates), rng)
            weights[key] = (x.double() + step).to(x.dtype)
        told = {
            "clipped": sum(f < 1 for f in factors),
            "usual_norm": round(median(norms), 6) if all(map(math.isfinite, norms)) else None,
        }
        return ServerState(weights, {**state.memory, "round": r + 1, "norms": told})

    def told(self, state: ServerState) -> dict[str, Any]:
        out, memory = dict(state.memory["norms"]), state.memory
        if self.noise:
            known = [Rounds(max(memory["took"].values()))]
            drawn = [Rounds(*kind) for kind in memory["kinds"]]
            spent = {
                "known": epsilon(self.noise, self.delta, known),
                "fixed": epsilon(self.noise, self.delta, drawn, "fixed"),
            }
            out["epsilon_of_stage"] = {k: float(f"{v:.4g}") for k, v in spent.items()}
            out["delta"], out["noise_is_secret"] = self.delta, self.secret
        return out

    def _norm(self, update: Update, old: Any) -> float:
        return math.sqrt(
            math.fsum(float((update.tensor(k).double() - x.double()).square().sum()) for k, x in old.items())
        )

    def _rng(self, state: ServerState) -> torch.Generator | None:
        """This round's noise: of (the run's seed, stage, round), or None for the operating system's."""
        if self.secret or not self.noise:
            return None
        round_, seed = state.memory.get("round", 0), state.memory["seed"]
        return torch.Generator().manual_seed((seed + 7919 * round_) % 2**63)
