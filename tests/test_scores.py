"""Scorers: laws over all of them, then the rules of each, then every quirk that compat replicates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from retain.metrics import SCORES, score
from retain.metrics import captions as cap
from retain.metrics.compat import COMPAT
from retain.metrics.scorer import Scorer, per_sample
from retain.metrics.scores import STRICT, parse_choice, soft_accuracy
from retain.metrics.text import CONTRACTIONS, evalai, normal, numbers, parse_box
from retain.stream import Score
from retain.types import Example, Message, RetainError


def ex(answer: str, *references: str, question: str = "What?", id: str = "1", **meta: object) -> Example:
    messages = (Message("user", question), Message("assistant", answer))
    return Example(id, messages, references=references, meta=meta)


def one(name: str, text: str, example: Example) -> float:
    return score(name)([text], [example])[0]


ANIMALS = ["a black dog runs on the grass", "two red birds sit in a tree", "one old man reads a blue book"]
CAPTIONS = [ex(a, id=str(i)) for i, a in enumerate(ANIMALS)]
BOX = "[0.10, 0.20, 0.50, 0.90]"

# For every scorer: examples, perfect answers, plainly wrong answers.
CASES: dict[str, tuple[list[Example], list[str], list[str]]] = {
    "exact": ([ex("red"), ex("A dog.")], ["Red.", "a dog"], ["blue", "dogs"]),
    "vqa": ([ex("red", *["red"] * 10)] * 2, ["red", "the red."], ["blue", "dark red"]),
    "contains": ([ex("cat")] * 2, ["a cat.", "Cat"], ["category", "dog"]),
    "choice": ([ex("B", options=["cat", "dog"])] * 2, ["B", "(b) dog"], ["A", "C"]),
    "number": ([ex("7"), ex("0.5", tolerance=0.1)], ["seven", "0.58"], ["8", "0.7"]),
    "anls": ([ex("Main Street")] * 2, ["main street", "Main  Street"], ["Road", "x"]),
    "iou": ([ex(BOX)] * 2, [BOX, "0.1 0.2 0.5 0.9"], ["[0.6, 0.2, 0.9, 0.9]", "no box"]),
    "caption": (CAPTIONS, ANIMALS, ["zzz qqq"] * 3),
    "cider": (CAPTIONS, ANIMALS, ["zzz qqq"] * 3),
    "bleu4": (CAPTIONS, ANIMALS, ["zzz qqq"] * 3),
    "rouge_l": (CAPTIONS, ANIMALS, ["zzz qqq"] * 3),
}
TOP = {"cider": 1000.0}  # the papers' x100 of a measure that runs to 10


@pytest.mark.parametrize("name", list(STRICT))
class TestLaws:
    def test_has_a_case_and_is_a_score(self, name: str) -> None:
        assert name in CASES
        assert isinstance(SCORES[name], Score) and SCORES[name].name == name and SCORES[name].formula

    def test_perfect_is_the_top_and_wrong_is_zero(self, name: str) -> None:
        examples, right, wrong = CASES[name]
        assert score(name)(right, examples) == pytest.approx([TOP.get(name, 100.0)] * len(examples))
        assert score(name)(wrong, examples) == [0.0] * len(examples)

    def test_an_empty_or_missing_answer_never_scores(self, name: str) -> None:
        examples = CASES[name][0]
        for blank in ("", "  \n", None):
            assert score(name)([blank] * len(examples), examples) == [0.0] * len(examples)  # type: ignore[list-item]

    def test_an_empty_reference_cannot_be_matched_by_nothing(self, name: str) -> None:
        assert one(name, "", ex("", options=[""])) == 0.0
        if name != "anls":  # by its definition a full stop is a text like any other
            assert one(name, ".", ex(".", options=["."])) == 0.0

    def test_order_of_samples_does_not_matter(self, name: str) -> None:
        examples, right, wrong = CASES[name]
        pairs = list(zip(right + wrong, examples * 2, strict=True))
        scored = dict(zip(pairs, score(name)([t for t, _ in pairs], [e for _, e in pairs]), strict=True))
        random.Random(0).shuffle(pairs)
        again = score(name)([t for t, _ in pairs], [e for _, e in pairs])
        assert again == pytest.approx([scored[p] for p in pairs])

    def test_range(self, name: str) -> None:
        examples, right, wrong = CASES[name]
        values = score(name)(right + wrong, examples * 2)
        assert all(0.0 <= v <= TOP.get(name, 100.0) + 1e-9 for v in values)

    def test_lengths_must_agree(self, name: str) -> None:
        with pytest.raises(RetainError, match=r"1 predictions for \d examples"):
            score(name)(["x"], CASES[name][0] * 2)

    def test_nothing_in_nothing_out(self, name: str) -> None:
        assert score(name)([], []) == []


def test_the_registry_names_the_nearest_and_the_choices() -> None:
    with pytest.raises(
        RetainError, match=r"no score 'exat'; did you mean 'exact'\? Choose from \['anls', 'bleu4'"
    ):
        score("exat")
    assert all(name == s.name for name, s in SCORES.items())
    assert all(name.startswith("compat_") for name in COMPAT) and not set(COMPAT) & set(STRICT)


def test_a_scorer_of_ones_own_gives_nothing_for_an_empty_answer_unless_it_says_so() -> None:
    def always(texts: Sequence[str], examples: Sequence[Example]) -> list[float]:
        return [100.0] * len(texts)

    assert Scorer("mine", "100", always)(["", "  ", "x"], [ex("a")] * 3) == [0, 0, 100]
    assert Scorer("mine", "100", always, strict=False)(["", "  ", "x"], [ex("a")] * 3) == [100, 100, 100]


def test_the_blank_rule_does_not_rest_on_the_judges() -> None:
    for strict, want in ((True, [0.0, 100.0]), (False, [100.0, 100.0])):
        generous = per_sample("generous", "1", strict=strict)(lambda text, example: 1.0)
        assert generous([" ", "x"], CAPTIONS[:2]) == want


# ---------------------------------------------------------------------------------------------- short answers


def test_exact_takes_any_reference_and_normalises() -> None:
    example = ex("grey", "grey", "gray")
    assert one("exact", " GRAY. ", example) == 100 and one("exact", "gr ay", example) == 0
    assert normal("  Two\n words . ") == "two words" and normal("\ufb01sh") == "fish"


def test_evalai_normal_form() -> None:
    assert evalai("The Two dogs.") == "2 dogs"
    assert evalai("dont") == "don't" and evalai("cant've") == "cant've"
    assert evalai("1,000") == "1000" and evalai("3.5") == "3.5" and evalai("St. Ives") == "st ives"
    assert evalai("black/white") == "black white" and evalai("left- right") == "left right"
    assert evalai("none") == "0" and evalai("john's") == "john 's"
    assert evalai("a\nb") == "b"


def test_evalai_contractions_are_the_published_table() -> None:
    assert len(CONTRACTIONS) == 114  # entries of the published table that lower-case text can reach
    assert CONTRACTIONS["yall'd've"] == "y'all'd've" and CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert CONTRACTIONS["somebody'd"] == "somebodyd"  # reversed in the original, kept


def test_vqa_soft_accuracy_by_hand() -> None:
    # 2 of 10 say red: the 2 left-out reds see 1 match (1/3), the other 8 see 2 (2/3): (2/3 + 16/3) / 10 = 0.6
    example = ex("red", *["red"] * 2, *["blue"] * 8)
    assert one("vqa", "red", example) == pytest.approx(60)
    assert one("vqa", "blue", example) == pytest.approx(100)
    # 3 of 10: (3 * 2/3 + 7 * 1) / 10; 1 of 10: (0 + 9 * 1/3) / 10
    assert soft_accuracy("x", ["x"] * 3 + ["y"] * 7) == pytest.approx(0.9)
    assert soft_accuracy("x", ["x"] + ["y"] * 9) == pytest.approx(0.3)
    assert one("vqa", "the", ex("a", *["a"] * 10)) == 0  # both normalise to nothing


@pytest.mark.parametrize("n", range(1, 13))
def test_vqa_perfect_is_one_for_any_number_of_references(n: int) -> None:
    assert soft_accuracy("x", ["x"] * n) == pytest.approx(1)
    assert soft_accuracy("y", ["x"] * n) == 0


def test_contains_wants_whole_words() -> None:
    assert one("contains", "It is a Siamese cat, I think", ex("siamese cat")) == 100
    assert one("contains", "concatenate", ex("cat")) == 0
    assert one("contains", "Unknown", ex("no")) == 0  # what compat_dcl_med gets wrong
    assert one("contains", "c++ code", ex("C++")) == 100


# -------------------------------------------------------------------------------------------- multiple choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b.", "B"), ("(B)", "B"), ("B. dog", "B"), ("B: dog", "B"), ("(b) dog", "B"),
        ("dog", "B"), ("The answer is B.", "B"), ("Answer: B", "B"), ("option b", "B"), ("Dog.", "B"),
        ("B. cat", None), ("The answer is A or the answer is B", None), ("a cat or a dog", None),
        ("A dog", "B"), ("I think so", None), ("", None), ("?", None), ("AB", None),
    ],
)  # fmt: skip
def test_choice_reads_a_letter(text: str, letter: str | None) -> None:
    assert parse_choice(text, ["cat", "dog"]) == letter


def test_choice_rules() -> None:
    example = ex("dog", options=["A. cat", "B. dog"])  # the key as text, options with letters
    assert one("choice", "B", example) == 100 and one("choice", "A", example) == 0
    assert one("choice", "C", ex("C", options=["x", "y"])) == 0  # beyond the options
    assert one("choice", "D", ex("D")) == 100  # no options given
    assert one("choice", "x", ex("A", options=["x", "x"])) == 0  # two options have this text


# ------------------------------------------------------------------------------------------ numbers and boxes


def test_numbers_are_parsed() -> None:
    assert numbers("1,234.5 cats, -2, 1/4 and three; x1 v2.0b") == [1234.5, -2.0, 0.25, 3.0]
    assert numbers("5e-1") == [0.5] and numbers("\u22123") == [-3.0] and numbers("1/0") == [1.0, 0.0]


def test_number_rules() -> None:
    assert one("number", "There are 7 of them", ex("7")) == 100
    assert one("number", "7, yes, 7.0", ex("7")) == 100  # one distinct number
    assert one("number", "7 or 8", ex("7")) == 0
    assert one("number", "104", ex("100", relative_tolerance=0.05)) == 100
    assert one("number", "106", ex("100", relative_tolerance=0.05)) == 0
    assert one("number", "70", ex("7")) == 0


def test_boxes_are_parsed_or_refused() -> None:
    assert parse_box("x1: 10, y1: 20, x2: 30, y2: 40.") == (10, 20, 30, 40)
    assert parse_box([1, 2, 3, 4]) == (1, 2, 3, 4)
    for bad in ("1 2 3", "1 2 3 4 5", "3 2 1 4", "1 2 3 2", ""):
        assert parse_box(bad) is None


def test_iou_threshold_is_strict_and_units_are_bridged() -> None:
    example = ex("ignored", box=[0, 0, 10, 10])
    assert one("iou", "0 0 10 5", example) == 0  # exactly 0.5
    assert one("iou", "0 0 10 5.1", example) == 100
    pixels = ex("ignored", box=[10, 20, 50, 90], size=(80, 100))
    assert one("iou", "[0.1, 0.2, 0.5, 0.9]", pixels) == 100  # normalised on the padded square, side 100
    assert one("iou", "[0.1, 0.2, 0.5, 0.9]", ex("x", box=[10, 20, 50, 90])) == 0  # no size: other units
    assert one("iou", "[0.10,0.20,0.50,0.91]", ex("[0.1,0.2,0.5,0.9]")) == 100


# --------------------------------------------------------------------------------------------------- captions


def test_a_normalised_box_is_brought_to_the_pixels_of_the_other_one() -> None:
    """Corner by corner, on the padded square: a tall image's side is its height."""
    pixels, share = "[10, 80, 50, 160]", "[0.05, 0.40, 0.25, 0.80]"
    for text, reference in ((share, pixels), (pixels, share)):
        assert one("iou", text, ex(reference, size=(100, 200))) == 100
    for moved in ("[0.20, 0.40, 0.40, 0.80]", "[0.05, 0.70, 0.25, 1.00]"):
        assert one("iou", moved, ex(pixels, size=(100, 200))) == 0


def test_a_number_that_is_said_twice_is_one_number() -> None:
    assert one("number", "7", ex("7 (seven)")) == 100
    assert [d.level for d in SCORES["number"].doubts([ex("7, that is 7.0")]) if d.level == "error"] == []


def boxes(*rows: tuple[float, float, float, float], **meta: object) -> list[tuple[int | None, str]]:
    """Row and words of what is doubted."""
    examples = [ex(str(list(row)), id=str(i), **meta) for i, row in enumerate(rows)]
    return [(d.row, d.message) for d in SCORES["iou"].doubts(examples)]


def test_a_box_without_width_or_without_height_never_scores() -> None:
    fine = [(60.0, 60.0, 90.0, 90.0)] * 13
    for flat in ((5.0, 5.0, 5.0, 9.0), (5.0, 5.0, 9.0, 5.0), (5.0, 5.0, 4.0, 9.0), (5.0, 5.0, 9.0, 4.0)):
        (row, text), (whole, share) = boxes(flat, *fine, size=(100, 100))
        assert (
            row == 0 and "never scores" in text and whole is None and "1 of 14 boxes are no corners" in share
        )
    assert boxes(*fine, size=(100, 100)) == []


@pytest.mark.parametrize("size", [(100, 80), None])
def test_corners_that_would_all_fit_as_widths_and_heights_are_doubted(size: tuple[int, int] | None) -> None:
    """x + x2 <= width and y + y2 <= height in every row; one row over either edge settles it."""
    w, h = size or (1.0, 1.0)
    meta = {"size": size} if size else {}
    upper = (0.1 * w, 0.1 * h, 0.9 * w, 0.9 * h)  # exactly to the edge
    found = boxes(*[upper] * 12, **meta)
    assert len(found) == 1 and found[0][0] is None and "all 12 boxes would fit" in found[0][1]
    assert boxes(*[upper] * 11, **meta) == []
    for over in ((0.1 * w, 0.2 * h, 0.9 * w, 0.9 * h), (0.2 * w, 0.1 * h, 0.9 * w, 0.9 * h)):
        assert boxes(*[upper] * 12, over, **meta) == []


def test_tokenizer() -> None:
    assert cap.tokenize("A dog's bowl, isn't it? T-shirt 3.5") == [
        "a", "dog", "'s", "bowl", "is", "n't", "it", "t-shirt", "3.5",
    ]  # fmt: skip


def test_bleu_by_hand() -> None:
    # "the the the cat" against "the cat sat": unigrams the 1 + cat 1 = 2 of 4; bigrams 1 of 3
    b1, b2, b3, b4 = cap.bleu(["the the the cat"], [["the cat sat"]])
    assert b1 == pytest.approx(2 / 4) and b2 == pytest.approx(math.sqrt(2 / 4 * 1 / 3)) and b3 == b4 == 0
    # brevity: 2 words against 4: exp(1 - 4/2)
    assert cap.bleu(["a dog"], [["a dog runs fast"]])[0] == pytest.approx(math.exp(-1))
    # of references of length 3 and 5, 4 words are as close to both: the shorter counts, so no penalty
    assert cap.bleu_counts("a b c d", ["a b c", "a b c d e"]).reference == 3


def test_corpus_bleu_is_not_a_mean_over_samples() -> None:
    preds, refs = ["a b", "x x x x"], [["a b"], ["q r s t"]]
    assert cap.bleu(preds, refs)[0] == pytest.approx(2 / 6)
    mean = sum(cap.bleu([p], [r])[0] for p, r in zip(preds, refs, strict=True)) / 2
    assert mean == pytest.approx(0.5)


def test_sentence_bleu_smoothing_by_hand() -> None:
    # "a b c" against "a b d": 2/3, then (1+1)/(2+1), (0+1)/(1+1), (0+1)/(0+1)
    counts = cap.bleu_counts("a b c", ["a b d"])
    assert cap.bleu_of(counts, 4, smooth=True) == pytest.approx((2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25)


def test_rouge_l_by_hand() -> None:
    # LCS("a b c d", "a c e") = "a c" = 2: P 2/4, R 2/3, F = (1 + 1.44) P R / (R + 1.44 P)
    want = 2.44 * 0.5 * (2 / 3) / (2 / 3 + 1.44 * 0.5)
    assert cap.rouge_l("a b c d", ["a c e"]) == pytest.approx(want)
    assert cap.lcs("abcbdab", "bdcaba") == 4
    assert cap.rouge_l("", ["a"]) == cap.rouge_l("a", [""]) == cap.rouge_l("a", ["b"]) == 0


def test_cider_d_by_hand() -> None:
    # Two images; "x" is in both (weight 0), the rest in one (weight w = log 2). "x a" against "x a b":
    # n=1: vectors a | a, b: clipped dot w^2 / (w * w sqrt 2) = 1/sqrt 2. n=2: "x a" | "x a", "a b": 1/sqrt 2.
    # n=3, 4: the prediction has none: 0. Length penalty: 1 bigram against 2: exp(-1/72).
    got = cap.cider_d(["x a", "x c d"], [["x a b"], ["x c d"]])
    want = 10 * (2 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert got[0] == pytest.approx(want)
    assert got[1] == pytest.approx(10 * 3 / 4)  # a perfect caption of three words has no 4-grams


def test_cider_d_repeating_a_word_does_not_pay() -> None:
    # "cat cat" against "cat sat": min(2w, w) w over norms 2w and w sqrt 2; no bigram in common
    got = cap.cider_d(["cat cat", "dog ran"], [["cat sat"], ["dog ran"]])
    assert got[0] == pytest.approx(10 / 4 / (2 * math.sqrt(2)))


def test_cider_d_depends_on_the_corpus_and_takes_a_fixed_one() -> None:
    refs = [[a] for a in ANIMALS]
    df = cap.DocumentFrequency.of(refs)
    alone = [cap.cider_d([p], [r], df)[0] for p, r in zip(ANIMALS[::-1], refs, strict=True)]
    assert alone == pytest.approx(cap.cider_d(ANIMALS[::-1], refs))
    assert cap.cider_d([ANIMALS[0]], [[ANIMALS[0]]]) == pytest.approx([10])  # one image: plain counts


def test_caption_is_a_tenth_of_the_papers_cider() -> None:
    preds = ["a black dog", "two birds in a tree", "a man reads"]
    papers, ours = score("cider")(preds, CAPTIONS), score("caption")(preds, CAPTIONS)
    assert papers == pytest.approx([10 * v for v in ours]) and max(papers) > 100


def test_suite_is_the_mean_of_its_six() -> None:
    out = cap.suite(ANIMALS, [[a] for a in ANIMALS])
    assert out["BLEU-4"] == pytest.approx(100) and out["CIDEr-D"] == pytest.approx(1000)
    assert out["mean of 6"] == pytest.approx((4 * 100 + 100 + 1000) / 6)


# --------------------------------------------------------------------------------------------- compat, quirks


@pytest.mark.parametrize(
    ("name", "text", "example", "want"),
    [
        ("scienceqa", "B", ex("B"), 100),
        ("scienceqa", "B. dog", ex("B"), 100),
        ("scienceqa", "a cat", ex("A"), 100),  # the article is read as an option
        ("scienceqa", "I think B", ex("B"), 0),  # "I" is the first one-character word
        ("scienceqa", "C", ex("C", options=["x", "y"]), 0),  # beyond the choices
        ("scienceqa", "", ex("A"), 0),
        ("scienceqa", "F", ex("F"), 0),  # letters end at E
        ("textvqa", "Red", ex("red", *["red"] * 10), 100),
        ("textvqa", "the", ex("", *["a"] * 10), 100),  # nothing matches nothing
        ("textvqa", "zero", ex("", *["none"] * 10), 100),  # "none" is 0
        ("imagenet", "a tabby cat", ex("tabby"), 100),
        ("imagenet", "", ex("tabby"), 100),  # an empty answer is correct
        ("imagenet", "a", ex("tabby"), 100),  # and so is a letter
        ("imagenet", "Tabby", ex("tabby"), 0),  # case matters
        ("imagenet", "stabbying", ex("tabby"), 100),  # no word boundaries
        ("gqa", "Yes.", ex("yes"), 100),
        ("gqa", "yes..", ex("yes"), 100),
        ("gqa", " yes", ex("yes"), 0),
        ("gqa", "yes. ", ex("yes"), 0),
        ("gqa", "Yes", ex("Yes"), 0),  # gold is not lower-cased
        ("vizwiz", "YES", ex("yes"), 100),
        ("vizwiz", "yes.", ex("yes"), 0),
        ("vqav2", "red", ex("red", *["blue"] * 10), 100),  # the single answer, not the ten
        ("vqav2", "red ", ex("red"), 0),
        ("ocrvqa", "No", ex("no"), 100),
        ("ocrvqa", "Unanswerable", ex("Unanswerable"), 0),
        ("ocrvqa", "unanswerable", ex("unanswerable"), 100),  # only the capital form is refused
        ("grounding", BOX, ex(BOX, size=[640, 480]), 100),
        ("grounding", "0.1, 0.2, 0.5, 0.9", ex(BOX), 0),  # the last digit goes: y2 = 0. and nothing overlaps
        ("grounding", "[0.1, 0.2, 0.5]", ex(BOX), 0),
        ("grounding", "no box", ex(BOX), 0),
        ("grounding", "", ex(BOX), 0),
        ("imagenet_r", "Dog", ex("dog"), 100),
        ("imagenet_r", "a dog", ex("dog"), 0),
        *(
            (name, text, ex(gold), want)  # upper case on both sides, nothing stripped
            for name in ("arxivqa", "iconqa", "clevr", "aokvqa", "super_clevr", "tabmwp")
            for text, gold, want in [
                ("A", "A", 100), ("a", "A", 100), ("A", "a", 100), ("A.", "A", 0), (" A", "A", 0), ("A", "A ", 0),
                ("A\n", "A", 0), ("(A)", "A", 0), ("1,000", "1000", 0), ("straße", "STRASSE", 100), ("", "A", 0),
                ("", "", 100),
            ]
        ),
        ("figureqa", "", ex("Yes"), 100),  # an empty answer is correct
        ("figureqa", "e", ex("Yes"), 100),
        ("figureqa", "yes, it is", ex("Yes"), 0),
        ("dvqa", "bar", ex("Blue Bar"), 100),
        ("dcl_med", "Unknown", ex("no"), 100),  # "Unknown" contains "no"
        ("dcl_med", "Unanswerable: no", ex("no"), 0),
        ("dcl_fin", "A .", ex("a"), 100),
        ("dcl_fin", "net income", ex("net income"), 0),  # gold keeps its space
        ("dcl_sci", "B", ex("b", source="AI2D"), 100),
        ("dcl_sci", "b.", ex("b", source="AI2D"), 0),
        ("figureqa", "YES", ex("Yes, it is"), 100),
        ("dcl_med", "Yes and no", ex("No"), 100),
        ("dcl_fin", " a. ", ex("A"), 100),
        ("dcl_fin", "Unanswerable", ex("unanswerable"), 0),
        (
            "dcl_sci",
            "texas,ohio,iowa",
            ex("Texas,Ohio", question="Which states?"),
            100,
        ),  # wrong ones cost nothing
        ("dcl_sci", "texas, ohio", ex("Texas,Ohio", question="Which states?"), 50),  # " ohio" is not "ohio"
        ("dcl_sci", "it is 70", ex("7", question="How many?"), 100),
        *(
            (name, text, ex(gold), want)
            for name in ("dcl_rs", "dcl_ad")
            for text, gold, want in [
                ("Turn left now", "turn left", 100),  # a gold of two words: inside
                ("turn  left", "turn left", 0),
                ("car", "car", 100), ("a red car.", "Car.", 100), ("car, red", "car", 100), ("the car is", "car", 100),
                ("a cartoon", "car", 100),  # a border on one side is enough: " car"
                ("my scar is", "car", 100),  # "car "
                ("a scary film", "car", 0),
                ("unknown", "no", 100), ("it is unknown", "no", 0),  # one word needs no border
                ("a.car", "car", 100), ("is it a.car?", "car", 0),
                ("", "car", 0), ("", ".", 100), ("two words", ".", 100),  # a gold of a full stop is met
                ("Unanswerable", "unanswerable", 0), ("unanswerable", "unanswerable", 100),
            ]
        ),
        *(
            ("mm_scienceqa", text, ex(key, options=["x", "y", "z"]), want)
            for text, key, want in [
                ("B", "B", 100), ("b", "B", 0), ("B.", "B", 0), ("B. dog", "B", 100), ("B.dog", "B", 0),
                ("The answer is B.", "B", 100), ("So: The answer is B. Yes.", "B", 100),
                ("The answer is B", "B", 0),  # the full stop stands for one more character
                ("The answer is B,", "B", 100), ("The answer is Bob", "B", 100),
                ("the answer is B.", "B", 0), ("The answer is b.", "B", 0), ("The answer is (B).", "B", 0),
                ("The answer is B. The answer is B.", "B", 0),  # exactly one
                ("A. no. The answer is B.", "A", 100), ("a cat", "A", 0), ("", "A", 0),
                ("D", "D", 0),  # beyond the choices
            ]
        ),
        ("mm_imagenet", "Tabby cat", ex("tabby"), 100),
        ("mm_imagenet", "T", ex("tabby"), 100),
        ("mm_imagenet", "", ex("tabby"), 100),
        ("mm_imagenet", "stabbying", ex("TABBY"), 100),
        ("mm_imagenet", "tabby cat.", ex("tabby cats"), 0),
        ("grounding", "[0.10,0.20,0.50,0.90]", ex("here"), 0),
        ("grounding", " [0.10, 0.20, 0.50, 0.90]", ex(BOX), 100),
        ("grounding", "[10, 20, 50, 90]", ex(BOX), 0),
        ("grounding", "[0.5, 0.9, 0.1, 0.2]", ex("[0.5, 0.9, 0.1, 0.2]"), 0),  # inverted: no overlap
    ],
)  # fmt: skip
def test_compat_replicates_the_quirk(name: str, text: str, example: Example, want: float) -> None:
    assert one(f"compat_{name}", text, example) == want


def test_compat_dcl_sci_knows_the_source_by_the_name_of_the_image() -> None:
    turns = (Message("user", "Which one?"), Message("assistant", "B"))
    for name, want in (("AI2D_3.png", 0), ("SciVerse_1.png", 0), ("MapQA_7.png", 100)):
        assert one("compat_dcl_sci", "b it is", Example("1", turns, (Path("images") / name,))) == want


def test_mm_mergebench_is_scored_by_its_own_scripts() -> None:
    from retain.benchmarks.mm_mergebench import SEEN, UNSEEN

    own = {name: part.compat for name, part in {**SEEN, **UNSEEN}.items()}
    assert own["ScienceQA"] == "compat_mm_scienceqa" and own["OCRVQA"] == "compat_ocrvqa"
    assert own["ImageNet"] == own["ImageNet-R"] == "compat_mm_imagenet"
    assert {part.strict for part in (*SEEN.values(), *UNSEEN.values())} | set(own.values()) <= set(SCORES)


def test_without_an_answer_the_first_reference_is_the_key() -> None:
    """The original has one field; a row of ours may have references alone."""
    question = (Message("user", "What?"), Message("assistant", ""))
    row = Example("1", question, references=("B", "C"))
    assert [one("compat_scienceqa", letter, row) for letter in "BC"] == [100, 0]


def test_compat_grounding_loses_the_last_digit() -> None:
    gold = ex("[0.0, 0.0, 1.0, 1.0]")
    assert one("iou", "[0.0, 0.0, 1.0, 0.58]", gold) == 100
    assert one("compat_grounding", "[0.0, 0.0, 1.0, 0.58]", gold) == 0  # read as 0.5, and 0.5 is not > 0.5


def test_compat_textvqa_needs_ten() -> None:
    with pytest.raises(RetainError, match="needs exactly 10"):
        one("compat_textvqa", "x", ex("x"))


def test_compat_textvqa_equals_vqa_on_ten_references() -> None:
    words = random.Random(0)
    for _ in range(200):
        example = ex("r", *words.choices(["red", "blue", "green", "two"], k=10))
        text = words.choice(["red", "2", "Blue.", "pink"])
        assert one("compat_textvqa", text, example) == pytest.approx(one("vqa", text, example))


def test_compat_caption_means_the_suite() -> None:
    preds = ["a black dog runs on grass", "two birds in a red tree", "an old man"]
    got = score("compat_caption")(preds, CAPTIONS)
    assert sum(got) / 3 == pytest.approx(cap.suite(preds, [[a] for a in ANIMALS])["mean of 6"])
