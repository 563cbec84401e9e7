"""RunDir: what a run leaves on disk, so that a killed run continues and a stranger can read every number.

    run.json config.yaml environment.json data.json events.jsonl samples/<task>/*.png
    rows/00-zero_shot/  rows/01-<task>/ …   one per evaluated state of the model
        adapters/<name>.safetensors  bank.json  method.json  method.safetensors  TRAINED
        checkpoint/                   mid-task state, gone once TRAINED is there
        predictions/<task>.jsonl      cells.json  budget.json  DONE
    matrix.json  DONE

Everything is safetensors, JSON, JSONL or YAML; nothing is ever unpickled. A file is written under a temporary name,
flushed and renamed; the marker of a stage (TRAINED, DONE) is written last.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import yaml
from PIL import Image as PILImage
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retain.adapters.bank import AdapterBank, Mix
from retain.method import Method
from retain.types import Example, Message, RetainError, digest

FORMAT = 1


# -- files --------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename. A full or read-only disk is named."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with part.open("rb+") as f:
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True) if part.parent.is_dir() and os.access(part.parent, os.W_OK) else None
        raise RetainError(f"cannot write {path}: {error.strerror or error}; what was saved before is kept") from error


def write_text(path: Path, text: str) -> None:
    """An atomic text file."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf8") and None)


def write_json(path: Path, value: Any) -> None:
    """An atomic JSON file with sorted keys."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file; a missing or broken one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise RetainError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RetainError(f"{path} is not valid JSON ({error}); it was not written by retain, or was edited") from error


# -- states -------------------------------------------------------------------------------------------------------


def save_state(stem: Path, value: Any) -> None:
    """Nested dicts and lists of tensors, numbers, strings and Examples as `stem.json` + `stem.safetensors`."""
    tensors: dict[str, Tensor] = {}
    skeleton = _pack(value, tensors)
    write_atomic(stem.with_suffix(".safetensors"), lambda p: save_file(tensors, p))
    write_json(stem.with_suffix(".json"), skeleton)


def load_state(stem: Path) -> Any:
    """The inverse of `save_state`."""
    return _unpack(read_json(stem.with_suffix(".json")), load_tensors(stem.with_suffix(".safetensors")))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; a missing or corrupt one is an error that names it."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RetainError(f"cannot read {path}: {error}") from error


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = f"t{len(tensors):05d}"
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"$tensor": key}
    if isinstance(value, Example):
        return {"$example": _pack_example(value)}
    if isinstance(value, Mapping):
        return {"$dict": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        kind = "$tuple" if isinstance(value, tuple) else "$list" if isinstance(value, list) else "$set"
        return {kind: [_pack(v, tensors) for v in items]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise RetainError(f"a method's state holds a {type(value).__name__}, which cannot be saved without pickle")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, body = next(iter(value.items()))
    if kind == "$tensor":
        return tensors[body]
    if kind == "$example":
        return _unpack_example(body)
    if kind == "$dict":
        return {k: _unpack(v, tensors) for k, v in body}
    items = [_unpack(v, tensors) for v in body]
    return {"$tuple": tuple, "$list": list, "$set": set}[kind](items)


def _pack_example(e: Example) -> dict[str, Any]:
    images = [str(i) if isinstance(i, Path) else {"png": base64.b64encode(_png(i)).decode()} for i in e.images]
    turns = [[m.role, m.text, m.images] for m in e.messages]
    return {"id": e.id, "messages": turns, "images": images, "references": list(e.references), "meta": dict(e.meta)}


def _unpack_example(body: Mapping[str, Any]) -> Example:
    def image(v: Any) -> Any:
        return Path(v) if isinstance(v, str) else np.asarray(PILImage.open(io.BytesIO(base64.b64decode(v["png"]))))

    messages = tuple(Message(*turn) for turn in body["messages"])
    images = tuple(image(v) for v in body["images"])
    return Example(body["id"], messages, images, tuple(body["references"]), body["meta"])


def _png(source: Any) -> bytes:
    out = io.BytesIO()
    picture = PILImage.fromarray(source) if isinstance(source, np.ndarray) else source
    picture.save(out, "png")
    return out.getvalue()


# -- the run folder -----------------------------------------------------------------------------------------------


@dataclass
class RunDir:
    """A run's folder. `main` is False on processes that must not write."""

    path: Path
    main: bool = True

    @staticmethod
    def open(path: Path | str, config: Mapping[str, Any], *, main: bool = True) -> RunDir:
        """Create the folder, or continue in it. A folder of another recipe, or of something else, is refused."""
        run = RunDir(Path(path), main)
        head = run.path / "run.json"
        wanted = json.loads(json.dumps(config, default=str))
        if head.is_file():
            found = read_json(head)
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise RetainError(f"{head}: not a run of this version of retain (format {FORMAT})")
            _same_config(run.path, found["config"], wanted)
        elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise RetainError(f"{run.path} exists and is not a run folder (no run.json); choose another with out=DIR")
        elif main:
            write_json(head, {"format": FORMAT, "name": run.path.name, "config": wanted})
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
        config: dict[str, Any] = read_json(self.path / "run.json")["config"]
        return config

    @property
    def done(self) -> bool:
        """Whether the whole run is finished."""
        return (self.path / "DONE").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time writes to a run; a second one is told so."""
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
                raise RetainError(f"another process is writing to {self.path}; wait for it or choose out=DIR") from None
            yield

    def row(self, index: int, name: str) -> Row:
        """The folder of one row of the matrix; row 0 is the zero-shot row."""
        return Row(self.path / "rows" / f"{index:02d}-{_safe(name)}", self)

    def rows(self) -> list[Row]:
        """All rows on disk, in order."""
        return [Row(p, self) for p in sorted((self.path / "rows").glob("[0-9][0-9]*-*")) if p.is_dir()]

    def event(self, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        if not self.main:
            return
        line = json.dumps({"time": round(time.time(), 3), **fields}, default=float, ensure_ascii=False)
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf8") as f:
                f.write(line + "\n")
        except OSError as error:
            raise RetainError(f"cannot write {self.path / 'events.jsonl'}: {error.strerror}") from error

    def sample(self, task: str, example: Example, side: int = 160) -> str | None:
        """Keep a thumbnail of an example's first image for the report; its path inside the run, None without image."""
        if not example.images:
            return None
        name = f"samples/{_safe(task)}/{digest(example.id)}.png"
        if self.main and not (self.path / name).is_file():
            source = example.images[0]
            picture = source if isinstance(source, PILImage.Image) else None
            if picture is None:
                picture = PILImage.fromarray(source) if isinstance(source, np.ndarray) else PILImage.open(source)
            picture = picture.convert("RGB")
            picture.thumbnail((side, side))
            write_atomic(self.path / name, lambda p: picture.save(p, "png"))
        return name


@dataclass
class Row:
    """One state of the model: its adapters, the method's state, what it cost and what it answered."""

    path: Path
    run: RunDir

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

    def mark(self, word: str) -> None:
        """Write a marker file."""
        write_text(self.path / word, "")

    def save_model(self, bank: AdapterBank, method: Method, stats: Mapping[str, Any], before: Row | None) -> None:
        """Adapters that changed since the row before, what is on, and the method's state; then TRAINED."""
        old = read_json(before.path / "bank.json")["adapters"] if before else {}
        files: dict[str, dict[str, str]] = {}
        for name in bank.names:
            state = bank.state(name)
            mark = digest(state)
            if name in old and old[name]["digest"] == mark:
                files[name] = old[name]
                continue
            target = self.path / "adapters" / f"{name}.safetensors"
            write_atomic(target, lambda p, state=state: save_file({k: v.cpu() for k, v in state.items()}, p))
            files[name] = {"digest": mark, "file": target.relative_to(self.run.path).as_posix()}
        save_state(self.path / "method", method.state_dict())
        write_json(self.path / "fit.json", dict(stats))
        write_json(
            self.path / "bank.json", {"adapters": files, "mix": bank.mix.to_json(), "signature": bank.signature}
        )
        self.mark("TRAINED")
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    def load_model(self, bank: AdapterBank, method: Method | None) -> None:
        """Put the row's adapters, mix and method state back."""
        head = read_json(self.path / "bank.json")
        ours = json.loads(json.dumps(bank.signature, default=str))
        for key, value in head["signature"].items():
            if ours.get(key) != value:
                raise RetainError(f"{self.path}: adapters of another model: {key} is {value!r} there, {ours.get(key)!r} here")
        bank.mix = Mix()
        for name in [n for n in bank.names if n not in head["adapters"]]:
            bank.remove(name)
        for name, entry in head["adapters"].items():
            if name not in bank.names:
                bank.add(name)
            bank.load(name, load_tensors(self.run.path / entry["file"]))
        bank.mix = Mix.from_json(head["mix"])
        if method is not None:
            method.load_state_dict(load_state(self.path / "method"))

    def checkpoints(self) -> CheckpointDir:
        """Where `fit` leaves its state in the middle of this row's task."""
        return CheckpointDir(self.path / "checkpoint", self.run.main)

    def predictions(self, task: str) -> Path:
        """The file of one cell's predictions."""
        return self.path / "predictions" / f"{_safe(task)}.jsonl"


@dataclass
class CheckpointDir:
    """The newest mid-task checkpoint: two slots in turn, and a pointer that is renamed last."""

    path: Path
    main: bool = True

    def load(self) -> dict[str, Any] | None:
        """The newest complete checkpoint, or None."""
        pointer = self.path / "newest.json"
        if not pointer.is_file():
            return None
        state: dict[str, Any] = load_state(self.path / read_json(pointer)["stem"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Write to the slot that the pointer does not name, then move the pointer."""
        if not self.main:
            return
        pointer = self.path / "newest.json"
        used = read_json(pointer)["stem"] if pointer.is_file() else "b"
        stem = "a" if used == "b" else "b"
        save_state(self.path / stem, state)
        write_json(pointer, {"stem": stem})


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """An atomic JSONL file."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """A JSONL file. A torn last line, as a killed process leaves it, is left out; any other bad line is an error."""
    try:
        lines = path.read_text(encoding="utf8", errors="replace").split("\n")
    except OSError as error:
        raise RetainError(f"cannot read {path}: {error.strerror}") from error
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RetainError(f"{path}, line {number}: not valid JSON ({error})") from error
    return out


def append_lines(handle: IO[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows and flush, so that a killed evaluation keeps them."""
    handle.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    handle.flush()


def seeded(seed: int) -> None:
    """Give the global generator a known state; only code outside retain could draw from it."""
    torch.manual_seed(seed)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def _same_config(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    flat_a, flat_b = _flat(found), _flat(wanted)
    keys = [k for k in sorted(flat_a.keys() | flat_b.keys()) if flat_a.get(k) != flat_b.get(k) and k != "out"]
    if keys:
        said = "; ".join(f"{k}: {flat_a.get(k)!r} there, {flat_b.get(k)!r} here" for k in keys[:3])
        raise RetainError(f"{path} holds a run of another recipe ({said}); choose another folder with out=DIR")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}
