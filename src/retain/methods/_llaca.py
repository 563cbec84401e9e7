"""What LLaCA's rates are made of: sums over tensors in few passes, shared over groups, and how far an average came.

No copy of a gradient, no wait for the device. `retain.methods.llaca` has the formulas.
"""

# S sums, K tensors

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg.blas import sasum, sdot
from torch import Tensor

RELEASED = 128 * 4096
"""Entries of a tensor for which the released constants were chosen: LoRA of rank 128 on a hidden size of 4,096.

Of a layer's fourteen LoRA tensors in LLaVA-1.5-7B eleven have that many: A and B of q, k, v and o, A of gate and up, B of
down. The other three have 128 x 11,008, the projector's matrices 1,024 x 4,096 and 4,096 x 4,096.
"""
SAMPLE = 4093
"""Entries of a tensor by which the way of its average is measured; a prime, so that no row or column is met alone."""


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
    theta, average = [f.theta.float() for f in fives], [f.average.float() for f in fives]
    grad, last_grad = [f.grad.float() for f in fives], [f.last_grad.float() for f in fives]
    last_theta = [f.last_theta for f in fives if f.last_theta is not None]
    d, dg = list(torch._foreach_sub(theta, average)), list(torch._foreach_sub(grad, last_grad))
    dtheta = list(torch._foreach_sub(theta, last_theta)) if last_theta else []
    if inner:
        pairs = [(d, d), (grad, d), (dg, dtheta), (dtheta, dtheta)]
        return torch.stack([torch.stack([x.sum() for x in torch._foreach_mul(a, b)]) for a, b in pairs])
    return torch.stack([torch.stack(torch._foreach_norm(x, 1)) for x in (d, grad, dg, dtheta) if x])


# -- sums that tensors share, and sums as at the released size ----------------------------------------------


def pooled(sums_SK: Tensor, groups_K: Sequence[Hashable]) -> Tensor:
    """Every tensor gets the sums of its whole group, (S, K): those of one group then have one rate."""
    index = {g: i for i, g in enumerate(dict.fromkeys(groups_K))}
    at_K = torch.tensor([index[g] for g in groups_K], device=sums_SK.device)
    pools_SG = sums_SK.new_zeros(len(sums_SK), len(index)).index_add_(1, at_K, sums_SK)
    return pools_SG[:, at_K]


def entries(numbers_K: Sequence[int], groups_K: Sequence[Hashable] | None) -> list[float]:
    """How many entries the sums of each tensor are taken over."""
    if groups_K is None:
        return [float(n) for n in numbers_K]
    totals: dict[Hashable, float] = {}
    for n, g in zip(numbers_K, groups_K, strict=True):
        totals[g] = totals.get(g, 0.0) + n
    return [totals[g] for g in groups_K]


def as_released(sums_SK: Tensor, entries_K: Sequence[float]) -> Tensor:
    """L1 sums as RELEASED times the mean: what a tensor with the same entries has at the released size."""
    return sums_SK * torch.tensor([RELEASED / n for n in entries_K], device=sums_SK.device)


# -- the average ----------------------------------------------------------------------------------------------------


def towards(average: Tensor, theta: Tensor, alpha: Tensor | float) -> None:
    """average <- (1 - alpha) average + alpha theta, in place.

    In fp32 by one fused operation; in bf16 as released, each of the three operations rounded to eight bits.
    """
    if average.dtype == torch.float32:
        average.lerp_(theta.float(), alpha)  # type: ignore[arg-type]
    else:
        average.mul_(1 - alpha).add_(theta.to(average.dtype) * alpha)


# -- how far it came --------------------------------------------------------------------------------------------------


def sampled(t: Tensor) -> Tensor:
    """Entries of a tensor, spread evenly, in fp32: all of up to SAMPLE, else SAMPLE."""
    flat = t.detach().reshape(-1)
    if flat.numel() > SAMPLE:
        flat = flat[torch.arange(SAMPLE, device=flat.device) * flat.numel() // SAMPLE]
    return flat.to(torch.float32, copy=True)


def distances(starts: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Tensor:
    """|now - start|_1 of each tensor, (K,), in the order of `now`; from a sample where a tensor is large."""
    found = [(sampled(t) - starts[k].to(t.device)).abs().mean() * t.numel() for k, t in now.items()]
    return torch.stack(found) if found else torch.zeros(0)
