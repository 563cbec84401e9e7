"""The size of an ordinary PNG or JPEG file by its first and last bytes: what a run over very many pictures can afford.

W3C PNG (third edition), 5 and 11.2: chunks and their checksums; ITU-T T.81, B.1 and B.2: segments up to the scan. What is
not exactly as programs write it is left to Pillow, which says what is wrong.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from pathlib import Path

from retain.data.picture import MAX_PIXELS, allow

HEAD, TAIL = 1 << 13, 1 << 10
"""Bytes of a file in which its pixels must begin, and at its end in which its last marker is looked for: programs
write words behind it."""


def glanced(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """Width and height of an ordinary PNG or JPEG file whose head and end are as they should be; else None.

    A fifth of what Pillow takes to open a file, for folders of very many. None is no judgement: `looked_at` says more.
    The size is as stored, before EXIF turns it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    except (OSError, ValueError):
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            return None
        head = os.pread(handle, HEAD, 0)
        tail = head if found.st_size <= HEAD else os.pread(handle, TAIL, found.st_size - TAIL)
    except OSError:
        return None
    finally:
        os.close(handle)
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        size = _png_size(head) if b"IEND\xaeB`\x82" in tail[-TAIL:] else None
    else:
        size = _jpeg_size(head) if b"\xff\xd9" in tail[-TAIL:] else None
    if size is None or not 0 < size[0] * size[1] <= max_pixels:
        return None
    allow(max_pixels)
    return size


PNG_KINDS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Bit depths of each colour type of PNG (W3C PNG, table 11.1)."""


def _png_size(head: bytes) -> tuple[int, int] | None:
    """From a PNG file's first chunks up to its pixels, their checksums compared."""
    at, size = 8, None
    while at + 12 <= len(head):
        (n,), kind = struct.unpack_from(">I", head, at), head[at + 4 : at + 8]
        if kind == b"IDAT":
            return size
        end = at + 8 + n
        if end + 4 > len(head) or zlib.crc32(head[at + 4 : end]) != int.from_bytes(
            head[end : end + 4], "big"
        ):
            return None
        if at == 8:
            if kind != b"IHDR" or n != 13:
                return None
            width, height, depth, colour, *how = struct.unpack_from(">IIBBBBB", head, 16)
            if depth not in PNG_KINDS.get(colour, ()) or how[:2] != [0, 0] or how[2] > 1:
                return None
            size = (width, height)
        at = end + 4
    return None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """From a JPEG file's segments up to its scan: baseline or progressive, eight bits."""
    at, size = 2, None
    if head[:2] != b"\xff\xd8":
        return None
    while at + 10 <= len(head):
        if head[at] != 0xFF:
            return None
        marker, n = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if marker == 0xDA:
            return size if n in (8, 10, 12) and at + 2 + n <= len(head) else None
        if marker in (0xC0, 0xC1, 0xC2):
            if head[at + 4] != 8 or head[at + 9] not in (1, 3) or n != 8 + 3 * head[at + 9] or size:
                return None
            size = (
                int.from_bytes(head[at + 7 : at + 9], "big"),
                int.from_bytes(head[at + 5 : at + 7], "big"),
            )
        known = 0xE0 <= marker <= 0xEF or marker in (0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xFE)
        if not known or n < 2 or (marker == 0xDB and not _tables(head[at + 4 : at + 2 + n])):
            return None
        at += 2 + n
    return None


def _tables(segment: bytes) -> bool:
    """Whether a segment holds whole quantisation tables: of 64 numbers of one byte or of two."""
    at = 0
    while at < len(segment):
        at += 65 if segment[at] < 16 else 129
    return at == len(segment)
