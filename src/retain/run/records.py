"""The JSON records of a run folder: what each of them looks like, and the seal by which a changed one is noticed.

A record is written with `seal`, a hash of its name and all else in it. Where the names of tasks are the keys (data.json,
cells.json) every entry has its own. A record whose seal does not fit is refused by its name, and so is one of another
shape. A record without a seal is one of an earlier version, or of somebody who changed it and took the seal out: it is
read as it is, and its shape still counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from retain.files import parse_json, read_json, write_json
from retain.types import RetainError

SEAL = "seal"
FLAT = 60
"""Lists and objects inside each other in a record: what shows one (YAML, JSON) takes a few calls for each."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Weights = dict[str, Number]


# -- shapes: what is not listed may be there, and is not looked at ------------------------------------------------


class Config(TypedDict, total=False):
    """The resolved recipe, as far as it is read without `retain.config`."""

    seed: int
    stream: dict[str, Any]


class Head(TypedDict, total=False):
    """run.json: the recipe that the run was made with."""

    format: int
    name: str
    config: Config
    seed: int
    method: str | list[Any] | dict[str, Any]


class Data(TypedDict):
    """One task in data.json; folders of an earlier version have no `data`."""

    digest: str
    data: NotRequired[str]
    train: NotRequired[Count]
    test: NotRequired[Count]
    score: NotRequired[str]


class Environment(TypedDict, total=False):
    """environment.json: where the run was made."""

    model: str
    seed: int
    python: str
    platform: str
    machine: str
    threads: Count
    cuda: str | None
    packages: dict[str, str]
    git: str | None


class Published(TypedDict):
    """published.json: a paper's table for the benchmark."""

    source: str
    scores: dict[str, dict[str, Number]]


class Matrix(TypedDict):
    """matrix.json; null where nothing was evaluated."""

    tasks: list[str]
    values: list[list[Number | None]]
    unseen: NotRequired[list[str]]
    samples: NotRequired[dict[str, list[list[Number] | None]]]
    ids: NotRequired[dict[str, list[str]]]


class Adapter(TypedDict):
    """Digest and file, relative to the run, of an adapter in bank.json."""

    digest: str
    file: str


class Mixed(TypedDict):
    """`retain.adapters.bank.Mix` in bank.json."""

    weights: Weights
    by_layer: NotRequired[dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], Weights]]


class Bank(TypedDict):
    """bank.json: the adapters of a row, what is on, and the model that they belong to."""

    adapters: dict[str, Adapter]
    mix: Mixed
    signature: dict[str, Any]


class Fit(TypedDict, total=False):
    """fit.json: what training a task took."""

    steps: Count
    samples: Count
    tokens: Count
    seconds: Amount
    last_loss: float
    trainable_parameters: Count
    trained: list[str]
    peak_memory_bytes: Count
    reused: bool
    flops: Amount
    learned: list[str]


class Stats(TypedDict, total=False):
    """What a checkpoint has counted; all of `retain.run.train.FitStats` and nothing else."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    steps: Count
    samples: Count
    tokens: Count
    seconds: Amount
    last_loss: float
    trainable_parameters: Count
    trained: list[str]
    peak_memory_bytes: Count
    reused: bool


class Cell(TypedDict):
    """A finished cell in cells.json. `answers` is the digest of its predictions file."""

    key: str
    score: Number
    n: NotRequired[Count]
    copied: NotRequired[bool]
    seconds: NotRequired[Amount]
    compat: NotRequired[Number | None]
    tokens: NotRequired[Count]
    answers: NotRequired[str]


class Answer(TypedDict):
    """A line of a predictions file."""

    id: str
    prediction: str
    score: Number
    question: NotRequired[str]
    references: NotRequired[list[str]]
    compat: NotRequired[Number | None]
    image: NotRequired[str | None]
    mix: NotRequired[Weights | None]


class Part(TypedDict):
    """A line of an evaluation that is under way."""

    id: str
    prediction: str


class Newest(TypedDict):
    """newest.json: which slot holds the newest checkpoint."""

    stem: Literal["a", "b"]


class Event(TypedDict, total=False):
    """A line of events.jsonl, as far as it is sorted by."""

    kind: str
    task: str | None
    step: Number
    first: Number


Budget = dict[str, Amount]
Setting = dict[str, Any]


# -- reading and writing -------------------------------------------------------------------------------------


def seal(name: str, value: Any) -> str:
    """A hash of a name and of plain data, keys in their order."""
    text = json.dumps([name, value])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def sealed(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The value with its seal, as the last key."""
    plain = {k: v for k, v in value.items() if k != SEAL}
    return {**plain, SEAL: seal(name, plain)}


def write(path: Path, value: Mapping[str, Any]) -> None:
    """A record with its seal, whole or not at all."""
    write_json(path, sealed(path.name, value))


def write_table(path: Path, value: Mapping[str, Mapping[str, Any]]) -> None:
    """A record by task; each entry has a seal of its own."""
    write_json(path, {name: sealed(name, entry) for name, entry in value.items()})


def read(path: Path, shape: Any) -> dict[str, Any]:
    """A record of a shape. RetainError: unreadable, of another shape (the field is named), changed since."""
    whole = fits(read_json(path, FLAT), dict[str, Any], path)
    value: dict[str, Any] = fits(unsealed(path.name, whole, f"{path}"), shape, path)
    return value


def read_table(path: Path, shape: Any) -> dict[str, dict[str, Any]]:
    """A record by task, each entry of a shape."""
    whole = fits(read_json(path, FLAT), dict[str, dict[str, Any]], path)
    table = {name: unsealed(name, entry, f"{path}: {name}") for name, entry in whole.items()}
    fits(table, dict[str, shape], path)
    return table


def read_lines(path: Path, shape: Any, *, digest: str | None = None) -> list[dict[str, Any]]:
    """The lines of a JSONL file that was written at once, each of a shape; `digest` is that of the file, if known."""
    return list(each_line(path, shape, digest=digest))


def each_line(path: Path, shape: Any, *, digest: str | None = None) -> Iterator[dict[str, Any]]:
    """The same, one after the other: the objects of a long file are many times its bytes."""
    for number, line in enumerate(BytesIO(content(path, digest)), 1):
        if line.strip():
            try:
                value = parse_json(line.decode(), FLAT)
            except ValueError as error:
                raise RetainError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield fits(value, shape, f"{path}, line {number}")


def content(path: Path, digest: str | None) -> bytes:
    """The bytes of a file. RetainError: unreadable, or with another digest than it had."""
    try:
        found = path.read_bytes()
    except OSError as error:
        raise RetainError(f"cannot read {path}: {error.strerror or error}") from error
    if digest is not None and digest != file_digest(found):
        raise RetainError(f"{path} was changed after retain wrote it (its digest does not fit)")
    return found


def file_digest(content: bytes) -> str:
    """A short hash of a file's bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def unsealed(name: str, value: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The value without its seal. RetainError where the seal does not fit; one of an earlier version has none."""
    plain = {k: v for k, v in value.items() if k != SEAL}
    if not _intact(name, value, plain):
        raise RetainError(
            f"{where} was changed after retain wrote it (its seal does not fit); if you changed it yourself, take the "
            f"key {SEAL!r} out of it"
        )
    return plain


def _intact(name: str, value: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    if SEAL in value:
        return bool(value[SEAL] == seal(name, plain))
    last = next(reversed(list(plain)), "")  # a seal whose own key was changed is no seal that is missing
    return plain.get(last) != seal(name, {k: v for k, v in plain.items() if k != last})


def is_a(value: Any, shape: Any) -> bool:
    """Whether plain data have a shape."""
    try:
        fits(value, shape, "")
    except RetainError:
        return False
    return True


def fits(value: Any, shape: Any, where: Path | str) -> Any:
    """The value itself, where it has the shape. RetainError: the field that has not."""
    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        said = first["msg"] if field else "a JSON object is needed"
        raise RetainError(
            f"{where} was not written by retain, or was edited: {field}{': ' if field else ''}{said}"
        ) from None
    return value


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
