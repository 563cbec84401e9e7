"""Generate, score, one cell of the matrix: batched greedy answers with per-sample routing.

Batches are fixed by the task alone (sorted by length), never by what was finished before, so that an interrupted
evaluation ends with the same bytes as an uninterrupted one. A cell whose adapters, mix and task are those of an earlier
row is copied instead of generated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retain.adapters.bank import Mix
from retain.engine import Engine
from retain.method import Context, Method
from retain.models.base import Model
from retain.store import append_lines, read_jsonl
from retain.stream import Task
from retain.types import Example, RetainError, digest


@dataclass(frozen=True)
class EvalOptions:
    """How cells are evaluated. `batch_size` changes speed, not answers."""

    batch_size: int = 64
    precision: str = "fp32"
    thumbnails: int = 100

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise RetainError(f"eval.batch_size: must be at least 1, not {self.batch_size}")
        if self.precision not in ("fp32", "bf16"):
            raise RetainError(f"eval.precision: {self.precision!r} is none of ['fp32', 'bf16']")


@dataclass(frozen=True)
class Prediction:
    """One answer, its score in 0..100 (and the released scorer's), and the weights it was routed with."""

    id: str
    question: str
    prediction: str
    references: tuple[str, ...]
    score: float
    compat: float | None = None
    mix: Mapping[str, float] | None = None

    def to_json(self, image: str | None) -> dict[str, Any]:
        """One line of a predictions file."""
        return {
            "id": self.id, "question": self.question, "prediction": self.prediction,
            "references": list(self.references), "score": self.score, "compat": self.compat,
            "image": image, "mix": self.mix,
        }  # fmt: skip

    @staticmethod
    def from_json(row: Mapping[str, Any]) -> Prediction:
        """The inverse."""
        fields = ("id", "question", "prediction", "score", "compat", "mix")
        return Prediction(references=tuple(row["references"]), **{k: row[k] for k in fields})


Plan = list[tuple[list[int], Mix]]
"""The batches of a cell: rows of `task.test`, and the mix that each batch runs under."""


def plan(model: Model, task: Task, method: Method | None, ctx: Context, options: EvalOptions) -> Plan:
    """The batches of a cell with their mixes. Without a method: the bare base model (the zero-shot row)."""
    lengths = [model.length(e) for e in task.test]
    order = sorted(range(len(task.test)), key=lambda i: (lengths[i], i))
    batches = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    out: Plan = []
    for rows in batches:
        mix: Mix | None = Mix()
        if method is not None:
            with torch.no_grad():
                mix = method.route(ctx, model.collate([task.test[i] for i in rows], answers=False))
        out.append((rows, model.adapters.mix if mix is None else mix))
    return out


def cell_key(model: Model, task: Task, batches: Plan, digests: Mapping[str, str], options: EvalOptions) -> str:
    """A hash of all that the answers of a cell depend on: task, batches, and the adapters that are on in any mix."""

    def told(weights: Mapping[str, float | Tensor]) -> list[Any]:
        return [[digests[n], w if isinstance(w, Tensor) else float(w)] for n, w in sorted(weights.items()) if _on(w)]

    mixes = [[rows, told(m.weights), {str(i): told(w) for i, w in m.by_layer.items()}] for rows, m in batches]
    return digest([model.fingerprint(), task.digest(), options.precision, mixes])


def evaluate(
    model: Model,
    task: Task,
    batches: Plan,
    options: EvalOptions,
    engine: Engine | None = None,
    part: Path | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Prediction]:
    """Answers and scores for a whole test split, in its order.

    With `part`, answers are appended there batch by batch and whole batches found there are not generated again.
    """
    engine = engine or Engine()
    answers = _earlier(part, task) if part else {}
    mixes: dict[int, Mapping[str, float]] = {}
    if part:
        part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("a", encoding="utf8") if part else nullcontext() as handle:
        for rows, mix in batches[engine.rank :: engine.world]:
            for k, i in enumerate(rows):
                mixes[i] = _told(mix, k)
            if not all(i in answers for i in rows):
                texts = _generate(model, task, rows, mix, options)
                answers.update(zip(rows, texts, strict=True))
                if handle is not None:
                    append_lines(handle, [{"id": task.test[i].id, "prediction": answers[i]} for i in rows])
            advance(len(rows))
    answers = {i: t for share in engine.gather({i: answers[i] for i in mixes}) for i, t in share.items()}
    mixes = {i: m for share in engine.gather(mixes) for i, m in share.items()}
    return score(task, [answers[i] for i in range(len(task.test))], [mixes[i] for i in range(len(task.test))])


def score(task: Task, texts: Sequence[str], mixes: Sequence[Mapping[str, float]] | None = None) -> list[Prediction]:
    """Score the answers of a whole split; also used to score saved predictions again."""
    strict = task.score(texts, task.test)
    compat: Sequence[float | None] = task.compat(texts, task.test) if task.compat else [None] * len(texts)
    return [
        Prediction(e.id, e.question, t, e.targets, float(s), None if c is None else float(c), mixes[i] if mixes else None)
        for i, (e, t, s, c) in enumerate(zip(task.test, texts, strict, compat, strict=True))
    ]


def _generate(model: Model, task: Task, rows: Sequence[int], mix: Mix, options: EvalOptions) -> list[str]:
    examples: list[Example] = [task.test[i] for i in rows]
    cast = torch.autocast(model.device.type, torch.bfloat16) if options.precision == "bf16" else nullcontext()
    with torch.no_grad(), cast, model.adapters.using(mix):
        return model.generate(model.collate(examples, answers=False), task.max_new_tokens)


def _earlier(part: Path, task: Task) -> dict[int, str]:
    if not part.is_file():
        return {}
    whole = part.read_bytes()
    if not whole.endswith(b"\n"):  # a killed process can leave half a line, which the next append would join
        part.write_bytes(whole[: whole.rfind(b"\n") + 1])
    found = {row["id"]: row["prediction"] for row in read_jsonl(part)}
    return {i: found[e.id] for i, e in enumerate(task.test) if e.id in found}


def _on(weight: float | Tensor) -> bool:
    return isinstance(weight, Tensor) or weight != 0


def _told(mix: Mix, k: int) -> Mapping[str, float]:
    """The plain weights that sample k of a batch was answered with, rounded for the file."""
    return {n: round(float(w[k]) if isinstance(w, Tensor) and w.ndim else float(w), 4) for n, w in mix.weights.items()}
