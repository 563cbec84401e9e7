"""What a merger is: `(states, weights, **params) -> state`, a pure function from adapter states to one; and mergers by name.

    merger("ties").part([part_a, part_b], [1.0, 1.0])       one module of it: what streaming calls
    available_mergers()                                     all, also those of installed packages

A merger is a rule for one module (`mergers.py` has them). What the result is kept as is not the rule's business:

    keep   auto    as it comes if it is low rank (exact, ranks add), else truncated to the sum of ranks
           cat     exact, whatever rank that takes
           svd     truncated to `rank` (0: the largest rank that came in)
           dense   one full matrix per module
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, get_args, get_type_hints

import torch
from torch import Tensor

from retain.merge.axes import Space, borders_of, taus_in
from retain.merge.parts import Low, Part, dense, full, join, shape, split, truncated
from retain.plain import near
from retain.types import RetainError, State
from retain.values import check

Keep = Literal["auto", "cat", "svd", "dense"]
KEEP: tuple[Keep, ...] = get_args(Keep)


class Rule(Protocol):
    """One module of all adapters to the merged module; parameters are keywords with defaults."""

    def __call__(self, parts: Sequence[Part], weights: Sequence[float], **params: Any) -> Part: ...


@dataclass(frozen=True)
class Merged:
    """A merged state, and per module the relative error of keeping it (0 where it is exact)."""

    parts: dict[str, Part]
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def state(self) -> dict[str, Tensor]:
        """As an adapter state."""
        return join(self.parts)

    @property
    def error(self) -> float:
        """The largest error of all modules."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True)
class Merger:
    """A merging method: call it with states, or `part` with one module's changes."""

    name: str
    about: str
    source: str
    rule: Callable[..., Part]
    normalised: bool = False  # weights are divided by their sum
    keep: Keep = "auto"
    exactly: int = 0  # the number of adapters it takes; 0: any
    in_order: bool = False  # the order of adapters is part of the method
    per_module: tuple[str, ...] = ()  # parameters that are states: one entry per adapter
    space: Space = "deltas"  # of a rule that has no parameter `space`

    def __call__(
        self,
        states: Sequence[State],
        weights: Sequence[float] | None = None,
        *,
        keep: Keep | None = None,
        rank: int = 0,
        **params: Any,
    ) -> dict[str, Tensor]:
        """The merged state. Weights default to 1 each (`average`: equal shares)."""
        return self.run(states, weights, keep=keep, rank=rank, **params).state

    def run(
        self,
        states: Sequence[State],
        weights: Sequence[float] | None = None,
        *,
        keep: Keep | None = None,
        rank: int = 0,
        names: Sequence[str] = (),
        **params: Any,
    ) -> Merged:
        """The same with errors per module. `names` of the adapters are for messages."""
        all_parts = [split(s) for s in states]
        names = list(names) or [f"adapter {i + 1}" for i in range(len(states))]
        w = self.weights(len(states), weights)
        same_modules(all_parts, names)
        extra = {k: [split(s) for s in params.pop(k)] for k in self.per_module if params.get(k) is not None}
        self.check(params, given=tuple(extra))

        def modules() -> Iterator[list[Part]]:
            for path in all_parts[0]:
                same_shape([p[path] for p in all_parts], path, names)
                yield [p[path] for p in all_parts]

        params = self.surveyed(params, modules)
        parts, errors = dict[str, Part](), dict[str, float]()
        for path in all_parts[0]:
            here = [p[path] for p in all_parts]
            inputs = {k: [entry(p, path, k) for p in v] for k, v in extra.items()}
            with where(path):
                same_shape(here, path, names)
                ranks = [p.rank for p in here if isinstance(p, Low)]
                part, error = kept(self.part(here, w, **params, **inputs), ranks, keep or self.keep, rank)
            key = path if isinstance(part, Low) or not isinstance(here[0], Low) else f"{path}.weight"
            parts[key], errors[key] = part, error
        return Merged(parts, errors)

    def surveyed(
        self, params: Mapping[str, Any], modules: Callable[[], Iterable[Sequence[Part]]]
    ) -> dict[str, Any]:
        """The parameters with what must be known of all modules before the first is merged (`trim: model`)."""
        if params.get("trim") != "model":
            return dict(params)
        every = {**self.params, **params}
        space = every.get("space", self.space)
        if space == "factors":
            raise RetainError(
                f"{self.name}.trim: 'model' ranks the entries of changes, not of factors; use deltas"
            )
        return {
            **params,
            "borders": borders_of(lambda: (taus_in(parts, space) for parts in modules()), every["density"]),
        }

    @torch.no_grad()
    def part(self, parts: Sequence[Part], weights: Sequence[float], **params: Any) -> Part:
        """One module. A sum that overflows is an error, not an infinity in the result."""
        try:
            return sound(self.rule(parts, weights, **params))
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise RetainError(f"{self.name}: the changes are too large for fp32 ({error})") from None

    def weights(self, n: int, given: Sequence[float] | None) -> list[float]:
        """Checked weights, one per adapter."""
        if n == 0:
            raise RetainError(f"{self.name}: no adapter to merge")
        if self.exactly and n != self.exactly:
            raise RetainError(f"{self.name} takes {self.exactly} adapters, not {n}")
        out = [1.0] * n if given is None else [float(w) for w in given]
        if len(out) != n:
            raise RetainError(f"weights: {len(out)} numbers for {n} adapters")
        if not all(map(math.isfinite, out)):
            raise RetainError(f"weights: {out} are not all finite numbers")
        if self.normalised:
            whole = sum(out)
            if whole <= 0:
                raise RetainError(f"{self.name}: the weights {out} must have a positive sum")
            out = [w / whole for w in out]
        return out

    @property
    def params(self) -> dict[str, Any]:
        """Parameters and their defaults."""
        found = inspect.signature(self.rule).parameters.values()
        return {
            p.name: p.default
            for p in found
            if p.kind is p.KEYWORD_ONLY and p.name not in (*self.per_module, "borders")
        }

    def check(self, params: Mapping[str, Any], given: Sequence[str] = (), at: str = "") -> None:
        """Refuse unknown parameters, wrong types and values out of range, before anything is read."""
        where_ = f"{at}{self.name}"
        lacking = [k for k in self.per_module if k not in given]
        if lacking:
            raise RetainError(
                f"{where_} needs {lacking[0]}: one state per adapter, which a method of a run computes; "
                "adapters on disk do not hold them"
            )
        hints = get_type_hints(self.rule, include_extras=True)
        for key, value in params.items():
            if key not in self.params:
                raise RetainError(f"{where_}: no parameter {key!r}{near(key, self.params)}")
            check(hints[key], value, f"{where_}.{key}")


class where:
    """Errors inside name the module."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RetainError) and self.path not in str(error):
            raise RetainError(f"{self.path}: {error}") from None


def same_modules(all_parts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Every adapter must change the same modules."""
    first = all_parts[0]
    for name, parts in zip(names[1:], all_parts[1:]):
        missing, extra = [k for k in first if k not in parts], [k for k in parts if k not in first]
        if missing:
            raise RetainError(
                f"{name}: {missing[0]} is missing ({len(missing)} in all), which {names[0]} has"
            )
        if extra:
            raise RetainError(f"{name}: {extra[0]} ({len(extra)} in all) is not in {names[0]}")


def entry(parts: Mapping[str, Part], path: str, what: str) -> Part:
    """A module's entry of a state-valued parameter, as factors or, as `path.weight`, dense."""
    found = parts.get(path, parts.get(f"{path}.weight"))
    if found is None:
        raise RetainError(f"{what}: nothing for {path}; there is {sorted(parts)[:3]} …")
    return found


def same_shape(parts: Sequence[Part], path: str, names: Sequence[str]) -> None:
    """Every change of a module must have one shape and finite entries."""
    for name, part in zip(names, parts):
        if shape(part) != shape(parts[0]):
            raise RetainError(f"{name}: {path} is {shape(part)}, but {names[0]} has {shape(parts[0])}")
        for label, t in (
            {"lora_A": part.A, "lora_B": part.B}.items() if isinstance(part, Low) else [("", part)]
        ):
            if not torch.isfinite(t).all():
                bad = t[~torch.isfinite(t)]
                told = f"{path}.{label}" if label else path
                raise RetainError(
                    f"{name}: {told} holds {float(bad[0])} ({bad.numel()} of {t.numel()} values)"
                )


def sound(part: Part) -> Part:
    """The part; an error where its entries, or those of the product of its factors, do not fit fp32."""
    if isinstance(part, Low):
        sizes = [float(t.double().norm()) for t in (part.B, part.A)]
        largest = sizes[0] * sizes[1] if all(map(math.isfinite, sizes)) else math.inf
    else:
        largest = float(part.abs().max()) if part.numel() else 0.0
    if not largest < torch.finfo(torch.float32).max:
        raise RetainError("the merged values overflow fp32; use smaller weights or a smaller lam")
    return part


def kept(part: Part, ranks: Sequence[int], keep: Keep, rank: int) -> tuple[Part, float]:
    """A merged module in the form it is kept in, and the relative error of that.

    `ranks` are those of the adapters; none for a projector or a bias, which stays dense.
    """
    if keep not in KEEP:
        raise RetainError(f"keep: {keep!r} is none of {list(KEEP)}")
    if rank < 0:
        raise RetainError(f"rank: must not be negative, is {rank}")
    if keep == "dense" or not ranks:
        return dense(part) if isinstance(part, Low) else part, 0.0
    if keep == "cat":
        return full(part), 0.0
    if keep == "svd":
        return truncated(part, rank or max(ranks))
    return (part, 0.0) if isinstance(part, Low) else truncated(part, rank or sum(ranks))


# -- registry --------------------------------------------------------------------------------------------

MERGERS: dict[str, Merger] = {}


def register_merger(about: str, source: str, **traits: Any) -> Callable[[Callable[..., Part]], Merger]:
    """Decorator: a rule becomes a merger named like the function."""

    def make(rule: Callable[..., Part]) -> Merger:
        made = Merger(rule.__name__, about, source, rule, **traits)
        if made.name in MERGERS:
            raise RetainError(f"a merger named {made.name!r} is registered already")
        MERGERS[made.name] = made
        return made

    return make


def available_mergers() -> dict[str, Merger]:
    """Every merger by name: ours, and those of installed packages (entry point group `retain.mergers`)."""
    for point in entry_points(group="retain.mergers"):
        if point.name not in MERGERS:
            MERGERS[point.name] = point.load()
    return dict(sorted(MERGERS.items()))


def merger(name: str, at: str = "") -> Merger:
    """The merger of that name; an error with the nearest one and the choices otherwise."""
    known = available_mergers()
    if name not in known:
        raise RetainError(f"{at}no merger {name!r}{near(name, known)}")
    return known[name]
