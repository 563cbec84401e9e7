"""What routing per sample costs: six experts blended for each sample over one LoRA, at batch 32.

Six experts of rank 8 as in HiDe-LLaVA, blended at every layer (DISCO) or at the top layer with the sum of all below
(HiDe), against one LoRA of the same rank in total (48) and one of an expert's rank (8). The goal is 1.10 for all four;
each row notes what the multiplications of the adapted layers alone cost. The experts are copies of one another, so
that any blend answers what one of them answers: the texts must be equal, else the run fails. Image features are
warm; prefill and decoding are inside the clock. A plain LoRA can also be folded into the weights (`retain.run.evaluate`
does that); a blend per sample cannot, and here neither is.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import common
import torch
from common import Ratio, Size, Took

from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.models.hf import HFModel
from retain.stream import Task

EXPERTS, RANK, BATCH = 6, 8, 32
GOAL = "<= 1.10"
NAMES = [f"e{k}" for k in range(EXPERTS)]


def routed(base: Any, processor: Any) -> HFModel:
    """Six equal experts, and the adapter that stands for their sum below the top."""
    model = HFModel(deepcopy(base), processor, LoraSpec(rank=RANK, alpha=2.0 * RANK, dense=""))
    for name in [*NAMES, "fused"]:
        model.adapters.add(name, torch.Generator().manual_seed(0))
        noise(model, name)
    return model


def single(base: Any, processor: Any, experts: HFModel, rank: int) -> HFModel:
    """One LoRA that does what one expert does: its first rows are the expert's, the others do nothing."""
    model = HFModel(deepcopy(base), processor, LoraSpec(rank=rank, alpha=2.0 * rank, dense=""))
    model.adapters.add("one", torch.Generator().manual_seed(1))
    with torch.no_grad():
        for key, p in model.adapters.parameters("one").items():
            expert = experts.adapters.parameters("e0")[key]
            if key.endswith("lora_A"):
                p[:RANK] = expert
            else:
                p.zero_()[:, :RANK] = expert
    model.adapters.mix = Mix({"one": 1.0})
    return model


def noise(model: HFModel, name: str) -> None:
    """Every tensor drawn, the same for each name."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.adapters.parameters(name).values():
            p.copy_(torch.randn(p.shape, generator=rng) * 0.1 / p.shape[-1] ** 0.5)


def weights(n: int, kind: str, n_layers: int) -> Mix:
    """A blend for each of n samples, at all layers or at the top one."""
    w_BK = torch.softmax(torch.randn(n, EXPERTS, generator=torch.Generator().manual_seed(2)), dim=-1)
    each = dict(zip(NAMES, w_BK.t().contiguous(), strict=True))
    if kind == "every layer":
        return Mix(each)
    return Mix({"fused": 1.0}, {n_layers - 1: each})


def answers(model: HFModel, of: Task, kind: str = "") -> tuple[Took, list[str]]:
    """All test samples in batches of 32, sorted by length."""
    rows = sorted(range(len(of.test)), key=lambda i: (model.length(of.test[i]), i))
    batches = [
        model.collate([of.test[i] for i in rows[at : at + BATCH]], answers=False)
        for at in range(0, len(rows), BATCH)
    ]

    def loop() -> list[str]:
        texts = []
        for batch in batches:
            mix = weights(len(batch), kind, model.n_layers) if kind else model.adapters.mix
            with model.adapters.using(mix):
                texts += model.generate(batch, of.max_new_tokens)
        return texts

    return common.timed(loop)


def work(model: HFModel, kind: str = "") -> float:
    """Multiplications per token of the adapted layers."""
    bank, total = model.adapters, 0.0
    for site in bank.sites.values():
        n_in, n_out = site.features
        many = EXPERTS if kind == "every layer" or (kind and site.layer == model.n_layers - 1) else 1
        total += n_in * n_out + many * model.spec.rank * (n_in + n_out)
    return total


def compare(size: Size, reps: int) -> list[Ratio]:
    """One LoRA of each rank and both kinds of routing, in turn."""
    base, processor = common.base(size)
    of, experts = common.task(size), routed(base, processor)
    ones = {rank: single(base, processor, experts, rank) for rank in (EXPERTS * RANK, RANK)}
    kinds = ("every layer", "top layer")
    took: dict[Any, list[Took]] = {}
    for rep in range(reps + 1):  # the first is thrown away: it fills the image caches
        found = {rank: answers(model, of) for rank, model in ones.items()}
        found |= {kind: answers(experts, of, kind) for kind in kinds}
        texts = found[RANK][1]
        wrong = [
            (key, a, t) for key, (_, out) in found.items() for a, t in zip(out, texts, strict=True) if a != t
        ]
        if wrong:
            raise SystemExit(f"{len(wrong)} answers differ, first {wrong[0]}")
        if rep:
            for key, (t, _) in found.items():
                took.setdefault(key, []).append(t)
    note = f"{len(of.test)} equal texts, batch {BATCH}"
    title = f"{EXPERTS} experts of rank {RANK} routed at {{}} over one LoRA of rank {{}}, {size.name}"
    rows = []
    for kind in kinds:
        for rank, one in ones.items():
            told = f"{note}; {work(experts, kind) / work(one):.2f} times the multiplications"
            rows.append(
                common.ratio(title.format(kind, rank), GOAL, took[kind], took[rank], len(of.test), note=told)
            )
    return rows


if __name__ == "__main__":
    args = common.options(__doc__)
    for name in args.sizes.split(","):
        common.report(compare(common.SIZES[name], args.reps))
