"""Benchmarks by name: each is a function that gives one Stream. The pocket's own live with the pocket."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from retain.stream import Stream

_POCKET = {"pocket": "retain.pocket.stream", "pocket_merge": "retain.pocket.unseen"}


def _homes() -> dict[str, str]:
    """Name to module: every module of this package with a function of its own name, and the pocket's."""
    found = [m.name for m in iter_modules(__path__) if not m.name.startswith("_")]
    return {name: f"{__name__}.{name}" for name in found} | _POCKET


def find(name: str) -> Callable[..., Stream]:
    """The benchmark's function. KeyError for a name that `names()` does not list."""
    make: Callable[..., Stream] = getattr(import_module(_homes()[name]), name)
    return make


def names() -> list[str]:
    """Every benchmark that a recipe can name."""
    homes = _homes().items()
    return sorted(n for n, home in homes if callable(getattr(import_module(home), n, None)))
