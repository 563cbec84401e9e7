"""A chat template is a program that a stranger wrote: read for what has no end, then run once with its steps counted.

Jinja's sandbox forbids files and attributes, and a range of more than 100,000; it does not forbid two of them inside each
other, a macro that calls itself twice, or a text that is doubled forty times. Steps are counted, not seconds, so the
answer is the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.utils import Namespace
from transformers.utils.chat_template_utils import _compile_jinja_template

from retain.types import RetainError

LONGEST = 1_000_000
"""Characters of a template; the longest published ones have twenty thousand."""
STEPS, TEXT = 50_000, 20_000_000
"""Lines that it may run for a question and an answer, and characters that it may hold; published ones run hundreds."""
NUMBER = 1_000_000
"""The largest number that may stand in it."""


def looked_at(template: str, render: Callable[[], object]) -> None:
    """Refuse a template that cannot be compiled, or does not end; `render` runs it on something small."""
    where = "the model's chat template"
    if len(template) > LONGEST:
        raise RetainError(f"{where} has {len(template):,} characters; at most {LONGEST:,} are taken")
    try:
        _finite(_compile_jinja_template("").environment.parse(template), where)
        _compile_jinja_template(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise RetainError(f"{where}{f', line {line}' if line else ''}: {error.message or error}") from None
    except RecursionError:
        raise RetainError(f"{where} is nested too deep") from None
    with counted(where):
        try:
            render()
        except (RecursionError, MemoryError) as error:
            raise RetainError(f"{where} does not end: {error}") from None
        except Exception:  # what it refuses is told of the row that it refuses
            return


def _finite(tree: nodes.Template, where: str) -> None:
    """Refuse sums that are done while it is compiled, and could take for ever: powers and huge numbers."""
    for node in tree.find_all((nodes.Pow, nodes.Mul, nodes.Const)):
        inner = isinstance(node, nodes.Mul) and node.find(nodes.Mul) is not None
        large = (
            isinstance(node, nodes.Const) and isinstance(node.value, int | float) and abs(node.value) > NUMBER
        )
        if isinstance(node, nodes.Pow) or inner or large:
            what = (
                f"the number {str(node.value)[:20]}"
                if isinstance(node, nodes.Const)
                else "a power or a long product"
            )
            raise RetainError(f"{where}, line {node.lineno}: {what}, which could take for ever to work out")


class _TooLong(BaseException):
    """Passes whatever catches exceptions on the way."""


@contextmanager
def counted(where: str) -> Iterator[None]:
    """Templates that run inside end after `STEPS` lines, with an error."""
    left, before = STEPS, sys.gettrace()

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _TooLong(f"runs more than {STEPS:,} steps")
        if sum(map(_held, frame.f_locals.values())) > TEXT:
            raise _TooLong(f"makes a text of more than {TEXT:,} characters")
        return line

    def call(frame: FrameType, event: str, given: Any) -> Any:
        return line(frame, event, given) if frame.f_code.co_filename == "<template>" else None

    sys.settrace(call)
    try:
        yield
    except _TooLong as error:
        raise RetainError(f"{where} {error} for one question with its answer: it does not end") from None
    finally:
        sys.settrace(before)


def _held(value: object) -> int:
    """Characters that a variable of a template holds."""
    if isinstance(value, Namespace):
        return sum(map(_held, getattr(value, "_Namespace__attrs", {}).values()))
    return len(value) if isinstance(value, str | list | tuple) else 0
