"""Adapter kinds on one linear layer: K low-rank adapters (LoRA, Hu et al. 2021), or K dense deltas for a
projector.

    y = W x + sum_k w_k (alpha/r) B_k A_k x          LoRA
    y = W x + sum_k w_k (dW_k x + db_k)              dense delta

The base layer is called as a black box, so quantised layers work. One active adapter with a plain number
costs the two products of ordinary LoRA; several, or weights per sample, are stacked along the rank: still two
products. PEFT's `adapter_names` picks one adapter per sample and cannot blend, which is why the bank is ours.
"""

# B batch, T tokens, K active adapters, R summed rank

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from retain.adapters.bank import AdapterBank, Site, Weight
from retain.adapters.patterns import matcher
from retain.types import RetainError


@dataclass(frozen=True)
class LoraSpec:
    """Which layers get LoRA, which are copied whole, and how large.

    `targets` is a regular expression over module paths, or "language" (all linear layers of the language
    model but the output head), or "all". `dense` names modules trained as full deltas (the projector); "" for
    none.
    """

    kind: ClassVar[str] = "lora"  # what a recipe calls it

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "language"
    dense: str = "projector"
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RetainError(f"adapter: rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise RetainError(f"adapter: dropout must be in [0, 1), not {self.dropout}")

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def site(self, base: nn.Module, layer: int | None, group: str, visual: bool) -> Site:
        """The site that goes around a targeted linear layer."""
        return LoraLinear(base, self, layer, group, visual)

    def in_front(self, n_tasks: int) -> int:
        """Tokens that this kind puts before a sample once so many tasks are known: none."""
        return 0


class _Adapted(nn.Module):
    """What both kinds share: the frozen base layer, its place, and which adapters are on."""

    base: Any  # an nn.Linear, or whatever stands for one in a quantised model

    def __init__(self, base: nn.Module, layer: int | None, group: str, visual: bool) -> None:
        super().__init__()
        self.base, self.layer, self.group, self.visual = base, layer, group, visual
        self.bank: AdapterBank
        inner: Any = base
        self.features = (int(inner.in_features), int(inner.out_features))
        self.device: torch.device = inner.weight.device
        self.train(base.training)  # a new module is in training mode: dropout would be on in an eval model

    def __getattr__(self, name: str) -> Any:  # some HF code reads `.weight`, `.in_features` of a linear layer
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"weight", "bias", "in_features", "out_features"}:
                return getattr(super().__getattr__("base"), name)
            raise

    def active(self) -> list[tuple[str, Weight]]:
        return [(n, w) for n, w in self.bank.mix.at(self.layer).items() if isinstance(w, Tensor) or w != 0]


class _Foldable(_Adapted):
    """An adapted layer whose deltas are linear, so that they can be added to its weight."""

    def folding(self, x: Tensor) -> list[tuple[str, Weight]]:
        """The adapters that may be added to the weight for a call with `x`; none where that may not be done.

        Only while the bank's adapters do not change, without gradients, in fp32 (a small delta is lost in the
        rounding of a half-precision weight), for a mix of plain numbers on an `nn.Linear`.
        """
        base = self.base
        if self.bank.folds is None or torch.is_grad_enabled() or type(base) is not nn.Linear:
            return []
        if not x.dtype == base.weight.dtype == torch.float32 or torch.is_autocast_enabled(x.device.type):
            return []
        active = self.active()
        return [] if any(isinstance(w, Tensor) for _, w in active) else active

    @abstractmethod
    def summed(self, active: list[tuple[str, Weight]]) -> tuple[Tensor, Tensor | None]:
        """New tensors: the base's weight plus the weighted deltas, and the same of the bias."""


def folded(layers: tuple[_Foldable, ...], x: Tensor, active: list[tuple[str, Weight]]) -> Tensor:
    """One product for layers that read one tensor, adapters added to their weights: outputs side by side.

    Equal to the layers one by one up to rounding. The sums are new tensors and stay with the bank until the mix
    changes; the base layers are not touched.
    """
    folds = layers[0].bank.folds
    assert folds is not None
    found = folds.get(layers)
    if found is None or found[0] != active:
        sums = [layer.summed(active) for layer in layers]
        biases = [b for _, b in sums if b is not None]
        bias = torch.cat(biases) if biases else None
        found = folds[layers] = (active, torch.cat([w for w, _ in sums]), bias)
    return F.linear(x, *found[1:])


def routed(layers: tuple[LoraLinear, ...], x: Tensor) -> tuple[Tensor, ...] | None:
    """A mix with weights per sample, without gradients: one product with all A of layers that read one tensor.

    None where that cannot be. The factors side by side are made once where the bank keeps them, the weights along
    the rank once for every mix.
    """
    first = layers[0]
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or first.visual:
        return None  # at a visual layer the weights differ from call to call: they go by the images in it
    found = first.bank.once((layers, x.ndim), lambda: _blend(layers, x), first.bank.mix)
    if found is None:
        return None
    A_RD, Bs, w_B1R = found
    h_MR = F.linear(x, A_RD).mul_(w_B1R).view(-1, A_RD.shape[0])
    out, at = [], 0
    for layer, B in zip(layers, Bs, strict=True):
        y: Tensor = F.linear(x, layer.base.weight, layer.base.bias)
        y.view(-1, y.shape[-1]).addmm_(h_MR[:, at : at + B.shape[1]], B.t(), alpha=first.spec.scale)
        out.append(y)
        at += B.shape[1]
    return tuple(out)


def _blend(layers: tuple[LoraLinear, ...], x: Tensor) -> tuple[Tensor, list[Tensor], Tensor] | None:
    """All A (R, in), the B of each layer, and the weights along R; None where a layer must run on its own."""
    first = layers[0]
    active = first.active()
    names = tuple(n for n, _ in active)
    if (
        not any(isinstance(w, Tensor) for _, w in active)
        or (first.spec.dropout and first.training)
        or any(type(s.base) is not nn.Linear for s in layers)
        or any(s.lora_A[names[0]].dtype != x.dtype or s.base.weight.dtype != x.dtype for s in layers)
    ):
        return None

    def factors() -> tuple[Tensor, list[Tensor]]:
        each = [s.side_by_side(names) for s in layers]
        return torch.cat([A for A, _ in each]) if len(each) > 1 else each[0][0], [B for _, B in each]

    A_RD, Bs = first.bank.once((layers, names), factors)
    return A_RD, Bs, torch.cat([first.weights(active, x)] * len(layers), dim=-1)


class LoraLinear(_Foldable):
    """K LoRA adapters on one linear layer. A: (r, in), uniform as in PEFT; B: (out, r), zero."""

    def __init__(self, base: nn.Module, spec: LoraSpec, layer: int | None, group: str, visual: bool) -> None:
        super().__init__(base, layer, group, visual)
        self.spec = spec
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()

    def create(self, name: str, rng: Generator | None) -> None:
        n_in, n_out = self.features
        A = torch.empty(self.spec.rank, n_in)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=rng)
        self.lora_A[name] = Parameter(A.to(self.device))
        self.lora_B[name] = Parameter(torch.zeros(n_out, self.spec.rank, device=self.device))

    def remove(self, name: str) -> None:
        del self.lora_A[name], self.lora_B[name]

    def tensors(self, name: str) -> dict[str, Parameter]:
        return {"lora_A": self.lora_A[name], "lora_B": self.lora_B[name]}

    def summed(self, active: list[tuple[str, Weight]]) -> tuple[Tensor, Tensor | None]:
        """W + sum_k w_k (alpha/r) B_k A_k, and the bias."""
        A, B = self._stacked(active)
        scale = self.spec.scale * (float(active[0][1]) if len(active) == 1 else 1)
        return torch.addmm(self.base.weight, B, A, alpha=scale), self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if folding := self.folding(x):
            return folded((self,), x, folding)
        if (blended := routed((self,), x)) is not None:
            return blended[0]
        active = self.active()
        if not active:
            plain: Tensor = self.base(x)
            return plain
        seen = self.bank.dropped(x, self.spec.dropout) if self.spec.dropout and self.training else x
        autocast = torch.is_autocast_enabled(x.device.type)
        names = [n for n, _ in active]
        numbers = not any(isinstance(w, Tensor) for _, w in active)
        A, B = self._stacked(active) if numbers else self.side_by_side(tuple(names))
        scale = self.spec.scale
        if numbers and len(active) == 1:
            scale *= float(active[0][1])
        fused = (
            numbers
            and not autocast
            and type(self.base) is nn.Linear
            and x.dtype == A.dtype == self.base.weight.dtype
        )
        if fused:
            fast: Tensor = _Fused.apply(x, seen, self.base.weight, self.base.bias, A, B, scale)  # type: ignore[no-untyped-call]
            return fast
        y: Tensor = self.base(x)
        h = F.linear(seen if autocast else seen.to(A.dtype), A)  # (B, T, R)
        if not numbers:
            h = h * self.weights(active, h)
        if autocast or y.dtype == h.dtype == B.dtype:
            flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale)
            return flat.view(y.shape)
        return y + (F.linear(h, B) * scale).to(y.dtype)

    def side_by_side(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """All A along the rank (R, in), and all B (out, R), of weight one."""
        return self.bank.once((self, *names), lambda: self._stacked([(n, 1.0) for n in names]))

    def _stacked(self, active: list[tuple[str, Weight]]) -> tuple[Tensor, Tensor]:
        """All A along the rank (R, in), and all B (out, R); several plain weights are folded into B."""
        if len(active) == 1:
            return self.lora_A[active[0][0]], self.lora_B[active[0][0]]
        A = torch.cat([self.lora_A[n] for n, _ in active])
        return A, torch.cat([self.lora_B[n] if w == 1 else self.lora_B[n] * w for n, w in active], dim=1)

    def weights(self, active: list[tuple[str, Weight]], h: Tensor) -> Tensor:
        """The weight of each adapter repeated over its rank: (…, R), broadcast over tokens."""
        per_sample = any(isinstance(w, Tensor) and w.ndim for _, w in active)
        columns = []
        for name, w in active:
            r = self.lora_A[name].shape[0]
            if isinstance(w, Tensor) and w.ndim:
                column = self.bank.spread(w, h, visual=self.visual)
                columns.append(column.expand(*column.shape[:-1], r))
            else:
                value = torch.as_tensor(w, dtype=h.dtype, device=h.device)
                lead = [h.shape[0], *[1] * (h.ndim - 2)] if per_sample else []
                columns.append(value.expand(*lead, r))
        return torch.cat(columns, dim=-1)


class _Fused(torch.autograd.Function):
    """W x + b + scale B A x' for a frozen W as one node; x' is x, or x after dropout.

    The same forward arithmetic as separate operations. In the backward the scale meets only the R-wide
    product, and the gradient of x is added up inside one matrix product, so no full-width temporary is
    multiplied or added.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, dropped: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        x2 = dropped.reshape(-1, dropped.shape[-1])
        h = x2 @ A.t()
        y = F.linear(x, W, b)
        y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=scale)
        ctx.save_for_backward(x2, h, W, A, B)
        ctx.scale, ctx.same, ctx.shape = scale, dropped is x, x.shape
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x2, h, W, A, B = ctx.saved_tensors
        need_x, need_dropped, _, _, need_A, need_B, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        gB = (g @ B).mul_(ctx.scale)  # (N, R)
        gx = gd = None
        if need_x:
            gx = g @ W
            gx = (gx.addmm_(gB, A) if ctx.same else gx).view(ctx.shape)
        if need_dropped and not ctx.same:
            gd = (gB @ A).view(ctx.shape)
        return (
            gx, gd, None, None,
            gB.t() @ x2 if need_A else None, (g.t() @ h).mul_(ctx.scale) if need_B else None, None,
        )  # fmt: skip


class DenseLinear(_Foldable):
    """K dense deltas on one linear layer (weight, bias), zero at first: the projector as an adapter.

    An adapter may do without: then it has no tensors here, rather than zeros of the layer's size.
    """

    optional: ClassVar[bool] = True

    def __init__(self, base: nn.Module, layer: int | None, group: str, visual: bool) -> None:
        super().__init__(base, layer, group, visual)
        self.delta_weight, self.delta_bias = nn.ParameterDict(), nn.ParameterDict()

    def create(self, name: str, rng: Generator | None) -> None:
        n_in, n_out = self.features
        self.delta_weight[name] = Parameter(torch.zeros(n_out, n_in, device=self.device))
        if self.base.bias is not None:
            self.delta_bias[name] = Parameter(torch.zeros(n_out, device=self.device))

    def remove(self, name: str) -> None:
        for deltas in (self.delta_weight, self.delta_bias):
            if name in deltas:
                del deltas[name]

    def tensors(self, name: str) -> dict[str, Parameter]:
        deltas = {"weight": self.delta_weight, "bias": self.delta_bias}
        return {key: held[name] for key, held in deltas.items() if name in held}

    def active(self) -> list[tuple[str, Weight]]:
        return [(n, w) for n, w in super().active() if n in self.delta_weight]

    def summed(self, active: list[tuple[str, Weight]]) -> tuple[Tensor, Tensor | None]:
        """W + sum_k w_k dW_k, and the same of the bias."""
        weight, bias = self.base.weight.clone(), self.base.bias
        bias = None if bias is None else bias.clone()
        for name, w in active:
            weight.add_(self.delta_weight[name], alpha=float(w))
            if bias is not None:
                bias.add_(self.delta_bias[name], alpha=float(w))
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if folding := self.folding(x):
            return folded((self,), x, folding)
        y: Tensor = self.base(x)
        for name, w in self.active():
            bias = self.delta_bias[name] if self.base.bias is not None else None
            weight = self.delta_weight[name]
            xx = x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)
            delta = F.linear(xx, weight, bias)
            if isinstance(w, Tensor) and w.ndim:
                delta = delta * self.bank.spread(w, delta, visual=self.visual)
            elif not isinstance(w, float | int) or w != 1:
                delta = delta * w
            y = y + delta.to(y.dtype)
        return y


def attach(
    model: nn.Module,
    spec: LoraSpec,
    *,
    language: str,
    projector: Iterable[str] = (),
    signature: dict[str, object] | None = None,
) -> AdapterBank:
    """Put sites around the layers that `spec` names and return the bank. The base is frozen.

    `language` is the path prefix of the language model, `projector` the prefixes of the modules that
    "projector" means.
    """
    model.requires_grad_(False)
    chosen = _chooser(spec.targets, language)
    dense = tuple(projector) if spec.dense == "projector" else tuple(filter(None, spec.dense.split(",")))
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features") and hasattr(m, "weight")}
    sites: dict[str, Site] = {}
    for path, module in linears.items():
        visual = not path.startswith(language)
        found = re.search(r"\.layers\.(\d+)\.", f".{path}.")
        layer = int(found[1]) if found and not visual else None
        if any(path == d or path.startswith(d + ".") for d in dense):
            site: Site = DenseLinear(module, layer, "projector", visual)
        elif chosen(path):
            site = spec.site(module, layer, "lora", visual)
        else:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, site)
        sites[path] = site
    if all(isinstance(s, DenseLinear) for s in sites.values()):
        raise RetainError(
            f"adapter: targets {spec.targets!r} match no linear layer; there are {sorted(linears)[:8]} …"
        )
    bank = AdapterBank(sites, {**(signature or {}), spec.kind: asdict(spec)}, spec.kind)
    for module in model.modules():
        if isinstance(module, _Adapted):
            module.bank = bank
    return bank


def _chooser(targets: str | Literal["language", "all"], language: str) -> Callable[[str], bool]:
    if targets == "language":
        return lambda path: path.startswith(language) and not path.endswith("lm_head")
    if targets == "all":
        return lambda path: not path.endswith("lm_head")
    return matcher(targets, "adapter: targets", whole=False)
