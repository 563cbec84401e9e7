"""Tasks whose instructions read alike share one adapter; at inference each sample's instruction picks its
group.

Qiao et al., "Large Continual Instruction Assistant", ICML 2025 (arXiv 2410.10868): a codebook of
instruction texts per group and a pool of adapters. A new task is compared with every group,

    s(group) = mean over pairs (new instruction, stored instruction) of cos(tf-idf, tf-idf)

and re-uses the best group where s >= threshold (its adapter is trained on), else a new group is made. Our
part does the grouping only: `[instruction_groups, llaca]` is the paper's whole method.

The arithmetic of the released matcher (scikit-learn's TfidfVectorizer fitted on just the two texts,
English stop words removed, cosine of the rows) is written out here: words of two or more word characters
in lower case, counts times ln(3 / (1 + df)) + 1, unit length.

Differs from the released code: (1) there the match at test time is printed once per file and the
checkpoints are hard-coded in scripts; here every sample is routed by its own instruction. (2) A sample
without any similarity goes to the newest group, as there; but one below the threshold goes to the best
group, not to the newest. (3) Two texts with nothing left after stop words raise there; here they are alike
only if equal. (4) The codebook is capped (`limit` texts per task), since free-form questions would make it
grow without end. `init`: the paper says a new group starts afresh (`fresh`), the released scripts start it
from the checkpoint of the previous task (`previous`), whichever group that was. Thresholds in the code: 0.90
for CoIN's original instructions, 0.30 for the diverse and ten-template ones.
"""

# B batch

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

from retain.adapters.bank import Mix
from retain.method import Context, Method, register
from retain.methods._parts import one_of
from retain.methods._stop_words import STOP_WORDS
from retain.types import Batch, Example, RetainError


def words(text: str) -> Counter[str]:
    """The words that count: two or more word characters, lower case, no stop words."""
    return Counter(w for w in re.findall(r"\b\w\w+\b", text.lower()) if w not in STOP_WORDS)


@lru_cache(maxsize=1 << 16)
def similarity(a: str, b: str) -> float:
    """Cosine of the tf-idf vectors of two texts, the idf fitted on these two: ln((1 + 2) / (1 + df)) + 1."""
    count_a, count_b = words(a), words(b)
    if not count_a or not count_b:
        return float(a == b)
    alone = math.log(3 / 2) + 1  # idf of a word in one of the two texts; a word in both has ln(3 / 3) + 1 = 1

    def weigh(own: Counter[str], other: Counter[str]) -> dict[str, float]:
        return {w: n * (1.0 if w in other else alone) for w, n in own.items()}

    tfidf_a, tfidf_b = weigh(count_a, count_b), weigh(count_b, count_a)
    dot = sum(v * tfidf_b.get(w, 0.0) for w, v in tfidf_a.items())
    return dot / math.hypot(*tfidf_a.values()) / math.hypot(*tfidf_b.values())


def group_similarity(texts: Sequence[str], stored: Sequence[str], match: str) -> float:
    """Over all pairs: their mean (the released code), or for each text its best match, averaged."""
    if match == "mean":
        return sum(similarity(a, b) for a in texts for b in stored) / (len(texts) * len(stored))
    return sum(max(similarity(a, b) for b in stored) for a in texts) / len(texts)


def instruction(example: Example, text: str) -> str:
    """What of a question is its instruction: its last line, all of it, or the last line up to a colon."""
    if text == "question":
        return example.question.strip()
    lines = example.question.strip().splitlines()
    last = lines[-1].strip() if lines else ""
    return last.split(":", 1)[0].strip() if text == "format" else last


@register
@dataclass
class InstructionGroups(Method):
    """A codebook of instructions; one adapter per group of tasks."""

    name: ClassVar[str] = "instruction_groups"
    about: ClassVar[str] = "tasks with alike instructions share an adapter"
    source: ClassVar[str] = "arXiv:2410.10868"

    threshold: float = 0.9
    init: str = "fresh"
    text: str = "last_line"
    match: str = "mean"
    limit: int = 32

    codebook: dict[str, list[str]] = field(init=False, default_factory=dict)  # adapter -> instructions
    group_of: dict[str, str] = field(init=False, default_factory=dict)  # task -> adapter

    def __post_init__(self) -> None:
        choices = {
            "init": ("fresh", "previous"),
            "text": ("last_line", "question", "format"),
            "match": ("mean", "max"),
        }
        for key, options in choices.items():
            if getattr(self, key) not in options:
                told = f"{getattr(self, key)!r} is none of {list(options)}"
                raise RetainError(f"instruction_groups.{key}: {told}")
        if self.limit < 1:
            raise RetainError(f"instruction_groups.limit: must be at least 1, not {self.limit}")

    def adapt(self, ctx: Context) -> Mix:
        bank = ctx.model.adapters
        distinct = list(dict.fromkeys(instruction(e, self.text) for e in ctx.task.train))
        new = distinct[: self.limit]
        scores = {g: group_similarity(new, texts, self.match) for g, texts in self.codebook.items()}
        group = max(scores, key=scores.__getitem__, default="")
        found = bool(scores) and scores[group] >= self.threshold
        if not found:
            previous = next(
                reversed(self.group_of.values()), None
            )  # of the previous task, not the newest group
            group = f"group{len(self.codebook) + 1}"
            bank.add(group, ctx.rng("instruction_groups"), like=previous if self.init == "previous" else None)
        known = self.codebook.get(group, [])
        unseen = [t for t in new if t not in known]
        self.codebook = {**self.codebook, group: known + unseen}
        self.group_of = {**self.group_of, ctx.task.name: group}
        told = {"group": group, "reused": found, "scores": scores, "instructions": len(distinct)}
        ctx.log(kind="group", task=ctx.task.name, **told)
        bank.train_only(group)
        return Mix({group: 1.0})

    def route(self, ctx: Context, batch: Batch) -> Mix | None:
        if not self.codebook:
            return None
        stored = {g: tuple(texts) for g, texts in self.codebook.items()}
        texts = [instruction(e, self.text) for e in batch.examples]
        return one_of([self._group(t, stored) for t in texts], ctx.model.device)

    def _group(self, text: str, stored: dict[str, tuple[str, ...]]) -> str:
        scores = {g: group_similarity([text], texts, self.match) for g, texts in stored.items()}
        best = max(scores, key=scores.__getitem__)
        return best if scores[best] > 0 else next(reversed(stored))
