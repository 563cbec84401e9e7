"""Replay, joint training, routing by features and by instructions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fake_model import REQUESTS, FakeModel, context, example, stream
from retain.method import build
from retain.methods import instruction_groups as groups
from retain.methods.lora_per_task import LoraPerTask
from retain.methods.replay import Replay, n_replayed, reservoir_slots
from retain.stream import Task
from retain.types import Message

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BOX = "Please provide the bounding box coordinate of the region this sentence describes"


# -- replay ----------------------------------------------------------------------------------------------


def learn(part: Replay, *names: str) -> Replay:
    for name in names:
        part.end_task(context(FakeModel(), name))
    return part


def test_a_reservoir_is_a_uniform_sample_of_all_that_was_met() -> None:
    hits = torch.zeros(60)
    for seed in range(400):
        buffer = [-1] * 6
        for start in (0, 20, 40):
            rng = torch.Generator().manual_seed(1000 * seed + start)
            for i, slot in enumerate(reservoir_slots(20, start, 6, rng)):
                if slot >= 0:
                    buffer[slot] = start + i
        hits[buffer] += 1
    # 400 x 6 / 60 = 40 expected each, sd 6: six sd for sixty draws
    assert hits.min() > 4 and hits.max() < 76
    assert (hits.view(3, 20).mean(1) - 40).abs().max() < 5


def test_reservoir_and_quota_sizes() -> None:
    assert len(learn(Replay(size=7), *REQUESTS).buffer) == 7
    quota = learn(Replay(size=4, strategy="per_task"), *REQUESTS)
    assert [sum(e.id.startswith(t) for e in quota.buffer) for t in REQUESTS] == [4, 4, 4]
    assert len({e.id for e in quota.buffer}) == 12  # drawn, not the first four of each
    assert [e.id for e in quota.buffer[:4]] != [e.id for e in stream()[0].train[:4]]


def test_coins_form_adds_every_buffered_example_once() -> None:
    part = learn(Replay(size=4, strategy="per_task"), "colour", "letter")
    new = list(stream().named("again").train)
    joined = part.data(context(FakeModel(), "again"), new)
    assert list(joined[: len(new)]) == new
    assert sorted(e.id for e in joined[len(new) :]) == sorted(e.id for e in part.buffer)


def test_a_ratio_is_the_share_of_the_joined_data() -> None:
    assert n_replayed(100, 7, 0.0) == 7 and n_replayed(75, 7, 0.25) == 25
    part = learn(Replay(size=5, ratio=0.5), "colour")
    joined = part.data(context(FakeModel(), "again"), stream().named("again").train)
    counts = [sum(e.id == b.id for e in joined) for b in part.buffer]
    assert len(joined) == 48 and sum(counts) == 24 and max(counts) - min(counts) <= 1


# -- joint training --------------------------------------------------------------------------------------


def test_multitask_is_one_stage_with_everything() -> None:
    (stage,) = build(["multitask", "lora"]).stages(stream())
    assert [e.id for e in stage.train] == [e.id for t in stream() for e in t.train] and not stage.test


def test_joint_training_may_look_at_every_tasks_validation_data_and_answer_as_long_as_any() -> None:
    tasks = [
        replace(t, valid=[example(t.name, 200 + i)], max_new_tokens=n)
        for i, (t, n) in enumerate(zip(stream(), (2, 9, 4), strict=True))
    ]
    (stage,) = build(["multitask", "lora"]).stages(replace(stream(), tasks=tuple(tasks)))
    assert [e.id for e in stage.valid] == [
        "colour-200",
        "letter-201",
        "again-202",
    ] and stage.max_new_tokens == 9


# -- one adapter per task --------------------------------------------------------------------------------


def learned(part: LoraPerTask, *names: str) -> tuple[LoraPerTask, FakeModel]:
    model = FakeModel()
    for i, name in enumerate(names):
        ctx = context(model, name, names[:i])
        model.adapters.mix = part.adapt(ctx)
        for p in model.adapters.trainable().values():
            p.data += 0.1 * (i + 1)
        part.end_task(ctx)
    return part, model


def test_new_adapters_start_fresh_or_from_the_previous() -> None:
    for init, same in (("fresh", False), ("previous", True)):
        part, model = LoraPerTask(init=init), FakeModel()
        for name in ("colour", "letter"):
            part.adapt(context(model, name))
            if name == "colour":
                for p in model.adapters.trainable().values():
                    p.data += 1
        first, second = (model.adapters.state(n) for n in ("01-colour", "02-letter"))
        assert all(torch.equal(first[k], second[k]) for k in first) == same
        assert {k.split("/")[0] for k in model.adapters.trainable()} == {"02-letter"}


def test_guide_routing_equals_cosines_with_the_mean_features() -> None:
    part, model = learned(LoraPerTask(temperature=0.2), "colour", "letter")
    batch = model.collate([example("colour", 7), example("letter", 9)], answers=False)
    guide, scores = model.guide(batch), []
    for name in ("colour", "letter"):
        g = model.guide(model.collate(list(stream().named(name).train), answers=False))
        image = [F.cosine_similarity(x, g.image_BF.mean(0), dim=0) for x in guide.image_BF]
        text = [F.cosine_similarity(x, g.text_BD.mean(0), dim=0) for x in guide.text_BD]
        scores.append(0.5 * torch.stack(image) + 0.5 * torch.stack(text))
    want = torch.softmax(torch.stack(scores, 1) / 0.2, 1)
    mix = part.route(context(model, "letter"), batch)
    assert mix is not None
    torch.testing.assert_close(torch.stack([mix.weights["01-colour"], mix.weights["02-letter"]], 1), want)
    hard = replace_field(part, temperature=0.0).route(context(model, "letter"), batch)
    assert hard is not None and hard.weights["01-colour"].tolist() == [1.0, 0.0]


def replace_field(part: LoraPerTask, **fields: object) -> LoraPerTask:
    other = replace(part, **fields)  # type: ignore[arg-type]
    other.load_state_dict(part.state_dict())
    return other


@pytest.mark.parametrize(
    ("spec", "anchor"),
    [
        ({"lora_per_task": {"anchor_samples": 5}}, "text_anchor"),
        ({"hide": {"anchor_samples": 5}}, "text_anchor"),
        ({"disco": {"token_samples": 5}}, "text_mean"),
    ],
    ids=str,
)
def test_an_anchor_of_some_samples_is_the_mean_of_so_many_drawn_ones(spec: Any, anchor: str) -> None:
    part, model, read = build(spec), FakeModel(), list[str]()
    plain = model.guide
    model.guide = lambda batch: (read.extend(e.id for e in batch.examples), plain(batch))[1]  # type: ignore
    ctx = context(model)
    model.adapters.mix = part.adapt(ctx)
    part.end_task(ctx)
    examples = {e.id: e for e in ctx.task.train}
    assert len(read) == len(set(read)) == 5 and set(read) <= set(examples)
    assert read != list(examples)[:5]  # drawn, not the first ones
    rows = plain(model.collate([examples[i] for i in read], answers=False)).text_BD
    torch.testing.assert_close(next(iter(getattr(part, anchor).values())), rows.mean(0), atol=1e-6, rtol=0)


def test_the_oracle_gives_an_unseen_task_the_base_model() -> None:
    part, model = learned(LoraPerTask(router="oracle"), "colour", "letter")
    batch = model.collate([example("again", 0)], answers=False)
    weights = {t: dict(part.route(context(model, t), batch).weights) for t in REQUESTS}
    assert weights == {"colour": {"01-colour": 1.0}, "letter": {"02-letter": 1.0}, "again": {}}


# -- instruction groups ----------------------------------------------------------------------------------


def test_tf_idf_by_hand() -> None:
    # "red cat" and "red dog": red in both (idf 1), cat and dog in one (ln 1.5 + 1): 1 / (1 + 1.405465^2)
    assert groups.similarity("red cat", "red dog") == pytest.approx(1 / (1 + 1.4054651081**2))
    assert groups.similarity("the red cat", "Red, a CAT!") == pytest.approx(1.0)
    assert groups.similarity("red", "dog") == 0 and groups.similarity("of the", "and if") == 0


@pytest.mark.parametrize("a", [SHORT, LETTER, BOX, "What is the object in the image?", "red cat red"])
@pytest.mark.parametrize(
    "b", [SHORT, LETTER, BOX, "Give a brief answer, one word or a phrase, to the question."]
)
def test_tf_idf_equals_scikit_learn(a: str, b: str) -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    rows = text.TfidfVectorizer(stop_words="english").fit_transform([a, b])
    want = (rows[0] @ rows[1].T).toarray().item()
    assert groups.similarity(a, b) == pytest.approx(want, abs=1e-9)


def test_the_usual_templates_make_the_usual_groups() -> None:
    assert groups.similarity(SHORT, LETTER) == pytest.approx(0.092, abs=5e-4)  # spec 1.10
    assert groups.similarity(SHORT, BOX) == groups.similarity(LETTER, BOX) == 0


def test_alike_instructions_share_an_adapter_and_samples_find_it() -> None:
    model, part = FakeModel(), groups.InstructionGroups()
    names = [part.adapt(context(model, t)).names for t in REQUESTS]
    assert names == [["group1"], ["group2"], ["group1"]] and model.adapters.names == ["group1", "group2"]
    batch = model.collate([example("again", 1), example("letter", 2)], answers=False)
    mix = part.route(context(model, "again"), batch)
    assert (
        mix is not None
        and mix.weights["group1"].tolist() == [1, 0]
        and mix.weights["group2"].tolist() == [0, 1]
    )


@pytest.mark.parametrize("init", ["fresh", "previous"])
def test_a_new_group_starts_from_the_previous_task_not_from_the_newest_group(init: str) -> None:
    """A, B, A, C: C starts from A as the third task left it, as the released scripts do."""
    model, part = FakeModel(), groups.InstructionGroups(init=init)
    other = replace(
        example("colour", 1), messages=(Message("user", "Draw zyx boxes"), Message("assistant", "a1"))
    )
    for i, task in enumerate([*stream(), Task("boxes", [other], [other], stream()[0].score, 2)]):
        ctx = replace(context(model), task=task)
        name = part.adapt(ctx).names[0]
        if task.name != "boxes":
            for p in model.adapters.trainable().values():
                p.data += 0.1 * (i + 1)
    a, b, c = (model.adapters.state(n) for n in ("group1", "group2", "group3"))
    assert name == "group3" and not any(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(c[k], a[k]) for k in a) == (init == "previous")


def test_a_sample_like_nothing_goes_to_the_newest_group() -> None:
    model, part = FakeModel(), groups.InstructionGroups()
    for t in REQUESTS:
        part.adapt(context(model, t))
    odd = replace(example("colour", 1), messages=(Message("user", "zyx"), Message("assistant", "a1")))
    assert part.route(context(model), model.collate([odd], answers=False)).names == ["group2"]


def test_what_is_an_instruction() -> None:
    e = replace(
        example("colour", 0),
        messages=(Message("user", f"A line.\n{BOX}: a red dog"), Message("assistant", "x")),
    )
    assert groups.instruction(e, "format") == BOX
    assert groups.instruction(e, "last_line") == f"{BOX}: a red dog"
    assert groups.instruction(e, "question").startswith("A line.")


def test_the_codebook_is_capped_and_matches_by_mean_or_by_best() -> None:
    model, part = FakeModel(), groups.InstructionGroups(text="question", limit=3)
    part.adapt(context(model))
    assert len(part.codebook["group1"]) == 3
    assert groups.group_similarity(["red"], ["red", "dog"], "mean") == pytest.approx(0.5)
    assert groups.group_similarity(["red"], ["red", "dog"], "max") == pytest.approx(1.0)
