"""Flower's engine: the same bytes as in one process, who is let in, and what goes wrong on the way.

In-process: a `Grid` of our own in the place of the SuperLink, so that Flower's messages, records and apps are the real
ones and only sockets and processes are not. Real ones: `test_flower_loop.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

pytest.importorskip("flwr", reason="the extra `federated` is not installed")

from flwr.app import Context as NodeContext
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fake_model import FakeModel, stream
from retain.adapters.lora import LoraSpec
from retain.federated import door as doors
from retain.federated import flower
from retain.federated import server as servers
from retain.federated.door import Card, Roster, Terms, frame, units_of
from retain.federated.site import Kept, Site
from retain.federated.spec import FederatedSpec
from retain.federated.split import make
from retain.method import build
from retain.run.continual import run
from retain.run.engine import Engine
from retain.run.store import RunDir
from retain.types import RetainError
from test_federated import METHODS, OPTIM, SPEC, events, files, go

AGREED = {"method": "m", "optim": "o"}
NAMES = ("client-00", "client-01", "client-02")


class LocalGrid(Grid):
    """A SuperLink and its SuperNodes in this process. `dead` nodes are silent, `lost` ones get an error."""

    def __init__(self, apps: Mapping[int, ClientApp]) -> None:
        self.apps, self.replies, self.silent, self.lost = dict(apps), dict[str, Message](), set[int](), set[int]()
        self.contexts = {n: NodeContext(1, n, {}, RecordDict(), {}) for n in apps}
        self.largest = self.held = 0
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **more: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            node, ident = message.metadata.dst_node_id, str(uuid4())
            message.metadata.__dict__["_message_id"] = ident
            if node in self.lost:
                self.replies[ident] = Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
            elif node not in self.silent:
                try:
                    self.replies[ident] = self.apps[node](message, self.contexts[node])
                except Exception as error:  # as a SuperNode does
                    self.replies[ident] = Message(Error(code=2, reason=repr(error)), reply_to=message)
            yield ident

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def station(
    client: str,
    folder: Path,
    method: Any = "lora",
    server: Any = "fedavg",
    rows: Callable[[str], Any] | None = None,
    spoil: Callable[[Card], Card] = lambda card: card,
    **spec: Any,
) -> flower.Station:
    """A site with its own model and method, and its part of the small stream."""
    tasks = stream()
    split = make(FederatedSpec(**{"clients": 3, "per_round": 2, "rounds": 2, "skew": "even", **spec}), tasks, 0)
    half = servers.build(server).client(build(method))
    model = FakeModel(SPEC)
    of = rows or (lambda unit: split.examples(unit, client, tasks))
    counts = {t.name: len(of(t.name)) for t in tasks}
    card = Card(client, f"site-{client}", "1", AGREED, model.fingerprint(), counts, time.time())

    def site(run: str, units: Any) -> Site:
        return Site(client, model, half, servers.build(server), OPTIM, of, Kept(folder / client / run), Engine(), "r")

    return flower.Station(lambda: spoil(replace(card, time=time.time())), site)


def app(station: flower.Station) -> ClientApp:
    made = ClientApp()
    made.query()(lambda message, context: Message(station.answered(message.content), reply_to=message))
    made.train()(lambda message, context: Message(station.answered(message.content), reply_to=message))
    return made


def grid(folder: Path, method: Any = "lora", server: Any = "fedavg", **spec: Any) -> LocalGrid:
    stations = [station(c, folder / "sites", method, server, **spec) for c in NAMES]
    return LocalGrid({10 + i: app(s) for i, s in enumerate(stations)})


def over(
    path: Path,
    net: LocalGrid,
    method: Any = "lora",
    server: Any = "fedavg",
    wait: float = 0.0,
    said: list[str] | None = None,
    **spec: Any,
) -> RunDir:
    """A run over a grid, or its continuation. The server's stream has test rows alone."""
    tasks = stream()
    bare = replace(tasks, tasks=tuple(replace(t, train=()) for t in tasks))
    chosen = servers.build(server)
    made, model = build(method), FakeModel(SPEC)
    fed = FederatedSpec(**{"clients": 3, "per_round": 2, "rounds": 2, "skew": "even", "deadline": 30.0, **spec})
    terms = Terms("1", AGREED, model.fingerprint(), units_of(frame(fed, bare, 0).units))
    trainer = flower.deployed(
        net, fed, chosen, bare, 0, path, terms, "r", wait=wait, poll=0.01, say=(said or []).append
    )
    store = RunDir.open(path, {"x": 1})
    run(model, bare, made, OPTIM, store, trainer=trainer)
    return store


# -- one result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["all", "disco"])
def test_both_engines_write_the_same_bytes(method: str, tmp_path: Path) -> None:
    """Adapters, the method's state and every answer, with a site's own state (replay) in its own folder."""
    server = "disco" if method == "disco" else "fedprox"
    alone = go(tmp_path / "alone", METHODS[method], server)
    net = grid(tmp_path, METHODS[method], server)
    there = over(tmp_path / "run", net, METHODS[method], server)
    assert files(there) == files(alone)
    assert not events(there, "client_left_out") and not events(there, "client_refused")
