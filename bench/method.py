"""What a method costs: a training step of LLaCA over one of plain LoRA, same everything else.

Both are whole `fit` calls on a second task (LLaCA averages nothing on the first) with warm image features.
"""

from __future__ import annotations

import common
from common import Ratio, Size, Took

from retain.method import Context, build
from retain.run.train import Optim, fit
from retain.stream import Stream, Task


def run(
    parts: list[str], base: object, processor: object, size: Size, how: Optim
) -> tuple[Took, list[float]]:
    """Learn a first task in two steps, then time the second."""
    model, of = common.ours(base, processor, size), common.task(size)
    losses: list[float] = []
    first = Task("first", of.train[: size.batch], of.test, of.score, of.max_new_tokens)
    stream, method = Stream("bench", (first, of)), build(parts)
    short = Optim(lr=how.lr, steps=2, batch_size=how.batch_size, warmup=0)
    fit(model, method, Context(model, first, stream, [], seed=0), short)
    for i in range(0, len(of.train), 64):
        model.tower_features(model.collate(of.train[i : i + 64], answers=True))
    ctx = Context(model, of, stream, ["first"], 0, lambda **row: losses.extend(row.get("losses", ())))
    took, _ = common.timed(lambda: fit(model, method, ctx, how))
    return took, losses


def compare(size: Size, reps: int) -> Ratio:
    """LoRA, LLaCA, LoRA, LLaCA, …"""
    base, processor = common.base(size)
    how = common.optim(size, "fp32")
    plain: list[Took] = []
    llaca: list[Took] = []
    for rep in range(reps + 1):  # the first is thrown away
        a, losses = run(["lora"], base, processor, size, how)
        b, averaged = run(["lora", "llaca"], base, processor, size, how)
        if rep:
            plain.append(a), llaca.append(b)
    note = f"last loss {losses[-1]:.3f} (lora), {averaged[-1]:.3f} (llaca)"
    return common.ratio(
        f"LLaCA step over LoRA step, {size.name}",
        "<= 1.03",
        llaca,
        plain,
        size.steps,
        unit="steps/s",
        note=note,
    )


if __name__ == "__main__":
    args = common.options(__doc__)
    for name in args.sizes.split(","):
        common.report([compare(common.SIZES[name], args.reps)])
