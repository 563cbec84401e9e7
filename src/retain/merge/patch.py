"""Model Tailor: keep a small patch of the tuned weights, go back to the old ones elsewhere, and compensate.

Zhu et al., "Model Tailor", ICML 2024 (arXiv 2402.12048). For a linear layer with weights W0 before and W1 after
tuning and inputs X on the target task:

    H = 2/N X X^T + damp mean(diag H) I,    U = upper Cholesky factor of H^-1
    salience |W - W0|;  sensitivity (W - W0)^2 / (2 U_jj^2)  ("obs")  or  W^2 / U_jj^2  ("code")
    score = w z(salience) + (1 - w) z(sensitivity),   z per row in a block of columns; the lowest share is reset
    column by column:  e = (w_j - q_j) / U_jj,   W_:k <- W_:k - e U_jk  for the columns k after j

Salience (and "obs") look at what tuning changed, W1 - W0, also in blocks whose weights compensation has moved by
then; "code" looks at the weights as they are when their block comes. Both as released.

q_j is the column with its reset entries at W0, so those end exactly there, and the others take over what was lost.
Optimal brain surgeon theory (and SparseGPT) subtract; the released code adds (`sign=+1`), which in our tests is
worse than no compensation. The released sensitivity is "code"; "obs" is the paper's derivation as we know it,
unverified. Of a block of n entries the release resets int(sparsity n) + 1 and those equal to the last of them, here
round(sparsity n), so that 0 is off.
"""

# O out features, I in features, N samples

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from retain.types import RetainError


def model_tailor(W0: Tensor, W1: Tensor, x_NI: Tensor, **how: Any) -> Tensor:
    """The patched weight (O, I) from a layer's inputs (N, I); `how` are the options of `patched`."""
    if x_NI.ndim != 2:
        raise RetainError(f"model_tailor: inputs (N, I) are needed, not {tuple(x_NI.shape)}")
    return patched(W0, W1, moments(x_NI), **how)


def patched(
    W0: Tensor,
    W1: Tensor,
    H_II: Tensor,
    *,
    sparsity: float = 0.9,
    sensitivity: str = "obs",
    decorate: bool = True,
    sign: int = -1,
    w: float = 0.5,
    damp: float = 0.01,
    block: int = 128,
) -> Tensor:
    """The patched weight (O, I) from the inputs' second moments H = 2/N X X^T (I, I), before damping.

    `sparsity` of each block's entries equal W0; 0 gives W1 and 1 gives W0, bit for bit.
    """
    if W0.shape != W1.shape or H_II.shape != (W0.shape[1], W0.shape[1]):
        raise RetainError(
            f"model_tailor: W0 {tuple(W0.shape)}, W1 {tuple(W1.shape)} and moments {tuple(H_II.shape)} do not fit"
        )
    if not 0 <= sparsity <= 1 or not 0 <= w <= 1 or damp <= 0 or block < 1 or sign not in (-1, 1):
        raise RetainError(
            "model_tailor: sparsity and w in 0..1, damp > 0, block >= 1 and sign -1 or 1 are needed, "
            f"not {sparsity}, {w}, {damp}, {block}, {sign}"
        )
    if sensitivity not in ("obs", "code"):
        raise RetainError(f"model_tailor.sensitivity: {sensitivity!r} is none of ['obs', 'code']")
    U, old, W = factor(H_II, damp), W0.float(), W1.float().clone()
    moved = (W - old).abs()  # before any compensation, as released
    for start in range(0, W.shape[1], block):
        end = min(start + block, W.shape[1])
        keep = _kept(moved[:, start:end], W[:, start:end], U.diagonal()[start:end], sparsity, sensitivity, w)
        for j in range(start, end):
            back = torch.where(keep[:, j - start], W[:, j], old[:, j])
            if decorate:
                e_O = (W[:, j] - back) / U[j, j]
                W[:, j + 1 :] += sign * torch.outer(e_O, U[j, j + 1 :])
            W[:, j] = back
    return W.to(W1.dtype)


def moments(x_NI: Tensor) -> Tensor:
    """2/N X X^T (I, I) in fp32."""
    x = x_NI.float()
    return 2 / len(x) * x.T @ x


def factor(H_II: Tensor, damp: float) -> Tensor:
    """U (I, I), upper, with U^T U = H^-1; fp32. A column that never fires gets H_jj = 1."""
    H = H_II.float().clone()
    H.diagonal()[H.diagonal() == 0] = 1.0
    H.diagonal().add_(damp * H.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H.double()))
    U_II: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return U_II


def _kept(moved: Tensor, W: Tensor, u: Tensor, sparsity: float, sensitivity: str, w: float) -> Tensor:
    """Which entries of a block stay: all but the `sparsity` share with the lowest score."""
    felt = moved**2 / (2 * u**2) if sensitivity == "obs" else W**2 / u**2
    score = w * _z(moved) + (1 - w) * _z(felt)
    reset = round(sparsity * W.numel())
    keep = torch.ones(W.numel(), dtype=torch.bool, device=W.device)
    keep[score.flatten().argsort(stable=True)[:reset]] = False
    return keep.view(W.shape)


def _z(t: Tensor) -> Tensor:
    return (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True, correction=0).clamp(min=1e-12)
