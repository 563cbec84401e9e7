"""Weights that may change only outside protected input directions, whatever the optimizer.

    g <- g - (g M) M^T                             before the step
    W <- W_0 + C - (C M) M^T,   C = W - W_0        after it; W_0: the weights that the task began with

M (D, K) has orthonormal columns on the input side of W (O, D). Projecting the gradient alone protects nothing under
Adam, which rescales every coordinate, or under weight decay, which pulls along W: the accumulated change is projected
after each step. The gradient is projected all the same: then Adam's moments belong to what may move, and the projected
step still goes downhill.

Tensors that read one input (q, k, v) share one basis, of which no copy is made: their rows are one matrix, and a group
costs a few products per step and never waits for the device.

M is found from a `Sketch`: rows are added as they are met and a bounded number of them is kept.
"""

# R rows of all tensors of a group, O output features, D input features, K protected directions, N rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

Group = dict[str, Any]
"""What is kept during a task, as plain state: `keys`, `basis` (its name), `start` (R, D)."""

SKETCH = 512
"""Directions of one task's inputs that a sketch keeps; twice as many rows are in memory at most."""


def outside(change_RD: Tensor, basis_DK: Tensor) -> Tensor:
    """The change without its part along the basis."""
    return torch.addmm(change_RD, change_RD @ basis_DK, basis_DK.mT, alpha=-1)


def guarded(live: Mapping[str, Tensor], basis_of: Mapping[str, str]) -> list[Group]:
    """Groups of the tensors that share a basis, by its name; what they are now is what the change is counted from.

    A vector (O,) counts as (O, 1): with the basis [[1]] it stays as it is.
    """
    by_basis: dict[str, list[str]] = {}
    for key, name in basis_of.items():
        by_basis.setdefault(name, []).append(key)
    return [
        {"keys": keys, "basis": name, "start": _rows([live[k].detach() for k in keys])}
        for name, keys in by_basis.items()
    ]


@torch.no_grad()
def project_grads(
    groups: Sequence[Group], live: Mapping[str, Parameter], bases: Mapping[str, Tensor]
) -> None:
    """Before the step: gradients leave the protected directions."""
    for group in groups:
        grads = [g for key in group["keys"] if (g := live[key].grad) is not None]
        if grads:
            _write(grads, outside(_rows(grads), bases[group["basis"]]))


@torch.no_grad()
def project_update(
    groups: Sequence[Group], live: Mapping[str, Parameter], bases: Mapping[str, Tensor]
) -> None:
    """After the step: what the weights have changed since the task began leaves the protected directions."""
    for group in groups:
        params = [live[key].detach() for key in group["keys"]]
        change = _rows(params).sub_(group["start"])
        _write(params, outside(change, bases[group["basis"]]).add_(group["start"]))


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """(R, D) in fp32, a new tensor."""
    return torch.cat([t.float() if t.ndim > 1 else t.float()[:, None] for t in tensors])


def _write(tensors: Sequence[Tensor], values_RD: Tensor) -> None:
    parts = values_RD.split([len(t) for t in tensors])
    torch._foreach_copy_(list(tensors), [v.view(t.shape) for t, v in zip(tensors, parts, strict=True)])


class Sketch:
    """Rows of an input as what counts of them: their energy, and the rest S of them beside a basis, in bounded memory.

    With R the rest of all rows beside the basis, S^T S = R^T R where D is at most SKETCH, or the rows at most twice
    that, or the directions that occur. Else S^T S <= R^T R: the weakest directions are dropped (incremental SVD) and
    their energy counts as not captured, so that a basis that captures enough of S captures enough of the rows.
    """

    def __init__(self, basis_DK: Tensor) -> None:
        self.basis_DK, self.n_kept = basis_DK, min(SKETCH, len(basis_DK))
        self.rest_ND = basis_DK.new_zeros(0, len(basis_DK))
        self.energy, self.left = basis_DK.new_zeros(()), basis_DK.new_zeros(())  # of all rows; of their rest

    def add(self, rows_ND: Tensor) -> None:
        """Rows that were met, fp32."""
        rest_ND = outside(rows_ND, self.basis_DK)
        self.energy += rows_ND.square().sum()
        self.left += rest_ND.square().sum()
        for part in rest_ND.split(SKETCH):
            if len(self.rest_ND) + len(part) > 2 * SKETCH:
                self.rest_ND = strongest(self.rest_ND, self.n_kept)
            self.rest_ND = torch.cat([self.rest_ND, part])

    def grown(self, threshold: float) -> Tensor:
        """The basis with the fewest new directions that capture `threshold` of the rows' energy |R|^2 (GPM).

        What the basis spans counts as captured; new directions are the strongest right singular vectors of the rest.
        Columns are orthonormal; there are never more than D. fp32.
        """
        basis_DK, energy, left = self.basis_DK, float(self.energy), float(self.left)
        wanted = threshold * (1 - 1e-6) * energy - (energy - left)  # rounding asks for no direction
        if wanted <= 0:
            return basis_DK
        Q_Dn, R_nN = torch.linalg.qr(strongest(self.rest_ND, len(basis_DK)).mT)
        _, sigma, W = torch.linalg.svd(R_nN.mT, full_matrices=False)
        n = 1 + int((sigma.square().cumsum(0) < wanted).sum())
        new_DK = Q_Dn @ W[: min(n, basis_DK.shape[0] - basis_DK.shape[1])].mT
        # once more: the rest was only free of M up to rounding
        new_DK = new_DK - basis_DK @ (basis_DK.mT @ new_DK)
        return torch.cat([basis_DK, torch.linalg.qr(new_DK).Q], dim=1)

    @property
    def dropped(self) -> float:
        """The share of the rows' energy that lies in directions which were dropped."""
        lost = float(self.left - self.rest_ND.square().sum()) / max(float(self.energy), 1e-30)
        return lost if lost > 1e-5 else 0.0  # rounding


def spanned(bases_DK: Sequence[Tensor], tolerance: float = 1e-4) -> Tensor:
    """Orthonormal columns that span all of several bases; what is less than `tolerance` outside the others is rounding."""
    if len(bases_DK) == 1:
        return bases_DK[0]
    U_DK, sigma_K, _ = torch.linalg.svd(torch.cat(list(bases_DK), dim=1), full_matrices=False)
    kept: Tensor = U_DK[:, sigma_K > tolerance]
    return kept


def strongest(rows_ND: Tensor, n: int) -> Tensor:
    """At most n rows S with S^T S = R^T R in its n strongest directions: no loss where n is D."""
    if len(rows_ND) <= n:
        return rows_ND
    if n >= rows_ND.shape[1]:
        triangle: Tensor = torch.linalg.qr(rows_ND, mode="r").R
        return triangle
    turn_NN: Tensor = torch.linalg.eigh(rows_ND @ rows_ND.mT).eigenvectors  # ascending
    return turn_NN[:, -n:].mT @ rows_ND  # a rotation of rows changes no R^T R
