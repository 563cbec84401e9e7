"""Evaluation samples/s: `retain.run.evaluate` against HF `generate` + PEFT, at its best batch and at batch 1.

The texts must be equal, else the run fails. Both sides get length-sorted batches and token ids made
beforehand; image processing, the vision tower, decoding and (ours) scoring are inside the clock. Hugging Face
runs once with the adapter as PEFT trained it and once with it merged into the weights, the fastest it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common
import torch
from common import Ratio, Size, Took
from torch import Tensor

from retain.models.hf import HFModel
from retain.run.evaluate import EvalOptions, evaluate, plan
from retain.stream import Task

BATCHES = (64, 128)  # Hugging Face's best was one of them in every run; 16 and 32 were slower
TASKS = {"pocket": ("garments", "captions")}  # answers of 1-2, of 4-9 tokens


def prepared(base: Any, processor: Any, size: Size) -> tuple[HFModel, Any, Any]:
    """Ours, PEFT and PEFT merged, with the same adapter of noise."""
    model = common.ours(base, processor, size)
    model.adapters.mix = common.Plain().adapt(common.context(model, common.task(size)))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.adapters.parameters("main").values():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.1 / p.shape[-1] ** 0.5)
    models = [common.hf_model(base, size) for _ in range(2)]
    for m in models:
        common.copy_adapter(model.adapters.state("main"), m)
    return model, models[0].eval(), models[1].merge_and_unload().eval()


def run_ours(model: HFModel, of: Task, warm: bool) -> tuple[Took, list[str]]:
    """One cell, from empty image caches or with the features that an earlier row of the matrix left."""
    if not warm:
        model.encode.pixels.clear()
        model.features.clear()
    options, ctx = EvalOptions(batch_size=64), common.context(model, of)
    took, out = common.timed(
        lambda: evaluate(model, of, plan(model, of, common.Plain(), ctx, options), options)
    )
    return took, [p.prediction for p in out]


@torch.no_grad()
def run_hf(hf: Any, processor: Any, model: HFModel, of: Task, size: int) -> tuple[Took, list[str]]:
    """The usual loop: collate, generate, decode."""
    prompts = [list(model.encode(e).prompt) for e in of.test]
    order = sorted(range(len(prompts)), key=lambda i: (model.length(of.test[i]), i))
    pad = processor.tokenizer.pad_token_id

    def batch(rows: Sequence[int]) -> dict[str, Tensor]:
        width = max(len(prompts[i]) for i in rows)
        images = processor.image_processor([of.test[i].images[0] for i in rows], return_tensors="pt")
        return {
            "input_ids": torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows]),
            "attention_mask": torch.tensor(
                [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows]
            ),
            "pixel_values": images["pixel_values"],
        }

    def loop() -> list[str]:
        texts = [""] * len(prompts)
        for at in range(0, len(order), size):
            rows = order[at : at + size]
            inputs = batch(rows)
            out = hf.generate(**inputs, max_new_tokens=of.max_new_tokens, do_sample=False, pad_token_id=pad)
            answers = processor.tokenizer.batch_decode(
                out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(rows, answers, strict=True):
                texts[i] = text.strip()
        return texts

    return common.timed(loop)


def compare(size: Size, name: str, reps: int) -> list[Ratio]:
    """Ours and every batch size of theirs, in turn; their best batch is chosen by its median."""
    base, processor = common.base(size)
    model, peft_model, merged = prepared(base, processor, size)
    of = common.task(size, name, n_test=128)
    few = Task(of.name, of.train, of.test[:16], of.score, of.max_new_tokens)
    own: list[Took] = []
    later: list[Took] = []
    theirs: dict[str, list[Took]] = {}
    for rep in range(reps + 1):  # the first is thrown away
        took, texts = run_ours(model, of, warm=False)
        again, same = run_ours(model, of, warm=True)
        assert texts == same, "a cold cache must give the same answers"
        runs = {f"PEFT, batch {b}": run_hf(peft_model, processor, model, of, b) for b in BATCHES}
        runs |= {f"merged, batch {b}": run_hf(merged, processor, model, of, b) for b in BATCHES}
        one = run_hf(peft_model, processor, model, few, 1)
        for which, (_, answers) in {**runs, "PEFT, batch 1": one}.items():
            wrong = [(a, t) for a, t in zip(answers, texts, strict=False) if a != t]
            if wrong:
                raise SystemExit(f"{which}: {len(wrong)} answers differ, first {wrong[0]}")
        if rep:
            own.append(took)
            later.append(again)
            for which, (t, _) in {**runs, "one": one}.items():
                theirs.setdefault(which, []).append(t)
    n, title = len(of.test), f"evaluation, {size.name}{' ' if name else ''}{name}"
    lengths = sorted(len(processor.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    note = f"{n} equal texts, {lengths[n // 2]} tokens in the middle, {lengths[-1]} at most"

    def best(kind: str) -> str:
        return min(
            (k for k in theirs if k.startswith(kind)),
            key=lambda k: sorted(t.cpu for t in theirs[k])[reps // 2],
        )

    rows = []
    for when, mine in (("first row", own), ("later rows", later)):
        for k in ("PEFT", "merged"):
            called = f"{title}, {when}, over HF {best(k)}"
            rows.append(common.ratio(called, ">= 1.3", theirs[best(k)], mine, n, note=note))
        share = len(few.test) / n
        part = [Took(t.wall * share, t.cpu * share) for t in mine]
        called = f"{title}, {when}, over HF PEFT, batch 1"
        rows.append(common.ratio(called, ">= 20", theirs["one"], part, len(few.test), note=note))
    return rows


if __name__ == "__main__":
    args = common.options(__doc__)
    for size_name in args.sizes.split(","):
        for task_name in TASKS.get(size_name, ("",)):
            common.report(compare(common.SIZES[size_name], task_name, args.reps))
