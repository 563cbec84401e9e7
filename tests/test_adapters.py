"""Laws of the bank: off is off, a mixture sums deltas, a mix per sample equals one call per sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tiny
from retain.adapters.bank import AdapterBank, Mix
from retain.adapters.lora import LoraLinear, LoraSpec, attach
from retain.models.hf import HFModel
from retain.types import RetainError


class Toy(nn.Module):
    """A projector and two layers whose q and k read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(5, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 6), "k": nn.Linear(8, 6)}) for _ in range(2)
        )
        self.out = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projector(x)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            x = x + self.out(torch.tanh(layer["q"](x)) * layer["k"](x))
        return x


def toy(spec: LoraSpec | None = None) -> tuple[Toy, AdapterBank]:
    """The same toy every time, with adapters a, b and c of noise."""
    torch.manual_seed(0)
    model = Toy().eval()
    bank = attach(model, spec or LoraSpec(rank=2, alpha=6.0), language="layers", projector=["projector"])
    tiny.fill(bank, "a", "b", "c", size=1.0)
    return model, bank


X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3))


def by_hand(bank: AdapterBank, weights: Callable[[int | None], dict[str, float]]) -> Tensor:
    """The toy's output with every delta added to its weight: W + sum_k w_k s B_k A_k."""
    torch.manual_seed(0)
    model = Toy().eval()
    with torch.no_grad():
        for path, site in bank.sites.items():
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            for name, w in weights(site.layer).items():
                t = site.tensors(name)
                if isinstance(site, LoraLinear):
                    linear.weight += w * site.spec.scale * t["lora_B"] @ t["lora_A"]
                else:
                    linear.weight += w * t["weight"]
                    linear.bias += w * t["bias"]
        out: Tensor = model(X)
    return out


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)  # fp32, sums in another order


def test_a_fresh_adapter_changes_no_bit(any_model: HFModel) -> None:
    batch = any_model.collate(tiny.examples(), answers=True)
    before = any_model(batch).logits_NV
    any_model.adapters.add("a", torch.Generator().manual_seed(0))
    with any_model.adapters.using(Mix({"a": 1.0})):
        assert torch.equal(any_model(batch).logits_NV, before)
    tiny.fill(any_model.adapters, "b")
    with any_model.adapters.using(Mix({"b": 0.0})):
        assert torch.equal(any_model(batch).logits_NV, before)


@pytest.mark.parametrize("rslora", [False, True])
def test_one_adapter_is_plain_lora(rslora: bool) -> None:
    spec = LoraSpec(rank=2, alpha=6.0, rslora=rslora)
    assert spec.scale == (6 / math.sqrt(2) if rslora else 3)
    model, bank = toy(spec)
    with bank.using(Mix({"a": 1.0})):
        close(model(X), by_hand(bank, lambda _: {"a": 1.0}))


def test_a_mixture_is_the_sum_of_deltas() -> None:
    model, bank = toy()
    weights = {"a": 0.5, "b": -1.0, "c": 2.0}
    for mix in (Mix(dict(weights)), Mix({n: torch.tensor(w) for n, w in weights.items()})):
        with bank.using(mix):
            close(model(X), by_hand(bank, lambda _: weights))


def test_by_layer_overrides_single_layers() -> None:
    model, bank = toy()
    mix = Mix({"a": 1.0}, by_layer={1: {"b": 0.5, "c": 0.5}})
    sites = dict(bank.sites)
    assert [sites[f"layers.{i}.q"].layer for i in range(2)] == [0, 1]
    with bank.using(mix):
        close(model(X), by_hand(bank, lambda layer: {"b": 0.5, "c": 0.5} if layer == 1 else {"a": 1.0}))
    assert Mix.from_json(mix.to_json()).to_json() == mix.to_json()


def test_a_mix_per_sample_equals_one_call_per_sample() -> None:
    model, bank = toy()
    mix = tiny.mixture({"a": 1.0}, {"b": 0.5, "c": 0.5}, {}, {"a": -1.0, "b": 2.0})
    with torch.no_grad(), bank.using(mix):
        together = model(X)
    for i in range(4):
        with torch.no_grad(), bank.using(mix.select(torch.tensor([i]))):
            close(together[i : i + 1], model(X[i : i + 1]))
    with pytest.raises(RetainError, match="4 samples"), bank.using(mix):
        model(X[:3])


def test_a_mix_per_sample_in_a_model(any_model: HFModel) -> None:
    """Several images, one, or none per sample, and the projector routed too."""
    bank = any_model.adapters
    tiny.fill(bank, "a", "b", "c")
    rows = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"c": 2.0}]
    batch = any_model.collate(tiny.examples(), answers=True)
    with torch.no_grad(), bank.using(tiny.mixture(*rows)):
        out = any_model(batch)
    for i, (row, example) in enumerate(zip(rows, tiny.examples(), strict=True)):
        with torch.no_grad(), bank.using(Mix(row)):
            alone = any_model(any_model.collate([example], answers=True))
        torch.testing.assert_close(out.logits_NV[out.row_N == i], alone.logits_NV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mix", [Mix({"a": 1.0}), Mix({"a": 0.5, "b": 2.0}), Mix({"a": torch.tensor(0.5)})])
def test_gradients_equal_differences_of_the_loss(mix: Mix) -> None:
    model, bank = toy()
    model.double()
    bank.train_only("a")
    x = X.double()
    with bank.using(mix):
        model(x).square().mean().backward()
    for key, p in bank.trainable().items():
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
        ends = []
        for step in (1e-5, -2e-5):
            with torch.no_grad(), bank.using(mix):
                p += step * direction
                ends.append(float(model(x).square().mean()))
        with torch.no_grad():
            p += 1e-5 * direction
        assert p.grad is not None
        assert float((p.grad * direction).sum()) == pytest.approx(
            (ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-7
        ), key


class Opaque(nn.Linear):
    """A base layer that may only be called, as a quantised one."""


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_fused_node_equals_separate_operations(dropout: float) -> None:
    """Same forward bits, and gradients equal to autograd's own, for x, A and B."""
    outcomes = []
    for fused in (True, False):
        _, bank = toy(LoraSpec(rank=2, alpha=6.0, dropout=dropout))
        bank.train_only("a")
        site = bank.sites["layers.0.q"]
        assert isinstance(site, LoraLinear)
        if not fused:
            site.base.__class__ = Opaque
        site.train()
        x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
        torch.manual_seed(9)
        with bank.using(Mix({"a": 0.7})):
            y = site(x)
        assert ("_Fused" in type(y.grad_fn).__name__) == fused
        y.square().sum().backward()
        outcomes.append((y.detach(), x.grad, *(p.grad for p in site.tensors("a").values())))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for mine, auto in zip(outcomes[0][1:], outcomes[1][1:], strict=True):
        assert mine is not None and auto is not None
        torch.testing.assert_close(mine, auto, atol=1e-4, rtol=1e-5)


def test_dropout_is_off_in_eval_and_shared_by_layers_with_one_input() -> None:
    model, bank = toy(LoraSpec(rank=2, alpha=6.0, dropout=0.5))
    torch.manual_seed(1)
    with bank.using(Mix({"a": 1.0})):
        assert torch.equal(model(X), model(X))
        model.train()
        assert not torch.equal(model(X), model(X))
    x = torch.ones(1, 8)
    one = bank.dropped(x, 0.5)
    assert bank.dropped(x, 0.5) is one
    assert bank.dropped(x.clone(), 0.5) is not one
    site = bank.sites["layers.0.q"]
    assert isinstance(site, LoraLinear)
    with torch.no_grad(), bank.using(Mix({"a": 1.0})):
        draws = torch.cat([site(x.clone()) for _ in range(1000)])
        site.eval()
        error = draws.std(0) / 1000**0.5
        assert bool(((draws.mean(0) - site(x)[0]).abs() < 4 * error + 1e-6).all())  # four standard errors


def test_load_errors_name_what_is_wrong() -> None:
    _, bank = toy()
    state = dict(bank.state("a"))
    first = next(iter(state))
    with pytest.raises(RetainError, match="1 tensors missing.*" + first.replace(".", r"\.")):
        bank.load("a", {k: v for k, v in state.items() if k != first})
    with pytest.raises(RetainError, match=r"1 unknown.*nowhere"):
        bank.load("a", state | {"nowhere": torch.zeros(1)})
    with pytest.raises(RetainError, match=r"\(1,\)"):
        bank.load("a", state | {first: torch.zeros(1)})
    with pytest.raises(RetainError, match="exists already"):
        bank.add("a")
    with pytest.raises(RetainError, match="no adapter 'z'"):
        bank.state("z")
    with pytest.raises(RetainError, match="letters, digits"):
        bank.add("a/b")
    with pytest.raises(RetainError, match="match no linear layer"):
        attach(Toy(), LoraSpec(targets="nothing"), language="layers")
    with bank.using(Mix({"a": 1.0})), pytest.raises(RetainError, match="in use"):
        bank.remove("a")


def test_a_copy_is_equal_and_apart() -> None:
    _, bank = toy()
    bank.add("d", like="a")
    for key, value in bank.state("a").items():
        assert torch.equal(bank.state("d")[key], value)
    key, p = next(iter(bank.parameters("d").items()))
    with torch.no_grad():
        p.add_(1)
    assert not torch.equal(bank.state("a")[key], bank.state("d")[key])
    bank.train_only("d")
    assert {k.split("/")[0] for k in bank.trainable()} == {"d"}
    assert {bank.group(k) for k in bank.trainable()} == {"lora", "projector"}
