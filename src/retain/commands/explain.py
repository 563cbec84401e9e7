"""What methods there are, and which part of a stack acts at which hook (`retain methods`, `explain`)."""

from __future__ import annotations

from dataclasses import fields

from retain.method import Method, available
from retain.order import ROLES

HOOKS = {
    "stages": "ONE owner: what is trained on, in order",
    "adapt": "ONE owner: grow or choose adapters; what is on",
    "begin_task": "by role: snapshots, teachers, anchors",
    "data": "pipeline: the examples to train on",
    "batch_mix": "ONE owner: per sample, in training",
    "loss": "sum: a term beside the answer loss",
    "grads": "by role: after backward, before the step",
    "after_step": "by role: after each step",
    "end_task": "by role: after the last step of a task",
    "route": "ONE owner: per sample, at inference",
}
"""The hooks in the order of the loop (`retain.method` draws it)."""

DEFAULTS = {
    "stages": "the stream's tasks",
    "adapt": "nobody: this method cannot run alone",
    "data": "the task's own examples",
    "batch_mix": "the mix that adapt left",
    "loss": "only the answer loss",
    "route": "the mix that training left",
}

Rows = list[list[str]]


def used(cls: type[Method]) -> list[str]:
    """Hooks that a method overrides, in the order of the loop."""
    return [hook for hook in HOOKS if getattr(cls, hook) is not getattr(Method, hook)]


def method_rows() -> Rows:
    """One row per registered method."""
    body = [[name, cls.about, cls.source, ", ".join(used(cls))] for name, cls in available().items()]
    return [["method", "what it does", "source", "hooks"], *body]


def hook_rows(method: Method) -> Rows:
    """One row per hook: who acts there, in the order in which they act, with their settings and roles."""
    body = []
    for hook, about in HOOKS.items():
        owners = [told(part, hook) for part in method.order(hook) if hook in used(type(part))]
        body.append([hook, " → ".join(owners) or f"({DEFAULTS.get(hook, 'nobody')})", about])
    return [["hook", "who acts", "rule"], *body]


def told(part: Method, hook: str = "") -> str:
    """A part with the settings that differ from its defaults, and its role at a hook: `replay(size=200)`, `ema reads`."""
    own = [f for f in fields(part) if f.init and getattr(part, f.name) != f.default]
    name = (
        f"{part.name}({', '.join(f'{f.name}={getattr(part, f.name)!r}' for f in own)})" if own else part.name
    )
    role = part.roles.get(hook)
    return f"{name} {role}" if role in ROLES.get(hook, {}) else name
