"""Soft prompts in real models: a prompt made of token embeddings equals those tokens written into the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from fake_model import FakeModel
from retain.adapters.bank import Mix
from retain.adapters.kinds import KINDS
from retain.adapters.lora import LoraSpec
from retain.adapters.peft_format import load_peft, merge_into_base, save_peft
from retain.adapters.prompt import PromptSpec, prompts_of, tokens_in_front
from retain.models import decoder
from retain.models.encode import Encoded
from retain.models.hf import HFModel
from retain.types import Example, RetainError

SPEC = PromptSpec(tokens=3, at_once=2)
IDS = {"a": [40, 50, 60], "b": [70, 80, 90], "c": [100, 110, 120]}
ROWS: list[dict[str, float]] = [
    {"a": 1.0},
    {"b": 0.5, "c": 1.0},
    {},
    {"c": 0.5, "b": 1.0},
    {"a": 0.5, "b": 0.2},
    {"c": 2},
]
"""Weights per sample: one, two (in three orders) and no prompt, over one, two and no image."""
ORDER = [["a"], ["b", "c"], [], ["c", "b"], ["b", "a"], ["c"]]


def prompted(family: str, spec: PromptSpec = SPEC) -> HFModel:
    """Prompts a, b and c are the embeddings of IDS."""
    model = tiny.model(family, spec)  # type: ignore[arg-type]
    for name, ids in IDS.items():
        model.adapters.add(name, torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.adapters.parameters(name)["prompt.tokens"].copy_(model.embed(torch.tensor(ids)))
    return model


def written(plain: HFModel, bos: int) -> list[Example]:
    """The same examples with the tokens of their prompts behind the first `bos` tokens of the text."""
    out = []
    for e, order in zip(tiny.examples(), ORDER, strict=True):
        was = plain.encode(e)
        ids = tuple(i for name in order for i in IDS[name])
        plain.encode._seen[e] = Encoded(was.prompt[:bos] + ids + was.prompt[bos:], was.answer, was.images)
        out.append(e)
    return out


def begin_with_bos(model: HFModel) -> None:
    """Every prompt of the tiny LLaVA starts with one token: call it BOS, once the examples are encoded."""
    first = {model.encode(e).prompt[0] for e in tiny.examples()}
    assert len(first) == 1
    model.processor.tokenizer.bos_token = model.processor.tokenizer.convert_ids_to_tokens(first.pop())


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "hf"])
@pytest.mark.parametrize("case", [("llava", 1), *((family, 0) for family in tiny.FAMILIES)], ids=str)
def test_prompts_equal_the_same_tokens_in_the_text(
    case: tuple[str, int], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, loss and greedy answers: so positions, masks, labels and the cache are those of longer texts."""
    family, bos = case
    model, plain = prompted(family), tiny.model(family)
    if not fast:
        monkeypatch.setattr(decoder, "supports", lambda language: False)
    elif not model.fast:
        pytest.skip("this family has the one path")
    examples, longer = tiny.examples(), written(plain, bos)
    # the same examples are other objects on each side: `tiny.examples` makes new ones
    if bos:
        for e in examples:
            model.encode(e)
        begin_with_bos(model)
    with torch.no_grad(), model.adapters.using(tiny.mixture(*ROWS)):
        got = model(model.collate(examples, answers=True))
        texts = model.generate(model.collate(examples, answers=False), 8)
    with torch.no_grad():
        want = plain(plain.collate(longer, answers=True))
        expected = plain.generate(plain.collate(longer, answers=False), 8)
    torch.testing.assert_close(got.logits_NV, want.logits_NV, atol=1e-4, rtol=1e-4)  # fp32, other shapes
    torch.testing.assert_close(got.loss, want.loss, atol=1e-5, rtol=1e-5)
    assert torch.equal(got.labels_N, want.labels_N) and torch.equal(got.row_N, want.row_N)
    assert texts == expected and len(set(texts)) > 3
    with torch.no_grad():  # it could fail: without the prompts the answers are others
        assert not torch.allclose(
            model(model.collate(examples, answers=True)).logits_NV, want.logits_NV, atol=1e-2
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_equals_its_samples_alone(family: str) -> None:
    model, mix = prompted(family), tiny.mixture(*ROWS)
    with torch.no_grad(), model.adapters.using(mix):
        out = model(model.collate(tiny.examples(), answers=True))
        together = model.generate(model.collate(tiny.examples(), answers=False), 6)
    for i, e in enumerate(tiny.examples()):
        with torch.no_grad(), model.adapters.using(Mix(ROWS[i])):  # numbers, not one per sample
            alone = model(model.collate([e], answers=True))
            text = model.generate(model.collate([e], answers=False), 6)
        torch.testing.assert_close(out.logits_NV[out.row_N == i], alone.logits_NV, atol=1e-4, rtol=1e-4)
        assert together[i : i + 1] == text


def test_the_gradient_of_a_shared_prompt_is_the_same_in_every_run() -> None:
    """Many samples add to one prompt: with several threads the order of the sum must not change its last bits."""
    model, B, T = prompted("llava"), 256, 40
    site = model.prompts
    assert site is not None
    mask = torch.ones(B, T, dtype=torch.long)
    places = site.places(Mix({"a": 1.0}), mask, torch.zeros(B, dtype=torch.long), left=False)
    assert places is not None
    embeds, weight = torch.randn(B, T, 32), torch.randn(B, places.source_BS.shape[1], 32)
    model.adapters.train_only("a")
    rows, threads, grads = site.tensors("a")["tokens"], torch.get_num_threads(), []
    try:
        torch.set_num_threads(4)
        for _ in range(4):
            rows.grad = None
            (site.fill(embeds, places) * weight).sum().backward()
            grads.append(rows.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_only_the_trained_prompt_gets_a_gradient(family: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model = prompted(family)
        if checkpointing:
            model.hf.gradient_checkpointing_enable({"use_reentrant": False})
        bank = model.adapters
        bank.train_only("a")
        model.train()
        with bank.using(Mix({"b": 0.5, "a": 1.0})):
            model(model.collate(tiny.examples(), answers=True)).loss.backward()
        grad = bank.parameters("a")["prompt.tokens"].grad
        assert grad is not None and bool((grad.abs().sum(1) > 0).all())
        assert all(p.grad is None for p in bank.parameters("b").values())
        assert all(p.grad is None for p in model.hf.parameters())
        grads.append(grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_a_new_prompt_is_made_of_token_embeddings() -> None:
    model = tiny.model(spec=PromptSpec(tokens=5))  # type: ignore[arg-type]
    model.adapters.add("a", torch.Generator().manual_seed(3))
    tokens = model.adapters.parameters("a")["prompt.tokens"]
    table = model.embed.weight
    assert all(bool((table == row).all(1).any()) for row in tokens) and tokens.shape == (5, 32)
    assert len({tuple(r.tolist()) for r in tokens}) > 1
    table_before = table.clone()
    with torch.no_grad():
        tokens.add_(1)
    assert torch.equal(table, table_before), "a copy, not a view"


def test_mixes_that_cannot_be_are_refused() -> None:
    model = prompted("llava")
    batch = model.collate(tiny.examples(), answers=True)
    with (
        model.adapters.using(Mix(dict.fromkeys(IDS, 1.0))),
        pytest.raises(RetainError, match=r"3 prompts.*at_once is 2"),
    ):
        model(batch)
    with (
        model.adapters.using(Mix({"a": torch.ones(4)})),
        pytest.raises(RetainError, match=r"4 samples.*has 6"),
    ):
        model(batch)


def test_prompt_tokens_are_counted() -> None:
    bank = prompted("llava").adapters
    assert tokens_in_front(bank, tiny.mixture(*ROWS), 6) == 3 * sum(map(len, ORDER))
    assert tokens_in_front(bank, Mix({"a": 1.0, "b": 0.0}), 6) == 18
    assert tokens_in_front(tiny.model().adapters, Mix(), 6) == 0
    assert [PromptSpec(10, 3).in_front(n) for n in (0, 1, 2, 3, 9)] == [0, 10, 20, 30, 30]
    assert all(spec().in_front(5) == 0 for kind, spec in KINDS.items() if kind != "prompt")


def test_prompts_and_examples_share_the_context() -> None:
    with pytest.raises(RetainError, match=r"3 prompts of 200 tokens leave no room.*512 positions"):
        tiny.model(spec=PromptSpec(tokens=200))  # type: ignore[arg-type]
    small = tiny.model(spec=PromptSpec(tokens=160))  # type: ignore[arg-type]
    assert small.encode.max_length == 512 - 480
    with pytest.raises(RetainError, match=r"'e0'.*max_length 32 \(480 more are kept for soft prompts\)"):
        small.length(tiny.example(0, answer="red " * 20))
    for spec in ({"tokens": 0}, {"at_once": 0}):
        with pytest.raises(RetainError, match=r"at least 1 .*not 0"):
            PromptSpec(**spec)


def test_a_family_that_runs_whole_takes_prompts_too() -> None:
    hf, processor = tiny.llava()
    hf.config.model_type = "something_new"
    answers, known = [], prompted("llava")
    whole = HFModel(hf, processor, SPEC)
    whole.adapters.add("a", torch.Generator().manual_seed(0))
    whole.adapters.load("a", known.adapters.state("a"))
    for model in (whole, known):
        with torch.no_grad(), model.adapters.using(Mix({"a": 1.0})):
            answers.append(model(model.collate(tiny.examples(), answers=True)).logits_NV)
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)


def test_prompts_have_no_peft_form(tmp_path: Path) -> None:
    model = prompted("llava")
    with pytest.raises(RetainError, match=r"soft prompts \(adapter.kind: prompt\).*before BOS"):
        save_peft(model.adapters, "a", tmp_path / "a", "base")
    with pytest.raises(RetainError, match="soft prompts"):
        merge_into_base(model, Mix({"a": 1.0}), tmp_path / "b")
    with pytest.raises(RetainError, match="fits adapters of kind 'lora', these are 'prompt'"):
        load_peft(model.adapters, "x", tmp_path)
    assert not list(tmp_path.iterdir())


def test_prompts_of_another_shape_are_refused_by_name() -> None:
    mine, other = FakeModel(PromptSpec(4, 2)), FakeModel(PromptSpec(5, 2))
    for model in (mine, other):
        model.adapters.add("a", torch.Generator().manual_seed(0))
    with pytest.raises(RetainError, match=r"'a', tensor prompt.tokens: shape \(4, 12\).*\(5, 12\)"):
        other.adapters.load("a", mine.adapters.state("a"))
    lora = FakeModel(LoraSpec(rank=2))
    lora.adapters.add("a", torch.Generator().manual_seed(0))
    with pytest.raises(RetainError, match="does not fit this model"):
        lora.adapters.load("a", mine.adapters.state("a"))
    assert prompts_of(lora.adapters) is None
