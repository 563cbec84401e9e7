"""Where the loop runs: one process, or several under `accelerate launch` or `torchrun`.

Each process has a copy of the model. Adapters are small, so the engine sums their gradients itself in one
flat all-reduce per step and the frozen base is never wrapped. Sharded engines (FSDP, DeepSpeed ZeRO) hide
whole gradients and parameters from the methods; they are refused by name, not worked around in silence.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from retain.method import FULL_GRADS, FULL_PARAMS, Method
from retain.types import RetainError

SHARDED = ("fsdp", "deepspeed")
OFFERS = {
    "single": frozenset({FULL_GRADS, FULL_PARAMS}),
    "ddp": frozenset({FULL_GRADS, FULL_PARAMS}),
    **dict.fromkeys(SHARDED, frozenset[str]()),
}


@dataclass
class Engine:
    """Rank, world size and the few collectives that the loop needs; `Engine.start()` asks the launcher."""

    name: str = "single"
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def start(device: str = "auto") -> Engine:
        """The engine that the launcher set up; without a launcher one process."""
        for kind in SHARDED:  # named only: their process groups are never started, `check` refuses them
            if os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "false").lower() in {"1", "true"}:
                rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
                return Engine(kind, rank, world)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            chosen = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
            return Engine(device=torch.device(chosen))
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return Engine("ddp", state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    def check(self, method: Method) -> None:
        """Refuse, by name and before anything is trained, what this engine cannot give."""
        for part in method.parts:
            lacking = sorted(part.needs - OFFERS[self.name])
            if lacking:
                able = [n for n, offer in OFFERS.items() if part.needs <= offer]
                raise RetainError(
                    f"method {part.name!r} needs {lacking}, which engine {self.name!r} hides; use {able}"
                )
        if self.name in SHARDED:
            raise RetainError(
                f"engine {self.name!r} shards the base model, which retain does not drive; "
                f"use data-parallel processes (accelerate launch --multi_gpu) or one process"
            )

    def total(self, *numbers: float) -> list[float]:
        """Sums over processes, exact for whole numbers up to 2^53."""
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values)
        return [float(v) for v in values.tolist()]

    def sum_grads(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One flat all-reduce of every gradient. One that no process has stays None."""
        if self.world == 1 or not parameters:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        flat = torch.cat([*(g.reshape(-1) for g in grads), has])
        dist.all_reduce(flat)
        *parts, has = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
        for p, part, n in zip(parameters, parts, has.tolist(), strict=True):
            p.grad = part.view_as(p) if n else None

    def gather(self, value: Any) -> list[Any]:
        """The same object of every process, in rank order."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast ("bf16"), or nothing ("fp32")."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: the accelerator's, or this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux, bytes on macOS
