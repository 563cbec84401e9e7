"""ModalPrompt (arXiv 2410.05849) and MoELoRA (CoIN, arXiv 2403.08350), one sample, prompt and expert at a time, from
the specification of the released codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def prototype(t: Mapping[str, Tensor]) -> Tensor:
    """The mean over the prompt's rows of W2 silu(W1 x + b1) + b2."""
    rows = []
    for x in t["tokens"]:
        h = t["in_weight"] @ x + t["in_bias"]
        rows.append(t["out_weight"] @ (h / (1 + torch.exp(-h))) + t["out_bias"])
    return sum(rows, torch.zeros(())) / len(rows)


def guidance(image: Tensor, text: Tensor, p: Tensor, lam: float) -> float:
    """lam cos(v, p) + (1 - lam) cos(u, p); the two features lie in spaces of their own here."""
    alpha = cosine_similarity(image, p[: len(image)], dim=0)
    beta = cosine_similarity(text, p[len(image) :], dim=0)
    return float(lam * alpha + (1 - lam) * beta)


def losses(images: Sequence[Tensor], texts: Sequence[Tensor], p: Tensor) -> Tensor:
    """[1 - mean cos(v, p)] + [1 - mean cos(u, p)]."""
    n = len(images[0])
    image = [cosine_similarity(v, p[:n], dim=0) for v in images]
    text = [cosine_similarity(u, p[n:], dim=0) for u in texts]
    return (1 - sum(image) / len(image)) + (1 - sum(text) / len(text))


def training_order(scores: Sequence[float], K: int) -> list[int]:
    """Prompts from far to near while training task t; `scores` are those of the t - 1 old ones."""
    t = len(scores) + 1
    if t <= K - 1:
        return list(range(t))
    best = sorted(range(t - 1), key=lambda i: scores[i])[-(K - 1) :] if K > 1 else []
    return [*best, t - 1]


def inference_order(scores: Sequence[float], K: int) -> list[int]:
    """The min(K, t) best of all, the best nearest to the input."""
    return sorted(range(len(scores)), key=lambda i: scores[i])[-K:]


def moe(
    x: Tensor, W: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], R: Tensor, alpha: float, r: int
) -> Tensor:
    """One token through W x + (alpha / r) sum_e softmax(R x)_e B_e A_e x."""
    gates = torch.exp(R @ x) / torch.exp(R @ x).sum()
    y = W @ x
    for e in range(len(A)):
        y = y + alpha / r * gates[e] * (B[e] @ (A[e] @ x))
    return y
