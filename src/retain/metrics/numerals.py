"""Numbers in a text: digits in every writing, fractions, powers, words; each with its place.

A number is read whole or not at all: "3.5" holds no 5, "10²" is 100, "twenty-two" is 22, "5.5.1" and "x5" hold none.
Signs, decimals, exponents, thousands ("1,234", "1 234" with a narrow space), a/b and mixed fractions, powers of ten,
superscripts, "minus", number words with their multiples and fractions. A decimal comma is not told from a list: "3,5"
states two numbers.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from retain.metrics.grammar import UNSPACED

ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
UNITS = {word: i for i, word in enumerate(ONES)}
TENS = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
         "ninth": 9, "tenth": 10}  # fmt: skip
MEASURES = (
    "mm|cm|dm|km|m|in|ft|yd|mi|kg|mg|µg|g|lbs?|oz|t|ml|mL|cl|l|L|hrs?|h|min|ms|secs?|kW|W|V|mA|A|kHz|MHz|GHz|Hz|KB|MB|GB|TB"
    "|kJ|J|kPa|Pa|N|mol|px|pts?|pcs"
)
"""Units that may be glued to a number of an answer: "5cm" states 5. The unit itself is not compared."""


@dataclass(frozen=True)
class Numeral:
    """One number of a text, and where it stands in `prepared(text)`."""

    value: float
    start: int
    end: int


def written(text: str) -> str:
    """Compatibility-composed text (NFKC) in which raised and lowered digits stay what they are.

    "10²" is "10^2", "H₂O" is "H_2O", "3½" is "3 1/2", a circled B is " B ", full-width digits are digits; the minus
    sign is a hyphen, and a narrow space between thousands goes.
    """
    if text.isascii():
        return text
    text = re.sub("(?<=\\d)[\u00a0\u202f\u2009](?=\\d{3}(?!\\d))", "", text)
    out, level = [], ""
    for c in text:
        kind = unicodedata.decomposition(c).partition(" ")[0]
        plain = unicodedata.normalize("NFKC", c).replace("\u2212", "-")
        here = kind if kind in ("<super>", "<sub>") and plain in "0123456789+-" else ""
        if here and here != level:
            out.append("^" if here == "<super>" else "_")
        level = here
        if kind == "<circle>":
            plain = f" {plain} "
        elif kind == "<fraction>" and out and out[-1][-1:].isdigit():
            plain = f" {plain}"
        out.append(plain if here or kind in ("<circle>", "<fraction>") or plain == "-" else c)
    return unicodedata.normalize("NFKC", "".join(out)).replace("\u2044", "/")


# -- words -----------------------------------------------------------------------------------------------


_WORD = "|".join([*UNITS, *TENS, *SCALES])
_CHAIN = re.compile(
    rf"\b(?:an?\s+(?={'|'.join(SCALES)}))?(?:{_WORD})(?:(?:\s+and\s+|\s+|-)(?:{_WORD}))*\b", re.I
)
_MANY = re.compile(rf"(?<![\w.,])(\d+(?:\.\d+)?|\d{{1,3}}(?:,\d{{3}})+)[\s-]+({'|'.join(SCALES)})\b", re.I)
_PART = re.compile(
    rf"(?<![\w.])(\d+)[\s-]+({'|'.join(PARTS)})(s?|ves)\b|(?<![\w.])(\d+)[\s-]+(halves)\b", re.I
)
_AND_PART = re.compile(rf"(?<![\w.])(\d+)\s+and\s+(?:an?|1)\s+({'|'.join(PARTS)})\b", re.I)
_ALONE = re.compile(rf"\s*(?:an?\s+)?({'|'.join(PARTS)})\s*[.!]?\s*", re.I)
_POINT = re.compile(r"(?<![\w.])(\d+)\s+point\s+(\d(?:\s+\d)*)(?![\w.])", re.I)
_MINUS = re.compile(r"(?<!\d )(?<!\w-)\b(?:minus|negative)\s+(?=[\d.])", re.I)
_PRONOUN = re.compile(
    r"\b(?:the|this|that|which|each|every|any|no|another|some)(?:\s+(?!number|answer|total|count|is|sum|value)\w+)?\s+$",
    re.I,
)


def prepared(text: str) -> str:
    """The text with its number words as digits."""
    text = written(text)
    if alone := _ALONE.fullmatch(text):
        return f"1/{PARTS[alone[1].lower()]}" if alone[1].lower() in ("half", "third", "quarter") else text
    text = _MANY.sub(lambda m: _plain(float(m[1].replace(",", "")) * SCALES[m[2].lower()]), text)
    text = _CHAIN.sub(_digits, text)
    text = _POINT.sub(lambda m: f"{m[1]}.{''.join(m[2].split())}", text)
    text = _AND_PART.sub(lambda m: _plain(float(m[1]) + 1 / PARTS[m[2].lower()]), text)
    text = _PART.sub(_share, text)
    text = re.sub(r"(?<=\d)\s*/\s*(?=0+(?![\d.]))", " / ", text)  # nothing is divided by zero: two numbers
    text = _MINUS.sub("-", text)
    return re.sub("(?:^|(?<=[\\s(=:]))\u2013(?=[\\d.])", "-", text)  # a dash that stands for a minus


def _digits(match: re.Match[str]) -> str:
    """A chain of number words as one number, or several where they cannot be one ("one two")."""
    words = re.split(r"(\s+and\s+|\s+|-)", match[0].lower())
    if words[:1] in (["a"], ["an"]):
        words = words[2:]
    if words == ["one"]:
        at, end = match.span()
        before, after = match.string[max(0, at - 60) : at], match.string[end : end + 20]
        if _PRONOUN.search(before) or re.match(r"\s+(?:of|another)\b|['\u2019]s\b", after):
            return match[0]
    out, total, part, room = "", 0, 0, 0
    for gap, word in zip(["", *words[1::2]], words[::2], strict=True):
        value = UNITS.get(word, TENS.get(word, 0))
        joins = bool(out or total or part) and (" and " not in f" {gap.strip()} " or room >= 12)
        if word in SCALES:
            if part and joins and part < SCALES[word]:
                total, part = (total, part * 100) if word == "hundred" else (total + part * SCALES[word], 0)
            else:
                out += f"{_plain(total + part)}{gap}" if room else ""
                total, part = (0, 100) if word == "hundred" else (SCALES[word], 0)
            room = SCALES[word]
        elif joins and 0 < value < room:
            part, room = part + value, (10 if word in TENS else 1)
        else:
            out += f"{_plain(total + part)}{gap or ' '}" if room else ""
            total, part, room = 0, value, (10 if word in TENS else 1)
    return out + _plain(total + part)


def _share(match: re.Match[str]) -> str:
    """ "two thirds" as 2/3; "22 third" is an ordinal and no number."""
    if match[5]:
        return f"{match[4]}/2"
    if match[1] == "1" or match[3]:
        return f"{match[1]}/{PARTS[match[2].lower()]}"
    return "ordinal"


def _plain(value: float) -> str:
    return str(int(value)) if abs(value) < 1e15 and value == int(value) else repr(value)


# -- digits ----------------------------------------------------------------------------------------------

_LETTER = f"[^\\W{UNSPACED}]"
_INT = r"(?:[1-9]\d{0,2}(?:[,'\u2019]\d{3})+(?![,'\u2019]?\d)|[1-9]\d?(?:,\d{2})+,\d{3}(?!,?\d)|\d+)"
_DECIMAL = rf"(?:{_INT}(?:\.\d+)?|\.\d+)"
_FORMS = rf"""
    (?P<whole>{_INT})\s+(?P<of>\d+)/(?P<into>[1-9]\d*)
  | (?P<factor>{_DECIMAL})\s*(?:[x×*·]|\\times)\s*10\^?\{{?(?P<ten>[-+]?\d+)\}}?
  | (?P<base>{_DECIMAL})(?:\^|\*\*)\{{?(?P<power>[-+]?\d+)\}}?
  | (?P<over>{_INT})\s*/\s*(?P<under>[1-9]\d*)
  | (?P<exp>\d+(?:\.\d+)?e[-+]?\d+)
  | (?P<plain>{_DECIMAL})
"""
_BEFORE = r"(?<![\d.^√±_/])(?<!\^-)(?<!" + _LETTER + ")"
_SIGN = r"(?P<sign>(?<![\w)\]\d])[-+]\s?(?=[$€£¥])|(?<![\w)\]])[-+])?(?P<coin>[$€£¥]\s?)?"
_BEHIND = r"(?!\.?\d|[./^_]\d|\*\*\d)"
_KEY = re.compile(rf"{_SIGN}{_BEFORE}(?:{_FORMS}){_BEHIND}(?!{_LETTER})", re.X | re.I)
_SAID = re.compile(
    rf"{_SIGN}{_BEFORE}(?:{_FORMS}){_BEHIND}(?:(?=(?-i:{MEASURES})(?![A-Za-z]))|(?!{_LETTER}))", re.X | re.I
)


def numerals(text: str, *, glued: bool = False) -> list[Numeral]:
    """The numbers of a `prepared` text, in order. `glued`: also where a unit stands directly behind one."""
    pattern = _SAID if glued else _KEY
    return [
        Numeral(v, m.start(), m.end()) for m in pattern.finditer(text) if abs(v := _value(m)) < float("inf")
    ]


def _value(m: re.Match[str]) -> float:
    sign = -1.0 if (m["sign"] or "").startswith("-") else 1.0
    try:
        if m["whole"]:
            return sign * (_number(m["whole"]) + int(m["of"]) / int(m["into"]))
        if m["factor"]:
            return sign * _number(m["factor"]) * 10.0 ** int(m["ten"])
        if m["base"]:
            return sign * float(_number(m["base"]) ** int(m["power"]))
        if m["over"]:
            return sign * _number(m["over"]) / int(m["under"])
        return sign * _number(m["exp"] or m["plain"])
    except (OverflowError, ZeroDivisionError, ValueError):  # ValueError: thousands of digits
        return float("inf")


def _number(text: str) -> float:
    return float(re.sub("[,'\u2019]", "", text))
