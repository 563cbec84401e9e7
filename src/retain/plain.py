"""Plain values as people write them: YAML files and `key=value` overrides, bounded in size and depth.

Scalars are read as YAML 1.2 reads them (2e-3 is a number, `on` is text). What comes out is text, numbers, true,
false, nothing, and lists and mappings of them; every message names the file or the override. `retain.values`
makes typed values of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from retain.types import RetainError

T = TypeVar("T")
Plain = dict[str, Any]

TEXT, INT, FLOAT, SEQUENCE, MAPPING = (
    f"tag:yaml.org,2002:{t}" for t in ("str", "int", "float", "seq", "map")
)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `2e-3` is a number, `on` and dates are text; a key that occurs twice is an error.

    No tag but those of plain values, and `DEEPEST` levels: read as it goes, so that no text is too deep to refuse.
    """

    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.count += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.count > MOST:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MOST:,} values", mark)
        if self.depth > DEEPEST:
            raise yaml.constructor.ConstructorError(None, None, f"nested deeper than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and not self._is_plain(node):
            tag, told = short(node.tag.replace("tag:yaml.org,2002:", "!!")), short(node.value)
            why = f"the tag {tag} does not fit {told if isinstance(node, yaml.ScalarNode) else 'here'}"
            raise yaml.constructor.ConstructorError(None, None, why, mark)
        return node

    def _is_plain(self, node: yaml.Node) -> bool:
        """Whether its tag is what its text says without one; `!!str 3` and `!!float 3` may be told."""
        if not isinstance(node, yaml.ScalarNode):
            return node.tag == (SEQUENCE if isinstance(node, yaml.SequenceNode) else MAPPING)
        own = self.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
        return node.tag in (TEXT, own) or (node.tag, own) == (FLOAT, INT)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return {str(k): v for k, v in super().construct_mapping(node, deep).items()}


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _chars: list[Any] = [c if c != "\0" else "" for c in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _chars)
_Loader.add_constructor(INT, lambda loader, node: int(node.value))  # 010 is ten
_Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: loader.construct_mapping(node, deep=True),  # type: ignore[arg-type]
)


def read_yaml(text: str, where: str) -> Any:
    """YAML as plain values, see `plain`. One error in one sentence, with line and column where there are."""
    try:
        found = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.reader.ReaderError as error:
        raise RetainError(
            f"{where}: no text: the character {error.character!r:.20} at {error.position}"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RetainError(f"{where}{place}: no valid YAML: {' '.join(problem.split())}") from None
    except ValueError as error:
        raise RetainError(f"{where}: no valid YAML: {error}") from None
    return plain(found, where)


def read_small(path: Path, what: str) -> str:
    """The text of a file that a person wrote: `a recipe` is `what`. UTF-8, with or without a byte order mark.

    RetainError for a folder, a pipe or a device, for what is too long to have been written, and for other bytes.
    """
    path = real_path(path, what)
    if not path.exists():
        raise RetainError(f"{path}: no such file")
    if not path.is_file():
        told = "a folder" if path.is_dir() else "a pipe or a device"
        raise RetainError(f"{path}: is {told}, {what} is a file")
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    if len(data) > LONGEST:
        raise RetainError(f"{path}: longer than {LONGEST:,} bytes, which {what} is not")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RetainError(f"{path}: not UTF-8 text (byte {error.start})") from None


# -- plain values ----------------------------------------------------------------------------------------

LONGEST = 1_000_000
"""Bytes of a file that a person writes."""
DEEPEST = 64
"""Levels of lists and mappings in each other."""
MOST = 50_000
"""Values of a recipe, those that aliases repeat counted each time."""
INT64 = 2**63
"""What torch, numpy and JSON readers take as a whole number is below."""


def plain(value: Any, where: str) -> Any:
    """The value; an error where it is more than text, numbers, true, false, nothing, lists and mappings of them.

    Also for more than `MOST` values or `DEEPEST` levels (an alias inside what it names has no last), for a whole
    number beyond 64 bits, and for half a character (a lone surrogate, which no file and no terminal takes).
    """
    left = MOST

    def walk(v: Any, at: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RetainError(f"{where}: more than {MOST:,} values; an alias (*name) repeats what it names")
        if depth > DEEPEST:
            raise RetainError(f"{where}: {at[:60]}…: nested deeper than {DEEPEST} levels")
        told = f"{where}: {at}" if at else where
        if isinstance(v, str):
            whole_text(v, told)
        elif isinstance(v, Mapping):
            for key, item in v.items():
                whole_text(str(key), told)
                walk(item, f"{at}.{key}" if at else str(key), depth + 1)
        elif isinstance(v, list | tuple):
            for i, item in enumerate(v):
                walk(item, f"{at}[{i}]", depth + 1)
        elif isinstance(v, int) and not -INT64 <= v < INT64:
            raise RetainError(f"{told}: {short(v)} is beyond 64 bits")
        elif v is not None and not isinstance(v, int | float):
            raise RetainError(f"{told}: {type(v).__name__} {short(v)}: text, numbers and lists are needed")

    walk(value, "", 0)
    return value


def whole_text(text: str, where: str) -> str:
    """The text; an error where it holds NUL or half a character."""
    bad = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        what = "NUL" if bad == "\0" else "half a character, or bytes that are no UTF-8"
        raise RetainError(f"{where}: {short(text)} holds {bad!r}: {what}")
    return text


def real_path(path: str | Path, where: str) -> Path:
    """A path that a file system can have, its `~` replaced. RetainError for one that is empty, too long, or odd."""
    text = whole_text(str(path), where)
    if not text or (isinstance(path, Path) and not path.parts and text != "."):
        raise RetainError(f"{where}: an empty path")
    if len(text.encode()) > 4000 or any(len(part.encode()) > 255 for part in Path(text).parts):
        raise RetainError(f"{where}: {short(text)} is longer than a path can be")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise RetainError(f"{where}: {text!r}: there is no such user") from None
    try:
        path.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads back to itself
        raise RetainError(f"{where}: {short(text)}: {error}") from None
    return path


def short(value: Any, n: int = 80) -> str:
    """A value as a message shows it: its repr, the middle left out where it is long."""
    if isinstance(value, int) and not -INT64 <= value < INT64:
        return f"a whole number of about {int(value.bit_length() * 0.30103) + 1} digits"
    shown = repr(value[: n * 4] if isinstance(value, str | bytes | list | tuple) else value)
    if len(shown) <= n:
        return shown
    more = f" ({len(value):,} characters)" if isinstance(value, str) else ""
    return f"{shown[: n - 10]}…{shown[-8:]}{more}"


# -- overrides -------------------------------------------------------------------------------------------


def override(data: Plain, text: str) -> None:
    """Apply one `a.b.c=value`; the value is YAML. A list takes an index or the name of an entry."""
    key, sign, value = text.partition("=")
    path = key.strip().split(".")
    if not sign or not all(path):
        raise RetainError(f"override {text!r}: write key=value, such as seed=3 or optim.lr=1e-3")
    new = read_yaml(value, f"override {text!r}")
    here: Any = data
    for depth, step in enumerate(path[:-1]):
        here = _descend(here, step, ".".join(path[: depth + 1]), text)
    last = path[-1]
    if isinstance(here, list):
        i = _index(here, last, text)
        whole = isinstance(here[i], dict) and last in here[i] and (new is None or isinstance(new, dict))
        here[i] = {last: new} if whole else new  # method.replay={size: 7} are its fields, =ewc another part
    elif isinstance(here, dict):
        here[last] = new
    else:
        raise RetainError(f"override {text!r}: {'.'.join(path[:-1])} is {kind(here)}, it has no key {last!r}")


def _descend(here: Any, step: str, so_far: str, text: str) -> Any:
    if isinstance(here, list):
        entry = here[_index(here, step, text)]
        return entry[step] if isinstance(entry, dict) and step in entry else entry
    if not isinstance(here, dict):
        raise RetainError(f"override {text!r}: {so_far} reaches into {kind(here)}")
    if here.get(step) is None:
        here[step] = {}
    return here[step]


def _index(items: list[Any], step: str, text: str) -> int:
    names = [
        str(next(iter(e)) if isinstance(e, dict) and len(e) == 1 else _name_of(e, i))
        for i, e in enumerate(items)
    ]
    if step in names:
        return names.index(step)
    if step.isdigit() and int(step) < len(items):
        return int(step)
    raise RetainError(f"override {text!r}: no entry {step!r}{near(step, names)}")


def _name_of(entry: Any, i: int) -> Any:
    return entry.get("name", i) if isinstance(entry, dict) else i


# -- words -----------------------------------------------------------------------------------------------


def near(word: str, choices: Iterable[str]) -> str:
    """The end of a message: the nearest choice, if one is near, and all of them."""
    choices = list(choices)
    found = difflib.get_close_matches(word, choices, 1, cutoff=0.5)
    hint = f"; did you mean {found[0]!r}?" if found else "."
    return f"{hint} Choose from {choices}"


def kind(value: Any) -> str:
    """A value in words: `a list`, `text ('abc')`."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true/false"}
    name = names.get(type(value), "a number")
    return name if value is None or isinstance(value, dict | list) else f"{name} ({value!r})"


def prefixed(where: str, call: Callable[[], T]) -> T:
    """What `call` gives; its RetainError says where in the recipe."""
    try:
        return call()
    except RetainError as error:
        raise type(error)(f"{where}: {error}") from None
