"""Reading answers: normal forms, the EvalAI answer processor, numbers and boxes.

`evalai` follows the VQA evaluation (Antol et al., ICCV 2015, https://visualqa.org/evaluation.html) in the
form of Pythia's M4C evaluator, which LLaVA and CoIN use. Everything else is ours.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

Box = tuple[float, float, float, float]

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VALUE = {word: str(i) for i, word in enumerate(NUMBER_WORDS)}
_EVALAI_NUMBERS = {**_VALUE, "none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _contractions() -> dict[str, str]:
    """Each listed form, written with exactly one apostrophe missing, maps to that form."""
    table = {
        word[:i] + word[i + 1 :]: word
        for word in _APOSTROPHES.split()
        for i, c in enumerate(word)
        if c == "'"
    }
    return {**table, "somebody'd": "somebodyd"}  # reversed in the published table; kept as it is


CONTRACTIONS = _contractions()


def normal(text: str) -> str:
    """Compatibility-composed, case-folded, one space between words, no trailing full stops."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(". ")


def evalai(text: str) -> str:
    """The EvalAI normal form of an answer.

    Lower case; commas and question marks dropped; `'s` split off; other punctuation dropped where it touches
    a space, else turned into a space; full stops dropped unless a digit follows; number words to digits
    ("none" is "0"); articles dropped; apostrophes restored. Two oddities of the published code are kept since
    its numbers are the field's: at most 32 full stops are dropped, and "1,000" becomes "1000" by the first
    rule, not by its own.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _PUNCTUATION:
        touching = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touching else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [_EVALAI_NUMBERS.get(w, w) for w in out.split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\w)", re.IGNORECASE)
_FRACTION = re.compile(r"(?<![\w./])([-+]?\d+)\s*/\s*(\d+)(?![\w/])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def numbers(text: str) -> list[float]:
    """All numbers in a text, in order: signs, decimals, exponents, thousands commas, a/b, the words
    zero..ten.
    """
    text = _THOUSANDS.sub(
        "", unicodedata.normalize("NFKC", text).replace("\u2212", "-").replace("\u2044", "/")
    )
    text = _FRACTION.sub(lambda m: repr(int(m[1]) / int(m[2])) if int(m[2]) else m[0], text)
    text = re.sub(r"[A-Za-z]+", lambda m: _VALUE.get(m[0].lower(), m[0]), text)
    return [float(n) for n in _NUMBER.findall(text)]


def parse_box(source: str | Sequence[float]) -> Box | None:
    """Four finite numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2; None for anything else."""
    values = (
        [float(n) for n in _NUMBER.findall(source)] if isinstance(source, str) else [float(v) for v in source]
    )
    if len(values) != 4 or not all(math.isfinite(v) for v in values):
        return None
    x1, y1, x2, y2 = values
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def iou_of(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same units; 0 where the union is not
    positive.
    """
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = across * down
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0
