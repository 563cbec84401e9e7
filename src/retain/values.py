"""Strict values from YAML and `key=value` overrides: what `retain.config` reads recipes with.

Numbers are read as YAML 1.2 reads them (2e-3 is a number, `on` is text), types are strict ("16" is no
number), and every message names the file or the override and the path of the key.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from retain.types import RetainError

T = TypeVar("T")
Plain = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `2e-3` is a number, `on` and dates are text; a key that occurs twice is an error."""

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
_Loader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG,
    lambda loader, node: loader.construct_mapping(node, deep=True),  # type: ignore[arg-type]
)


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RetainError(f"{where}{place}: no valid YAML: {problem}") from None
    except ValueError as error:
        raise RetainError(f"{where}: no valid YAML: {error}") from None


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
        here[_index(here, last, text)] = new
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


# -- typed values ----------------------------------------------------------------------------------------


def fill(cls: type[T], data: Any, where: str) -> T:
    """Plain data into a dataclass; unknown or missing keys, wrong types and refused values are errors.

    Nested dataclasses are filled the same way, so that a message names `adapter.rank` and not an object.
    """
    if not isinstance(data, Mapping):
        raise RetainError(f"{where}: a mapping of keys is needed, not {kind(data)}")
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise RetainError(f"{where}: no key {key!r}{near(str(key), known)}")
    instance = {key: _value(hints[key], value, _join(where, key)) for key, value in data.items()}
    try:
        return cls(**instance)
    except TypeError:
        needed = [
            n for n, p in inspect.signature(cls).parameters.items() if p.default is p.empty and n not in data
        ]
        raise RetainError(f"{where}: the key {needed[0]!r} is missing") from None
    except RetainError as error:
        file, _, key = where.partition(": ")
        own = key and str(error).startswith(key)  # `optim.lr: must be …` names its key already
        raise RetainError(f"{file if own else where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return fill(hint, value, where)
    if str(hint).startswith("list[") and hint.__args__ and hasattr(hint.__args__[0], "__dataclass_fields__"):
        if not isinstance(value, list):
            raise RetainError(f"{where}: a list is needed, not {kind(value)}")
        return [fill(hint.__args__[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    return typed(hint, value, where)


def typed(hint: Any, value: Any, where: str) -> Any:
    """One value, strictly: a whole number passes as a float, a list as a tuple, nothing else is converted."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        inner = "".join(
            f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if not _is_branch(p)
        )
        raise RetainError(f"{where}{inner}: {value!r}: {first['msg']}") from None


def _is_branch(part: int | str) -> bool:
    """Pydantic names the branch of a union (`int`, `list[str]`) as if it were a key."""
    return isinstance(part, str) and (part in {"int", "float", "str", "bool", "none"} or "[" in part)


def _join(where: str, key: str) -> str:
    """`file.yaml` + `optim` = `file.yaml: optim`; `file.yaml: optim` + `lr` = `file.yaml: optim.lr`."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


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


LATER = {"later": True}
"""Marks a field that came after run folders had been written without it."""


def written(spec: Any) -> Plain:
    """A dataclass as plain data; a field that came LATER only where it differs from its default.

    So a run folder that was written before there was the field is that of the same recipe.
    """
    told = asdict(spec)
    return {
        f.name: told[f.name] for f in fields(spec) if not f.metadata.get("later") or told[f.name] != f.default
    }
