"""Rows that were read and checked, kept small: plain data in blocks of bytes, made into examples when asked for.

A row costs about its text in memory, where the objects of an example cost two thousand bytes; from `PACKED` bytes on
blocks are compressed. What is kept is what was checked: a file that changes during a run changes nothing. The bytes
are `marshal`'s, made and read by this process alone. The `RECENT` examples asked for last stay the objects they are,
so that what others remember of them (token ids, features) is found again; a small file stays whole.
"""

from __future__ import annotations

import marshal
import zlib
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retain.types import Example, Lazy, Message, Plain, plain

BLOCK = 1 << 14
PACKED = 1 << 26
RECENT = 1 << 12


class Kept(Lazy):
    """Examples in the order in which they were added."""

    def __init__(self, file: str = "") -> None:
        self.file, self._answers = file, 0  # messages name it
        self._firsts, self._blocks = array("Q"), list[bytes]()  # the first row of every block
        self._offsets = array("L")  # of every row within its block
        self._open, self._bytes = bytearray(), 0  # the block that is being filled; all that are full
        self._whole: dict[
            int, Example
        ] = {}  # what holds more than plain data, such as pictures of a parquet file
        self._recent: OrderedDict[int, Example] = OrderedDict()
        self._last = (-1, b"")  # the block that was asked for last

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def answers(self) -> int:
        """The most turns of the assistant that an example has."""
        return self._answers

    def add(self, example: Example) -> None:
        """One more row."""
        turns = tuple([(m.role, m.text, m.images, m.at) for m in example.messages])
        self._answers = max(self._answers, sum([turn[0] == "assistant" for turn in turns]))
        images = tuple([str(v) if isinstance(v, Path) else None for v in example.images])
        try:
            row = marshal.dumps((example.id, turns, images, example.references, _dict(example.meta)))
        except ValueError:  # a value of `meta` that is no plain data, or nests too deep
            row = WHOLE
        if row is WHOLE or None in images:
            self._whole[len(self)] = example
        if not self._open:
            self._firsts.append(len(self))
        self._offsets.append(len(self._open))
        self._open += row
        if len(self._open) >= BLOCK:
            self._close()

    def plain(self) -> Iterator[Plain]:
        """All rows in order, as plain data."""
        for k in range(len(self._firsts)):
            block, first = memoryview(self._block(k)), self._firsts[k]
            end = self._firsts[k + 1] if k + 1 < len(self._firsts) else len(self)
            for row in range(first, end):
                found = self._whole.get(row)
                if found is None:
                    yield Plain(*marshal.loads(block[self._offsets[row] :])[:4])
                else:
                    yield from plain([found])

    def one(self, i: int) -> Example:
        """The example of row `i`: the same object as before while it is among the last asked for."""
        found = self._recent.get(i) or self._whole.get(i) or self._made(i)
        self._recent[i] = found
        self._recent.move_to_end(i)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return found

    def _made(self, i: int) -> Example:
        k = bisect_right(self._firsts, i) - 1
        block = memoryview(self._block(k))
        ident, turns, images, references, meta = marshal.loads(block[self._offsets[i] :])
        return Example(
            ident,
            tuple([Message(*turn) for turn in turns]),
            tuple(map(Path, images)),
            references,
            meta,
            (self.file, i + 1),
        )

    def _block(self, k: int) -> bytes:
        if k == len(self._blocks):
            self._close()
        if self._last[0] != k:
            block = self._blocks[k]
            self._last = (k, zlib.decompress(block) if block[:1] == PRESSED else block)
        return self._last[1]

    def _close(self) -> None:
        block = bytes(self._open)  # full, or read before it was
        self._bytes += len(block)
        self._blocks.append(zlib.compress(block, 1) if self._bytes > PACKED else block)
        self._open.clear()


WHOLE = marshal.dumps(None)
"""Stands for a row that is kept as it is."""

PRESSED = zlib.compress(b"")[:1]
"""The first byte of a compressed block; marshal begins a tuple, or nothing, with another."""


def _dict(value: Mapping[str, Any]) -> dict[str, Any]:
    return value if isinstance(value, dict) else dict(value)
