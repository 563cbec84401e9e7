"""The values that flow through retain: messages, examples, batches, outputs, guides.

Everything here is frozen data without behaviour beyond small accessors, so that a batch can be hashed, logged and
compared. Shapes are in the names: B samples, T tokens, V vocabulary, N answer tokens of the whole batch, F image
features, D text features.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

Role = Literal["system", "user", "assistant"]
ImageSource = Path | np.ndarray | PILImage.Image
"""An image as a path, as HW or HWC pixels, or as a Pillow image. `data.picture` opens it: paths late, once per use."""

State = Mapping[str, Tensor]
"""An adapter on its own: tensor name to tensor, e.g. what `AdapterBank.state(name)` returns."""


class RetainError(Exception):
    """An error that a user can mend: its text names the file, row, field, value and the choices. Exit code 2."""


class Conflict(RetainError):
    """Two parts of a stack claim a hook that only one part may own."""


@dataclass(frozen=True)
class Message:
    """One turn. `images` counts how many of the example's images, in order, are shown in it.

    `at` says where: offsets into `text`, ascending, one per image. Without it all stand before the text.
    """

    role: Role
    text: str
    images: int = 0
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.at:
            return
        fits = len(self.at) == self.images and list(self.at) == sorted(self.at)
        if not (fits and self.at[0] >= 0 and self.at[-1] <= len(self.text)):
            raise RetainError(
                f"message {self.text[:40]!r}: {self.images} images need as many ascending offsets into its "
                f"{len(self.text)} characters, not {list(self.at)}"
            )

    def parts(self) -> tuple[str | None, ...]:
        """The turn in its order: a text, or None where an image stands. Empty texts are left out."""
        if not self.at:
            return (*[None] * self.images, *([self.text] if self.text else []))
        cuts = [0, *self.at, len(self.text)]
        texts = [self.text[a:b] for a, b in pairwise(cuts)]
        mixed = [part for text in texts[:-1] for part in (text, None)] + [texts[-1]]
        return tuple(part for part in mixed if part is None or part)


@dataclass(frozen=True, eq=False)
class Example:
    """One instruction with its reference.

    `messages` ends with an assistant turn: the text to learn. `references` are all acceptable answers for the scorer
    (the assistant's text when empty); `meta` carries what a scorer needs besides (options, box, image size).
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    references: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: tuple[str, int] = ("", 0)  # the file and row that it was read from, for messages alone

    @property
    def told(self) -> str:
        """What a message calls it: its id, and the file and row that it came from."""
        file, row = self.source
        return f"example {self.id!r}" + (f" ({file}, row {row})" if file else "")

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return next((m.text for m in reversed(self.messages) if m.role == "user"), "")

    @property
    def answer(self) -> str:
        """Text of the last assistant turn."""
        return next((m.text for m in reversed(self.messages) if m.role == "assistant"), "")

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All messages before the final assistant turn: what is shown at inference."""
        last = len(self.messages) - (self.messages[-1].role == "assistant")
        return self.messages[:last]

    @property
    def targets(self) -> tuple[str, ...]:
        """The references, or the assistant's text where there are none."""
        return self.references or (self.answer,)


Examples = Sequence[Example]

Turn = tuple[str, str, int, tuple[int, ...]]
"""A message as plain data: role, text, images, at."""


class Plain(NamedTuple):
    """What the model sees of an example, as plain data: a hundred thousand of them are looked through in a second.

    `images` are paths as text, or the sources themselves where they are none.
    """

    id: str
    turns: Sequence[Turn]
    images: Sequence[Any]
    references: Sequence[str]

    @property
    def answers(self) -> int:
        """How many turns of the assistant there are."""
        return sum(turn[0] == "assistant" for turn in self.turns)


class Lazy(Sequence[Example]):
    """Examples that are made when they are asked for, so that a file of any length costs little memory.

    Two that were asked for at different times may be two objects. `plain` gives all of them without making any.
    """

    @abstractmethod
    def plain(self) -> Iterator[Plain]:
        """All of them in order, as plain data."""

    @property
    def answers(self) -> int:
        """The most turns of the assistant that an example has."""
        return max((row.answers for row in self.plain()), default=0)

    @cached_property
    def lengths(self) -> dict[Any, Sequence[int]]:
        """Tokens of every row, by what counted them: kept where they were asked for."""
        return {}

    @abstractmethod
    def one(self, i: int) -> Example:
        """The example of row `i`, counted from 0 and within the length."""

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # Sequence's overloads add nothing here
        if isinstance(i, slice):
            return [self.one(k) for k in range(*i.indices(len(self)))]
        n = len(self)
        if not -n <= i < n:
            raise IndexError(f"row {i} of {n}")
        return self.one(i % n)

    def __iter__(self) -> Iterator[Example]:
        return (self.one(i) for i in range(len(self)))


class Joined(Lazy):
    """Several sequences of examples one after the other, none of them copied."""

    def __init__(self, *parts: Examples) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def one(self, i: int) -> Example:
        """The example of row `i`."""
        k = bisect_right(self.ends, i)
        found: Example = self.parts[k][i - (self.ends[k - 1] if k else 0)]
        return found

    def plain(self) -> Iterator[Plain]:
        """All of them in order, as plain data."""
        for part in self.parts:
            yield from plain(part)


def joined(*parts: Examples) -> Examples:
    """Several sequences of examples as one: a list, or without a copy where one of them is `Lazy`."""
    if any(isinstance(part, Lazy) for part in parts):
        return Joined(*parts)
    return [e for part in parts for e in part]


def plain(examples: Examples) -> Iterator[Plain]:
    """All examples as plain data."""
    if isinstance(examples, Lazy):
        yield from examples.plain()
        return
    for e in examples:
        turns = [(m.role, m.text, m.images, m.at) for m in e.messages]
        yield Plain(e.id, turns, [str(v) if isinstance(v, Path) else v for v in e.images], e.references)


def most_answers(examples: Examples) -> int:
    """The most turns of the assistant that an example has."""
    if isinstance(examples, Lazy):
        return examples.answers
    return max((row.answers for row in plain(examples)), default=0)


class Counted:
    """As many values as it says, one after the other: `digest` takes them as a list that nobody holds."""

    def __init__(self, n: int, values: Iterable[Any]) -> None:
        self.n, self.values = n, values


def digest(value: Any) -> str:
    """A short stable hash of plain data, arrays and images by content, and paths by name and size."""
    h = hashlib.sha256()
    paths: dict[str, str] = {}  # a picture that many rows show is asked for its size once

    def eat_look(v: PILImage.Image) -> None:
        """What decides besides the stored pixels how an image looks."""
        if v.palette is not None:
            h.update(f"{v.palette.mode}".encode() + v.palette.tobytes())
        for key in ("transparency", "exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            if key in v.info:
                h.update(f"{key}={v.info[key]!r}".encode())

    def told_path(v: str) -> str:
        if v not in paths:
            paths[v] = f"{v}:{_size(v)}"
        return paths[v]

    def eat_example(v: Plain) -> None:
        """As the list [id, turns, images, references] would be eaten; in one piece where images are paths."""
        out = [f"[4{_told(v.id)};[{len(v.turns)}"]
        for role, text, images, at in v.turns:
            out.append(f"[{4 if at else 3}{_told(role)};{_told(text)};{_told(images)};")
            if at:
                out.append(f"[{len(at)}" + "".join(f"{_told(n)};" for n in at))
        out.append(f"[{len(v.images)}")
        for image in v.images:
            if isinstance(image, str):
                out.append(told_path(image))
                continue
            h.update("".join(out).encode())
            out = []
            try:
                eat(image)
            except RetainError as error:
                raise RetainError(f"example {v.id!r}: {error}") from error
        out.append(f"[{len(v.references)}")
        if v.references:
            out += [f"{_told(r)};" for r in v.references]
        h.update("".join(out).encode())

    def eat(v: Any) -> None:
        if isinstance(v, Example):
            for row in plain([v]):
                eat_example(row)
        elif isinstance(v, Lazy):
            h.update(f"[{len(v)}".encode())
            for row in v.plain():
                eat_example(row)
        elif isinstance(v, Counted):
            h.update(f"[{v.n}".encode())
            for item in v.values:
                eat(item)
        elif isinstance(v, np.ndarray):
            h.update(str((v.shape, str(v.dtype))).encode() + np.ascontiguousarray(v).tobytes())
        elif isinstance(v, PILImage.Image):
            h.update(str((v.size, v.mode)).encode() + _stored(v))
            eat_look(v)
        elif isinstance(v, Path):
            h.update(told_path(str(v)).encode())
        elif isinstance(v, Tensor):
            h.update(str((tuple(v.shape), str(v.dtype))).encode())
            h.update(v.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if v.numel() else b"")
        elif isinstance(v, Mapping):
            for key in sorted(v, key=str):
                h.update(f"{key}=".encode())
                eat(v[key])
        elif isinstance(v, set | frozenset):  # their own order differs from process to process
            eat(sorted(v, key=repr))
        elif isinstance(v, np.generic):
            eat(v.item())
        elif isinstance(v, list | tuple):
            h.update(f"[{len(v)}".encode())
            for item in v:
                eat(item)
        else:
            h.update(_told(v).encode() + b";")

    eat(value)
    return h.hexdigest()[:16]


def _told(value: Any) -> str:
    """A plain value as JSON."""
    if isinstance(value, str):
        return quoted(value)
    return int.__repr__(value) if type(value) is int else json.dumps(value, sort_keys=True, default=str)


def _size(path: str) -> int | str:
    """Bytes of a file, "missing" of anything else."""
    try:
        found = os.stat(path)  # noqa: PTH116  # a Path costs as much again
    except (OSError, ValueError):
        return "missing"
    return found.st_size if stat.S_ISREG(found.st_mode) else "missing"


def _stored(image: PILImage.Image) -> bytes:
    """The pixels of a Pillow image as it holds them, decoded now if they were not."""
    try:
        return image.tobytes()
    except Exception as error:  # Pillow's readers raise nearly every class there is on a broken file
        image.close()  # asked again, Pillow would show what it has, the rest of it black
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise RetainError(f"cannot read an image of {image.width} x {image.height} pixels: {why}") from error


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples made ready for one model.

    `inputs` are that model's own tensors (input_ids, attention_mask, pixel_values, image_grid_thw, …), whatever its
    family needs; only the model reads them. `labels_BT` is -100 except on answer tokens. `image_row_I` names the
    sample that each of the I images belongs to (I may differ from B).
    """

    examples: tuple[Example, ...]
    inputs: Mapping[str, Tensor]
    labels_BT: Tensor | None
    image_row_I: Tensor
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def n_answer(self) -> int:
        """Answer tokens that a loss is taken over (the first position of a row predicts nothing before it)."""
        return 0 if self.labels_BT is None else int((self.labels_BT[:, 1:] != -100).sum())


@dataclass(frozen=True, eq=False)
class Output:
    """What a forward gives: the mean loss over answer tokens, and those tokens' logits."""

    loss: Tensor  # ()
    logits_NV: Tensor  # the positions that predict the N answer tokens, fp32 or the compute type
    labels_N: Tensor
    row_N: Tensor  # the sample of each answer token


@dataclass(frozen=True, eq=False)
class Guide:
    """Frozen features that routers compare, fp32, unit length. A sample without an image has a zero image row."""

    image_BF: Tensor
    text_BD: Tensor
