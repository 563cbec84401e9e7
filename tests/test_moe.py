"""Experts with a router: equal to the formula, all of them train, and the rest of the bank's laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from fake_model import FakeModel, context, stream
from reference import prompts as reference
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import STD_A, MoeLinear, MoeSpec
from retain.adapters.peft_format import load_peft, merge_into_base, save_peft
from retain.method import build
from retain.models.hf import HFModel
from retain.run.train import Optim, fit
from retain.types import RetainError

SPEC = MoeSpec(rank=6, alpha=12.0, experts=3, dense="")


def moe_model(family: str = "llava", spec: MoeSpec = SPEC) -> HFModel:
    return tiny.model(family, spec)


def first_site(model: HFModel) -> MoeLinear:
    return next(s for s in model.adapters.sites.values() if isinstance(s, MoeLinear))


def test_a_layer_equals_the_formula() -> None:
    model = moe_model()
    tiny.fill(model.adapters, "a", size=2.0)
    site, x = first_site(model), torch.randn(2, 5, 32)
    t = site.tensors("a")
    A, B = t["lora_A"].split(2), t["lora_B"].split(2, dim=1)
    with torch.no_grad(), model.adapters.using(Mix({"a": 1.0})):
        got = site(x)
        for b in range(2):
            for i in range(5):
                want = reference.moe(x[b, i], site.base.weight, A, B, t["lora_router"], alpha=12.0, r=6)
                torch.testing.assert_close(got[b, i], want, atol=1e-4, rtol=1e-4)
        assert float((got - site.base(x)).abs().max()) > 0.1


def test_one_expert_is_lora() -> None:
    moe, lora = FakeModel(MoeSpec(rank=2, alpha=4.0, experts=1)), FakeModel(LoraSpec(rank=2, alpha=4.0))
    for model in (moe, lora):
        model.adapters.add("a", torch.Generator().manual_seed(0))
        for key, p in model.adapters.parameters("a").items():
            rng = torch.Generator().manual_seed(len(key))
            p.data = torch.randn(p.shape, generator=rng)
        model.adapters.mix = Mix({"a": 1.0})
    batch = moe.collate([e for t in stream() for e in t.test], answers=True)
    torch.testing.assert_close(moe(batch).logits_NV, lora(batch).logits_NV, atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_is_drawn_as_the_released_one_and_changes_no_bit() -> None:
    model = moe_model(spec=MoeSpec(rank=16, experts=8))
    batch = model.collate(tiny.examples(), answers=True)
    before = model(batch).logits_NV
    model.adapters.add("a", torch.Generator().manual_seed(0))
    with model.adapters.using(Mix({"a": 1.0})):
        assert torch.equal(model(batch).logits_NV, before)
    t = first_site(model).tensors("a")
    n = t["lora_A"].numel()
    assert abs(float(t["lora_A"].std()) / STD_A - 1) < 5 / (2 * n) ** 0.5  # five standard errors
    assert float(t["lora_router"].abs().max()) <= 32**-0.5 and t["lora_router"].shape == (8, 32)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_mix_per_sample_equals_one_call_per_sample(family: str) -> None:
    model = moe_model(family)
    tiny.fill(model.adapters, "a", "b")
    rows = [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": 0.5}, {}, {"b": 2.0}, {"a": 1.0}]
    mix = tiny.mixture(*rows)
    with torch.no_grad(), model.adapters.using(mix):
        out = model(model.collate(tiny.examples(), answers=True))
        together = model.generate(model.collate(tiny.examples(), answers=False), 6)
    for i, e in enumerate(tiny.examples()):
        with torch.no_grad(), model.adapters.using(Mix(rows[i])):
            alone = model(model.collate([e], answers=True))
            text = model.generate(model.collate([e], answers=False), 6)
        torch.testing.assert_close(out.logits_NV[out.row_N == i], alone.logits_NV, atol=1e-4, rtol=1e-4)
        assert together[i : i + 1] == text


def test_all_experts_and_the_router_train_on_every_task() -> None:
    model, method = FakeModel(MoeSpec(rank=4, alpha=8.0, experts=2)), build("moe_lora")
    how = Optim(lr=2e-2, steps=4, batch_size=4, warmup=0)
    before: dict[str, torch.Tensor] = {}
    for i, task in enumerate(stream()):
        fit(model, method, context(model, task.name, [t.name for t in stream()][:i]), how)
        after = model.adapters.state("moe")
        for key, was in before.items():
            if "lora_" in key:  # rows of A and R and columns of B belong to experts
                moved = (after[key] != was).any(0 if "lora_B" in key else 1)
                assert bool(moved.all()), f"a part of {key} stood still on {task.name}"
        before = after
    assert model.adapters.names == ["moe"]


def test_bf16_and_dropout() -> None:
    spec = MoeSpec(rank=6, alpha=12.0, experts=3, dropout=0.5)
    model = HFModel(*tiny.llava(), spec, precision="bf16")
    tiny.fill(model.adapters, "a")
    batch = model.collate(tiny.examples(), answers=True)
    with model.adapters.using(Mix({"a": 1.0})):
        assert torch.equal(model(batch).loss, model(batch).loss)
        model.train()
        assert not torch.equal(model(batch).loss, model(batch).loss)


def test_what_cannot_be_split_or_exported_is_refused(tmp_path: Path) -> None:
    for rank, experts in ((16, 3), (4, 8)):
        with pytest.raises(RetainError, match=f"rank {rank} cannot be split over {experts} experts"):
            MoeSpec(rank=rank, experts=experts)
    model = moe_model()
    tiny.fill(model.adapters, "a")
    with pytest.raises(RetainError, match="router that reads the input"):
        save_peft(model.adapters, "a", tmp_path / "a", "base")
    with pytest.raises(RetainError, match="router that reads the input"):
        merge_into_base(model, Mix({"a": 1.0}), tmp_path / "b")
    with pytest.raises(RetainError, match="kind 'lora', these are 'moe'"):
        load_peft(model.adapters, "x", tmp_path)
    assert not list(tmp_path.iterdir())
    wider = FakeModel(MoeSpec(rank=4, experts=4))
    narrow = FakeModel(MoeSpec(rank=4, experts=2))
    for m in (wider, narrow):
        m.adapters.add("a", torch.Generator().manual_seed(0))
    with pytest.raises(RetainError, match=r"lora_router: shape \(4, 12\).*\(2, 12\)"):
        narrow.adapters.load("a", wider.adapters.state("a"))


def test_experts_are_no_part_of_the_base() -> None:
    assert moe_model().fingerprint() == tiny.model().fingerprint()
    assert moe_model().flops_per_token() == tiny.model().flops_per_token()
    with_one = moe_model()
    tiny.fill(with_one.adapters, "a")
    assert with_one.flops_per_token() == tiny.model().flops_per_token()
