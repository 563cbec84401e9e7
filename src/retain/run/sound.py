"""What a run is about to save, or has loaded: is every number of it finite?

One pass over the tensors and one transfer from the device, whatever their number. Looked at before every save: of a
checkpoint, of the end of a task's steps, and of what `end_task` made of it. A field of a method's state that may hold
infinite numbers (a best loss that starts at infinity) says so: field(init=False, default=inf, metadata=UNBOUNDED).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from retain.method import UNBOUNDED, Context, Method, Stack
from retain.types import RetainError


def broken(state: Any, method: Method | None = None) -> list[str]:
    """The names of what is not finite in a nest of tensors, arrays and numbers; Examples are a user's and not looked at.

    With `method` the state is that method's, and its fields that are UNBOUNDED are left out.
    """
    found, bad = list[tuple[str, Tensor]](), list[str]()
    for name, value in _leaves(state, "", _free(method) if method is not None else frozenset()):
        if isinstance(value, float):
            bad += [] if math.isfinite(value) else [name]
        elif isinstance(value, np.ndarray):
            bad += [] if value.dtype.kind not in "fc" or np.isfinite(value).all() else [name]
        else:
            found.append((name, value))
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, t in found:
        by_device.setdefault(t.device, []).append((name, t))
    for pairs in by_device.values():
        ends = torch.stack([_ends(t) for _, t in pairs])
        whole = ends.isfinite().all(dim=1).tolist()  # the only host sync
        bad += [name for (name, _), good in zip(pairs, whole, strict=True) if not good]
    return bad


def _ends(t: Tensor) -> Tensor:
    """Least and greatest entry in fp64, nan where one is nan: (2,)."""
    t = t.detach()
    t = torch.view_as_real(t) if t.is_complex() else t.float() if t.itemsize == 1 else t
    return torch.stack(torch.aminmax(t)).double()


def _leaves(value: Any, name: str, free: frozenset[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        if value.numel() and (value.is_floating_point() or value.is_complex()):
            yield name, value
    elif isinstance(value, float | np.ndarray):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{name}.{key}" if name else str(key)
            if inner not in free:
                yield from _leaves(item, inner, free)
    elif isinstance(value, list | tuple | set | frozenset):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{name}[{i}]", free)


def _parts(method: Method, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Method]]:
    """The simple methods of a stack, with the keys that lead to their part of its state."""
    if not isinstance(method, Stack):
        yield keys, method
        return
    for i, member in enumerate(method.members):
        yield from _parts(member, (*keys, f"{i}.{member.name}"))


def _free(method: Method) -> frozenset[str]:
    """The names of what may hold numbers that are not finite."""
    return frozenset(
        ".".join((*keys, f.name))
        for keys, part in _parts(method)
        for f in fields(part)
        if UNBOUNDED.items() <= dict(f.metadata).items()
    )


def wrong_kinds(method: Method, state: Mapping[str, Any]) -> str:
    """The first field of a state that is not of the kind its method declares, in words; empty where all are."""
    for keys, part in _parts(method):
        here: Any = state
        for key in keys:
            here = here.get(key) if is_of(here, dict[str, Any]) else None
        if not is_of(here, dict[str, Any]):
            return f"no state of {part.name!r}"
        if set(here) != (own := {f.name for f in fields(part) if not f.init}):
            return f"state of {part.name!r}: has {sorted(here)[:9]}, needs {sorted(own)}"
        hints = get_type_hints(type(part))
        for f in fields(part):
            if not f.init and not is_of(here[f.name], hints[f.name]):
                return f"{part.name}.{f.name} is no {f.type}"
    return ""


def is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as plain types and their nests say; True for any other type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_of(value, h) for h in inner)
    if hint is Any:
        return True
    if origin is dict:
        return isinstance(value, dict) and all(
            is_of(k, inner[0]) and is_of(v, inner[1]) for k, v in value.items()
        )
    if origin in (list, set, frozenset):
        return isinstance(value, origin) and all(is_of(v, inner[0]) for v in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


# -- in the loop ---------------------------------------------------------------------------------------------


@dataclass
class Watchman:
    """Looks at the state of a task before each save, and says what to do where something is not finite.

    `kept` is the last good state in words. Raises RetainError, on every process alike.
    """

    ctx: Context
    method: Method
    rates: Mapping[str, float]
    kept: str = ""

    def __post_init__(self) -> None:
        self.kept = self.kept or (
            f"the state after {self.ctx.seen[-1]!r}" if self.ctx.seen else "what was saved before"
        )

    def look(self, when: str, optimizer: torch.optim.Optimizer | None = None) -> None:
        """`when` names the step or the hook that came last."""
        bank = self.ctx.model.adapters
        bad = broken({f"adapter {name}": dict(bank.parameters(name)) for name in bank.names})
        if optimizer is not None:
            names = {id(p): key for key, p in bank.trainable().items()}
            slots = {names.get(id(p), "?"): slot for p, slot in optimizer.state.items()}
            bad += broken({"optimizer": slots})
        bad += [f"method {name}" for name in broken(self.method.state_dict(), self.method)]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise RetainError(
                self.told(f"{when}, {', '.join(bad[:3])}{more} {'are' if bad[1:] else 'is'} not finite")
            )

    def told(self, what: str) -> str:
        """One sentence: what happened, what is kept, and what to try."""
        rates = ", ".join(f"optim.{name} ({value:g})" for name, value in self.rates.items())
        return (
            f"task {self.ctx.task.name!r}: {what}; nothing of it was saved, {self.kept} is kept; lower {rates} or check "
            "the data: a run with other settings needs a folder of its own (out=DIR)"
        )
