"""Training samples/s: `retain.run.train.fit` over HF `Trainer` + PEFT, same data, rank, batch and precision.

With dropout 0 both start from the same adapter and their loss curves must agree; otherwise the run fails.
Text is tokenised before the clock starts on both sides; image processing and the vision tower are inside.
"first epoch" starts with an empty feature cache, "later epochs" with the features that the first one left.
"""

from __future__ import annotations

import tempfile
from typing import Any

import common
import torch
from common import Ratio, Size, Took

from retain.run.train import Optim, batches, fit

TOLERANCE = {"fp32": 2e-3, "bf16": 6e-2}  # relative, at every step: sums in another order, amplified by Adam


def run_ours(
    base: Any, processor: Any, size: Size, how: Optim, dropout: float, warm: bool
) -> tuple[Took, list[float]]:
    """One task from fresh adapters; the losses of all steps."""
    model, of = common.ours(base, processor, size, dropout, how.precision), common.task(size)
    losses: list[float] = []
    ctx = common.context(model, of, lambda **row: losses.extend(row.get("losses", ())))
    list(batches(model, of.train, ctx, how, size.steps))  # tokenises
    if warm:
        for i in range(0, len(of.train), 64):
            model.tower_features(model.collate(of.train[i : i + 64], answers=True))
    else:
        model.encode.pixels.clear()
    took, _ = common.timed(lambda: fit(model, common.Plain(), ctx, how))
    return took, losses


def run_hf(base: Any, processor: Any, size: Size, how: Optim, dropout: float) -> tuple[Took, list[float]]:
    """The same with Hugging Face, from the same adapter."""
    model, of = common.ours(base, processor, size), common.task(size)
    ctx = common.context(model, of)
    common.Plain().adapt(ctx)
    order = batches(model, of.train, ctx, how, size.steps)
    rows = common.tokenised([of.train[i] for part in order for i in part], model)
    peft_model = common.hf_model(base, size, dropout)
    common.copy_adapter(model.adapters.state("main"), peft_model)
    with tempfile.TemporaryDirectory() as out:
        trainer, losses = common.trainer(peft_model, processor, rows, how, out)
        torch.manual_seed(0)
        took, _ = common.timed(trainer.train)
    return took, [float(x) for x in losses]


def agree(theirs: list[float], own: list[float], precision: str) -> float:
    """The largest relative difference of two loss curves; an error where it is beyond the tolerance."""
    worst = max(abs(a - b) / max(abs(a), 0.1) for a, b in zip(theirs, own, strict=True))
    if worst > TOLERANCE[precision]:
        raise SystemExit(f"loss curves differ by {worst:.2%} ({precision}):\n HF   {theirs}\n ours {own}")
    return worst


def compare(size: Size, precision: str, dropout: float, reps: int) -> list[Ratio]:
    """Hugging Face, ours cold, ours warm, in turn."""
    base, processor = common.base(size)
    how = common.optim(size, precision)
    hf: list[Took] = []
    cold: list[Took] = []
    warm: list[Took] = []
    note = ""
    for rep in range(reps + 1):  # the first is thrown away
        t_hf, l_hf = run_hf(base, processor, size, how, dropout)
        t_cold, l_cold = run_ours(base, processor, size, how, dropout, warm=False)
        t_warm, l_warm = run_ours(base, processor, size, how, dropout, warm=True)
        assert l_cold == l_warm, "a cold cache must give the same bits"
        if not dropout:
            worst = agree(l_hf, l_cold, precision)
            note = f"loss {l_hf[0]:.3f} -> {l_hf[-1]:.3f}, curves agree to {worst:.1e}"
        else:
            note = f"last losses {l_hf[-1]:.3f} (HF), {l_cold[-1]:.3f} (ours): other masks"
        if rep:
            hf.append(t_hf), cold.append(t_cold), warm.append(t_warm)
    name = f"training, {size.name}, {precision}, dropout {dropout:g}"
    units = size.steps * size.batch
    return [
        common.ratio(f"{name}, first epoch", ">= 1.5", hf, cold, units, note=note),
        common.ratio(f"{name}, later epochs", ">= 1.5", hf, warm, units, note=note),
    ]


if __name__ == "__main__":
    args = common.options(__doc__)
    for name in args.sizes.split(","):
        rows = [("fp32", 0.0), ("fp32", 0.05), ("bf16", 0.0)]
        for precision, dropout in rows if name == "pocket" else rows[1:]:
            common.report(compare(common.SIZES[name], precision, dropout, args.reps))
