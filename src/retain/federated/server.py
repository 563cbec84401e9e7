"""The server's half of a federated method: what it sends, and what it makes of the answers.

    for each stage:                                       a row of the matrix
        state = server.begin(weights, ctx, method)        # the adapters that train, as the stage begins
        for each round:
            state, who = server.place(state, infos, ctx)  # which adapters each selected client trains
            tensors = server.send(state, info, names)     # what it gets of them
            … the clients run the same `retain.run.train.fit` …
            state = server.aggregate(state, updates)      # one tensor after the other: never all clients in memory
        server.deploy(state, ctx, method)                 # into the bank; what routes, into the method

A `Server` has hyper-parameters and no memory: all of that is in `ServerState`, plain frozen data that is saved after
every round. Keys are `adapter/site.tensor`; a key with a channel in front, `control@adapter/site.tensor`, belongs to
the part that the server adds to a client's fit (`ClientPart`). Memory ends with the stage; what must last (DISCO's
tokens) is put into the method, whose state the row saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from retain.federated import rules
from retain.federated.message import Spooled
from retain.method import Context, Method
from retain.methods.disco import Token
from retain.plain import near
from retain.types import RetainError
from retain.values import field_hints, ranged, typed


@dataclass(frozen=True)
class ServerState:
    """What a server knows between two rounds. `weights`: the global adapters that train, fp32, on the CPU."""

    weights: Mapping[str, Tensor]
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Crowd:
    """Whom a round's clients stand for: how many could be drawn, how many are, and the rows of all of them."""

    clients: int = 1
    drawn: int = 1
    rows: int = 1


@dataclass(frozen=True)
class ClientInfo:
    """A selected client: the rows it trains on in this stage, and its identity token where the server asks for it."""

    client: str
    n: int
    token: Token | None = None
    crowd: Crowd = Crowd()


class Update:
    """What a client sends back, as a handle: tensors are read from its file when they are asked for."""

    def __init__(self, client: str, n: int, file: Spooled) -> None:
        self.client, self.n, self.file = client, n, file
        self._all = {k.removeprefix("w/"): k for k in file.keys if k.startswith("w/")}

    def keys(self, channel: str = "") -> list[str]:
        """The names of its tensors, of the adapters or of a channel (without its name)."""
        found = [k.split("@", 1) for k in self._all if ("@" in k) == bool(channel)]
        return [k[-1] for k in found if not channel or k[0] == channel]

    def tensor(self, key: str, channel: str = "") -> Tensor:
        """One of them in fp32."""
        return self.file.tensor(self._all[f"{channel}@{key}" if channel else key]).float()

    def rows(self, key: str, a: int, b: int) -> Tensor:
        """Entries a to b of its first axis, in fp32; nothing else is read."""
        return self.file.rows(self._all[key], a, b).float()

    def shape(self, key: str, channel: str = "") -> torch.Size:
        """Its shape, without reading it."""
        return self.file.shape(self._all[f"{channel}@{key}" if channel else key])


class ClientPart(Method):
    """What a server adds to a client's fit (FedProx's pull, SCAFFOLD's correction): a part of its stack.

    Its `begin_task` comes when the round's global weights are in the bank. State fields are the client's own (`stays`).
    """

    def received(self, channels: Mapping[str, Mapping[str, Tensor]]) -> None:
        """What the server sent beside the adapters, by channel."""

    def given(self, ctx: Context) -> dict[str, dict[str, Tensor]]:
        """What goes back beside them, by channel, after the last step."""
        return {}


@dataclass
class Server:
    """The base: all clients train all adapters, and get them whole. A rule says what to make of the answers."""

    name: ClassVar[str] = "server"
    about: ClassVar[str] = ""
    source: ClassVar[str] = ""
    of: ClassVar[str] = ""  # the central method whose federated form this is; "": any that has one
    asks_token: ClassVar[bool] = False  # each client's identity token, before it trains
    channels: ClassVar[
        tuple[str, ...]
    ] = ()  # that its clients' part gives back, one tensor for each that trains
    bounded: ClassVar[bool] = False  # limits each update on its own: large ones are not left out before
    whole_bank: ClassVar[bool] = True  # a client needs all adapters, not only those that it trains

    def check(self, method: Method) -> None:
        """Refuse a method that this server cannot serve."""
        bad = [n for n in method.unfederated if n != self.of]
        if bad:
            raise RetainError(
                f"method {bad[0]!r} has no federated form under the server {self.name!r}: its state differs by client "
                f"and no rule joins it; the servers that bring one: {sorted(s.of for s in known().values() if s.of)}"
            )
        if self.of and self.of not in [p.name for p in method.parts]:
            raise RetainError(
                f"federated.server: {self.name!r} serves the method {self.of!r}; name it under method"
            )

    def client(self, method: Method) -> Method:
        """The client half, from the recipe's method."""
        return method

    def part(self) -> ClientPart | None:
        """What it adds to every local fit."""
        return None

    def begin(self, ctx: Context, method: Method) -> ServerState:
        """The state with which a stage begins: `adapt` has been called, and says what trains."""
        return ServerState(
            {k: p.detach().float().cpu().clone() for k, p in ctx.model.adapters.trainable().items()}
        )

    def place(
        self, state: ServerState, infos: Sequence[ClientInfo], ctx: Context
    ) -> tuple[ServerState, dict[str, list[str]]]:
        """Which adapters each selected client trains."""
        names = adapters_of(state.weights)
        return state, {info.client: names for info in infos}

    def send(self, state: ServerState, info: ClientInfo, names: Sequence[str]) -> dict[str, Tensor]:
        """What a client gets of them, and of channels."""
        return {k: t for k, t in state.weights.items() if k.split("/", 1)[0] in names}

    def aggregate(self, state: ServerState, updates: Sequence[Update]) -> ServerState:
        """The state after a round's answers; there is at least one. Every server has its own (`register`)."""
        raise RetainError(f"server {self.name!r} has no rule: define aggregate")

    def deploy(self, state: ServerState, ctx: Context, method: Method) -> None:
        """The weights into the bank; a server that routes also tells the method how."""
        bank = ctx.model.adapters
        for name in adapters_of(state.weights):
            bank.load(name, own(state.weights, name))

    def told(self, state: ServerState) -> dict[str, Any]:
        """What a round's event says of the server, as plain data."""
        return {}


# -- what servers are made of --------------------------------------------------------------------------------


def adapters_of(weights: Mapping[str, Tensor]) -> list[str]:
    """The adapters that keys belong to, in their order."""
    return list(dict.fromkeys(k.split("/", 1)[0] for k in weights))


def own(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by the bank's names."""
    return {k.split("/", 1)[1]: t for k, t in weights.items() if k.startswith(f"{name}/")}


def mean(updates: Sequence[Update], key: str, channel: str = "") -> Tensor:
    """sum_k n_k / n x_k of one tensor: one client's in memory at a time, summed in fp64."""
    return rules.average((u.tensor(key, channel) for u in updates), [u.n for u in updates])


def with_key(updates: Sequence[Update]) -> Iterator[tuple[str, list[Update]]]:
    """Every key that some client trained, with the clients that did."""
    for key in dict.fromkeys(k for u in updates for k in u.keys()):  # noqa: SIM118  keys(channel) of an Update
        yield key, [u for u in updates if key in u._all]


def blocks(updates: Sequence[Update], key: str, entries: int = 2**24) -> Iterator[tuple[slice, list[Tensor]]]:
    """A tensor of all clients, some rows at a time, for what needs all of them at once: at most `entries` numbers."""
    shape = updates[0].shape(key)
    if not len(shape):
        yield slice(None), [u.tensor(key) for u in updates]
        return
    step = max(1, entries // (len(updates) * max(1, shape[1:].numel())))
    for a in range(0, shape[0], step):
        b = min(a + step, shape[0])
        yield slice(a, b), [u.rows(key, a, b) for u in updates]


# -- registry ------------------------------------------------------------------------------------------------

SERVERS: dict[str, type[Server]] = {}
S = TypeVar("S", bound=type[Server])


def register(cls: S) -> S:
    """Class decorator: the server can be named in recipes (`federated.server`)."""
    if cls.aggregate is Server.aggregate:
        raise RetainError(f"server {cls.name!r} has no rule: define aggregate(state, updates)")
    taken = SERVERS.get(cls.name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise RetainError(f"a server named {cls.name!r} is registered already")
    SERVERS[cls.name] = ranged(f"federated.server.{cls.name}")(cls)
    return cls


def known() -> dict[str, type[Server]]:
    """Every server by name."""
    import retain.federated.servers  # noqa: F401  registers ours

    return dict(sorted(SERVERS.items()))


def build(spec: str | Mapping[str, Any], where: str = "federated.server") -> Server:
    """`name`, or `{name: {field: value}}`, as a Server."""
    spec = {spec: {}} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise RetainError(f"{where}: write a name, or {{name: {{field: value}}}} with one, not {spec!r:.80}")
    name, options = next(iter(spec.items()))
    if name not in known():
        raise RetainError(f"{where}: no server {name!r}{near(str(name), known())}")
    cls, options = known()[name], options or {}
    if not isinstance(options, Mapping):
        raise RetainError(f"{where}.{name}: fields as a mapping are needed, not {options!r:.80}")
    hints = field_hints(cls, f"server {name!r}")
    for key, value in options.items():
        if key not in hints:
            raise RetainError(f"{where}.{name}: no field {key!r}{near(str(key), hints)}")
        typed(hints[key], value, f"{where}.{name}.{key}")
    return cls(**options)
