"""Files of examples: LLaVA `conversations`, CoIN test items, HF `messages` + `images`; JSON, JSONL, parquet.

The format is told by a row's fields, not by the file's name. Every error names file, row (from 1), field,
value and choices. Every image is opened once (its header: format and size) before anything is trained;
`retain doctor` decodes them in full. Image paths are relative to an image root and may not climb out of it;
links inside the root are the user's own and are followed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import IO, Any

from retain.data.glance import glanced
from retain.data.kept import Kept
from retain.data.picture import MAX_PIXELS, WHERE, looked_at
from retain.types import Example, ImageSource, Message, RetainError, Role

MAX_LINE = 32 * 2**20
MAX_TEXT = 1_000_000
MAX_ID, MAX_OPTIONS, MAX_REFERENCES = 1_000, 10_000, 10_000
DEEP = 32
LARGE = 10**100
IMAGE = "<image>"
Row = Mapping[str, Any]

ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip


@dataclass
class _File:
    """One file being read: where its images are, and which of them were looked at already."""

    path: Path
    root: Path
    max_pixels: int
    checked: dict[Path, str] = field(default_factory=dict)  # path -> what is wrong with it, "" for nothing
    known: dict[str, Path] = field(default_factory=dict)  # as rows write it -> an image that is fine


def examples(path: Path, image_root: Path | None = None, *, max_pixels: int = MAX_PIXELS) -> Kept:
    """All rows of a file, read and checked once, and kept small (`retain.data.kept`).

    `image_root` defaults to the file's own folder; ids default to the row number.
    """
    if not path.is_file():
        raise RetainError(f"{path}: no such file")
    root = image_root or path.parent
    if not root.is_dir():
        raise RetainError(f"{path}: the image root {str(root)!r} is no folder")
    file = _File(path, root.absolute(), max_pixels)
    kept = Kept(str(path))
    for number, row in rows(path):
        kept.add(_example(row, number, file))
    return kept


# -- rows ------------------------------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Numbered rows of a JSON list, a JSONL file or a parquet file."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    if _starts(path) == "[":
        yield from ((i, _row(item, path, i)) for i, item in enumerate(_items(path), 1))
        return
    number = 0
    for line_number, line in enumerate(_pieces(path, MAX_LINE + 2), 1):
        if line.isspace():
            continue
        number += 1
        if len(line.removesuffix("\n")) > MAX_LINE:
            raise RetainError(
                f"{path}, row {number} (line {line_number}): longer than {MAX_LINE:,} characters"
            )
        yield number, _row(_json(line, f"{path}, row {number} (line {line_number})"), path, number)


def _starts(path: Path) -> str:
    """The first character that is no blank."""
    return next((found[0] for piece in _pieces(path, 1 << 16) if (found := piece.lstrip())), "")


def _pieces(path: Path, size: int) -> Iterator[str]:
    """The lines of a text file, longer ones in pieces: a file is never held whole."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            yield from iter(lambda: file.readline(size), "")
        except UnicodeDecodeError:
            _text(path)  # says where in the file
            raise


def _items(path: Path) -> Iterator[Any]:
    """The values of a JSON list, each read when it is asked for; what is no such list is read whole, and told."""
    count = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for item in _List(file):
                yield item
                count += 1
            return
        except (ValueError, RecursionError):  # broken JSON, or bytes that are no text
            pass
    yield from _json(_text(path), f"{path}, row {count + 1}")[count:]


@dataclass
class _List:
    """The values of a JSON list in an open file; a ValueError for what is none."""

    file: IO[str]
    text: str = ""  # what was read, and where in it the next value begins
    at: int = 0

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._next() == "]":
            self._take("]")
        else:
            while True:
                yield self._value()
                if self._take(",]") == "]":
                    break
        self._take("")

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text):  # a number may go on behind
                    self.at = end
                    return value
            except (ValueError, RecursionError):  # it may only be cut
                if not self._more(len(self.text)):
                    raise
                continue
            if not self._more(len(self.text)):
                raise ValueError("the list has no end")

    def _take(self, wanted: str) -> str:
        found = self._next()
        if found not in wanted or bool(found) != bool(wanted):
            raise ValueError(f"{found!r} instead of {wanted!r}")
        self.at += 1
        return found

    def _next(self) -> str:
        """The next character that is no blank; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(0):
                return ""

    def _more(self, n: int) -> bool:
        """Read on, `n` characters or a million."""
        more = self.file.read(max(n, 1 << 20))
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


DECODER = json.JSONDecoder()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RetainError(
            f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise RetainError(f"{where}: broken JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise RetainError(f"{where}: broken JSON: lists and objects are nested too deep") from None
    except ValueError:  # Python's own bound: the text of longer ones takes a time that grows with its square
        raise RetainError(f"{where}: broken JSON: a number of more than four thousand digits") from None


def _row(item: Any, path: Path, number: int) -> Row:
    if not isinstance(item, dict):
        raise RetainError(f"{path}, row {number}: an object of fields is needed, not {_show(item)}")
    if not _fit(item):
        raise RetainError(f"{path}, row {number}, {_unfit(item)}")
    return item


def _fit(value: Any, deeper: int = 0) -> bool:
    """Whether nothing in a value is unfit (`_unfit` says what); every row passes here."""
    if isinstance(value, str):
        return (value.isascii() and "\0" not in value) or not _BROKEN.search(value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -LARGE < value < LARGE
    if isinstance(value, Mapping):
        return deeper <= DEEP and all(_fit(str(k)) and _fit(v, deeper + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return deeper <= DEEP and all(_fit(v, deeper + 1) for v in value)
    return True


def _unfit(row: Any) -> str:
    """Where in a row something stands that no later file could hold, and what; "" for nothing.

    Python's JSON reader takes NaN, which pandas writes for an empty cell, 1e999, half of a surrogate pair, numbers of
    thousands of digits and lists in lists in lists; digests, tokenizers and saved states do not.
    """
    left: list[tuple[Any, tuple[Any, ...]]] = [(row, ())]
    while left:
        value, at = left.pop()
        if isinstance(value, str):
            wrong = _no_text(value)
        elif isinstance(value, bool | bytes):
            continue
        elif isinstance(value, float):
            wrong = "" if math.isfinite(value) else "nan or infinity is no value; leave it out"
        elif isinstance(value, int):
            wrong = "" if abs(value) < LARGE else "a number of more than a hundred digits"
        elif isinstance(value, Mapping | list | tuple):
            wrong = "lists and objects are nested too deep" if len(at) > DEEP else ""
            keyed = isinstance(value, Mapping)
            left += [
                (v, (*at, k)) for k, v in (value.items() if isinstance(value, Mapping) else enumerate(value))
            ]
            wrong = wrong or (next((w for k in value if (w := _no_text(str(k)))), "") if keyed else "")
        else:
            continue
        if wrong:
            path = "".join(f"[{k}]" if isinstance(k, int) else f".{_printable(k)}" for k in at)
            return f"field '{path.lstrip('.')}': {wrong}"
    return ""


_BROKEN = re.compile("[\ud800-\udfff\0]")


def _no_text(value: str) -> str:
    broken = None if value.isascii() and "\0" not in value else _BROKEN.search(value)
    return f"character {broken.start() + 1} is {broken[0]!r}, which is no text" if broken else ""


def _printable(key: object) -> str:
    return str(key).encode("ascii", "backslashreplace").decode()[:60]


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError:
        raise RetainError(f"{path}: reading parquet needs pyarrow: pip install 'retain[parquet]'") from None
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
            for item in batch.to_pylist():
                number += 1
                yield number, _row({k: v for k, v in item.items() if v is not None}, path, number)
    except pyarrow.ArrowException as error:
        raise RetainError(f"{path}: no readable parquet file: {error}") from None


# -- one row ---------------------------------------------------------------------------------------------


def _example(row: Row, number: int, file: _File) -> Example:
    where = f"{file.path}, row {number}"
    if "conversations" in row:
        messages = _conversations(row, where)
    elif "messages" in row:
        messages, row = _messages(row, where)
    elif "text" in row:
        messages = _item(row, where)
    else:
        raise RetainError(
            f"{where}: fields {sorted(row)[:8]} are of no known format; choose `conversations` (LLaVA), "
            "`messages` (Hugging Face) or `text` + `answer` (CoIN test items)"
        )
    images = tuple(_image(v, f"{where}, field '{key}'", file) for key, v in _image_fields(row, where))
    messages = _with_system(_placed(messages, len(images), where), row, where)
    if not messages or messages[-1].role != "assistant":
        raise RetainError(f"{where}: the last turn must be the answer (gpt/assistant)")
    if not any(m.role == "user" for m in messages):
        raise RetainError(f"{where}: no turn of the user (human/user)")
    ident = row.get("id", row.get("question_id", number))
    if isinstance(ident, bool) or not isinstance(ident, str | int) or ident == "":
        raise RetainError(f"{where}, field 'id': text or a whole number is needed, not {_show(ident)}")
    if len(str(ident)) > MAX_ID:
        raise RetainError(
            f"{where}, field 'id': {len(str(ident)):,} characters; at most {MAX_ID:,} are taken"
        )
    source = (str(file.path), number)
    return Example(str(ident), tuple(messages), images, _references(row, where), _meta(row, where), source)


def _conversations(row: Row, where: str) -> list[Message]:
    """LLaVA: a list of {"from": human|gpt|system, "value": text}; `<image>` marks an image."""
    turns = _list_of_objects(row, "conversations", where)
    out = []
    for i, turn in enumerate(turns):
        at = f"{where}, field 'conversations[{i}]'"
        role = _role(turn.get("from"), f"{at}.from")
        out.append(_message(role, _str(turn.get("value"), f"{at}.value")))
    return out


def _messages(row: Row, where: str) -> tuple[list[Message], Row]:
    """HF: a list of {"role", "content"}; content is text, or a list of {"type": "text"|"image", …}."""
    turns = _list_of_objects(row, "messages", where)
    out, inline = [], []
    for i, turn in enumerate(turns):
        at = f"{where}, field 'messages[{i}]'"
        role = _role(turn.get("role"), f"{at}.role")
        content = turn.get("content")
        if isinstance(content, str):
            out.append(_message(role, _str(content, f"{at}.content")))
            continue
        if not isinstance(content, list):
            raise RetainError(f"{at}.content: text or a list of parts is needed, not {_show(content)}")
        parts: list[str | None] = []
        for j, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                parts.append(_str(part.get("text"), f"{at}.content[{j}].text"))
            elif kind == "image":
                parts.append(None)
                inline += [part[k] for k in ("image", "path") if part.get(k) is not None][:1]
            else:
                raise RetainError(f"{at}.content[{j}].type: {_show(kind)}; choose 'text' or 'image'")
        words = "".join(p for p in parts if p is not None)
        out.append(_mixed(role, parts) if None in parts else _message(role, words))
    if inline and "images" in row:
        raise RetainError(f"{where}: images are given twice, in `images` and inside `messages`; keep one")
    return out, {**row, "images": inline} if inline else row


def _item(row: Row, where: str) -> list[Message]:
    """CoIN test items: a prompt in `text`, the reference in `answer` (text, number or a list of texts)."""
    if "answer" not in row:
        raise RetainError(f"{where}: the field 'answer' is missing; there are {sorted(row)[:8]}")
    references = _references(row, where) or (_answer(row["answer"], f"{where}, field 'answer'"),)
    question = _message("user", _str(row["text"], f"{where}, field 'text'"))
    return [question, Message("assistant", references[0])]


def _references(row: Row, where: str) -> tuple[str, ...]:
    """All acceptable answers where a row lists them: `references`, `answers`, or `answer` as a list."""
    for key in ("references", "answers", "answer"):
        value = row.get(key)
        if key != "answer" and value is not None and not isinstance(value, list):
            raise RetainError(f"{where}, field '{key}': a list of texts is needed, not {_show(value)}")
        if isinstance(value, list) and len(value) > MAX_REFERENCES:
            raise RetainError(
                f"{where}, field '{key}': {len(value):,} texts; at most {MAX_REFERENCES:,} are taken"
            )
        if isinstance(value, list) and value:
            return tuple(_answer(v, f"{where}, field '{key}[{i}]'") for i, v in enumerate(value))
    return ()


def _answer(value: Any, at: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _str(value, at)


def _message(role: Role, text: str) -> Message:
    """A turn with its placeholders counted and taken out.

    Images in front of the text, or behind it, stand in front, as in LLaVA (`preprocess_multimodal`); images between
    words stay where they are. In an answer `<image>` is a word.
    """
    if role == "assistant" or IMAGE not in text:
        return Message(role, text)
    pieces = text.split(IMAGE)
    for words, others in ((pieces[-1], pieces[:-1]), (pieces[0], pieces[1:])):
        if not any(p.strip() for p in others):
            return Message(role, words.strip(), len(pieces) - 1)
    return _mixed(role, [part for p in pieces for part in (p, None)][:-1])


def _mixed(role: Role, parts: Sequence[str | None]) -> Message:
    """A turn of texts and images (None) in their order."""
    text, at = "", []
    for part in parts:
        if part is None:
            at.append(len(text))
        else:
            text += part
    return Message(role, text, len(at), tuple(at) if any(at) else ())


def _with_system(messages: list[Message], row: Row, where: str) -> list[Message]:
    """The row's `system` field as the first turn."""
    value = row.get("system")
    if value is None or value == "":
        return messages
    text = _str(value, f"{where}, field 'system'")
    if messages and messages[0].role == "system":
        if messages[0].text == text:
            return messages
        raise RetainError(
            f"{where}: a system turn is given twice, in the field 'system' and as the first turn; keep one"
        )
    return [Message("system", text), *messages]


def _placed(messages: list[Message], n_images: int, where: str) -> list[Message]:
    """Every image belongs to one turn; images without any placeholder stand before the first question."""
    marks = sum(m.images for m in messages)
    if marks == n_images:
        return messages
    if marks == 0:
        first = next((i for i, m in enumerate(messages) if m.role == "user"), 0)
        return [Message(m.role, m.text, n_images) if i == first else m for i, m in enumerate(messages)]
    raise RetainError(f"{where}: {marks} image placeholders ({IMAGE}) but {n_images} images")


def _meta(row: Row, where: str) -> dict[str, Any]:
    """What a scorer needs besides: options, box, image size, tolerance, source; CoIN's names translated."""
    if not isinstance(row.get("meta"), dict | None):
        raise RetainError(f"{where}, field 'meta': an object is needed, not {_show(row['meta'])}")
    meta: dict[str, Any] = dict(row.get("meta") or {})
    row = {**meta, **row}
    options = row.get("options", row.get("choices"))
    if options is not None:
        if isinstance(options, dict):
            options = list(options.values())
        fits = isinstance(options, list) and not any(isinstance(o, bool) for o in options)
        if not fits or not all(isinstance(o, str | int | float) for o in options):
            raise RetainError(f"{where}, field 'options': a list of texts is needed, not {_show(options)}")
        if len(options) > MAX_OPTIONS:
            raise RetainError(
                f"{where}, field 'options': {len(options):,}; at most {MAX_OPTIONS:,} are taken"
            )
        meta["options"] = [str(o) for o in options]
    box = row.get("answer_bbox", row.get("box", row.get("bbox")))
    if box is not None:
        meta["box"] = _numbers(box, 4, f"{where}, field 'answer_bbox'")
    if row.get("size") is not None:
        meta["size"] = _numbers(row["size"], 2, f"{where}, field 'size'")
    for key in ("tolerance", "relative_tolerance"):
        if row.get(key) is not None:
            meta[key] = _width(row[key], f"{where}, field '{key}'")
    return meta | ({"source": row["source"]} if row.get("source") is not None else {})


def _width(value: Any, at: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise RetainError(f"{at}: a number of 0 or more is needed, not {_show(value)}")
    return float(value)


def _numbers(value: Any, count: int, at: str) -> list[float]:
    """A list of numbers, or its text: CoIN stores boxes as "[x1,y1,x2,y2]"."""
    found = _json(value, at) if isinstance(value, str) else value
    fits = isinstance(found, list) and len(found) == count and _fit(found)
    if not fits or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in found):
        raise RetainError(f"{at}: {count} numbers are needed, not {_show(value)}")
    return [float(v) for v in found]


def _list_of_objects(row: Row, key: str, where: str) -> Sequence[Row]:
    value = row[key]
    if not isinstance(value, list) or not value or not all(isinstance(v, dict) for v in value):
        raise RetainError(f"{where}, field '{key}': a list of turns is needed, not {_show(value)}")
    return value


def _role(value: Any, at: str) -> Role:
    if not isinstance(value, str) or value not in ROLES:
        raise RetainError(f"{at}: {_show(value)}; choose from {list(ROLES)}")
    return ROLES[value]


def _str(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise RetainError(f"{at}: text is needed, not {_show(value)}")
    if len(value) > MAX_TEXT:
        raise RetainError(f"{at}: {len(value):,} characters; at most {MAX_TEXT:,} are taken")
    if wrong := _no_text(value):
        raise RetainError(f"{at}: {wrong}")
    return value


def _show(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else repr(value[:80])
    return text if len(text) <= 60 else text[:57] + "…"


# -- images ----------------------------------------------------------------------------------------------


def _image_fields(row: Row, where: str) -> list[tuple[str, Any]]:
    """The images of a row in order, each with the field it came from."""
    found: list[tuple[str, Any]] = []
    for key in ("image", "images"):
        value = row.get(key)
        if isinstance(value, list):
            found += [(f"{key}[{i}]", v) for i, v in enumerate(value)]
        elif value is not None:
            found.append((key, value))
    if "image" in row and "images" in row and row["image"] and row["images"]:
        raise RetainError(f"{where}: both 'image' and 'images' are given; keep one")
    return found


def _image(value: Any, at: str, file: _File) -> ImageSource:
    """A path under the root, or (parquet) an image file's bytes; the header is read, the size checked."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        image, wrong = looked_at(value["bytes"], file.max_pixels)
        if image is None:
            raise RetainError(f"{at}: {len(value['bytes']):,} bytes: {wrong}")
        image.info[WHERE] = at
        return image
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, str) and value in file.known:
        return file.known[value]
    name = _str(value, at)
    if not name.strip():
        raise RetainError(f"{at}: the image's path is empty")
    if len(name) > MAX_ID:
        raise RetainError(
            f"{at}: {_show(name)}: a path of {len(name):,} characters; at most {MAX_ID:,} are taken"
        )
    path = Path(normpath(file.root / name))
    if not path.is_relative_to(normpath(file.root)):
        raise RetainError(f"{at}: {name!r} leaves the image root {str(file.root)!r}")
    if path not in file.checked:
        file.checked[path] = _wrong_path(path, file.max_pixels)
    if file.checked[path]:
        raise RetainError(f"{at}: {name!r}: {file.checked[path]}")
    file.known[name] = path
    return path


def _wrong_path(path: Path, max_pixels: int) -> str:
    if glanced(path, max_pixels):
        return ""
    try:
        if not path.is_file():
            return f"no such image under the image root ({path})"
    except OSError as error:  # a name that is too long, a folder that may not be entered
        return error.strerror or str(error)
    image, wrong = looked_at(path, max_pixels)
    if image is not None:
        image.close()
    return wrong
