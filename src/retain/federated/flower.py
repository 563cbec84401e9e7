"""The second engine: the same coordinator, with messages carried by Flower's SuperLink and SuperNodes.

    Federation ─► FlowerTransport.ask ─► Grid ─► SuperLink ─► SuperNode ─► answered(Station) ─► Site.answer
    Door: who of the nodes is which client, asked by a hello before the first round and whenever a node is new

A message of ours (`retain.federated.message`) travels as the bytes of its safetensors file, in one `Array` of an
`ArrayRecord` with a serialisation type of its own. So bfloat16 travels, which Flower's own conversion by numpy refuses.
Flower cuts an array's bytes into objects of 5 MB, so that no limit of a request (2 GB) holds for a message; a
`ConfigRecord` would have been one object. Words that are not ours but the transport's (the run, the addressee, a reason
for no answer) are a `ConfigRecord` beside it.

Flower is the extra `federated`, and imported when it is used. Only its public API is called here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from retain.federated.door import Card, Roster, Terms, units_of
from retain.federated.message import Message
from retain.federated.rounds import Federation, Reply
from retain.federated.server import Server
from retain.federated.site import Site
from retain.federated.spec import FederatedSpec
from retain.method import Context, Method
from retain.models.base import Model
from retain.run.engine import Engine
from retain.run.train import Optim
from retain.stream import Stream
from retain.types import RetainError

HELLO, WORK = "query", "train"
STYPE = "retain.safetensors"
AGAIN = 60.0
"""Seconds after which a node that was not let in is asked again: who mended its recipe need not tell anybody."""

Log = Callable[..., None]


def flower() -> Any:
    """Flower's `flwr.app`. RetainError, with the extra's name, where it is not installed."""
    try:
        from flwr import app
    except ImportError as error:
        raise RetainError(
            f"federated: Flower cannot be imported ({error}); install it with pip install 'retain[federated]'"
        ) from None
    return app


# -- what travels --------------------------------------------------------------------------------------------


def wrapped(data: bytes, **told: str) -> Any:
    """Bytes of a message and the transport's words, as Flower's `RecordDict`."""
    app = flower()
    array = app.Array("uint8", (len(data),), STYPE, data)
    return app.RecordDict({"told": app.ConfigRecord(told), "message": app.ArrayRecord({"message": array})})


def unwrapped(content: Any) -> tuple[bytes, dict[str, str]]:
    """The inverse, of what a stranger sent. RetainError where it is nothing of ours."""
    try:
        told = {str(k): str(v) for k, v in content["told"].items()}
        data = content["message"]["message"].data
    except (KeyError, AttributeError, TypeError):
        raise RetainError("its answer holds no message of retain") from None
    return bytes(data), told


# -- a site ----------------------------------------------------------------------------------------------------


@dataclass
class Station:
    """What a ClientApp is made of: its card, and its `Site` for a run with these units."""

    card: Callable[[], Card]
    site: Callable[[str, Mapping[str, tuple[str, ...]]], Site]
    say: Callable[[str], None] = lambda text: None

    def answered(self, content: Any) -> Any:
        """The reply to a message; what it cannot do is a reason, in one sentence."""
        try:
            data, told = unwrapped(content)
            return wrapped(self._reply(data, told))
        except RetainError as error:
            return wrapped(b"", why=str(error))
        except OSError as error:  # its disk is full, a file is gone
            about = f"{Path(error.filename).name}: " if error.filename else ""
            return wrapped(b"", why=f"{about}{error.strerror or error}")

    def _reply(self, data: bytes, told: Mapping[str, str]) -> bytes:
        if told.get("kind") == "hello":
            return self.card().to_bytes()
        if told.get("kind") == "refused":
            self.say(f"the server does not let this site in: {told.get('why', '')}")
            return b""
        me = self.card().client
        if told.get("client") != me:
            raise RetainError(f"the message is for {told.get('client')!r:.80}, and this is {me!r}")
        units = {u: tuple(tasks) for u, tasks in json.loads(told["units"]).items()}
        return self.site(told["run"], units).answer(Message.from_bytes(data, "the server")).to_bytes()


# -- the server's door -----------------------------------------------------------------------------------------


@dataclass
class Seat:
    """A node that said who it is: its card, when it was asked and answered, and why it was not let in."""

    card: Card | None
    asked: float
    came: float
    why: str = ""


@dataclass
class Door:
    """Which node is which client. Nodes come and go; `meet` greets the new ones and never waits."""

    grid: Any
    terms: Terms
    roster: Roster | None = None
    say: Callable[[str], None] = lambda text: None
    log: Log | None = None
    clock: Callable[[], float] = time.time
    seats: dict[int, Seat] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)  # client -> node
    _hellos: dict[str, tuple[int, float]] = field(default_factory=dict)  # message -> node, and when
    _told: list[dict[str, Any]] = field(default_factory=list)  # refusals that no log has yet

    @property
    def greeting(self) -> bool:
        """Whether an answer to a hello is still to come, from a node that may well give it."""
        return any(self.clock() - asked < AGAIN for _, asked in self._hellos.values())

    @property
    def refused(self) -> dict[str, str]:
        """Why those who are there and not let in are not, by name."""
        found = [(f"node {n}" if s.card is None else s.card.client, s.why) for n, s in self.seats.items()]
        return {who: why for who, why in found if why}

    def meet(self) -> None:
        """Greet who is new, hear who answered, and seat them."""
        online, now = set(self.grid.get_node_ids()), self.clock()
        for node in [n for n in self.seats if n not in online]:
            del self.seats[node]
        self._hellos = {i: h for i, h in self._hellos.items() if h[0] in online}
        stale = {n for n, s in self.seats.items() if s.why and now - s.came > AGAIN}
        for node in sorted((online - set(self.seats)) | stale):
            if node not in [n for n, _ in self._hellos.values()]:
                for sent in push(self.grid, node, HELLO, wrapped(b"", kind="hello"), ttl=3600.0):
                    self._hellos[sent] = (node, now)
        for sent in list(self._hellos):
            for reply in self.grid.pull_messages([sent]):
                node, asked = self._hellos.pop(sent)
                self.seats[node] = self._seat(node, reply, asked)
        self._place()

    def _seat(self, node: int, reply: Any, asked: float) -> Seat:
        data, why = heard(reply)
        came = self.clock()
        if why:
            return Seat(None, asked, came, why)
        try:
            card = Card.from_bytes(data, "its hello")
        except RetainError as error:
            return Seat(None, asked, came, str(error))
        return Seat(card, asked, came, self.terms.refusal(card, asked, came))

    def _place(self) -> None:
        """One node per client. Of two with one name the newer counts if both are one site, started again."""
        by_name: dict[str, list[int]] = {}
        for node, seat in self.seats.items():
            if seat.card is not None and not self.terms.refusal(seat.card, seat.asked, seat.came):
                by_name.setdefault(seat.card.client, []).append(node)
        places = {}
        for client, nodes in by_name.items():
            whys = {n: self._unseated(client, n) for n in nodes}
            fit = [n for n in nodes if not whys[n]]
            sites = {self._card(n).site for n in fit}
            if len(sites) > 1:
                whys |= {
                    n: f"{len(fit)} sites have the name {client!r}; give each its own --name" for n in fit
                }
            elif fit:
                places[client] = max(fit, key=lambda n: self._card(n).time)
            for node, why in whys.items():
                self.seats[node].why = why
        for client in sorted(places.keys() - self.places.keys()):
            self.say(f"{client} is there")
        self.places = places
        for node, seat in self.seats.items():
            if seat.why:
                self._refuse(node, seat)

    def _unseated(self, client: str, node: int) -> str:
        card = self._card(node)
        return self.roster.refusal(client, card.site, self.terms.rows(card)) if self.roster else ""

    def _card(self, node: int) -> Card:
        card = self.seats[node].card
        assert card is not None
        return card

    def _refuse(self, node: int, seat: Seat) -> None:
        """Said once to everybody: the person who waits, the run's events, the site itself."""
        who = f"node {node}" if seat.card is None else seat.card.client
        event = {"kind": "client_refused", "client": who, "node": str(node), "why": seat.why}
        if event in self._told:
            return
        self._told.append(event)
        self.say(f"{who} is not let in: {seat.why}")
        if self.log is not None:
            self.log(**event)
        if seat.card is not None:
            push(self.grid, node, HELLO, wrapped(b"", kind="refused", why=seat.why), ttl=600.0)

    def logged(self, log: Log) -> None:
        """From now on refusals are events; those of before are written first."""
        if self.log is None:
            for event in self._told:
                log(**event)
        self.log = log

    def gathered(self, n: int, wait: float, poll: float = 1.0) -> Roster:
        """The roster: that of the run if it has begun, else of `n` clients, waited for. RetainError if they do not come."""
        end, saved = time.monotonic() + wait, self.roster
        wanted = len(saved.rows) if saved else n
        while True:
            self.meet()
            late = time.monotonic() >= end
            if len(self.places) >= wanted or (late and saved and self.places):
                break
            if late:
                refused = "; ".join(f"{who} was not let in: {why}" for who, why in self.refused.items())
                raise RetainError(
                    f"federated: {len(self.places)} of {wanted} clients are there after {wait:.0f} s "
                    f"({', '.join(sorted(self.places)) or 'nobody'}); start the others, or set federated.clients"
                    + (f"; {refused}" if refused else "")
                )
            time.sleep(poll)
        if saved:
            return saved
        cards = {c: self._card(n) for c, n in self.places.items()}
        names = sorted(cards)
        if len(names) > n:
            raise RetainError(
                f"federated.clients: {n}, but {len(names)} are there: {', '.join(names)}; set it to that"
            )
        self.roster = Roster({c: self.terms.rows(cards[c]) for c in names}, {c: cards[c].site for c in names})
        return self.roster


def push(grid: Any, node: int, kind: str, content: Any, ttl: float) -> list[str]:
    """Send one message; returns its id, or nothing where the SuperLink did not take it."""
    message = flower().Message(content, dst_node_id=node, message_type=kind, ttl=ttl)
    return [i for i in grid.push_messages([message]) if i]


def heard(reply: Any) -> tuple[bytes, str]:
    """The bytes of a reply, or why there are none."""
    if reply.has_error():
        said = " ".join(str(reply.error.reason or "no reason given").split())
        return b"", f"{said:.500} (Flower's error {reply.error.code})"
    try:
        data, told = unwrapped(reply.content)
    except RetainError as error:
        return b"", str(error)
    return data, told.get("why", "")[:1000]


# -- the transport ---------------------------------------------------------------------------------------------


@dataclass
class FlowerTransport:
    """Messages over a Flower grid. Each client has `deadline` seconds; answers are given on as they come."""

    grid: Any
    door: Door
    deadline: float
    poll: float = 1.0
    after: Callable[[], float] = time.monotonic

    def ask(self, calls: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Reply]]:
        """As `Transport.ask`: a message is pushed when it is taken, a reply is pulled one at a time."""
        self.door.meet()
        while self.door.greeting and self._away():
            time.sleep(self.poll)
            self.door.meet()
        roster = self.door.roster
        assert roster is not None
        units = json.dumps(self.door.terms.units)
        waiting: dict[str, tuple[str, float]] = {}
        for client, data in calls:
            node = self.door.places.get(client)
            if node is None:
                yield client, self.door.refused.get(client) or "its SuperNode is not there"
                continue
            content = wrapped(data, kind="work", client=client, run=roster.run, units=units)
            sent = push(self.grid, node, WORK, content, ttl=self.deadline)
            if not sent:
                yield client, "the SuperLink did not take its message"
            waiting |= {i: (client, self.after() + self.deadline) for i in sent}
            yield from self._come(waiting)
        while waiting:
            found = list(self._come(waiting))
            yield from found
            if waiting and not found:
                time.sleep(self.poll)

    def _away(self) -> bool:
        """Whether a client of the run has no node: one that is being greeted may be it."""
        return self.door.roster is not None and any(c not in self.door.places for c in self.door.roster.rows)

    def _come(self, waiting: dict[str, tuple[str, float]]) -> Iterator[tuple[str, Reply]]:
        for sent, (client, end) in list(waiting.items()):
            replies = list(self.grid.pull_messages([sent]))
            if replies:
                del waiting[sent]
                data, why = heard(replies[0])
                yield client, why or data
            elif self.after() > end:
                del waiting[sent]
                yield client, f"no answer within {self.deadline:g} s (federated.deadline)"


@dataclass
class Deployed(Federation):
    """A federation whose clients are sites of their own. Its roster is written before the first round."""

    door: Door | None = None
    folder: Path = Path()

    def begun(self, ctx: Context) -> None:
        """The roster is saved, and the door's refusals are among the run's events."""
        assert self.door is not None and self.door.roster is not None
        if Roster.load(self.folder) is None:
            self.door.roster.save(self.folder)
        self.door.logged(ctx.log)
        ctx.log = partial(self._told, ctx.log)

    def _told(self, log: Log, **event: Any) -> None:
        """An event of a round, and a line of it for who waits."""
        assert self.door is not None
        log(**event)
        kind, at = event.get("kind"), f"{event.get('task')}, round {event.get('round')} of {self.spec.rounds}"
        if kind == "round":
            self.door.say(f"{at}: loss {event['loss']:.4f} of {', '.join(event['clients'])}")
        elif kind == "client_left_out":
            self.door.say(f"{at}: without {event['client']}: {event['why']}")


def deployed(
    grid: Any,
    spec: FederatedSpec,
    server: Server,
    stream: Stream,
    folder: Path,
    terms: Terms,
    agreed: str,
    *,
    wait: float,
    say: Callable[[str], None] = lambda text: None,
    poll: float = 1.0,
) -> Deployed:
    """The trainer of a run over a grid, once its clients are there; `folder` is the run's, which may have begun."""
    door = Door(grid, terms, Roster.load(folder), say)
    split = door.gathered(spec.clients, wait, poll).split(spec, stream)

    def connect(model: Model, half: Method, optim: Optim, engine: Engine) -> FlowerTransport:
        return FlowerTransport(grid, door, spec.deadline, poll)

    return Deployed(spec, server, split, connect, agreed, door, folder)


__all__ = ["Deployed", "Door", "FlowerTransport", "Station", "deployed", "flower", "units_of"]
