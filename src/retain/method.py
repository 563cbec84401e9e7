"""A method is a set of hooks; a stack of methods is a method. This is the loop with its hooks:

    method.check(model, stream)                             # all          refuse what cannot work, before the run begins
    for task in method.stages(stream):                      # usually the stream itself; multi-task joins it
        bank.mix = method.adapt(ctx)                        # ONE owner    grow or choose adapters; what is on
        method.begin_task(ctx)                              # by role      snapshot, teacher, anchor
        examples = method.data(ctx, task.train)             # pipeline     replay, selection, rewriting
        for batch in batches(examples):
            mix = method.batch_mix(ctx, batch)              # ONE owner    per sample, in training; None: adapt's mix
            out = model(batch)
            loss = out.loss + method.loss(ctx, batch, out)  # sum          a named term, logged
            loss.backward()
            method.grads(ctx)                               # by role      projection, before the step
            optimizer.step()
            method.after_step(ctx)                          # by role      re-projection, EMA; .grad is still there
        method.end_task(ctx)                                # by role      average, merge, Fisher, prototypes
    at inference: mix = method.route(ctx, batch)            # ONE owner    per sample; None: the mix as it is

Fields with `init=True` are hyper-parameters, fields with `init=False` are saved state; a method has no other
attribute. Hooks return what they contribute; they write their own fields and the bank, nothing else. By role: a part
declares what it does at a hook (`retain.order`); without a role it acts at its place in the list. What a part keeps is
its own: a copy, where another part or the optimizer may write.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, TypeVar

import torch
from torch import Generator, Tensor

from retain.adapters.bank import Mix
from retain.models.base import Model, Turns
from retain.order import arranged, check_roles, check_together
from retain.stream import Stream, Task
from retain.types import Batch, Conflict, Examples, Output, RetainError, digest
from retain.values import field_hints, ranged, typed

FULL_GRADS = "full_grads"  # reads whole .grad tensors before or after the step
FULL_PARAMS = "full_params"  # reads or writes whole adapter tensors during training
UNBOUNDED = {"finite": False}
"""Metadata of a state field that may hold nan or infinity: field(init=False, default=inf, metadata=UNBOUNDED)."""


def _silent(**_: Any) -> None: ...


@dataclass
class Context:
    """What hooks may read. Only the trainer writes it.

    `seen` are the names of the tasks learned before this one; `step` counts optimizer steps of this task from 0;
    `turns` says which answers of a conversation are learned, for a method that collates batches of its own.
    `micro_size`: how many samples a forward of training takes (0: a whole batch); a pass of a method's own takes no
    more. Within `checkpointing()` gradients are made as sparingly as in training, whether dropout is on or off.
    `rates`: the learning rate of this step by group of tensors (`adapters.group`), set before it is taken.
    `before(batch)`: the mix with which the model answered these samples before the task, per sample where it is
    routed; for parts with `asks_before`.
    """

    model: Model
    task: Task
    stream: Stream
    seen: list[str]
    seed: int
    log: Callable[..., None] = _silent
    step: int = 0
    n_steps: int = 0
    batch_size: int = 16
    turns: Turns = "all"
    micro_size: int = 0
    checkpointing: Callable[[], AbstractContextManager[None]] = nullcontext
    before: Callable[[Batch], Mix] | None = None
    rates: dict[str, float] = field(default_factory=dict)

    def rng(self, who: str) -> Generator:
        """A fresh generator from (seed, task, who): nothing is shared, so switching a part off leaves others as they are."""
        text = f"{self.seed}/{self.task.name}/{who}".encode()
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1)


OWNED = ("adapt", "batch_mix", "route", "stages")


@dataclass
class Method:
    """The base: every hook does nothing. Override what your method changes."""

    name: ClassVar[str] = "method"
    about: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[tuple[str, ...]] = ("lora",)  # that its `adapt` can grow: the recipe's adapter.kind
    roles: ClassVar[Mapping[str, str]] = {}  # hook -> what this part does there, of `retain.order.ROLES`
    asks_before: ClassVar[bool] = False  # reads `ctx.before`
    stays: ClassVar[frozenset[str]] = frozenset()  # federated: state fields that never leave a client
    ends_alone: ClassVar[bool] = False  # federated: end_task looks at no data, so the server does it

    def stages(self, stream: Stream) -> Sequence[Task]:
        """What is trained on, in order. ONE owner. Default: the stream's tasks; joint training returns one task."""
        return stream.tasks

    def check(self, model: Model, stream: Stream) -> None:
        """Raise RetainError for what cannot work on this model and stream, before anything is written."""

    def adapt(self, ctx: Context) -> Mix:
        """Grow or choose adapters, decide which train, return which are on. ONE owner in a stack."""
        raise RetainError(
            f"{self.name!r} does not own `adapt`: put `lora`, `lora_per_task` or another owner before it"
        )

    def begin_task(self, ctx: Context) -> None:
        """Before the first step: snapshots, teachers, anchors."""

    def data(self, ctx: Context, examples: Examples) -> Examples:
        """The examples to train on."""
        return examples

    def batch_mix(self, ctx: Context, batch: Batch) -> Mix | None:
        """In training: how much each adapter counts for each sample of a micro-batch; None keeps `adapt`'s mix."""
        return None

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        """A term added to the mean answer loss of the micro-batch; 0 for none."""
        return 0.0

    def grads(self, ctx: Context) -> None:
        """After backward (full step, reduced over processes, clipped), before the optimizer's step."""

    def after_step(self, ctx: Context) -> None:
        """After the optimizer's step; `.grad` still holds this step's gradient."""

    def end_task(self, ctx: Context) -> None:
        """After the last step and before evaluation and saving."""

    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        """At inference: how much each adapter counts for each sample; None keeps the bank's mix. ONE owner."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The fields with `init=False`: tensors, numbers, strings, examples, and lists and dicts of them."""
        if extra := sorted(vars(self).keys() - {f.name for f in fields(self)}):
            raise RetainError(
                f"method {self.name!r} sets self.{extra[0]}, which is no field, so a continued run would lack it; "
                f"declare it: {extra[0]}: ... = field(init=False, default=...), or default_factory=..."
            )
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; a key too few or too many is an error."""
        own = {f.name for f in fields(self) if not f.init}
        if own != set(state):
            raise RetainError(f"state of {self.name!r}: has {sorted(state)}, needs {sorted(own)}")
        for key, value in state.items():
            setattr(self, key, value)

    def reset(self) -> None:
        """All state as at the start of a run."""
        for f in fields(self):
            if not f.init:
                setattr(self, f.name, f.default_factory() if f.default_factory is not MISSING else f.default)

    def parted(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A state as what a client tells of it, and what stays with the client (`stays`)."""
        told = {k: v for k, v in state.items() if k not in self.stays}
        return told, {k: v for k, v in state.items() if k in self.stays}

    def whole(self, told: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `parted`; what a client has not kept yet is as at the start of a run."""
        fresh = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default
                 for f in fields(self) if f.name in self.stays}  # fmt: skip
        return {**told, **fresh, **kept}

    def joined(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        """Federated: what the clients' states (without what stays) are together; weights are sample counts.

        Every client began from the server's state and ended the stage with the same adapters on its own data.
        Default: all must be equal. A method whose state differs by client says here how it is joined.
        """
        if any(digest(s) != digest(states[0]) for s in states[1:]):
            raise RetainError(
                f"method {self.name!r}: the clients' states differ, and it has no rule to join them"
            )
        return dict(states[0])

    @property
    def unfederated(self) -> list[str]:
        """Names of the parts whose state has no federated form: it differs by client, and no rule joins it."""
        state = {f.name for f in fields(self) if not f.init} - self.stays
        fine = not state or self.ends_alone or type(self).joined is not Method.joined
        return [] if fine and not self.owns("stages") else [self.name]

    def config(self) -> dict[str, Any]:
        """The hyper-parameters, as the recipe writes them; one that came LATER only where it is not at its default."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        later = {f.name: f.default for f in fields(self) if f.metadata.get("later")}
        return {k: v for k, v in given.items() if k not in later or v != later[k]}

    def owns(self, hook: str) -> list[str]:
        """Names of the parts that override a hook."""
        return [self.name] if getattr(type(self), hook) is not getattr(Method, hook) else []

    @property
    def parts(self) -> tuple[Method, ...]:
        """The simple methods that this one consists of."""
        return (self,)

    def order(self, hook: str) -> tuple[Method, ...]:
        """The parts in the order in which they act at a hook (`retain.order`)."""
        return arranged(self.parts, hook)


@dataclass(init=False)
class Stack(Method):
    """Methods as one method. Stacks nest; two owners of one hook, or roles that exclude each other, raise `Conflict`."""

    name: ClassVar[str] = "stack"
    members: tuple[Method, ...] = ()

    def __init__(self, *parts: Method) -> None:
        self.members = tuple(parts)
        for hook in OWNED:
            owners = self.owns(hook)
            if len(owners) > 1:
                raise Conflict(f"{hook}: one part may define it, but {owners} do")
        check_together(self.parts)

    def _owner(self, hook: str) -> Method:
        return next((m for m in self.members if m.owns(hook)), Method())

    def owns(self, hook: str) -> list[str]:
        return [name for m in self.members for name in m.owns(hook)]

    @property
    def parts(self) -> tuple[Method, ...]:
        return tuple(p for m in self.members for p in m.parts)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset().union(*(m.needs for m in self.members)) if self.members else frozenset()

    def stages(self, stream: Stream) -> Sequence[Task]:
        return self._owner("stages").stages(stream)

    def check(self, model: Model, stream: Stream) -> None:
        for m in self.members:
            m.check(model, stream)

    def adapt(self, ctx: Context) -> Mix:
        owner = self._owner("adapt")
        mix: Mix = answer(owner, "adapt", owner.adapt(ctx))
        return mix

    def begin_task(self, ctx: Context) -> None:
        for part in self.order("begin_task"):
            part.begin_task(ctx)

    def data(self, ctx: Context, examples: Examples) -> Examples:
        for m in self.members:
            examples = answer(m, "data", m.data(ctx, examples))
        return examples

    def batch_mix(self, ctx: Context, batch: Batch) -> Mix | None:
        return self._owner("batch_mix").batch_mix(ctx, batch)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        total: Tensor | float = 0.0
        for m in self.members:
            total = total + answer(m, "loss", m.loss(ctx, batch, out))
        return total

    def grads(self, ctx: Context) -> None:
        for part in self.order("grads"):
            part.grads(ctx)

    def after_step(self, ctx: Context) -> None:
        for part in self.order("after_step"):
            part.after_step(ctx)

    def end_task(self, ctx: Context) -> None:
        for part in self.order("end_task"):
            part.end_task(ctx)

    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        return self._owner("route").route(ctx, batch)

    def state_dict(self) -> dict[str, Any]:
        return {f"{i}.{m.name}": m.state_dict() for i, m in enumerate(self.members)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = [f"{i}.{m.name}" for i, m in enumerate(self.members)]
        if sorted(own) != sorted(state):
            raise RetainError(f"state of a stack: has {sorted(state)}, needs {sorted(own)}")
        for key, m in zip(own, self.members, strict=True):
            m.load_state_dict(state[key])

    def parted(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        pairs = {key: m.parted(state[key]) for key, m in self._keyed()}
        return {k: told for k, (told, _) in pairs.items()}, {
            k: kept for k, (_, kept) in pairs.items() if kept
        }

    def whole(self, told: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
        return {key: m.whole(told[key], kept.get(key, {})) for key, m in self._keyed()}

    def joined(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        return {key: m.joined([s[key] for s in states], weights) for key, m in self._keyed()}

    @property
    def unfederated(self) -> list[str]:
        return [name for m in self.members for name in m.unfederated]

    def _keyed(self) -> list[tuple[str, Method]]:
        return [(f"{i}.{m.name}", m) for i, m in enumerate(self.members)]

    def reset(self) -> None:
        for m in self.members:
            m.reset()

    def config(self) -> dict[str, Any]:
        return {f"{i}.{m.name}": m.config() for i, m in enumerate(self.members)}


# -- what users get wrong ---------------------------------------------------------------------------------------------

RETURNS: dict[str, tuple[Any, str]] = {
    "adapt": (Mix, "a Mix"),
    "data": (Sequence, "a sequence of Examples"),
    "loss": ((int, float, Tensor), "a number or a tensor without dimensions"),
}


def answer(part: Method, hook: str, value: Any) -> Any:
    """What a hook returned; an error that names part and hook where it is of another kind."""
    kinds, wanted = RETURNS[hook]
    if (
        isinstance(value, kinds)
        and not (isinstance(value, Tensor) and value.ndim)
        and not isinstance(value, str)
    ):
        return value
    told = (
        f"a tensor {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{type(value).__name__} {value!r:.60}"
    )
    raise RetainError(f"method {part.name!r}: {hook} returned {told}; {wanted} is needed")


def _check_class(cls: type[Method]) -> None:
    """A class that would be misread: no name, no @dataclass, a misspelt hook, a hook that takes other things."""
    if "name" not in vars(cls):
        raise RetainError(
            f'class {cls.__name__} has no name; add name: ClassVar[str] = "…", as recipes write it'
        )
    check_roles(cls.name, cls.roles)
    own = vars(cls).get("__annotations__", {})
    plain = [k for k, v in own.items() if "ClassVar" not in str(v)]
    if plain and "__dataclass_fields__" not in vars(cls):
        raise RetainError(
            f"method {cls.name!r}: put @dataclass under @register, or its fields {plain} are not read"
        )
    hooks = [n for n, v in vars(Method).items() if callable(v) and not n.startswith("_")]
    for name, value in vars(cls).items():
        if not inspect.isfunction(value) or name.startswith("_"):
            continue
        near = difflib.get_close_matches(name, hooks, 1, cutoff=0.75)
        if near and name not in hooks:
            raise RetainError(
                f"method {cls.name!r}: no hook {name!r}, did you mean {near[0]!r}? (a helper of yours: _{name})"
            )
        if name in hooks:
            wanted, found = inspect.signature(getattr(Method, name)), inspect.signature(value)
            try:
                found.bind(*wanted.parameters)
            except TypeError:
                raise RetainError(
                    f"method {cls.name!r}: {name}{_short(found)} does not take what it is given: {name}{_short(wanted)}"
                ) from None


def _short(signature: inspect.Signature) -> str:
    return f"({', '.join(signature.parameters)})"


# -- registry ---------------------------------------------------------------------------------------------------------

REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: the method can be named in recipes. Third parties use it, or the entry point `retain.methods`.

    RetainError: no name, a name that is taken, a misspelt hook, a hook with other arguments, no @dataclass, a type that
    cannot be read.
    """
    _check_class(cls)
    taken = REGISTRY.get(cls.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        at = getattr(sys.modules.get(taken.__module__), "__file__", None) or taken.__module__
        raise RetainError(f"a method named {cls.name!r} is registered already, in {at}; choose another name")
    field_hints(cls, f"method {cls.name!r}")  # now, or the first recipe that names it would be told
    REGISTRY[cls.name] = ranged(cls.name)(cls)
    return cls


def available() -> dict[str, type[Method]]:
    """Every registered method by name: ours, and those of installed packages (entry point group `retain.methods`)."""
    import retain.methods  # noqa: F401  registers ours

    for point in _installed():
        if point.name not in REGISTRY:
            register(point.load())
    return dict(sorted(REGISTRY.items()))


@cache
def _installed() -> tuple[EntryPoint, ...]:
    """Asked once: it reads the metadata of every installed package."""
    return tuple(entry_points(group="retain.methods"))


def build(spec: str | Mapping[str, Any] | Sequence[Any], where: str = "method") -> Method:
    """A recipe's `method:` as a Method: a name, `{name: {field: value}}`, or a list of those (a stack)."""
    if isinstance(spec, str):
        spec = {spec: {}}
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise RetainError(f"{where}: one method name per entry, got {sorted(map(str, spec))}")
        name, options = next(iter(spec.items()))
        return _one(str(name), options or {}, where)
    if isinstance(spec, Sequence):
        parts = [build(s, f"{where}[{i}]") for i, s in enumerate(spec)]
        return parts[0] if len(parts) == 1 else Stack(*parts)
    raise RetainError(f"{where}: a name, a mapping or a list is needed, not {spec!r}")


def _one(name: str, options: Mapping[str, Any], where: str) -> Method:
    known = available()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise RetainError(f"{where}: no method {name!r}{hint} Choose from {list(known)}")
    cls = known[name]
    if not isinstance(options, Mapping):
        raise RetainError(f"{where}.{name}: fields as a mapping are needed, not {options!r}")
    hints = field_hints(cls, f"method {name!r}")
    choices = list(hints)
    for key, value in options.items():
        if key not in choices:
            near = difflib.get_close_matches(str(key), choices, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            told = f"Choose from {choices}" if choices else "It takes none"
            raise RetainError(f"{where}.{name}: no field {key!r}{hint} {told}")
        typed(hints[key], value, f"{where}.{name}.{key}")
    return cls(**options)


__all__ = [
    "FULL_GRADS", "FULL_PARAMS", "REGISTRY", "Context", "Method", "Stack", "available", "build", "field", "register",
]  # fmt: skip
