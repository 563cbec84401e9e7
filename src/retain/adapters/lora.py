"""Adapter kinds on one linear layer: K low-rank adapters (LoRA, Hu et al. 2021), or K dense deltas for a projector.

    y = W x + sum_k w_k (alpha/r) B_k A_k x          LoRA
    y = W x + sum_k w_k (dW_k x + db_k)              dense delta

The base layer is called as a black box, so quantised layers work. One active adapter with a plain number costs the
two products of ordinary LoRA; several, or weights per sample, are stacked along the rank: still two products.
PEFT's `adapter_names` picks one adapter per sample and cannot blend, which is why the bank is ours.
"""

# B batch, T tokens, K active adapters, R summed rank

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from retain.adapters.bank import AdapterBank, Site, Weight
from retain.types import RetainError


@dataclass(frozen=True)
class LoraSpec:
    """Which layers get LoRA, which are copied whole, and how large.

    `targets` is a regular expression over module paths, or "language" (all linear layers of the language model but
    the output head), or "all". `dense` names modules trained as full deltas (the projector); "" for none.
    """

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


class _Adapted(nn.Module):
    """What both kinds share: the frozen base layer, its place, and which adapters are on."""

    def __init__(self, base: nn.Module, layer: int | None, group: str, visual: bool) -> None:
        super().__init__()
        self.base, self.layer, self.group, self.visual = base, layer, group, visual
        self.bank: AdapterBank
        weight = base.weight
        self.features = (int(base.in_features), int(base.out_features))  # type: ignore[arg-type]
        self.device = weight.device  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> object:  # some HF code reads `.weight`, `.in_features` of a linear layer
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in {"weight", "bias", "in_features", "out_features"}:
                return getattr(super().__getattr__("base"), name)
            raise

    def active(self) -> list[tuple[str, Weight]]:
        return [(n, w) for n, w in self.bank.mix.at(self.layer).items() if isinstance(w, Tensor) or w != 0]


class LoraLinear(_Adapted):
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
        return {"lora_A": self.lora_A[name], "lora_B": self.lora_B[name]}  # type: ignore[dict-item]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        active = self.active()
        if not active:
            return y
        if self.spec.dropout and self.training:
            x = self.bank.dropped(x, self.spec.dropout)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A[active[0][0]].dtype)
        names = [n for n, _ in active]
        A = self.lora_A[names[0]] if len(active) == 1 else torch.cat([self.lora_A[n] for n in names])
        B = self.lora_B[names[0]] if len(active) == 1 else torch.cat([self.lora_B[n] for n in names], dim=1)
        h = F.linear(x, A)  # (B, T, R)
        scale = self.spec.scale
        if len(active) == 1 and not isinstance(active[0][1], Tensor):
            scale *= active[0][1]
        else:
            h = h * self._weights(active, h)
        if y.dtype == h.dtype == B.dtype or torch.is_autocast_enabled(x.device.type):
            flat = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), B.t(), alpha=scale)
            return flat.view(y.shape)
        return y + (F.linear(h, B) * scale).to(y.dtype)

    def _weights(self, active: list[tuple[str, Weight]], h: Tensor) -> Tensor:
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


class DenseLinear(_Adapted):
    """K dense deltas on one linear layer (weight and bias), all zero at first: the projector as an adapter."""

    def __init__(self, base: nn.Module, layer: int | None, group: str, visual: bool) -> None:
        super().__init__(base, layer, group, visual)
        self.delta_weight, self.delta_bias = nn.ParameterDict(), nn.ParameterDict()

    def create(self, name: str, rng: Generator | None) -> None:
        n_in, n_out = self.features
        self.delta_weight[name] = Parameter(torch.zeros(n_out, n_in, device=self.device))
        if self.base.bias is not None:
            self.delta_bias[name] = Parameter(torch.zeros(n_out, device=self.device))

    def remove(self, name: str) -> None:
        del self.delta_weight[name]
        if name in self.delta_bias:
            del self.delta_bias[name]

    def tensors(self, name: str) -> dict[str, Parameter]:
        out = {"weight": self.delta_weight[name]}
        if name in self.delta_bias:
            out["bias"] = self.delta_bias[name]
        return out  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for name, w in self.active():
            bias = self.delta_bias[name] if name in self.delta_bias else None
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

    `language` is the path prefix of the language model, `projector` the prefixes of the modules that "projector" means.
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
            site: LoraLinear | DenseLinear = DenseLinear(module, layer, "projector", visual)
        elif chosen(path):
            site = LoraLinear(module, spec, layer, "lora", visual)
        else:
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, site)
        sites[path] = site
    if not any(isinstance(s, LoraLinear) for s in sites.values()):
        raise RetainError(f"adapter: targets {spec.targets!r} match no linear layer; there are {sorted(linears)[:8]} …")
    bank = AdapterBank(sites, {**(signature or {}), "lora": asdict(spec)})
    for site in sites.values():
        site.bank = bank  # type: ignore[attr-defined]
    return bank


def _chooser(targets: str | Literal["language", "all"], language: str) -> Callable[[str], bool]:
    if targets == "language":
        return lambda path: path.startswith(language) and not path.endswith("lm_head")
    if targets == "all":
        return lambda path: not path.endswith("lm_head")
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise RetainError(f"adapter: targets {targets!r} is no regular expression: {error}") from None
    return lambda path: pattern.search(path) is not None
