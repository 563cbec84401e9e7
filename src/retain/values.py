"""Strict values: plain data from recipes as dataclasses, and the ranges that their fields declare.

A field says once what it may be, `lam: Annotated[float, Field(ge=0)]` or one of the names below. The same
declaration is read for a recipe (`fill`, `typed`), for a method's options (`retain.method.build`) and when Python makes
one (`ranged`). NaN and infinity are in no range unless it says so. Types are strict ("16" is no number), and every
message names the file or the override and the path of the key.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import wraps
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from retain.plain import INT64, Plain, kind, near, plain, real_path, short
from retain.types import RetainError

T = TypeVar("T")

# -- typed values ----------------------------------------------------------------------------------------


def fill(cls: type[T], data: Any, where: str) -> T:
    """Plain data into a dataclass; unknown or missing keys, wrong types and refused values are errors.

    Nested dataclasses are filled the same way, so that a message names `adapter.rank` and not an object.
    """
    if not isinstance(data, Mapping):
        raise RetainError(f"{where}: a mapping of keys is needed, not {kind(data)}")
    hints = get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls) if f.init]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise RetainError(f"{where}: no key {key!r}{near(str(key), known)}")
    instance = {key: _value(hints[key], value, _join(where, key)) for key, value in data.items()}
    needed = [
        n for n, p in inspect.signature(cls).parameters.items() if p.default is p.empty and n not in data
    ]
    if needed:
        raise RetainError(f"{where}: the key {needed[0]!r} is missing")
    try:
        return cls(**instance)
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
    """One value of a recipe, strictly: a whole number passes as a float, a list as a tuple, nothing else is converted.

    Ranges are those that the type declares, `Annotated[float, Field(gt=0, lt=1)]`; NaN and infinity are in none,
    unless it says `Field(allow_inf_nan=True)`.
    """
    try:
        return TypeAdapter(hint, config=CONFIG).validate_json(json.dumps(plain(value, where)), strict=True)
    except ValidationError as error:
        raise RetainError(_refusal(error, hint, where)) from None


def check(hint: Any, value: Any, where: str) -> None:
    """A value of Python against its declared type and range, as `typed` does for one of a recipe."""
    try:
        TypeAdapter(hint, config=CONFIG).validate_python(value, strict=True)
    except ValidationError as error:
        raise RetainError(_refusal(error, hint, where)) from None


CONFIG = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)
BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _refusal(error: ValidationError, hint: Any, where: str) -> str:
    """What is wrong, in one sentence: path, value, and the range or the choices."""
    first = error.errors(include_url=False)[0]
    inner = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"] if not _is_branch(p))
    value, at = first["input"], f"{where}{inner}"
    if first["type"] == "literal_error":
        return f"{at}: {short(value)} is none of {_choices(hint)}"
    if first["type"] == "finite_number" or first["type"].startswith(("greater_than", "less_than")):
        return f"{at}: must be {_range(hint) or 'a finite number'}, not {short(value)}"
    if first["type"] == "too_short":
        return f"{at}: must not be empty"
    if first["type"] == "string_too_short":
        return f"{at}: must not be an empty text"
    if first["type"] == "value_error":
        return f"{at}: {short(value)} {first['msg'].removeprefix('Value error, ')}"
    return f"{at}: {short(value)}: {first['msg']}"


def _choices(hint: Any) -> list[Any]:
    """Every word of the Literals in a type."""
    inside = [c for h in get_args(hint) for c in _choices(h)]
    return list(get_args(hint)) if get_origin(hint) is Literal else inside


def _range(hint: Any) -> str:
    """The bounds that a type declares, in words; "" for none."""
    bounds: dict[str, Any] = {}
    for extra in getattr(hint, "__metadata__", ()):
        for mark in getattr(extra, "metadata", ()):
            bounds |= {k: getattr(mark, k) for k in BOUNDS if getattr(mark, k, None) is not None}
    inner = next(filter(None, map(_range, get_args(hint))), "") if not bounds else ""
    return inner or " and ".join(f"{word} {bounds[k]:,}" for k, word in BOUNDS.items() if k in bounds)


def _is_branch(part: int | str) -> bool:
    """Pydantic names the branch of a union (`int`, `list[str]`) as if it were a key."""
    words = {"int", "float", "str", "bool", "none"}
    return isinstance(part, str) and (part in words or "[" in part or part.startswith("constrained-"))


def _join(where: str, key: str) -> str:
    """`file.yaml` + `optim` = `file.yaml: optim`; `file.yaml: optim` + `lr` = `file.yaml: optim.lr`."""
    return f"{where}.{key}" if ": " in where else f"{where}: {key}"


# -- ranges ----------------------------------------------------------------------------------------------

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrOff = Annotated[int, Field(ge=0, le=10**9)]
"""A whole number in which 0 means off, or all."""
Size = Annotated[int, Field(ge=1, le=2**20)]
"""A whole number by which something is allocated."""


def zero_or(low: float) -> AfterValidator:
    """0, which means off, or a number of at least `low`: `Annotated[float, zero_or(1e-6)]`."""

    def held(value: float) -> float:
        if value and not value >= low:
            raise ValueError(f"is neither 0 nor at least {low:g}")
        return value

    return AfterValidator(held)


Seed = Annotated[int, Field(ge=0, lt=INT64)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


def _as_path(text: str) -> str:
    try:
        real_path(text, "path")
    except RetainError as error:
        raise ValueError(str(error).removeprefix("path: ")) from None
    return text


PathText = Annotated[str, AfterValidator(_as_path)]


def ranged(at: str) -> Callable[[type[T]], type[T]]:
    """Class decorator, above @dataclass: what the fields declare is checked whenever one is made, also in Python.

    `at` is what messages call it: `optim` for `optim.lr: must be above 0, not -1`.
    """

    def decorate(cls: type[T]) -> type[T]:
        make: Callable[..., None] = cls.__init__
        hints: dict[str, Any] = {}

        @wraps(make)
        def checked(self: T, *args: Any, **given: Any) -> None:
            if not hints:
                hints.update(field_hints(cls, at))
            for key, value in (dict(zip(hints, args)) | given).items():
                if key in hints and not is_dataclass(hints[key]):
                    check(hints[key], value, f"{at}.{key}")
            make(self, *args, **given)

        cls.__init__ = checked  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def field_hints(cls: type, at: str) -> dict[str, Any]:
    """The declared types of a dataclass's fields that are given when it is made, in order."""
    names = [f.name for f in fields(cls) if f.init]
    try:
        found = get_type_hints(cls, include_extras=True)
    except Exception as error:  # whatever an annotation raises
        raise RetainError(
            f"{at}: the type of a field cannot be read: {type(error).__name__}: {error}"
        ) from None
    return {name: found[name] for name in names}


# -- written down ----------------------------------------------------------------------------------------

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
