"""Reading files of examples, and the doctor: every format, every mistake with file, row and field."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import own_data
from retain.data import read
from retain.data.doctor import Finding, Lengths, diagnose, examine, finding_rows, sample
from retain.data.marks import best_constant
from retain.metrics import score
from retain.stream import Stream, Task
from retain.types import Example, Message, RetainError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    own_data.picture(tmp_path, "a.png", "red", 0)
    own_data.picture(tmp_path, "b.png", "blue", 1)
    return tmp_path


def turns(question: str = "<image>\nWhat?", answer: str = "red") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def one(root: Path, row: Any, name: str = "d.json") -> Example:
    (root / name).write_text(json.dumps([row]))
    return read.examples(root / name)[0]


# -- formats ---------------------------------------------------------------------------------------------


def test_llava_conversations(root: Path) -> None:
    e = one(root, {"id": 7, "image": "a.png", "conversations": turns()})
    assert (e.id, e.question, e.answer, e.images) == ("7", "What?", "red", (root / "a.png",))
    assert [m.images for m in e.messages] == [1, 0]


def test_llava_turns_and_images(root: Path) -> None:
    talk = [
        {"from": "system", "value": "Be brief."},
        *turns("<image>\nFirst?", "one"),
        *turns("And <image>?", "two"),
    ]
    e = one(root, {"question_id": "q", "image": ["a.png", "b.png"], "conversations": talk})
    assert e.id == "q" and [m.role for m in e.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [m.images for m in e.messages] == [0, 1, 0, 1, 0]
    assert e.question == "And ?" and e.answer == "two" and len(e.prompt) == 4
    assert e.messages[3].parts() == ("And ", None, "?") and e.messages[1].parts() == (None, "First?")


MIXED = "Before:<image>After:<image>What changed?"
PARTS = ("Before:", None, "After:", None, "What changed?")


def test_images_between_words_stay_where_they_are(root: Path) -> None:
    """In each format; an image in front of the words or behind them stands in front, as in LLaVA."""
    pair = {"images": ["a.png", "b.png"]}
    assert one(root, pair | {"conversations": turns(MIXED)}).messages[0].parts() == PARTS
    assert one(root, pair | {"text": MIXED, "answer": "the colour"}).messages[0].parts() == PARTS
    asked = {"role": "user", "content": MIXED}
    listed = {
        "role": "user",
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in PARTS],
    }
    for turn in (asked, listed):
        talk = [turn, {"role": "assistant", "content": "the colour"}]
        assert one(root, pair | {"messages": talk}).messages[0].parts() == PARTS
    for text in ("<image>\nWhat?", "What?\n<image>", " <image> What? "):
        assert one(root, {"image": "a.png", "conversations": turns(text)}).messages[0].parts() == (
            None,
            "What?",
        )
    said = one(root, {"conversations": turns("Which word?", "<image>")})
    assert said.answer == "<image>" and said.messages[1].images == 0


def test_the_system_field_is_the_first_turn(root: Path) -> None:
    e = one(root, {"system": "Be brief.", "conversations": turns("Who?")})
    assert (e.messages[0].role, e.messages[0].text) == ("system", "Be brief.")
    same = [{"from": "system", "value": "Be brief."}, *turns("Who?")]
    assert len(one(root, {"system": "Be brief.", "conversations": same}).messages) == 3
    with pytest.raises(RetainError, match=r"row 1: a system turn is given twice"):
        one(root, {"system": "Be long.", "conversations": same})
    with pytest.raises(RetainError, match=r"field 'system': text is needed"):
        one(root, {"system": 3, "conversations": turns("Who?")})


def test_llava_without_placeholder_or_image(root: Path) -> None:
    e = one(root, {"image": "a.png", "conversations": turns("What?")})
    assert e.id == "1" and e.messages[0].images == 1
    e = one(root, {"id": "t", "conversations": turns("No picture here?")})
    assert e.images == () and e.messages[0].images == 0


def test_coin_test_items(root: Path) -> None:
    row = {
        "question_id": 3, "image": "a.png", "text": "Where is it?", "answer": "[0.1,0.2,0.3,0.4]",
        "answer_bbox": "[0.1,0.2,0.3,0.4]", "size": [640, 480],
    }  # fmt: skip
    e = one(root, row)
    assert e.meta == {"box": [0.1, 0.2, 0.3, 0.4], "size": [640.0, 480.0]}
    assert e.answer == "[0.1,0.2,0.3,0.4]" and e.messages[0].images == 1
    assert score("iou")([e.answer], [e]) == [100.0]


def test_references_options_numbers(root: Path) -> None:
    e = one(root, {"text": "Which?", "answer": "B", "options": ["cat", "dog"], "source": "AI2D"})
    assert e.meta == {"options": ["cat", "dog"], "source": "AI2D"} and score("choice")(["dog"], [e]) == [
        100.0
    ]
    e = one(root, {"text": "Who?", "answer": ["ann", "anna"]})
    assert e.references == ("ann", "anna") and e.answer == "ann"
    assert one(root, {"text": "How many?", "answer": 4}).answer == "4"
    assert (
        one(root, {"id": "m", "conversations": turns("x?"), "references": ["red", "crimson"]}).targets[1]
        == "crimson"
    )


@pytest.mark.parametrize("parts", [True, False])
def test_hf_messages(root: Path, parts: bool) -> None:
    row = own_data.messages_row({"id": "x", "image": "a.png", "conversations": turns()}, parts)
    own_data.write_jsonl(root / "d.jsonl", [row, {**row, "id": "y"}])
    first, second = read.examples(root / "d.jsonl")
    assert (first.id, second.id) == ("x", "y")
    assert first.messages == (Message("user", "What?", 1), Message("assistant", "red"))
    assert first.images == (root / "a.png",)


def test_hf_images_inside_the_messages(root: Path) -> None:
    content = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "What?"}]
    e = one(
        root, {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]}
    )
    assert e.images == (root / "b.png",) and e.messages[0].images == 1


def test_the_format_is_told_by_fields_not_by_the_name(root: Path) -> None:
    own_data.write_jsonl(root / "lines.json", [{"id": i, "conversations": turns("x?")} for i in range(3)])
    assert [e.id for e in read.examples(root / "lines.json")] == ["0", "1", "2"]
    (root / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "x?", "answer": "y"}]).encode())
    assert read.examples(root / "bom.json")[0].answer == "y"


def test_parquet(root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = io.BytesIO()
    Image.new("RGB", (5, 4)).save(raw, "png")
    rows = [{"id": "p", "images": [{"bytes": raw.getvalue(), "path": None}], "messages": [
        {"role": "user", "content": "What?"}, {"role": "assistant", "content": "black"}]}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), root / "d.parquet")
    e = read.examples(root / "d.parquet")[0]
    assert isinstance(e.images[0], Image.Image) and e.images[0].size == (5, 4)


def test_parquet_without_pyarrow_names_the_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (root / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(RetainError, match=r"pip install 'retain\[parquet\]'"):
        read.examples(root / "d.parquet")


def test_links_inside_the_root_are_followed(tmp_path: Path) -> None:
    own_data.picture(tmp_path / "disk", "a.png", "red", 0)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "coco").symlink_to(tmp_path / "disk")
    (tmp_path / "d.json").write_text(json.dumps([{"image": "coco/a.png", "text": "x", "answer": "y"}]))
    assert read.examples(tmp_path / "d.json", tmp_path / "root")[0].images


# -- mistakes --------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"id": "g", "image": "a.png", "conversations": turns()}
BAD_ROWS: dict[str, tuple[Any, list[str]]] = {
    "a number": (3, ["an object", "3"]),
    "no format": ({"id": 1, "prompt": "x"}, ["['id', 'prompt']", "conversations", "messages", "text"]),
    "no answer field": ({"text": "x", "question": "y"}, ["'answer' is missing"]),
    "answer null": ({"text": "x", "answer": None}, ["'answer'", "None"]),
    "empty conversation": ({"conversations": []}, ["'conversations'", "[]"]),
    "conversation of text": ({"conversations": "hello"}, ["'conversations'", "'hello'"]),
    "role": ({"conversations": [{"from": "robot", "value": "x"}]}, ["conversations[0]", "'robot'", "human"]),
    "value": ({"conversations": [{"from": "human", "value": 4}]}, ["conversations[0]", ".value", "4"]),
    "no last answer": ({"conversations": turns("x")[:1]}, ["last turn"]),
    "no question": ({"conversations": turns()[1:]}, ["no turn of the user"]),
    "content": ({"messages": [{"role": "user", "content": 3}]}, ["messages[0]", ".content", "3"]),
    "part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        ["content[0].type", "'audio'", "'text' or 'image'"],
    ),
    "placeholders": (
        {**GOOD, "conversations": turns("<image><image>x")},
        ["2 image placeholders", "1 images"],
    ),
    "id": ({**GOOD, "id": [1]}, ["'id'", "[1]"]),
    "box": ({"text": "x", "answer": "y", "answer_bbox": "[1,2]"}, ["answer_bbox", "4 numbers", "[1,2]"]),
    "box of nan": ({"text": "x", "answer": "y", "answer_bbox": "[1,2,3,NaN]"}, ["answer_bbox", "4 numbers"]),
    "box text": ({"text": "x", "answer": "y", "answer_bbox": "here"}, ["answer_bbox", "broken JSON"]),
    "options": ({"text": "x", "answer": "y", "options": 3}, ["options", "3"]),
    "tolerance": ({"text": "x", "answer": "5", "tolerance": "wide"}, ["'tolerance'", "0 or more", "'wide'"]),
    "relative tolerance": (
        {"text": "x", "answer": "5", "meta": {"relative_tolerance": -1}},
        ["relative_tolerance", "-1"],
    ),
    "box in meta": ({"text": "x", "answer": "y", "meta": {"box": [1, 2]}}, ["answer_bbox", "4 numbers"]),
    "nan": ({"text": "x", "answer": float("nan")}, ["field 'answer'", "nan or infinity"]),
    "infinity": (
        {"text": "x", "answer": "y", "meta": {"a": [1, float("-inf")]}},
        ["field 'meta.a[1]'", "nan or infinity"],
    ),
    "nan among references": (
        {"text": "x", "answer": ["y", float("nan")]},
        ["field 'answer[1]'", "nan or infinity"],
    ),
    "nan in a field that nobody reads": (
        {"text": "x", "answer": "y", "extra": float("nan")},
        ["field 'extra'"],
    ),
    "surrogate": ({"text": "x\ud800", "answer": "y"}, ["'text'", "character 2"]),
    "null byte": ({"text": "x\0", "answer": "y"}, ["'text'", "character 2"]),
    "image missing": ({**GOOD, "image": "nope.png"}, ["'image'", "'nope.png'", "no such image"]),
    "image number": ({**GOOD, "image": 3}, ["'image'", "3"]),
    "image empty": ({**GOOD, "image": ""}, ["'image'", "empty"]),
    "image corrupt": ({**GOOD, "image": "broken.png"}, ["'broken.png'", "not an image"]),
    "image escapes": ({**GOOD, "image": "../out.png"}, ["'../out.png'", "leaves the image root"]),
    "image absolute": ({**GOOD, "image": "/etc/hostname"}, ["'/etc/hostname'", "leaves the image root"]),
    "image is a folder": ({**GOOD, "image": "folder"}, ["'folder'", "no such image"]),
    "image list": ({**GOOD, "image": ["a.png", "nope.png"]}, ["image[1]", "nope.png"]),
    "two image fields": ({**GOOD, "images": ["a.png"]}, ["'image' and 'images'"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(root: Path, case: str) -> None:
    row, words = BAD_ROWS[case]
    (root / "broken.png").write_bytes(b"\x89PNG nonsense")
    (root / "folder").mkdir()
    (root / "d.json").write_text(json.dumps([GOOD, row]))
    with pytest.raises(RetainError) as caught:
        read.examples(root / "d.json")
    for word in [str(root / "d.json"), "row 2", *words]:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nan_in_a_line_of_json_is_an_error_and_never_a_text(root: Path, word: str) -> None:
    row = '{"text": "x", "answer": WORD}'.replace("WORD", word)
    for name, text in (
        ("d.jsonl", f'{{"text": "x", "answer": "y"}}\n{row}\n'),
        ("d.json", f'[{{"text": "x", "answer": "y"}}, {row}]'),
    ):
        with pytest.raises(RetainError, match=rf"{name}, row 2, field 'answer': nan or infinity is no value"):
            read.examples(_write(root / name, text))
    assert (
        read.examples(_write(root / "t.jsonl", '{"text": "x", "answer": "nan"}'))[0].answer == "nan"
    )  # a word


def test_nan_in_parquet_is_an_error(root: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x", "x"], "answer": [1.5, float("nan")]}), root / "d.parquet")
    with pytest.raises(RetainError, match=r"d\.parquet, row 2, field 'answer': nan or infinity"):
        read.examples(root / "d.parquet")
    pq.write_table(pa.table({"text": ["x"], "answer": ["1"], "score": [float("inf")]}), root / "d.parquet")
    with pytest.raises(RetainError, match=r"row 1, field 'score'"):
        read.examples(root / "d.parquet")


def test_a_huge_image_is_refused_by_its_header(root: Path) -> None:
    Image.new("1", (400, 300)).save(root / "big.png")
    (root / "d.json").write_text(json.dumps([{**GOOD, "image": "big.png"}]))
    with pytest.raises(RetainError, match=r"row 1.*'big\.png': 400 x 300 = 120,000 pixels; at most 100,000"):
        read.examples(root / "d.json", max_pixels=100_000)
    assert read.examples(root / "d.json", max_pixels=120_000)


def test_a_decompression_bomb_is_refused_unopened(root: Path) -> None:
    header = bytearray((root / "a.png").read_bytes())
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height of the PNG header
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (root / "bomb.png").write_bytes(header)
    (root / "d.json").write_text(json.dumps([{**GOOD, "image": "bomb.png"}]))
    with pytest.raises(RetainError, match=r"row 1.*bomb\.png.*(too large|pixels)"):
        read.examples(root / "d.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"text": "x", "answer": "y"},', ["broken JSON", "column"]),
        ('{"text": "x", "answer": "y"}\n{"text": \n', ["row 2 (line 2)", "broken JSON"]),
        ("hello", ["row 1", "broken JSON"]),
        ("[1]", ["row 1", "an object"]),
        ("[" * 200_000, ["broken JSON"]),
    ],
)
def test_a_broken_file_is_named(root: Path, text: str, words: list[str]) -> None:
    (root / "d.json").write_text(text)
    with pytest.raises(RetainError) as caught:
        read.examples(root / "d.json")
    for word in [str(root / "d.json"), *words]:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_files_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RetainError, match="no such file"):
        read.examples(root / "none.json")
    with pytest.raises(RetainError, match="image root"):
        read.examples(_write(root / "d.json", "[]"), root / "nowhere")
    (root / "latin.json").write_bytes(b'[{"text": "\xe9"}]')
    with pytest.raises(RetainError, match="not UTF-8 text: byte 11 is 0xe9"):
        read.examples(root / "latin.json")
    monkeypatch.setattr(read, "MAX_LINE", 100)
    with pytest.raises(RetainError, match=r"row 1 \(line 1\): longer than 100"):
        read.examples(_write(root / "long.jsonl", json.dumps({"text": "x" * 200, "answer": "y"})))
    monkeypatch.setattr(read, "MAX_TEXT", 10)
    with pytest.raises(RetainError, match="200 characters"):
        read.examples(_write(root / "long.json", json.dumps([{"text": "x" * 200, "answer": "y"}])))


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_image_is_looked_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "d.json").write_text(json.dumps([{**GOOD, "id": i} for i in range(5)]))
    looked = []
    monkeypatch.setattr(read, "_wrong_path", lambda path, limit: looked.append(path) or "")
    assert len(read.examples(root / "d.json")) == 5 and looked == [root / "a.png"]


# -- the doctor ------------------------------------------------------------------------------------------


def ask(
    ident: str, question: str = "What colour?", answer: str = "red", seed: int | None = 0, **meta: Any
) -> Example:
    """An example with a drawn image (`seed` None: without)."""
    images = (
        () if seed is None else (np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8),)
    )
    messages = (Message("user", question, len(images)), Message("assistant", answer))
    return Example(ident, messages, images, (), meta)


def task(train: list[Example], test: list[Example], scorer: str = "exact", name: str = "t") -> Task:
    return Task(name, train, test, score(scorer))


TRAIN = [ask("a", seed=1), ask("b", seed=2)]
TEST = [ask("x", seed=11)]


def found(*tasks: Task) -> list[Finding]:
    return diagnose(Stream("s", tasks))


def test_healthy_data_has_no_findings() -> None:
    assert found(task(TRAIN, TEST)) == []


LONG = "The picture shows a tin. " * 30
CASES: dict[str, tuple[Task, str, str, str]] = {
    "empty answer": (task([*TRAIN, ask("c", answer=" ", seed=3)], TEST), "error", "train", "answer is empty"),
    "empty question": (
        task([*TRAIN, ask("c", question="", seed=3)], TEST),
        "error",
        "train",
        "question is empty",
    ),
    "empty id": (task([*TRAIN, ask("", seed=3)], TEST), "error", "train", "id is empty"),
    "same id": (task([*TRAIN, ask("a", seed=3)], TEST), "error", "train", "id of row 1"),
    "duplicate": (
        task([*TRAIN, ask("c", seed=1)], TEST),
        "warning",
        "train",
        "same images and question as row 1",
    ),
    "leak": (
        task(TRAIN, [ask("x", seed=2)]),
        "error",
        "test",
        "leak: images and question are in t, train, row 2",
    ),
    "shared image": (
        task(TRAIN, [ask("x", "Is it new?", "new thing", seed=2)]),
        "warning",
        "test",
        "the image is also in t, train, row 2",
    ),
    "no test": (task(TRAIN, []), "error", "test", "split is empty"),
    "given away": (
        task(TRAIN, [ask("x", "Why is this can of red paint shown?", "red paint", seed=9)]),
        "warning",
        "test",
        "'red paint' occurs",
    ),
    "rationale": (
        task(TRAIN, [ask("x", LONG + "So copper is in it. What metal is it?", "copper", seed=9)]),
        "error",
        "test",
        "given away",
    ),
    "choice without letter": (task(TRAIN, TEST, "choice"), "error", "test", "needs an option letter"),
    "choice without options": (
        task([ask("a", answer="B", seed=1)], [ask("x", answer="A", seed=9)], "choice"),
        "warning",
        "test",
        "no options are given",
    ),
    "choice beyond": (
        task(
            [ask("a", answer="D", seed=1, options=["u", "v"])],
            [ask("x", answer="A", seed=9, options=["u", "v"])],
            "choice",
        ),
        "error",
        "train",
        "'D' is beyond the 2 options",
    ),
    "iou without box": (task(TRAIN, TEST, "iou"), "error", "test", "needs a box"),
    "number without number": (task(TRAIN, TEST, "number"), "error", "test", "needs a number"),
    "exact on prose": (
        task(TRAIN, [ask("x", answer=" ".join("abcdefghijklmnop"), seed=9)]),
        "warning",
        "test",
        "hardly ever met",
    ),
    "long question": (task(TRAIN, [ask("x", "word " * 1000, seed=9)]), "warning", "test", "characters"),
    "one answer": (
        task(TRAIN, [ask(f"x{i}", f"What is no. {i}?", seed=20 + i) for i in range(25)]),
        "warning",
        "test",
        "100% of the answers",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_doctor_finds(case: str) -> None:
    bad, level, split, words = CASES[case]
    hits = [f for f in found(bad) if words in f.message]
    assert hits, f"nothing about {words!r} in {found(bad)}"
    assert (hits[0].level, hits[0].split, hits[0].task) == (level, split, "t")


def test_leaks_between_tasks_and_balance() -> None:
    big = task([ask(f"b{i}", seed=100 + i) for i in range(60)], [ask("bt", seed=99)], name="big")
    mid = task([ask(f"m{i}", seed=200 + i) for i in range(10)], [ask("mt", seed=198)], name="mid")
    small = task([ask("s", seed=300)], [ask("st", seed=105)], name="small")
    messages = [(f.task, f.message) for f in found(big, mid, small)]
    assert ("small", "leak: images and question are in big, train, row 6") in messages
    assert any(t == "small" and "out of balance" in m for t, m in messages)


@pytest.mark.parametrize(
    "question",
    [
        "Is it red or blue?",
        "Which one?\nA. red\nB. blue",
        "Which one?\n(A) red\n(B) blue",
        "Choose from: red, blue, green.",
        "Pick a colour of red, blue or green.",
        "Options: red / blue",
    ],
)
def test_options_in_a_question_give_nothing_away(question: str) -> None:
    assert not [f for f in found(task(TRAIN, [ask("x", question, "red", seed=9)])) if "occurs" in f.message]


def test_an_image_that_opens_but_does_not_decode(root: Path) -> None:
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "d.json").write_text(json.dumps([{**GOOD, "image": "cut.png"}]))
    cut = read.examples(root / "d.json")  # its header is fine
    hits = [f for f in found(task(TRAIN, cut)) if "does not decode" in f.message]
    assert hits and hits[0].level == "error" and "cut.png" in hits[0].message and hits[0].id == "g"


def test_many_findings_of_one_kind_are_counted() -> None:
    findings = found(task([ask(f"a{i}", answer="", seed=i) for i in range(50)], TEST))
    assert len([f for f in findings if f.field == "answer"]) == 50
    shown = [row for row in finding_rows(findings) if row[5] == "answer"]
    assert len(shown) == 6 and "45 rows more" in shown[-1][6]


# -- references scored as if they were answers -----------------------------------------------------------


class Words:
    """A reader that counts words, and refuses what is told to be refused."""

    def measure(self, example: Example) -> Lengths:
        if "refuse" in example.question:
            raise RetainError("absolute aspect ratio must be smaller than 200")
        return Lengths(len(example.question.split()), 7 * len(example.images), len(example.answer.split()))

    def cut(self, text: str, n_tokens: int) -> str:
        return " ".join(text.split()[:n_tokens])

    def remarks(self, example: Example) -> list[str]:
        return ["the picture loses its edges"] if "wide" in example.question else []


def test_of(scorer: str, test: list[Example], n_tokens: int = 32, compat: str | None = None) -> Task:
    return Task("t", TRAIN, test, score(scorer), n_tokens, compat=score(compat) if compat else None)


test_of.__test__ = False  # type: ignore[attr-defined]


def told(t: Task, level: str = "", reader: Any = None) -> list[str]:
    """Messages about the test split."""
    return [
        f"{f.row}: {f.field}: {f.message}"
        for f in diagnose([t], reader)
        if f.split == "test" and level in ("", f.level)
    ]


COCO = [{"box": [120, 80, 40, 30]}, {"box": [10, 10, 50, 60]}, {"box": [200, 9, 20, 30]}]
REFERENCES: dict[str, tuple[Task, str]] = {
    "number with its unit": (
        test_of("number", [ask("x", answer="5cm", seed=9)]),
        "1: answer: score 'number' needs a number; '5cm' is glued to its unit; write 5",
    ),
    "number of several": (
        test_of("number", [ask("x", answer="5 or 6", seed=9)]),
        "1: answer: score 'number' needs a number; '5 or 6' states several",
    ),
    "coco box": (
        test_of("iou", [ask("x", seed=9, **COCO[0])]),
        "1: box: a box with x2 <= x1 or y2 <= y1 never scores; a COCO box of x, y, width, height? corners are needed: "
        "[120.0, 80.0, 40.0, 30.0]",
    ),
    "coco boxes, most of which look like corners": (
        test_of("iou", [ask(f"x{i}", f"No. {i}?", seed=30 + i, **m) for i, m in enumerate(COCO)]),
        "0: box: 2 of 3 boxes are no corners, so the others will be x, y, width, height (COCO) too",
    ),
    "nothing after normalising": (
        test_of("vqa", [ask("x", answer="the", seed=9)]),
        "1: answer: nothing is left of the reference 'the' after normalising",
    ),
    "a full stop alone": (
        test_of("exact", [ask("x", answer=".", seed=9)]),
        "1: answer: nothing is left of the reference '.' after normalising",
    ),
    "two choices": (
        test_of("choice", [ask("x", answer="A or B", seed=9, options=["u", "v"])]),
        "1: answer: score 'choice' needs an option letter or an option; 'A or B' is none",
    ),
    "key that is two equal options": (
        test_of("choice", [ask("x", answer="up", seed=9, options=["up", "up"])]), "needs an option letter",
    ),
    "compat scorer that cannot": (
        test_of("vqa", [ask("x", seed=9)], compat="compat_textvqa"),
        "0: compat: score 'compat_textvqa' cannot score this split: score 'compat_textvqa': example 'x' has 1 references",
    ),
    "tolerance": (
        test_of("number", [ask("x", answer="5", seed=9, tolerance="wide")]),
        "tolerance: a number of 0 or more is needed, not 'wide'",
    ),
    "longer than max_new_tokens": (
        test_of("exact", [ask("x", answer="one two three", seed=9)], 2),
        "1: max_new_tokens: the reference has more than 2 tokens: cut to 'one two' it gets 0 of 100 by 'exact'",
    ),
    "refused by the processor": (
        test_of("exact", [ask("x", "refuse it?", seed=9)]),
        "1: model: the model's processor refuses it: absolute aspect ratio must be smaller than 200",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_that_cannot_score_is_an_error(case: str) -> None:
    bad, words = REFERENCES[case]
    hits = [m for m in told(bad, "error", Words()) if words in m]
    assert hits, told(bad, "error", Words())
    assert len(told(bad, "error", Words())) == len(set(told(bad, "error", Words())))


WARNED: dict[str, tuple[Task, str]] = {
    "equal options": (
        test_of("choice", [ask("x", answer="B", seed=9, options=["up", "Up.", "down"])]),
        "1: options: equal option texts: A and B are 'up'",
    ),
    "unit": (
        test_of("number", [ask("x", answer="5 cm", seed=9)]),
        "score 'number' compares numbers only: in '5 cm' the rest is not looked at",
    ),
    "released scorer": (
        test_of("exact", [ask("x", answer="Net income", seed=9)], compat="compat_dcl_fin"),
        "1: compat: score 'compat_dcl_fin' gives the reference 'Net income' itself 0 of 100",
    ),
    "less than full marks": (
        test_of("vqa", [replace(ask("x", answer="a1", seed=9), references=tuple(f"a{i}" for i in range(10)))]),
        "the best reference itself gets 30.0 of 100 by 'vqa' on average over 1 of 1 rows; here 'a0' gets 30.0",
    ),
    "edges": (test_of("exact", [ask("x", "how wide?", seed=9)]), "1: model: the picture loses its edges"),
    "all in the upper left": (
        test_of("iou", [
            ask(f"x{i}", f"No. {i}?", f"5, 5, {40 + i}, 50", seed=30 + i, box=[5, 5, 40 + i, 50], size=[640, 480])
            for i in range(12)
        ]),
        "0: box: all 12 boxes would fit their images as COCO's x, y, width, height",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WARNED)
def test_a_reference_that_gets_less_is_a_warning(case: str) -> None:
    bad, words = WARNED[case]
    assert [m for m in told(bad, "warning", Words()) if words in m], told(bad, "", Words())
    assert told(bad, "error", Words()) == []


def test_references_that_score_are_no_findings() -> None:
    corners = [[300, 200, 600, 400], [10, 10, 30, 40]] * 8
    healthy = [
        test_of("number", [ask("x", answer="1,234.5", seed=9)]),
        test_of("contains", [ask("x", answer="one two three", seed=9)], 9),
        test_of("choice", [ask("x", answer="v", seed=9, options=["u", "v"])]),
        test_of("anls", [ask("x", answer="a b", seed=9)]),
        test_of("iou", [ask(f"x{i}", f"{i}?", str(b), 40 + i, box=b, size=[640, 480]) for i, b in enumerate(corners)]),
        test_of("vqa", [replace(ask("x", answer="red", seed=9), references=("red",) * 10)], compat="compat_textvqa"),
        test_of("contains", [replace(ask("x", answer="very long", seed=9), references=("very long indeed", "ok"))], 1),
    ]  # fmt: skip
    for t in healthy:
        assert told(t, "", Words()) == [], t.score.name


def test_a_scorer_of_ones_own_is_asked_of_the_whole_split_and_needs_no_doubts() -> None:
    calls: list[int] = []

    class Own:
        name, formula = "own", "1"

        def __call__(self, predictions: Any, examples: Any) -> list[float]:
            calls.append(len(predictions))
            return [100.0 * (p == e.answer) for p, e in zip(predictions, examples, strict=True)]

    t = Task("t", TRAIN, [ask(f"x{i}", f"{i}?", seed=50 + i) for i in range(4)], Own())
    assert told(t) == [] and set(calls) == {2, 4}


def test_the_majority_baseline_is_the_best_constant_answer() -> None:
    test = [ask(f"x{i}", f"{i}?", answer=a, seed=60 + i) for i, a in enumerate(["yes"] * 5 + ["no"] * 3)]
    made = best_constant(task(TRAIN, test))
    assert made and (made.text, made.score, made.rows) == ("yes", 62.5, 8)
    numbers = [
        ask(f"x{i}", f"{i}?", answer=a, seed=60 + i, tolerance=1)
        for i, a in enumerate(["1", "1", "4", "5", "6"])
    ]
    made = best_constant(test_of("number", numbers))
    assert made and (made.text, made.score) == ("5", 60.0)  # not the most frequent one
    alternating = [
        ask(f"x{i}", f"{i}?", answer="AB"[i % 2], seed=None, options=["u", "v"]) for i in range(12_000)
    ]
    made = best_constant(test_of("choice", alternating))
    assert made and 48 < made.score < 52 and made.rows == 5000
    assert best_constant(test_of("exact", [])) is None


def test_the_processor_measures_a_sample_with_the_extremes() -> None:
    rows = [ask(f"x{i}", "short?", seed=None) for i in range(1000)]
    rows[123] = ask("long", "a very long question " * 9, seed=None)
    rows[777] = replace(rows[777], images=(np.zeros((2, 400, 3), np.uint8),))
    chosen = sample(rows)
    assert len(chosen) <= 96 and {123, 777} <= set(chosen) and sample(rows) == chosen
    assert sample(rows[:90]) == list(range(90))
    of_test = examine([task(TRAIN, rows)], Words()).tasks[0]
    assert max(x.prompt for x in of_test.lengths) == 36 and max(x.image for x in of_test.lengths) == 7


def test_the_pocket_stream_is_healthy() -> None:
    from retain.pocket.stream import pocket

    errors = [f for f in diagnose(pocket(n_train=24, n_test=24)) if f.level == "error"]
    assert errors == [], finding_rows(errors)
