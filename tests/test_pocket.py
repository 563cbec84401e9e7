"""The pocket: drawing and stream are the same for a seed, splits share no image, the shipped model loads and
answers.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from retain.pocket import POCKET_DIR, lessons, pocket_path
from retain.pocket import pictures as pic
from retain.pocket import stream as bench
from retain.types import digest


def keys(examples) -> set[str]:
    return {hashlib.sha256(e.images[0].tobytes()).hexdigest() for e in examples}


# ---- sources


@pytest.mark.parametrize("name", ["garments", "digits", "icons", "photos", "glyphs"])
def test_every_cell_of_a_sheet_has_a_label(name: str) -> None:
    sheet = pic.sheet(name)
    n = sheet.labels["count"]
    assert len(sheet.cells) == n
    for key in ("labels", "kinds", "source", "advance"):
        assert len(sheet.labels.get(key, range(n))) == n
    assert sheet.cells.reshape(n, -1).max(1).min() > 0, "an empty cell"


def test_garments_are_balanced() -> None:
    assert np.bincount(pic.sheet("garments").labels["labels"]).tolist() == [600] * 10


@pytest.mark.parametrize("name", ["garments", "digits", "photos"])
def test_parts_share_no_source_image(name: str) -> None:
    pools = [pic.pool(name, part) for part in ("base", "train", "valid", "test")]
    assert sum(map(len, pools)) == len(np.unique(np.concatenate(pools))) == pic.sheet(name).labels["count"]
    seen = [
        {sheet.tobytes() for sheet in pic.sheet(name).cells[p]} for p in (pools[0], np.concatenate(pools[1:]))
    ]
    assert not seen[0] & seen[1], "equal pixels on both sides"


@pytest.mark.parametrize("name", ["icons", "glyphs"])
def test_base_and_stream_share_no_icon_and_no_font(name: str) -> None:
    assert not set(pic.pool(name, "base")) & set(pic.pool(name, "train"))


@pytest.mark.parametrize("kind", pic.DISTORTIONS)
def test_each_degree_is_farther_from_the_photograph(kind: str) -> None:
    far = []
    for degree in (1, 2, 3):
        rng = np.random.default_rng(0)
        rows = pic.pool("photos", "base")[::9]
        far.append(
            np.mean(
                [
                    np.abs(pic.distort(pic.photo(r), kind, degree, rng) - pic.photo(r).astype(float)).mean()
                    for r in rows
                ]
            )
        )
    assert 1 < far[0] < far[1] < far[2]


# ---- stream


@pytest.mark.parametrize("name", sorted(bench.MAKERS))
def test_a_task_is_decided_by_its_seed(name: str) -> None:
    a, b, c = (bench.task(name, seed, 30, 10, 20) for seed in (0, 0, 1))
    assert a.digest() == b.digest() != c.digest()
    assert digest(list(a.train)[:20]) == digest(list(bench.task(name, 0, 20, 10, 20).train)), (
        "a shorter list is a prefix"
    )


def test_the_stream_is_what_it_was() -> None:
    assert digest([t.data_digest() for t in bench.pocket(n_train=20, n_test=10, n_valid=10)]) == GOLDEN


GOLDEN = "fe68bd8431268e3c"


@pytest.mark.parametrize("name", sorted(bench.MAKERS))
def test_no_image_is_in_two_parts_nor_in_the_base(name: str) -> None:
    task = bench.task(name, 0, 150, 60, 60)
    train, valid, test = keys(task.train), keys(task.valid), keys(task.test)
    assert not train & valid and not train & test and not valid & test
    rng = np.random.default_rng(0)
    base = {hashlib.sha256(lessons.lesson(rng).image.tobytes()).hexdigest() for _ in range(150)}
    assert not base & (train | valid | test)


def test_references_score_in_full_and_rubbish_does_not() -> None:
    for name in bench.MAKERS:
        task = bench.task(name, 0, 1, 1, 20)
        best = 100 if name != "captions" else 90  # its plain captions have three words: no 4-grams for CIDEr
        assert np.mean(task.score([e.answer for e in task.test], task.test)) == pytest.approx(best, abs=6)
        assert np.mean(task.score(["zebra"] * 20, task.test)) < 5


def test_some_tasks_share_an_answer_line() -> None:
    lines = [bench.task(n, 0, 1, 1, 1).train[0].question.rsplit("\n", 1)[-1] for n in bench.ORDER]
    assert sum(lines.count(x) > 1 for x in set(lines)) >= 2


def test_what_a_task_asks_is_not_in_the_lessons() -> None:
    rng = np.random.default_rng(1)
    asked = {q for _ in range(200) for q, _ in lessons.lesson(rng).qa}
    drawn = [maker(rng, "train") for maker, _, _ in bench.MAKERS.values() for _ in range(20)]
    assert not asked & {draw.question for draw in drawn}
    assert not {q.split("?")[0] for q in asked} & {draw.question.split("?")[0] for draw in drawn}


def test_about_three_questions_in_ten_are_plain() -> None:
    stream = bench.pocket(n_train=200, n_test=1, n_valid=1)
    for task in stream:
        firsts = [e.question.split()[:3] for e in task.train]
        commonest = max(firsts.count(f) for f in firsts)
        assert 0.55 < commonest / len(firsts) < 0.85, task.name


# ---- model


def test_what_is_shipped_is_small() -> None:
    size = sum(p.stat().st_size for p in POCKET_DIR.rglob("*") if p.is_file())
    assert size < 20e6
    assert sum(p.stat().st_size for p in pic.ASSETS.iterdir()) < 6e6
    assert not [p for p in Path(POCKET_DIR).rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}]


@pytest.fixture(scope="module")
def llava(monkeypatch_module):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(pocket_path(), dtype=torch.float32)
    return model.eval(), LlavaProcessor.from_pretrained(pocket_path())


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield patch


def answers(llava, asked: list[tuple[np.ndarray, str]]) -> list[str]:
    model, processor = llava
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q}]}] for _, q in asked
    ]
    texts = [processor.apply_chat_template(t, add_generation_prompt=True) for t in turns]
    inputs = processor(images=[image for image, _ in asked], text=texts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(out, skip_special_tokens=True)]


def test_the_shipped_model_answers_base_questions_through_stock_classes(llava) -> None:
    rng = np.random.default_rng(7)
    made = [
        lessons.lesson(rng, name) for name in ("garments", "scenes", "charts", "digits") for _ in range(8)
    ]
    gold = [one.qa[0][1] for one in made]
    said = answers(llava, [(one.image, one.qa[0][0]) for one in made])
    assert np.mean([a == b for a, b in zip(said, gold, strict=True)]) > 0.6


def test_new_tasks_are_new(llava) -> None:
    stream = bench.pocket(n_train=1, n_test=16, n_valid=1)
    scores = []
    for task in stream:
        said = answers(llava, [(e.images[0], e.question) for e in task.test])
        scores.append(np.mean(task.score(said, task.test)))
    assert np.mean(scores) < 30


def test_guide_puts_a_picture_nearest_its_own_caption(monkeypatch_module) -> None:
    from transformers import AutoTokenizer, CLIPModel

    from retain.pocket.batches import pixels

    clip = CLIPModel.from_pretrained(pocket_path() / "guide", dtype=torch.float32).eval()
    tok = AutoTokenizer.from_pretrained(pocket_path() / "guide")
    rng = np.random.default_rng(3)
    made = {one.caption: one for one in (lessons.lesson(rng) for _ in range(40))}
    ids = tok(list(made), padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(**ids, pixel_values=pixels([m.image for m in made.values()]))
    right = out.logits_per_image.argmax(1) == torch.arange(len(made))
    assert right.float().mean() > 0.4, "chance is one in forty"


def test_the_guide_and_the_model_see_with_the_same_tower(llava) -> None:
    from transformers import CLIPModel

    tower = llava[0].model.vision_tower.state_dict()
    clip = CLIPModel.from_pretrained(pocket_path() / "guide", dtype=torch.float32).vision_model.state_dict()
    assert all(torch.equal(v, clip[k]) for k, v in tower.items() if "post_layernorm" not in k)
