"""Files and folders that survive a kill: written under a temporary name, flushed to disk, renamed; torn lines cut off.

JSON keeps the order of its keys: the order of adapters is the order of sums, and so part of the result. What is
written has the permissions that the user's umask asks for, whatever a library chose for its temporary files. Text that
UTF-8 cannot hold (half of a surrogate pair, as in file names that are not UTF-8) is written as JSON's own escape.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from retain.types import RetainError

DEEPEST = 500
"""Lists and objects inside each other in a JSON file that is read: more would exhaust the stack of who walks it."""


def write_atomic(
    path: Path, write: Callable[[Path], object], *, durable: bool = True, shared: bool = False
) -> None:
    """The old file or the new one, never half. A full or read-only disk is a RetainError that names the file.

    `durable` also survives a power cut (the file and its folder are flushed to disk); a kill is survived
    without. A file that is `shared` may be written by several processes at once: each has a temporary name of its own,
    and what killed ones left is swept.
    """
    part = path.with_name(f".{path.name}.part" + (f"-{os.getpid()}" if shared else ""))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            _sweep(path)
        mode = usual_mode(part)
        write(part)
        part.chmod(mode)
        if durable:
            _flush(part)
        part.replace(path)
        if durable:
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink()
        said = getattr(error, "strerror", None) or error
        raise RetainError(f"cannot write {path}: {said}; what was saved before is kept") from error


def usual_mode(path: Path) -> int:
    """The permissions of a file that the user makes; leaves an empty one. safetensors' own are for their owner only."""
    path.unlink(missing_ok=True)
    path.touch()  # asked of a file, not of os.umask, which can only be read by changing it for every thread
    return path.stat().st_mode & 0o777


@contextmanager
def aside(to: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is whole; after an error or Ctrl-C nothing is left.

    What a killed process left beside it is swept, unless that process still lives.
    """
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RetainError(f"{to} exists and is not empty; choose another folder with --to")
    _sweep(to)
    part = to.parent / f".{to.name}.part-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        yield part
        mode = usual_mode(part / ".mode")
        (part / ".mode").unlink()
        for file in part.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        if to.is_dir():
            to.rmdir()
        part.rename(to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _sweep(to: Path) -> None:
    """Remove the unfinished folders and files of processes that were killed while they wrote `to`."""
    ours = re.compile(rf"\.+{re.escape(to.name)}(?:\.part-\d+)*\.part-(\d+)")  # one writer may call another
    for left in to.parent.glob(f".*{glob.escape(to.name)}.part-*") if to.parent.is_dir() else ():
        found = ours.fullmatch(left.name)
        if found and not left.is_symlink() and not _lives(int(found[1])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether another process of that number runs; our own number in a name is a dead namesake's."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """An atomic text file."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf8"))


def utf8(text: str) -> bool:
    """Whether UTF-8 can hold it: not with half of a surrogate pair."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def json_text(value: Any, indent: int | None = None, other: Callable[[Any], Any] | None = None) -> str:
    """A value as JSON that UTF-8 can hold, and that `parse_json` gives back; `other` turns what JSON does not know."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=other)
    return text if text.isascii() else re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)


def write_json(path: Path, value: Any, *, shared: bool = False) -> None:
    """An atomic JSON file, keys in their order; `shared`: of several processes, as `write_atomic` has it."""
    text = json_text(value, indent=1) + "\n"
    write_atomic(path, lambda p: p.write_text(text, encoding="utf8"), shared=shared)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """An atomic JSONL file, written row by row."""

    def write(part: Path) -> None:
        with part.open("w", encoding="utf8") as file:
            file.writelines(json_text(r) + "\n" for r in rows)

    write_atomic(path, write)


def append_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows in one write, so that a kill leaves whole lines and at most one torn one at the end."""
    try:
        with path.open("a", encoding="utf8") as f:
            f.write("".join(json_text(r, other=float) + "\n" for r in rows))
    except OSError as error:
        raise RetainError(f"cannot write {path}: {error.strerror or error}") from error


def mend(path: Path) -> None:
    """Cut a torn last line off a JSONL file, which the next append would join. No file is fine."""
    if not path.is_file():
        return
    with path.open("rb+") as f:
        whole = f.read()
        if whole and not whole.endswith(b"\n"):
            f.truncate(whole.rfind(b"\n") + 1)


def read_json(path: Path, deepest: int = DEEPEST) -> Any:
    """A JSON file; a missing or broken one, or one that is nested too deep, is an error that names it."""
    if path.exists() and not path.is_file():
        raise RetainError(f"cannot read {path}: it is no file")
    try:
        return parse_json(path.read_text(encoding="utf8"), deepest)
    except OSError as error:
        raise RetainError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RetainError(
            f"{path} is not valid JSON ({error}); it was not written by retain, or was edited"
        ) from error


def parse_json(text: str, deepest: int = DEEPEST, whole: Callable[[str], Any] | None = None) -> Any:
    """A JSON text as plain data; `whole` reads whole numbers.

    ValueError: not valid, nested deeper than `deepest`, a whole number of thousands of digits.
    """
    try:
        value = json.loads(text, parse_int=whole)
    except RecursionError:
        raise ValueError(f"nested more than {deepest} deep") from None
    if text.count("[") + text.count("{") > deepest and _deeper(value, deepest):
        raise ValueError(f"nested more than {deepest} deep")
    return value


def _deeper(value: Any, deepest: int) -> bool:
    """Whether something is nested deeper than that; walked level by level, without a stack."""
    level = [value]
    for _ in range(deepest):
        level = [
            x
            for v in level
            for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return False
    return True


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has at least these keys; anything else is an error that names the file."""
    value = read_json(path)
    lacking = [k for k in keys if not isinstance(value, dict) or k not in value]
    if lacking or not isinstance(value, dict):
        raise RetainError(
            f"{path} was not written by retain, or was edited: {lacking or 'an object'} missing"
        )
    return value


def read_jsonl(path: Path) -> list[Any]:
    """The lines of a JSONL file. A torn last line, as a kill leaves it, is left out; any other bad line is an error."""
    try:
        lines = path.read_text(encoding="utf8", errors="replace").split("\n")
    except OSError as error:
        raise RetainError(f"cannot read {path}: {error.strerror or error}") from error
    out = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            out.append(parse_json(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise RetainError(f"{path}, line {number}: not valid JSON ({error})") from error
    return out
