"""Regular expressions from strangers, matched in bounded time: PEFT's `rank_pattern`, `alpha_pattern`, `target_modules`.

Python's `re` tries one way after the other, so `(a+)+$` takes longer than anybody waits on a name of forty letters. Here
such an expression is walked as a set of places instead (Thompson 1968, "Regular expression search algorithm"): time grows
with the length of the name times the size of the expression. The answer, yes or no, is that of `re`. An expression that
cannot be walked so (a look around, a reference to a group, a flag) and has more than a few choices is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from retain.types import RetainError

LONGEST = 100_000
"""Characters of an expression: more is a mistake. PEFT's own list thousands of modules, one for each."""
LARGEST = 2_000
"""Places of an expression that is walked; `{1,1000}` has a thousand."""
EASY = 3
"""Repeats and choices, none inside a repeat, that `re` may try: on a name of 300 letters it is done in no time."""

Match = Callable[[str], bool]
_Edge = tuple[
    Any, int
]  # what must be true of the next character (None: nothing is read), and the place behind it


def matcher(text: object, where: str, *, whole: bool = True) -> Match:
    """Says of a name whether the expression is all of it (`re.fullmatch`), or stands anywhere in it (`re.search`).

    Raises RetainError, which says `where` it stands, for what is no expression or could take for ever.
    """
    if not isinstance(text, str):
        raise RetainError(f"{where}: {text!r} is no regular expression")
    found = _made(text, whole)
    if isinstance(found, str):
        shown = text if len(text) <= 80 else text[:79] + "…"
        raise RetainError(f"{where}: {shown!r} {found}")
    return found


@lru_cache(maxsize=4096)
def _made(text: str, whole: bool) -> Match | str:
    """The matcher, or what is wrong with the expression."""
    if len(text) > LONGEST:
        return f"is no regular expression: {len(text):,} characters, at most {LONGEST:,} are taken"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a later Python will read otherwise
            tree = _parser.parse(text)
            nested, many = _choices(tree)
            if not nested and many <= EASY:
                compiled = re.compile(text)
                call = compiled.fullmatch if whole else compiled.search
                return lambda name: call(name) is not None
            return _Walk(tree, whole)
    except _Unwalkable as error:
        return (
            f"could take for ever to match: it has choices inside choices, and {error}; write it without that"
        )
    except (re.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        return f"is no regular expression: {error}"


def _parts(kind: Any, value: Any) -> list[Any]:
    """The expressions inside a piece of a parsed expression."""
    if kind is op.SUBPATTERN:
        return [value[3]]
    if kind is op.BRANCH:
        return list(value[1])
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return [value[1]]
    if kind is op.GROUPREF_EXISTS:
        return [v for v in value[1:] if v is not None]
    if kind is op.ATOMIC_GROUP:
        return [value]
    return [value[2]] if kind in _REPEATS else []


_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def _choices(tree: Any, inside: bool = False) -> tuple[bool, int]:
    """Whether a choice (a number of times, an alternative) is repeated or referred to, and how many there are."""
    nested, many = False, 0
    for kind, value in tree:
        choice = (kind in _REPEATS and value[0] != value[1]) or kind is op.BRANCH
        nested |= (inside and choice) or kind is op.GROUPREF
        many += choice
        for part in _parts(kind, value):
            deeper, more = _choices(part, inside or (kind in _REPEATS and value[1] > 1))
            nested, many = nested or deeper, many + more
    return nested, many


class _Unwalkable(Exception):
    """What has no walk."""


class _Walk:
    """The expression as places with edges; a name is read once, and all places that can be reached are kept."""

    def __init__(self, tree: Any, whole: bool) -> None:
        if tree.state.flags & ~re.UNICODE:
            raise _Unwalkable("it sets a flag")
        self.edges: list[list[_Edge]] = [[]]
        self.whole = whole
        self.end = self._sequence(tree, 0)
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def __call__(self, name: str) -> bool:
        here = self._closed({0}, name, 0)
        for at, letter in enumerate(name):
            if not self.whole and self.end in here:
                return True
            if self.whole and not here:
                return False
            here = self._closed(self._read(here, letter), name, at + 1)
            if not self.whole:
                here |= self._closed({0}, name, at + 1)
        return self.end in here

    def _read(self, here: frozenset[int], letter: str) -> frozenset[int]:
        found = self._known.get((here, letter))
        if found is None:
            edges = (e for place in here for e in self.edges[place])
            found = frozenset(to for test, to in edges if callable(test) and test(letter))
            if len(self._known) < 50_000:
                self._known[here, letter] = found
        return found

    def _closed(self, places: frozenset[int] | set[int], name: str, at: int) -> frozenset[int]:
        """What can be reached from some places without reading."""
        seen, left = set(places), list(places)
        while left:
            for test, to in self.edges[left.pop()]:
                if to not in seen and (test is None or (isinstance(test, str) and _stands(test, name, at))):
                    seen.add(to)
                    left.append(to)
        return frozenset(seen)

    # -- building --------------------------------------------------------------------------------------------

    def _place(self) -> int:
        if len(self.edges) >= LARGEST:
            raise ValueError(f"it is too large: more than {LARGEST:,} places")
        self.edges.append([])
        return len(self.edges) - 1

    def _edge(self, start: int, test: Any) -> int:
        end = self._place()
        self.edges[start].append((test, end))
        return end

    def _sequence(self, tree: Any, start: int) -> int:
        for kind, value in tree:
            start = self._piece(kind, value, start)
        return start

    def _piece(self, kind: Any, value: Any, start: int) -> int:
        if kind in (op.LITERAL, op.NOT_LITERAL, op.IN, op.ANY):
            return self._edge(start, _test(kind, value))
        if kind is op.AT and value in _AT:
            return self._edge(start, _AT[value])
        if kind is op.SUBPATTERN and not value[1] and not value[2]:
            return self._sequence(value[3], start)
        if kind is op.BRANCH:
            end = self._place()
            for branch in value[1]:
                self.edges[self._sequence(branch, self._edge(start, None))].append((None, end))
            return end
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, body = value
            return self._repeat(low, high, body, start)
        raise _Unwalkable(f"it uses {str(kind).lower().replace('_', ' ')}")

    def _repeat(self, low: int, high: int, body: Any, start: int) -> int:
        if low > LARGEST:
            raise ValueError(f"it is too large: more than {LARGEST:,} places")
        for _ in range(low):
            start = self._sequence(body, start)
        if high is op.MAXREPEAT:
            loop = self._edge(start, None)
            self.edges[self._sequence(body, loop)].append((None, loop))
            return self._edge(loop, None)
        end = self._place()
        for _ in range(high - low):
            self.edges[start].append((None, end))
            start = self._sequence(body, start)
        self.edges[start].append((None, end))
        return end


_AT = {
    op.AT_BEGINNING: "start", op.AT_BEGINNING_STRING: "start", op.AT_END: "end", op.AT_END_STRING: "very end",
    op.AT_BOUNDARY: r"\b", op.AT_NON_BOUNDARY: r"\B",
}  # fmt: skip


def _stands(test: str, name: str, at: int) -> bool:
    """Whether a place in a name is its start, its end, a border between words."""
    if test == "start":
        return at == 0
    if test == "very end":
        return at == len(name)
    if test == "end":
        return at == len(name) or (at == len(name) - 1 and name[at] == "\n")
    return re.compile(test).match(name, at) is not None


_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d", op.CATEGORY_NOT_DIGIT: r"\D", op.CATEGORY_SPACE: r"\s", op.CATEGORY_NOT_SPACE: r"\S",
    op.CATEGORY_WORD: r"\w", op.CATEGORY_NOT_WORD: r"\W",
}  # fmt: skip


def _test(kind: Any, value: Any) -> Callable[[str], bool]:
    """What must be true of one character."""
    if kind is op.LITERAL:
        return lambda c: ord(c) == value
    if kind is op.NOT_LITERAL:
        return lambda c: ord(c) != value
    if kind is op.ANY:
        return lambda c: c != "\n"
    if kind is op.RANGE:
        return lambda c: value[0] <= ord(c) <= value[1]
    if kind is op.CATEGORY:
        compiled = re.compile(_CATEGORIES[value])
        return lambda c: compiled.match(c) is not None
    assert kind is op.IN, kind
    inverted = value[0][0] is op.NEGATE
    tests = [_test(*item) for item in value[inverted:]]
    return lambda c: any(t(c) for t in tests) != inverted
