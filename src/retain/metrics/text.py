"""Reading answers: normal forms, the EvalAI answer processor, whole words, numbers, boxes, edit distance.

`evalai` follows the VQA evaluation (Antol et al., ICCV 2015, https://visualqa.org/evaluation.html) in the
form of Pythia's M4C evaluator, which LLaVA and CoIN use. Everything else is ours.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from retain.metrics.grammar import UNSPACED, stances
from retain.metrics.numerals import numerals, prepared, written

REMEMBERED = 1 << 16
"""Texts whose reading is kept: the same short answers come again and again."""

Box = tuple[float, float, float, float]

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_EVALAI_NUMBERS = {**{word: str(i) for i, word in enumerate(NUMBER_WORDS)}, "none": "0"}
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


@lru_cache(REMEMBERED)
def normal(text: str) -> str:
    """Compatibility-composed (`numerals.written`), case-folded, one space between words, no trailing full stops."""
    return " ".join(written(text).casefold().split()).rstrip(".\u3002 ")


@lru_cache(REMEMBERED)
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


# -- whole words -----------------------------------------------------------------------------------------

_LETTER = re.compile(f"[^\\W{UNSPACED}]")


def whole(text: str, start: int, end: int) -> bool:
    """Whether text[start:end] stands there as words or numbers of its own.

    Two letters or digits side by side are one word, unless one of them is of a script without spaces. A digit
    also belongs to the decimal, fraction, power, date or range that it touches, and to its minus sign. A
    combining mark belongs to the letter before it, and "can" is not in "can't".
    """
    left, first, last, right = text[start - 1 : start], text[start], text[end - 1], text[end : end + 1]
    if _one_word(left, first) or _one_word(last, right):
        return False
    if right and unicodedata.category(right).startswith("M"):
        return False
    if last.isalpha() and re.match(r"['\u2019]t\b", text[end : end + 3], re.IGNORECASE):
        return False
    return not (_in_number_before(text, start) or _in_number_behind(text, end))


def _one_word(a: str, b: str) -> bool:
    return bool(a and b and _LETTER.match(a) and _LETTER.match(b))


def _in_number_before(text: str, start: int) -> bool:
    if not text[start].isdigit():
        return text[start] in "+-" and start > 0 and text[start - 1].isalnum()
    before = text[:start][-2:]
    if re.search(r"\d[.,/:^'\u2019\u2013-]$|[._^\u221a\u00b1]$", before):
        return True
    return bool(re.search(r"(?:^|\W)-$", before)) or (before[-1:] == "\u2013" and not before[:-1].strip())


def _in_number_behind(text: str, end: int) -> bool:
    return text[end - 1].isdigit() and bool(re.match(r"[.,/:'\u2019\u2013-]\d|\^|_\d", text[end : end + 2]))


@lru_cache(REMEMBERED)
def _pattern(label: str) -> re.Pattern[str]:
    return re.compile(r"\s+".join(map(re.escape, label.split())), re.IGNORECASE)


def places(label: str, text: str) -> list[tuple[int, int]]:
    """Where a normalised label stands in a text as whole words."""
    if not label:
        return []
    return [m.span() for m in _pattern(label).finditer(text) if whole(text, *m.span())]


def said(label: str, text: str) -> bool:
    """Whether a text holds a normalised label as whole words, somewhere without denying it."""
    spans = places(label, text)
    return bool(spans) and any(not s.denied for s in stances(text, spans))


# -- numbers and boxes -----------------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    """All numbers of a text that stand apart from letters, in order, whatever is claimed of them
    (`retain.metrics.numerals`).
    """
    return [n.value for n in numerals(prepared(text))]


_BOUND_BEFORE = re.compile(
    r"(?:\b(?:more|less|fewer|greater|larger|bigger|smaller|higher|lower|older|younger)\s+than(?:\s+or\s+equal\s+to)?"
    r"|\bat\s+(?:least|most)|\bup\s+to|\b(?:over|under|above|below|exceeding|exceeds)|[<>\u2264\u2265])\s*[$\u20ac\u00a3]?\s*$",
    re.IGNORECASE,
)
_BOUND_BEHIND = re.compile(
    r"\s*\+(?!\s*\d)|\s+or\s+(?:more|less|fewer|above|below|higher|lower|older|younger)\b", re.I
)


@lru_cache(REMEMBERED)
def stated(text: str) -> frozenset[float]:
    """The numbers that an answer claims: not denied ("not 5") or asked ("is it 5?"), no mere bound ("more than 5")."""
    text = prepared(text)
    found = numerals(text, glued=True)
    if not found:
        return frozenset()
    kept = stances(text, [(n.start, n.end) for n in found])
    return frozenset(
        n.value
        for n, stance in zip(found, kept, strict=True)
        if not (stance.denied or stance.open)
        and not _BOUND_BEFORE.search(text[max(0, n.start - 40) : n.start])
        and not _BOUND_BEHIND.match(text, n.end)
    )


_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?(?!\w)", re.IGNORECASE)


def four_numbers(source: str | Sequence[float]) -> Box | None:
    """Four finite numbers, whatever they mean; None for anything else."""
    try:
        found = _NUMBER.findall(source) if isinstance(source, str) else list(source)
        values = [float(v) for v in found]
    except (TypeError, ValueError):
        return None
    if len(values) != 4 or not all(math.isfinite(v) for v in values):
        return None
    return (values[0], values[1], values[2], values[3])


def parse_box(source: str | Sequence[float]) -> Box | None:
    """Four finite numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2; None for anything else."""
    box = four_numbers(source)
    return box if box and box[0] < box[2] and box[1] < box[3] else None


def iou_of(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) in the same units; 0 where the union is not
    positive.
    """
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    down = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = across * down
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def edits(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions (Myers 1999, in the form of Hyyro 2003)."""
    if a == b or not a or not b:
        return 0 if a == b else max(len(a), len(b))
    top, full = 1 << (len(a) - 1), (1 << len(a)) - 1
    where: dict[str, int] = {}
    for i, c in enumerate(a):
        where[c] = where.get(c, 0) | 1 << i
    up, down, distance = full, 0, len(a)  # rows that rise by one, rows that fall by one
    for c in b:
        match = where.get(c, 0)
        same = (((match & up) + up) ^ up) | match | down
        right_up, right_down = down | ~(same | up), up & same
        distance += bool(right_up & top) - bool(right_down & top)
        right_up = right_up << 1 | 1
        up = (right_down << 1 | ~(same | right_up)) & full
        down = right_up & same & full
    return distance
