"""Peak memory of training: ours over Hugging Face's, each in a process of its own, less what importing takes.

Peak resident size (ru_maxrss) after one epoch minus the same after all imports and a tiny model; model,
caches, optimizer, activations and collator are inside.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import common
from common import Ratio, Size

from retain.run.train import batches, fit


def peak() -> float:
    """Peak resident size of this process so far, MiB (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(side: str, size: Size, precision: str) -> float:
    """Train one epoch and return the growth in MiB."""
    import peft  # noqa: F401  both sides import everything before the baseline is taken
    from transformers import Trainer  # noqa: F401

    base, processor = common.base(common.SMOKE)
    how = common.optim(size, precision)
    before = peak()
    base, processor = common.base(size)
    common.deepcopy = lambda x: x  # type: ignore[attr-defined]  # one model per process: nothing to copy
    of = common.task(size)
    if side == "ours":
        model = common.ours(base, processor, size, precision=precision)
        ctx = common.context(model, of)
        fit(model, common.Plain(), ctx, how)
        return peak() - before
    helper: Any = common.ours(*common.base(size), size)
    ctx = common.context(helper, of)
    order = batches(helper, of.train, ctx, how, size.steps)
    rows = common.tokenised([of.train[i] for part in order for i in part], helper)
    del helper, ctx, order
    peft_model = common.hf_model(base, size)
    with tempfile.TemporaryDirectory() as out:
        trainer, _ = common.trainer(peft_model, processor, rows, how, out)
        trainer.train()
    return peak() - before


def compare(size: Size, precision: str, reps: int) -> Ratio:
    """`reps` processes of each side in turn."""
    growth: dict[str, list[float]] = {"hf": [], "ours": []}
    for _ in range(reps):
        for side, values in growth.items():
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--sizes",
                size.name,
                "--precision",
                precision,
            ]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            values.append(float(json.loads(out.strip().splitlines()[-1])))
    each = [o / h for h, o in zip(growth["hf"], growth["ours"], strict=True)]
    a, b = statistics.median(growth["hf"]), statistics.median(growth["ours"])
    mid = statistics.median(each)
    return Ratio(
        f"peak memory, training, {size.name}, {precision}",
        "<= 1.0",
        mid,
        min(each),
        max(each),
        mid,
        a,
        b,
        unit="MiB",
    )


if __name__ == "__main__":
    if "--side" in sys.argv:
        parser = argparse.ArgumentParser()
        for name in ("--side", "--sizes", "--precision"):
            parser.add_argument(name)
        own = parser.parse_args()
        print(one(own.side, common.SIZES[own.sizes], own.precision))
    else:
        args = common.options(__doc__)
        for name in args.sizes.split(","):
            common.report([compare(common.SIZES[name], "fp32", min(args.reps, 3))])
