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
0.01 and fallback 0.001, so both are tuned constants. How the paper justifies the 1 in (L' + 1), and in
which variant the published numbers were made, could not be verified.

**Reach.** The way that `official` asks of the average in a step is alpha ||d|| = kappa (1 + ||g||) / ||dg||:
absolute, whatever the way of the weights. Over T steps that is a share

    R = T kappa (1 + ||g||) / ||dg|| / ||theta_T - theta_0||

of the way which the weights went. With R far above 1 the average is the weights, with R below 1 it ends
about that share of the way. R falls with the tensor's size and with the number of steps: kappa = 2 gives
0.2 to 0.6 at 7B, and 9 to 150 on the pocket. Every task logs R, the share that was gone and a sentence
(`rates_of_task`); large tensors are measured by 4,093 of their entries, so theta_0 costs no copy. In `paper`
the ratio weighs the old average, so R says nothing there, and `bounded` has no such sums: they log the share.

**Ours: `scale: means`** makes the rate independent of tensor size. A tensor of n entries with means m(.) of
its absolute entries has sums n m(.); at the released size N = 128 x 4,096 = 524,288 (LoRA of rank 128 on
LLaVA-1.5-7B's hidden size; eleven of a layer's fourteen LoRA tensors) it would have N m(.), hence

    alpha = kappa (1 + N m(g)) / (N m(d) N m(dg))        beta = kappa (1 + N m(g)) N m(dtheta) / (N m(d) N m(dg))

that is every sum times N / n, which is 1 at n = N: the released rule at the released size, by the same
arithmetic; elsewhere the rate that such a tensor would have had there. A tensor and its tiling have one rate.
`bounded` is a quotient of sums over the same entries and needs no such thing. `per: layer` or `adapter` adds
the sums up over the tensors of a layer or of an adapter (what lies outside the layers, such as the
projector, is a group of its own in `layer`), which then share a rate; n is then the entries of all of them.

Differs from the released code besides: E in fp32 (theirs in bf16, where a step of 1 % is mostly below what
eight bits resolve, so that the average stands still; `shadow: bf16` has that arithmetic); the gradients here
are clipped where `optim.max_grad_norm` is set, and the release clips nothing, so with clipping ||g|| and
||dg|| are smaller, and R larger, than they would be there; a missing gradient is an error or a counted skip
(there a bare `except` turns it into a fixed average in silence); rates and fallbacks are logged. The previous
gradient is a copy of its own (one pass over the bytes), and no tensor waits for the host.

In a stack it follows the projected weights (`gpm`), and its average is in place before others read or merge the final
weights (`retain.order`).
"""

# K tensors

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from retain.method import FULL_GRADS, FULL_PARAMS, Context, Method, register
from retain.methods._llaca import Five, as_released, distances, entries, pooled, sampled, sums, towards
from retain.methods._parts import as_shadow
from retain.types import RetainError
from retain.values import LATER

# -- the maths: sums over each tensor in, the weight of the new weights out -------------------------------

Rates = tuple[Tensor, Tensor]  # alpha_K, and whether it is the fallback


def asked(sums_SK: Tensor, kappa: float) -> Tensor:
    """What the official rule asks for, in (0, 1) or not: kappa (1 + ||g||) / (||d|| ||dg||), (K,)."""
    drift, grad, change = sums_SK
    alpha_K: Tensor = kappa * (1 + grad) / (drift * change)
    return alpha_K


def official_rates(sums_SK: Tensor, kappa: float, fallback: float) -> Rates:
    """Rows ||d||, ||g||, ||dg||. alpha = kappa (1 + ||g||) / (||d|| ||dg||) weighs the new weights."""
    return _within(asked(sums_SK, kappa), fallback)


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


# -- the method ------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """Where the three differ."""

    rates: Callable[[Tensor, float, float], Rates]
    kappa: float
    before_step: bool  # updates in `grads`, where the gradient belongs to the weights; else in `after_step`
    moves: bool  # needs the previous weights
    inner: bool  # inner products instead of L1 norms
    first_task: bool
    reaches: bool  # its ratio, times the drift, is the way that the average is asked to go


VARIANTS = {
    "official": Variant(
        official_rates, 2.0, before_step=False, moves=False, inner=False, first_task=False, reaches=True
    ),
    "paper": Variant(
        paper_rates, 1.0, before_step=True, moves=True, inner=False, first_task=True, reaches=False
    ),
    "bounded": Variant(
        bounded_rates, 1.0, before_step=True, moves=True, inner=True, first_task=True, reaches=False
    ),
}
SHADOWS = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHOICES = {
    "variant": (*VARIANTS,), "scale": ("sums", "means"), "per": ("tensor", "layer", "adapter"), "shadow": (*SHADOWS,),
}  # fmt: skip
ROWS = 5  # of the tally


@register
@dataclass
class Llaca(Method):
    """The adaptive average. `kappa`, `first_task` None: the variant's own; `fallback`: weight of the new.

    `scale`, `per`, `shadow` as above; the defaults are the release's, but for the fp32 average.
    """

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
    scale: str = field(default="sums", metadata=LATER)  # or means: a rate that does not depend on size
    per: str = field(
        default="tensor", metadata=LATER
    )  # which tensors share a rate: one, a layer's, an adapter's
    shadow: str = field(default="fp32", metadata=LATER)  # of the average; bf16 as released

    trained: list[str] = field(init=False, default_factory=list)  # adapters of earlier tasks
    average: dict[str, Tensor] = field(init=False, default_factory=dict)
    last_grad: dict[str, Tensor] = field(init=False, default_factory=dict)
    last_theta: dict[str, Tensor] = field(init=False, default_factory=dict)
    start: dict[str, Tensor] = field(init=False, default_factory=dict)  # theta_0, of large tensors a sample
    # rows: updates, fallbacks, sum of rates, steps without a gradient, way that was asked for
    tally: Tensor = field(init=False, default_factory=lambda: torch.zeros(ROWS, 0))

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise RetainError(f"llaca.{name}: {getattr(self, name)!r} is none of {list(choices)}")
        if self.scale == "means" and VARIANTS[self.variant].inner:
            raise RetainError(
                f"llaca.scale: 'means' has no effect on variant {self.variant!r}, whose rate does not depend on tensor "
                "size; use 'sums'"
            )
        if self.kappa is not None and (isinstance(self.kappa, bool) or not self.kappa >= 0):
            raise RetainError(f"llaca.kappa: must be a number of 0 or more, not {self.kappa!r}")
        if self.first_task not in (None, True, False):
            raise RetainError(f"llaca.first_task: must be true or false, not {self.first_task!r}")
        if not 0 < self.fallback <= 1 or self.log_every < 1:
            told = f"{self.fallback} and {self.log_every}"
            raise RetainError(f"llaca: fallback in (0, 1] and log_every >= 1 are needed, not {told}")

    def begin_task(self, ctx: Context) -> None:
        self.average, self.last_grad, self.last_theta = {}, {}, {}
        averaged = self._averaged(ctx)
        self.start = {k: sampled(p) for k, p in averaged.items()}
        self.tally = torch.zeros(ROWS, len(averaged), device=ctx.model.device)

    def grads(self, ctx: Context) -> None:
        if VARIANTS[self.variant].before_step:
            self._update(ctx)

    def after_step(self, ctx: Context) -> None:
        if not VARIANTS[self.variant].before_step:
            self._update(ctx)

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        averaged = self._averaged(ctx)
        moved = {k: p for k, p in averaged.items() if k in self.average}  # no gradient: no average, no way
        way_K = distances(self.start, moved)
        for key, p in moved.items():
            if VARIANTS[self.variant].before_step:
                towards(self.average[key], p, self.fallback)
            p.copy_(self.average[key])
        self._log_task(ctx, list(averaged), list(moved), way_K, distances(self.start, moved))
        names = {key.split("/", 1)[0] for key in ctx.model.adapters.trainable()}
        self.trained = sorted({*self.trained, *names})
        self.average, self.last_grad, self.last_theta, self.start = {}, {}, {}, {}
        self.tally = torch.zeros(ROWS, 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Also the state of an earlier version, which called the average `shadow`, kept no start and measured no way.

        In the middle of a task the start is that of `begin_task`, which has run again; of this task no reach is told.
        """
        if "shadow" in state and "average" not in state:
            tally = state["tally"]
            unknown = tally.new_full((ROWS - len(tally), tally.shape[1]), math.nan)
            state = {k: v for k, v in state.items() if k != "shadow"} | {
                "average": state["shadow"], "start": self.start, "tally": torch.cat([tally, unknown]),
            }  # fmt: skip
        super().load_state_dict(state)

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
            Five(p.detach(), self.average[k], p.grad, self.last_grad[k], self.last_theta.get(k))
            for k, p in ready.items()
            if p.grad is not None  # always so here
        ]
        kappa = spec.kappa if self.kappa is None else self.kappa
        own_SK = sums(fives, spec.inner)
        sums_SK = self._shared(ctx, own_SK, ready)
        alpha_K, fell_K = spec.rates(sums_SK, kappa, self.fallback)
        for five, alpha in zip(fives, alpha_K.unbind(), strict=True):
            towards(five.average, five.theta, alpha)
        way_K = asked(sums_SK, kappa) * own_SK[0] if spec.reaches else torch.zeros_like(alpha_K)
        rows = [i for i, k in enumerate(keys) if k in ready]
        seen = [torch.ones_like(alpha_K), fell_K.float(), alpha_K, torch.zeros_like(alpha_K)]
        self.tally[:, rows] += torch.stack([*seen, way_K.nan_to_num(0.0, 0.0, 0.0)])
        if (ctx.step + 1) % self.log_every == 0:
            columns = {"rate": alpha_K, "fallback": fell_K.float()}
            ctx.log(
                kind="rates",
                step=ctx.step + 1,
                groups=self._by_kind(ctx, list(ready), columns),
                **self._who(ctx),
            )

    def _shared(self, ctx: Context, sums_SK: Tensor, ready: Mapping[str, Parameter]) -> Tensor:
        """The sums that the rates are made of: over a layer or an adapter where tensors share a rate, and rescaled."""
        groups = None
        if self.per != "tensor":
            groups = [_group(ctx, key, self.per) for key in ready]
            sums_SK = pooled(sums_SK, groups)
        if self.scale == "sums":
            return sums_SK
        return as_released(sums_SK, entries([p.numel() for p in ready.values()], groups))

    def _remember(self, live: Mapping[str, Parameter]) -> None:
        for key, p in live.items():
            if key not in self.average:
                self.average[key] = p.detach().to(SHADOWS[self.shadow], copy=True)
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
            for store in (self.average, self.last_grad, self.last_theta, self.start):
                store.update({k: t.to(device) for k, t in store.items()})

    # -- logging: one transfer for all tensors ------------------------------------------------------------

    def _who(self, ctx: Context) -> dict[str, object]:
        return {"method": "llaca", "variant": self.variant, "task": ctx.task.name}

    def _by_kind(
        self, ctx: Context, keys: list[str], columns: Mapping[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        """By kind of tensor, as `lora.lora_A`: smallest, median and largest rate, share of fallbacks, reach, share of
        the way that was gone."""
        kinds: dict[str, list[dict[str, float]]] = {}
        table = torch.stack(list(columns.values())).t().tolist()
        for key, row in zip(keys, table, strict=True):
            kind = f"{ctx.model.adapters.group(key)}.{key.rsplit('.', 1)[-1]}"
            kinds.setdefault(kind, []).append(dict(zip(columns, row, strict=True)))
        return {kind: self._told(rows) for kind, rows in kinds.items()}

    def _told(self, rows: list[dict[str, float]]) -> dict[str, float]:
        rates = sorted(row["rate"] for row in rows)
        share = sum(row["fallback"] for row in rows) / len(rows)
        told = {"min": rates[0], "median": rates[len(rates) // 2], "max": rates[-1], "fallback": share}
        return told | self._far(*(sum(row.get(k, 0.0) for row in rows) for k in ("asked", "way", "gone")))

    def _far(self, asked_for: float, way: float, gone: float) -> dict[str, float]:
        """Reach, where the variant has one, and the share of the way that was gone; without what is no number."""
        if not way:
            return {}
        shares = {"reach": asked_for / way, "gone": gone / way}
        known = {k: v for k, v in shares.items() if math.isfinite(v)}
        return {k: v for k, v in known.items() if k == "gone" or VARIANTS[self.variant].reaches}

    def _log_task(
        self, ctx: Context, keys: list[str], moved: list[str], way_K: Tensor, gone_K: Tensor
    ) -> None:
        """The mean rate of each tensor over the task and how far its average came, by kind and in all; steps that found
        no gradient, by tensor."""
        if not keys:
            ctx.log(kind="rates_of_task", groups={}, **self._who(ctx))
            return
        updates, fallbacks, rates, skipped, asked_K = self.tally
        n = updates.clamp(min=1)
        far = torch.zeros(2, len(keys), device=self.tally.device)
        far[:, [i for i, k in enumerate(keys) if k in moved]] = torch.stack([way_K, gone_K]).to(far)
        columns = {
            "rate": rates / n,
            "fallback": fallbacks / n,
            "asked": asked_K,
            "way": far[0],
            "gone": far[1],
        }
        groups = self._by_kind(ctx, keys, columns)
        total = torch.stack([asked_K.sum(), far[0].sum(), far[1].sum(), *skipped]).tolist()
        missing = {k: int(s) for k, s in zip(keys, total[3:], strict=True) if s}
        told: dict[str, Any] = dict(self._far(*total[:3]))
        if "gone" in told:
            kappa = VARIANTS[self.variant].kappa if self.kappa is None else self.kappa
            told["verdict"] = verdict(told["gone"], told.get("reach"), kappa)
        ctx.log(kind="rates_of_task", groups=groups, skipped=missing, **told, **self._who(ctx))


def verdict(gone: float, reach: float | None, kappa: float) -> str:
    """How far an average came, in a sentence, and what follows; `reach` None: the variant has none."""
    told = f"the average ended {100 * gone:.0f} % of the way that the weights went"
    told += "" if reach is None else f" (reach R = {reach:.2g})"
    if 0.1 < gone < 0.9:
        return told
    what = (
        "it is the weights, and keeps no more than they do" if gone >= 0.9 else "little of the task is in it"
    )
    if reach and kappa and (reach > 1 if gone >= 0.9 else reach < 0.5):
        return f"{told}: {what}; kappa near {kappa * 0.5 / reach:.2g} would give R = 0.5"
    return f"{told}: {what}"


def _group(ctx: Context, key: str, per: str) -> Hashable:
    """What a tensor shares its rate with: its adapter's tensors of its layer (or outside the layers), or all of them."""
    adapter, _, rest = key.partition("/")
    if per == "adapter":
        return adapter
    site = ctx.model.adapters.sites[rest.rpartition(".")[0]]
    return adapter, site.group if site.layer is None else site.layer
