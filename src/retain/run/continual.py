"""run(): fit a task, evaluate every task, save, next. The same command continues where it was stopped.

    row 0            the base model on every task (zero-shot)
    row i            after stage i: fit ─► TRAINED ─► one cell per task ─► DONE

A stage starts from the row before as it was saved, and is evaluated as it was saved. So it does not matter
which process did the work before, and a run that was killed ends with the same bytes as one that was not.
"""

from __future__ import annotations

import ast
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from retain.adapters.prompt import tokens_in_front
from retain.files import utf8, write_text
from retain.method import Context, Method
from retain.metrics.matrix import AccuracyMatrix
from retain.models.base import Model
from retain.run import records
from retain.run.engine import Engine, peak_memory
from retain.run.evaluate import EvalOptions, cell_key, evaluate, lengths, plan, score, widens
from retain.run.store import Row, RunDir, TunedDir, differences, empty, safe
from retain.run.train import FitStats, Optim
from retain.run.trainer import Central, Trainer
from retain.signals import Stop
from retain.stream import Stream, Task
from retain.types import Examples, RetainError, digest, most_answers, plain
from retain.values import written

PACKAGES = ("retain", "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow")


class Watcher(Protocol):
    """What shows progress; `retain.run.progress.Progress` does it in a terminal."""

    def stage(self, task: str, n_steps: int) -> None: ...
    def step(self, i: int, loss: float) -> None: ...
    def evaluating(self, task: str, n: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def row(self, name: str, scores: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Silent:
    """A watcher that shows nothing."""

    def stage(self, task: str, n_steps: int) -> None: ...
    def step(self, i: int, loss: float) -> None: ...
    def evaluating(self, task: str, n: int) -> None: ...
    def advance(self, n: int) -> None: ...
    def row(self, name: str, scores: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


Cell = dict[str, Any]
"""What is known of a finished cell: `retain.run.records.Cell`."""


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
    tuned: TunedDir | None = None
    stop: Stop | None = None
    trainer: Trainer = field(default_factory=Central)
    cells: dict[str, tuple[Row, str, Cell]] = field(default_factory=dict)  # finished, by key: where, and what
    data: dict[str, str] = field(default_factory=dict)  # digest of each task


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
    reuse: Path | None = None,
    stop: Stop | None = None,
    trainer: Trainer | None = None,
) -> AccuracyMatrix:
    """Learn the stream with one method and evaluate every task after every stage.

    Returns the matrix; the folder holds everything else. Adapters that the model's bank holds are removed
    first. A finished run is only read; one made with other settings, data or code of a method is refused.
    `reuse` is a folder that runs share: a task that was tuned there from the same start, with nothing of a method
    between the steps, is not tuned again (`retain.run.train.tuned_key`). `stop` may ask to end after a step whose
    checkpoint is saved; `retain.signals.Stopped` is raised then, and the same call continues. `trainer` takes the place
    of the central loop (`retain.federated.rounds`).
    Raises `RetainError` before anything is written if the method or the data cannot run here.
    """
    engine = engine or Engine()
    options, watch = options or EvalOptions(), watch or Silent()
    tuned = TunedDir(reuse, store.main, model.device) if reuse else None
    trainer = trainer or Central()
    r = Running(model, stream, method, optim, options, store, engine, watch, seed, tuned, stop, trainer)
    _same_setting(r)
    if store.done:
        if engine.main and (changed := changes(store, stream)):
            watch.warn(
                f"{store.path} is finished, and its scores are those of its own answer key: {said(changed)}"
            )
        return saved_matrix(store)
    stages = check(r)
    with store.locked():
        _describe(r)
        seen: list[str] = []
        before: Row | None = None
        for index, task in enumerate([None, *stages]):
            row = store.row(index, task.name if task else "zero_shot")
            if not row.done:
                _one_row(r, row, task, seen, before)
            for name, cell in row.cells().items():
                row.intact(name)
                r.cells.setdefault(cell["key"], (row, name, cell))
            if task:
                seen, before = seen + taught(task, stream), row
        matrix = collect(stream, store)
        if engine.main:
            records.write(store.path / "matrix.json", matrix.to_data())
            write_text(store.path / "DONE", "")
        engine.wait()
    return matrix


def check(r: Running) -> Sequence[Task]:
    """Everything that can be refused before anything is written; returns the stages."""
    r.engine.check(r.method)
    stages = list(r.trainer.stages(r.method, r.stream))
    if stages and not r.method.owns("adapt"):
        names = [p.name for p in r.method.parts]
        raise RetainError(
            f"adapt: no part of {names} defines it; put `lora`, `lora_per_task` or another owner first"
        )
    if stages:
        check_kind(r.method, r.model.adapters.kind)
    files = Counter(safe(t.name).casefold() for t in r.stream.all)
    for task in r.stream.all:
        if not utf8(task.name):
            raise RetainError(f"task {task.name!r}: the name is no text that UTF-8 can hold; rename it")
        if files[safe(task.name).casefold()] > 1:
            raise RetainError(
                f"task {task.name!r}: another task's name is the same as a file name; rename one"
            )
        _check_split(task.name, "train", task.train)
        _check_split(task.name, "test", task.test)
        if not len(task.test):
            raise RetainError(f"task {task.name!r}: the test split is empty")
    r.trainer.check(r.model, r.method, r.stream, r.engine)
    if not r.store.done:
        r.method.check(r.model, r.stream)
    return stages


def check_kind(method: Method, kind: str) -> None:
    """Refuse adapters of a kind that the part which grows them cannot use."""
    for part in method.parts:
        if part.owns("adapt") and kind not in part.kinds:
            raise RetainError(
                f"adapter.kind: {kind!r}, but method {part.name!r} grows {' or '.join(map(repr, part.kinds))}; "
                f"write adapter: {{kind: {part.kinds[0]}}}, or choose another method"
            )


def _check_split(task: str, split: str, examples: Examples) -> None:
    seen = set[str]()
    for row in plain(examples):
        if row.id in seen:
            raise RetainError(f"task {task!r}, {split}: id {row.id!r} appears more than once")
        seen.add(row.id)


def taught(stage: Task, stream: Stream) -> list[str]:
    """The stream's tasks that a stage teaches: `meta["parts"]`, else itself, else (joint training) all."""
    names = [t.name for t in stream]
    parts = stage.meta.get("parts", [stage.name] if stage.name in names else names)
    assert isinstance(parts, list | tuple)
    return [str(p) for p in parts]


def _one_row(r: Running, row: Row, task: Task | None, seen: list[str], before: Row | None) -> None:
    if task is None:
        empty(r.model.adapters)
    else:
        if not row.trained:
            _train(r, row, task, seen, before)
        row.load_model(r.model.adapters, r.method)
        row.checkpoints().clear()
        seen = seen + taught(task, r.stream)
    cells = _evaluate(r, row, r.method if task else None, seen)
    if r.engine.main:
        records.write(row.path / "budget.json", _budget(r, row, before, cells))
        row.mark("DONE")
        r.watch.row(task.name if task else row.name, {name: cell["score"] for name, cell in cells.items()})
    r.engine.wait()


def _train(r: Running, row: Row, task: Task, seen: list[str], before: Row | None) -> None:
    if before is not None:
        before.load_model(r.model.adapters, r.method)
    else:
        empty(r.model.adapters)
        r.method.reset()
    ctx = Context(r.model, task, r.stream, list(seen), r.seed, log=partial(_event, r))
    r.watch.stage(task.name, r.trainer.n_steps(task, r.optim))
    r.store.event(kind="stage", task=task.name, samples=len(task.train))
    slots = row.checkpoints(r.model.device)
    if slots.newest():
        r.watch.note(f"{task.name}: continues after its last checkpoint")
    stats = r.trainer.fit(r.model, r.method, ctx, r.optim, r.engine, slots, r.watch.step, r.tuned, r.stop)
    if stats.reused:
        r.watch.note(f"{task.name}: its steps were made by an earlier run (reuse)")
    learned = [t.name for t in r.stream if t.name in [*seen, *taught(task, r.stream)]]
    if r.engine.main:
        row.save_model(r.model.adapters, r.method, {**_cost(r, stats), "learned": learned}, before)
    r.engine.wait()


def _event(r: Running, **fields: Any) -> None:
    """An event of a task; what a method says of its own work is shown too."""
    r.store.event(**fields)
    if "verdict" in fields:
        r.watch.note(f"{fields.get('task')}, {fields.get('method')}: {fields['verdict']}")


def _evaluate(r: Running, row: Row, method: Method | None, seen: list[str]) -> dict[str, Cell]:
    """Every task of the stream under the row's model. Finished cells are kept, equal ones are copied."""
    digests = {name: entry["digest"] for name, entry in row.adapters().items()}
    kept, cells = row.cells(), dict[str, Cell]()
    for task in r.stream.all:
        ctx = Context(r.model, task, r.stream, list(seen), r.seed, log=r.store.event)
        started = time.perf_counter()
        batches = plan(r.model, task, method, ctx, r.options)
        key = cell_key(r.model, task, batches, digests, r.options, r.data[task.name])
        r.watch.evaluating(task.name, len(task.test))
        if kept.get(task.name, {}).get("key") == key:
            row.intact(task.name)
            cells[task.name] = kept[task.name]
        elif key in r.cells:
            cells[task.name] = _copy(r, row, task, key)
        else:
            cells[task.name] = _answer(r, row, task, key, batches, started)
        r.cells.setdefault(key, (row, task.name, cells[task.name]))
        if r.engine.main:
            row.save_cells(cells)
        told = {k: cells[task.name][k] for k in ("score", "n", "copied")}
        r.store.event(kind="cell", row=row.path.name, task=task.name, **told)
    return cells


def _copy(r: Running, row: Row, task: Task, key: str) -> Cell:
    source, name, cell = r.cells[key]
    cell = {**cell, "copied": True, "seconds": 0.0, "tokens": 0}
    if r.engine.main:
        cell["answers"] = row.save_answers(task.name, source.each_answer(name))
    r.watch.advance(len(task.test))
    return cell


def _answer(r: Running, row: Row, task: Task, key: str, batches: Any, started: float) -> Cell:
    target = row.predictions(task.name)
    part = target.with_name(f"{target.stem}.{key}.part")
    predictions = evaluate(r.model, task, batches, r.options, r.engine, part, r.watch.advance)
    written = {}
    if r.engine.main:
        shown = {e.id: r.store.sample(task.name, e) for e in task.test[: r.options.thumbnails]}
        written["answers"] = row.save_answers(task.name, (p.to_json(shown.get(p.id)) for p in predictions))
        for file in target.parent.glob(f"{part.name}*"):  # of every process, also of an earlier launch
            file.unlink()
    compat = [p.compat for p in predictions if p.compat is not None]
    return {
        "key": key, "score": sum(p.score for p in predictions) / len(predictions), "n": len(predictions),
        "copied": False, "seconds": round(time.perf_counter() - started, 3),
        "compat": sum(compat) / len(compat) if compat else None,
        "tokens": sum(lengths(r.model, task.test))
        + sum(tokens_in_front(r.model.adapters, mix, len(rows)) for rows, mix in batches),
        **written,
    }  # fmt: skip


def collect(stream: Stream, store: RunDir) -> AccuracyMatrix:
    """The matrix from the folder: per-sample scores of every finished row.

    A row of the matrix stands for a number of learned tasks, so joint training on all of them fills the last
    one: only what holds for a final model is then defined. Where clients teach other tasks than the stream's first
    (heterogeneous stages), a row has no place in it; `retain.metrics.stages` has all of them.
    """
    names = [t.name for t in stream]
    values = {
        len(row.learned): {t.name: [p["score"] for p in row.each_answer(t.name)] for t in stream.all}
        for row in store.rows()
        if row.done and set(row.learned) == set(names[: len(row.learned)])
    }
    ids = {t.name: [row.id for row in plain(t.test)] for t in stream.all}
    return AccuracyMatrix.from_scores([t.name for t in stream], [t.name for t in stream.unseen], values, ids)


def saved_matrix(store: RunDir) -> AccuracyMatrix:
    """The matrix of a finished run as its folder has it. RetainError: of another shape, changed since, not a matrix."""
    file = store.path / "matrix.json"
    try:
        return AccuracyMatrix.from_json(records.read(file, records.Matrix))
    except (RetainError, ValueError) as error:  # ValueError: rows of uneven length
        raise RetainError(str(error) if str(file) in str(error) else f"{file}: {error}") from None


def _cost(r: Running, stats: FitStats) -> dict[str, Any]:
    # forward and the gradient of activations; adapters (forward, both gradients) besides
    per_token = 2 * r.model.flops_per_token() + 6 * stats.trainable_parameters
    return {**asdict(stats), "flops": per_token * stats.tokens}


def _budget(r: Running, row: Row, before: Row | None, cells: Mapping[str, Cell]) -> dict[str, Any]:
    """What the run has cost up to this row.

    FLOPs are estimates: per token and parameter 2 forward, 4 in training, 6 for adapters. Seconds and peak
    memory are those of rank 0.
    """
    bank = r.model.adapters
    numbers = sum(p.numel() for name in bank.names for p in bank.parameters(name).values())
    state_numbers, state_bytes = _method_tensors(row)
    fitted = row.fit()
    zero_shot = r.store.row(0, "zero_shot")
    earlier = before or (zero_shot if row.index else None)
    old = earlier.budget() if earlier else {}
    train_s, eval_s = fitted.get("seconds", 0.0), sum(c["seconds"] for c in cells.values())
    total = {
        **{k: fitted.get(k, 0) for k in ("steps", "samples", "tokens")},
        "train_flops": fitted.get("flops", 0.0),
        "eval_flops": r.model.flops_per_token() * sum(c["tokens"] for c in cells.values()),
        "train_s": train_s, "eval_s": eval_s, "wall_s": train_s + eval_s,
    }  # fmt: skip
    total |= {f"{k}_bytes": fitted[k] for k in ("sent", "received") if k in fitted}  # federated
    total = {k: v + old.get(k, 0) for k, v in total.items()}
    peak = max(peak_memory(r.model.device), fitted.get("peak_memory_bytes", 0))
    return {
        **total,
        "flops": total["train_flops"] + total["eval_flops"],
        "trainable_parameters": fitted.get("trainable_parameters", 0),
        "stored_parameters": numbers + state_numbers,
        "stored_bytes": 4 * numbers + state_bytes,
        "method_state_bytes": state_bytes,
        "peak_memory_bytes": max(peak, old.get("peak_memory_bytes", 0)),
    }


def _method_tensors(row: Row) -> tuple[int, int]:
    """Numbers in the method's tensors, and bytes of its state on disk."""
    path = row.path / "method.safetensors"
    if not path.is_file():
        return 0, 0
    with safe_open(path, "pt") as f:
        shapes = [f.get_slice(k).get_shape() for k in f.keys()]  # noqa: SIM118
    n_bytes = path.stat().st_size + path.with_suffix(".json").stat().st_size
    return sum(int(torch.Size(shape).numel()) for shape in shapes), n_bytes


def setting(r: Running) -> dict[str, Any]:
    """What a run was made with beside model and data, as plain data; of methods outside the package also their code."""
    files = {p.name: getattr(sys.modules.get(type(p).__module__), "__file__", None) for p in r.method.parts}
    own = {p.name for p in r.method.parts if type(p).__module__.startswith("retain.")}
    code = {
        n: digest(ast.dump(ast.parse(Path(f).read_text()))) for n, f in files.items() if f and n not in own
    }
    made: dict[str, Any] = {
        "method": [{p.name: p.config()} for p in r.method.parts], "code": code, "optim": written(r.optim),
        "eval": asdict(r.options), "seed": r.seed, "tasks": [t.name for t in r.stream.all],
    }  # fmt: skip
    if federated := r.trainer.setting():
        made["federated"] = federated
    if widens(r.model, r.options):
        made["eval"]["widened"] = True  # folders from before there was the choice say fp32 and did not
    if any(most_answers(t.train) > 1 for t in r.stream):
        made["turns"] = (
            r.optim.turns
        )  # folders from before there was the choice learned the last, and do not say so
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


def _same_setting(r: Running) -> None:
    """Refuse a folder of a run that was made otherwise: its numbers, or its half, are not this run's.

    Before anything is trained nothing depends on it: who mends a method after a first error goes on.
    """
    file = r.store.path / "setting.json"
    if not file.is_file() or not any(row.trained or row.checkpoints().newest() for row in r.store.rows()):
        return
    changed = differences(records.read(file, records.Setting), setting(r))
    if any(c.startswith("tasks:") for c in changed):
        raise RetainError(
            f"{r.store.path}: the data of the stream changed since this run began ({changed[-1]})"
        )
    if changed:
        raise RetainError(
            f"{r.store.path} holds a run that was made otherwise ({'; '.join(changed[:3])}); choose another folder"
            + (" (the file of the method was edited)" if any(c.startswith("code.") for c in changed) else "")
        )


def _describe(r: Running) -> None:
    """Data, base model and environment, once at the start; data or a base that changed since then is refused.

    Images given as paths count by name and size only (`retain.types.digest`): reading all of them would take
    minutes.
    """
    _describe_data(r)
    if not r.engine.main:
        return
    file, made = r.store.path / "setting.json", setting(r)
    if not file.is_file() or records.read(file, records.Setting) != made:
        records.write(file, made)
    file, base = r.store.path / "environment.json", r.model.fingerprint()
    old = records.read(file, records.Environment) if file.is_file() else {"model": base}
    if old.get("model") != base:
        raise RetainError(f"{r.store.path}: this run began with base model {old.get('model')}, not {base}")
    if not file.is_file():
        records.write(file, {**environment(), "model": base, "seed": r.seed})


def _describe_data(r: Running) -> None:
    """data.json, and the digests that the cells of this run are known by."""
    file, now = r.store.path / "data.json", _hashes(r.stream.all)
    old = records.read_table(file, records.Data) if file.is_file() else None
    former = old is not None and not all("data" in entry for entry in old.values())
    r.data |= {name: entry["data" if former else "digest"] for name, entry in now.items()}
    if not r.engine.main:
        return
    if old is None:
        records.write_table(file, now)
        if r.stream.published is not None:
            records.write(r.store.path / "published.json", asdict(r.stream.published))
        return
    changed = _changes(old, now)
    if changed or list(old) != list(now):
        raise RetainError(
            f"{r.store.path}: {said(changed)} changed since this run began; choose another folder with out=DIR"
        )
    if former:
        _same_scores(r)


def _hashes(tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """What data.json says: of the data alone (`data`), and of all that decides a score (`digest`)."""
    data = [t.data_digest() for t in tasks]
    return {
        t.name: {
            "train": len(t.train), "test": len(t.test), "score": t.score.name, "data": d, "digest": t.digest(d),
        }
        for t, d in zip(tasks, data, strict=True)
    }  # fmt: skip


def changes(store: RunDir, stream: Stream) -> dict[str, str]:
    """What is no more as a run's folder has it, by task: its data, or its answer key."""
    file = store.path / "data.json"
    return _changes(records.read_table(file, records.Data), _hashes(stream.all)) if file.is_file() else {}


DATA, KEY = "data", "answer key in the data"
"""What of a task may change: questions, pictures, references; what else a scorer reads, and the scorers themselves."""


def _changes(old: Mapping[str, Any], now: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A folder of an earlier version has no `data`: its `digest` is that of the data alone."""
    out = {}
    for name, entry in now.items():
        then = old.get(name, {})
        if then.get("data", then.get("digest")) != entry["data"]:
            out[name] = DATA
        elif "data" in then and then["digest"] != entry["digest"]:
            out[name] = KEY
    return out


def said(changed: Mapping[str, str]) -> str:
    """What changed, as one phrase."""
    names = {kind: [n for n, k in changed.items() if k == kind] for kind in (DATA, KEY)}
    more = {DATA: "", KEY: " (options, boxes, tolerances, or a scorer)"}
    parts = [f"the {kind} of {found}{more[kind]}" for kind, found in names.items() if found]
    return " and ".join(parts) or "the data of the stream"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _same_scores(r: Running) -> None:
    """Refuse to go on where saved answers score otherwise now: half a matrix would be made with another key.

    For folders of an earlier version, which say nothing of the answer key.
    """
    for row in r.store.rows():
        for task in r.stream.all:
            cell, path = row.cells().get(task.name), row.predictions(task.name)
            if cell is None or not path.is_file():
                continue
            saved = {line["id"]: line["prediction"] for line in row.answers(task.name)}
            if any(e.id not in saved for e in task.test):
                continue  # a torn file is made again
            scored = score(task, [saved[e.id] for e in task.test])
            now = {"score": _mean(p.score for p in scored)}
            if task.compat:
                now["compat"] = _mean(p.compat or 0.0 for p in scored)
            for name, value in now.items():
                if (then := cell.get(name)) is not None and abs(value - then) > 1e-6:
                    raise RetainError(
                        f"{r.store.path}: task {task.name!r}: the answers saved in {row.path.name} now have {name} "
                        f"{value:.2f}, and had {then:.2f}: the answer key or the rule of its scorer changed since; "
                        "choose another folder with out=DIR"
                    )


def environment() -> dict[str, Any]:
    """Versions, machine and git state."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed as a package"
    return {
        "python": platform.python_version(), "platform": platform.platform(), "machine": platform.machine(),
        "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "packages": packages, "git": _git(),
    }  # fmt: skip


def _git() -> str | None:
    """Commit of the source tree, with -dirty where it has changes; None outside one."""
    command, here = ["git", "describe", "--always", "--dirty", "--abbrev=12"], Path(__file__).resolve().parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    except OSError:
        return None
