"""Where the loop runs: one process, or several under `accelerate launch` or `torchrun`.

Each process has a copy of the model. Adapters are small, so the engine sums their gradients itself in one
flat all-reduce per step and the frozen base is never wrapped. Sharded engines (FSDP, DeepSpeed ZeRO) hide
whole gradients and parameters from the methods; they are refused by name, not worked around in silence.

The group of processes is closed in every ending: left open, its threads can abort a process that is done
("terminate called without an active exception", exit code -6). A process that fails says so and leaves at once,
without waiting for anybody; the others learn of it when they next meet, and name its rank.
"""

from __future__ import annotations

import atexit
import itertools
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Annotated, Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from pydantic import AfterValidator
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from retain.method import FULL_GRADS, FULL_PARAMS, Method
from retain.types import RetainError
from retain.values import check

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others, at the start and wherever they meet. A dead one is noticed at once."""

GRACE = 20.0
"""Seconds that a process waits at its end for the others' last word, so that nobody hangs up while another reads."""

SHARDED = ("fsdp", "deepspeed")
OFFERS = {
    "single": frozenset({FULL_GRADS, FULL_PARAMS}),
    "ddp": frozenset({FULL_GRADS, FULL_PARAMS}),
    **dict.fromkeys(SHARDED, frozenset[str]()),
}


def _kind_of_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|xpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError("is none of ['auto', 'cpu', 'cuda', 'cuda:0', 'mps', 'xpu']")
    return name


Device = Annotated[str, AfterValidator(_kind_of_device)]
"""What `model.device` may be: auto (a CUDA device where there is one), or a kind that torch may have here."""


def device_of(name: str) -> torch.device:
    """The device of that name; RetainError where this machine has none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(Device, name, "model.device")
    kind, _, number = name.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    n = there.get(kind, int(getattr(torch, kind).is_available()) if hasattr(torch, kind) else 0)
    if int(number or 0) >= n:
        has = [k for k, many in there.items() if many]
        raise RetainError(
            f"model.device: {name!r}: this machine has {n} such devices; it has {has}; write auto"
        )
    return torch.device(name)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a driver had no memory left: torch says so of the CPU with a bare RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)


@dataclass
class Engine:
    """Rank, world size and the few collectives that the loop needs; `Engine.start()` asks the launcher."""

    name: str = "single"
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def start(device: str = "auto", patience: timedelta = PATIENCE) -> Engine:
        """The engine that the launcher set up; without a launcher one process.

        Called again it gives the same processes. Use it as a context to close it; what is open when Python ends is
        closed then. Raises RetainError where the processes do not find each other within `patience`.
        """
        world = _from_environment("WORLD_SIZE", 1)
        for kind in SHARDED:  # named only: their process groups are never started, `check` refuses them
            if os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "false").lower() in {"1", "true"}:
                return Engine(kind, _from_environment("RANK", 0), world)
        if world == 1:
            return Engine(device=device_of(device))
        cpu = device == "cpu" or not torch.cuda.is_available()
        if not dist.is_initialized():  # else a script of the user's own opened it, and closes it
            _open("gloo" if cpu else "nccl", patience)
        state = PartialState(cpu=cpu)
        return Engine("ddp", state.process_index, state.num_processes, state.device)

    def close(self, error: BaseException | None = None) -> None:
        """Leave the group, after a word to the others: that this process is done, or with `error` that it failed."""
        if self.world > 1:
            _close(error)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

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
        _meet(dist.all_reduce, values)
        return [float(v) for v in values.tolist()]

    def sum_grads(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """One flat all-reduce of every gradient. One that no process has stays None."""
        if self.world == 1 or not parameters:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        has = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        flat = torch.cat([*(g.reshape(-1) for g in grads), has])
        _meet(dist.all_reduce, flat)
        *parts, has = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
        for p, part, n in zip(parameters, parts, has.tolist(), strict=True):
            p.grad = part.view_as(p) if n else None

    def gather(self, value: Any) -> list[Any]:
        """The same object of every process, in rank order."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        _meet(dist.all_gather_object, out, value)
        return out

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            _meet(dist.barrier)


# -- the group of processes ------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """The group that `Engine.start` opened, with the board where its processes leave each other words."""

    board: Store
    rank: int
    world: int
    patience: timedelta
    said: bool = False

    def say(self, word: str) -> None:
        """Leave a word for the others; the first one stays."""
        if not self.said:
            self.said = True
            with suppress(RuntimeError):  # the process that keeps the board is gone: nobody can read it
                self.board.set(f"{self.rank}", word)

    def heard(self, seconds: float) -> dict[int, str]:
        """What the others said, as soon as all did or one failed; silent ones are missing after so many seconds."""
        found: dict[int, str] = {}
        end = time.monotonic() + seconds
        with suppress(RuntimeError):
            while True:
                for rank in range(self.world):
                    if rank not in found and rank != self.rank and self.board.check([f"{rank}"]):
                        found[rank] = self.board.get(f"{rank}").decode()
                if len(found) == self.world - 1 or time.monotonic() > end:
                    break
                if any(word.startswith(FAILED) for word in found.values()):
                    break
                time.sleep(0.02)
        return found

    def leave(self, seconds: float) -> None:
        """Rank 0 last, which may keep the board: the others have read it then."""
        with suppress(RuntimeError):
            if self.rank:
                self.board.set(f"{self.rank} left", "")
                return
            keys = [f"{rank} left" for rank in range(1, self.world)]
            end = time.monotonic() + seconds
            while not self.board.check(keys) and time.monotonic() < end:
                time.sleep(0.02)

    def lost(self) -> str:
        """Who is missing, after a meeting that did not take place."""
        self.say(ALONE)
        words = self.heard(GRACE)
        failed = [f"rank {rank} {word}" for rank, word in sorted(words.items()) if word.startswith(FAILED)]
        silent = [
            f"no word from rank {r}, which is dead or busy"
            for r in range(self.world)
            if r != self.rank and r not in words
        ]
        ended = [f"rank {rank} ended before" for rank, word in sorted(words.items()) if word == DONE]
        return "; ".join(failed or silent or ended or ["the connection broke"])


FAILED, DONE, ALONE = "failed: ", "done", "lost the others"
_groups: list[_Group] = []  # one, or none
_corners = itertools.count()  # each group of this process has its own corner of the launcher's store


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise RetainError(f"the launcher's variable {name} is {value!r}; a whole number is needed")
    return int(value)


def _open(backend: str, patience: timedelta) -> None:
    """Find the others by the launcher's variables. What an earlier group left in the store is not read."""
    who = f"rank {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}"
    try:
        store, rank, world = next(rendezvous("env://", timeout=patience))
        corner = PrefixStore(f"retain/{next(_corners)}", store)
        dist.init_process_group(backend, store=corner, rank=rank, world_size=world, timeout=patience)
    except (RuntimeError, ValueError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise RetainError(
            f"{who} did not find the other processes within {patience}: {why}; they were started with "
            f"MASTER_ADDR={os.environ.get('MASTER_ADDR')!r} MASTER_PORT={os.environ.get('MASTER_PORT')!r}"
        ) from error
    _groups.append(_Group(PrefixStore("words", corner), rank, world, patience))
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)


def _at_exit() -> None:
    """Close what nobody closed; Python knows here whether it ends with an exception."""
    _close(getattr(sys, "last_value", None))


def _close(error: BaseException | None) -> None:
    if not _groups:
        return
    group = _groups.pop()
    try:
        if error is not None:
            group.say(f"{FAILED}{' '.join(f'{type(error).__name__}: {error}'.split())[:500]}".rstrip(": "))
        elif not group.said:
            group.say(DONE)
            words = group.heard(GRACE)
            if len(words) == group.world - 1 and set(words.values()) == {DONE}:
                group.leave(GRACE)
    finally:
        if dist.is_initialized():
            _hang_up(error is not None)
        PartialState._reset_state()


def _hang_up(broken: bool) -> None:
    """Gloo's sockets close by themselves; NCCL would wait for the others where it is not aborted."""
    with suppress(RuntimeError):
        if broken and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


def _meet(call: Callable[..., Any], *arguments: Any) -> None:
    """A collective. Where another process is gone or does not come, RetainError with its rank."""
    try:
        call(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not _groups:
            raise
        why = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(str(error).split()))  # without torch's own file name
        why = why.split(". ")[0][:200]
        raise RetainError(
            f"the processes could not go on together: {_groups[0].lost()}; what was saved is kept, and the same "
            f"command continues (they wait for each other for at most {_groups[0].patience}; {why})"
        ) from error


# -- the machine -----------------------------------------------------------------------------------------------------


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast ("bf16"), or nothing ("fp32")."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: the accelerator's, or this process's resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux, bytes on macOS
