"""Generate, score, one cell of the matrix: batched greedy answers with per-sample routing.

Batches are fixed by the task alone (sorted by length), never by what was finished before or by the number of
processes, so that an interrupted evaluation ends with the same bytes as an uninterrupted one. A cell's key
hashes all that its answers depend on: a cell whose adapters, mixes and task are those of an earlier one is
copied, not generated.
"""

# B samples of a batch

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from retain.adapters.bank import Mix
from retain.files import append_lines, mend, read_jsonl
from retain.method import Context, Method
from retain.models.base import Model
from retain.models.upcast import half, in_fp32
from retain.run import records
from retain.run.engine import Engine, autocast
from retain.stream import Task
from retain.types import Examples, Lazy, digest
from retain.values import CountOrOff, Size, ranged


@ranged("eval")
@dataclass(frozen=True)
class EvalOptions:
    """How cells are evaluated. `batch_size` changes speed, not answers, where `precision` is `fp32`.

    `precision`: `model` answers in the type that the model was loaded in, `fp32` widens one in half precision for as
    long as it answers, `bf16` is autocast. In half precision rounding depends on the batch, and answers may with it.
    `split`: `test`, or `valid` for choosing a hyper-parameter (never choose on `test`).
    """

    batch_size: Size = 64
    precision: Literal["model", "fp32", "bf16"] = "model"
    thumbnails: CountOrOff = 100
    split: Literal["test", "valid"] = "test"


@dataclass(frozen=True, slots=True)
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
    """The batches of a cell with their mixes. Without a method, or without a router: the bank's mix."""
    tokens = lengths(model, task.test)
    order = sorted(range(len(task.test)), key=lambda i: (tokens[i], i))
    batches = [order[i : i + options.batch_size] for i in range(0, len(order), options.batch_size)]
    if method is None or not method.owns("route"):
        return [(rows, model.adapters.mix) for rows in batches]
    out: Plan = []
    with torch.no_grad():
        for rows in batches:
            mix = method.route(ctx, model.collate([task.test[i] for i in rows], answers=False))
            out.append((rows, model.adapters.mix if mix is None else mix))
    return out


def lengths(model: Model, examples: Examples) -> Sequence[int]:
    """Tokens of every example; of a file's rows counted once for all rows of the matrix."""
    if not isinstance(examples, Lazy):
        return [model.length(e) for e in examples]
    key = (id(model), model.fingerprint())
    if key not in examples.lengths:
        examples.lengths[key] = array("l", map(model.length, examples))
    return examples.lengths[key]


def cell_key(
    model: Model,
    task: Task,
    batches: Plan,
    digests: Mapping[str, str],
    options: EvalOptions,
    data: str | None = None,
) -> str:
    """A hash of all that the answers of a cell depend on: base, task, batches, and the adapters that are on.

    `digests` are those of the bank's adapters; `data` is `task.digest()` where it is known already.
    """

    def told(weights: Mapping[str, float | Tensor]) -> list[Any]:
        return [[name, digests[name], _plain(w)] for name, w in weights.items() if not _off(w)]

    mixes = [[rows, told(m.weights), [[i, told(w)] for i, w in m.by_layer.items()]] for rows, m in batches]
    how: str = options.precision
    if how == "model":
        how = "fp32"  # what folders from before `model` say
    how += " of half" if widens(model, options) else ""
    return digest([model.fingerprint(), data or task.digest(), how, mixes])


def widens(model: Model, options: EvalOptions) -> bool:
    """Whether answers are computed in a wider type than the model's own."""
    return options.precision == "fp32" and bool(half(model))


def evaluate(
    model: Model,
    task: Task,
    batches: Plan,
    options: EvalOptions,
    engine: Engine | None = None,
    part: Path | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Prediction]:
    """Answers and scores for a whole test split, in its order; the same list on every process.

    With `part`, this process appends its answers to `<part><rank>` batch by batch, and batches found whole in
    any `<part>*` (of an interrupted evaluation, with however many processes) are not generated again.
    """
    engine = engine or Engine()
    mine = None if part is None else part.with_name(f"{part.name}{engine.rank}")
    found: dict[str, str] = {}
    if part is not None and mine is not None:
        part.parent.mkdir(parents=True, exist_ok=True)
        mend(mine)
        for file in sorted(part.parent.glob(f"{part.name}*")):
            found |= _saved(file)
    told: dict[int, tuple[str, Mapping[str, float]]] = {}
    wide = in_fp32(model) if widens(model, options) else nullcontext()
    with wide, model.adapters.unchanging():
        for rows, mix in batches[engine.rank :: engine.world]:
            ids = [task.test[i].id for i in rows]
            if all(i in found for i in ids):
                texts = [found[i] for i in ids]
            else:
                texts = _generate(model, task, rows, mix, options)
                if mine is not None:
                    lines = [{"id": i, "prediction": text} for i, text in zip(ids, texts, strict=True)]
                    append_lines(mine, [records.sealed("part", line) for line in lines])
            told |= {i: (text, _weights(mix, k)) for k, (i, text) in enumerate(zip(rows, texts, strict=True))}
            advance(len(rows))
    everyone = {i: row for share in engine.gather(told) for i, row in share.items()}
    whole = [everyone[i] for i in range(len(task.test))]
    return score(task, [text for text, _ in whole], [mix for _, mix in whole])


def _saved(file: Path) -> dict[str, str]:
    """Answers by id that an evaluation under way has left; a changed one is a RetainError."""
    out = {}
    for number, row in enumerate(read_jsonl(file), 1):
        where = f"{file}, line {number}"
        line = records.unsealed("part", records.fits(row, records.Part, where), where)
        out[line["id"]] = line["prediction"]
    return out


def score(
    task: Task, texts: Sequence[str], mixes: Sequence[Mapping[str, float]] | None = None
) -> list[Prediction]:
    """Score the answers of a whole split; also used to score saved predictions again."""
    strict = task.score(texts, task.test)
    compat: Sequence[float | None] = task.compat(texts, task.test) if task.compat else [None] * len(texts)
    return [
        Prediction(
            e.id,
            e.question,
            t,
            e.targets,
            float(s),
            None if c is None else float(c),
            mixes[i] if mixes else None,
        )
        for i, (e, t, s, c) in enumerate(zip(task.test, texts, strict, compat, strict=True))
    ]


def _generate(model: Model, task: Task, rows: Sequence[int], mix: Mix, options: EvalOptions) -> list[str]:
    batch = model.collate([task.test[i] for i in rows], answers=False)
    with torch.no_grad(), autocast(model.device, options.precision), model.adapters.using(mix):
        return model.generate(batch, task.max_new_tokens)


def _off(weight: float | Tensor) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _plain(weight: float | Tensor) -> Any:
    return weight if isinstance(weight, Tensor) and weight.ndim else float(weight)


def _weights(mix: Mix, k: int) -> Mapping[str, float]:
    """The weights above zero that sample k of a batch was answered with, rounded for the file.

    Where only some layers tell the samples apart, theirs.
    """
    layers = (mix.weights, *mix.by_layer.values())
    told = next(
        (ws for ws in layers if any(not isinstance(_plain(w), float) for w in ws.values())), mix.weights
    )
    plain = {name: _plain(w) for name, w in told.items()}
    rounded = {n: round(float(w[k]) if isinstance(w, Tensor) else w, 4) for n, w in plain.items()}
    return {n: w for n, w in rounded.items() if w}
