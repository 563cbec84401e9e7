"""Strict scorers, ours, and the registry of all scorers.

Rules of the strict ones: an empty answer never scores; words, numbers, boxes and option letters are read whole, in
the grammar of their sentence (`retain.metrics.grammar`); what cannot be read is wrong; an answer that states two
different choices or numbers is wrong. The scorers that papers released, quirks included, are in `compat.py`; both
are printed side by side. Each says which references it cannot score (`doubts`), for the doctor.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from retain.metrics import captions
from retain.metrics.choices import option_texts, parse_choice
from retain.metrics.compat import COMPAT
from retain.metrics.numerals import numerals, prepared
from retain.metrics.scorer import Doubts, Scorer, per_corpus, per_sample
from retain.metrics.text import (
    REMEMBERED,
    Box,
    edits,
    evalai,
    four_numbers,
    iou_of,
    normal,
    numbers,
    parse_box,
    said,
    stated,
)
from retain.stream import Doubt, Score
from retain.types import Example, RetainError


def _scored(examples: Sequence[Example]) -> Iterator[tuple[int, Example, list[str]]]:
    """Row, example and references that are not blank, where there are any (a blank row is a finding of its own)."""
    for row, example in enumerate(examples):
        if answers := [t for t in example.targets if t.strip()]:
            yield row, example, answers


def _emptied(normalise: Callable[[str], str]) -> Doubts:
    """Doubts of references of which normalising leaves nothing."""

    def doubts(examples: Sequence[Example]) -> Iterator[Doubt]:
        for row, _, answers in _scored(examples):
            if not any(map(normalise, answers)):
                text = f"nothing is left of the reference {_cut(answers[0])} after normalising"
                yield Doubt("error", row, "answer", text)

    return doubts


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "\u2026")


# ---------------------------------------------------------------------------------------------- short answers


def _exact_doubts(examples: Sequence[Example]) -> Iterator[Doubt]:
    yield from _emptied(normal)(examples)
    for row, _, answers in _scored(examples):
        if all(len(a.split()) > 12 for a in answers):
            text = f"score 'exact' on an answer of {len(answers[0].split())} words: hardly ever met"
            yield Doubt("warning", row, "answer", text)


@per_sample(
    "exact",
    "1 if normal(answer) is normal(t) for any reference t; normal: case, spaces, trailing full stop",
    doubts=_exact_doubts,
)
def exact(text: str, example: Example) -> float:
    """Equality with any reference after `text.normal`."""
    answer = normal(text)
    return float(bool(answer) and answer in {normal(t) for t in example.targets})


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy, 0..1, of normalised texts: mean over left-out references of min(1, matches among the rest
    / 3).

    With fewer than four references the divisor is what is left (n - 1), and one reference means equality, so
    that a perfect answer always reaches 1. With ten it is the official measure.
    """
    n, hits = len(references), sum(r == answer for r in references)
    if n < 2:
        return float(hits)
    need = min(3, n - 1)
    return (hits * min(1.0, (hits - 1) / need) + (n - hits) * min(1.0, hits / need)) / n


@per_sample(
    "vqa",
    "mean over left-out references of min(1, matches among the others / 3); EvalAI normalisation",
    doubts=_emptied(evalai),
)
def vqa(text: str, example: Example) -> float:
    """VQA soft accuracy (Antol et al. 2015) over `example.targets`, usually ten."""
    answer = evalai(text)
    return soft_accuracy(answer, [evalai(t) for t in example.targets]) if answer else 0.0


@per_sample(
    "contains",
    "1 if any reference occurs in the answer as whole words and is not denied there; normal() on both",
    doubts=_emptied(normal),
)
def contains(text: str, example: Example) -> float:
    """Whole-word containment: "cat" is in "a cat." but not in "category" or "not a cat"; 5 is not in "3.5" or "-5".
    Says nothing about what else is claimed.
    """
    answer = normal(text)
    return float(any(said(label, answer) for label in map(normal, example.targets)))


def _spaced(text: str) -> str:
    """ANLS's normal form: lower case, one space between words."""
    return " ".join(text.lower().split())


@per_sample(
    "anls",
    "s = 1 - distance / length of the longer, for the nearest reference; 0 below 0.5. Lower case, single spaces",
    doubts=_emptied(_spaced),
)
def anls(text: str, example: Example) -> float:
    """Average normalised Levenshtein similarity (Biten et al., ICCV 2019, arXiv 1905.13648), threshold 0.5.

    As the evaluation of the Robust Reading Competition (ST-VQA, DocVQA): a similarity of exactly 0.5 counts.
    """
    answer, best = _spaced(text), 0.0
    for reference in {_spaced(t) for t in example.targets}:
        longer = max(len(answer), len(reference))
        if (
            longer and min(len(answer), len(reference)) >= longer / 2
        ):  # else the distance is over a half of it
            best = max(best, 1 - edits(answer, reference) / longer)
    return best if best >= 0.5 else 0.0


# -------------------------------------------------------------------------------------------- multiple choice


def _options(example: Example) -> tuple[str, ...]:
    """Normalised option texts."""
    given = example.meta.get("options", ())
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise RetainError(f"{example.told}: options: a list of texts is needed, not {given!r}")
    return option_texts(tuple(map(str, given)))


def _choice_doubts(examples: Sequence[Example]) -> Iterator[Doubt]:
    for row, example, answers in _scored(examples):
        options = _options(example)
        stated_ = [k for t in answers if (k := parse_choice(t, options))]
        if not stated_:
            text = f"score 'choice' needs an option letter or an option; {_cut(answers[0])} is none"
            yield Doubt("error", row, "answer", text)
        elif options and all(ord(k) - 65 >= len(options) for k in stated_):
            text = f"the answer {stated_[0]!r} is beyond the {len(options)} options"
            yield Doubt("error", row, "options", text)
        elif not options:
            text = "no options are given: any letter is taken as a valid answer"
            yield Doubt("warning", row, "options", text)
        same = [i for i, o in enumerate(options) if options.count(o) > 1]
        if same:
            text = (
                f"equal option texts: {' and '.join(chr(65 + i) for i in same)} are {_cut(options[same[0]])}"
            )
            yield Doubt("warning", row, "options", text)


@per_sample(
    "choice",
    "1 if the one option that the answer states is the key; letters beyond meta['options'] are wrong",
    doubts=_choice_doubts,
)
def choice(text: str, example: Example) -> float:
    """The option that an answer states, by letter or text (`retain.metrics.choices`). The key may be a letter or
    an option's text; `meta["options"]` lists the options in order.
    """
    options = _options(example)
    answer = parse_choice(text, options)
    keys = {parse_choice(t, options) for t in example.targets} - {None}
    within = answer is not None and (not options or ord(answer) - 65 < len(options))
    return float(within and answer in keys)


# ------------------------------------------------------------------------------------------ numbers and boxes


@lru_cache(REMEMBERED)
def _key(reference: str) -> float | None:
    """The number of a reference: exactly one, apart from letters."""
    found = set(numbers(reference))
    return found.pop() if len(found) == 1 else None


def _tolerance(example: Example, key: str) -> float:
    value = example.meta.get(key, 0.0)
    try:
        width = float(value)
    except (TypeError, ValueError):
        width = math.nan
    if not 0 <= width < math.inf:
        raise RetainError(f"{example.told}: {key}: a number of 0 or more is needed, not {value!r}")
    return width


def _no_key(reference: str) -> str:
    """Why a reference is no number."""
    if len(set(numbers(reference))) > 1:
        return "states several"
    glued = numerals(prepared(reference), glued=True)
    return f"is glued to its unit; write {glued[0].value:g}" if glued else "has none"


def _number_doubts(examples: Sequence[Example]) -> Iterator[Doubt]:
    for row, example, answers in _scored(examples):
        if all(_key(a) is None for a in answers):
            text = f"score 'number' needs a number; {_cut(answers[0])} {_no_key(answers[0])}"
            yield Doubt("error", row, "answer", text)
        elif unit := next((a for a in answers if re.search(r"\d\s*(?:[^\W\d_]{2}|[^\W\d_eE]|%)", a)), ""):
            text = f"score 'number' compares numbers only: in {_cut(unit)} the rest is not looked at"
            yield Doubt("warning", row, "answer", text)
        for key in ("tolerance", "relative_tolerance"):
            try:
                _tolerance(example, key)
            except RetainError as error:
                yield Doubt("error", row, key, str(error))


@per_sample(
    "number",
    "1 if the only number x that the answer states has |x - y| <= max(tolerance, relative_tolerance * |y|)",
    doubts=_number_doubts,
)
def number(text: str, example: Example) -> float:
    """A numeric answer. Exactly one distinct number may be stated (`retain.metrics.text.stated`); `meta["tolerance"]`
    and `meta["relative_tolerance"]` default to 0 (plus 1e-9 for rounding). Units are not compared."""
    claimed = stated(text)
    if len(claimed) != 1:
        return 0.0
    x = next(iter(claimed))
    absolute, relative = _tolerance(example, "tolerance"), _tolerance(example, "relative_tolerance")
    keys = [y for y in map(_key, example.targets) if y is not None]
    return float(any(abs(x - y) <= max(absolute, relative * abs(y)) + 1e-9 * max(1.0, abs(y)) for y in keys))


def _is_unit(box: Box) -> bool:
    return all(0.0 <= v <= 1.0 for v in box)


def _same_units(a: Box, b: Box, example: Example) -> tuple[Box, Box]:
    """Bring a normalised box to the pixels of the other one, where `meta["size"]` = (w, h) says how."""
    size = example.meta.get("size")
    if size is None or _is_unit(a) == _is_unit(b):
        return a, b
    scale = float(max(size))  # boxes are normalised on the padded square, as in LLaVA and CoIN

    def grow(box: Box) -> Box:
        return (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale) if _is_unit(box) else box

    return grow(a), grow(b)


def gold_box(example: Example) -> Box | None:
    """The reference box: `meta["box"]` (four numbers or their text), else the first reference that parses."""
    if "box" in example.meta:
        return parse_box(example.meta["box"])
    return next((box for box in map(parse_box, example.targets) if box), None)


FEW = 12  # boxes, from which on it cannot be chance that all lie in the upper left


def _box_doubts(examples: Sequence[Example]) -> Iterator[Doubt]:
    """Boxes that are none, and boxes that only make sense as COCO's [x, y, width, height]."""
    read: list[Box] = []
    corner = 0  # boxes that fit their image if read as [x, y, w, h]
    for row, example, answers in _scored(examples):
        sources = [example.meta["box"]] if "box" in example.meta else answers
        box = next((b for b in map(four_numbers, sources) if b), None)
        if box is None:
            text = f"score 'iou' needs a box of four numbers; {_cut(str(sources[0]))} has none"
            yield Doubt("error", row, "answer", text)
            continue
        x, y, right, low = box
        if right <= x or low <= y:
            text = "a box with x2 <= x1 or y2 <= y1 never scores; a COCO box of x, y, width, height? corners are needed"
            yield Doubt("error", row, "box", f"{text}: {list(box)}")
        width, height = example.meta.get("size", (1.0, 1.0) if _is_unit(box) else (0.0, 0.0))
        read.append(box)
        corner += bool(width) and x + right <= width and y + low <= height
    inverted = sum(b[2] <= b[0] or b[3] <= b[1] for b in read)
    if len(read) >= FEW and corner == len(read) and not inverted:
        text = f"all {len(read)} boxes would fit their images as COCO's x, y, width, height: are they really corners?"
        yield Doubt("warning", None, "box", text)
    elif inverted and inverted < len(read):
        text = f"{inverted} of {len(read)} boxes are no corners, so the others will be x, y, width, height (COCO) too"
        yield Doubt("error", None, "box", text)


@per_sample(
    "iou",
    "1 if IoU(answer box, reference box) > 0.5; four numbers x1, y1, x2, y2 with x1 < x2, y1 < y2",
    doubts=_box_doubts,
)
def iou(text: str, example: Example) -> float:
    """Grounding. Both boxes in the same units, or one normalised on the padded square with `meta["size"]` =
    (w, h).
    """
    box, gold = parse_box(text), gold_box(example)
    if box is None or gold is None:
        return 0.0
    return float(iou_of(*_same_units(box, gold, example)) > 0.5)


# --------------------------------------------------------------------------------------------------- captions


def _references(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    return [e.targets for e in examples]


@per_corpus(
    "cider", "100 * CIDEr-D, the papers' number: 0..1000, NOT clipped; document frequencies of this test set"
)
def cider(texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """CIDEr-D x100, unclipped: CIDEr-D runs to 10, so a good caption passes 100 and clipping would bias the
    mean.
    """
    return [100.0 * v for v in captions.cider_d(texts, _references(examples))]


@per_corpus(
    "caption",
    "10 * CIDEr-D: 0..100, a tenth of the papers' CIDEr x100; document frequencies of this test set",
)
def caption(texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """CIDEr-D on the same 0..100 as all other scores, so that a caption task weighs like any other in an
    average.
    """
    return [10.0 * v for v in captions.cider_d(texts, _references(examples))]


@per_sample(
    "bleu4", "sentence BLEU-4, add-one smoothed for n > 1; the mean is not corpus BLEU (captions.suite)"
)
def bleu4(text: str, example: Example) -> float:
    """BLEU-4 of one caption; corpus BLEU is not a mean over samples."""
    return captions.bleu_of(captions.bleu_counts(text, example.targets), 4, smooth=True)


@per_sample(
    "rouge_l", "ROUGE-L: F of the longest common subsequence, beta 1.2; best P and best R over references"
)
def rouge_l(text: str, example: Example) -> float:
    """ROUGE-L of one caption."""
    return captions.rouge_l(text, example.targets)


# --------------------------------------------------------------------------------------------------- registry

STRICT: dict[str, Scorer] = {
    s.name: s for s in (exact, vqa, contains, choice, number, iou, anls, caption, cider, bleu4, rouge_l)
}
SCORES: dict[str, Score] = {**STRICT, **COMPAT}
"""Every scorer by name. `compat_*` replicate released code; the others are strict."""


def score(name: str) -> Score:
    """The scorer of that name; a RetainError that names the nearest one and the choices otherwise."""
    if name in SCORES:
        return SCORES[name]
    near = difflib.get_close_matches(name, SCORES, n=1, cutoff=0.0)
    raise RetainError(f"no score {name!r}; did you mean {near[0]!r}? Choose from {sorted(SCORES)}")
