"""Who is asserted: whether an answer claims, denies or only asks about the words that a scorer found in it.

A scorer finds its mentions (options, numbers, labels); here the sentence around them is read. It is cut into
clauses, and a mention is

    denied      after "not", "n't", "never", "neither", "nor" in its clause; in the phrase after "no", "without",
                "except", "rather than"; or where its clause calls it wrong. "not wrong" is right again.
    open        in a question, or after "if", "whether", "unless"
    bare        where nothing stands in the clause but the mention and words that carry no claim of their own
                ("the answer is", "I would go with"): the clause says "it is this one" and nothing else

"but", "because", "so", commas, colons and dashes end a clause; "and", "or" end it where both sides have a verb,
so that "not A or B" denies both and "it is not A and it is B" only the first. English, and the plainest Chinese and
Japanese; in other languages mentions are found and nothing is denied.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

FIRST, MOST = (
    0xE000,
    200,
)  # so many mentions become characters of the private use area; beyond, all is claimed

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han), and Hangul, whose particles are glued
to the noun: ranges of a character class."""


def words_of(*lines: str) -> frozenset[str]:
    """The words of some lines as a set."""
    return frozenset(" ".join(lines).split())


NOT = words_of("not never cannot neither nor none cant isnt dont doesnt wont wasnt arent 不 没 非 未")
NO = words_of("no without except unlike excluding")
WRONG = words_of(
    "wrong incorrect false invalid impossible excluded eliminated rejected untrue inaccurate unlikely mistaken 错 誤"
)
GOOD = words_of(
    "correct right true answer answers it possible valid so match fit work apply hold be one solution"
)
REFUSALS, ARTICLES = words_of("not never cannot"), words_of("a an the")
COPULA = words_of("is are was were be been am looks seems appears being isn't aren't wasn't weren't not")
SAYING = COPULA | words_of(
    "will would can could should may might must do does did think believe guess choose pick select say go know chose"
)
VERBS = SAYING | words_of("has have had shows show depicts depict contains contain see sees matches means")
ADVERBS = words_of(
    "certainly definitely clearly surely obviously actually really just only also probably simply very quite totally",
    "completely entirely absolutely plainly still always",
)
HEDGES = words_of("could might may maybe perhaps possibly either")
ONLY_IF = words_of("if whether unless")
JOINS = words_of("and or nor & /")
ENDS_PHRASE = words_of("on in at with by near next to from beside behind under over and or but") | COPULA
FRAME = (
    SAYING | HEDGES | ADVERBS | NOT | WRONG | GOOD | JOINS
    | words_of(
        "a an the i we you he she it its this that these my our your i'd i'll i'm it's that's he's",
        "option options choice choices letter response result key best final most likely probable appropriate accurate",
        "suitable correctly closest obvious clear selected chosen choosing picking selecting going like opt for thus",
        "therefore hence then probably definitely clearly certainly surely obviously actually really just only also again",
        "yes no ok okay well sure to of as with conclude conclusion both all above following please let me us opinion",
        "sure certain confident guessing elimination by gonna must given well definitively say everything anything",
    )
)  # fmt: skip
FRAME_CHARACTERS = frozenset("答案选项择是为应该我认的正确的这那個个它就就是です答えはがを選択肢")

_IDIOMS = [
    (re.compile(r"\b(?:without|no|beyond)\s+(?:a\s+|any\s+)?(?:doubt|question)\b"), " "),
    (re.compile(r"\bnot\s+(?:\w+\s+)?(?:sure|certain|clear|only|just|easy|hard|difficult)\b"), " "),
    (re.compile(r"\bnothing\s+(?:but|except|other\s+than)\b"), " only "),
    (re.compile(r"\b(?:anything|everything|all|any|anyone|every)\s+(?:\w+\s+)?but\b"), " except "),
    (re.compile(r"\b(?:other|rather)\s+than\b|\b(?:instead|regardless)\s+of\b|\b(?:apart|aside)\s+from\b"), " except "),
    (re.compile(r"\b(?:ruled|crossed|left|counted)\s+out\b"), " eliminated "),
    (re.compile(r"\b(think|believe|say|sure|know|suppose|guess|feel|means?|conclude|clear|seems|appears)\s+that\b"), r"\1"),
    (re.compile(r"\bas\s+well\s+as\b"), " and "),
    (re.compile(r",?\s*(?:right|correct|no|isn't\s+it|aren't\s+they|doesn't\s+it|don't\s+you\s+think)\s*\?"), "."),
]  # fmt: skip
_SENTENCE = re.compile(r"([.!?;\n\u3002]+)")
_BREAK = re.compile(
    r"(,|\u3001|\u2014|\u2013|(?<=\s)-+(?=\s)|[()\[\]{}|]|:|而是|但是|但|因为|所以"
    r"|\b(?:but|because|since|as|so|while|whereas|although|though|however|therefore|thus|hence|that|which|who|whose|where"
    r"|when|then|yet|if|whether|unless)\b)"
)
_JOIN = re.compile(r"(\b(?:and|or|nor)\b|[&/]|还是|或者|或|和|与)")
_TOKEN = re.compile(rf"[\ue000-\uf8ff]|[{UNSPACED}]|[^\W\d_{UNSPACED}]+(?:'[^\W\d_{UNSPACED}]+)*|\d+|[&/]")


@dataclass(frozen=True)
class Stance:
    """What an answer does with one mention."""

    denied: bool = False
    open: bool = False
    bare: bool = False
    hedged: bool = False
    clause: int = -1  # which clause it stands in: equal numbers stand together


@dataclass
class _Clause:
    tokens: list[str]
    open: bool = False
    lead: str = ""  # what stands before it
    marks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.marks = [i for i, t in enumerate(self.tokens) if _is_mark(t)]

    @property
    def verb(self) -> bool:
        return _has_verb(self.tokens)

    @property
    def bare(self) -> bool:
        if not self.marks or not all(_is_mark(t) or _empty(t) for t in self.tokens):
            return False
        return _not_wrong(self) or not any(_negates(t) for t in self.tokens[self.marks[-1] + 1 :])


def stances(text: str, spans: Sequence[tuple[int, int]]) -> list[Stance]:
    """The stance of an answer towards each span of it. Spans are in order and do not overlap."""
    found = [Stance() for _ in spans]
    spans, text = spans[:MOST], re.sub("[\ue000-\uf8ff]", " ", text)
    if not spans:
        return found
    masked, at = "", 0
    for k, (start, end) in enumerate(spans):
        masked += f"{text[at:start]} {chr(FIRST + k)} "
        at = end
    masked += text[at : at + 1000]
    for number, clause in enumerate(_clauses(masked.casefold().replace("\u2019", "'"))):
        for index, denied in _denials(clause):
            hedged = any(t in HEDGES for t in clause.tokens)
            found[index] = Stance(denied, clause.open, clause.bare, hedged, number)
    return found


def _is_mark(token: str) -> bool:
    return len(token) == 1 and FIRST <= ord(token) < FIRST + MOST


def _negates(token: str) -> bool:
    return token in NOT or token.endswith("n't")


def _has_verb(tokens: Iterable[str]) -> bool:
    return any(t in VERBS or t.endswith(("n't", "'s", "'re", "'m")) for t in tokens)


def _empty(token: str) -> bool:
    """A word that claims nothing by itself."""
    return token in FRAME or token in FRAME_CHARACTERS or _negates(token) or token in NO


def _clauses(text: str) -> list[_Clause]:
    text = re.sub(
        r"[\"'`\u201c\u201d\u00ab\u00bb*_$]*([\ue000-\uf8ff])[\"'`\u201c\u201d\u00ab\u00bb*_$]*", r"\1", text
    )
    text = re.sub(r"[(\[{]\s*([\ue000-\uf8ff])\s*[)\]}]", r"\1", text)
    for pattern, instead in _IDIOMS:
        text = pattern.sub(instead, text)
    parts = _SENTENCE.split(text)
    out: list[_Clause] = []
    said = [p for p in parts[::2] if p.strip()]
    for sentence, end in zip(parts[::2], [*parts[1::2], ""], strict=True):
        found = _of_sentence(sentence)
        asks = "?" in end
        lone = len(said) == 1 and len(found) == 1 and all(_is_mark(t) for t in found[0].tokens)
        for clause in found:
            clause.open = (asks and not lone) or clause.open
        out += found
    return out


def _of_sentence(sentence: str) -> list[_Clause]:
    """Its clauses. Lists ("A, B or C") and what a colon introduces stay with what governs them."""
    pieces = _BREAK.split(sentence)
    texts, leads = [pieces[0]], [""]
    for lead, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if _joined(lead, texts[-1], piece, pieces):
            texts[-1] += f" {'is' if lead == ':' else 'and'} {piece}"
        else:
            texts.append(piece)
            leads.append(lead)
    out: list[_Clause] = []
    for lead, piece in zip(leads, texts, strict=True):
        parts = _JOIN.split(piece)
        tokens = [_TOKEN.findall(part) for part in parts]
        grown = tokens[0]
        verb, mark = _has_verb(grown), any(map(_is_mark, grown))
        for join, more in zip(parts[1::2], tokens[2::2], strict=True):
            if verb and mark and _has_verb(more):
                out.append(_Clause(grown, lead in ONLY_IF, lead))
                grown, lead, verb, mark = more, join, True, any(map(_is_mark, more))
            else:
                grown += [*_TOKEN.findall(join), *more]
                verb, mark = verb or _has_verb(more), mark or any(map(_is_mark, more))
        out.append(_Clause(grown, lead in ONLY_IF, lead))
    return _judged([c for c in out if c.tokens])


def _joined(lead: str, left: str, right: str, pieces: Sequence[str]) -> bool:
    """Whether a mark between two pieces does not end a clause: a list's comma, a colon after mere words."""
    if lead == ":":
        return not any(map(_is_mark, left))
    if lead not in (",", "\u3001") or not any(map(_is_mark, left)):
        return False
    tokens = _TOKEN.findall(right)
    listed = any(t in JOINS for t in tokens) or (
        bool(tokens) and all(map(_is_mark, tokens)) and bool(_JOIN.search(" ".join(pieces)))
    )
    verbless_left = not _has_verb(_TOKEN.findall(left))
    starts = bool(tokens) and (_is_mark(tokens[0]) or tokens[0] in JOINS)
    return listed and starts and (not _has_verb(tokens) or verbless_left)


def _judged(clauses: list[_Clause]) -> list[_Clause]:
    """A clause that only says "wrong" or "not right" speaks of the one before it ("A: wrong", "A (not correct)")."""
    out: list[_Clause] = []
    for clause in clauses:
        verdict = not clause.marks and (
            any(t in WRONG for t in clause.tokens) or _refuses(clause, clauses[-1])
        )
        if verdict and out and out[-1].marks and clause.lead in (":", "(", "-", ",", "\u2013", "\u2014") and all(
            map(_empty, clause.tokens)
        ):  # fmt: skip
            out[-1] = _Clause([*out[-1].tokens, "is", *clause.tokens], out[-1].open, out[-1].lead)
        else:
            out.append(clause)
    return out


def _refuses(clause: _Clause, last: _Clause) -> bool:
    """ "not right", "definitely not": a negation of nothing but being the answer; no "isn't it", no "not because …"."""
    at = next((i for i, t in enumerate(clause.tokens) if t in REFUSALS), None)
    rest = clause.tokens[at + 1 :] if at is not None else ["x"]
    return all(t in GOOD or t in ARTICLES for t in rest) and (bool(rest) or clause is last)


def _denials(clause: _Clause) -> list[tuple[int, bool]]:
    """Every mention of a clause by its number, and whether the clause denies it."""
    negated = phrase = False
    found: list[tuple[int, bool]] = []
    for token in clause.tokens:
        if _is_mark(token):
            found.append((ord(token) - FIRST, negated or phrase))
        elif _negates(token):
            negated = True
        elif token in NO:
            phrase = True
        elif token in ENDS_PHRASE and token not in JOINS:
            phrase = False
    if not found:
        return []
    flips = _wrongs(clause.tokens) + _taken_back(clause) + _not_wrong(clause)
    return [(i, denied != bool(flips % 2)) for i, denied in found]


def _wrongs(tokens: Sequence[str]) -> int:
    """How often a clause calls something wrong: as a predicate, or of an answer."""
    count, before = 0, ""  # the last word that is no adverb: "is certainly wrong"
    for token, after in zip(tokens, [*tokens[1:], ""], strict=True):
        called = before in COPULA or _negates(before) or _is_mark(before)
        called = called or after in COPULA or after in ("answer", "option", "choice", "one", "letter")
        count += token in WRONG and called
        before = before if token in ADVERBS else token
    return count


def _taken_back(clause: _Clause) -> bool:
    """ "B is not right", "B cannot be": a negation behind the last mention, of nothing but its being the answer."""
    tail = clause.tokens[clause.marks[-1] + 1 :]
    at = next((i for i, t in enumerate(tail) if _negates(t)), None)
    rest = tail[at + 1 :] if at is not None else ["x"]
    return all(t in FRAME for t in rest) and (not rest or any(t in GOOD for t in rest))


def _not_wrong(clause: _Clause) -> bool:
    """ "B is not wrong": a negation between the last mention and the verdict turns it round."""
    tail = clause.tokens[clause.marks[-1] + 1 :]
    at = next((i for i, t in enumerate(tail) if _negates(t)), None)
    return at is not None and _wrongs(tail[at:]) > 0
