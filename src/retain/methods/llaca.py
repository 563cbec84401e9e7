"""LLaCA: a moving average of the weights whose rate is worked out anew for every tensor at every step.

Qiao et al., "Large Continual Instruction Assistant", ICML 2025 (arXiv 2410.10868; v1: "LLaCA"). theta: raw
weights, trained as ever and never pulled back; E: their average, which takes their place when the task
ends; t: optimizer steps.

    E_t = beta E_{t-1} + (1 - beta) theta_t        beta = (L' + 1) / ((theta_t - E_{t-1}) L''), one per tensor

The derivation asks that the average loses nothing on the new batch while it does not move, by a
second-order expansion; L'' is a difference quotient of successive gradients and every quantity its L1 norm
over the tensor (||.||, drift d = theta - E, change dg = g - g_prev, move dtheta = theta - theta_prev). A
rate outside (0, 1) becomes 0.99 on the old.

Three variants, because the released code and the published formula disagree:

    official   alpha = kappa (1 + ||g||) / (||d|| ||dg||),  kappa = 2, weighs the NEW weights; g is from
               before the step; E is made after the first step; an adapter's first task has none.
    paper      beta = kappa (1 + ||g||) ||dtheta|| / (||d|| ||dg||),  kappa = 1, weighs the OLD average; E is
               made before the first step; every task has one.
    bounded    ours, not the paper's: beta = (g.d + kappa d.d) / (d.Hd + kappa d.d) from a quadratic stability
               term, d.Hd = d.d (dg.dtheta) / (dtheta.dtheta) along the last move; beta in (0, 1].

The paper wants L' at theta_t, a gradient that exists only after the next backward: `paper` and `bounded`
therefore update in `grads`, one step later than `official`, which updates in `after_step`; the very last
weights, which never see a gradient, join with the fallback. A later release by the authors has kappa =
0.01 and fallback 0.001, so both are tuned constants, and kappa's effect depends on tensor size and loss
scale: look at the logged rates. How the paper justifies the 1 in (L' + 1), and in which variant the
published numbers were made, could not be verified.

Differs from the released code besides: E in fp32 (theirs in bf16, where a 1 % step is often below
resolution); a missing gradient is an error or a counted skip (there a bare `except` turns it into a fixed
average in silence); rates and fallbacks are logged. The previous gradient is a copy of its own (one pass over the
bytes), and no tensor waits for the host.

In a stack it follows the projected weights (`gpm`), and its average is in place before others read or merge the final
weights (`retain.order`).
"""

# K tensors

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import sasum, sdot
from torch import Tensor
from torch.nn import Parameter

from retain.method import FULL_GRADS, FULL_PARAMS, Context, Method, register
from retain.methods._parts import as_shadow
from retain.types import RetainError

# -- the maths: sums over each tensor in, the weight of the new weights out -------------------------------

Rates = tuple[Tensor, Tensor]  # alpha_K, and whether it is the fallback


def official_rates(sums_SK: Tensor, kappa: float, fallback: float) -> Rates:
    """Rows ||d||, ||g||, ||dg||. alpha = kappa (1 + ||g||) / (||d|| ||dg||) weighs the new weights."""
    drift, grad, change = sums_SK
    return _within(kappa * (1 + grad) / (drift * change), fallback)


def paper_rates(sums_SK: Tensor, kappa: float, fallback: float) -> Rates:
    """Rows ||d||, ||g||, ||dg||, ||dtheta||. beta = kappa (1 + ||g||) ||dtheta|| / (||d|| ||dg||)."""
    drift, grad, change, move = sums_SK
    return _within(1 - kappa * (1 + grad) * move / (drift * change), fallback)


def bounded_rates(sums_SK: Tensor, kappa: float, fallback: float) -> Rates:
    """Rows d.d, g.d, dg.dtheta, dtheta.dtheta. beta = (g.d + kappa d.d) / (d.Hd + kappa d.d)."""
    dd, gd, dgdt, dtdt = sums_SK
    denominator = dd * dgdt / dtdt + kappa * dd
    beta = torch.where(denominator > 0, (gd + kappa * dd) / denominator, torch.nan)
    frozen = beta == 1  # the average may stand still: here the bound belongs to the range
    alpha, fell = _within(1 - beta, fallback)
    return torch.where(frozen, 0.0, alpha), fell & ~frozen


def _within(alpha: Tensor, fallback: float) -> Rates:
    """The fallback wherever alpha is not in (0, 1); inf and nan are not."""
    fell = ~((alpha > 0) & (alpha < 1))
    return torch.where(fell, fallback, alpha), fell


# -- the sums: few passes over the bytes, no copy of a gradient, no wait for the device ------------------

Row = NDArray[np.float32]
SERIAL = 1 << 15  # entries up to which torch works in one thread
CHUNK = 1 << 18  # entries worked on at a time on a CPU: the differences stay in the second-level cache
GROUP = 1 << 26  # entries worked on at a time on an accelerator: bounds the temporaries to three times 256 MB


class Five(NamedTuple):
    """What the sums of one tensor are taken over. `last_theta` is None where the variant has no move."""

    theta: Tensor
    average: Tensor
    grad: Tensor
    last_grad: Tensor
    last_theta: Tensor | None

    def on_cpu(self) -> bool:
        """Whether the BLAS of the CPU can read every tensor in place."""
        here = [t for t in self if t is not None]
        return all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in here)


def sums(fives: Sequence[Five], inner: bool) -> Tensor:
    """The rows that the rates are made of, (S, K) fp32: L1 norms, or inner products (`inner`)."""
    if all(f.on_cpu() for f in fives):
        scratch = _scratch(min(CHUNK, max(f.theta.numel() for f in fives)))
        return torch.tensor([_cpu_sums(f, inner, scratch) for f in fives]).t()
    return torch.cat([_foreach_sums(group, inner) for group in _grouped(fives)], dim=1)


def _scratch(n: int) -> tuple[Row, Row]:
    """Two rows of torch's memory, which begins at a multiple of 64 bytes, as gradients do.

    The last bits of `sasum` depend on where a row begins, and numpy's memory begins anywhere: two runs, or a run and
    its continuation, would differ.
    """
    return torch.empty(n, dtype=torch.float32).numpy(), torch.empty(n, dtype=torch.float32).numpy()


def _cpu_sums(five: Five, inner: bool, scratch: tuple[Row, Row]) -> list[float]:
    """One tensor, chunk after chunk, so that a difference is summed while in the cache; fp64 across."""
    flat = [None if t is None else t.numpy().reshape(-1) for t in five]
    n = five.theta.numel()
    if n <= CHUNK:
        return _chunk_sums(flat, inner, scratch)
    starts = range(0, n, CHUNK)
    rows = [_chunk_sums([a if a is None else a[i : i + CHUNK] for a in flat], inner, scratch) for i in starts]
    return [sum(column) for column in zip(*rows, strict=True)]


def _chunk_sums(five: Sequence[Row | None], inner: bool, scratch: tuple[Row, Row]) -> list[float]:
    theta, average, grad, last_grad, last_theta = five
    assert theta is not None and average is not None and grad is not None and last_grad is not None
    one, two = (row[: len(theta)] for row in scratch)
    d = _minus(theta, average, one)
    head = [sdot(d, d), sdot(grad, d)] if inner else [sasum(d), sasum(grad)]
    dg = _minus(grad, last_grad, two)
    if last_theta is None:
        return [*head, sasum(dg)]
    dtheta = _minus(theta, last_theta, one)
    return [*head, sdot(dg, dtheta), sdot(dtheta, dtheta)] if inner else [*head, sasum(dg), sasum(dtheta)]


def _minus(a: Row, b: Row, out: Row) -> Row:
    """a - b: by numpy where torch would use one thread too and its calls cost more than the work."""
    if len(a) <= SERIAL:
        return np.subtract(a, b, out)
    torch.sub(torch.from_numpy(a), torch.from_numpy(b), out=torch.from_numpy(out))
    return out


def _grouped(fives: Sequence[Five]) -> list[list[Five]]:
    groups: list[list[Five]] = [[]]
    room = GROUP
    for five in fives:
        if groups[-1] and five.theta.numel() > room:
            groups.append([])
            room = GROUP
        groups[-1].append(five)
        room -= five.theta.numel()
    return groups


def _foreach_sums(fives: Sequence[Five], inner: bool) -> Tensor:
    """The same for any device and type, with fused kernels over the list."""
    theta, average = [f.theta.float() for f in fives], [f.average for f in fives]
    grad, last_grad = [f.grad.float() for f in fives], [f.last_grad.float() for f in fives]
    last_theta = [f.last_theta for f in fives if f.last_theta is not None]
    d, dg = list(torch._foreach_sub(theta, average)), list(torch._foreach_sub(grad, last_grad))
    dtheta = list(torch._foreach_sub(theta, last_theta)) if last_theta else []
    if inner:
        pairs = [(d, d), (grad, d), (dg, dtheta), (dtheta, dtheta)]
        return torch.stack([torch.stack([x.sum() for x in torch._foreach_mul(a, b)]) for a, b in pairs])
    return torch.stack([torch.stack(torch._foreach_norm(x, 1)) for x in (d, grad, dg, dtheta) if x])


# -- the method ------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """Where the three differ."""

    rates: Callable[[Tensor, float, float], Rates]
    kappa: float
    before_step: bool  # updates in `grads`, where the gradient belongs to the weights; else in `after_step`
    moves: bool  # needs the previous weights
    inner: bool  # inner products instead of L1 norms
    first_task: bool


VARIANTS = {
    "official": Variant(official_rates, 2.0, before_step=False, moves=False, inner=False, first_task=False),
    "paper": Variant(paper_rates, 1.0, before_step=True, moves=True, inner=False, first_task=True),
    "bounded": Variant(bounded_rates, 1.0, before_step=True, moves=True, inner=True, first_task=True),
}


@register
@dataclass
class Llaca(Method):
    """The adaptive average. `kappa`, `first_task` None: the variant's own; `fallback`: weight of the new."""

    name: ClassVar[str] = "llaca"
    about: ClassVar[str] = "an average of the weights with a rate per tensor and step"
    source: ClassVar[str] = "arXiv:2410.10868"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_GRADS, FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"grads": "reads", "after_step": "reads", "end_task": "settles"}

    variant: str = "official"
    kappa: float | None = None
    fallback: float = 0.01
    first_task: bool | None = None  # average also while an adapter is trained for the first time
    log_every: int = 10

    trained: list[str] = field(init=False, default_factory=list)  # adapters of earlier tasks
    shadow: dict[str, Tensor] = field(init=False, default_factory=dict)
    last_grad: dict[str, Tensor] = field(init=False, default_factory=dict)
    last_theta: dict[str, Tensor] = field(init=False, default_factory=dict)
    # rows: updates, fallbacks, sum of rates, steps without a gradient
    tally: Tensor = field(init=False, default_factory=lambda: torch.zeros(4, 0))

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise RetainError(f"llaca.variant: {self.variant!r} is none of {list(VARIANTS)}")
        if self.kappa is not None and (isinstance(self.kappa, bool) or not self.kappa >= 0):
            raise RetainError(f"llaca.kappa: must be a number of 0 or more, not {self.kappa!r}")
        if self.first_task not in (None, True, False):
            raise RetainError(f"llaca.first_task: must be true or false, not {self.first_task!r}")
        if not 0 < self.fallback <= 1 or self.log_every < 1:
            told = f"{self.fallback} and {self.log_every}"
            raise RetainError(f"llaca: fallback in (0, 1] and log_every >= 1 are needed, not {told}")

    def begin_task(self, ctx: Context) -> None:
        self.shadow, self.last_grad, self.last_theta = {}, {}, {}
        self.tally = torch.zeros(4, len(self._averaged(ctx)), device=ctx.model.device)

    def grads(self, ctx: Context) -> None:
        if VARIANTS[self.variant].before_step:
            self._update(ctx)

    def after_step(self, ctx: Context) -> None:
        if not VARIANTS[self.variant].before_step:
            self._update(ctx)

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        for key, p in self._averaged(ctx).items():
            if key in self.shadow:  # a tensor that never had a gradient never moved
                if VARIANTS[self.variant].before_step:
                    self.shadow[key].lerp_(p.float(), self.fallback)
                p.copy_(self.shadow[key])
        self._log_task(ctx)
        names = {key.split("/", 1)[0] for key in ctx.model.adapters.trainable()}
        self.trained = sorted({*self.trained, *names})
        self.shadow, self.last_grad, self.last_theta = {}, {}, {}
        self.tally = torch.zeros(4, 0)

    def _averaged(self, ctx: Context) -> dict[str, Parameter]:
        """The trainable tensors that have an average in this task."""
        first = VARIANTS[self.variant].first_task if self.first_task is None else self.first_task
        live = ctx.model.adapters.trainable()
        return {k: p for k, p in live.items() if first or k.split("/", 1)[0] in self.trained}

    @torch.no_grad()
    def _update(self, ctx: Context) -> None:
        """Average every tensor that has a gradient now and had one before; remember this step."""
        averaged = self._averaged(ctx)
        if not averaged:
            return
        self._to(ctx.model.device)
        live = {k: p for k, p in averaged.items() if p.grad is not None}
        if not live:
            raise RetainError(
                f"llaca: no tensor has a gradient at step {ctx.step} of task {ctx.task.name!r}; "
                f"the engine frees gradients, or another part of the stack clears them"
            )
        ready = {k: p for k, p in live.items() if k in self.last_grad}
        if ready:
            self._average(ctx, list(averaged), ready)
        self._remember(live)
        self.tally[3] += torch.tensor([float(k not in live) for k in averaged], device=self.tally.device)

    def _average(self, ctx: Context, keys: list[str], ready: Mapping[str, Parameter]) -> None:
        spec = VARIANTS[self.variant]
        fives = [
            Five(p.detach(), self.shadow[k], p.grad, self.last_grad[k], self.last_theta.get(k))
            for k, p in ready.items()
            if p.grad is not None  # always so here
        ]
        kappa = spec.kappa if self.kappa is None else self.kappa
        alpha_K, fell_K = spec.rates(sums(fives, spec.inner), kappa, self.fallback)
        for five, alpha in zip(fives, alpha_K.unbind(), strict=True):
            five.average.lerp_(five.theta.float(), alpha)
        rows = [i for i, k in enumerate(keys) if k in ready]
        self.tally[:3, rows] += torch.stack([torch.ones_like(alpha_K), fell_K.float(), alpha_K])
        if (ctx.step + 1) % self.log_every == 0:
            self._log(ctx, list(ready), alpha_K, fell_K.float(), kind="rates", step=ctx.step + 1)

    def _remember(self, live: Mapping[str, Parameter]) -> None:
        for key, p in live.items():
            if key not in self.shadow:
                self.shadow[key] = as_shadow(p)
            assert p.grad is not None
            # a copy, in the old one's place: another part may write into .grad, and the memory is the same
            last = self.last_grad.get(key)
            self.last_grad[key] = p.grad.clone() if last is None else last.copy_(p.grad)
            if VARIANTS[self.variant].moves:
                kept = self.last_theta.get(key)
                self.last_theta[key] = as_shadow(p) if kept is None else kept.copy_(p)

    def _to(self, device: torch.device) -> None:
        """A restored state lies on the CPU; bring it to the model once."""
        if self.tally.device != device:
            self.tally = self.tally.to(device)
            for store in (self.shadow, self.last_grad, self.last_theta):
                store.update({k: t.to(device) for k, t in store.items()})

    # -- logging: one transfer for all tensors ------------------------------------------------------------

    def _log(self, ctx: Context, keys: list[str], rate_K: Tensor, fell_K: Tensor, **about: object) -> None:
        """Rates by kind of tensor, as `lora.lora_A`: smallest, median, largest, share of fallbacks."""
        bank, groups = ctx.model.adapters, dict[str, list[tuple[float, float]]]()
        for key, rate, fell in zip(keys, *torch.stack([rate_K, fell_K]).tolist(), strict=True):
            groups.setdefault(f"{bank.group(key)}.{key.rsplit('.', 1)[-1]}", []).append((rate, fell))
        table = {}
        for group, pairs in groups.items():
            rates = sorted(r for r, _ in pairs)
            share = sum(f for _, f in pairs) / len(pairs)
            middle = rates[len(rates) // 2]
            table[group] = {"min": rates[0], "median": middle, "max": rates[-1], "fallback": share}
        ctx.log(method="llaca", variant=self.variant, task=ctx.task.name, groups=table, **about)

    def _log_task(self, ctx: Context) -> None:
        """The mean rate of each tensor over the task, by kind; steps that found no gradient, by tensor."""
        keys = list(self._averaged(ctx))
        if not keys:
            ctx.log(kind="rates_of_task", method="llaca", variant=self.variant, task=ctx.task.name, groups={})
            return
        updates, fallbacks, rates, skipped = self.tally
        n = updates.clamp(min=1)
        missing = {k: int(s) for k, s in zip(keys, skipped.tolist(), strict=True) if s}
        self._log(ctx, keys, rates / n, fallbacks / n, kind="rates_of_task", skipped=missing)
