"""Model Tailor: after each task all but a small patch of the change is undone, and the patch makes up for it.

Zhu et al., "Model Tailor", ICML 2024 (arXiv 2402.12048); the formula is in `retain.merge.patch`. One LoRA is
trained on every task in turn. With W0 a layer's weight in the model accepted before the task, W1 after it, and H
the second moments of the layer's inputs on `samples` training samples of the task:

    W' = patched(W0, W1, H)        `sparsity` of its entries equal W0, the others compensate for what was undone
    W  = base + B A + C,   C = C + (W' - W1)

A patched change has full rank. The LoRA stays as it was trained, and the correction C is stored beside it as frozen
adapters `patch-1`, `patch-2`, …: exactly (C = C I, factors without rounding), or, with `rank` above 0, truncated
(error logged). The next task goes on from base + B A + C. The projector is patched in place, its bias as one more
column whose input is 1, so the patches have no tensors there.

Inputs are those of single samples, so that no padding is among them; H is fp32. Blocks (decoder layers, layers of
the projector) are patched in the model's order, and the inputs of a block are read again through the patched ones
before it: one pass over the samples per block, as many as there are blocks.

Differs from the released code: compensation is subtracted, as theory says (`sign: 1` adds, as released); sensitivity
is the derivation's (`obs`, from memory and unverified; `code` is the released one); every adapted layer is patched,
where the release treats decoder layers 20 to 31 and puts the projector back (`projector: restore`); the release is
for one task after full fine-tuning, a stream of tasks and LoRA are ours. No figure of the paper's tables was checked.
`sparsity: 0` is off, bit for bit, and 1 undoes the task.
"""

# O out features, I in features, N rows

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import retain.methods._merging as merging
from retain.adapters.bank import AdapterBank, Mix
from retain.merge.base import Merged
from retain.merge.parts import Low, Part, dense, split, truncated
from retain.merge.patch import patched
from retain.method import FULL_PARAMS, Context, Method, register
from retain.methods._parts import take
from retain.models.base import Model
from retain.stream import Stream
from retain.types import RetainError
from retain.values import Count, CountOrOff, Share

OWN = "lora"


@register
@dataclass
class ModelTailor(Method):
    """One LoRA for all tasks; of what a task changed a small patch stays."""

    name: ClassVar[str] = "model_tailor"
    about: ClassVar[str] = "after each task all but a small, compensated patch is undone"
    source: ClassVar[str] = "arXiv:2402.12048"
    needs: ClassVar[frozenset[str]] = frozenset({FULL_PARAMS})
    roles: ClassVar[Mapping[str, str]] = {"end_task": "rewrites"}

    sparsity: Share = 0.9
    sensitivity: Literal["obs", "code"] = "obs"
    decorate: bool = True
    sign: Literal[-1, 1] = -1
    samples: Count = 128
    rank: CountOrOff = 0
    projector: Literal["patch", "restore"] = "patch"

    patch: list[str] = field(init=False, default_factory=list)  # the adapters that hold the correction
    before: dict[str, Tensor] = field(init=False, default_factory=dict)  # the LoRA's change before the task

    def check(self, model: Model, stream: Stream) -> None:
        merging.check_sites(model.adapters, "model_tailor")
        for path, site in model.adapters.sites.items():
            layer: Any = site
            if self.sensitivity == "code" and tuple(layer.weight.shape) != layer.features[::-1]:
                raise RetainError(
                    f"model_tailor.sensitivity: 'code' reads the weight of {path}, which is quantised; take 'obs'"
                )

    def adapt(self, ctx: Context) -> Mix:
        bank = ctx.model.adapters
        if OWN not in bank.names:
            bank.add(OWN, ctx.rng("lora"))
        bank.train_only(OWN)
        return Mix(dict.fromkeys([OWN, *self.patch], 1.0))

    def begin_task(self, ctx: Context) -> None:
        if self.sparsity:
            self.before = merging.changes(ctx.model.adapters, OWN)

    @torch.no_grad()
    def end_task(self, ctx: Context) -> None:
        if not self.sparsity:
            return
        bank, rows = ctx.model.adapters, take(len(ctx.task.train), self.samples, ctx.rng("model_tailor"))
        old, new = split(self.before), split(merging.changes(bank, OWN))
        stored = [split(merging.changes(bank, name)) for name in self.patch]
        steps, parts, errors = dict[str, Tensor](), dict[str, Part](), dict[str, float]()
        projector: dict[str, Tensor] = {}
        for _, block in groupby(bank.sites, _block):
            paths = list(block)
            H = self._moments(ctx, rows, {p: f"{p}.bias" in new for p in paths}, steps)
            for path in paths:
                low = path in new  # else a layer of the projector
                D0, D1 = _change(old, path), _change(new, path)
                C = sum((_change(s, path) for s in stored if low), torch.zeros_like(D1))
                step = self._step(bank.sites[path], D0 + C, D1 + C, H.get(path), projector=not low)
                if low:
                    parts[path], errors[path] = self._kept(C + step)
                    step = dense(parts[path]) - C
                else:
                    projector |= _named(path, D1 + step, new)
                steps[path] = step
        bank.load(OWN, {**bank.state(OWN), **projector})
        bank.mix = Mix({OWN: 1.0})  # or an older patch could not be replaced
        self.patch = merging.store(bank, "patch", parts, ctx.rng("model_tailor-store"))
        bank.mix = Mix(dict.fromkeys([OWN, *self.patch], 1.0))
        self.before = {}
        ctx.log(kind="model_tailor", task=ctx.task.name, **merging.told(Merged(parts, errors)))

    def _step(self, site: Any, D0: Tensor, D1: Tensor, H: Tensor | None, *, projector: bool) -> Tensor:
        """W' - W1 of a layer. The weights of the base cancel, but `code` looks at them."""
        if projector and self.projector == "restore":
            return D0 - D1
        base = torch.zeros_like(D1)
        if self.sensitivity == "code":
            base[:, : site.weight.shape[1]] += site.weight.float()
            if base.shape[1] > site.weight.shape[1]:
                base[:, -1] += site.bias.float()
        if H is None:  # no sample reached the layer: nothing to compensate for
            H = D1.new_zeros(D1.shape[1], D1.shape[1])
        options: dict[str, Any] = {"decorate": self.decorate, "sign": self.sign}
        W1 = base + D1
        return patched(base + D0, W1, H, sparsity=self.sparsity, sensitivity=self.sensitivity, **options) - W1

    def _kept(self, C: Tensor) -> tuple[Part, float]:
        """A correction as it is stored, and the relative error of that: none with an identity as a factor."""
        if self.rank:
            return truncated(C, self.rank)
        one = torch.eye(min(C.shape), dtype=C.dtype, device=C.device)
        return (Low(C, one) if C.shape[1] <= C.shape[0] else Low(one, C)), 0.0

    def _moments(
        self, ctx: Context, rows: Sequence[int], biased: Mapping[str, bool], steps: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """2/N X X^T (I, I) of the inputs of some layers, with `steps` added to the layers before them."""
        sums, counts = dict[str, Tensor](), Counter[str]()

        def read(path: str, x: Tensor) -> None:
            if path in biased:
                x_NI = x.detach().reshape(-1, x.shape[-1]).float()
                x_NI = F.pad(x_NI, (0, 1), value=1.0) if biased[path] else x_NI
                sums[path] = sums[path].addmm_(x_NI.T, x_NI) if path in sums else x_NI.T @ x_NI
                counts[path] += len(x_NI)

        bank = ctx.model.adapters
        with _stepped(bank, steps), bank.reading(read):
            for row in rows:  # one at a time: no padding is among the rows
                ctx.model(ctx.model.collate([ctx.task.train[row]], answers=True, turns=ctx.turns))
        return {path: total * (2 / counts[path]) for path, total in sums.items() if counts[path]}


@contextmanager
def _stepped(bank: AdapterBank, steps: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block layers give y + (W' - W1) x."""

    def add(step: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
        def hook(_: Any, args: Any, y: Tensor) -> Tensor:
            x = args[0].float()
            x = F.pad(x, (0, 1), value=1.0) if step.shape[1] > x.shape[-1] else x
            return y + F.linear(x, step).to(y.dtype)

        return hook

    layers: Any = bank.sites
    hooks = [layers[path].register_forward_hook(add(step)) for path, step in steps.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _block(path: str) -> str:
    """Layers whose inputs are read in one pass: those of one numbered module, else the layer alone."""
    found = re.match(r".*?\.\d+(?=\.|$)", path)
    return found[0] if found else path


def _change(state: Mapping[str, Part], path: str) -> Tensor:
    """A layer's change (O, I); the bias of a projector is one more column."""
    if path in state:
        return dense(state[path])
    weight, bias = dense(state[f"{path}.weight"]), state.get(f"{path}.bias")
    return weight if bias is None else torch.cat([weight, dense(bias)[:, None]], dim=1)


def _named(path: str, change: Tensor, state: Mapping[str, Part]) -> dict[str, Tensor]:
    """The inverse of `_change` for a projector's layer."""
    if f"{path}.bias" not in state:
        return {f"{path}.weight": change}
    return {f"{path}.weight": change[:, :-1].contiguous(), f"{path}.bias": change[:, -1].contiguous()}
