"""Who acts first in a stack: by what a part does at a hook, not by its place in the recipe.

One list cannot be right for every hook: an average must follow the weights after they were projected (`after_step`),
but put its own into place before inputs are read at them (`end_task`). So a part says its role at a hook, and within
a hook roles act in the order of `ROLES`; parts of one role, and parts without a role, keep the recipe's order:

    roles: ClassVar[Mapping[str, str]] = {"after_step": "writes", "end_task": "reads"}

Some roles cannot stand together, since no order keeps what both promise (`APART`). See docs/decisions/0011.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

from retain.types import Conflict, RetainError

ROLES: dict[str, dict[str, str]] = {
    "begin_task": {"writes": "sets the weights that the task starts from", "reads": "keeps them"},
    "grads": {"writes": "changes gradients", "reads": "keeps or measures them"},
    "after_step": {
        "moves": "adds to the step that was taken",
        "writes": "holds the weights in some set",
        "reads": "follows them",
    },
    "end_task": {
        "settles": "puts the final weights into place, such as an average of the path",
        "rewrites": "makes other weights of them, such as a merge with those before the task",
        "reads": "looks at them: Fisher information, inputs, prototypes",
        "derives": "makes other adapters, or the mix, of them",
    },
}
"""The roles of each hook that acts in order, first to last."""

At = tuple[str, str]
APART: dict[tuple[At, At], str] = {
    (("after_step", "writes"), ("after_step", "writes")): "each would undo what the other holds",
    (("end_task", "settles"), ("end_task", "settles")): "the later would overwrite the earlier's final weights",
    (("end_task", "rewrites"), ("end_task", "rewrites")): "the later would not keep what the earlier made",
    (("after_step", "writes"), ("end_task", "rewrites")): (
        "the rewritten weights leave the set in which every step was held"
    ),
}  # fmt: skip
"""Roles of two parts that one stack may not have, and why."""


class Part(Protocol):
    """What is known of a method here."""

    name: ClassVar[str]
    roles: ClassVar[Mapping[str, str]]


P = TypeVar("P", bound=Part)


def check_roles(name: str, roles: Mapping[str, str]) -> None:
    """Raise RetainError for a hook without an order, or a role that it does not know."""
    for hook, role in roles.items():
        known = ROLES.get(hook)
        wrong, choices = (hook, list(ROLES)) if known is None else (role, list(known))
        if wrong not in choices:
            near = difflib.get_close_matches(str(wrong), choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            at = "roles" if known is None else f"roles[{hook!r}]"
            raise RetainError(f"method {name!r}: {at}: {wrong!r} is unknown{hint} Choose from {choices}")


def arranged(parts: Sequence[P], hook: str) -> tuple[P, ...]:
    """The parts in the order in which they act at a hook. A part without a role stays at its place in the list."""
    rank = {role: i for i, role in enumerate(ROLES.get(hook, {}))}
    places = [i for i, p in enumerate(parts) if p.roles.get(hook) in rank]
    out = list(parts)
    for place, part in zip(places, sorted((parts[i] for i in places), key=lambda p: rank[p.roles[hook]])):
        out[place] = part
    return tuple(out)


def check_together(parts: Sequence[Part]) -> None:
    """Raise Conflict if two parts have roles that no order reconciles."""
    for i, a in enumerate(parts):
        for b in parts[i + 1 :]:
            for (one, other), why in APART.items():
                for first, second in ((a, b), (b, a)):
                    if first.roles.get(one[0]) == one[1] and second.roles.get(other[0]) == other[1]:
                        raise Conflict(
                            f"{first.name!r} {told(*one)} and {second.name!r} {told(*other)}: {why}, in any order. "
                            "Take one of the two"
                        )


def told(hook: str, role: str) -> str:
    """`rewrites (end_task)`."""
    return f"{role} ({hook})"
