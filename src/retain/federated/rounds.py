"""The coordinator: what happens in a round, whatever carries the messages.

    for each round:   sample clients ─► (tokens) ─► place ─► send ─► local fits ─► admit ─► aggregate ─► save
    stage's end:      close (what the method learns of the data at a task's end) ─► deploy ─► one row of the matrix

`Federation` takes the place of `retain.run.train.fit` in `retain.run.continual.run`. A round is saved when it is whole:
a run that was killed anywhere continues with the first round that is not, and ends with the same bytes. Randomness
belongs to (seed, stage, round, client): the first client's first round has the run's own seed, so that one client with
one round is the central run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from torch import Generator, Tensor

from retain.adapters.bank import Mix
from retain.federated.admit import Ending, Expected, admitted, outliers, unlike
from retain.federated.message import Message
from retain.federated.places import seats
from retain.federated.server import ClientInfo, Crowd, Server, ServerState, Update, adapters_of, own
from retain.federated.site import CLOSE
from retain.federated.spec import FederatedSpec
from retain.federated.split import Split, Stage
from retain.method import Context, Method
from retain.methods.disco import Token
from retain.models.base import Model
from retain.run.engine import Engine, peak_memory
from retain.run.sound import broken
from retain.run.states import packed, unpacked
from retain.run.store import empty
from retain.run.train import Checkpoints, FitStats, Optim, Tuned
from retain.signals import Stop
from retain.stream import Stream, Task
from retain.types import Joined, RetainError

Reply = bytes | str
"""A client's message, or why there is none."""


class Transport(Protocol):
    """What carries messages between a server and its clients."""

    def ask(self, calls: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, Reply]]:
        """Give each client its message; every client answers once, in any order, with a message or a reason.

        A message is made when it is taken, so that not all of them need be in memory.
        """
        ...


@dataclass
class RoundStats(FitStats):
    """What a stage took, over all clients; `sent` and `received` are bytes of messages as the server sees them."""

    rounds: int = 0
    fits: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Federation:
    """A federated run's `fit`. `connect` gives the transport for a model; `split` says who has what, and the stages."""

    spec: FederatedSpec
    server: Server
    split: Split
    connect: Callable[[Model, Method, Optim, Engine], Transport]
    recipe: str = ""  # digest of what server and clients must agree on

    # -- in place of the central loop ------------------------------------------------------------------------

    def stages(self, method: Method, stream: Stream) -> list[Task]:
        """One task per stage: its rows are those of its units, over all clients."""
        return [self._task(stage, stream) for stage in self.split.stages]

    def _task(self, stage: Stage, stream: Stream) -> Task:
        names = self.split.taught(stage)
        taught = [t for t in stream if t.name in names]
        first = taught[0]
        train = first.train if len(taught) == 1 else Joined(*(t.train for t in taught))
        return Task(stage.name, train, first.test, first.score, first.max_new_tokens,
                    meta={"parts": [t.name for t in taught]})  # fmt: skip

    def n_steps(self, task: Task, optim: Optim) -> int:
        """Steps of all clients in a stage, about: who is selected decides."""
        stage = next(s for s in self.split.stages if s.name == task.name)
        each = [optim.n_steps(n) for unit in set(stage.units) for n in self.split.counts(unit).values() if n]
        return round(self.spec.rounds * self.spec.per_round * sum(each) / len(each))

    def check(self, model: Model, method: Method, stream: Stream, engine: Engine) -> None:
        """Refuse what cannot work, before anything is written."""
        if engine.world > 1:
            raise RetainError(
                "federated: it runs in one process here; start without a launcher, or deploy it on Flower"
            )
        self.server.check(method)

    def begun(self, ctx: Context) -> None:
        """A stage begins: for a deployment, which has a roster to keep."""

    def setting(self) -> dict[str, Any]:
        """What decides the numbers, for setting.json."""
        return {"server": {self.server.name: asdict(self.server)}, "split": self.split.digest()}  # type: ignore[call-overload]

    def fit(
        self,
        model: Model,
        method: Method,
        ctx: Context,
        optim: Optim,
        engine: Engine | None = None,
        checkpoints: Checkpoints | None = None,
        on_step: Callable[[int, float], None] = lambda step, loss: None,
        tuned: Tuned | None = None,
        stop: Stop | None = None,
    ) -> FitStats:
        """All rounds of one stage; leaves bank and method as after the task.

        A whole round is saved, and nothing within one: `optim.checkpoint_every`, `tuned` and `stop` do not act here.
        """
        engine = engine or Engine()
        self.begun(ctx)
        half = self.server.client(method)
        stage = StageRun(
            self, model, method, half, ctx, self.connect(model, half, optim, engine), checkpoints
        )
        return stage.run(on_step)


@dataclass
class StageRun:
    """One stage under way."""

    fed: Federation
    model: Model
    method: Method
    half: Method
    ctx: Context
    transport: Transport
    checkpoints: Checkpoints | None
    stats: RoundStats = field(default_factory=RoundStats)
    widths: tuple[int, int] | None = None
    tokens: dict[str, Token] = field(default_factory=dict)  # by client and unit
    made: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # this stage's adapters, as they began
    met: dict[str, list[str]] = field(
        default_factory=dict
    )  # who answered in this stage, and with which units

    def run(self, on_step: Callable[[int, float], None]) -> RoundStats:
        """The rounds, then the stage's end."""
        fed, ctx, started = self.fed, self.ctx, time.perf_counter()
        names = [s.name for s in fed.split.stages]
        self.index = names.index(ctx.task.name)
        self.stage = fed.split.stages[self.index]
        self._begin()
        state, first = fed.server.begin(ctx, self.method), 0
        if saved := self.checkpoints.load() if self.checkpoints else None:
            state, first = self._restore(saved)
            started -= self.stats.seconds
        for r in range(first, fed.spec.rounds):
            state, loss = self._round(r, state)
            self.stats.seconds = time.perf_counter() - started
            if self.checkpoints:
                self.checkpoints.save(self._snapshot(state, r + 1))
            on_step(self.stats.steps, loss)
        self._end(state)
        self.stats.seconds = time.perf_counter() - started
        self.stats.peak_memory_bytes = max(self.stats.peak_memory_bytes, peak_memory(self.model.device))
        return self.stats

    # -- beginning and end -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """The bank as the stage begins, and what clients get of it."""
        bank = self.model.adapters
        self.mix = bank.mix.to_json()  # before the stage: how a teacher answers
        self.needs_start = self.half.owns("begin_task") or any(p.asks_before for p in self.half.parts)
        if self.fed.server.whole_bank:
            bank.mix = self.method.adapt(self.ctx)
        self.start, self.on = {n: bank.state(n) for n in bank.names}, bank.mix
        self.trains = adapters_of(bank.trainable())
        told, _ = self.half.parted(self.half.state_dict())
        self.state = packed(told, self.half.name)

    def _own(self) -> None:
        """Bank and method as the server had them: clients in this process share both."""
        bank = self.model.adapters
        if bank.names != list(self.start):
            empty(bank)
            for name, tensors in self.start.items():
                bank.add(name, Generator(), paths={k.rpartition(".")[0] for k in tensors})
        for name, tensors in self.start.items():
            bank.load(name, tensors)
        bank.train_only(*self.trains)
        bank.mix = self.on
        told = unpacked(*self.state, self.half.name)
        self.half.load_state_dict(self.half.whole(told, {}))

    def _end(self, state: ServerState) -> None:
        fed, bank = self.fed, self.model.adapters
        self._own()
        fed.server.deploy(state, self.ctx, self.method)
        if bad := broken({f"adapter {n}": dict(bank.parameters(n)) for n in bank.names}):
            raise RetainError(
                f"stage {self.ctx.task.name!r}: {bad[0]} is not finite; nothing of it was saved"
            )
        self.stats.trained = adapters_of(state.weights)
        owners = [p for p in self.half.parts if p.owns("end_task")]
        if not owners:
            return
        if all(p.ends_alone for p in owners):
            self.half.end_task(self.ctx)
            return
        self._close(state)

    def _close(self, state: ServerState) -> None:
        """What the method learns of the data at a stage's end: on every client that took part, then joined."""
        fed, bank = self.fed, self.model.adapters
        names = adapters_of(state.weights)
        calls = {
            c: partial(self._call, "close", c, units, CLOSE, state, names) for c, units in self.met.items()
        }
        expected, found = self._expected(CLOSE, "close"), dict[str, Ending]()
        for client, reply in self._ask(calls):
            ending, why = expected.ending(client, reply, self.half)
            if ending is None:
                self._refused(CLOSE, client, why)
            else:
                found[client] = ending
        weights = {c: float(sum(self._n(c, u) for u in self.met[c])) for c in found}
        for client, why in unlike(found, weights, self.half).items():
            self._refused(CLOSE, client, why)
            del found[client]
        if not found:
            raise RetainError(
                f"stage {self.ctx.task.name!r}: no client answered at its end ({self.last}); start the run again to go on"
            )
        self._own()
        fed.server.deploy(state, self.ctx, self.method)
        joined = self.half.joined([e.state for e in found.values()], [weights[c] for c in found])
        self.half.load_state_dict(self.half.whole(joined, {}))
        bank.mix = Mix.from_json(next(iter(found.values())).mix)

    # -- a round ---------------------------------------------------------------------------------------------

    def _round(self, r: int, state: ServerState) -> tuple[ServerState, float]:
        fed, began = self.fed, time.perf_counter()
        sent, received = self.stats.sent, self.stats.received
        selected = seats(fed.spec, fed.split, self.index, r, self.ctx.seed)
        infos = self._infos(r, selected, state)
        if not infos:
            raise RetainError(
                f"{self._at(r)}: none of {list(selected)} answered; start the run again to go on"
            )
        if not fed.server.whole_bank:  # it may make new adapters
            self._own()
        state, who = fed.server.place(state, infos, self.ctx)
        for name in [n for n in adapters_of(state.weights) if n not in self.start]:
            self.start[name] = self.made[name] = own(state.weights, name)
        units = dict(selected)
        given = {i.client: fed.server.send(state, i, who[i.client]) for i in infos}
        calls = {
            c: partial(self._call, "train", c, [units[c]], r, state, who[c], tensors)
            for c, tensors in given.items()
        }
        with self._spool() as folder:
            updates, losses = self._answers(r, calls, given, units, folder)
            if not updates:
                raise RetainError(
                    f"{self._at(r)}: no client's answer could be used ({self.last}); start the run again to go on"
                )
            state = fed.server.aggregate(state, updates)
        if bad := broken(dict(state.weights)):
            raise RetainError(
                f"{self._at(r)}: the aggregate of {bad[0]!r} is not finite; the round before is kept"
            )
        n = {u.client: u.n for u in updates}
        loss = sum(losses[c] * n[c] for c in n) / sum(n.values())
        for client in n:
            trained = self.met.setdefault(client, [])
            trained += [units[client]] if units[client] not in trained else []
        self.stats.rounds, self.stats.last_loss = r + 1, loss
        self.ctx.log(kind="step", task=self.ctx.task.name, step=self.stats.steps, loss=loss, losses=[loss],
                     first=self.stats.steps, lr={})  # fmt: skip
        self.ctx.log(
            kind="round", task=self.ctx.task.name, round=r + 1, clients=n, units={c: units[c] for c in n}, loss=loss,
            losses={c: losses[c] for c in n}, sent=self.stats.sent - sent, received=self.stats.received - received,
            round_s=round(time.perf_counter() - began, 3), **fed.server.told(state),
        )  # fmt: skip
        return state, loss

    def _infos(self, r: int, selected: Sequence[tuple[str, str]], state: ServerState) -> list[ClientInfo]:
        """What is known of them, their tokens asked for where the server needs them."""
        asks = self.fed.server.asks_token
        units = {c: u for c, u in selected if asks and f"{c}/{u}" not in self.tokens}
        calls = {c: partial(self._call, "token", c, [u], r, state, []) for c, u in units.items()}
        for client, reply in self._ask(calls):
            token, why = self._expected(r, "token").token(
                client, reply, self._n(client, units[client]), self._widths()
            )
            if token is None:
                self._refused(r, client, why)
            else:
                self.tokens[f"{client}/{units[client]}"] = token
        infos = [
            ClientInfo(c, self._n(c, u), self.tokens.get(f"{c}/{u}"), self._crowd(u)) for c, u in selected
        ]
        return [i for i in infos if i.token is not None or not asks]

    def _crowd(self, unit: str) -> Crowd:
        """Among whom a client of this unit was drawn."""
        counts = self.fed.split.counts(unit)
        one = len(set(self.stage.units)) == 1
        there = sum(1 for n in counts.values() if n) if one else len(self.fed.split.clients)
        return Crowd(there, min(self.fed.spec.per_round, there), sum(counts.values()))

    def _answers(
        self,
        r: int,
        calls: Mapping[str, Callable[[], bytes]],
        given: Mapping[str, Any],
        units: Mapping[str, str],
        folder: Path,
    ) -> tuple[list[Update], dict[str, float]]:
        """The usable updates, in the order in which clients were selected, and their last losses."""
        expected, found, losses = self._expected(r, "train"), dict[str, Update](), dict[str, float]()
        norms = dict[str, dict[str, float]]()
        for client, reply in self._ask(calls):
            head, why = expected.words(client, reply)
            if head is not None and isinstance(reply, bytes):
                path = folder / f"{len(found):06d}-{len(norms)}.safetensors"
                path.write_bytes(reply)
                file, why, sizes = admitted(path, given[client], self.fed.server.channels)
                if file is not None:
                    n = self._n(client, units[client])
                    found[client], norms[client] = Update(client, n, file), sizes
                    losses[client] = self._count(head)
                    continue
            self._refused(r, client, why)
        bound = 0.0 if self.fed.server.bounded else self.fed.spec.outlier
        for channel in ("", *self.fed.server.channels):
            each = {c: norms[c][channel] for c in found}
            for client, why in outliers(each, bound, channel or "update").items():
                self._refused(r, client, why)
                del found[client]
        return [found[c] for c in calls if c in found], losses

    def _count(self, head: Mapping[str, Any]) -> float:
        """Add what a client's fit took."""
        told, s = head["stats"], self.stats
        for key in ("steps", "samples", "tokens"):
            setattr(s, key, getattr(s, key) + int(told[key]))
        s.fits += 1
        s.trainable_parameters = max(s.trainable_parameters, int(told["trainable_parameters"]))
        s.peak_memory_bytes = max(s.peak_memory_bytes, int(told["peak_memory_bytes"]))
        return float(told["last_loss"])

    def _ask(self, calls: Mapping[str, Callable[[], bytes]]) -> Iterator[tuple[str, Reply]]:
        """Every client's reply, once; bytes are counted as they pass."""
        waiting = set(calls)

        def each() -> Iterator[tuple[str, bytes]]:
            for client, make in calls.items():
                data = make()
                self.stats.sent += len(data)
                yield client, data

        for client, reply in self.transport.ask(each()) if calls else ():
            if client in waiting:  # a second answer of one client is none
                waiting.remove(client)
                self.stats.received += len(reply) if isinstance(reply, bytes) else 0
                yield client, reply
        for client in sorted(waiting):
            yield client, "no answer"

    def _call(
        self, kind: str, client: str, units: Sequence[str], r: int, state: ServerState, names: Sequence[str],
        given: Mapping[str, Any] | None = None,
    ) -> bytes:  # fmt: skip
        """A message to a client. What it has at the stage's start is sent apart only where the method looks at it."""
        ctx, fed = self.ctx, self.fed
        skeleton, tensors = self.state
        k = fed.split.clients.index(client)
        at = 0 if kind != "train" else r
        head: dict[str, Any] = {
            "kind": kind, "recipe": fed.recipe, "stage": ctx.task.name, "index": self.index, "round": r,
            "units": list(units),
            "seed": ctx.seed + 7919 * (at * len(fed.split.clients) + k), "seen": list(ctx.seen),
        }  # fmt: skip
        if kind == "token":
            return Message(head).to_bytes()
        names = list(self.start) if fed.server.whole_bank else list(names)
        begin = {f"{n}/{k}": t for n in names for k, t in self.start[n].items()}
        current = {k: t for k, t in (state.weights if given is None else given).items() if "@" not in k}
        channels = {k: t for k, t in (given or {}).items() if "@" in k}
        apart = kind == "train" and r > 0 and self.needs_start
        start, now = (begin, current) if apart else ({**begin, **current}, {})
        parts = {"start": start, "now": now, "x": channels, "s": tensors}
        flat = {f"{part}/{k}": t for part, found in parts.items() for k, t in found.items()}
        return Message({**head, "names": names, "mix": self.mix, "state": skeleton}, flat).to_bytes()

    # -- small things ----------------------------------------------------------------------------------------

    def _expected(self, r: int, kind: str) -> Expected:
        return Expected(self.fed.recipe, self.model.fingerprint(), kind, self.ctx.task.name, r)

    def _widths(self) -> tuple[int, int]:
        """Of the features that tokens are means of, by the server's own model."""
        if self.widths is None:
            guide = self.model.guide(self.model.collate([self.ctx.task.test[0]], answers=False))
            self.widths = guide.image_BF.shape[1], guide.text_BD.shape[1]
        return self.widths

    def _n(self, client: str, unit: str) -> int:
        return self.fed.split.counts(unit)[client]

    def _at(self, r: int) -> str:
        return f"stage {self.ctx.task.name!r}, round {r + 1} of {self.fed.spec.rounds}"

    def _refused(self, r: int, client: str, why: str) -> None:
        self.last = f"client {client!r}: {why}"
        at = "close" if r == CLOSE else r + 1
        self.ctx.log(kind="client_left_out", task=self.ctx.task.name, round=at, client=client, why=why)

    @contextmanager
    def _spool(self) -> Iterator[Path]:
        """A folder for a round's answers, on the run's own disk; what a killed round left is swept."""
        if self.checkpoints is None:
            with TemporaryDirectory(prefix="retain-round-") as folder:
                yield Path(folder)
            return
        path = self.checkpoints.path.parent / "answers.part"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _snapshot(self, state: ServerState, done: int) -> dict[str, Any]:
        tokens = {k: {"image": t.image_F, "text": t.text_D, "n": t.n} for k, t in self.tokens.items()}
        server = {"weights": dict(state.weights), "memory": dict(state.memory)}
        rounds = {k: v for k, v in asdict(self.stats).items() if k in ("rounds", "fits", "sent", "received")}
        stats = {k: v for k, v in asdict(self.stats).items() if k not in rounds}
        return {
            "stats": stats, "adapters": {}, "method": {}, "optimizer": {}, "federated": rounds, "server": server,
            "tokens": tokens, "met": self.met, "made": self.made, "round": done,
        }  # fmt: skip

    def _restore(self, saved: Mapping[str, Any]) -> tuple[ServerState, int]:
        """As the last whole round left it."""
        self.stats = RoundStats(**saved["stats"], **saved["federated"])
        self.tokens = {k: Token(t["image"], t["text"], t["n"]) for k, t in saved["tokens"].items()}
        self.met = {c: list(units) for c, units in saved["met"].items()}
        self.made = dict(saved["made"])
        self.start |= self.made
        state = ServerState(saved["server"]["weights"], saved["server"]["memory"])
        return state, int(saved["round"])
