"""Several LoRA layers that read one tensor (q, k, v; gate, up) as one autograd node.

    y_i = W_i x + b_i + s B_i A_i x'            x' = x, or x after dropout, one mask for the block's input
    dx  = sum_i dy_i W_i  +  (mask *) g A       g = s [dy_1 B_1 | dy_2 B_2 | ...],  A = [A_1; A_2; ...]
    dA  = g^T x',   dB_i = s dy_i^T h_i         h = x' A^T

The products with A run once for the whole group, sums are taken inside matrix products, and no gradient of a
frozen W is ever formed. Equal to the layers one by one up to the order of sums.
"""

# M rows (batch x tokens), R summed rank of a group, K layers of the group

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from retain.adapters.lora import LoraLinear, folded, routed


def together(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    """`tuple(layer(x) for layer in layers)`, as one node where that can be.

    That is: every layer is LoRA on an `nn.Linear`, nobody reads the layers' inputs, and the mix weighs each adapter
    by a plain number, or per sample where no gradient is asked for.
    """
    weights = _plain_mix(layers)
    if not weights:
        whole = _joined(layers) and routed(tuple(layers), x)
        return whole or tuple(layer(x) for layer in layers)
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    first: LoraLinear = layers[0]
    if (folding := first.folding(x)) and len({s.base.bias is None for s in layers}) == 1:
        return tuple(folded(tuple(layers), x, folding).split_with_sizes([s.features[1] for s in layers], -1))
    if dtype == x.dtype and any(s.lora_A[n].dtype != dtype for s in layers for n in weights):
        return tuple(layer(x) for layer in layers)  # a base in half precision under adapters in fp32
    mask = None
    if first.spec.dropout and first.training:
        mask = _mask(x, first.spec.dropout)
    As = [_cat([s.lora_A[n] for n in weights], 0) for s in layers]
    Bs = [_cat([s.lora_B[n] if w == 1 else s.lora_B[n] * w for n, w in weights.items()], 1) for s in layers]
    frozen = [t for s in layers for t in (s.base.weight, s.base.bias)]
    tensors = (*frozen, *As, *Bs)
    node: Any = _Together
    out: tuple[Tensor, ...] = node.apply(x, mask, dtype, first.spec.scale, len(layers), *tensors)
    return out


def _plain_mix(layers: Sequence[Any]) -> dict[str, float]:
    """The adapters that are on, if every layer can join a group; else nothing."""
    if not _joined(layers):
        return {}
    active = layers[0].active()
    if any(isinstance(w, Tensor) for _, w in active):
        return {}
    return {n: float(w) for n, w in active}


def _joined(layers: Sequence[Any]) -> bool:
    plain = all(isinstance(s, LoraLinear) and type(s.base) is nn.Linear for s in layers)
    return plain and not layers[0].bank.read


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _mask(x: Tensor, p: float) -> Tensor:
    """Dropout's factor per entry, 0 or 1 / (1 - p). On a CPU, four 16-bit numbers from each random word."""
    if x.device.type != "cpu":
        return F.dropout(torch.ones_like(x), p, training=True)
    n = x.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[:n] >= round(p * 65536) - 32768  # p to within 2^-17
    return kept.view(x.shape).to(x.dtype).mul_(1 / (1 - p))


class _Together(Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, mask: Tensor | None, dtype: torch.dtype, scale: float, K: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        b, A = tensors[1 : 2 * K : 2], tensors[2 * K : 3 * K]
        x_MD = x.reshape(-1, x.shape[-1])
        seen = x_MD.to(dtype) if mask is None else (x_MD * mask.view(x_MD.shape)).to(dtype)
        x_MD = x_MD.to(dtype)
        W, B = [w.to(dtype) for w in tensors[: 2 * K : 2]], [c.to(dtype) for c in tensors[3 * K :]]
        A_RD = torch.cat([a.to(dtype) for a in A])
        h_MR = seen @ A_RD.t()
        out, at = [], 0
        for w, bias, c in zip(W, b, B, strict=True):
            y = F.linear(x_MD, w, None if bias is None else bias.to(dtype))
            out.append(y.addmm_(h_MR[:, at : at + c.shape[1]], c.t(), alpha=scale).view(*x.shape[:-1], -1))
            at += c.shape[1]
        ctx.save_for_backward(seen, h_MR, A_RD, mask, *W, *B)
        ctx.scale, ctx.K = scale, K
        ctx.like = (x.shape, x.dtype)
        ctx.ranks, ctx.outer = [a.shape[0] for a in A], A[0].dtype
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        seen, h_MR, A_RD, mask, *rest = ctx.saved_tensors
        W, B = rest[: ctx.K], rest[ctx.K :]
        g = [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        back_MR = torch.empty_like(h_MR)
        dB, at = [], 0
        for dy, c, r in zip(g, B, ctx.ranks, strict=True):
            torch.mm(dy, c, out=back_MR[:, at : at + r])
            dB.append((dy.t() @ h_MR[:, at : at + r]).to(ctx.outer).mul_(ctx.scale))
            at += r
        back_MR.mul_(ctx.scale)
        dA = (back_MR.t() @ seen).to(ctx.outer).split(ctx.ranks)
        dx = None
        if ctx.needs_input_grad[0]:
            shape, dtype = ctx.like
            dx = g[0] @ W[0]
            for dy, w in zip(g[1:], W[1:], strict=True):
                dx.addmm_(dy, w)
            if mask is None:
                dx = dx.addmm_(back_MR, A_RD).to(dtype)
            else:
                dx = dx.to(dtype).addcmul_((back_MR @ A_RD).to(dtype), mask.view(dx.shape))
            dx = dx.view(shape)
        return (dx, None, None, None, None, *[None] * (2 * ctx.K), *dA, *dB)
