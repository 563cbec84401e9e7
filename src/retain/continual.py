"""run(): fit a task, evaluate every task, save, next. The same command continues after the last thing that was saved.

    row 0            the base model on every task (zero-shot)
    row i            after stage i: fit ─► TRAINED ─► one cell per task ─► DONE
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from retain.adapters.bank import Mix
from retain.engine import Engine
from retain.evaluate import EvalOptions, Prediction, cell_key, evaluate, plan
from retain.method import Context, Method
from retain.metrics.matrix import AccuracyMatrix
from retain.models.base import Model
from retain.store import Row, RunDir, read_json, read_jsonl, write_json, write_jsonl
from retain.stream import Stream, Task
from retain.train import FitStats, Optim, fit
from retain.types import RetainError, digest


class Watcher(Protocol):
    """What shows progress; `retain.progress.Progress` does it in a terminal."""

    def stage(self, task: str, n_steps: int) -> None: ...
    def step(self, i: int, loss: float) -> None: ...
    def evaluating(self, task: str, n: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def row(self, name: str, scores: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def stage(self, task: str, n_steps: int) -> None: ...
    def step(self, i: int, loss: float) -> None: ...
    def evaluating(self, task: str, n: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def row(self, name: str, scores: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Running:
    """What the parts of a run share, so that their signatures stay short."""

    model: Model
    stream: Stream
    method: Method
    optim: Optim
    options: EvalOptions
    store: RunDir
    engine: Engine
    watch: Watcher
    seed: int
    cells: dict[str, Path]  # key of a finished cell: its predictions


def run(
    model: Model,
    stream: Stream,
    method: Method,
    optim: Optim,
    store: RunDir,
    *,
    seed: int = 0,
    options: EvalOptions | None = None,
    engine: Engine | None = None,
    watch: Watcher | None = None,
) -> AccuracyMatrix:
    """Learn the stream with one method and evaluate every task after every stage.

    Returns the matrix; the folder holds everything else. Raises `RetainError` before any training if the method cannot
    run here (no owner of `adapt`, an engine that hides gradients, duplicate ids).
    """
    engine = engine or Engine()
    r = Running(model, stream, method, optim, options or EvalOptions(), store, engine, watch or Silent(), seed, {})
    stages = check(r)
    with store.locked():
        _describe(r)
        method.reset()
        seen: list[str] = []
        before: Row | None = None
        for index, task in enumerate([None, *stages]):
            row = store.row(index, task.name if task else "zero_shot")
            if task:
                seen += [str(n) for n in _parts(task)]
            if row.done:
                _remember(r, row)
            else:
                _one_row(r, row, task, seen, before)
            before = row if task else None
        matrix = collect(stream, store)
        if engine.main:
            write_json(store.path / "matrix.json", matrix.to_json())
            (store.path / "DONE").touch()
    return matrix


def check(r: Running) -> Sequence[Task]:
    """Everything that can be refused before the first training second; returns the stages."""
    r.engine.check(r.method)
    stages = list(r.method.stages(r.stream))
    if stages and not r.method.owns("adapt"):
        names = [p.name for p in r.method.parts]
        raise RetainError(f"adapt: no part of {names} defines it; put `lora`, `lora_per_task` or another owner first")
    for task in [*stages, *r.stream.all]:
        for split, examples in (("train", task.train), ("test", task.test)):
            ids = [e.id for e in examples]
            if len(set(ids)) != len(ids):
                twice = next(i for i in ids if ids.count(i) > 1)
                raise RetainError(f"task {task.name!r}, {split}: id {twice!r} appears more than once")
    for task in stages:
        if not len(task.train):
            raise RetainError(f"task {task.name!r}: the train split is empty")
    for task in r.stream.all:
        if not len(task.test):
            raise RetainError(f"task {task.name!r}: the test split is empty")
    return stages


def _one_row(r: Running, row: Row, task: Task | None, seen: list[str], before: Row | None) -> None:
    ctx = Context(r.model, task or r.stream[0], r.stream, list(seen), r.seed, log=r.store.event)
    if task is not None:
        if row.trained:
            row.load_model(r.model.adapters, r.method)
        else:
            _train(r, row, ctx, before)
    cells = _evaluate(r, row, task, ctx)
    if r.engine.main:
        write_json(row.path / "cells.json", cells)
        write_json(row.path / "budget.json", _budget(r, row, before, cells))
        row.mark("DONE")
        r.watch.row(row.name, {name: cell["score"] for name, cell in cells.items()})
    r.engine.wait()


def _train(r: Running, row: Row, ctx: Context, before: Row | None) -> None:
    if before is not None:
        before.load_model(r.model.adapters, r.method)
    else:
        _empty(r)
    ctx.seen = [n for n in ctx.seen if n not in _parts(ctx.task)]
    r.watch.stage(ctx.task.name, r.optim.n_steps(len(ctx.task.train)))
    r.store.event(kind="stage", task=ctx.task.name, samples=len(ctx.task.train))
    stats = fit(r.model, r.method, ctx, r.optim, r.engine, row.checkpoints(), r.watch.step)
    ctx.seen += _parts(ctx.task)
    if r.engine.main:
        row.save_model(r.model.adapters, r.method, _cost(r, stats), before)
    r.engine.wait()


def _evaluate(r: Running, row: Row, trained: Task | None, ctx: Context) -> dict[str, Any]:
    """Every task of the stream under the row's model. Finished cells are kept, equal ones are copied."""
    bank, cells = r.model.adapters, {}
    digests = {name: digest(bank.state(name)) for name in bank.names}
    for task in r.stream.all:
        started = time.perf_counter()
        ctx.task = task
        method = r.method if trained is not None else None
        batches = plan(r.model, task, method, ctx, r.options)
        key = cell_key(r.model, task, batches, digests, r.options)
        target = row.predictions(task.name)
        r.watch.evaluating(task.name, len(task.test))
        copied = key in r.cells
        if copied:
            predictions = [Prediction.from_json(p) for p in read_jsonl(r.cells[key])]
        else:
            part = target.with_name(f"{target.stem}.rank{r.engine.rank}.{key}.part")
            predictions = evaluate(r.model, task, batches, r.options, r.engine, part, r.watch.advance)
        if r.engine.main:
            shown = {e.id: r.store.sample(task.name, e) for e in task.test[: r.options.thumbnails]}
            write_jsonl(target, [p.to_json(shown.get(p.id)) for p in predictions])
        for old in target.parent.glob(f"{target.stem}.rank{r.engine.rank}.*.part"):
            old.unlink()
        r.cells[key] = target
        mean = sum(p.score for p in predictions) / len(predictions)
        compat = [p.compat for p in predictions if p.compat is not None]
        seconds = round(time.perf_counter() - started, 3)
        cells[task.name] = {
            "key": key, "score": mean, "n": len(predictions), "copied": copied, "seconds": seconds,
            "compat": sum(compat) / len(compat) if compat else None,
            "tokens": 0 if copied else sum(r.model.length(e) for e in task.test),
        }  # fmt: skip
        r.store.event(kind="cell", row=row.path.name, task=task.name, score=mean, n=len(predictions), copied=copied)
    return cells


def collect(stream: Stream, store: RunDir) -> AccuracyMatrix:
    """The matrix from the folder: per-sample scores of every finished row.

    Stages that are not the stream's tasks (joint training) fill the last row: only what holds for a final model
    is then defined.
    """
    tasks, rows = [t.name for t in stream], [row for row in store.rows() if row.done]
    values: dict[int, Mapping[str, Sequence[float]]] = {}
    for row in rows:
        index = int(row.path.name.split("-", 1)[0])
        joint = index > 0 and len(rows) - 1 < len(tasks) and row.name not in [_plain(t) for t in tasks]
        at = len(tasks) if joint else index
        values[at] = {
            t.name: [p["score"] for p in read_jsonl(row.predictions(t.name))] for t in stream.all
        }
    return AccuracyMatrix.from_scores(tasks, [t.name for t in stream.unseen], values)


def _parts(task: Task) -> list[str]:
    """The stream's tasks that a stage teaches: itself, or those it joins."""
    parts = task.meta.get("parts", [task.name])
    assert isinstance(parts, list | tuple)
    return [str(p) for p in parts]


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def _empty(r: Running) -> None:
    r.model.adapters.mix = Mix()
    for name in list(r.model.adapters.names):
        r.model.adapters.remove(name)


def _remember(r: Running, row: Row) -> None:
    for name, cell in read_json(row.path / "cells.json").items():
        r.cells[cell["key"]] = row.predictions(name)


def _cost(r: Running, stats: FitStats) -> dict[str, Any]:
    trainable = sum(p.numel() for p in r.model.adapters.trainable().values())
    per_token = 4 * r.model.flops_per_token() + 6 * trainable  # forward, gradient of activations, gradient of adapters
    return {**asdict(stats), "trainable_parameters": trainable, "flops": per_token * stats.tokens}


def _budget(r: Running, row: Row, before: Row | None, cells: Mapping[str, Any]) -> dict[str, Any]:
    """What the run has cost up to this row. FLOPs are estimates: 2 per parameter and token forward, 4 with backward."""
    bank = r.model.adapters
    numbers = [p.numel() for name in bank.names for p in bank.parameters(name).values()]
    state = _method_tensors(row)
    fitted = read_json(row.path / "fit.json") if row.trained else {}
    old = read_json(before.path / "budget.json") if before else {}
    eval_s = sum(c["seconds"] for c in cells.values())
    eval_flops = 2 * r.model.flops_per_token() * sum(c["tokens"] for c in cells.values())
    total = {
        "steps": fitted.get("steps", 0), "samples": fitted.get("samples", 0), "tokens": fitted.get("tokens", 0),
        "train_flops": fitted.get("flops", 0.0), "eval_flops": eval_flops,
        "train_s": fitted.get("seconds", 0.0), "eval_s": eval_s, "wall_s": fitted.get("seconds", 0.0) + eval_s,
    }  # fmt: skip
    total = {k: v + old.get(k, 0) for k, v in total.items()}
    peak = torch.cuda.max_memory_allocated() if r.model.device.type == "cuda" else _resident()
    return {
        **total,
        "flops": total["train_flops"] + total["eval_flops"],
        "trainable_parameters": fitted.get("trainable_parameters", old.get("trainable_parameters", 0)),
        "stored_parameters": sum(numbers) + state[0],
        "stored_bytes": 4 * sum(numbers) + state[1],
        "method_state_bytes": state[1],
        "peak_memory_bytes": max(peak, old.get("peak_memory_bytes", 0)),
    }


def _method_tensors(row: Row) -> tuple[int, int]:
    path = row.path / "method.safetensors"
    if not path.is_file():
        return 0, 0
    from safetensors import safe_open

    with safe_open(path, "pt") as f:
        numel = sum(int(torch.tensor(f.get_slice(k).get_shape()).prod()) for k in f.keys())  # noqa: SIM118
    return numel, path.stat().st_size + (row.path / "method.json").stat().st_size


def _resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _describe(r: Running) -> None:
    """Environment and data, once at the start; data that changed since then is refused."""
    if not r.engine.main:
        return
    data = {
        t.name: {"train": len(t.train), "test": len(t.test), "score": t.score.name, "digest": t.digest()}
        for t in r.stream.all
    }
    file = r.store.path / "data.json"
    if file.is_file():
        old = read_json(file)
        changed = [n for n in data if old.get(n, {}).get("digest") != data[n]["digest"]]
        if changed or list(old) != sorted(data):
            raise RetainError(f"{r.store.path}: the data of {changed or 'the stream'} changed since this run began")
    else:
        write_json(file, data)
    if not (r.store.path / "environment.json").is_file():
        write_json(r.store.path / "environment.json", {**environment(), "model": r.model.fingerprint(), "seed": r.seed})


def environment() -> dict[str, Any]:
    """Versions, machine and git state."""
    packages = {}
    for name in ("retain", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed as a package"
    here = Path(__file__).resolve().parent
    git = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "packages": packages,
        "git": git.stdout.strip() or None,
    }  # fmt: skip
