"""Which option an answer states, by the grammar of its sentences.

An option is mentioned by its letter or by its text. An article is no letter: "a" or "A" before a noun ("a cat") is
one, before a verb, a conjunction or a border ("A is right", "A because", "A.") it is the option. What the sentence
does with each mention is read by `retain.metrics.grammar`. Then, from the strongest kind that there is:

    1  a clause that says nothing but "it is this one": "B", "(b)", "B because …", "the answer is B", "I choose a cat"
    2  a letter that is called an option ("option B", "(B)") or an option's text, in any other clause; a guess
    3  an option described by its own text ("B is a dog")

Mentions that are denied or only asked about do not count, and an option that is denied anywhere is not stated. One
option left is the answer; none or several are no answer. The text of several equal options fits any of their letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from retain.metrics.grammar import UNSPACED, Stance, stances, words_of
from retain.metrics.numerals import written
from retain.metrics.text import REMEMBERED, normal, places

_ALONE = re.compile(r"[(\[]?([a-z])[)\]]?[.:,]?", re.IGNORECASE)
_LED = re.compile(r"(?:[(\[]([a-z])[)\]]|([a-z])[.:)])\s*(\S.*)", re.IGNORECASE | re.DOTALL)
_BLANKS = "".join(c for c in map(chr, range(0x3001)) if re.match(r"\s", c))
_WORD = f"[^\\W{UNSPACED}]"
_LETTER = re.compile(
    rf"(?<!{_WORD})(?<!{_WORD}['\u2019.+-])(?<![_+\u00b0\\])[A-Za-z](?!{_WORD}|['\u2019.-]{_WORD}|[_+#\u00b0^])"
)
_CALLED = re.compile(
    r"(?:\b(?:options?|choices?|answers?|letters?)\s*(?:is|:)?\s*|[(\[]\s*|选项?\s*)$", re.IGNORECASE
)
_NAMED = re.compile(r"\b(?:options?|choices?|letters?)\s*$", re.IGNORECASE)
_START = re.compile(r"(?:^|[.!?:\n]\s*)$")
_LISTED = re.compile(r"^[ \t]*[(\[]?([A-Za-z])[)\].:][ \t]+\S.*$", re.MULTILINE)
_AFTER_LETTER = words_of(
    "is was because since as and or nor but for so would will seems looks appears has which that it not in with if while",
    "though although from due may might can could should must only also too then by to being isn't wasn't cannot can't",
    "doesn't does matches shows fits best",
)
NEAR = 60  # characters around a letter that say what it is
_VERDICTS = words_of("right wrong true false correct incorrect yes no both none all")


@dataclass(frozen=True)
class _Mention:
    start: int
    end: int
    letters: frozenset[str]
    by_letter: bool
    called: bool = False  # "option B", "(B)"


@lru_cache(REMEMBERED)
def option_texts(options: tuple[str, ...]) -> tuple[str, ...]:
    """Normalised option texts, a leading letter ("A. cat", "(A) cat") removed."""
    led = [(option, _LED.fullmatch(option.strip())) for option in options]
    return tuple(normal(m[3] if m else option) for option, m in led)


def parse_choice(text: str, options: Sequence[str] = ()) -> str | None:
    """The option letter that an answer states, or None where it states none or more than one.

    `options` are normalised (`option_texts`). A letter past the options may be stated, and is then wrong.
    """
    return _parsed(text, tuple(options))


@lru_cache(REMEMBERED)
def _parsed(text: str, options: tuple[str, ...]) -> str | None:
    text = _plain(text)
    if alone := _ALONE.fullmatch(text):
        letter = alone[1].upper()
        by_text = _having(options, letter.lower())
        if not by_text or ord(letter) - 65 < len(options):
            return letter
        return next(iter(by_text)) if len(by_text) == 1 else None
    text = _without_list(text)
    found = _mentions(text, options)
    return _decided(text, found, stances(text, [(m.start, m.end) for m in found]))


def _plain(text: str) -> str:
    """Markup gone: bold, code, TeX, tags; what is boxed is a sentence of its own."""
    text = written(text)
    text = re.sub(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|textbf|mathbf)\s*\{)?([^{}]*)\}+", r" . \1 . ", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"</?[A-Za-z_]+>|\\[()\[\]]|[*`$#]+|(?<!\w)_+|_+(?!\w)", " ", text)
    text = text.lstrip(f"{_BLANKS}\"'\u201c.").rstrip(f"{_BLANKS}\"'\u201d")
    return re.sub(r"[ \t]+", " ", re.sub(r"^ | $", "", text, flags=re.MULTILINE)).strip()


def _without_list(text: str) -> str:
    """The answer without a repetition of the options ("A. cat", "B. dog", … each on its line) before it."""
    lines = list(_LISTED.finditer(text))
    letters = [m[1].upper() for m in lines]
    if len(lines) < 2 or letters != [chr(65 + i) for i in range(len(letters))]:
        return text
    rest = _LISTED.sub("", text).strip()
    return rest if re.search(r"\w", rest) else text


def _having(options: Sequence[str], label: str) -> frozenset[str]:
    return frozenset(chr(65 + i) for i, option in enumerate(options) if option and option == label)


def _mentions(text: str, options: Sequence[str]) -> list[_Mention]:
    """Texts of options, the longest first, and letters outside of them; in order."""
    found: list[_Mention] = []
    taken = bytearray(len(text))

    def take(start: int, end: int) -> bool:
        if any(taken[start:end]):
            return False
        taken[start:end] = b"\1" * (end - start)
        return True

    for label in sorted(
        {o for o in options if len(o) > 1 or not o.isascii() or o.isdigit()}, key=len, reverse=True
    ):
        found += [
            _Mention(*span, _having(options, label), False) for span in places(label, text) if take(*span)
        ]
    texts = {m.start for m in found}
    for m in _LETTER.finditer(text):
        if not any(taken[m.start() : m.end()]) and (mention := _letter(text, m, options, texts)):
            found.append(mention)
    if any(m.by_letter for m in found):  # "A is right": a verdict, and not the option "right"
        found = [m for m in found if m.by_letter or text[m.start : m.end].casefold() not in _VERDICTS]
    return sorted(found, key=lambda m: m.start)


def _letter(text: str, match: re.Match[str], options: Sequence[str], texts: set[int]) -> _Mention | None:
    """A letter as an option, or None: an article, the pronoun I, a letter past the options in running text."""
    start, end, letter = *match.span(), match[0]
    before, after = text[max(0, start - NEAR) : start], text[end : end + NEAR]
    bracketed = bool(re.search(r"[(\[]\s*$", before)) and bool(re.match(r"\s*[)\]]", after))
    named = bracketed or bool(_NAMED.search(before))
    follows = re.match(rf"\s+([^\W\d_{UNSPACED}]+(?:'[^\W\d_]+)?|\d)", after)
    word = follows[1].casefold() if follows else ""
    leads_noun = bool(word) and (word not in _AFTER_LETTER or end + follows.start(1) in texts)  # type: ignore[union-attr]
    if letter in "aA" and not named and leads_noun and (letter == "a" or _START.search(before)):
        return None
    if letter in "iI" and not named and (word or letter == "i"):
        return None
    called = named or bool(_CALLED.search(before))
    past = options and ord(letter.upper()) - 65 >= len(options)
    if past and (own := _having(options, letter.lower())):
        return _Mention(start, end, own, False)
    if past and not called and not (_START.search(before) and re.match(r"\s*(?:[.):,]|$)", after)):
        return None
    return _Mention(start, end, frozenset({letter.upper()}), True, called)


def _decided(text: str, found: Sequence[_Mention], how: Sequence[Stance]) -> str | None:
    claimed = [(m, s) for m, s in zip(found, how, strict=True) if not s.denied and not s.open]
    denied = {
        next(iter(m.letters)) for m, s in zip(found, how, strict=True) if s.denied and len(m.letters) == 1
    }
    read = [(m, s) for m, s in claimed if s.clause >= 0]
    described = {id(m) for m, s in read if _described(text, m, s, read)}
    first = [m for m, s in claimed if s.bare and not s.hedged and id(m) not in described]
    second = [m for m, s in claimed if (not m.by_letter or m.called or s.bare) and id(m) not in described]
    third = [m for m, _ in claimed if id(m) in described]
    for kind in (first, second, third):
        letters = _agreed(kind)
        if letters:
            letters -= denied
            return letters.pop() if len(letters) == 1 else None
    return None


def _described(
    text: str, mention: _Mention, stance: Stance, claimed: Iterable[tuple[_Mention, Stance]]
) -> bool:
    """ "B is a dog": a letter and, behind a verb of the same clause, its own option's text."""
    for other, its in claimed:
        if (
            its.clause != stance.clause
            or other.by_letter == mention.by_letter
            or not other.letters & mention.letters
        ):
            continue
        first, second = (mention, other) if mention.by_letter else (other, mention)
        between = text[first.end : second.start]
        if first.end <= second.start and re.search(r"\b(?:is|are|shows|depicts|means)\b", between):
            return True
    return False


def _agreed(mentions: Iterable[_Mention]) -> set[str]:
    """The options that a set of mentions names; a text of several options adds none if one of them is named."""
    ordered = sorted(mentions, key=lambda m: len(m.letters))
    letters: set[str] = set()
    for mention in ordered:
        if len(mention.letters) == 1 or not mention.letters & letters:
            letters |= mention.letters
    return letters
