"""Caption metrics in plain Python: BLEU-1..4, ROUGE-L, CIDEr-D.

CIDEr-D: Vedantam et al., CVPR 2015 (arXiv 1411.5726); BLEU: Papineni et al., ACL 2002; ROUGE-L: Lin, 2004.
The arithmetic is that of the COCO caption suite (Chen et al. 2015, arXiv 1504.00325), so that scores compare.

    CIDEr-D(c, S) = 10/4 sum_n mean_{s in S} p(c, s) <min(g_c, g_s), g_s> / (|g_c| |g_s|) p(c, s)       =
    exp(-(l_c - l_s)^2 / (2 * 6^2))            the penalty on a difference in length g(w)          = count(w)
    * (log N - log max(1, df(w)))     df: images with the n-gram w in a reference, of N

What differs from the suite: the tokenizer. The suite runs Stanford's PTB tokenizer in Java; ours is one
regular expression (lower case, words, n't and 's split off, punctuation dropped). On plain captions they
agree; they differ on abbreviations ("U.S."), on hyphen chains with digits, on currency signs and on "cannot".
METEOR needs Java and WordNet and is left out.

Everything here is in the papers' units (0..1; CIDEr-D 0..10); `scores.py` scales.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Gram = tuple[str, ...]
Counts = Counter[Gram]

ORDERS = 4
SIGMA = 6.0  # width of the length penalty, CIDEr-D section 4
BETA = 1.2  # weight of recall in ROUGE-L, as in the COCO suite

_TOKEN = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)+|\w+(?:-\w+)*")


def tokenize(text: str) -> list[str]:
    """Words of a caption in lower case without punctuation: "A dog's bowl." -> a, dog, 's, bowl."""
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def ngrams(tokens: Sequence[str], orders: int = ORDERS) -> Counts:
    """Counts of all n-grams with 1 <= n <= orders."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, orders + 1) for i in range(len(tokens) - n + 1))


# ---------------------------------------------------------------------------------------------------- CIDEr-D


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many images' references an n-gram occurs, and how many images there are."""

    counts: Mapping[Gram, int]
    images: int

    @classmethod
    def of(cls, references: Sequence[Sequence[str]]) -> DocumentFrequency:
        """Count over the references of a test set; one list of captions per image."""
        counts: Counts = Counter()
        for captions in references:
            counts.update({gram for caption in captions for gram in ngrams(tokenize(caption))})
        return cls(counts, len(references))

    def weight(self, gram: Gram) -> float:
        """log N - log max(1, df). With one image every weight would be 0, so there it is 1: plain counts."""
        if self.images <= 1:
            return 1.0
        return math.log(self.images) - math.log(max(1, self.counts.get(gram, 0)))


@dataclass(frozen=True)
class _Vector:
    """tf-idf of one caption by n-gram order, its norms, and its length in bigrams (as the suite counts)."""

    by_order: tuple[dict[Gram, float], ...]
    norms: tuple[float, ...]
    length: int


def _vector(caption: str, df: DocumentFrequency) -> _Vector:
    tokens = tokenize(caption)
    by_order: tuple[dict[Gram, float], ...] = tuple({} for _ in range(ORDERS))
    for gram, count in ngrams(tokens).items():
        by_order[len(gram) - 1][gram] = count * df.weight(gram)
    norms = tuple(math.sqrt(sum(v * v for v in g.values())) for g in by_order)
    return _Vector(by_order, norms, max(0, len(tokens) - 1))


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Mean over n of the clipped cosine times the length penalty: 0..1."""
    total = 0.0
    for h, r, nh, nr in zip(
        hypothesis.by_order, reference.by_order, hypothesis.norms, reference.norms, strict=True
    ):
        if nh > 0 and nr > 0:
            total += sum(min(v, r[g]) * r[g] for g, v in h.items() if g in r) / (nh * nr)
    return total / ORDERS * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * SIGMA**2))


def cider_d(
    predictions: Sequence[str], references: Sequence[Sequence[str]], df: DocumentFrequency | None = None
) -> list[float]:
    """CIDEr-D of each caption, 0..10; the corpus score is the mean.

    `df` defaults to the frequencies of `references`, so give the whole test set at once: a sample's score
    depends on the corpus. Captions under four words have no 4-grams and cannot reach 10 (as in the suite).
    n-grams that every image has weigh nothing.
    """
    df = df or DocumentFrequency.of(references)
    out = []
    for prediction, captions in zip(predictions, references, strict=True):
        h = _vector(prediction, df)
        out.append(
            10.0 * sum(_similarity(h, _vector(c, df)) for c in captions) / len(captions) if captions else 0.0
        )
    return out


# ------------------------------------------------------------------------------------------------------- BLEU


@dataclass(frozen=True)
class BleuCounts:
    """Sufficient statistics of BLEU: clipped matches and guesses by order, lengths; they add up."""

    matches: tuple[int, ...]
    guesses: tuple[int, ...]
    length: int
    reference: int

    def __add__(self, other: BleuCounts) -> BleuCounts:
        return BleuCounts(
            tuple(a + b for a, b in zip(self.matches, other.matches, strict=True)),
            tuple(a + b for a, b in zip(self.guesses, other.guesses, strict=True)),
            self.length + other.length,
            self.reference + other.reference,
        )


def bleu_counts(prediction: str, references: Sequence[str]) -> BleuCounts:
    """Clipped n-gram matches of one caption, and the closest reference length (ties: the shorter)."""
    tokens = tokenize(prediction)
    sets = [tokenize(r) for r in references]
    most: Counts = Counter()
    for s in sets:
        most |= ngrams(s)
    matches = [0] * ORDERS
    for gram, count in ngrams(tokens).items():
        matches[len(gram) - 1] += min(count, most[gram])
    guesses = tuple(max(0, len(tokens) - n) for n in range(ORDERS))
    closest = min((len(s) for s in sets), key=lambda n: (abs(n - len(tokens)), n), default=0)
    return BleuCounts(tuple(matches), guesses, len(tokens), closest)


def bleu_of(counts: BleuCounts, order: int, *, smooth: bool = False) -> float:
    """BLEU from counts: exp(min(0, 1 - r/c)) * (prod_{n<=order} m_n / g_n)^(1/order), 0..1.

    `smooth` adds one to matches and guesses for n > 1 (Lin and Och, COLING 2004), which a single sentence
    needs.
    """
    if counts.length == 0 or counts.matches[0] == 0:
        return 0.0
    log = 0.0
    for n in range(order):
        add = 1 if smooth and n > 0 else 0
        matches, guesses = counts.matches[n] + add, counts.guesses[n] + add
        if matches == 0 or guesses == 0:
            return 0.0
        log += math.log(matches / guesses) / order
    return math.exp(log + min(0.0, 1 - counts.reference / counts.length))


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1..4, 0..1: counts are summed over the corpus first (not a mean over samples)."""
    total = BleuCounts((0,) * ORDERS, (0,) * ORDERS, 0, 0)
    for prediction, captions in zip(predictions, references, strict=True):
        total = total + bleu_counts(prediction, captions)
    return [bleu_of(total, order) for order in range(1, ORDERS + 1)]


# ---------------------------------------------------------------------------------------------------- ROUGE-L


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence (Hyyro 2004: a row of the table as the bits of one number)."""
    where: dict[str, int] = {}
    for i, x in enumerate(a):
        where[x] = where.get(x, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for y in b:
        match = row & where.get(y, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption, 0..1: F = (1 + b^2) P R / (R + b^2 P), b = 1.2.

    P and R are the largest over the references, each on its own (the COCO suite's choice).
    """
    tokens = tokenize(prediction)
    sets = [s for s in map(tokenize, references) if s]
    if not tokens or not sets:
        return 0.0
    common = [lcs(tokens, s) for s in sets]
    precision = max(common) / len(tokens)
    recall = max(c / len(s) for c, s in zip(common, sets, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def suite(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The COCO suite without METEOR, x100: BLEU-1..4, ROUGE-L, CIDEr-D of the corpus, and their mean."""
    out = {f"BLEU-{i}": 100 * value for i, value in enumerate(bleu(predictions, references), 1)}
    n = max(1, len(predictions))
    out["ROUGE-L"] = 100 * sum(rouge_l(p, r) for p, r in zip(predictions, references, strict=True)) / n
    out["CIDEr-D"] = 100 * sum(cider_d(predictions, references)) / n
    return {**out, "mean of 6": sum(out.values()) / len(out)}
