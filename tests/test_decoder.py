"""The short decoder and the grouped LoRA layers against Hugging Face's forward and the layers one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from retain.adapters.bank import Mix
from retain.adapters.fused import _mask, together
from retain.adapters.lora import LoraSpec
from retain.models import decoder, generate
from retain.models.hf import HFModel
from retain.types import Batch, Example, Message, RetainError

MIXES = {
    "one": Mix({"a": 1.0}),
    "two": Mix({"a": 0.5, "b": 0.7}),
    "per sample": Mix({"a": torch.linspace(0, 1, 6), "b": torch.linspace(1, 0.2, 6)}),
    "none": Mix(),
}


def step(model: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[str]]:
    """Loss, logits, gradients and answers of one batch that has zero, one and two images per sample."""
    names = model.adapters.mix.names
    model.adapters.train_only(*names)
    out = model(model.collate(tiny.examples(), answers=True))
    if names:
        out.loss.backward()
    grads = {k: p.grad.clone() for k, p in model.adapters.trainable().items()}
    model.adapters.freeze(*names)
    answers = model.generate(model.collate(tiny.examples(), answers=False), 8)
    return out.loss.detach(), out.logits_NV.detach(), grads, answers


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "qwen2_vl", "internvl3_5"])
def test_equals_hugging_face(family: str, mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same(tiny.model(family), mix, monkeypatch)


def test_image_features_behind_the_last_layer_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, and DeepStack adds behind it: it cannot be run at the answers only."""
    same(HFModel(*tiny.qwen3_vl(layers=1), tiny.SPEC), "two", monkeypatch)


def same(model: HFModel, mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.fill(model.adapters, "a", "b")
    model.adapters.mix = MIXES[mix]
    assert model.fast
    ours = step(model)
    monkeypatch.setattr(decoder, "supports", lambda language: False)
    assert not model.fast
    theirs = step(model)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)  # fp32, sums in another order
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    assert ours[2].keys() == theirs[2].keys() and any(g.any() for g in ours[2].values()) == bool(ours[2])
    for key, grad in ours[2].items():
        torch.testing.assert_close(
            grad, theirs[2][key], rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert ours[3] == theirs[3]


def test_dropout_is_one_mask_per_input_and_its_gradient_is_the_autograd_one() -> None:
    model = tiny.model("llava", LoraSpec(rank=4, alpha=8.0, dropout=0.3))
    tiny.fill(model.adapters, "a")
    model.adapters.mix = Mix({"a": 1.0})
    model.adapters.train_only("a")
    model.train()
    layers = [model.language.layers[0].self_attn.get_submodule(n) for n in ("q_proj", "k_proj", "v_proj")]
    x = torch.randn(2, 5, 32, requires_grad=True)
    weights = [torch.randn(2, 5, s.base.out_features) for s in layers]
    torch.manual_seed(3)
    ys = together(layers, x)
    sum((y * w).sum() for y, w in zip(ys, weights, strict=True)).backward()
    got = {k: p.grad.clone() for k, p in model.adapters.trainable().items() if p.grad is not None}
    dx, x.grad = x.grad, None
    torch.manual_seed(3)
    seen = x * _mask(x, 0.3)
    for p in model.adapters.trainable().values():
        p.grad = None
    total = torch.zeros(())
    for s, y, w in zip(layers, ys, weights, strict=True):
        plain = s.base(x) + 2.0 * (seen @ s.lora_A["a"].t() @ s.lora_B["a"].t())
        torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
        total = total + (plain * w).sum()
    total.backward()
    torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-5)
    assert got
    for key, p in model.adapters.trainable().items():
        if p.grad is not None:
            torch.testing.assert_close(got[key], p.grad, rtol=1e-4, atol=1e-5)


def test_mask_keeps_the_mean_and_drops_the_share() -> None:
    torch.manual_seed(0)
    mask = _mask(torch.empty(100_003), 0.05)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.95])
    share = float((mask == 0).float().mean())
    assert abs(share - 0.05) < 5 * (0.05 * 0.95 / 100_003) ** 0.5  # five standard errors


def language(
    kind: str = "LlamaModel", module: str = "transformers.models.llama", off: int = 0, **config: Any
) -> Any:
    """What `supports` asks of a language model; `off`: which layer checkpoints gradients, from 1."""
    fields = {"_attn_implementation": "sdpa", "attention_dropout": 0.0, "hidden_act": "silu", **config}
    made = type(kind, (), {"__module__": module})()
    made.config = SimpleNamespace(**fields)
    made.layers = [SimpleNamespace(gradient_checkpointing=i + 1 == off) for i in range(3)]
    return made


def test_only_what_is_known_runs_short() -> None:
    """Everything else runs as Hugging Face wrote it, also a model of the same name from elsewhere."""
    assert decoder.supports(language()) and decoder.supports(language(layer_types=None))
    assert decoder.supports(language("Qwen3Model", "transformers.models.qwen3.modeling_qwen3"))
    assert decoder.supports(language(layer_types=["full_attention"] * 3))
    for other in (
        language("GemmaModel"), language(module="elsewhere.llama"), language(module="transformers_modules.llama"),
        language(_attn_implementation="eager"), language(attention_dropout=0.1), language(hidden_act="gelu"),
        language(layer_types=["full_attention", "sliding_attention"]), language(off=1), language(off=3),
    ):  # fmt: skip
        assert not decoder.supports(other)


@torch.no_grad()
def test_the_embeddings_that_are_given_stay_what_they_are() -> None:
    """Nothing is learned, so sums are in place, but never in the caller's memory."""
    inner = tiny.model("llava").language
    embeds = torch.randn(2, 5, 32)
    before = embeds.clone()
    out = decoder.forward(inner, embeds)
    assert torch.equal(embeds, before) and torch.equal(decoder.forward(inner, embeds), out)


class Played:
    """A model that answers sample i with `answers[i]`, token after token, and writes down who was in the cache."""

    eos, device, V = frozenset({0}), torch.device("cpu"), 9

    def __init__(
        self, answers: list[list[int]], asked: Any = None, broken: frozenset[int] = frozenset()
    ) -> None:
        self.answers, self.asked, self.broken = answers, asked, broken
        self.adapters, self.mixes, self.steps = self, list[Any](), list[list[int]]()
        self.mix = Mix({"a": torch.arange(len(answers), dtype=torch.float32)})
        self.batch_select_indices = lambda at: self.rows.__setitem__(
            slice(None), [self.rows[i] for i in at.tolist()]
        )

    @contextmanager
    def using(self, mix: Mix) -> Iterator[None]:
        self.mixes.append(mix.weights["a"].tolist())
        yield

    def placed(self, batch: Batch) -> Batch:
        return batch

    def cache(self, rows: int, room: int) -> Any:
        self.rows = list(range(rows))
        return self

    def processors(self, prompt: int) -> Any:
        return self.asked

    def _logits(self, t: int) -> torch.Tensor:
        out = torch.zeros(len(self.rows), self.V)
        for k, i in enumerate(self.rows):
            out[k, (self.answers[i] + [0] * 99)[t]] = torch.nan if i in self.broken else 1.0
        return out

    def prefill(self, batch: Batch, cache: Any) -> torch.Tensor:
        return self._logits(0)

    def decode(self, token_B: Any, position_B: Any, mask_BS: Any, cache: Any) -> torch.Tensor:
        t = len(self.steps)
        assert position_B.tolist() == [i + 1 + t for i in self.rows]  # prompts are 1, 2, … tokens long
        assert mask_BS.sum(1).tolist() == [i + 2 + t for i in self.rows]
        said = torch.tensor([(self.answers[i] + [0] * 99)[t] for i in self.rows])
        assert token_B.tolist() == ((said + bool(self.asked)) % self.V).tolist()
        self.steps.append(list(self.rows))
        return self._logits(t + 1)

    def run(self, most: int) -> list[list[int]]:
        B = len(self.answers)
        mask = torch.tensor([[int(j >= B - 1 - i) for j in range(B)] for i in range(B)])
        examples = tuple(Example(f"e{i}", (Message("user", "?"), Message("assistant", ""))) for i in range(B))
        ids = torch.arange(B)[:, None] * 10 + torch.arange(B)
        meta = {"padded": True, "next_position": [i + 1 for i in range(B)]}
        return generate.greedy(
            self, Batch(examples, {"attention_mask": mask, "input_ids": ids}, None, ids[0], meta), most
        )


def test_rows_that_are_done_leave_and_no_step_is_made_for_nothing() -> None:
    answers = [[1], [2, 3, 4, 5, 6], [7], [1, 2, 3], []]
    model = Played(answers)
    assert model.run(20) == answers
    # five rows: the empty one does not pay for a copy, at the second token three of five have ended
    assert model.steps == [[0, 1, 2, 3, 4], [1, 3], [1, 3], [1], [1]]
    assert model.mixes == [[float(i) for i in rows] for rows in model.steps]  # the mix leaves with its rows
    for most in (1, 3):
        model = Played(answers)
        assert model.run(most) == [a[:most] for a in answers] and len(model.steps) == most - 1
    assert Played([[], []]).run(5) == [[], []]


def test_what_a_checkpoint_asks_of_decoding_sees_the_rows_own_tokens() -> None:
    met: list[tuple[list[int], torch.dtype]] = []

    def asked(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert ids.shape[0] == 1 and scores.shape == (1, Played.V)
        met.append((ids[0].tolist(), scores.dtype))
        return scores.roll(1, dims=-1)  # every token one further on

    assert Played([[1, 2], [3, 8]], asked).run(3) == [[2, 3, 1], [4]]
    assert [ids for ids, _ in met] == [[1], [10, 11], [1, 2], [10, 11, 4], [1, 2, 3]]
    assert {dtype for _, dtype in met} == {torch.float32}


def test_the_first_answer_that_is_no_number_is_named() -> None:
    with pytest.raises(RetainError, match="example 'e1': the model's answer is not finite"):
        Played([[1], [2], [3], [4]], broken=frozenset({1, 3})).run(3)
