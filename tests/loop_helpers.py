"""What the tests of the loop share: a tiny LLaVA stream, a fit with a spy, and the files that a run must
reproduce.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny
from retain.adapters.bank import Mix
from retain.adapters.kinds import Spec
from retain.method import Context, Method
from retain.metrics.scores import score
from retain.models.hf import HFModel
from retain.run.engine import Engine
from retain.run.store import empty
from retain.run.train import FitStats, Optim, fit
from retain.stream import Stream, Task
from retain.types import Batch, Example, Examples, Message, Output

QUESTIONS = ("What colour is the square?", "left?", "How many shapes are there? one two three")
ANSWERS = ("red", "green blue yellow red green", "two", "yes no left right yes no left")


def example(task: str, i: int) -> Example:
    """Questions and answers of uneven length; a picture that no other example has."""
    k = sum(map(ord, task)) + i
    turns = (Message("user", QUESTIONS[k % 3], 1), Message("assistant", ANSWERS[k % 4]))
    return Example(f"{task}-{i}", turns, (tiny.picture(k),))


def stream(n_train: int = 16, n_test: int = 6) -> Stream:
    """Two tasks."""
    return Stream("tiny", tuple(
        Task(t, [example(t, i) for i in range(n_train)], [example(t, 100 + i) for i in range(n_test)],
        score("exact"), 4) for t in ("second-hand", "first")
    ))  # fmt: skip


@lru_cache(maxsize=4)
def model(spec: Spec = tiny.SPEC) -> HFModel:
    """A tiny LLaVA; shared, so whoever takes it empties its bank."""
    built = tiny.model("llava", spec)
    built.train(False)
    return built


@dataclass
class Spy(Method):
    """One LoRA, and a diary of what the loop did. `term` is the loss it adds."""

    name = "spy"
    term: Callable[[Output], Tensor | float] = lambda out: 0.0

    calls: list[str] = field(init=False, default_factory=list)
    grad: list[dict[str, Tensor]] = field(init=False, default_factory=list)
    labels: list[tuple[tuple[Example, ...], list[int]]] = field(init=False, default_factory=list)

    def adapt(self, ctx: Context) -> Mix:
        self.calls.append("adapt")
        if "lora" not in ctx.model.adapters.names:
            ctx.model.adapters.add("lora", ctx.rng("lora"))
        ctx.model.adapters.train_only("lora")
        return Mix({"lora": 1.0})

    def begin_task(self, ctx: Context) -> None:
        self.calls.append("begin_task")

    def data(self, ctx: Context, examples: Examples) -> Examples:
        self.calls.append("data")
        return examples

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        self.calls.append("loss")
        self.labels.append((batch.examples, out.labels_N.tolist()))
        return self.term(out)

    def grads(self, ctx: Context) -> None:
        self.calls.append("grads")
        self.grad.append(
            {k: p.grad.clone() for k, p in ctx.model.adapters.trainable().items() if p.grad is not None}
        )

    def after_step(self, ctx: Context) -> None:
        live = ctx.model.adapters.trainable().values()
        self.calls.append(
            "after_step" if any(p.grad is not None for p in live) else "after_step without .grad"
        )

    def end_task(self, ctx: Context) -> None:
        self.calls.append("end_task")


@dataclass
class Fitted:
    """What one call of fit left behind."""

    stats: FitStats
    spy: Spy
    events: list[dict[str, Any]]
    state: dict[str, Tensor]
    losses: list[float]


def fitted(optim: Optim, spy: Spy | None = None, on: Any = None, engine: Engine | None = None) -> Fitted:
    """Fit the first task of the tiny stream on a bank that was empty."""
    on, spy, s = on or model(), spy or Spy(), stream()
    empty(on.adapters)
    events: list[dict[str, Any]] = []
    ctx = Context(on, s[0], s, [], seed=0, log=lambda **fields: events.append(fields))
    stats = fit(on, spy, ctx, optim, engine)
    losses = [v for e in events if e["kind"] == "step" for v in e["losses"]]
    return Fitted(stats, spy, events, on.adapters.state("lora"), losses)


def close(a: dict[str, Tensor], b: dict[str, Tensor], rtol: float) -> None:
    """Equal within `rtol` of the largest entry of each tensor."""
    assert list(a) == list(b)
    for key, mine in a.items():
        atol = rtol * float(b[key].abs().max()) + 1e-12
        torch.testing.assert_close(mine, b[key], rtol=0, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


def kept(folder: Path) -> dict[str, bytes]:
    """The files of a run that may not depend on when it was killed, by path; and the loss of every step."""
    names = ("matrix.json", "data.json", "config.yaml", "bank.json", "method.json")
    files = {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
        and (p.name in names or (p.suffix in (".safetensors", ".png", ".jsonl") and p.name != "events.jsonl"))
    }
    return files | {"losses": json.dumps(sorted(losses(folder).items())).encode()}


def losses(folder: Path) -> dict[str, float]:
    """Loss of every step by task and step; of a step told twice the last one."""
    out: dict[str, float] = {}
    for line in (folder / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "step":
            out |= {f"{event['task']}/{event['first'] + i:04d}": v for i, v in enumerate(event["losses"])}
    return out


def remains(folder: Path) -> list[str]:
    """What should not be left: temporary files, parts, checkpoints."""
    return [str(p) for p in folder.rglob("*") if ".part" in p.name or p.name == "checkpoint"]


def texts(predictions: Sequence[Any]) -> list[str]:
    """The answers."""
    return [p.prediction for p in predictions]
