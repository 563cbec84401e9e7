"""What the fiftieth task costs over the second: whole `fit` calls of every method, CPU seconds, a tiny model.

The first task is not the yardstick: most methods have nothing to hold on to yet (no teacher, no buffer, no anchor),
so they would seem to grow in one step. Tasks 1 to 49 are learned in two steps each; adapters, mix and state after the
first and after the 49th are kept, and task 2 and task 50 are timed from there in turn, on the same examples. A method
that trains beside all its old adapters, or whose memory grows, grows by definition: its ratio is told, not judged.
"""

from __future__ import annotations

import os
from copy import deepcopy
from typing import Any

import common
import torch
from common import Ratio, Size, Took

from retain.adapters.kinds import KINDS
from retain.method import Context, Method, available, build
from retain.models.hf import HFModel
from retain.run.store import empty
from retain.run.train import Optim, fit
from retain.stream import Stream, Task

GROWS = {
    "o_lora": "all old adapters run",
    "gpm": "its memory grows up to the width of the layers",
    "merge_tasks": "merges all adapters",
    "lorahub": "searches over all adapters",
}
OPTIONS: dict[str, Any] = {
    "ewc": {"n_samples": 8},
    "gpm": {"n_samples": 8},
    "llaca": {"first_task": True},
    "replay": {"size": 12},
}
KIND_OPTIONS: dict[str, Any] = {
    "moe": {"rank": 4, "experts": 2},
    "prompt": {"tokens": 2, "at_once": 2},  # as many before a sample of task 2 as of task 50
    "lora": {"rank": 4},
}
Kept = tuple[dict[str, dict[str, torch.Tensor]], Any, dict[str, Any]]


def methods() -> dict[str, Any]:
    """Every method of the package that learns task after task; one that owns no adapters goes with `lora`."""
    out: dict[str, Any] = {}
    for name, cls in available().items():
        part = {name: OPTIONS.get(name, {})}
        if cls.__module__.startswith("retain.methods.") and not build(part).owns("stages"):
            out[name] = part if build(part).owns("adapt") else ["lora", part]
    return out


def keep(model: HFModel, method: Method) -> Kept:
    """Everything that a task starts from."""
    bank = model.adapters
    return {n: bank.state(n) for n in bank.names}, bank.mix, deepcopy(method.state_dict())


def restore(model: HFModel, method: Method, kept: Kept) -> None:
    """Back to it."""
    states, mix, state = kept
    empty(model.adapters)
    for name, tensors in states.items():
        model.adapters.add(name, torch.Generator())
        model.adapters.load(name, tensors)
    model.adapters.mix = mix
    method.load_state_dict(deepcopy(state))


def compare(name: str, spec: Any, base: Any, processor: Any, size: Size, n_tasks: int, reps: int) -> Ratio:
    """Task 2, task n, task 2, task n, …"""
    of, method = common.task(size), build(spec)
    kinds = [k for p in method.parts if p.owns("adapt") for k in p.kinds]
    model = HFModel(deepcopy(base), processor, KINDS[kinds[0]](**KIND_OPTIONS[kinds[0]]))
    stream = Stream("growth", tuple(Task(f"t{i}", of.train, of.test, of.score, 2) for i in range(n_tasks)))

    def learn(i: int, steps: int) -> None:
        seen = [t.name for t in stream.tasks[:i]]
        ctx = Context(model, stream[i], stream, seen, seed=0)
        how = Optim(lr=1e-3, steps=steps, batch_size=size.batch, log_every=steps, warmup=0.0)
        fit(model, method, ctx, how)

    at = {}
    for i in range(n_tasks - 1):
        learn(i, 2)
        if i in (0, n_tasks - 2):
            at[i + 1] = keep(model, method)
    early: list[Took] = []
    late: list[Took] = []
    for rep in range(reps + 1):  # the first is thrown away
        for i, times in ((1, early), (n_tasks - 1, late)):
            restore(model, method, at[i])
            took, _ = common.timed(lambda i=i: learn(i, size.steps))
            if rep:
                times.append(took)
    goal = "<= 99" if name in GROWS else "<= 1.05"
    title = f"task {n_tasks} over task 2, {name}"
    note = GROWS.get(name, "")
    return common.ratio(title, goal, late, early, 1, unit="tasks/s", note=note)


if __name__ == "__main__":
    args = common.options(__doc__)
    smoke = args.sizes == "smoke"
    size = Size("smoke", rank=4, batch=4, steps=2 if smoke else 10, examples=12, max_new_tokens=3)
    base, processor = common.base(size)
    chosen = os.environ.get("METHODS", "").split()
    for name, spec in methods().items():
        if not chosen or name in chosen:
            common.report([compare(name, spec, base, processor, size, 3 if smoke else 50, args.reps)])
