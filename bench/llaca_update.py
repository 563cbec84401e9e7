"""LLaCA's update: ours over the released arithmetic (written from its formula), the same tensors, one thread.

    python bench/llaca_update.py [--variant official] [--repeats 9]

452 tensors and 40 M entries: the LoRA factors (rank 32) of all 7 linear layers in 32 blocks of width 1792,
and a two-layer projector. Both sides get the same fp32 tensors and new gradients in every round and take turns,
so that a busy neighbour hits both. Time is CPU time of this thread. Prints JSON: median, quartiles, the ratio
of each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import torch
from torch import Tensor
from torch.nn import Parameter

from retain.methods.llaca import Llaca

WIDTH, INNER, RANK, BLOCKS, VISION = 1792, 4816, 32, 32, 1024


def shapes() -> list[tuple[int, ...]]:
    """Of every trained tensor."""
    attention = [(RANK, WIDTH), (WIDTH, RANK)] * 4
    mlp = [(RANK, WIDTH), (INNER, RANK)] * 2 + [(RANK, INNER), (WIDTH, RANK)]
    return (attention + mlp) * BLOCKS + [(WIDTH, VISION), (WIDTH,), (WIDTH, WIDTH), (WIDTH,)]


class Released:
    """The released arithmetic: three norms and a host value per tensor, a new average, a copied gradient."""

    def __init__(self) -> None:
        self.E: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def step(self, params: dict[str, Parameter]) -> None:
        for k, p in params.items():
            assert p.grad is not None
            if k not in self.E:
                self.E[k] = p.data.clone()
            alpha = 0.01
            if k in self.last:
                a = torch.norm(p.data - self.E[k], p=1)
                b = torch.norm(p.grad, p=1)
                c = torch.norm(p.grad - self.last[k], p=1)
                rate = 2 * (1 + b) / (a * c)
                alpha = rate if 0 < rate < 1 else 0.01  # type: ignore[assignment]
            self.E[k] = (1 - alpha) * self.E[k] + alpha * p.data
            self.last[k] = p.grad.clone()


class Bank:
    """As much of an adapter bank as the method asks for."""

    def __init__(self, params: dict[str, Parameter]) -> None:
        self.params = params

    def trainable(self) -> dict[str, Parameter]:
        return self.params

    def group(self, key: str) -> str:
        return "lora"


def measure(variant: str, repeats: int) -> dict[str, Any]:
    """Rounds of: move the weights, new gradients, one update each."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    params = {f"lora/{i}.w": Parameter(torch.randn(s, generator=rng) * 0.01) for i, s in enumerate(shapes())}
    model = SimpleNamespace(adapters=Bank(params), device=torch.device("cpu"))
    ctx = SimpleNamespace(model=model, step=0, task=SimpleNamespace(name="bench"), log=lambda **_: None)
    ours, theirs = Llaca(variant, first_task=True, log_every=10**9), Released()
    ours.begin_task(ctx)  # type: ignore[arg-type]
    times: list[tuple[float, float]] = []
    for i in range(repeats + 2):
        for p in params.values():
            p.grad = p.data * (0.01 if i % 2 else -0.02)  # a new tensor, as after zero_grad(set_to_none=True)
            p.data *= 1.01 if i % 3 else 0.98
        t0 = time.thread_time()
        theirs.step(params)
        t1 = time.thread_time()
        ours.grads(ctx)  # type: ignore[arg-type]
        ours.after_step(ctx)  # type: ignore[arg-type]
        t2 = time.thread_time()
        if i >= 2:  # the first has nothing to compare with, the second warms up
            times.append((1e3 * (t1 - t0), 1e3 * (t2 - t1)))
    if variant == "official":
        worst = max(float((ours.average[k] - theirs.E[k]).abs().max()) for k in params)
        assert worst < 1e-6, (
            worst
        )  # E was made after the first step on both sides up to the fallback of equal weights
    return {
        "what": "llaca_update", "variant": variant, "tensors": len(params),
        "entries": sum(p.numel() for p in params.values()), "rounds": repeats,
        "released_ms": summary([a for a, _ in times]), "ours_ms": summary([b for _, b in times]),
        "ratio": summary([a / b for a, b in times]),
    }  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="official", choices=("official", "paper", "bounded"))
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print(json.dumps(measure(options.variant, options.repeats)))
