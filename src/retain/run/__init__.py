"""The loop and what it leaves on disk: train, evaluate, one row after the other, every file of a run folder.

`retain.run` is a folder and, as `from retain import run` promises, a function: calling the package calls
`retain.run.continual.run`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from retain.run.continual import run

        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
