"""A site: one client's half of a round. A message in, a message out; the fit is `retain.run.train.fit`.

    hello   who is there, with how many rows of what                      ─► rows by unit, base model, version
    token   the mean features of the rows of a unit                       ─► two vectors
    train   adapters in, a local fit from the round's weights             ─► adapters out
    close   the stage's final adapters in, the method's `end_task`        ─► the method's state, without what stays

The bank holds what the message says and nothing else, so that a site keeps no adapter between rounds. What a method
keeps for itself (`Method.stays`: a replay buffer, SCAFFOLD's control) is kept in the site's own folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Generator, Tensor

from retain.adapters.bank import Mix
from retain.federated.message import Message
from retain.federated.server import ClientPart, Server, adapters_of, own
from retain.method import Context, Method, Stack
from retain.methods._parts import mean_features
from retain.metrics import score
from retain.models.base import Model
from retain.run.engine import Engine
from retain.run.states import load_state, packed, save_state, unpacked
from retain.run.store import empty
from retain.run.train import Optim, fit, micro_size
from retain.stream import Stream, Task
from retain.types import Examples, Joined, RetainError, digest


class AtHome(Stack):
    """A client's method within one round: it begins as at the stage's start, then the round's weights are put in.

    So a teacher or an anchor is the model before the stage, in whatever round a client joins. `end_task` waits for
    the end of the stage.
    """

    def __init__(self, method: Method, part: ClientPart | None, now: Mapping[str, Tensor]) -> None:
        super().__init__(*([method] if part is None else [method, part]))
        self._method, self._part, self._now = method, part, now

    def begin_task(self, ctx: Context) -> None:
        self._method.begin_task(ctx)
        write(ctx.model, self._now)
        if self._part is not None:
            self._part.begin_task(ctx)

    def end_task(self, ctx: Context) -> None:
        """Nothing: a round is not the end of a task."""


@dataclass
class Kept:
    """What a site keeps for itself, by stage and round: the newest two, since a round may have to be done again."""

    path: Path

    def load(self, before: tuple[int, int]) -> dict[str, Any]:
        """The newest state of an earlier round; empty where there is none."""
        found = [k for k in self._all() if k < before]
        state: dict[str, Any] = load_state(self.path / _name(found[-1])) if found else {}
        return state

    def save(self, at: tuple[int, int], state: Mapping[str, Any]) -> None:
        """Keep the state of a round, whole or not at all; a round that is done again replaces what it left."""
        for old in [k for k in self._all() if k >= at]:
            self._remove(old)
        save_state(self.path / _name(at), dict(state))
        for old in self._all()[:-2]:
            self._remove(old)

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _all(self) -> list[tuple[int, int]]:
        names = [p.stem.split("-") for p in self.path.glob("[0-9]*-[0-9]*.json")]
        return sorted((int(a), int(b)) for a, b in names)

    def _remove(self, at: tuple[int, int]) -> None:
        for suffix in (".json", ".safetensors"):
            (self.path / f"{_name(at)}{suffix}").unlink(missing_ok=True)


def _name(at: tuple[int, int]) -> str:
    return f"{at[0]:04d}-{at[1]:06d}"


CLOSE = 10**6 - 1
"""Stands for a round's number at the end of a stage: after all rounds."""


@dataclass
class Site:
    """One client: its rows by unit, its model (shared in one process), its method and where it keeps its own state."""

    client: str
    model: Model
    method: Method
    server: Server
    optim: Optim
    rows: Callable[[str], Examples]  # the training rows of a unit; none is empty
    kept: Kept
    engine: Engine = field(default_factory=Engine)
    recipe: str = ""  # digest of what server and clients must agree on
    _before: str = field(init=False, default="")

    def answer(self, call: Message) -> Message:
        """Do what a message asks. RetainError where that cannot be done."""
        head = call.head
        if head.get("recipe") != self.recipe:
            raise RetainError(
                f"client {self.client!r}: the server runs another recipe or version of retain than this site"
            )
        kinds = {"token": self._token, "train": self._train, "close": self._close}
        if head.get("kind") not in kinds:
            raise RetainError(
                f"client {self.client!r}: the server asks for {head.get('kind')!r:.40}, which is unknown here"
            )
        told = {
            "kind": head["kind"],
            "client": self.client,
            "base": self.model.fingerprint(),
            "recipe": self.recipe,
        }
        asked = {k: head[k] for k in ("stage", "round")}
        self.model.train(False)  # a fresh model's dropout may be on
        answer = kinds[head["kind"]](call)
        return Message({**told, **asked, **answer.head}, answer.tensors)

    # -- the three things a site does ------------------------------------------------------------------------

    def _token(self, call: Message) -> Message:
        ctx = self._context(call)
        image_F, text_D = mean_features(ctx, range(len(ctx.task.train)))
        return Message({"n": len(ctx.task.train)}, {"image": image_F.float(), "text": text_D.float()})

    def _train(self, call: Message) -> Message:
        ctx, bank = self._context(call), self.model.adapters
        part = self._begin(call)
        channels: dict[str, dict[str, Tensor]] = {}
        for key, tensor in call.part("x").items():
            channel, _, name = key.partition("@")
            channels.setdefault(channel, {})[name] = tensor
        if part is not None:
            part.received(channels)
        losses: list[float] = []
        at_home = AtHome(self.method, part, call.part("now"))
        stats = fit(
            self.model, at_home, ctx, self.optim, self.engine, None, lambda _, loss: losses.append(loss)
        )
        tensors = {f"w/{k}": p.detach().clone() for k, p in bank.trainable().items()}
        if part is not None:
            given = part.given(ctx)
            tensors |= {f"w/{c}@{k}": t for c, found in given.items() for k, t in found.items()}
        self._keep(call, part)
        told = {k: v for k, v in asdict(stats).items() if k not in ("trained", "reused", "seconds")}
        return Message({"n": len(ctx.task.train), "stats": told}, tensors)

    def _close(self, call: Message) -> Message:
        ctx = self._context(call)
        part, bank = self._begin(call), self.model.adapters
        bank.mix = self.method.adapt(ctx)
        before = {n: digest(bank.state(n)) for n in bank.names}
        self.method.end_task(ctx)
        if before != {n: digest(bank.state(n)) for n in bank.names}:
            raise RetainError(
                f"method {self.method.name!r}: end_task changes adapters, which is lost on a client; a method that needs no "
                "data for it says ends_alone = True, and the server does it"
            )
        told, _ = self.method.parted(self.method.state_dict())
        skeleton, tensors = packed(told, self.method.name)
        self._keep(call, part)
        head = {"n": len(ctx.task.train), "state": skeleton, "mix": bank.mix.to_json()}
        return Message(head, {f"s/{k}": t for k, t in tensors.items()})

    # -- what they share -------------------------------------------------------------------------------------

    def _context(self, call: Message) -> Context:
        head = call.head
        parts = [self.rows(str(u)) for u in head["units"]]
        rows = parts[0] if len(parts) == 1 else Joined(*parts)
        if not len(rows):
            raise RetainError(f"client {self.client!r} has no row of {head['units']}")
        task = Task(head["stage"], rows, (), score("exact"))
        ctx = Context(self.model, task, Stream("site", (task,)), list(head["seen"]), int(head["seed"]))
        ctx.batch_size, ctx.turns = self.optim.batch_size, self.optim.turns
        ctx.micro_size = micro_size(self.optim, self.engine)
        return ctx

    def _begin(self, call: Message) -> ClientPart | None:
        """Bank and method as the message says, and what this site kept for itself."""
        bank, head = self.model.adapters, call.head
        start = call.part("start")
        names = [str(n) for n in head["names"]]
        if bank.names != names:  # their order is the order of sums
            empty(bank)
            for name in names:
                bank.add(name, Generator(), paths={k.rpartition(".")[0] for k in own(start, name)})
        write(self.model, start)
        bank.mix = Mix.from_json(head["mix"])
        kept, part = self.kept.load((int(head["index"]), int(head["round"]))), self.server.part()
        told = unpacked(head["state"], call.part("s"), f"the server's message to {self.client!r}")
        self.method.load_state_dict(self.method.whole(told, kept.get("method", {})))
        if part is not None:
            part.load_state_dict(part.whole({}, kept.get("part", {})))
        self._before = digest(self._mine(part))
        return part

    def _mine(self, part: ClientPart | None) -> dict[str, Any]:
        _, method = self.method.parted(self.method.state_dict())
        return {"method": method, "part": {} if part is None else part.parted(part.state_dict())[1]}

    def _keep(self, call: Message, part: ClientPart | None) -> None:
        mine = self._mine(part)
        if digest(mine) != self._before:  # unchanged is not written again
            self.kept.save((int(call.head["index"]), int(call.head["round"])), mine)


def write(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Adapters by `adapter/site.tensor` into the bank."""
    for name in adapters_of(weights):
        model.adapters.load(name, own(weights, name))
