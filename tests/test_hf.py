"""Laws of `HFModel`: equal to Hugging Face's forward, batched equals alone, cached equals computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

import tiny
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.models.base import Model
from retain.models.cache import ByteLRU
from retain.models.family import FAMILIES, VICUNA_V1, family_of
from retain.models.hf import HFModel
from retain.types import Example, Message, RetainError
from test_peft_format import equal_sized, plain_logits

ROUTES = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"c": 2.0}]


# -- forward -------------------------------------------------------------------------------------------------


def test_it_is_a_model(any_model: HFModel) -> None:
    assert isinstance(any_model, Model)
    assert any_model.n_layers == 2
    assert any_model.n_parameters() > 10_000
    assert 0 < any_model.flops_per_token() < 2 * any_model.n_parameters()
    assert all(not p.requires_grad for p in any_model.hf.parameters())


def test_logits_and_loss_equal_hugging_face(any_model: HFModel) -> None:
    """As near to the plain forward in double precision as that forward is in fp32; and its loss."""
    batch = any_model.collate(equal_sized(), answers=True)
    out = any_model(batch)
    hf, _ = tiny.BUILDERS[any_model.name.removeprefix("tiny-")](0)
    theirs, exact = plain_logits(hf, any_model, batch), plain_logits(hf.double(), any_model, batch)
    error = float((theirs - exact).abs().max())
    assert float((out.logits_NV - exact).abs().max()) < 2 * error < 1e-4
    expected = torch.nn.functional.cross_entropy(out.logits_NV, out.labels_N)
    torch.testing.assert_close(out.loss, expected)
    assert len(out.labels_N) == batch.n_answer == len(out.row_N)


def test_several_images_and_none_equal_hugging_face(llava: HFModel) -> None:
    batch = llava.collate(tiny.examples(), answers=True)
    hf, _ = tiny.llava(0)
    torch.testing.assert_close(llava(batch).logits_NV, plain_logits(hf, llava, batch), atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(any_model: HFModel) -> None:
    out = any_model(any_model.collate(tiny.examples(), answers=True))
    for i, example in enumerate(tiny.examples()):
        alone = any_model(any_model.collate([example], answers=True))
        torch.testing.assert_close(out.logits_NV[out.row_N == i], alone.logits_NV, atol=1e-5, rtol=1e-5)


def test_a_cold_cache_gives_the_same_bits_as_a_warm_one(any_model: HFModel) -> None:
    """Whatever was in the cache, and whichever images shared a tower call."""
    batch = any_model.collate(tiny.examples(), answers=True)
    any_model.features.clear()
    cold = any_model(batch).logits_NV
    assert torch.equal(any_model(batch).logits_NV, cold)
    any_model.features.clear()
    for example in reversed(tiny.examples()):
        any_model(any_model.collate([example], answers=True))
    assert torch.equal(any_model(batch).logits_NV, cold)
    hits = any_model.features.hits
    any_model(batch)
    assert any_model.features.hits > hits


def test_training_touches_only_adapters(any_model: HFModel) -> None:
    bank = any_model.adapters
    before = {k: v.clone() for k, v in any_model.hf.state_dict().items()}
    tiny.fill(bank, "a", "b")
    bank.train_only("a")
    any_model.train()
    with bank.using(Mix({"a": 1.0, "b": 0.5})):
        any_model(any_model.collate(tiny.examples(), answers=True)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.trainable().values())
    assert all(p.grad is None for p in bank.parameters("b").values())
    after = any_model.hf.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.model(family, checkpointing=checkpointing)
        tiny.fill(model.adapters, "a")
        model.adapters.train_only("a")
        model.train()
        with model.adapters.using(Mix({"a": 1.0})):
            model(model.collate(tiny.examples(), answers=True)).loss.backward()
        grads.append([p.grad for p in model.adapters.trainable().values()])
    for plain, checked in zip(*grads, strict=True):
        assert plain is not None and checked is not None
        torch.testing.assert_close(plain, checked)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapters_on_the_tower_are_trained_not_cached(family: str) -> None:
    model = tiny.model(family, LoraSpec(rank=2, targets="all"))
    assert not model.frozen_tower
    tiny.fill(model.adapters, "a", "b")
    model.adapters.train_only("a")
    batch = model.collate(tiny.examples(), answers=True)
    with model.adapters.using(tiny.mixture(*[{"a": 1.0}, {"b": 1.0}] * 3)):
        out = model(batch)
        out.loss.backward()
    first = ("encoder.layers.0", "encoder.layer.0", "blocks.0")
    trained = model.adapters.trainable()
    tower = [p for k, p in trained.items() if model.family.tower in k and any(f in k for f in first)]
    assert tower and all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower)
    with torch.no_grad(), model.adapters.using(Mix({"b": 1.0})):
        alone = model(model.collate([tiny.examples()[1]], answers=True))
    torch.testing.assert_close(out.logits_NV[out.row_N == 1], alone.logits_NV, atol=1e-4, rtol=0)


def test_bf16_autocast_is_close_and_repeats() -> None:
    model, fp32 = tiny.model(precision="bf16"), tiny.model()
    batch = model.collate(tiny.examples(), answers=True)
    out = model(batch)
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, model(batch).loss)
    assert float(out.loss) == pytest.approx(
        float(fp32(fp32.collate(tiny.examples(), answers=True)).loss), rel=0.05
    )
    with pytest.raises(RetainError, match="fp16"):
        tiny.model(precision="fp16")


# -- generation ----------------------------------------------------------------------------------------------


def test_generating_a_batch_equals_generating_alone(any_model: HFModel) -> None:
    bank = any_model.adapters
    tiny.fill(bank, "a", "b", "c")
    mix = tiny.mixture(*ROUTES)
    with bank.using(mix):
        together = any_model.generate(any_model.collate(tiny.examples(), answers=False), 12)
    alone = []
    for i, example in enumerate(tiny.examples()):
        with bank.using(mix.select(torch.tensor([i]))):
            alone += any_model.generate(any_model.collate([example], answers=False), 12)
    assert together == alone
    assert len(set(together)) > 3  # otherwise this could not fail


def test_rows_leave_as_they_finish(any_model: HFModel) -> None:
    """Every token that some row would say next is made an EOS in turn: other rows go on unchanged."""
    bank = any_model.adapters
    tiny.fill(bank, "a", "b", "c")
    batch = any_model.collate(tiny.examples(), answers=False)
    eos = any_model.eos
    try:
        with bank.using(tiny.mixture(*ROUTES)):
            from retain.models.generate import greedy

            with torch.no_grad():
                any_model.eos = frozenset()
                full = greedy(any_model, batch, 8)
                for row, step in ((0, 1), (3, 3), (5, 0)):
                    stop = full[row][step]
                    any_model.eos = frozenset({stop})
                    expected = [t[: t.index(stop)] if stop in t else t for t in full]
                    assert greedy(any_model, batch, 8) == expected
    finally:
        any_model.eos = eos


def test_greedy_equals_hugging_face_generate(llava: HFModel) -> None:
    batch = llava.collate([tiny.example(0)], answers=False)
    hf, _ = tiny.llava(0)
    pixels = llava.encode.image(llava.encode(batch.examples[0]).images[0], "e0")
    ids = hf.generate(
        input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], **pixels,
        max_new_tokens=8, do_sample=False,
    )  # fmt: skip
    text = llava.processor.tokenizer.decode(
        ids[0, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert llava.generate(batch, 8) == [text.strip()]


def test_generation_turns_dropout_off_and_restores_training() -> None:
    model = tiny.model(spec=LoraSpec(rank=4, dropout=0.5))
    tiny.fill(model.adapters, "a")
    batch = model.collate(tiny.examples(), answers=False)
    with model.adapters.using(Mix({"a": 1.0})):
        expected = model.generate(batch, 6)
        model.train()
        assert model.generate(batch, 6) == expected
    assert model.training


def test_training_and_inference_share_one_tokenisation(any_model: HFModel) -> None:
    """The prompt has the same tokens in training and at inference, and an answer decodes to itself."""
    tokenizer = any_model.processor.tokenizer
    for example in tiny.examples():
        encoded = any_model.encode(example)
        both = any_model.collate([example], answers=True).inputs["input_ids"][0].tolist()
        prompt = any_model.collate([example], answers=False).inputs["input_ids"][0].tolist()
        assert both[: len(prompt)] == prompt
        assert both[-1] in any_model.eos
        assert tokenizer.decode(encoded.answer[:-1]).strip() == example.answer


# -- batches -------------------------------------------------------------------------------------------------


def test_labels_are_the_answer_and_eos(any_model: HFModel) -> None:
    batch = any_model.collate(tiny.examples(), answers=True)
    assert batch.labels_BT is not None
    for example, labels in zip(tiny.examples(), batch.labels_BT, strict=True):
        said = labels[labels != -100].tolist()
        assert said[-1] in any_model.eos
        assert any_model.processor.tokenizer.decode(said[:-1]).strip() == example.answer
    assert batch.image_row_I.tolist() == [0, 1, 1, 3, 4]
    left = any_model.collate(tiny.examples(), answers=False)
    assert left.labels_BT is None
    assert left.inputs["attention_mask"][:, -1].all() and not left.inputs["attention_mask"][-1, 0]
    assert any_model.length(tiny.examples()[0]) == len(any_model.encode(tiny.examples()[0]))


def test_examples_are_encoded_once(llava: HFModel) -> None:
    example = tiny.example(77)
    assert llava.encode(example) is llava.encode(example)


def test_long_examples_are_an_error_or_lose_their_answer_never_their_image() -> None:
    long = tiny.example(0, 1, answer="red " * 60)
    with pytest.raises(RetainError, match=r"'e0'.*9 of images.*max_length 40"):
        tiny.model(max_length=40).collate([long], answers=True)
    cut = tiny.model(max_length=40, truncate=True)
    batch = cut.collate([long], answers=True)
    assert batch.inputs["input_ids"].shape[1] == 40
    assert int((batch.inputs["input_ids"] == cut.encode.image_token_id).sum()) == 9
    with pytest.raises(RetainError, match="'e0'"):
        tiny.model(max_length=12, truncate=True).collate([long], answers=True)


def test_wrong_images_are_errors_that_name_the_example(llava: HFModel, tmp_path: Path) -> None:
    user, answer = Message("user", "what?", 2), Message("assistant", "red")
    with pytest.raises(RetainError, match=r"'x': 1 images, but its messages show 2"):
        llava.collate([Example("x", (user, answer), (tiny.picture(0),))], answers=True)
    text = llava.collate([Example("x", (Message("user", "<image> what?"), answer))], answers=True)
    assert llava.encode.image_token_id not in text.inputs["input_ids"]  # the data's own words, and no image
    with pytest.raises(RetainError, match=r"'x': cannot read image .*gone\.png"):
        llava.collate(
            [Example("x", (Message("user", "what?", 1), answer), (tmp_path / "gone.png",))], answers=True
        )
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(RetainError, match=r"broken\.png"):
        llava.collate(
            [Example("x", (Message("user", "what?", 1), answer), (tmp_path / "broken.png",))], answers=True
        )


def test_images_as_array_path_and_pillow_are_one_image(llava: HFModel, tmp_path: Path) -> None:
    from PIL import Image

    pixels = tiny.picture(5)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    sources: list[Any] = [pixels, tmp_path / "p.png", Image.fromarray(pixels)]
    user, answer = (
        Message("user", "what?"),
        Message("assistant", "red"),
    )  # no turn says where: the first user turn
    keys = {llava.encode(Example("x", (user, answer), (s,))).images[0].key for s in sources}
    assert len(keys) == 1
    grey = Example("g", (user, answer), (np.zeros((24, 24), dtype=np.uint8),))
    assert llava(llava.collate([grey], answers=True)).loss.isfinite()


def test_without_a_chat_template_the_conversation_is_vicuna_v1() -> None:
    model = HFModel(*tiny.llava(chat=False), tiny.SPEC)
    assert model.encode.template == VICUNA_V1
    text = model.encode.render((Message("user", "what?", 1),), generate=True)
    assert text.startswith("A chat between a curious user") and text.endswith(
        "USER: <image>\nwhat? ASSISTANT:"
    )
    two = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))
    assert model.encode.render(two, generate=False).endswith(
        " USER: a ASSISTANT: b</s> USER: c ASSISTANT: d</s>"
    )
    encoded = model.encode(Example("x", two))
    assert model.processor.tokenizer.decode(encoded.answer) == " d</s>"


# -- guide, loading, caches ----------------------------------------------------------------------------------


def test_guide_is_unit_length_and_does_not_depend_on_the_batch(any_model: HFModel) -> None:
    tiny.fill(any_model.adapters, "a")
    examples = tiny.examples()
    guide = any_model.guide(any_model.collate(examples, answers=False))
    with any_model.adapters.using(Mix({"a": 1.0})):  # frozen: adapters do not reach it
        for i, example in enumerate(tiny.examples()):
            alone = any_model.guide(any_model.collate([example], answers=False))
            assert torch.equal(alone.image_BF[0], guide.image_BF[i])
            assert torch.equal(alone.text_BD[0], guide.text_BD[i])
    has_image = torch.tensor([bool(e.images) for e in examples])
    torch.testing.assert_close(guide.image_BF.norm(dim=1), has_image.float())
    torch.testing.assert_close(guide.text_BD.norm(dim=1), torch.ones(len(examples)))
    assert guide.image_BF.dtype == guide.text_BD.dtype == torch.float32


def test_a_saved_model_loads_with_its_guide(tmp_path: Path) -> None:
    hf, processor = tiny.llava()
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 340, "max_position_embeddings": 8, "eos_token_id": 1},
            vision_config={**small, "image_size": 24, "patch_size": 8},
            projection_dim=12,
        )
    )
    clip.save_pretrained(tmp_path / "guide")
    processor.tokenizer.save_pretrained(tmp_path / "guide")
    images = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    images.save_pretrained(tmp_path / "guide")
    model = HFModel.load(tmp_path, tiny.SPEC)
    direct = HFModel(hf, processor, tiny.SPEC)
    assert model.fingerprint() == direct.fingerprint() != tiny.model(seed=1).fingerprint()
    batch = model.collate(tiny.examples(), answers=True)
    assert torch.equal(
        model(batch).logits_NV, direct(direct.collate(tiny.examples(), answers=True)).logits_NV
    )
    guide = model.guide(batch)
    assert guide.image_BF.shape == guide.text_BD.shape == (6, 12)
    torch.testing.assert_close(guide.text_BD.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_a_saved_model_loads_without_its_video_processor(family: str, tmp_path: Path) -> None:
    """Both processors' classes want torchvision for videos; tokens and pixels are the same without it."""
    hf, processor = tiny.BUILDERS[family](0)
    hf.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, direct = HFModel.load(tmp_path, tiny.SPEC), HFModel(hf, processor, tiny.SPEC)
    batches = [m.collate(tiny.examples(), answers=True) for m in (model, direct)]
    assert torch.equal(batches[0].inputs["input_ids"], batches[1].inputs["input_ids"])
    assert torch.equal(model(batches[0]).logits_NV, direct(batches[1]).logits_NV)
    assert {r.n_tokens for r in batches[0].meta["images"]} == ({20} if family == "internvl" else {4})


def test_internvl_images_are_cropped_and_written_as_its_processor_does() -> None:
    """`InternVLProcessor` crops by default, whatever the image processor's own default says."""
    model = tiny.model("internvl")
    processor = model.processor
    assert isinstance(processor, InternVLProcessor)
    asked = processor(images=[tiny.picture(0)], text=["<IMG_CONTEXT>what?"])
    assert asked["input_ids"][0].count(model.encode.image_token_id) == 20
    (ref,) = model.encode(tiny.example(0)).images
    assert (ref.n_rows, ref.n_tokens) == (5, 20)  # four crops and the whole


def test_loading_errors_speak_plainly(tmp_path: Path) -> None:
    with pytest.raises(RetainError, match="no such folder"):
        HFModel.load(tmp_path / "gone")
    with pytest.raises(RetainError, match="no such folder"):
        HFModel.load("gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RetainError, match=r"config\.json"):
        HFModel.load(tmp_path / "empty")
    with pytest.raises(RetainError, match="choose from"):
        HFModel(*tiny.llava(), family="gpt")


def test_an_unknown_family_is_found_by_its_parts() -> None:
    """The whole-model path: no split, nothing cached, same logits and answers."""
    hf, processor = tiny.llava()
    hf.config.model_type = "something_new"
    model, known = HFModel(hf, processor, tiny.SPEC), tiny.model()
    assert (model.family.name, model.family.features) == ("something_new", None)
    assert model.family.projector == known.family.projector == FAMILIES["llava"].projector
    for m in (model, known):
        tiny.fill(m.adapters, "a", "b", "c")
    logits, answers = [], []
    for m in (model, known):
        with torch.no_grad(), m.adapters.using(tiny.mixture(*ROUTES)):
            logits.append(m(m.collate(tiny.examples(), answers=True)).logits_NV)
            answers.append(m.generate(m.collate(tiny.examples(), answers=False), 6))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert answers[0] == answers[1]
    hf.config.model_type = "other"
    with pytest.raises(RetainError, match="cannot be tuned: it has no language model"):
        family_of(type("Bare", (torch.nn.Module,), {"config": hf.config})())


def test_the_cache_keeps_to_its_budget() -> None:
    cache: ByteLRU[torch.Tensor] = ByteLRU(100)
    for k in range(4):
        cache.put(str(k), torch.zeros(10))  # 40 bytes each
        cache.get("0")
    assert "0" in cache and "3" in cache and len(cache) == 2 and cache.used == 80
    cache.put("large", torch.zeros(100))
    assert "large" not in cache and cache.used == 80


def test_every_assistant_turn_is_learned_or_the_last(any_model: HFModel) -> None:
    """LLaVA's rule, and `optim.turns: last`: which labels there are, and nothing else, differs."""
    talk = (
        Message("user", "What colour is the square?", 1),
        Message("assistant", "red"),
        Message("user", "How many shapes?"),
        Message("assistant", "three"),
    )
    example = Example("t", talk, (tiny.picture(1),))
    every, last = (any_model.collate([example], answers=True, turns=t) for t in ("all", "last"))
    assert every.labels_BT is not None and last.labels_BT is not None
    assert torch.equal(every.inputs["input_ids"], last.inputs["input_ids"])
    tokenizer = any_model.processor.tokenizer

    def said(labels_BT: torch.Tensor) -> list[str]:
        row = labels_BT[0].tolist()
        runs = "".join(" " if i == -100 else "x" for i in row).split()
        kept = iter([i for i in row if i != -100])
        parts = [[next(kept) for _ in run] for run in runs]
        return [tokenizer.decode(p, skip_special_tokens=True).strip() for p in parts]

    assert said(every.labels_BT) == ["red", "three"] and said(last.labels_BT) == ["three"]
    learned = every.labels_BT[every.labels_BT != -100]
    assert every.n_answer == len(learned) and last.n_answer < every.n_answer
    alone = any_model(any_model.collate([Example("a", talk[:2], example.images)], answers=True))
    first = any_model(every).logits_NV[: len(alone.logits_NV)]
    torch.testing.assert_close(
        first[: len(first) - 1], alone.logits_NV[: len(first) - 1], atol=1e-4, rtol=1e-4
    )


def test_words_between_pictures_keep_their_places(any_model: HFModel) -> None:
    """Where the template writes parts in their order; tiny's LLaVA writes pictures first, as the published one does."""
    apart = Message("user", "Before:After:What changed?", 2, (7, 13))
    pictures = (tiny.picture(1), tiny.picture(2))
    made = any_model.encode(Example("x", (apart, Message("assistant", "red")), pictures))
    text = any_model.processor.tokenizer.decode(made.prompt)
    order = [text.index(word) for word in ("Before:", "After:", "What changed?")]
    shown = text.index(any_model.encode.image_token)
    assert order == sorted(order) and (shown < order[0]) == (any_model.family.name == "llava")
    with pytest.raises(RetainError, match="ascending offsets into its 26 characters"):
        Message("user", "Before:After:What changed?", 2, (13, 7))


def test_a_turn_that_the_template_rewrites_cannot_be_learned(llava: HFModel) -> None:
    """As templates that drop the thoughts of earlier turns do; the last turn alone can."""
    talk = (
        Message("user", "one?"),
        Message("assistant", "<think>hm</think>two"),
        Message("user", "three?"),
        Message("assistant", "four"),
    )
    example = Example("t", talk)
    was = llava.encode.template
    llava.encode.template = was.replace("{{ c['text'] }}", "{{ c['text'].split('</think>')[-1] }}")
    try:
        with pytest.raises(
            RetainError, match=r"'t': the chat template does not write turn 2 .* set optim\.turns to last"
        ):
            llava.collate([example], answers=True)
        last = llava.collate([Example("u", talk)], answers=True, turns="last")
    finally:
        llava.encode.template = was
    assert last.n_answer > 0


def test_a_placeholder_in_the_words_of_an_example_with_a_picture_is_a_word(any_model: HFModel) -> None:
    token = any_model.encode.image_token
    talk = (Message("user", f"What does {token} mean?", 1), Message("assistant", "red"))
    plain = Example("p", (Message("user", "What does it mean?", 1), talk[1]), (tiny.picture(1),))
    said, there = any_model.encode(Example("x", talk, plain.images)), any_model.encode(plain)
    at = any_model.encode.image_token_id
    assert said.prompt.count(at) == there.prompt.count(at) == said.images[0].n_tokens
    assert any_model(any_model.collate([Example("y", talk, plain.images)], answers=True)).loss.isfinite()
