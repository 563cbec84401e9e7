"""Strict scorers, ours, and the registry of all scorers.

Rules of the strict ones: an empty answer never scores; words are matched whole; numbers, boxes and option
letters are parsed; what cannot be parsed is wrong; an answer that names two different choices is wrong. The
scorers that papers released, quirks included, are in `compat.py`; both are printed side by side.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from retain.metrics import captions
from retain.metrics.compat import COMPAT
from retain.metrics.scorer import Scorer, per_corpus, per_sample
from retain.metrics.text import Box, evalai, iou_of, normal, numbers, parse_box
from retain.stream import Score
from retain.types import Example, RetainError

# ---------------------------------------------------------------------------------------------- short answers


@per_sample(
    "exact", "1 if normal(answer) is normal(t) for any reference t; normal: case, spaces, trailing full stop"
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
    "vqa", "mean over left-out references of min(1, matches among the others / 3); EvalAI normalisation"
)
def vqa(text: str, example: Example) -> float:
    """VQA soft accuracy (Antol et al. 2015) over `example.targets`, usually ten."""
    answer = evalai(text)
    return soft_accuracy(answer, [evalai(t) for t in example.targets]) if answer else 0.0


@per_sample("contains", "1 if any reference occurs in the answer as whole words; normal() on both")
def contains(text: str, example: Example) -> float:
    """Whole-word containment: "cat" is in "a cat." but not in "category". Says nothing about what else is
    claimed.
    """
    answer = normal(text)
    labels = [label for label in map(normal, example.targets) if label]
    return float(any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer) for label in labels))


# -------------------------------------------------------------------------------------------- multiple choice

_ALONE = re.compile(r"[(\[]?([a-z])[)\]]?[.:,]?", re.IGNORECASE)
_LED = re.compile(r"(?:[(\[]([a-z])[)\]]|([a-z])[.:)])\s*(\S.*)", re.IGNORECASE | re.DOTALL)
_NAMED = re.compile(
    r"\b(?:answer|option|choice|letter)(?:\s+is)?\s*:?\s*[(\[]?([A-Z])[)\]]?(?!\w)", re.IGNORECASE
)


def _options(example: Example) -> list[str]:
    """Normalised option texts, a leading letter ("A. cat", "(A) cat") removed."""
    led = [(option, _LED.fullmatch(str(option).strip())) for option in example.meta.get("options", ())]
    return [normal(m[3] if m else str(option)) for option, m in led]


def parse_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The option letter that an answer states, or None where it states none or more than one.

    Read in this order: a letter alone ("B", "(b)", "B."); a letter leading an option ("B. cat"), wrong where
    the text is another option's; a named letter ("the answer is B"); the text of exactly one option.
    `options` are normalised.
    """
    text = text.strip()
    if alone := _ALONE.fullmatch(text):
        return alone[1].upper()
    by_text = {chr(65 + i) for i, option in enumerate(options) if option and option == normal(text)}
    if led := _LED.fullmatch(text):
        letter = (led[1] or led[2]).upper()
        says = {chr(65 + i) for i, option in enumerate(options) if option == normal(led[3])}
        return letter if not says or letter in says else None
    named = {letter.upper() for letter in _NAMED.findall(text)}
    found = named or by_text
    return found.pop() if len(found) == 1 else None


@per_sample("choice", "1 if the parsed option letter is the key's; letters beyond meta['options'] are wrong")
def choice(text: str, example: Example) -> float:
    """Option letter. The key may be a letter or an option's text; `meta["options"]` lists the options in
    order.
    """
    options = _options(example)
    answer = parse_choice(text, options)
    keys = {parse_choice(t, options) for t in example.targets} - {None}
    within = answer is not None and (not options or ord(answer) - 65 < len(options))
    return float(within and answer in keys)


# ------------------------------------------------------------------------------------------ numbers and boxes


@per_sample(
    "number", "1 if the answer's only number x has |x - y| <= max(tolerance, relative_tolerance * |y|)"
)
def number(text: str, example: Example) -> float:
    """A numeric answer. Exactly one distinct number may be stated; `meta["tolerance"]` and
    `meta["relative_tolerance"]` default to 0 (plus 1e-9 for rounding)."""
    stated = set(numbers(text))
    if len(stated) != 1:
        return 0.0
    x = stated.pop()
    absolute, relative = (float(example.meta.get(k, 0.0)) for k in ("tolerance", "relative_tolerance"))
    keys = [y[0] for y in map(numbers, example.targets) if len(y) == 1]
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


@per_sample(
    "iou", "1 if IoU(answer box, reference box) > 0.5; four numbers x1, y1, x2, y2 with x1 < x2, y1 < y2"
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
    s.name: s for s in (exact, vqa, contains, choice, number, iou, caption, cider, bleu4, rouge_l)
}
SCORES: dict[str, Score] = {**STRICT, **COMPAT}
"""Every scorer by name. `compat_*` replicate released code; the others are strict."""


def score(name: str) -> Score:
    """The scorer of that name; a RetainError that names the nearest one and the choices otherwise."""
    if name in SCORES:
        return SCORES[name]
    near = difflib.get_close_matches(name, SCORES, n=1, cutoff=0.0)
    raise RetainError(f"no score {name!r}; did you mean {near[0]!r}? Choose from {sorted(SCORES)}")
