"""Clients in this process, one after the other: one model in memory, adapters swapped, frozen features shared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from retain.federated.message import Message
from retain.federated.rounds import Federation, Reply
from retain.federated.server import Server
from retain.federated.site import Kept, Site
from retain.federated.spec import FederatedSpec
from retain.federated.split import make
from retain.method import Method
from retain.models.base import Model
from retain.run.engine import Engine
from retain.run.train import Optim
from retain.stream import Stream
from retain.types import Examples, RetainError

Tamper = Callable[[str, bytes, Callable[[], bytes]], Reply]
"""Stands between a server and its clients: (client, the call, its work) to a reply."""


@dataclass
class InProcess:
    """The embedded engine's transport. `tamper` is for tests of what a network and a stranger do."""

    sites: Mapping[str, Site]
    tamper: Tamper | None = None

    def ask(self, calls: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Reply]]:
        """Every client's work in turn. Its own trouble is its reply, as over a network."""
        for client, data in calls:
            work = self._work(client, data)
            try:
                yield client, work() if self.tamper is None else self.tamper(client, data, work)
            except RetainError as error:
                yield client, str(error)

    def _work(self, client: str, data: bytes) -> Callable[[], bytes]:
        site = self.sites[client]
        return lambda: site.answer(Message.from_bytes(data, "the server")).to_bytes()


def federation(
    spec: FederatedSpec,
    server: Server,
    stream: Stream,
    kept: Path,
    *,
    agreed: str = "",
    tamper: Tamper | None = None,
) -> Federation:
    """The trainer of a federated run in this process; each client keeps what stays with it under `kept`."""
    split = make(spec, stream)

    def rows_of(client: str) -> Callable[[str], Examples]:
        return lambda unit: split.examples(unit, client, stream)

    def connect(model: Model, half: Method, optim: Optim, engine: Engine) -> InProcess:
        sites = {
            c: Site(c, model, half, server, optim, rows_of(c), Kept(kept / c), engine, agreed)
            for c in split.clients
        }
        return InProcess(sites, tamper)

    return Federation(spec, server, split, connect, agreed)
