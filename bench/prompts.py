"""What choosing soft prompts saves: eight tasks' prompts, three chosen for each sample over all eight.

The claim of ModalPrompt (arXiv 2410.05849) is 1.42 times the speed at inference; against what could not be read, and
unselected prompts are one reading. Both sides hold the same eight prompts of ten tokens (CoIN's number of tasks,
the paper's length) and run the whole of evaluation: guidance, prefill behind the prompts, decoding, scoring; tower
and guide features are warm. Texts differ, since the prompts before them do, and a sample's answer may end earlier on
one side; so a second row lets each answer have one token: prefill alone.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import common
import torch
from common import Ratio, Size, Took

from retain.adapters.prompt import PromptSpec
from retain.method import Context, Method, build
from retain.models.hf import HFModel
from retain.run.evaluate import EvalOptions, evaluate, plan
from retain.stream import Stream, Task

TASKS, TOKENS, CHOSEN = 8, 10, 3


def prepared(base: Any, processor: Any, at_once: int, of: Task) -> tuple[HFModel, Method, Context]:
    """A model with a fresh prompt for each of eight tasks, as `modal_prompt` makes them."""
    model = HFModel(deepcopy(base), processor, PromptSpec(TOKENS, at_once))
    method, stream = build("modal_prompt"), Stream("bench", (of,))
    for i in range(TASKS):
        ctx = Context(model, replace(of, name=f"task{i}"), stream, [], seed=0)
        method.adapt(ctx)
        method.end_task(ctx)
    return model, method, Context(model, of, stream, [], seed=0)


def run(side: tuple[HFModel, Method, Context], of: Task) -> Took:
    """One cell of the matrix."""
    model, method, ctx = side
    options = EvalOptions(batch_size=64)
    took, _ = common.timed(lambda: evaluate(model, of, plan(model, of, method, ctx, options), options))
    return took


def check(side: tuple[HFModel, Method, Context], of: Task, n: int) -> None:
    """Every sample stands behind `n` prompts."""
    model, method, ctx = side
    batch = model.collate(of.test, answers=False)
    mix = method.route(ctx, batch)
    assert mix is not None and model.prompts is not None
    many = model.prompts.count(mix, len(batch))
    assert bool((many == n * TOKENS).all()), many


def compare(size: Size, reps: int) -> list[Ratio]:
    """All, chosen, all, chosen, …"""
    base, processor = common.base(size)
    of = common.task(size)
    few, every = (prepared(base, processor, k, of) for k in (CHOSEN, TASKS))
    check(few, of, CHOSEN), check(every, of, TASKS)
    rows = []
    for what, cell in (("evaluation", of), ("prefill", replace(of, max_new_tokens=1))):
        chosen: list[Took] = []
        whole: list[Took] = []
        for rep in range(reps + 1):  # the first is thrown away
            a, b = run(every, cell), run(few, cell)
            if rep:
                whole.append(a), chosen.append(b)
        name = f"{what} behind {CHOSEN} chosen prompts over all {TASKS}, {size.name}"
        mean = sum(few[0].length(e) for e in of.test) / len(of.test)
        note = f"prompts of {TOKENS} tokens before samples of {mean:.0f} on average, routing included"
        rows.append(common.ratio(name, ">= 1.42", whole, chosen, len(of.test), note=note))
    return rows


if __name__ == "__main__":
    torch.manual_seed(0)
    args = common.options(__doc__)
    for name in args.sizes.split(","):
        common.report(compare(common.SIZES[name], args.reps))
