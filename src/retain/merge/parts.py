"""One module's change as a low-rank product or as a dense tensor, and the linear algebra that merging needs.

An adapter state maps `path.lora_A`, `path.lora_B` to factors and `path.<anything else>` to a dense change
(`weight` of a projector, `bias`). A low-rank change is never multiplied out where a product of small
matrices says the same: its truncated SVD costs two QR decompositions and an SVD of a K x K core.

    B A = (Q_B R_B)(Q_A R_A)^T = Q_B (U S V^T) Q_A^T,   U S V^T = svd(R_B R_A^T)
"""

# O out features, I in features, R rank, K summed rank

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retain.types import RetainError, State

EXACT = 512
"""Up to this side a dense matrix is decomposed by LAPACK; above it by subspace iteration."""


@dataclass(frozen=True, eq=False)
class Low:
    """A change B A with B (O, R) and A (R, I)."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I), as the dense change has it."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    @property
    def rank(self) -> int:
        """Columns of B."""
        return int(self.A.shape[0])

    def dense(self) -> Tensor:
        """The product."""
        return self.B @ self.A


Part = Low | Tensor


def shape(part: Part) -> tuple[int, ...]:
    """The shape of the dense change."""
    return part.shape if isinstance(part, Low) else tuple(part.shape)


def dense(part: Part) -> Tensor:
    """The change as one tensor of its own, safe to write into."""
    return part.dense() if isinstance(part, Low) else part.clone()


def scaled(part: Part, c: float) -> Part:
    """c times a change; a low-rank one in B, so that A stays as it is."""
    if c == 1:
        return part
    return Low(part.B * c, part.A) if isinstance(part, Low) else part * c


def total(parts: Sequence[Part], weights: Sequence[float]) -> Part:
    """sum_n w_n dW_n; exact and of summed rank where every part is low rank. A weight of 0 adds no rank."""
    on = [(p, w) for p, w in zip(parts, weights) if w] or [(parts[0], 0.0)]
    parts, weights = [p for p, _ in on], [w for _, w in on]
    low = [p for p in parts if isinstance(p, Low)]
    if len(low) == len(parts):
        B = [p.B if w == 1 else p.B * w for p, w in zip(low, weights)]
        return (
            low[0]
            if len(low) == 1 and weights[0] == 1
            else Low(torch.cat(B, 1), torch.cat([p.A for p in low]))
        )
    out = dense(parts[0]) * weights[0]
    for p, w in zip(parts[1:], weights[1:]):
        out.add_(dense(p), alpha=w)
    return out


def inner(a: Part, b: Part) -> float:
    """<a, b>, the sum of products of entries; low-rank parts are not multiplied out."""
    if isinstance(a, Low) and isinstance(b, Low):
        return float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())
    return float((dense(a).double() * dense(b).double()).sum())


# -- singular values -------------------------------------------------------------------------------------


def svd(part: Part, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, k), S (k,), V^T (k, I) of a matrix, largest first, k = `rank` or all that the matrix can have.

    A large dense matrix is decomposed by subspace iteration from a fixed start (Halko et al. 2011, arXiv
    0909.4061, algorithm 4.4) until the captured energy stands still; everything else exactly.
    """
    if isinstance(part, Low):
        Q_B, R_B = torch.linalg.qr(part.B.double())
        Q_A, R_A = torch.linalg.qr(part.A.double().T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
        k = len(S) if rank is None else min(rank, len(S))
        out = Q_B @ U[:, :k], S[:k], Vh[:k] @ Q_A.T
        return out[0].to(part.B.dtype), out[1].to(part.B.dtype), out[2].to(part.B.dtype)
    side = min(part.shape)
    k = side if rank is None else min(rank, side)
    if side <= EXACT or 4 * k >= side:
        U, S, Vh = torch.linalg.svd(part, full_matrices=False)
        return U[:, :k], S[:k], Vh[:k]
    return _subspace(part, k)


def _subspace(
    D: Tensor, k: int, *, extra: int = 16, rounds: int = 12, still: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.randn(D.shape[1], k + extra, generator=torch.Generator().manual_seed(0)).to(D)
    Q = torch.linalg.qr(D @ start).Q
    energy = 0.0
    for _ in range(rounds):
        P = torch.linalg.qr(D.T @ Q).Q
        Y = D @ P
        Q = torch.linalg.qr(Y).Q
        now = float(Y.square().sum())
        if now - energy <= still * now:
            break
        energy = now
    U, S, Vh = torch.linalg.svd(Q.T @ D, full_matrices=False)
    return (Q @ U)[:, :k], S[:k], Vh[:k]


def truncated(part: Part, rank: int) -> tuple[Low, float]:
    """The best change of at most `rank`, and the relative error |dW - BA| / |dW| (Frobenius)."""
    if isinstance(part, Low) and part.rank <= rank:
        return part, 0.0
    whole = inner(part, part) if isinstance(part, Low) else float(part.double().square().sum())
    U, S, Vh = svd(part, rank)
    kept = float(S.double().square().sum())
    lost = max(0.0, whole - kept)
    return Low((U * S).contiguous(), Vh.contiguous()), (lost / whole) ** 0.5 if whole else 0.0


def full(part: Part) -> Low:
    """A dense matrix as factors without loss; the rank is that of the matrix."""
    if isinstance(part, Low):
        return part
    U, S, Vh = torch.linalg.svd(part, full_matrices=False)
    k = max(1, int((S[:1] * max(part.shape) * torch.finfo(S.dtype).eps < S).sum()))
    return Low((U[:, :k] * S[:k]).contiguous(), Vh[:k].contiguous())


# -- states ----------------------------------------------------------------------------------------------


def split(state: State) -> dict[str, Part]:
    """A state by module: `path` to factors, `path.leaf` to a dense change, in the state's order, in fp32."""
    out: dict[str, Part] = {}
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        if leaf == "lora_A":
            if f"{path}.lora_B" not in state:
                raise RetainError(f"{path}: lora_A without lora_B")
            B = state[f"{path}.lora_B"]
            if tensor.ndim != 2 or B.ndim != 2 or B.shape[1] != tensor.shape[0]:
                raise RetainError(
                    f"{path}: lora_A {tuple(tensor.shape)} and lora_B {tuple(B.shape)} are no factors of a matrix"
                )
            out[path] = Low(B.float(), tensor.float())
        elif leaf == "lora_B":
            if f"{path}.lora_A" not in state:
                raise RetainError(f"{path}: lora_B without lora_A")
        else:
            out[key] = tensor.float()
    return out


def join(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """The inverse of `split`."""
    out: dict[str, Tensor] = {}
    for path, part in parts.items():
        if isinstance(part, Low):
            out[f"{path}.lora_A"], out[f"{path}.lora_B"] = part.A, part.B
        else:
            out[path] = part
    return out


def chunks(parts: Mapping[str, Part], rank: int) -> list[dict[str, Tensor]]:
    """A state of any ranks as several states of exactly `rank`, whose sum it is.

    A bank has one rank; the mix of these adapters with weight 1 each is the whole. Dense parts go with the
    first alone.
    """
    K = max([-(-p.rank // rank) for p in parts.values() if isinstance(p, Low)] or [1])
    out: list[dict[str, Tensor]] = []
    for i in range(K):
        state: dict[str, Tensor] = {}
        for path, p in parts.items():
            if isinstance(p, Low):
                A, B = p.A[i * rank : (i + 1) * rank], p.B[:, i * rank : (i + 1) * rank]
                lack = rank - A.shape[0]
                state[f"{path}.lora_A"] = (
                    torch.cat([A, A.new_zeros(lack, A.shape[1])]) if lack else A.contiguous()
                )
                state[f"{path}.lora_B"] = (
                    torch.cat([B, B.new_zeros(B.shape[0], lack)], 1) if lack else B.contiguous()
                )
            elif i == 0:
                state[path] = p
        out.append(state)
    return out
