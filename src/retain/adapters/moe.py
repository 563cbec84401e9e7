"""Experts on one linear layer: E small LoRA adapters, weighed for every token by a router that is trained with
them.

    y = W x + (alpha/r) sum_e s_e(x) B_e A_e x'        s(x) = softmax(R x) over all E experts

R (E, in), no bias; A_e (r/E, in), B_e (out, r/E): the rank is that of the whole layer, split over the experts. Dense: no
top-k, no balance loss. x' is x, or x after dropout; the router reads x. "MoELoRA" of CoIN (arXiv 2403.08350;
released code: github.com/zackschen/CoIN, peft/tuners/coinmoelora.py). There and here A is drawn with standard deviation
0.01, B is zero, and the router starts like any linear layer.

All experts stand in one A and one B, so a layer costs the two products of LoRA of the same rank and a small one
for the router; there each expert runs on its own. The weight of an expert depends on the input, so an adapter
of this kind has no plain LoRA form: it can be neither merged nor exported.
"""

# B batch, T tokens, E experts, R rank of all experts together

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from retain.adapters.bank import Site
from retain.adapters.lora import LoraSpec, _Adapted
from retain.types import RetainError
from retain.values import ranged

STD_A = 0.01  # of the released code


@ranged("adapter")
@dataclass(frozen=True)
class MoeSpec(LoraSpec):
    """As `LoraSpec`; `rank` is split over `experts`. CoIN: rank 128, 8 experts."""

    kind: ClassVar[str] = "moe"

    experts: Annotated[int, Field(ge=1, le=65_536)] = 8

    def __post_init__(self) -> None:
        if self.rank % self.experts:
            raise RetainError(
                f"adapter: rank {self.rank} cannot be split over {self.experts} experts; "
                "rank must be a multiple of experts"
            )

    def site(self, base: nn.Module, layer: int | None, group: str, visual: bool) -> Site:
        return MoeLinear(base, self, layer, group, visual)


class MoeLinear(_Adapted):
    """E experts and their router on one linear layer, for each adapter name."""

    no_peft: ClassVar[str] = (
        "experts are weighed by a router that reads the input (adapter.kind: moe), which no LoRA of PEFT can say"
    )

    def __init__(self, base: nn.Module, spec: MoeSpec, layer: int | None, group: str, visual: bool) -> None:
        super().__init__(base, layer, group, visual)
        self.spec = spec
        self.lora_A, self.lora_B, self.lora_router = (nn.ParameterDict() for _ in range(3))

    def create(self, name: str, rng: Generator | None) -> None:
        n_in, n_out = self.features
        A = torch.empty(self.spec.rank, n_in).normal_(0, STD_A, generator=rng)
        router = torch.empty(self.spec.experts, n_in)
        nn.init.kaiming_uniform_(router, a=math.sqrt(5), generator=rng)
        self.lora_A[name] = Parameter(A.to(self.device))
        self.lora_B[name] = Parameter(torch.zeros(n_out, self.spec.rank, device=self.device))
        self.lora_router[name] = Parameter(router.to(self.device))

    def remove(self, name: str) -> None:
        del self.lora_A[name], self.lora_B[name], self.lora_router[name]

    def tensors(self, name: str) -> dict[str, Parameter]:
        return {
            "lora_A": self.lora_A[name],
            "lora_B": self.lora_B[name],
            "lora_router": self.lora_router[name],
        }

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        active = self.active()
        if not active:
            return y
        seen = self.bank.dropped(x, self.spec.dropout) if self.spec.dropout and self.training else x
        for name, w in active:
            A, B, router = self.lora_A[name], self.lora_B[name], self.lora_router[name]
            if not torch.is_autocast_enabled(x.device.type):
                x, seen = x.to(A.dtype), seen.to(A.dtype)
            delta = F.linear(F.linear(seen, A) * self._gate(x, router), B) * self.spec.scale
            if isinstance(w, Tensor) and w.ndim:
                delta = delta * self.bank.spread(w, delta, visual=self.visual)
            elif isinstance(w, Tensor) or w != 1:
                delta = delta * w
            y = y + delta.to(y.dtype)
        return y

    def _gate(self, x: Tensor, router: Tensor) -> Tensor:
        """The weight of each expert, repeated over its share of the rank: (..., R)."""
        weights = torch.softmax(F.linear(x, router), dim=-1)
        return weights.repeat_interleave(self.spec.rank // self.spec.experts, dim=-1)
