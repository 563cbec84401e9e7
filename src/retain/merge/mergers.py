"""Mergers by name: `(states, weights, **params) -> state`, pure functions from adapter states to one.

    merged = ties([state_a, state_b], density=0.2)          every merger below is such a function
    merger("ties").part([part_a, part_b], [1.0, 1.0])       one module of it: what streaming calls
    available_mergers()                                     all, also those of installed packages

A merger is a rule for one module. What the result is kept as is not the rule's business:

    keep   auto    as it comes if it is low rank (exact, ranks add), else truncated to the sum of ranks
           cat     exact, whatever rank that takes
           svd     truncated to `rank` (0: the largest rank that came in)
           dense   one full matrix per module
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from retain.merge.axes import (
    Prune,
    Signs,
    Space,
    Trim,
    above,
    blend,
    borders_of,
    by_rank,
    generators,
    in_space,
    largest,
    nth_smallest,
    random,
    taus_in,
)
from retain.merge.parts import Low, Part, dense, full, inner, join, scaled, shape, split, total, truncated
from retain.types import RetainError, State

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
        """One module."""
        return self.rule(parts, weights, **params)

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
        hints = get_type_hints(self.rule)
        for key, value in params.items():
            if key not in self.params:
                raise RetainError(f"{where_}: no parameter {key!r}{near(key, self.params)}")
            check_value(hints[key], value, f"{where_}.{key}")
            low, high = RANGES.get(key, (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                raise RetainError(f"{where_}.{key}: must be in [{low:g}, {high:g}], not {value}")


RANGES = {
    "density": (0.0, 1.0), "window": (0.0, 1.0), "ratio": (0.0, 1.0), "clip": (0.0, 0.5),
    "floor": (0.0, 1.0), "new": (0.0, 1.0), "parallel": (0.0, 1.0),
}  # fmt: skip
"""What parameters of these names may be, in every merger."""


def near(word: str, choices: Iterable[str]) -> str:
    """The end of a message: the nearest choice, if one is near, and all of them."""
    choices = list(choices)
    found = difflib.get_close_matches(word, choices, 1, cutoff=0.5)
    hint = f"; did you mean {found[0]!r}?" if found else "."
    return f"{hint} Choose from {choices}"


def check_value(hint: Any, value: Any, at: str) -> None:
    """One value of a parameter against its type."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise RetainError(f"{at}: {value!r} is none of {list(get_args(hint))}")
        return
    fits = (
        isinstance(value, bool)
        if hint is bool
        else not isinstance(value, bool) and isinstance(value, int | float)
    )
    if not fits or (hint is int and not isinstance(value, int)) or not math.isfinite(value):
        raise RetainError(f"{at}: {value!r} is no {'finite number' if hint is float else hint.__name__}")


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


# -- sums ------------------------------------------------------------------------------------------------


@register_merger("the weighted mean of the changes", "arXiv:2203.05482", normalised=True)
def average(parts: Sequence[Part], weights: Sequence[float]) -> Part:
    """sum_n w_n dW_n / sum_n w_n (Wortsman et al. 2022): exact, not the mean of the factors."""
    return total(parts, weights)


@register_merger("a weighted sum of the changes", "arXiv:2212.04089")
def task_arithmetic(
    parts: Sequence[Part], weights: Sequence[float], *, lam: float = 1.0, space: Space = "deltas"
) -> Part:
    """lam sum_n w_n dW_n (Ilharco et al. 2023). In `factors`: (sum B)(sum A), with cross terms, as PEFT `linear`."""
    if space == "deltas":
        return total(parts, [lam * w for w in weights])
    return scaled(in_space(parts, weights, space, lambda t, w: blend(t, w, _whole, "sum")), lam)


@register_merger("a weighted sum, truncated to the largest rank", "arXiv:2212.04089", keep="svd")
def svd(parts: Sequence[Part], weights: Sequence[float], *, lam: float = 1.0) -> Part:
    """Task arithmetic, kept as the best adapter of one rank (Eckart and Young), as PEFT `svd`."""
    return total(parts, [lam * w for w in weights])


@register_merger("the great circle between two", "Shoemake, SIGGRAPH 1985", exactly=2)
def slerp(parts: Sequence[Part], weights: Sequence[float], *, parallel: float = 0.9995) -> Part:
    """sin((1-t) w)/sin(w) dW_1 + sin(t w)/sin(w) dW_2, cos(w) = <dW_1, dW_2> / |dW_1||dW_2|, per module.

    t is the second adapter's share of the weights. Above `parallel` in cosine (or with a zero change) it is
    the straight line.
    """
    share = weights[1] / (weights[0] + weights[1]) if weights[0] + weights[1] else 0.5
    norms = math.sqrt(inner(parts[0], parts[0]) * inner(parts[1], parts[1]))
    cosine = max(-1.0, min(1.0, inner(parts[0], parts[1]) / norms)) if norms else 1.0
    if abs(cosine) > parallel:
        return total(parts, [1 - share, share])
    angle = math.acos(cosine)
    return total(
        parts, [math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)]
    )


@register_merger("old and new in turn, each new one with a fixed share", "arXiv:2312.08977", in_order=True)
def coma(parts: Sequence[Part], weights: Sequence[float], *, new: float = 0.4) -> Part:
    """avg_t = (1 - new) avg_{t-1} + new dW_t, in the order given (CoMA, Marouf et al. 2024)."""
    shares = [1.0]
    for _ in parts[1:]:
        shares = [s * (1 - new) for s in shares] + [new]
    return total(parts, [s * w for s, w in zip(shares, weights)])


# -- prune x signs x space -------------------------------------------------------------------------------


def _whole(t: Tensor, n: int) -> Tensor:
    return t


def _trimmed(density: float, trim: str, borders: Sequence[float] | None) -> Prune:
    """The largest entries of a module, or those above a border that holds for all modules."""
    if trim == "module":
        return lambda t, n: largest(t, density)
    if borders is None:
        raise RetainError(
            "trim: 'model' needs all modules at once: call the merger with states, not one part"
        )
    known = borders
    return lambda t, n: above(t, known[n])


def _pruned(
    parts: Sequence[Part], weights: Sequence[float], space: Space, prune: Prune, signs: Signs, lam: float
) -> Part:
    return scaled(in_space(parts, weights, space, lambda taus, w: blend(taus, w, prune, signs)), lam)


@register_merger("the largest entries of each, summed", "arXiv:2306.01708")
def magnitude_prune(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lam: float = 1.0,
    space: Space = "deltas",
    trim: Trim = "module",
    borders: Sequence[float] | None = None,
) -> Part:
    """lam sum_n w_n top(dW_n): the int(density * numel) largest entries of every module, or of the model (`trim`)."""
    return _pruned(parts, weights, space, _trimmed(density, trim, borders), "sum", lam)


@register_merger("the largest entries, one sign per entry, mean of those that agree", "arXiv:2306.01708")
def ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lam: float = 1.0,
    signs: Literal["total", "frequency"] = "total",
    space: Space = "deltas",
    trim: Trim = "module",
    borders: Sequence[float] | None = None,
) -> Part:
    """Trim, elect, disjoint mean (Yadav et al., NeurIPS 2023).

    The paper keeps the largest entries of the whole model (`trim: model`), PEFT and mergekit those of every module
    (the default). `borders` are found by the merger.

    PEFT elects before it weighs; here an adapter's weight counts in the election, and 0 is no vote. With
    equal positive weights both are the same.
    """
    return _pruned(parts, weights, space, _trimmed(density, trim, borders), signs, lam)


def _dare(
    parts: Sequence[Part],
    weights: Sequence[float],
    density: float,
    lam: float,
    seed: int,
    space: Space,
    signs: Signs,
) -> Part:
    rngs = generators(parts, seed)
    return _pruned(parts, weights, space, lambda t, n: random(t, density, rngs[n]), signs, lam)


@register_merger("random entries, rescaled, summed", "arXiv:2311.03099")
def dare(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lam: float = 1.0,
    seed: int = 0,
    space: Space = "deltas",
) -> Part:
    """lam sum_n w_n m_n dW_n / density, m_n ~ Bernoulli(density) (Yu et al., ICML 2024); density = 1 - p."""
    return _dare(parts, weights, density, lam, seed, space, "sum")


@register_merger("random entries, rescaled, one sign per entry", "arXiv:2311.03099")
def dare_ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lam: float = 1.0,
    signs: Literal["total", "frequency"] = "total",
    seed: int = 0,
    space: Space = "deltas",
) -> Part:
    """DARE's pruning, TIES' election and disjoint mean."""
    return _dare(parts, weights, density, lam, seed, space, signs)


@register_merger("entries drawn by rank, rescaled, one sign per entry", "arXiv:2406.11617")
def della(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.7,
    window: float = 0.14,
    lam: float = 1.1,
    signs: Signs = "total",
    seed: int = 0,
    space: Space = "deltas",
) -> Part:
    """DELLA (Deep et al. 2024): in each row larger entries are likelier to stay; then TIES (`signs: sum` for none).

    Defaults are the authors' README's: drop 0.3, window 0.14, lam 1.1. Near density 0 and 1 the window
    narrows, where the released code stops with an error.
    """
    rngs = generators(parts, seed)
    return _pruned(parts, weights, space, lambda t, n: by_rank(t, density, window, rngs[n]), signs, lam)


@register_merger("TIES on coordinates in a basis that all share", "arXiv:2410.19735", space="knots")
def knots_ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lam: float = 0.6,
    signs: Literal["total", "frequency"] = "total",
    trim: Trim = "module",
    borders: Sequence[float] | None = None,
) -> Part:
    """KnOTS (Stoica et al., ICLR 2025) with TIES, defaults of the release's configs. The result has rank N r.

    The release trims over all layers at once (`trim: model`); the default is per module.
    """
    return _pruned(parts, weights, "knots", _trimmed(density, trim, borders), signs, lam)


@register_merger("DARE-TIES on coordinates in a basis that all share", "arXiv:2410.19735")
def knots_dare_ties(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.9,
    lam: float = 0.7,
    signs: Literal["total", "frequency"] = "total",
    seed: int = 0,
) -> Part:
    """KnOTS with DARE-TIES, defaults of the release's configs (p = 0.1, nothing trimmed)."""
    return _dare(parts, weights, density, lam, seed, "knots", signs)


# -- competition of parameters ---------------------------------------------------------------------------


def _unit(t: Tensor) -> Tensor:
    """Min-max to [0, 1]; a constant becomes 0."""
    low, high = t.min(), t.max()
    return (t - low) / (high - low) if high > low else torch.zeros_like(t)


@register_merger("entries weigh by their size and their agreement", "arXiv:2410.02396")
def pcb(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    ratio: float = 0.1,
    lam: float = 1.2,
    clip: float = 1e-4,
    space: Space = "deltas",
) -> Part:
    """PCB-Merging (Du et al., NeurIPS 2024), as released:

        intra = exp(N unit(|tau_n| clipped to its [clip, 1 - clip] quantiles)^2),  inter = tanh(tau_n sum_m tau_m)
        s_n   = unit(intra inter, floored at its (1 - ratio) quantile)
        tau   = lam sum_n w_n s_n tau_n / sum_n s_n

    Differs: per module, the release flattens the whole model. The paper writes softmax instead (not
    verified). tanh makes it depend on the scale of the changes.
    """

    def balance(taus: list[Tensor], w: Sequence[float]) -> Tensor:
        together = sum(taus[1:], taus[0].clone())
        top, below = torch.zeros_like(together), torch.zeros_like(together)
        for tau, weight in zip(taus, w):
            s = _competition(tau, together, len(taus), ratio, clip)
            top.addcmul_(tau, s, value=weight)
            below += s
        return top.div_(below.clamp_(min=1e-12))

    return scaled(in_space(parts, weights, space, balance), lam)


def _competition(tau: Tensor, together: Tensor, N: int, ratio: float, clip: float) -> Tensor:
    size, n = tau.abs(), tau.numel()
    low, high = (nth_smallest(size, min(n - 1, int(q * n))) for q in (clip, 1 - clip))
    s = _unit(size.clamp_(low, high)).square_().mul_(N).exp_().mul_((tau * together).tanh_())
    return _unit(s.clamp_(min=nth_smallest(s, min(n - 1, int((1 - ratio) * n)))))


# -- CoPA ------------------------------------------------------------------------------------------------


@register_merger("pruned factors, tail directions raised, normalised across adapters", "arXiv:2502.17159")
def copa(
    parts: Sequence[Part],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    lam: float = 2.0,
    form: Literal["sum", "product"] = "sum",
    floor: float = 0.0,
    scale: bool = True,
    normalise: bool = True,
) -> Part:
    """CoPA-Merging = DIR-Merging = RobustMerge (Zeng et al., NeurIPS 2025), per module and rank slot i:

        A~, B~ = top(A, density), top(B, density)              entry by entry, over each whole matrix
        S_i    = sum_j |A_ij| / sum_j |A~_ij|                  from A alone, applied to B's columns
        S~_i^n = S_i^n / sum_m S_i^m
        sum       dW = lam sum_n w_n B~_n diag(S~^n) A~_n                        (eq. 5 and algorithm 1; exact)
        product   B = lam sum_n w_n B~_n diag(S~^n),  A = lam sum_n A~_n         (as released: cross terms, lam twice)

    `floor: 0.8` lifts every S to its adapter's own 80th percentile, as released and not in the paper. A row
    of A that was pruned whole has S = 0, where the formula divides by zero. Slots that a smaller adapter
    lacks have S = 0 too. Dense changes (projector, biases) are averaged, as released. Without `scale` S is 1,
    without `normalise` S~ is S (the paper's ablation). The release keeps one entry more of each matrix.
    """
    low = [p for p in parts if isinstance(p, Low)]
    if len(low) < len(parts):
        if low:
            raise RetainError("copa needs factors, but one adapter has a dense change here (DoRA?)")
        if not sum(weights):
            raise RetainError(f"copa averages dense changes: the weights {list(weights)} may not sum to 0")
        return total(parts, [w / sum(weights) for w in weights])
    R = max(p.rank for p in low)
    A = [_grown(largest(p.A, density), R, 0) for p in low]
    B = [_grown(largest(p.B, density), R, 1) for p in low]
    S = [_grown(mass_ratio(p.A, a[: p.rank], floor, scale), R, 0) for p, a in zip(low, A)]
    if normalise:
        whole = sum(S[1:], S[0].clone())
        S = [torch.where(whole > 0, s / whole.clamp(min=1e-30), 0.0) for s in S]
    B = [b * s for b, s in zip(B, S)]
    if form == "sum":
        return scaled(total([Low(b, a) for b, a in zip(B, A)], weights), lam)
    return Low(
        lam * sum((w * b for w, b in zip(weights[1:], B[1:])), weights[0] * B[0]), lam * sum(A[1:], A[0])
    )


def mass_ratio(A: Tensor, pruned: Tensor, floor: float = 0.0, scale: bool = True) -> Tensor:
    """S (R,): a row's absolute sum before and after pruning; 0 where nothing is left."""
    left = pruned.abs().sum(1)
    S = A.abs().sum(1) / left.clamp(min=1e-30) if scale else torch.ones_like(left)
    alive = left > 0
    if floor and alive.any():
        n = int(alive.sum())
        S = S.clamp(min=nth_smallest(S[alive], min(n - 1, int(floor * n))))
    return torch.where(alive, S, 0.0)


def _grown(t: Tensor, n: int, dim: int) -> Tensor:
    lack = n - t.shape[dim]
    if not lack:
        return t
    size = list(t.shape)
    size[dim] = lack
    return torch.cat([t, t.new_zeros(size)], dim)


# -- Fisher ----------------------------------------------------------------------------------------------


@register_merger(
    "entries weigh by their Fisher information", "arXiv:2111.09832", normalised=True, per_module=("fishers",)
)
def fisher(
    parts: Sequence[Part], weights: Sequence[float], *, fishers: Sequence[Part] = (), lam: float = 1.0
) -> Part:
    """lam sum_n w_n F_n theta_n / sum_n w_n F_n (Matena and Raffel 2022; CoFiMA, Marouf et al. 2024).

    `fishers` are states like the adapters', one each: of the factors (then A and B are averaged on their own)
    or, as `path.weight`, of the dense change. Where every F is 0 it is the mean by weights.
    """
    if all(isinstance(f, Low) for f in fishers) and all(isinstance(p, Low) for p in parts):
        A = _precise([p.A for p in parts], weights, [f.A for f in fishers])  # type: ignore[union-attr]
        return Low(_precise([p.B for p in parts], weights, [f.B for f in fishers]) * lam, A)  # type: ignore[union-attr]
    return scaled(_precise([dense(p) for p in parts], weights, [dense(f) for f in fishers]), lam)


def _precise(thetas: Sequence[Tensor], weights: Sequence[float], F: Sequence[Tensor]) -> Tensor:
    top, below, plain = (torch.zeros_like(thetas[0]) for _ in range(3))
    for theta, w, f in zip(thetas, weights, F):
        top += w * f * theta
        below += w * f
        plain += w * theta
    return torch.where(below > 0, top / below.clamp(min=1e-30), plain)
