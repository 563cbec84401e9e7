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
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image as PILImage
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
from retain.types import Example, Message, RetainError, digest

FORMAT = 1
TUNED = "about-this-folder.txt"
NOT_THE_RECIPE = frozenset({"out", "reuse", "track"})
"""Keys of a config that do not decide what is computed: a run continues where they differ."""


# -- states --------------------------------------------------------------------------------------------------


def save_state(stem: Path, value: Any) -> None:
    """A nest of plain values, tensors, arrays, paths and Examples as `stem.json` and `stem.safetensors`.

    Nests are dicts, lists, tuples and sets. Anything else is a RetainError that names its type.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(value, tensors, stem.name)
    write_atomic(stem.with_suffix(".safetensors"), lambda p: save_file(tensors, p))
    write_json(stem.with_suffix(".json"), skeleton)


def load_state(stem: Path, device: torch.device | str = "cpu") -> Any:
    """The inverse of `save_state`. A tensor goes back to where it was: the CPU, or the accelerator."""
    skeleton = read_json(stem.with_suffix(".json"))
    return _unpack(skeleton, load_tensors(stem.with_suffix(".safetensors")), torch.device(device))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; a missing or corrupt one is an error that names it."""
    try:
        # Cloned: a tensor in the mapped file is aligned differently, and a sum may differ in its last bit.
        return {k: v.clone() for k, v in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise RetainError(f"cannot read {path}: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """An atomic safetensors file."""
    write_atomic(path, lambda p: save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, p))


def _pack(value: Any, tensors: dict[str, Tensor], at: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        t = (
            value
            if isinstance(value, Tensor)
            else torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
        )  # a copy in this machine's byte order: it may be read-only
        key = f"t{len(tensors):05d}"
        tensors[key] = t.detach().cpu().contiguous().clone()
        return {"$tensor" if isinstance(value, Tensor) else "$array": [key, t.device.type != "cpu"]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PILImage.Image):
        return _pack(np.array(opened(value, at)), tensors, at)
    if isinstance(value, Path):
        return {"$path": str(value)}
    if isinstance(value, Example):
        turns = [(m.role, m.text, m.images, *([m.at] if m.at else [])) for m in value.messages]
        body = (value.id, turns, value.images, value.references, dict(value.meta))
        return {"$example": [_pack(v, tensors, at) for v in body]}
    if isinstance(value, Mapping):
        return {"$dict": [[_pack(k, tensors, at), _pack(v, tensors, f"{at}.{k}")] for k, v in value.items()]}
    for kind, types in (("$list", list), ("$tuple", tuple), ("$set", set | frozenset)):
        if isinstance(value, types):
            return {kind: [_pack(v, tensors, at) for v in (sorted(value) if kind == "$set" else value)]}
    raise RetainError(
        f"{at} holds a {type(value).__name__}, which cannot be saved without pickle; a method's state is numbers, "
        "strings, tensors, arrays, paths, Examples, and lists, tuples, sets and dicts of them"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    if not isinstance(value, dict):
        return value
    kind, body = next(iter(value.items()))
    if kind in ("$tensor", "$array"):
        tensor = tensors[body[0]]
        return tensor.numpy() if kind == "$array" else tensor.to(device) if body[1] else tensor
    if kind == "$path":
        return Path(body)
    if kind == "$dict":
        return {_unpack(k, tensors, device): _unpack(v, tensors, device) for k, v in body}
    items = [_unpack(v, tensors, device) for v in body]
    if kind == "$example":
        name, turns, images, references, meta = items
        return Example(name, tuple(Message(*turn) for turn in turns), images, references, meta)
    return {"$list": list, "$tuple": tuple, "$set": set}[kind](items)


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
            found = read_json(head)
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise RetainError(f"{head}: not a run of this version of retain (format {FORMAT})")
            if changed := differences(found.get("config", {}), wanted):
                said = "; ".join(changed[:3])
                raise RetainError(
                    f"{run.path} holds a run of another recipe ({said}); choose another folder with out=DIR"
                )
        elif _foreign(run.path) and not head.is_file():  # another rank may just have made it
            raise RetainError(
                f"{run.path} exists and is not a run folder (no run.json); choose another with out=DIR"
            )
        elif main:
            write_json(head, {"format": FORMAT, "name": run.path.name, "config": wanted})
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
    def config(self) -> dict[str, Any]:
        """The resolved recipe that the run was made with."""
        config: dict[str, Any] = read_record(self.path / "run.json", "config")["config"]
        return config

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
        found = [Row(p, self) for p in (self.path / "rows").glob("[0-9][0-9]*-*") if p.is_dir()]
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
            picture = opened(example.images[0], f"example {example.id!r}")
            picture.thumbnail((side, side))
            write_atomic(self.path / name, lambda p: picture.save(p, "png"), durable=False)
        return name


@dataclass
class Row:
    """One state of the model: its adapters, the method's state, what it cost and what it answered."""

    path: Path
    run: RunDir

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
        return list(read_record(self.path / "fit.json", "learned")["learned"]) if self.trained else []

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
            file = f"rows/{self.path.name}/adapters/{name}.safetensors"
            files[name] = {"digest": digest(state), "file": file}
            if name in old and old[name]["digest"] == files[name]["digest"]:
                files[name] = old[name]
            else:
                save_tensors(self.run.path / file, state)
        save_state(self.path / "method", method.state_dict())
        write_json(self.path / "fit.json", dict(stats))
        head = {"adapters": files, "mix": bank.mix.to_json(), "signature": bank.signature}
        write_json(self.path / "bank.json", head)
        self.mark("TRAINED")
        self.checkpoints().clear()

    def adapters(self) -> dict[str, dict[str, str]]:
        """Digest and file (relative to the run) of every adapter, in the bank's order; none in row 0."""
        found = read_record(self.path / "bank.json", "adapters")["adapters"] if self.trained else {}
        return dict(found)

    def load_model(self, bank: AdapterBank, method: Method | None) -> None:
        """Make the bank hold the row's adapters and mix, nothing else, and give the method its state back."""
        head = read_record(self.path / "bank.json", "adapters", "mix", "signature")
        if changed := differences(head["signature"], json.loads(json.dumps(bank.signature, default=str))):
            raise RetainError(f"{self.path}: adapters of another model ({'; '.join(changed[:3])})")
        files = {name: self.run.path / entry["file"] for name, entry in head["adapters"].items()}
        states = {name: load_tensors(file) for name, file in files.items()}  # all, before anything is changed
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
            method.load_state_dict(load_state(self.path / "method", device))

    def checkpoints(self, device: torch.device | str = "cpu") -> CheckpointDir:
        """Where `fit` leaves its state in the middle of this row's task."""
        return CheckpointDir(self.path / "checkpoint", self.run.main, device)

    def predictions(self, task: str) -> Path:
        """The file of one cell's predictions."""
        return self.path / "predictions" / f"{safe(task)}.jsonl"

    def cells(self) -> dict[str, Any]:
        """What is known of the finished cells, by task."""
        path = self.path / "cells.json"
        return read_record(path) if path.is_file() else {}


@dataclass
class CheckpointDir:
    """The newest mid-task checkpoint: two slots in turn, and a pointer that is renamed last."""

    path: Path
    main: bool = True
    device: torch.device | str = "cpu"

    def newest(self) -> str | None:
        """The slot that holds a complete checkpoint."""
        pointer = self.path / "newest.json"
        return str(read_record(pointer, "stem")["stem"]) if pointer.is_file() else None

    def load(self) -> dict[str, Any] | None:
        """The newest complete checkpoint, or None."""
        stem = self.newest()
        try:
            return None if stem is None else dict(load_state(self.path / stem, self.device))
        except RetainError as error:
            raise RetainError(f"{error}; remove {self.path} to train this task from its start") from error

    def save(self, state: dict[str, Any]) -> None:
        """Write to the slot that the pointer does not name, then move the pointer."""
        if self.main:
            stem = "b" if self.newest() == "a" else "a"
            save_state(self.path / stem, state)
            write_json(self.path / "newest.json", {"stem": stem})

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
            return dict(load_state(stem, self.device)) if stem.with_suffix(".json").is_file() else None
        except RetainError as error:
            raise RetainError(f"{error}; remove {stem}.* to tune this task again") from error

    def save(self, key: str, state: dict[str, Any]) -> None:
        """Keep it, whole or not at all: the tensors first, then the file that is asked for. Runs wait in turn."""
        if not self.main:
            return
        stem = self.path / key
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / TUNED).is_file():
                write_text(
                    self.path / TUNED,
                    "Tasks that were tuned once (retain run … reuse=HERE). May be deleted.\n",
                )
            handle = (self.path / "lock").open("w")
        except OSError as error:
            raise RetainError(f"reuse: cannot write into {self.path}: {error.strerror}") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not stem.with_suffix(".json").is_file():
                save_state(stem, state)


def empty(bank: AdapterBank) -> None:
    """Take every adapter out of the bank."""
    bank.mix = Mix()
    for name in list(bank.names):
        bank.remove(name)


def safe(name: str) -> str:
    """A task's name as a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


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


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _foreign(path: Path) -> bool:
    """Whether something is there that a run killed at its first breath cannot have left."""
    ours = {".run.json.part", "run.lock"}
    return path.exists() and (not path.is_dir() or any(p.name not in ours for p in path.iterdir()))


__all__ = [
    "FORMAT", "TUNED", "CheckpointDir", "Row", "RunDir", "TunedDir", "append_lines", "differences", "empty", "load_state",
    "load_tensors", "mend", "read_json", "read_jsonl", "read_record", "safe", "save_state", "save_tensors",
    "write_atomic", "write_json", "write_jsonl", "write_text",
]  # fmt: skip
