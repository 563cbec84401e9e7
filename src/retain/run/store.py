"""RunDir: what a run leaves on disk, so that a killed run continues and a stranger can read every number.

    run.json config.yaml environment.json data.json events.jsonl samples/<task>/*.png
    rows/00-zero_shot/  rows/01-<task>/ …   one per evaluated state of the model
        checkpoint/                   mid-task state, gone once TRAINED is there
        adapters/<name>.safetensors  bank.json  method.json  method.safetensors  fit.json  TRAINED
        predictions/<task>.jsonl  cells.json  budget.json  DONE
    matrix.json  DONE

Everything is safetensors, JSON, JSONL or YAML; nothing is ever unpickled. A file is written under a temporary
name, flushed and renamed; the marker of a stage (TRAINED, DONE) is written last. After a resume, events.jsonl
may tell a step twice: the last one counts.

What was written is what is read: a record has a seal (`retain.run.records`), and digests say what it stands for.
bank.json knows the adapters, cells.json the predictions, a state's JSON its tensors. They are compared at every load.
Names of tasks and adapters become names of files in one place (`safe`), and files that a record names must be inside.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from retain.adapters.bank import AdapterBank, Mix
from retain.data.picture import opened
from retain.files import (
    append_lines,
    mend,
    read_json,
    read_jsonl,
    read_record,
    write_atomic,
    write_json,
    write_jsonl,
    write_text,
)
from retain.method import Method
from retain.run import records
from retain.run.sound import broken, is_of, wrong_kinds
from retain.run.states import (
    built_state,
    load_state,
    load_tensors,
    loaded_state,
    read_state,
    save_state,
    save_tensors,
)
from retain.types import Example, RetainError, digest

FORMAT = 1
TUNED = "about-this-folder.txt"
ABOUT_TUNED = "Tasks that were tuned once (retain run … reuse=HERE). May be deleted.\n"
LONGEST = 200
"""Bytes of a file name that a name is left as it is; longer ones are cut, and a hash tells them apart."""
NOT_THE_RECIPE = frozenset({"out", "reuse", "track"})
"""Keys of a config that do not decide what is computed: a run continues where they differ."""


# -- the run folder ------------------------------------------------------------------------------------------


@dataclass
class RunDir:
    """A run's folder. `main` is False on processes that must not write."""

    path: Path
    main: bool = True

    @staticmethod
    def open(path: Path | str, config: Mapping[str, Any], *, main: bool = True) -> RunDir:
        """Create the folder, or continue in it. One of another recipe, or of something else, is refused."""
        run = RunDir(Path(path), main)
        head = run.path / "run.json"
        wanted = json.loads(json.dumps(config, default=str))
        if head.is_file():
            if changed := differences(run.head.get("config", {}), wanted):
                said = "; ".join(changed[:3])
                raise RetainError(
                    f"{run.path} holds a run of another recipe ({said}); choose another folder with out=DIR"
                )
        elif _foreign(run.path) and not head.is_file():  # another rank may just have made it
            raise RetainError(
                f"{run.path} exists and is not a run folder (no run.json); choose another with out=DIR"
            )
        elif main:
            records.write(head, {"format": FORMAT, "name": run.path.name, "config": wanted})
        if main and not (run.path / "config.yaml").is_file():
            write_text(run.path / "config.yaml", yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True))
        return run

    @staticmethod
    def read(path: Path | str) -> RunDir:
        """An existing run, for reports and scoring."""
        run = RunDir(Path(path), main=False)
        if not (run.path / "run.json").is_file():
            raise RetainError(f"{run.path} is not a run folder: it has no run.json")
        return run

    @property
    def head(self) -> dict[str, Any]:
        """run.json. RetainError: of another version, of another shape, changed since."""
        file = self.path / "run.json"
        found = read_json(file)
        if isinstance(found, dict) and found.get("format") != FORMAT:
            raise RetainError(
                f"{file}: not a run of this version of retain: format {found.get('format')!r:.40}, it reads format {FORMAT}"
            )
        return records.read(file, records.Head)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved recipe that the run was made with."""
        head = self.head
        if "config" not in head:
            raise RetainError(
                f"{self.path / 'run.json'} was not written by retain, or was edited: config is missing"
            )
        return dict(head["config"])

    def inside(self, name: str, where: Path) -> Path:
        """A file that a record names, as a path. RetainError where it leads out of the run's folder."""
        path = self.path / name
        if (
            "\0" in name
            or Path(name).is_absolute()
            or ".." in Path(name).parts
            or not (path.resolve().is_relative_to(self.path.resolve()))
        ):
            raise RetainError(f"{where}: {name!r} leads out of the run's folder")
        return path

    @property
    def done(self) -> bool:
        """Whether the whole run is finished."""
        return (self.path / "DONE").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time writes to a run; a second one is told so. The lock goes with its process."""
        if not self.main:
            yield
            return
        try:
            handle = (self.path / "run.lock").open("w")
        except OSError as error:
            raise RetainError(f"cannot write into {self.path}: {error.strerror}") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RetainError(
                    f"another process is writing to {self.path}; wait for it or choose out=DIR"
                ) from None
            mend(self.path / "events.jsonl")
            yield

    def row(self, index: int, name: str) -> Row:
        """The folder of one row of the matrix; row 0 is the zero-shot row."""
        return Row(self.path / "rows" / f"{index:02d}-{safe(name)}", self)

    def rows(self) -> list[Row]:
        """All rows on disk, in order."""
        folders = [
            p for p in (self.path / "rows").glob("*-*") if re.match(r"[0-9]{2,9}-", p.name) and p.is_dir()
        ]
        found = [Row(p, self) for p in folders]
        return sorted(found, key=lambda row: row.index)

    def event(self, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        if self.main:
            append_lines(self.path / "events.jsonl", [{"time": round(time.time(), 3), **fields}])

    def sample(self, task: str, example: Example, side: int = 160) -> str | None:
        """Keep a thumbnail of an example's first image; its path inside the run, None without an image."""
        if not example.images:
            return None
        name = f"samples/{safe(task)}/{digest(example.id)}.png"
        if self.main and not (self.path / name).is_file():
            picture = opened(example.images[0], example.told)
            picture.thumbnail((side, side))
            write_atomic(self.path / name, lambda p: picture.save(p, "png"), durable=False)
        return name


@dataclass
class Row:
    """One state of the model: its adapters, the method's state, what it cost and what it answered."""

    path: Path
    run: RunDir
    _cells: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def index(self) -> int:
        """0 is the zero-shot row, i the row after the i-th stage."""
        return int(self.path.name.split("-", 1)[0])

    @property
    def name(self) -> str:
        """The task learned in this row, as the folder says it."""
        return self.path.name.split("-", 1)[1]

    @property
    def trained(self) -> bool:
        """Adapters and method state are saved; only the evaluation may be missing."""
        return (self.path / "TRAINED").is_file()

    @property
    def done(self) -> bool:
        """Everything of this row is saved."""
        return (self.path / "DONE").is_file()

    @property
    def learned(self) -> list[str]:
        """The tasks of the stream that were learned up to this row."""
        return list(self.fit().get("learned", ())) if self.trained else []

    def fit(self) -> dict[str, Any]:
        """What training took; empty in row 0."""
        return records.read(self.path / "fit.json", records.Fit) if self.trained else {}

    def budget(self) -> dict[str, float]:
        """What the run had cost up to this row; empty where that is not written yet."""
        file = self.path / "budget.json"
        return records.read(file, records.Budget) if file.is_file() else {}

    def mark(self, word: str) -> None:
        """Write a marker file."""
        write_text(self.path / word, "")

    def save_model(
        self, bank: AdapterBank, method: Method, stats: Mapping[str, Any], before: Row | None
    ) -> None:
        """Adapters that changed since the row before, what is on, and the method's state; then TRAINED."""
        old = before.adapters() if before else {}
        files: dict[str, dict[str, str]] = {}
        for name in bank.names:
            state = bank.state(name)
            file = f"rows/{self.path.name}/adapters/{safe(name)}.safetensors"
            files[name] = {"digest": digest(state), "file": file}
            if name in old and old[name]["digest"] == files[name]["digest"]:
                files[name] = old[name]
            else:
                save_tensors(self.run.path / file, state)
        save_state(self.path / "method", method.state_dict())
        records.write(self.path / "fit.json", stats)
        head = {"adapters": files, "mix": bank.mix.to_json(), "signature": bank.signature}
        records.write(self.path / "bank.json", head)
        self.mark("TRAINED")
        self.checkpoints().clear()

    def adapters(self) -> dict[str, dict[str, str]]:
        """Digest and file (relative to the run) of every adapter, in the bank's order; none in row 0."""
        return dict(records.read(self.path / "bank.json", records.Bank)["adapters"]) if self.trained else {}

    def load_model(self, bank: AdapterBank, method: Method | None) -> None:
        """Make the bank hold the row's adapters and mix, nothing else, and give the method its state back."""
        file = self.path / "bank.json"
        head = records.read(file, records.Bank)
        if changed := differences(head["signature"], json.loads(json.dumps(bank.signature, default=str))):
            raise RetainError(f"{self.path}: adapters of another model ({'; '.join(changed[:3])})")
        unknown = [n for n in Mix.from_json(head["mix"]).names if n not in head["adapters"]]
        odd = [n for n in head["adapters"] if not re.fullmatch(r"[\w-]+", n)]
        if unknown or odd:
            said = (
                f"mix: no adapter {unknown[0]!r}" if unknown else f"adapters: {odd[0]!r} is no adapter's name"
            )
            raise RetainError(f"{file} was not written by retain, or was edited: {said}")
        files = {name: self.run.inside(entry["file"], file) for name, entry in head["adapters"].items()}
        states = {name: load_tensors(path) for name, path in files.items()}  # all, before anything is changed
        for name, state in states.items():
            _whole(files[name], state, head["adapters"][name]["digest"], file)
        stem = self.path / "method"
        if method is not None:
            skeleton, tensors, sealed = read_state(stem)
            told = built_state(stem, skeleton, tensors, "cpu")
            _suits(method, told, sealed, self.path / "method.json")
        empty(bank)
        for name, state in states.items():
            paths = {key.rpartition(".")[0] for key in state}
            bank.add(
                name, torch.Generator(), paths=paths
            )  # a generator of its own: what it draws is overwritten
            bank.load(name, state)
        bank.mix = Mix.from_json(head["mix"])
        if method is not None:
            device = next((p.device for name in bank.names for p in bank.parameters(name).values()), "cpu")
            on_cpu = torch.device(device).type == "cpu"
            try:
                method.load_state_dict(told if on_cpu else built_state(stem, skeleton, tensors, device))
            except RetainError as error:
                raise RetainError(f"{self.path / 'method.json'}: {error}") from error

    def checkpoints(self, device: torch.device | str = "cpu") -> CheckpointDir:
        """Where `fit` leaves its state in the middle of this row's task."""
        return CheckpointDir(self.path / "checkpoint", self.run.main, device)

    def predictions(self, task: str) -> Path:
        """The file of one cell's predictions."""
        return self.path / "predictions" / f"{safe(task)}.jsonl"

    def cells(self) -> dict[str, Any]:
        """What is known of the finished cells, by task."""
        path = self.path / "cells.json"
        self._cells = records.read_table(path, records.Cell) if path.is_file() else {}
        return dict(self._cells)

    def save_cells(self, cells: Mapping[str, Mapping[str, Any]]) -> None:
        """Write what is known of the finished cells."""
        self._cells = None
        records.write_table(self.path / "cells.json", cells)

    def save_answers(self, task: str, lines: Iterable[Mapping[str, Any]]) -> str:
        """Write a cell's predictions; returns the digest of the file, which belongs into the cell."""
        write_jsonl(self.predictions(task), lines)
        return records.file_digest(self.predictions(task).read_bytes())

    def intact(self, task: str) -> None:
        """Raise RetainError where a finished cell's predictions are not what they were when it was finished."""
        cells = self.cells() if self._cells is None else self._cells
        if "answers" in cells.get(task, {}):
            records.content(self.predictions(task), cells[task]["answers"])

    def answers(self, task: str) -> list[dict[str, Any]]:
        """A finished cell's predictions. RetainError: missing, of another shape, changed since they were written."""
        return list(self.each_answer(task))

    def each_answer(self, task: str) -> Iterator[dict[str, Any]]:
        """The same, one after the other."""
        cells = self.cells() if self._cells is None else self._cells
        digest = cells.get(task, {}).get("answers")
        return records.each_line(self.predictions(task), records.Answer, digest=digest)


@dataclass
class CheckpointDir:
    """The newest mid-task checkpoint: two slots in turn, and a pointer that is renamed last."""

    path: Path
    main: bool = True
    device: torch.device | str = "cpu"
    sealed: bool = True  # whether what was loaded last has a seal: that of an earlier version has none

    def newest(self) -> str | None:
        """The slot that holds a complete checkpoint."""
        pointer = self.path / "newest.json"
        return str(records.read(pointer, records.Newest)["stem"]) if pointer.is_file() else None

    def load(self) -> dict[str, Any] | None:
        """The newest complete checkpoint, or None."""
        stem = self.newest()
        try:
            if stem is None:
                return None
            state, self.sealed = loaded_state(self.path / stem, self.device)
            return _snapshot(state, self.sealed, self.path / f"{stem}.json", optimizer=dict, method=dict)
        except RetainError as error:
            raise RetainError(f"{error}; remove {self.path} to train this task from its start") from error

    def save(self, state: dict[str, Any]) -> None:
        """Write to the slot that the pointer does not name, then move the pointer."""
        if self.main:
            stem = "b" if self.newest() == "a" else "a"
            save_state(self.path / stem, state)
            records.write(self.path / "newest.json", {"stem": stem})

    def clear(self) -> None:
        """Forget the checkpoints, the pointer first: a kill in between leaves none torn."""
        if self.main and self.path.is_dir():
            (self.path / "newest.json").unlink(missing_ok=True)
            shutil.rmtree(self.path, ignore_errors=True)


@dataclass
class TunedDir:
    """A folder that runs share: the ends of tasks' steps, by a hash of all that they depend on."""

    path: Path
    main: bool = True
    device: torch.device | str = "cpu"

    def load(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key, or None."""
        stem = self.path / key
        try:
            file = stem.with_suffix(".json")
            return _snapshot(*loaded_state(stem, self.device), file, events=list) if file.is_file() else None
        except RetainError as error:
            raise RetainError(f"{error}; remove {stem}.* to tune this task again") from error

    def save(self, key: str, state: dict[str, Any]) -> None:
        """Keep it, whole or not at all: the tensors first, then the file that is asked for. Runs wait in turn.

        The lock goes with its process; what a killed one left is swept by the next that has it.
        """
        if not self.main:
            return
        stem = self.path / key
        with self._locked():
            if not (self.path / TUNED).is_file():
                write_text(self.path / TUNED, ABOUT_TUNED)
            self._sweep()
            if not stem.with_suffix(".json").is_file():
                save_state(stem, state)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / "lock").open("w")
        except OSError as error:
            raise RetainError(f"reuse: cannot write into {self.path}: {error.strerror}") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # a file system that knows no locks
                raise RetainError(f"reuse: cannot lock {self.path}/lock: {error.strerror}") from error
            yield

    def _sweep(self) -> None:
        """Remove half entries: only who holds the lock writes, so no file without its JSON is being written."""
        for file in self.path.iterdir():
            part = file.name.startswith(".") and file.name.endswith(".part")
            half = file.suffix == ".safetensors" and not file.with_suffix(".json").is_file()
            if part or half:
                file.unlink(missing_ok=True)


def empty(bank: AdapterBank) -> None:
    """Take every adapter out of the bank."""
    bank.mix = Mix()
    for name in list(bank.names):
        bank.remove(name)


def safe(name: str) -> str:
    """A name of a task or an adapter as a file name: it stays in its folder, and every file system takes it."""
    file = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    if not file.strip("."):
        return file.replace(".", "_") or "_"
    if len(file.encode()) > LONGEST:
        return f"{file.encode()[:120].decode(errors='ignore')}-{digest(name)}"
    return file


def _whole(path: Path, state: Mapping[str, Tensor], wanted: str, head: Path) -> None:
    """Refuse an adapter's file that is not what bank.json says, or that holds what no model can use."""
    if digest(state) != wanted:
        raise RetainError(f"{path} is not what {head} says (its digest does not fit)")
    if bad := broken(state):
        raise RetainError(
            f"{path}: {len(bad)} tensors are not finite (first {bad[:2]}); an earlier version saved them"
        )


def _snapshot(state: Any, sealed: bool, path: Path, **kinds: type) -> dict[str, Any]:
    """Refuse what is not the state of a task's training, with these entries besides; a seal says so already."""
    if not isinstance(state, dict):
        raise RetainError(f"{path} was not written by retain, or was edited: an object is needed")
    if sealed:
        return state
    records.fits(state.get("stats"), records.Stats, f"{path}: stats")
    wanted: dict[str, Any] = {"adapters": dict[str, dict[str, Tensor]], **kinds}
    wrong = [key for key, kind in wanted.items() if not is_of(state.get(key), kind)]
    if wrong or not is_of(state.get("events", []), list[dict[str, Any]]):
        raise RetainError(f"{path} was not written by retain, or was edited: {(wrong or ['events'])[0]}")
    return state


def _suits(method: Method, state: Any, sealed: bool, path: Path) -> None:
    """Refuse a method's state of another shape (of an earlier version, or edited), or one that is not finite."""
    if not isinstance(state, Mapping) or (not sealed and (wrong := wrong_kinds(method, state))):
        said = "an object is needed" if not isinstance(state, Mapping) else wrong
        raise RetainError(f"{path} was not written by retain, or was edited: {said}")
    if bad := broken(state, method):
        raise RetainError(
            f"{path}: {len(bad)} values are not finite (first {bad[:2]}); an earlier version saved them"
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two configs say differently, key by key."""
    a, b = _flat(there), _flat(here)
    keys = [k for k in sorted(a.keys() | b.keys()) if k.split(".")[0] not in NOT_THE_RECIPE]
    unlike = [
        k for k in keys if (k in a, a.get(k)) != (k in b, b.get(k)) and not _renamed(k, a.get(k), b.get(k))
    ]
    return [f"{k}: {_say(a, k)} there, {_say(b, k)} here" for k in unlike]


def _renamed(key: str, there: Any, here: Any) -> bool:
    """Whether an earlier version wrote the same choice otherwise: eval.precision was fp32 also where nothing was widened."""
    return key == "eval.precision" and (there, here) == ("fp32", "model")


def _say(flat: Mapping[str, Any], key: str) -> str:
    text = repr(flat[key]) if key in flat else "nothing"
    return text if len(text) <= 80 else text[:79] + "…"


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """A nest of mappings as one, keys joined by dots; without a stack, since a file may be nested deep."""
    out: dict[str, Any] = {}
    left = [("", value)]
    while left:
        prefix, here = left.pop()
        for key, item in here.items():
            if isinstance(item, Mapping) and item:
                left.append((f"{prefix}{key}.", item))
            else:
                out[f"{prefix}{key}"] = item
    return out


def _foreign(path: Path) -> bool:
    """Whether something is there that a run killed at its first breath cannot have left."""
    ours = {".run.json.part", "run.lock"}
    return path.exists() and (not path.is_dir() or any(p.name not in ours for p in path.iterdir()))


__all__ = [
    "FORMAT", "TUNED", "CheckpointDir", "Row", "RunDir", "TunedDir", "append_lines", "differences", "empty", "load_state",
    "load_tensors", "mend", "read_json", "read_jsonl", "read_record", "safe", "save_state", "save_tensors",
    "write_atomic", "write_json", "write_jsonl", "write_text",
]  # fmt: skip
