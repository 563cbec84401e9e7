"""Several adapters per sample in fewer passes: the same numbers as one layer after another, and never stale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny
from retain.adapters.bank import Mix
from retain.adapters.fused import together
from retain.adapters.lora import LoraSpec
from retain.models.hf import HFModel

NAMES = ("a", "b", "c")
X = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))


def soft(seed: int, n: int = 4) -> Mix:
    w = torch.softmax(torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)
    return Mix({name: w[:, k] for k, name in enumerate(NAMES)})


def group(model: HFModel) -> list[torch.nn.Module]:
    attention = model.hf.model.language_model.layers[1].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def by_hand(layers: list[torch.nn.Module], mix: Mix) -> list[Tensor]:
    """Sample by sample, adapter by adapter."""
    out = []
    for s in layers:
        rows = []
        for i, x in enumerate(X):
            y = F.linear(x, s.base.weight, s.base.bias)
            for name, w in mix.weights.items():
                weight = float(w[i]) if isinstance(w, Tensor) and w.ndim else float(w)
                y = y + weight * s.spec.scale * (x @ s.lora_A[name].t() @ s.lora_B[name].t())
            rows.append(y)
        out.append(torch.stack(rows))
    return out


@pytest.fixture
def model() -> HFModel:
    made = tiny.model()
    tiny.fill(made.adapters, *NAMES)
    return made


@pytest.mark.parametrize("kind", ["per sample", "one number too", "a number in a tensor"])
@torch.no_grad()
def test_a_group_is_the_layers_one_by_one(model: HFModel, kind: str) -> None:
    mix = {
        "per sample": soft(1),
        "one number too": Mix({**soft(1).weights, "b": 0.5}),
        "a number in a tensor": Mix({"a": torch.tensor(0.3), "c": 1.0}),
    }[kind]
    layers, bank = group(model), model.adapters
    with bank.using(mix), bank.stacked():
        for _ in range(2):  # made, and kept
            for got, want in zip(together(layers, X), by_hand(layers, mix), strict=True):
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        assert bank.stacks


@torch.no_grad()
def test_another_mix_is_seen_at_once(model: HFModel) -> None:
    layers, bank = group(model), model.adapters
    with bank.stacked():
        for mix in (soft(1), soft(2), Mix({n: soft(3).weights[n] for n in ("a", "b")}), soft(1)):
            with bank.using(mix):
                for got, want in zip(together(layers, X), by_hand(layers, mix), strict=True):
                    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_nothing_is_kept_without_the_promise(model: HFModel) -> None:
    layers, bank = group(model), model.adapters
    for _ in range(2):
        with bank.using(soft(1)):
            for got, want in zip(together(layers, X), by_hand(layers, soft(1)), strict=True):
                torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
        for p in bank.parameters("b").values():
            p.mul_(-2)
    with bank.stacked():
        pass
    assert bank.stacks is None


def test_gradients_and_dropout_go_the_usual_way() -> None:
    model = tiny.model(spec=LoraSpec(rank=4, alpha=8.0, dropout=0.5))
    tiny.fill(model.adapters, *NAMES)
    model.adapters.train_only("a")
    layers, bank = group(model), model.adapters
    with bank.using(soft(1)), bank.stacked():
        together(layers, X)[0].sum().backward()
        assert model.adapters.parameters("a") and not bank.stacks
        grads = [layers[0].lora_A["a"].grad, layers[0].lora_B["a"].grad]
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
        model.train(True)
        with torch.no_grad():
            assert (
                together(layers, X.clone())[0] - together(layers, X.clone())[0]
            ).abs().max() > 1e-3  # two draws


def test_generation_is_that_of_each_sample_alone(model: HFModel) -> None:
    examples, mix = tiny.examples(), soft(4, 6)
    batch = model.collate(examples, answers=False)
    with model.adapters.using(mix):
        together_ = model.generate(batch, 8)
    alone = []
    for i, e in enumerate(examples):
        with model.adapters.using(mix.select(torch.tensor([i]))):
            alone += model.generate(model.collate([e], answers=False), 8)
    assert together_ == alone and len(set(alone)) > 1
    assert model.adapters.stacks is None
