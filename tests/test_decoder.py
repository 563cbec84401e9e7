"""The short decoder and the grouped LoRA layers against Hugging Face's forward and the layers one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from retain.adapters.bank import Mix
from retain.adapters.fused import _mask, together
from retain.adapters.lora import LoraSpec
from retain.models import decoder
from retain.models.hf import HFModel

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


def language(kind: str = "LlamaModel", module: str = "transformers.models.llama", off: int = 0, **config: Any) -> Any:
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
