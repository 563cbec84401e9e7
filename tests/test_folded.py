"""What makes evaluation fast changes no answer: adapters folded into weights, prompts in parts, rows that leave late,
large tower calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from retain.adapters import bank as bank_module
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.models import generate, hf
from retain.models.hf import HFModel
from test_decoder import MIXES

LAYERED = Mix({"a": 1.0, "b": 0.5}, {1: {"b": 1.5}})


def frozen(model: HFModel) -> dict[str, torch.Tensor]:
    return {k: p.clone() for k, p in model.hf.named_parameters()}


@torch.no_grad()
def logits(model: HFModel) -> torch.Tensor:
    """Of every answer token."""
    return model(model.collate(tiny.examples(), answers=True)).logits_NV


@pytest.mark.parametrize("mix", [*MIXES.values(), LAYERED], ids=[*MIXES, "by layer"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folded_equals_unfolded(family: str, mix: Mix) -> None:
    model = tiny.model(family)
    tiny.fill(model.adapters, "a", "b")
    model.adapters.mix = mix
    batch = model.collate(tiny.examples(), answers=False)
    plain, answers, before = logits(model), model.generate(batch, 8), frozen(model)
    with model.adapters.unchanging():
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)  # fp32, sums in another order
        assert model.generate(batch, 8) == answers
        per_sample = any(isinstance(w, torch.Tensor) for w in mix.weights.values())
        assert bool(model.adapters.folds) == (bool(mix.names) and not per_sample)
    assert model.adapters.folds is None
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(p, before[k]) for k, p in model.hf.named_parameters())


def test_an_exception_leaves_nothing_behind() -> None:
    model = tiny.model()
    tiny.fill(model.adapters, "a")
    model.adapters.mix = Mix({"a": 1.0})
    plain, before = logits(model), frozen(model)
    with pytest.raises(KeyboardInterrupt), model.adapters.unchanging():
        logits(model)
        raise KeyboardInterrupt
    assert model.adapters.folds is None and torch.equal(logits(model), plain)
    assert all(torch.equal(p, before[k]) for k, p in model.hf.named_parameters())


def test_another_mix_and_a_changed_adapter_are_followed() -> None:
    """One mix after the other within a block; written-to adapters in the next block."""
    model = tiny.model()
    bank = model.adapters
    tiny.fill(bank, "a", "b")
    for _ in range(2):
        plain, folded = [], []
        for name in "aba":
            with bank.using(Mix({name: 1.0})):
                plain.append(logits(model))
        with bank.unchanging():
            for name in "aba":
                with bank.using(Mix({name: 1.0})):
                    folded.append(logits(model))
        torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain[0], plain[1], atol=0.1)
        with torch.no_grad():
            for p in bank.parameters("a").values():
                p.neg_()
    with bank.using(Mix({"a": 1.0})):
        assert not torch.allclose(logits(model), plain[1], atol=0.1)


def test_what_is_never_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, half precision, layers that are no plain linear layers, more bytes than allowed."""
    model = tiny.model()
    tiny.fill(model.adapters, "a")
    model.adapters.mix = Mix({"a": 1.0})
    batch = model.collate(tiny.examples(), answers=True)
    with model.adapters.unchanging():
        model(batch)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(batch)
        assert model.adapters.folds == {}
        for site in model.adapters.sites.values():
            site.base.__class__ = type("Quantised", (torch.nn.Linear,), {})  # type: ignore[attr-defined]
        logits(model)
        assert model.adapters.folds == {}
    monkeypatch.setattr(bank_module, "FOLD_BYTES", 1000)
    with model.adapters.unchanging():
        assert model.adapters.folds is None


@pytest.mark.parametrize("family", ["llava", "idefics3"])
@pytest.mark.parametrize("mix", MIXES)
def test_parts_and_late_leaving_change_no_answer(
    family: str, mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts one by one, in twos and all together; rows that leave at once, late or never."""
    model = tiny.model(family)
    assert model.fast
    tiny.fill(model.adapters, "a", "b")
    model.adapters.mix = MIXES[mix]
    batch = model.collate(tiny.examples(), answers=False)
    T = batch.inputs["input_ids"].shape[1]
    model.eos = frozenset(range(0, 330, 3))  # answers of many lengths
    told: set[tuple[str, ...]] = set()
    widths = set()
    last: Any = model._last

    def counted(part: Any, cache: Any) -> torch.Tensor:
        widths.add(len(part))
        out: torch.Tensor = last(part, cache)
        return out

    monkeypatch.setattr(model, "_last", counted)
    for rows in (1, 2, 6):
        monkeypatch.setattr(hf, "WORKING_SET", rows * 2 * T * model.text_config.intermediate_size)
        for kept in (0.0, 0.5, 1.0):
            monkeypatch.setattr(generate, "KEPT", kept)
            told.add(tuple(str(t) for t in generate_tokens(model, batch)))
    assert widths == {1, 2, 6} and len(told) == 1
    lengths = {len(t) for t in generate_tokens(model, batch)}
    assert len(lengths) > 2  # otherwise nobody left


@torch.no_grad()
def generate_tokens(model: HFModel, batch: Any) -> list[list[int]]:
    return generate.greedy(model, batch, 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_gradients_the_decoder_gives_the_same_bits(precision: Any) -> None:
    """Sums in place must not round the residual stream to the smaller type."""
    model = tiny.model(precision=precision)
    tiny.fill(model.adapters, "a")
    model.adapters.mix = Mix({"a": 1.0})
    model.adapters.train_only("a")
    learning = model(model.collate(tiny.examples(), answers=True)).logits_NV
    assert learning.requires_grad and torch.equal(logits(model), learning)
    batch = model.collate(tiny.examples(), answers=False)
    with torch.no_grad():
        told = model.prefill(batch, model.cache(len(batch), batch.inputs["input_ids"].shape[1]))
    first = torch.stack([learning[(model_rows(model) == i).nonzero()[0, 0]] for i in range(len(batch))])
    assert float((told - first).detach().abs().max()) < (1e-4 if precision == "fp32" else 0.25)


def model_rows(model: HFModel) -> torch.Tensor:
    """The sample of each answer token."""
    with torch.no_grad():
        return model(model.collate(tiny.examples(), answers=True)).row_N


def test_large_tower_calls_give_the_same_bits() -> None:
    model = tiny.model("llava", LoraSpec(rank=2))
    shown = [tiny.example(i) for i in range(max(hf.CHUNKS) + 9)]
    together = model.tower_features(model.collate(shown, answers=False))
    model.features.clear()
    alone = [model.tower_features(model.collate([e], answers=False))[0] for e in shown]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert len({float(f.sum()) for f in alone}) == len(shown)
