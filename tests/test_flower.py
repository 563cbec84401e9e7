"""Flower's engine: the same bytes as in one process, who is let in, and what goes wrong on the way.

In-process: a `Grid` of our own in the place of the SuperLink, so that Flower's messages, records and apps are the real
ones and only sockets and processes are not. Real ones: `test_flower_loop.py`.
"""

from __future__ import annotations

import shutil
import sys
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
from retain.federated import flower
from retain.federated import server as servers
from retain.federated.door import Card, Roster, Terms, units_of
from retain.federated.site import Kept, Site
from retain.federated.spec import FederatedSpec
from retain.federated.split import make, plan
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
        self.apps, self.replies, self.silent, self.lost = (
            dict(apps),
            dict[str, Message](),
            set[int](),
            set[int](),
        )
        self.contexts = {n: NodeContext(1, n, {}, RecordDict(), {}) for n in apps}
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

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
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
    split = make(FederatedSpec(**{"clients": 3, "per_round": 2, "rounds": 2, "skew": "even", **spec}), tasks)
    half = servers.build(server).client(build(method))
    model = FakeModel(SPEC)
    of = rows or (lambda unit: split.examples(unit, client, tasks))
    counts = {t.name: len(of(t.name)) for t in tasks}
    card = Card(client, f"site-{client}", "1", AGREED, model.fingerprint(), counts, time.time())

    def site(run: str, units: Any) -> Site:
        return Site(
            client, model, half, servers.build(server), OPTIM, of, Kept(folder / client / run), Engine(), "r"
        )

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
    fed = FederatedSpec(
        **{"clients": 3, "per_round": 2, "rounds": 2, "skew": "even", "deadline": 30.0, **spec}
    )
    terms = Terms("1", AGREED, model.fingerprint(), units_of(plan(fed, bare)[0]))
    trainer = flower.deployed(
        net,
        fed,
        chosen,
        bare,
        path,
        terms,
        "r",
        wait=wait,
        poll=0.01,
        say=[].append if said is None else said.append,
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


def test_a_killed_server_goes_on_at_the_next_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the clients that it began with, also if one of them is away; sites that kept their folders."""
    alone = go(tmp_path / "alone", METHODS["all"])
    net, calls = grid(tmp_path, METHODS["all"]), [0]
    ask = flower.FlowerTransport.ask

    def killed(self: Any, given: Any) -> Iterator[Any]:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        yield from ask(self, given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flower.FlowerTransport, "ask", killed)
        over(tmp_path / "run", net, METHODS["all"])
    saved = Roster.load(tmp_path / "run")
    assert saved is not None and set(saved.rows) == set(NAMES)
    assert files(over(tmp_path / "run", net, METHODS["all"])) == files(alone)
    assert Roster.load(tmp_path / "run") == saved


def test_a_run_goes_on_without_a_client_that_was_there_when_it_began(tmp_path: Path) -> None:
    net = grid(tmp_path)
    first = over(tmp_path / "run", net)
    (first.path / "DONE").unlink()
    for row in first.rows()[2:]:
        shutil.rmtree(row.path)
    del net.apps[12]
    again = over(tmp_path / "run", net)
    left = events(again, "client_left_out")
    assert again.done and {(e["client"], e["why"]) for e in left} == {
        ("client-02", "its SuperNode is not there")
    }


# -- what travels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_every_type_travels_bit_for_bit(dtype: torch.dtype) -> None:
    """By Flower's own protocol buffers and chunks of objects, as between machines."""
    from flwr.app import Array
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    from retain.federated.message import Message as Ours

    sent = {"a": (torch.randn(700, 1000) * 3).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    content = flower.wrapped(Ours({"kind": "train"}, sent).to_bytes(), run="x")
    array = content["message"]["message"]
    assert len(array.slice_array()) == -(-len(array.data) // (5 * 2**20))
    chunks = dict(array.slice_array())
    assert Array.inflate(array.deflate(), chunks).data == array.data
    data, told = flower.unwrapped(recorddict_from_proto(recorddict_to_proto(content)))
    got = Ours.from_bytes(data, "x")
    assert told == {"run": "x"} and all(torch.equal(got.tensors[k], t) for k, t in sent.items())
    assert all(got.tensors[k].dtype == dtype for k in sent)


def test_answers_are_given_on_one_at_a_time_and_before_the_last_is_there(tmp_path: Path) -> None:
    """The second client's message is pushed, and the first one's answer used, while the third is not yet asked."""
    net = grid(tmp_path)
    asked: list[str] = []
    door = flower.Door(
        net, _terms(), Roster({c: {"colour": 1} for c in NAMES}, {c: f"site-{c}" for c in NAMES})
    )
    door.places = {c: 10 + i for i, c in enumerate(NAMES)}
    door.meet = lambda: None  # type: ignore[method-assign]

    def calls() -> Iterator[tuple[str, bytes]]:
        for client in NAMES:
            asked.append(client)
            yield client, b"nothing"

    for n, (client, _) in enumerate(flower.FlowerTransport(net, door, 5.0, 0.01).ask(calls()), 1):
        assert asked == list(NAMES[:n]) and client == NAMES[n - 1] and len(net.replies) == 0


# -- on the way ----------------------------------------------------------------------------------------------------


def _terms() -> Terms:
    return Terms("1", AGREED, FakeModel(SPEC).fingerprint(), {t.name: (t.name,) for t in stream()})


def test_who_is_silent_lost_or_broken_is_named_and_the_round_goes_on(tmp_path: Path) -> None:
    """A silent node has its deadline; a killed one is an error of Flower's; a crash and a full disk are the client's."""
    whys = {
        "no answer within 0.2 s": lambda net: net.silent.update([12]),
        "Node Unavailable": lambda net: net.lost.update([12]),
        "ZeroDivisionError": lambda net: net.apps.__setitem__(
            12, _failing(net.apps[12], ZeroDivisionError("1/0"))
        ),
        "No space left on device": lambda net: net.apps.__setitem__(
            12, _failing(None, OSError(28, "No space left on device", "/a/b/0001.json"), tmp_path)
        ),
    }
    save = Roster.save
    for n, (why, fault) in enumerate(whys.items()):
        net = grid(tmp_path / f"{n}")

        def begun(self: Any, folder: Any, net: LocalGrid = net, fault: Any = fault) -> None:
            save(self, folder)
            fault(net)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Roster, "save", begun)
            store = over(tmp_path / f"run{n}", net, per_round=3, deadline=0.2)
        left = events(store, "client_left_out")
        assert {e["client"] for e in left} == {"client-02"} and len(left) == 2 * len(stream()), why
        assert all(why in e["why"] for e in left), left[0]["why"]
        assert "/a/b" not in str(left)


def _failing(old: Any, error: Exception, folder: Path | None = None) -> ClientApp:
    def fail(*_: Any) -> Any:
        raise error

    if old is None:
        assert folder is not None
        broken = station("client-02", folder / "sites")
        broken.site = fail
        return app(broken)
    made = ClientApp()
    made.query()(old)
    made.train()(fail)
    return made


BAD: dict[str, tuple[Callable[[Card], Card], str]] = {
    "version": (lambda c: replace(c, version="0"), "it runs retain 0, and the server 1"),
    "recipe": (lambda c: replace(c, agreed={**AGREED, "optim": "p"}), "its recipe differs from the server's in optim"),
    "base": (lambda c: replace(c, base="another"), "another base model"),
    "no rows": (lambda c: replace(c, rows=dict.fromkeys(c.rows, 0)), "it has no row of any task"),
    "unknown": (lambda c: replace(c, rows={"colours": 3}), "'colours', which is no task of the recipe; did you mean"),
    "behind": (lambda c: replace(c, time=c.time - 500), "its clock is 500 s behind the server's"),
    "ahead": (lambda c: replace(c, time=c.time + 500), "its clock is 500 s ahead of the server's"),
    "form": (lambda c: replace(c, rows={"colour": -1}), "is of another form"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_who_cannot_take_part_is_refused_at_the_door(fault: str, tmp_path: Path) -> None:
    how, why = BAD[fault]
    net = grid(tmp_path)
    net.apps[12] = app(station("client-02", tmp_path / "sites", spoil=how))
    net.contexts[12] = net.contexts[10]
    said: list[str] = []
    with pytest.raises(
        RetainError, match=r"2 of 3 clients are there after 0 s .*client-00, client-01"
    ) as error:
        over(tmp_path / "run", net, said=said)
    assert why in str(error.value) and why in " ".join(said), str(error.value)
    assert not (tmp_path / "run").exists()
    store = over(tmp_path / "run", net, clients=2)
    refused = events(store, "client_refused")
    assert store.done and len(refused) == 1 and why in refused[0]["why"]


def test_two_clients_with_one_name_are_both_refused(tmp_path: Path) -> None:
    net = grid(tmp_path)
    net.apps[12] = app(station("client-01", tmp_path / "b", spoil=lambda c: replace(c, site="another")))
    with pytest.raises(
        RetainError, match=r"1 of 3 .*2 sites have the name 'client-01'; give each its own --name"
    ):
        over(tmp_path / "run", net)


def test_a_site_that_was_started_again_takes_its_place(tmp_path: Path) -> None:
    """Its old node is online still, as after a crash; a stranger with its name is refused once the run has begun."""
    net = grid(tmp_path)
    door = flower.Door(net, _terms())
    roster = door.gathered(3, 0.0)
    net.apps[13], net.contexts[13] = net.apps[12], net.contexts[12]
    door.meet()
    assert door.places["client-02"] == 13 and not door.refused
    net.apps[14] = app(station("client-02", tmp_path / "b", spoil=lambda c: replace(c, site="another")))
    net.contexts[14] = net.contexts[12]
    door.meet()
    assert door.places["client-02"] == 13 and "another site had this name" in door.refused["client-02"]
    assert door.roster == roster
    more = {**stations_rows(), "colour": 99}
    net.apps[15] = app(station("client-02", tmp_path / "c", spoil=lambda c: replace(c, rows=more)))
    del net.apps[12], net.apps[13], net.apps[14]
    net.contexts[15] = net.contexts[12]
    door.meet()
    assert (
        "client-02" not in door.places
        and "it has 99 rows of 'colour', and had 8" in door.refused["client-02"]
    )


def stations_rows() -> dict[str, int]:
    return {t.name: 8 for t in stream()}


def test_a_task_that_no_client_has_is_named(tmp_path: Path) -> None:
    net = grid(tmp_path)
    for i, name in enumerate(NAMES):
        lacking = station(name, tmp_path / "s", spoil=lambda c: replace(c, rows={**c.rows, "letter": 0}))
        net.apps[10 + i] = app(lacking)
    with pytest.raises(
        RetainError, match="no client has a row of 'letter'; there are client-00, client-01, client-02"
    ):
        over(tmp_path / "run", net)
    assert not (tmp_path / "run").exists()


def test_more_clients_than_the_recipe_says(tmp_path: Path) -> None:
    with pytest.raises(RetainError, match=r"federated.clients: 2, but 3 are there: client-00"):
        over(tmp_path / "run", grid(tmp_path), clients=2)


def test_a_message_for_another_client_is_not_worked_on(tmp_path: Path) -> None:
    here = station("client-00", tmp_path)
    reply = here.answered(flower.wrapped(b"", kind="work", client="client-01", run="x", units="{}"))
    assert flower.unwrapped(reply)[1]["why"] == "the message is for 'client-01', and this is 'client-00'"
    assert "no message of retain" in flower.unwrapped(here.answered(RecordDict()))[1]["why"]


def test_without_flower_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(RetainError, match=r"pip install 'retain\[federated\]'"):
        flower.flower()
