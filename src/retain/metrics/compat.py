"""The scorers that papers released, quirks included, so that a number can be compared with a published one.

CoIN: https://github.com/zackschen/CoIN (ETrain/Eval/LLaVA/CoIN); FCIT (DISCO) and HiDe-LLaVA (UCIT):
https://github.com/Ghy0501/FCIT, https://github.com/Ghy0501/HiDe-LLaVA; MLLM-DCL:
https://github.com/Ghy0501/MCITlib; MM-MergeBench: https://github.com/AuroraZengfh/RobustMerge (llava/eval).
Written from their behaviour; no code is taken over. Each docstring lists what is odd about the original. All of
them strip an answer when it is written down, as a model of ours does, and none strips it, or the reference, when
it is scored.

Not replicated, as one prediction per example is required here: CoIN's ImageNet scorer and the caption scorers
pair prediction i with annotation i, so one dropped line shifts all that follow; CoIN's GQA skips a missing
question; OCR-VQA prints "Samples: 0". The scorers below read `example.answer` where the original has a single
`answer` field.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from retain.metrics import captions
from retain.metrics.scorer import Judge, Scorer, per_corpus, per_sample
from retain.metrics.text import Box, evalai, iou_of
from retain.types import Example, RetainError

LETTERS = "ABCDE"


def _gold(example: Example) -> str:
    return example.answer or example.targets[0]


# ------------------------------------------------------------------------------------------------------- CoIN


def _leading_letter(text: str) -> str:
    """The text itself where it is a letter, or its letter before ". "; "" for anything else."""
    leads = len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". "
    return text[0] if leads or text in tuple(LETTERS) else ""


def _is_key(letter: str, example: Example) -> float:
    """Whether the letter is the key's; a letter past the choices never is."""
    allowed = LETTERS[: len(example.meta["options"])] if "options" in example.meta else LETTERS
    return float(letter in tuple(allowed) and letter == _gold(example).strip()[:1].upper())


@per_sample("compat_scienceqa", "letter parsed as CoIN does equals the key", strict=False)
def scienceqa(text: str, example: Example) -> float:
    """Letter: the text itself, or before ". ", else the FIRST one-character word in upper case.

    Odd: "a cat" reads as A and "I think B" as I (wrong); the letters end at E; a letter past the choices is
    wrong.
    """
    words = re.findall(r"\b(\w)\b", text)
    return _is_key(_leading_letter(text) or (words[0].upper() if words else ""), example)


@per_sample(
    "compat_textvqa", "M4C: per distinct reference, mean over 10 left-out of min(1, matches/3)", strict=False
)
def textvqa(text: str, example: Example) -> float:
    """Soft accuracy over exactly ten references.

    Odd: an answer that normalises to nothing ("the", "") matches references that do too; "none" is 0.
    """
    if len(example.targets) != 10:
        raise RetainError(
            f"score 'compat_textvqa': {example.told} has {len(example.targets)} references; "
            "the released scorer needs exactly 10 ('vqa' takes any number)"
        )
    answer, refs = evalai(text), [evalai(t) for t in example.targets]
    hits = sum(r == answer for r in refs)
    return (hits * min(1.0, (hits - 1) / 3) + (10 - hits) * min(1.0, hits / 3)) / 10 if hits else 0.0


@per_sample("compat_imagenet", "label is a substring of the answer OR the answer of the label", strict=False)
def imagenet(text: str, example: Example) -> float:
    """Two-way containment. Odd: an EMPTY answer is correct, "a" too; case matters; no word boundaries."""
    gold = _gold(example)
    return float(gold in text or text in gold)


@per_sample("compat_gqa", "in lower case and without trailing full stops equals gold", strict=False)
def gqa(text: str, example: Example) -> float:
    """Equality. Odd: gold is not lower-cased, so a gold with a capital is never met; "yes. " is wrong."""
    return float(text.rstrip(".").lower() == _gold(example))


def _same_upper(text: str, example: Example) -> float:
    """Equality ignoring case. Odd: no stripping, so "yes." and "yes " are wrong; one answer, not ten."""
    return float(text.upper() == _gold(example).upper())


@per_sample("compat_ocrvqa", "equality ignoring case; an answer with 'Unanswerable' is wrong", strict=False)
def ocrvqa(text: str, example: Example) -> float:
    """Equality ignoring case. Odd: an answer with "Unanswerable" is wrong even where gold says so."""
    return float("Unanswerable" not in text and text.lower() == _gold(example).lower())


def _released_box(text: str) -> Box | None:
    """Brackets removed, then the first and the last character dropped, then four floats between commas."""
    inner = text.replace("[", "").replace("]", "")[1:-1]
    try:
        values = [float(v) for v in inner.split(",")]
    except ValueError:  # unparsable is wrong, as in the original
        return None
    return (values[0], values[1], values[2], values[3]) if len(values) == 4 else None


@per_sample("compat_grounding", "IoU > 0.5; the box parser drops the first and last character", strict=False)
def grounding(text: str, example: Example) -> float:
    """IoU > 0.5 of boxes that are both scaled by max(w, h), which cancels out.

    Odd: after the brackets two more characters go, so "[0.10, 0.20, 0.50, 0.91]" ends at 0.9 and "[10, …]"
    starts at 0; inverted boxes are not refused.
    """
    box, source = _released_box(text), example.meta.get("box", _gold(example))
    if isinstance(source, str):
        try:
            source = [float(v) for v in source.replace("[", "").replace("]", "").split(",")]
        except ValueError:  # the original ends here; a reference without a box is the doctor's to find
            return 0.0
    if box is None or len(source) != 4:
        return 0.0
    side = float(max(example.meta.get("size", (1.0, 1.0))))
    a, b = ([v * side for v in values] for values in (box, source))
    return float(iou_of((a[0], a[1], a[2], a[3]), (b[0], b[1], b[2], b[3])) > 0.5)


# ---------------------------------------------------------------------------------------------- FCIT and UCIT


def _inside(text: str, example: Example) -> float:
    """The answer is inside gold, ignoring case. Odd: an EMPTY answer is correct, and so is any fragment."""
    return float(text.upper() in _gold(example).upper())


@per_corpus(
    "compat_caption",
    "mean of BLEU-1..4, ROUGE-L, CIDEr-D, each x100 (METEOR needs Java: absent)",
    strict=False,
)
def caption(texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
    """Per sample (sum of the four corpus BLEUs + its own ROUGE-L + its own CIDEr-D) * 100 / 6.

    The mean over samples is the released average without METEOR, and a bootstrap interval is too narrow by
    BLEU's share, since BLEU belongs to the corpus. Odd: CIDEr-D runs to 1000 and dominates; pairing is by
    position.
    """
    refs = [e.targets for e in examples]
    corpus = sum(captions.bleu(texts, refs))
    own = zip(texts, refs, captions.cider_d(texts, refs), strict=True)
    return [100.0 * (corpus + captions.rouge_l(t, r) + c) / 6 for t, r, c in own]


# --------------------------------------------------------------------------------------------------- MLLM-DCL


@per_sample(
    "compat_dcl_med",
    "gold is a substring of the answer, ignoring case; 'Unanswerable' is wrong",
    strict=False,
)
def dcl_med(text: str, example: Example) -> float:
    """MLLM-DCL Med. Odd: "Unknown" contains "no", so it is a correct "no"; "yes and no" is always right."""
    return float("Unanswerable" not in text and _gold(example).lower() in text.lower())


@per_sample(
    "compat_dcl_fin", "gold equals the answer in lower case without spaces and full stops", strict=False
)
def dcl_fin(text: str, example: Example) -> float:
    """MLLM-DCL Fin. Odd: only the answer loses its spaces and stops, so a gold of two words never matches."""
    answer = text.lower().replace(" ", "").replace(".", "")
    return float("Unanswerable" not in text and _gold(example).lower() == answer)


def _near(text: str, example: Example) -> float:
    """MLLM-DCL RS and AD (the release scores both with its AI2D script), case ignored.

    A gold with a space: it is inside the answer. A gold without: its full stops go; an answer of one word holds
    it anywhere, a longer one holds it after a space, or before a space, full stop or comma.

    Odd: a border on ONE side is enough ("car" is in "a cartoon"), and an answer of one word needs none ("no" is
    in "unknown"); gold "." is met by everything; no answer with "Unanswerable" is right.
    """
    answer, gold = text.lower(), _gold(example).lower()
    if "Unanswerable" in text:
        return 0.0
    if " " in gold:
        return float(gold in answer)
    gold = gold.replace(".", "")
    met = (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},") if " " in answer else (gold,)
    return float(any(m in answer for m in met))


def _source(example: Example) -> str:
    """Which data set a question of MLLM-DCL Sci is from: what its image's name begins with."""
    image = example.images[0] if example.images else None
    own = image.name.split("_")[0] if isinstance(image, Path) else ""
    return str(example.meta.get("source", own))


@per_sample(
    "compat_dcl_sci",
    "AI2D, TQA, VQA, SciVerse: equality; map questions: share of states, or containment",
    strict=False,
)
def dcl_sci(text: str, example: Example) -> float:
    """MLLM-DCL Sci. `meta["source"]`, or the image's name up to "_", is e.g. "AI2D" (map questions: any other).

    Odd: "Which states" questions split at commas without stripping, so "a, b" holds "a" and " b"; no points
    are lost for wrong states; other map questions accept any answer that contains gold.
    """
    if "Unanswerable" in text:
        return 0.0
    answer, gold = text.lower(), _gold(example).lower()
    if _source(example) in {"AI2D", "TQA", "VQA", "SciVerse"}:
        return float(gold == answer)
    if "Which states" in example.question:
        states = gold.split(",")
        return sum(s in answer.split(",") for s in states) / len(states)
    return float(gold in answer)


# ---------------------------------------------------------------------------------------------- MM-MergeBench


@per_sample("compat_mm_scienceqa", "letter parsed as RobustMerge does equals the key", strict=False)
def mm_scienceqa(text: str, example: Example) -> float:
    """The text itself, or before ". ", else the one "The answer is X." (also HiDe-LLaVA's and MCITlib's CoIN).

    Odd: the full stop stands for any character, so "The answer is B" at the end of the text is no answer and
    "The answer is Bob" is B; two such sentences are none, even with one letter; case matters.
    """
    named = re.findall(r"The answer is ([A-Z]).", text)
    return _is_key(_leading_letter(text) or (named[0] if len(named) == 1 else ""), example)


@per_sample(
    "compat_mm_imagenet",
    "label is in the answer OR the answer in the label, ignoring case",
    strict=False,
)
def mm_imagenet(text: str, example: Example) -> float:
    """ImageNet and ImageNet-R: two-way containment. Odd: an EMPTY answer is correct; no word boundaries."""
    gold, answer = _gold(example).upper(), text.upper()
    return float(gold in answer or answer in gold)


def _many(judge: Judge, formula: str, *names: str) -> list[Scorer]:
    return [per_sample(f"compat_{name}", formula, strict=False)(judge) for name in names]


UPPER = (
    "vizwiz", "vqav2", "imagenet_r", "arxivqa", "iconqa", "clevr", "aokvqa", "super_clevr", "tabmwp",
)  # fmt: skip

_ALL: list[Scorer] = [
    *(scienceqa, textvqa, imagenet, gqa, ocrvqa, grounding, caption, dcl_med, dcl_fin, dcl_sci),
    *(mm_scienceqa, mm_imagenet),
    *_many(_same_upper, "equality ignoring case with the single answer", *UPPER),
    *_many(_near, "gold is in the answer, beside a space, full stop or comma", "dcl_rs", "dcl_ad"),
    *_many(_inside, "the answer is a substring of gold, ignoring case", "figureqa", "dvqa"),
]
COMPAT: dict[str, Scorer] = {s.name: s for s in _ALL}
