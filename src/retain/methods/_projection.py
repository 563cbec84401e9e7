"""Weights that may change only outside protected input directions, whatever the optimizer.

    g <- g - (g M) M^T                             before the step
    W <- W_0 + C - (C M) M^T,   C = W - W_0        after it; W_0: the weights that the task began with

M (D, K) has orthonormal columns on the input side of W (O, D). Projecting the gradient alone protects nothing under
Adam, which rescales every coordinate, or under weight decay, which pulls along W: the accumulated change is projected
after each step. The gradient is projected all the same: then Adam's moments belong to what may move, and the projected
step still goes downhill.

All tensors of one shape are one batch: a group costs a few products per step and never waits for the device.
"""

# G tensors of one shape, O output features, D input features, K protected directions, N rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Group = dict[str, Any]
"""What is kept during a task, as plain state: `keys`, `start` (G, O, D), `basis` (G, D, K)."""


def outside(change_GOD: Tensor, basis_GDK: Tensor) -> Tensor:
    """The change without its part along the basis. Zero columns protect nothing, so bases are padded with them."""
    return torch.baddbmm(change_GOD, change_GOD @ basis_GDK, basis_GDK.mT, alpha=-1)


def guarded(live: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> list[Group]:
    """Groups for the tensors that have a basis; their weights as they are now are what the change is counted from.

    A vector (O,) counts as (O, 1): with the basis [[1]] it stays as it is.
    """
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for key, basis in bases.items():
        if basis.shape[1]:
            by_shape.setdefault(tuple(live[key].shape), []).append(key)
    groups = []
    for keys in by_shape.values():
        wide = max(bases[k].shape[1] for k in keys)
        padded = [torch.nn.functional.pad(bases[k].float(), (0, wide - bases[k].shape[1])) for k in keys]
        start = _stack([live[k].detach() for k in keys])
        groups.append({"keys": keys, "start": start, "basis": torch.stack(padded).to(start.device)})
    return groups


@torch.no_grad()
def project_grads(groups: Sequence[Group], live: Mapping[str, Parameter]) -> None:
    """Before the step: gradients leave the protected directions."""
    for group in groups:
        rows = [(i, p.grad) for i, k in enumerate(group["keys"]) if (p := live[k]).grad is not None]
        grads = [g for _, g in rows if g is not None]
        if grads:
            whole = len(grads) == len(group["keys"])
            basis = group["basis"] if whole else group["basis"][[i for i, _ in rows]]
            _write(grads, outside(_stack(grads), basis))


@torch.no_grad()
def project_update(groups: Sequence[Group], live: Mapping[str, Parameter]) -> None:
    """After the step: what the weights have changed since the task began leaves the protected directions."""
    for group in groups:
        params = [live[k].detach() for k in group["keys"]]
        change = _stack(params).sub_(group["start"])
        _write(params, outside(change, group["basis"]).add_(group["start"]))


def grown(basis_DK: Tensor | None, rows_ND: Tensor, threshold: float) -> Tensor:
    """The basis with the fewest new directions that capture `threshold` of the rows' energy |R|^2 (GPM).

    What the basis spans counts as captured; new directions are the strongest right singular vectors of the rest.
    Columns are orthonormal; there are never more than D. fp32.
    """
    rows_ND = rows_ND.float()
    basis_DK = rows_ND.new_zeros(rows_ND.shape[1], 0) if basis_DK is None else basis_DK.to(rows_ND.device)
    rest_ND = rows_ND - (rows_ND @ basis_DK) @ basis_DK.mT
    total, left = float(rows_ND.square().sum()), float(rest_ND.square().sum())
    wanted = threshold * (1 - 1e-6) * total - (total - left)  # rounding asks for no direction
    if wanted <= 0:
        return basis_DK
    _, sigma, V_hD = torch.linalg.svd(rest_ND, full_matrices=False)
    n = 1 + int((sigma.square().cumsum(0) < wanted).sum())
    new_DK = V_hD[: min(n, basis_DK.shape[0] - basis_DK.shape[1])].mT
    new_DK = new_DK - basis_DK @ (
        basis_DK.mT @ new_DK
    )  # once more: the rest was only free of M up to rounding
    return torch.cat([basis_DK, torch.linalg.qr(new_DK).Q], dim=1)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(G, O, D) in fp32, a new tensor."""
    return torch.stack([t.float() if t.ndim > 1 else t.float()[:, None] for t in tensors])


def _write(tensors: Sequence[Tensor], values_GOD: Tensor) -> None:
    torch._foreach_copy_(list(tensors), [v.view(t.shape) for t, v in zip(tensors, values_GOD, strict=True)])
