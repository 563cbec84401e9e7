"""What each method promises about a task, as small checks that run beside any stack: GUARANTEES, by method.

A check is made from the part and the watch (`Watch`, the last part of the stack, which adds nothing). It sees the end
of every hook, works out on its own what must hold there, and raises AssertionError. A new method joins with one class.
"""

# R rows, O out, I in, K directions

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from retain.adapters.lora import LoraLinear
from retain.method import Context, Method
from retain.methods.modal_prompt import prototype
from retain.types import Batch, Examples, Output

State = dict[str, Tensor]


def drawn(ctx: Context, who: str, n: int) -> list[int]:
    """The samples that a part draws."""
    return torch.randperm(len(ctx.task.train), generator=ctx.rng(who))[:n].tolist()


def near(a: Tensor, b: Tensor, rel: float, at: str) -> None:
    """|a - b| is at most `rel` of the size of b, with room for rounding where b is tiny."""
    off = float((a - b).norm())
    assert off <= rel * float(b.norm()) + 1e-6, f"{at}: off by {off} of {float(b.norm())}"


class Guarantee:
    """One part's promise in one run. `w.start`: the trained tensors when the task began; `w.settled`: before merges."""

    def __init__(self, part: Any, w: Watch) -> None:
        self.part, self.w = part, w

    def begin(self, ctx: Context) -> None: ...
    def data(self, ctx: Context, examples: Examples) -> None: ...
    def step(self, ctx: Context) -> None: ...
    def settle(self, ctx: Context) -> State | None:
        """At the end of a task: what this part has made of the weights of the last step; None: nothing."""

    def end(self, ctx: Context) -> None: ...


class Gpm(Guarantee):
    """No change of the task lies in protected directions, at any step or at the end; the memory is of the final inputs."""

    def _bases(self, keys: list[str]) -> dict[str, Tensor]:
        found = {}
        for key in keys:
            site, kind = key.rsplit(".", 1)
            name = key if kind == "lora_B" else site
            if name in self.part.memory:
                found[key] = torch.ones(1, 1) if kind == "bias" else self.part.memory[name]
        return found

    def begin(self, ctx: Context) -> None:
        self.bases = {k: M.clone() for k, M in self._bases(list(self.w.start)).items()}

    def step(self, ctx: Context) -> None:
        for key, M_IK in self.bases.items():
            C = (self.w.now(key) - self.w.start[key]).reshape(-1, len(M_IK))
            along = float((C @ M_IK).norm())
            assert along <= 1e-4 * float(C.norm()) + 1e-6, f"{key}: {along} of {float(C.norm())} is protected"

    def end(self, ctx: Context) -> None:
        self.step(ctx)
        if self.w.has("derives"):
            return
        inputs = self.w.inputs(
            ctx, drawn(ctx, "gpm", self.part.n_samples)
        )  # at the final weights, every token
        for key in self.w.start:
            site, kind = key.rsplit(".", 1)
            rows = inputs[site.split("/", 1)[1]]
            for name, X in (
                (site, rows),
                (f"{site}.lora_B", rows @ self.w.now(key).mT if kind == "lora_A" else None),
            ):
                if X is not None:
                    M = self.part.memory[name]
                    assert (X @ M).square().sum() >= (self.part.threshold - 1e-4) * X.square().sum(), name


class Ewc(Guarantee):
    """Springs rest at the weights that the task leaves and the next one starts from; Fisher information is theirs."""

    last: ClassVar[set[str]] = set()

    def begin(self, ctx: Context) -> None:
        for key in self.last & set(self.w.start):
            assert torch.equal(self.part.anchor[key], self.w.start[key]), f"{key}: the anchor is elsewhere"

    def end(self, ctx: Context) -> None:
        self.last = set(self.w.start)
        for key in self.w.start:
            assert torch.equal(self.part.anchor[key], self.w.now(key)), f"{key}: the anchor is elsewhere"
        if self.w.has("derives"):
            return
        want = self.w.fisher(ctx, [[i] for i in drawn(ctx, "ewc", self.part.n_samples)])
        for key, F in want.items():
            near(self.part.fisher[key], F, 1e-3, f"Fisher of {key}")


class Average(Guarantee):
    """The final weights are the average of the path that was gone."""

    def begin(self, ctx: Context) -> None:
        self.mean = {k: t.double() for k, t in self.w.start.items()}

    def step(self, ctx: Context) -> None:
        for key, mean in self.mean.items():
            self.mean[key] = self.part.beta * mean + (1 - self.part.beta) * self.w.now(key).double()

    def settle(self, ctx: Context) -> State | None:
        return {k: t.float() for k, t in self.mean.items()}


class Between(Guarantee):
    """The final weights of what an earlier task trained are half way from the start to the end of the path."""

    def begin(self, ctx: Context) -> None:
        self.old = {name for names in self.part.trained.values() for name in names}

    def settle(self, ctx: Context) -> State | None:
        was = self.w.start
        new = {k: self.w.now(k) for k in was}
        return {k: (was[k] + t) / 2 if k.split("/", 1)[0] in self.old else t for k, t in new.items()}


class Adaptive(Guarantee):
    """The average moves along the way to the weights, no further; the kept gradient is this step's; it ends in place."""

    def begin(self, ctx: Context) -> None:
        self.E: State = {}

    def step(self, ctx: Context) -> None:
        for key, grad in self.part.last_grad.items():
            assert torch.equal(grad, self.w.seen_grads[key]), (
                f"{key}: the kept gradient is not the one that was there"
            )
        for key, E in self.part.average.items():
            if key in self.E and self.part.variant == "official":
                d, move = self.w.now(key) - self.E[key], E - self.E[key]
                alpha = float((d * move).sum() / (d * d).sum().clamp(min=1e-30))
                assert -1e-5 <= alpha <= 1 + 1e-5
                near(self.E[key] + alpha * d, E, 1e-5, f"average of {key}")
            self.E[key] = E.clone()

    def settle(self, ctx: Context) -> State | None:
        late = self.part.variant != "official"
        return {
            k: torch.lerp(E, self.w.last[k], self.part.fallback) if late else E for k, E in self.E.items()
        }


class Lwf(Guarantee):
    """What is distilled from is the model as it answered these samples before the task."""

    old: tuple[Batch, Output] | None = None

    def begin(self, ctx: Context) -> None:
        if ctx.seen:
            self.step(ctx)

    def step(self, ctx: Context) -> None:
        if self.old is not None:
            training = ctx.model.training
            assert abs(float(self.part.loss(ctx, *self.old))) < 1e-6 * self.part.temperature**2
            ctx.model.train(training)

    def end(self, ctx: Context) -> None:
        later = [t for t in ctx.stream if t.name not in (*ctx.seen, ctx.task.name)]
        self.old = self.w.answered(ctx, later[0]) if later else None
        assert not [n for n in ctx.model.adapters.names if n.startswith("lwf-")]


class Replayed(Guarantee):
    """Every new example once, beside old ones that were met; the buffer is as large as it may be."""

    met: ClassVar[frozenset[str]] = frozenset()

    def data(self, ctx: Context, examples: Examples) -> None:
        n, ids = len(ctx.task.train), [e.id for e in examples]
        assert ids[:n] == [e.id for e in ctx.task.train] and set(ids[n:]) <= self.met
        assert len(ids) - n == len(self.part.buffer)

    def end(self, ctx: Context) -> None:
        self.met = self.met | {e.id for e in ctx.task.train}
        assert self.part.n_met == len(self.met) and len(self.part.buffer) == min(
            self.part.size, len(self.met)
        )


class Merged(Guarantee):
    """What the next task starts from is half before and half after: of each change, in its best rank."""

    def end(self, ctx: Context) -> None:
        for name in self.w.learned:
            for key, before in self.w.changes(self.w.start, name).items():
                want = (before + self.w.changes(self.w.settled, name)[key]) / 2
                if key.endswith("weight B A"):
                    U, S, V = torch.linalg.svd(want.double(), full_matrices=False)
                    want = ((U[:, :2] * S[:2]) @ V[:2]).float()
                near(self.w.changes(self.w.live(ctx), name)[key], want, 1e-4, key)


class Cofima(Guarantee):
    """Every entry is the mean of before and after, weighed by the Fisher information of the settled weights."""

    def begin(self, ctx: Context) -> None:
        self.F_old = {k: F.clone() for k, F in self.part.fisher.items()}

    def end(self, ctx: Context) -> None:
        if self.w.has(
            "derives"
        ):  # another mix is on by now; such adapters are new in each task, so nothing is merged
            return
        (name,) = {k.split("/", 1)[0] for k in self.w.start}
        key = next(k for k in self.w.start if k.endswith("projector.weight"))
        short = key.split("/", 1)[1]
        rows = torch.randperm(len(ctx.task.train), generator=ctx.rng("cofima"))[
            : self.part.n_samples
        ].tolist()
        with self.w.at(ctx, self.w.settled):
            F = self.w.fisher(
                ctx, [rows[i : i + ctx.batch_size] for i in range(0, len(rows), ctx.batch_size)]
            )[key]
        near(self.part.fisher[short], F, 1e-3, f"Fisher of {key}")
        want = self.w.settled[key]
        if name in self.w.learned:
            old, new = (1 - self.part.lam) * self.F_old[short], self.part.lam * F
            want = (old * self.w.start[key] + new * want) / (old + new)
        near(self.w.now(key), want, 1e-3, key)


class Tailored(Guarantee):
    """A share `sparsity` of a layer's entries is as before the task; the LoRA stays as it was trained."""

    before: ClassVar[State] = {}

    def begin(self, ctx: Context) -> None:
        self.before = self._total(ctx)

    def end(self, ctx: Context) -> None:
        after = self._total(ctx)
        for key, old in self.before.items():
            kept = ((after[key] - old).abs() <= 1e-5 * (1 + old.abs())).float().mean()
            assert kept >= self.part.sparsity - 0.02, f"{key}: {float(kept)} of the entries are as before"
        for key in self.w.start:
            if "lora_" in key:
                near(self.w.now(key), self.w.settled[key], 1e-6, key)

    def _total(self, ctx: Context) -> State:
        names = ["lora", *self.part.patch]
        each = [self.w.changes(self.w.live(ctx), n) for n in names]
        total = {k: sum((c[k] for c in each if k in c), torch.zeros(())) for k in each[0]}
        for key in [k for k in total if k.endswith(".bias")]:  # one more column of its layer
            at = key.replace(".bias", ".weight")
            total[at] = torch.cat([total[at], total.pop(key)[:, None]], dim=1)
        return total


class Fused(Guarantee):
    """HiDe's sum is that of the adapters as the tasks left them."""

    def end(self, ctx: Context) -> None:
        bank = ctx.model.adapters
        states = [bank.state(n) for n in self.part.adapter_of.values()]
        for key, t in bank.state("fused").items():
            whole = sum(s[key] for s in states) if "lora_" in key else states[-1][key]
            near(t, torch.as_tensor(whole), 1e-5, key)


class Summed(Guarantee):
    """What answers is the weighted sum of the adapters as their tasks left them."""

    def end(self, ctx: Context) -> None:
        names = list(self.part.adapter_of.values())
        weights = getattr(self.part, "weights", None) or dict.fromkeys(names, 1 / len(names))
        live = self.w.live(ctx)
        alone = [self.w.changes(live, n) for n in names]
        stored = [self.w.changes(live, n) for n in ctx.model.adapters.mix.names]
        for key in alone[0]:
            want = sum((weights[n] * a[key] for n, a in zip(names, alone, strict=True)), torch.zeros(()))
            got = sum((s[key] for s in stored if key in s), torch.zeros_like(want))
            near(got, want, 1e-4, key)


class AllOn(Guarantee):
    """O-LoRA answers with every adapter (that old ones stand still, the watch sees for all methods)."""

    def end(self, ctx: Context) -> None:
        assert dict(ctx.model.adapters.mix.weights) == dict.fromkeys(self.part.adapter_of.values(), 1.0)


class Prototypes(Guarantee):
    """A learned prompt's prototype is that of the prompt as its task left it."""

    def end(self, ctx: Context) -> None:
        for name, p in self.part.prototypes.items():
            tensors = {k.rsplit(".", 1)[1]: t for k, t in ctx.model.adapters.state(name).items()}
            near(p, prototype(tensors), 1e-5, name)


GUARANTEES: dict[str, type[Guarantee]] = {
    "gpm": Gpm,
    "ewc": Ewc,
    "ema": Average,
    "interpolate": Between,
    "llaca": Adaptive,
    "lwf": Lwf,
    "replay": Replayed,
    "merge_after_task": Merged,
    "cofima": Cofima,
    "model_tailor": Tailored,
    "hide": Fused,
    "merge_tasks": Summed,
    "lorahub": Summed,
    "o_lora": AllOn,
    "modal_prompt": Prototypes,
}
"""Of every other method: no adapter moves but those that the task trains, and what a part keeps is its own."""

MADE = ("fused", "merged-", "patch-", "lwf-")
"""Adapters that a part makes of others."""


@dataclass
class Watch(Method):
    """The last part of a stack: sees the end of every hook, and changes nothing."""

    name = "watch"
    parts_of: tuple[Method, ...] = ()
    method: Any = field(init=False, default=None)
    checks: list[Guarantee] = field(init=False, default_factory=list)
    start: State = field(init=False, default_factory=dict)
    last: State = field(init=False, default_factory=dict)
    settled: State = field(init=False, default_factory=dict)
    seen_grads: State = field(init=False, default_factory=dict)
    others: dict[str, State] = field(init=False, default_factory=dict)
    learned: list[str] = field(init=False, default_factory=list)
    bank: Any = field(init=False, default=None)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def config(self) -> dict[str, Any]:
        return {}

    def __post_init__(self) -> None:
        self.checks = [GUARANTEES[p.name](p, self) for p in self.parts_of if p.name in GUARANTEES]

    # -- hooks ------------------------------------------------------------------------------------------------------

    def begin_task(self, ctx: Context) -> None:
        self.bank = ctx.model.adapters
        self.start = {k: p.detach().clone() for k, p in self.bank.trainable().items()}
        names = {k.split("/", 1)[0] for k in self.start}
        learned = [k for k, t in self.start.items() if not k.endswith(".lora_A") and t.any()]
        self.learned = sorted({k.split("/", 1)[0] for k in learned})
        self.others = {
            n: self.bank.state(n) for n in self.bank.names if n not in names and not n.startswith(MADE)
        }
        self._own(ctx)
        for c in self.checks:
            c.begin(ctx)

    def data(self, ctx: Context, examples: Examples) -> Examples:
        for c in self.checks:
            c.data(ctx, examples)
        return examples

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        self._own(ctx)
        return 0.0

    def grads(self, ctx: Context) -> None:
        live = self.bank.trainable().items()
        self.seen_grads = {k: p.grad.detach().clone() for k, p in live if p.grad is not None}
        self._own(ctx)

    def after_step(self, ctx: Context) -> None:
        self.last = {k: self.now(k) for k in self.start}
        self._own(ctx)
        with torch.no_grad():
            for c in self.checks:
                c.step(ctx)

    def end_task(self, ctx: Context) -> None:
        self.settled = dict(self.last)
        for c in self.checks:
            self.settled |= c.settle(ctx) or {}
        self._own(ctx)
        if not self.has("rewrites"):
            for key, want in self.settled.items():
                near(self.now(key), want, 1e-5, f"final {key}")
        for name, state in self.others.items():
            for key, t in self.bank.state(name).items():
                assert torch.equal(t, state[key]), (
                    f"{name}, which the task does not train, has moved at {key}"
                )
        for c in self.checks:
            c.end(ctx)

    # -- what checks ask for ------------------------------------------------------------------------------------------

    def now(self, key: str) -> Tensor:
        name, short = key.split("/", 1)
        return self.bank.parameters(name)[short].detach().clone()

    def live(self, ctx: Context) -> State:
        return {f"{n}/{k}": t for n in self.bank.names for k, t in self.bank.state(n).items()}

    def has(self, role: str) -> bool:
        return any(p.roles.get("end_task") == role for p in self.parts_of)

    def changes(self, state: State, name: str) -> State:
        """The change of each weight that one adapter makes: alpha / r B A, and plain tensors."""
        own = {k.split("/", 1)[1]: t for k, t in state.items() if k.startswith(f"{name}/")}
        out = {}
        for key, t in own.items():
            site, kind = key.rsplit(".", 1)
            if kind == "lora_B":
                layer = self.bank.sites[site]
                assert isinstance(layer, LoraLinear)
                out[f"{site}.weight B A"] = layer.spec.scale * t @ own[f"{site}.lora_A"]
            elif kind != "lora_A":
                out[key] = t
        return out

    def inputs(self, ctx: Context, samples: list[int]) -> State:
        rows: dict[str, list[Tensor]] = {}
        with (
            torch.no_grad(),
            self.bank.reading(lambda p, x: rows.setdefault(p, []).append(x.reshape(-1, x.shape[-1]))),
        ):
            for i in samples:
                ctx.model(ctx.model.collate([ctx.task.train[i]], answers=True))
        return {p: torch.cat(r) for p, r in rows.items()}

    def fisher(self, ctx: Context, draws: list[list[int]]) -> State:
        """Mean over draws of the squared gradient of the draw's mean answer loss, each draw in one forward."""
        live = {k: self.bank.parameters(k.split("/", 1)[0])[k.split("/", 1)[1]] for k in self.start}
        total = {k: torch.zeros_like(p) for k, p in live.items()}
        for draw in draws:
            batch = ctx.model.collate([ctx.task.train[i] for i in draw], answers=True)
            grads = torch.autograd.grad(ctx.model(batch).loss, list(live.values()), allow_unused=True)
            for key, g in zip(live, grads, strict=True):
                total[key] += 0 if g is None else g**2 / len(draws)
        return total

    def at(self, ctx: Context, state: State) -> Any:
        """Within the block the trained tensors are those of `state`."""
        watch = self

        class Block:
            def __enter__(self) -> None:
                self.kept = {k: watch.now(k) for k in state}
                self._put(state)

            def __exit__(self, *_: Any) -> None:
                self._put(self.kept)

            def _put(self, values: State) -> None:
                for k, t in values.items():
                    name, short = k.split("/", 1)
                    watch.bank.parameters(name)[short].data.copy_(t)

        return Block()

    @torch.no_grad()
    def answered(self, ctx: Context, task: Any) -> tuple[Batch, Output]:
        """How the model answers the first samples of another task now, routed as evaluation routes them."""
        asked = copy.copy(ctx)
        asked.task = task
        batch = ctx.model.collate(list(task.train[:4]), answers=True)
        mix = self.method.route(asked, batch) or self.bank.mix
        with self.bank.using(mix):
            return batch, ctx.model(batch)

    def _own(self, ctx: Context) -> None:
        """No tensor of a part's state shares memory with a live tensor, a gradient, or another part's state."""
        taken = dict[int, str]()
        for name in self.bank.names:
            for key, p in self.bank.parameters(name).items():
                for t, what in ((p.detach(), "the weight"), (p.grad, "the gradient")):
                    if t is not None and t.numel():
                        taken[t.untyped_storage().data_ptr()] = f"{what} {name}/{key}"
        for part in self.parts_of:
            own = {
                t.untyped_storage().data_ptr(): at
                for at, t in tensors(part.state_dict(), part.name)
                if t.numel()
            }
            for where, at in own.items():
                assert where not in taken, f"{at} is not its own: it shares memory with {taken[where]}"
            taken |= own


def tensors(value: Any, at: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in some state, and where it is."""
    if isinstance(value, Tensor):
        yield at, value
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from tensors(v, f"{at}.{key}")
    elif isinstance(value, list | tuple):
        for i, v in enumerate(value):
            yield from tensors(v, f"{at}[{i}]")
