"""The values that flow through retain: messages, examples, batches, outputs, guides.

Everything here is frozen data without behaviour beyond small accessors, so that a batch can be hashed, logged and
compared. Shapes are in the names: B samples, T tokens, V vocabulary, N answer tokens of the whole batch, F image
features, D text features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

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
        fits = len(self.at) == self.images and list(self.at) == sorted(self.at)
        if self.at and not (fits and self.at[0] >= 0 and self.at[-1] <= len(self.text)):
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


def digest(value: Any) -> str:
    """A short stable hash of plain data, arrays and images by content, and paths by name and size."""
    h = hashlib.sha256()

    def eat_look(v: PILImage.Image) -> None:
        """What decides besides the stored pixels how an image looks."""
        if v.palette is not None:
            h.update(f"{v.palette.mode}".encode() + v.palette.tobytes())
        for key in ("transparency", "exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            if key in v.info:
                h.update(f"{key}={v.info[key]!r}".encode())

    def eat(v: Any) -> None:
        if isinstance(v, Example):
            turns = [[m.role, m.text, m.images, *([list(m.at)] if m.at else [])] for m in v.messages]
            try:
                eat([v.id, turns, list(v.images), list(v.references)])
            except RetainError as error:
                raise RetainError(f"{v.told}: {error}") from error
        elif isinstance(v, np.ndarray):
            h.update(str((v.shape, str(v.dtype))).encode() + np.ascontiguousarray(v).tobytes())
        elif isinstance(v, PILImage.Image):
            h.update(str((v.size, v.mode)).encode() + _stored(v))
            eat_look(v)
        elif isinstance(v, Path):
            h.update(f"{v}:{v.stat().st_size if v.is_file() else 'missing'}".encode())
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
            h.update(json.dumps(v, sort_keys=True, default=str).encode() + b";")

    eat(value)
    return h.hexdigest()[:16]


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
