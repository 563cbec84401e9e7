"""Client files on disk, in the layout that FCIT publishes: one folder per unit, one JSON list of rows per client.

    ROOT/<beta or nothing>/Task1/client_0.json    [{"id": …, "image": "a/b.jpg", "conversations": [{"from", "value"}, …]}]

(Guo et al., ICCV 2025; Ghy0501/FCIT, the data set's `partitioned_data`.) What is read are choices of rows, not data: each
row of a file is found in the stream by its id and what it asks, or else by its image and what it asks. What is written is
what `retain.data.read` gives back: texts, references, `meta`, and pixels. A row that LLaVA's form cannot hold, such as
an image between words, is written in that of Hugging Face (`messages`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonpath
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from retain.data import read as reading
from retain.data.picture import opened
from retain.files import aside, json_text
from retain.stream import Task
from retain.types import Example, Examples, Message, Plain, RetainError, plain

HOMES = {"task": "Task-related/seq", "capability": "Capability-related/cap"}
"""Where the published folder has the files of each kind of setting."""

Rows = tuple[tuple[str, int], ...]
IMAGE = reading.IMAGE


@dataclass(frozen=True)
class Where:
    """A recipe's folder, and what says where in it the files are."""

    root: Path
    beta: float
    kind: str  # of setting, a key of HOMES

    def folder(self) -> Path:
        """The folder that holds `Task1`."""
        bases = [self.root, self.root / HOMES[self.kind]]
        tried = [base / beta for base in bases for beta in (str(self.beta), f"{self.beta:g}", "")]
        for folder in tried:
            if (folder / "Task1").is_dir():
                return folder
        raise RetainError(
            f"federated.partitions: no folder 'Task1' in {self.root}, nor in its folder {str(self.beta)!r} or "
            f"{HOMES[self.kind]!r}"
        )


# -- reading ---------------------------------------------------------------------------------------------


def read(
    where: Where, units: Sequence[Sequence[Task]], clients: int, min_rows: int, may_lack: bool
) -> list[list[Rows]]:
    """The rows of every unit's tasks that each client's file names, in the file's order.

    RetainError for another number of units or clients, a file without enough rows (with `may_lack` a file may lack, or
    have none), a row that the stream does not have, and one that two clients have. Every one names file and row.
    """
    folder = where.folder()
    n_units = sum(1 for f in folder.glob("Task*") if f.is_dir() and f.name[4:].isdigit())
    if n_units != len(units):
        raise RetainError(
            f"federated.partitions: {folder} has the files of {n_units} units (Task1, …), and the recipe has {len(units)}"
        )
    return [
        _unit(folder / f"Task{s + 1}", tasks, clients, min_rows, may_lack) for s, tasks in enumerate(units)
    ]


def _unit(folder: Path, tasks: Sequence[Task], clients: int, min_rows: int, may_lack: bool) -> list[Rows]:
    if not folder.is_dir():
        raise RetainError(f"federated.partitions: no folder {folder}")
    known = {f"client_{k}.json" for k in range(clients)}
    if others := sorted(f.name for f in folder.glob("client_*.json") if f.name not in known):
        raise RetainError(
            f"federated.partitions: {folder} has {others[0]}, but federated.clients is {clients}, counted from 0"
        )
    index, out = _Index(tasks), list[Rows]()
    for k in range(clients):
        path = folder / f"client_{k}.json"
        if may_lack and not path.exists():
            out.append(())
            continue
        rows = tuple(index.find(row, path, number) for number, row in reading.rows(_there(path)))
        if len(rows) < min_rows and not (may_lack and not rows):
            raise RetainError(f"{path}: {len(rows)} rows, but federated.min_rows is {min_rows}")
        out.append(rows)
    return out


def _there(path: Path) -> Path:
    if not path.is_file():
        raise RetainError(f"{path}: no such file; every client needs one, unless federated.skew is 'task'")
    return path


def _words(text: str) -> str:
    """A question without its images' places, for comparing."""
    return " ".join(text.replace(IMAGE, " ").split())


@dataclass(frozen=True)
class _Known:
    """What is compared of one row of the stream."""

    at: tuple[str, int]
    id: str
    question: str
    answer: str
    image: str  # "" for none, or none that is a file


@dataclass
class _Index:
    """Rows of the stream by id, and by question; each is given out once."""

    tasks: Sequence[Task]
    by_id: dict[str, list[_Known]] = field(default_factory=dict)
    by_look: dict[str, list[_Known]] = field(default_factory=dict)
    given: dict[tuple[str, int], str] = field(default_factory=dict)  # to which file and row

    def __post_init__(self) -> None:
        for task in self.tasks:
            for i, row in enumerate(plain(task.train)):
                image = row.images[0] if row.images and isinstance(row.images[0], str) else ""
                known = _Known(
                    (task.name, i), row.id, _words(_said(row, "user")), _said(row, "assistant"), image
                )
                self.by_id.setdefault(row.id, []).append(known)
                self.by_look.setdefault(known.question, []).append(known)

    def find(self, row: Mapping[str, Any], path: Path, number: int) -> tuple[str, int]:
        """The row of the stream that a file's row is."""
        at, named = f"{path}, row {number}", row.get("id", row.get("question_id"))
        ident, question, answer, image = str(named), *_asked(row, at)
        named_so = [k for k in self.by_id.get(ident, ()) if k.question.startswith(question)]
        found = [k for k in named_so if _same_image(k.image, image)]
        found = found or [k for k in self.by_look.get(question, ()) if _same_image(k.image, image)]
        copies = [k for k in named_so if k.answer == answer]  # of an image, under a name of their own
        found = found or (copies if len(copies) == 1 else [])
        found = [k for k in found if k.answer == answer] or found
        if not found:
            names = [t.name for t in self.tasks]
            other = self.by_id.get(ident)
            why = (
                f"; the one with this id asks {other[0].question[:60]!r} of {other[0].image!r}"
                if other
                else ""
            )
            raise RetainError(f"{at}, id {named!r}: no training row of {names} is this one{why}")
        free = [k for k in found if k.at not in self.given]
        if not free:
            raise RetainError(
                f"{at}, id {named!r}: row {found[0].at[1] + 1} of task {found[0].at[0]!r} is given to "
                f"{self.given[found[0].at]} already"
            )
        self.given[free[0].at] = f"{path.name}, row {number},"
        return free[0].at


def _said(row: Plain, role: str) -> str:
    """The first turn of the user, the last of the assistant."""
    turns = [turn[1] for turn in row.turns if turn[0] == role]
    return turns[0 if role == "user" else -1] if turns else ""


def _asked(row: Mapping[str, Any], at: str) -> tuple[str, str, str]:
    """The first question, the last answer and the first image of a file's row."""
    turns = row.get("conversations", row.get("messages"))
    if not isinstance(turns, list):
        raise RetainError(
            f"{at}: the field 'conversations' is missing; there are {sorted(map(str, row))[:8]}"
        )
    said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    for i, turn in enumerate(turns):
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if isinstance(text, list):  # Hugging Face's parts
            text = "".join(str(p.get("text", "")) for p in text if isinstance(p, dict))
        if not isinstance(who, str) or who not in reading.ROLES or not isinstance(text, str):
            raise RetainError(f"{at}, field 'conversations[{i}]': a turn with 'from' and 'value' is needed")
        said[reading.ROLES[who]].append(text)
    if not said["user"]:
        raise RetainError(f"{at}: no turn of the user (human/user)")
    image = row.get("image", row.get("images"))
    image = image[0] if isinstance(image, list) and image else image
    return _words(said["user"][0]), (said["assistant"] or [""])[-1], image if isinstance(image, str) else ""


def _same_image(known: str, told: str) -> bool:
    """Whether a stream's image is the one that a file names; one of them unnamed says nothing."""
    parts = PurePosixPath(told).parts
    return not known or not told or Path(known).parts[-len(parts) :] == parts


# -- writing ---------------------------------------------------------------------------------------------

Files = Mapping[int, Examples]
"""The number of a client to its examples."""


def write(units: Sequence[Files], out: Path, image_root: Path | None, copy: bool) -> Path:
    """`out/Task1/client_0.json` for every unit and client that has rows; returns the folder of the images.

    See `retain.federated.split.write_partitions`.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RetainError(f"{out} exists and is not empty; choose another folder")
    images = {v for files in units for es in files.values() for row in plain(es) for v in _sources(row)}
    copy = copy or None in images
    root = None if copy or not images else _root({v for v in images if v is not None}, image_root)
    try:
        with aside(out) as part:
            for s, files in enumerate(units):
                (part / f"Task{s + 1}").mkdir()
                for k, examples in files.items():
                    rows = [_row(e, _taker(part, k, f"{s + 1}_{i}", root)) for i, e in enumerate(examples)]
                    text = json_text(rows, indent=1, other=_refused)
                    (part / f"Task{s + 1}" / f"client_{k}.json").write_text(text + "\n", encoding="utf8")
    except OSError as error:
        raise RetainError(f"cannot write {out}: {error.strerror or error}") from error
    return root or out


def _sources(row: Plain) -> list[str | None]:
    """A row's images: paths as text, None for what is no file."""
    return [v if isinstance(v, str) else None for v in row.images]


def _root(images: set[str], image_root: Path | None) -> Path:
    """The folder that all images are in."""
    if image_root is None:
        return Path(commonpath([str(Path(v).parent) for v in images]))
    root = image_root.expanduser().absolute()
    for v in sorted(images):
        if not Path(v).is_relative_to(root):
            raise RetainError(
                f"image {v!r} is not in the image root {str(root)!r}; give another, or copy the images"
            )
    return root


def _taker(part: Path, k: int, stem: str, root: Path | None) -> Callable[[Example, int], str]:
    """What gives the j-th image of an example its path in the file: where it is, or a copy of its own."""

    def take(example: Example, j: int) -> str:
        source = example.images[j]
        if root is not None:
            assert isinstance(source, Path)
            return source.relative_to(root).as_posix()
        name = f"images/client_{k}/{stem}_{j}{source.suffix if isinstance(source, Path) else '.png'}"
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            shutil.copyfile(source, part / name)
        else:
            opened(source, example.told).save(part / name)
        return name

    return take


def _row(example: Example, take: Callable[[Example, int], str]) -> dict[str, Any]:
    """An example as a row that `retain.data.read` makes the same example of, but for its images' places."""
    out: dict[str, Any] = {"id": example.id}
    images = [take(example, j) for j in range(len(example.images))]
    plainly = all(map(_llava, example.messages))
    if len(images) == 1 and plainly:
        out["image"] = images[0]
    elif images:
        out["images"] = images
    if plainly:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        out["conversations"] = [
            {"from": names[m.role], "value": f"{IMAGE}\n" * m.images + m.text} for m in example.messages
        ]
    else:
        out["messages"] = [{"role": m.role, "content": _content(m, example.told)} for m in example.messages]
    if example.references:
        out["references"] = list(example.references)
    if example.meta:
        out["meta"] = dict(example.meta)
    return out


def _llava(m: Message) -> bool:
    """Whether LLaVA's form gives the turn back as it is."""
    if m.role == "assistant":
        return not m.images
    return IMAGE not in m.text and (not m.images or (not m.at and m.text == m.text.strip()))


def _content(m: Message, told: str) -> list[dict[str, str]]:
    if IMAGE in m.text and m.role != "assistant" and not m.images:
        raise RetainError(
            f"{told}: {IMAGE!r} as a word of a question cannot be written; it stands for an image"
        )
    return [{"type": "image"} if p is None else {"type": "text", "text": p} for p in m.parts()]


def _refused(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise RetainError(f"a value of `meta` is no plain data: {type(value).__name__}")
