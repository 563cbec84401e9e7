"""What a server and its clients tell each other: one file of safetensors whose header holds the words.

    Message(head, tensors) ─► bytes ─► Message          the same bytes in one process, on a disk and over a network

Nothing is pickled, every type that safetensors knows travels as it is (bfloat16 too), and the length is what a round
costs. A message from a client is read as a stranger's file: of this shape, or refused in one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from retain.files import parse_json
from retain.types import RetainError

FORMAT = 1
KEY = "retain"
LONGEST_HEAD = 64 * 2**20
"""Bytes of words that a message may have: names of tensors and what is said of them, no data."""


@dataclass(frozen=True)
class Message:
    """Plain words and tensors by name."""

    head: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        words = json.dumps({"format": FORMAT, **self.head})
        tensors = {k: t.detach().cpu().contiguous() for k, t in self.tensors.items()}
        return bytes(save(tensors, {KEY: words}))

    @staticmethod
    def from_bytes(data: bytes, who: str) -> Message:
        """The inverse. RetainError, naming who sent it, for anything else."""
        head = words(data, who)
        try:
            return Message(head, load(data))
        except (SafetensorError, ValueError, KeyError) as error:
            raise RetainError(f"{who}: its message cannot be read ({error})") from None

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under a name, `name/…`, without it."""
        return {k[len(name) + 1 :]: t for k, t in self.tensors.items() if k.startswith(f"{name}/")}


def words(data: bytes, who: str) -> dict[str, Any]:
    """The words of a message, without making its tensors."""
    n = int.from_bytes(data[:8], "little")
    if len(data) < 8 or n > min(len(data) - 8, LONGEST_HEAD):
        raise RetainError(f"{who}: its message is no safetensors file")
    try:
        head = parse_json(data[8 : 8 + n].decode())
        told = parse_json(head["__metadata__"][KEY])
    except (ValueError, KeyError, TypeError):
        raise RetainError(f"{who}: its message has no words of retain") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise RetainError(
            f"{who}: its message is of another version of retain; install the same on both sides"
        )
    return told


class Spooled:
    """A message as a file, whose tensors are read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = safe_open(path, "pt")
        names: Any = self._file.keys
        self.keys = [str(k) for k in names()]

    def tensor(self, key: str) -> Tensor:
        """One tensor, as it was sent, in memory of its own."""
        found: Tensor = self._file.get_tensor(key)
        return found.clone()

    def rows(self, key: str, a: int, b: int) -> Tensor:
        """Its entries a to b of the first axis; nothing else is read."""
        found: Tensor = self._file.get_slice(key)[a:b]
        return found.clone()

    def shape(self, key: str) -> torch.Size:
        """Its shape, without reading it."""
        return torch.Size(self._file.get_slice(key).get_shape())
