"""States on disk: a nest of plain values, tensors, arrays, paths and Examples as `stem.json` and `stem.safetensors`.

Nothing is pickled. The JSON holds the nest with the names of the tensors, their digest, and a seal
(`retain.run.records`); it is written last, and both are compared when the state is loaded. States of an earlier version
have neither, and are loaded as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from retain.data.picture import opened
from retain.files import read_json, write_atomic
from retain.run import records
from retain.run.sound import is_of
from retain.types import Example, Message, RetainError, digest


def save_state(stem: Path, value: Any) -> None:
    """A nest of plain values, tensors, arrays, paths and Examples as `stem.json` and `stem.safetensors`.

    Nests are dicts, lists, tuples and sets. Anything else is a RetainError that names its type. The JSON holds the
    digest of the tensors and is written last.
    """
    tensors: dict[str, Tensor] = {}
    try:
        skeleton = _pack(value, tensors, stem.name)
    except RecursionError:
        raise RetainError(f"{stem.name} is nested too deep to be saved") from None
    write_atomic(stem.with_suffix(".safetensors"), lambda p: save_file(tensors, p))
    records.write(stem.with_suffix(".json"), {"$state": skeleton, "tensors": _content(tensors)})


def load_state(stem: Path, device: torch.device | str = "cpu") -> Any:
    """The inverse of `save_state`. A tensor goes back to where it was: the CPU, or the accelerator.

    RetainError: a file that is missing, broken, of something else, or changed since it was written.
    """
    return loaded_state(stem, device)[0]


def loaded_state(stem: Path, device: torch.device | str) -> tuple[Any, bool]:
    """A state, and whether it was sealed; that of an earlier version is not."""
    skeleton, tensors, sealed = read_state(stem)
    return built_state(stem, skeleton, tensors, device), sealed


def read_state(stem: Path) -> tuple[Any, dict[str, Tensor], bool]:
    """The skeleton and the tensors of a state, as they were saved, and whether that is known."""
    file = stem.with_suffix(".json")
    skeleton, tensors = read_json(file), load_tensors(stem.with_suffix(".safetensors"))
    sealed = isinstance(skeleton, dict) and set(skeleton) == {"$state", "tensors", records.SEAL}
    if sealed:
        head = records.unsealed(file.name, skeleton, f"{file}")
        if head["tensors"] != _content(tensors):
            raise RetainError(
                f"{stem.with_suffix('.safetensors')} is not what {file} says (its digest does not fit)"
            )
        skeleton = head["$state"]
    return skeleton, tensors, sealed


def built_state(stem: Path, skeleton: Any, tensors: Mapping[str, Tensor], device: torch.device | str) -> Any:
    """The state that a skeleton describes."""
    try:
        return _unpack(skeleton, tensors, torch.device(device))
    except _Unreadable as error:
        raise RetainError(
            f"{stem.with_suffix('.json')} was not written by retain, or was edited: {error}"
        ) from None


def packed(value: Any, at: str) -> tuple[Any, dict[str, Tensor]]:
    """A nest as plain JSON data and the tensors that it names."""
    tensors: dict[str, Tensor] = {}
    return _pack(value, tensors, at), tensors


def unpacked(skeleton: Any, tensors: Mapping[str, Tensor], at: str) -> Any:
    """The inverse of `packed`. RetainError for what it cannot have made."""
    try:
        return _unpack(skeleton, tensors, torch.device("cpu"))
    except _Unreadable as error:
        raise RetainError(f"{at}: not a state: {error}") from None


def _content(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, shapes, types and bits."""
    return digest({key: [list(t.shape), t.reshape(-1)] for key, t in tensors.items()})


class _Unreadable(Exception):
    """What is wrong in a skeleton."""


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
        if isinstance(value, list):
            raise _Unreadable("a bare list")
        return value
    kind, body = _named(value)
    if kind in ("$tensor", "$array"):
        tensor = tensors.get(body[0]) if len(body) == 2 and isinstance(body[0], str) else None
        if tensor is None:
            raise _Unreadable(f"no tensor {body[:1]}")
        return tensor.numpy() if kind == "$array" else tensor.to(device) if body[1] else tensor
    if kind == "$path":
        if "\0" in body:
            raise _Unreadable(f"no path: {body!r}")
        return Path(body)
    try:
        if kind == "$dict":
            return {_unpack(k, tensors, device): _unpack(v, tensors, device) for k, v in body}
        items = [_unpack(v, tensors, device) for v in body]
        return _example(*items) if kind == "$example" else _KINDS[kind](items)
    except (TypeError, ValueError) as error:  # no pair, a list as a key, an example of other parts
        raise _Unreadable(f"{kind}: {error}") from None


def _named(value: dict[str, Any]) -> tuple[str, Any]:
    """What kind of value a skeleton's object stands for, and its body."""
    kind, body = next(iter(value.items()), ("nothing", None))
    if len(value) != 1 or kind not in _KINDS or not isinstance(body, str if kind == "$path" else list):
        raise _Unreadable(f"{sorted(value)[:3]} is no kind of value")
    return kind, body


def _example(name: str, turns: Any, images: Any, references: Any, meta: Any) -> Example:
    found = [name, *references, *(part for role, text, *_ in turns for part in (role, text))]
    numbers = [n for _, _, *shown in turns for n in (shown[:1] + [k for at in shown[1:] for k in at])]
    pictures = all(isinstance(i, Path | np.ndarray) for i in images)
    if not (pictures and is_of(found, list[str]) and is_of(numbers, list[int]) and isinstance(meta, Mapping)):
        raise TypeError("no Example")
    return Example(name, tuple(Message(*turn) for turn in turns), images, references, meta)


_KINDS: dict[str, Any] = {
    "$list": list, "$tuple": tuple, "$set": set, "$dict": dict, "$example": Example, "$path": Path, "$tensor": Tensor,
    "$array": np.ndarray,
}  # fmt: skip
