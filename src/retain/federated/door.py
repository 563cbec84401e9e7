"""Who takes part in a deployed run: what a site says of itself, what it must say to be let in, and who is remembered.

    hello ─► Card (name, rows by unit, base, recipe, version, clock) ─► Terms.refusal ─► Roster, kept with the run

Nothing here knows how messages travel. The roster is made once, when a run begins: who is sampled, and the seeds of
their fits, depend on it. A site that is away later is a client that does not answer; one that was not there at the
beginning waits for another run. Names are what sites claim: who may claim one is decided by the keys of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from retain.federated.message import Message, words
from retain.federated.spec import FederatedSpec
from retain.federated.split import Split, Unit, plan
from retain.files import read_record, write_json
from retain.plain import near
from retain.stream import Stream
from retain.types import RetainError

CLOCK = 60.0
"""Seconds by which two clocks may differ: certificates, signatures and deadlines are compared by them."""

FILE = "federation.json"
"""The roster in a run's folder."""


@dataclass(frozen=True)
class Card:
    """What a site says of itself. `rows`: training rows by task or unit; `site`: an id that its own folder keeps."""

    client: str
    site: str
    version: str
    agreed: Mapping[str, str]
    base: str
    rows: Mapping[str, int]
    time: float

    def to_bytes(self) -> bytes:
        """As a message."""
        return Message({"kind": "hello", **asdict(self)}).to_bytes()

    @staticmethod
    def from_bytes(data: bytes, who: str) -> Card:
        """The inverse, of a stranger's bytes. RetainError where they are no card."""
        head = words(data, who)
        texts: dict[str, Any] = {k: head.get(k) for k in ("client", "site", "version", "base")}
        agreed: Any = head.get("agreed")
        rows: Any = head.get("rows")
        clock: Any = head.get("time")
        fits = (
            all(isinstance(t, str) and 0 < len(t) <= 200 for t in texts.values())
            and _mapping(agreed, str)
            and _mapping(rows, int)
            and isinstance(clock, float)
        )
        if not fits or any(not 0 <= n < 2**40 for n in rows.values()):
            raise RetainError(f"{who}: what it says of itself is of another form")
        return Card(**texts, agreed=agreed, rows=rows, time=clock)


def _mapping(value: Any, of: type) -> bool:
    if not isinstance(value, dict) or len(value) > 10_000:
        return False
    return all(isinstance(v, of) and not isinstance(v, bool) for v in value.values())


@dataclass(frozen=True)
class Terms:
    """What a site must have like the server: the version, each part of the recipe, the base model; and the units."""

    version: str
    agreed: Mapping[str, str]
    base: str
    units: Mapping[str, tuple[str, ...]]

    def refusal(self, card: Card, sent: float, got: float) -> str:
        """Why a site is not let in; "" where it is. It was asked and answered between two times of the server."""
        if card.version != self.version:
            return f"it runs retain {card.version}, and the server {self.version}"
        other = [k for k in self.agreed if card.agreed.get(k) != self.agreed[k]]
        if other:
            return f"its recipe differs from the server's in {', '.join(other)}"
        if card.base != self.base:
            return f"it has another base model ({card.base:.60}, not {self.base:.60})"
        known = [*self.units, *(t for tasks in self.units.values() for t in tasks)]
        for name in card.rows:
            if name not in known:
                return f"it has rows of {name!r:.80}, which is no task of the recipe{near(name, known)}"
        if not any(card.rows.values()):
            return "it has no row of any task"
        off = max(card.time - got, sent - card.time, 0.0)
        if off > CLOCK:
            return f"its clock is {off:.0f} s {'ahead of' if card.time > got else 'behind'} the server's; set both"
        return ""

    def rows(self, card: Card) -> dict[str, int]:
        """Its rows by unit: those of the unit, else those of its tasks."""
        return {
            unit: card.rows.get(unit, sum(card.rows.get(t, 0) for t in tasks if t != unit))
            for unit, tasks in self.units.items()
        }


@dataclass(frozen=True)
class Roster:
    """The clients of a run: rows by client and unit, the id of each one's site, and an id of the run itself."""

    rows: Mapping[str, Mapping[str, int]]
    sites: Mapping[str, str]
    run: str = field(default_factory=lambda: uuid4().hex)

    def split(self, spec: FederatedSpec, stream: Stream) -> Split:
        """As a split: clients by name, rows as if the files of all sites stood behind each other.

        RetainError for a unit of which nobody has rows.
        """
        units, stages = plan(spec, stream)
        clients = tuple(sorted(self.rows))
        for unit in dict.fromkeys(u for stage in stages for u in stage.units):
            if not any(self.rows[c].get(unit) for c in clients):
                raise RetainError(f"no client has a row of {unit!r}; there are {', '.join(clients)}")
        rows = {}
        for u in units:
            counts, at = {c: self.rows[c].get(u.name, 0) for c in clients}, 0
            rows[u.name] = dict[str, tuple[tuple[str, int], ...]]()
            for c in [c for c in clients if counts[c]]:
                rows[u.name][c] = tuple((u.name, i) for i in range(at, at + counts[c]))
                at += counts[c]
        return Split(units, stages, clients, rows)

    def refusal(self, client: str, site: str, rows: Mapping[str, int]) -> str:
        """Why a site cannot take part in the run as it began; "" where it can."""
        if client not in self.rows:
            return f"it was not there when the run began, with {', '.join(sorted(self.rows))}"
        if self.sites[client] != site:
            return "another site had this name when the run began (is its folder, --keep, another one?)"
        changed = [u for u, n in self.rows[client].items() if rows.get(u, 0) != n]
        if changed:
            before, now = self.rows[client][changed[0]], rows.get(changed[0], 0)
            return f"it has {now} rows of {changed[0]!r}, and had {before} when the run began"
        return ""

    def save(self, folder: Path) -> None:
        """Into the run's folder."""
        write_json(folder / FILE, asdict(self))

    @staticmethod
    def load(folder: Path) -> Roster | None:
        """That of a run which has begun."""
        if not (folder / FILE).is_file():
            return None
        found = read_record(folder / FILE, "rows", "sites", "run")
        return Roster(found["rows"], found["sites"], found["run"])


def units_of(units: tuple[Unit, ...]) -> dict[str, tuple[str, ...]]:
    """Tasks by unit."""
    return {u.name: tuple(u.tasks) for u in units}
