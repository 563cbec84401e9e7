"""EWC, LwF and the fixed average against their formulas, transcribed in reference/penalties.py."""

from __future__ import annotations

import pytest
import torch

from fake_model import FakeModel, context, stream
from reference import penalties as reference
from retain.adapters.bank import Mix
from retain.method import Stack, build
from retain.methods.ema import Ema
from retain.methods.ewc import EWC, Springs, add_spring
from retain.methods.lwf import LwF, distillation
from retain.run.train import Optim, fit


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_springs_equal_the_formula_and_its_gradient() -> None:
    theta = noise(6, seed=0).requires_grad_()
    F, anchor = noise(6, seed=1).abs(), noise(6, seed=2)
    # split over two tensors: the fused list must not mix them up
    parts = list(theta.split([4, 2]))
    value = Springs.apply(3.0, list(F.split([4, 2])), list(anchor.split([4, 2])), *parts)
    (value * 2).backward()
    want, grad = reference.ewc(theta.tolist(), [anchor.tolist()], [F.tolist()], 3.0)
    assert value.item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(theta.grad, 2 * torch.tensor(grad))


def test_two_springs_as_one_have_the_same_gradient() -> None:
    F1, F2 = noise(6, seed=1).abs(), noise(6, seed=3).abs()
    F1[0] = F2[0] = 0.0  # no stiffness at all: must not become nan
    a1, a2, theta = noise(6, seed=2), noise(6, seed=4), noise(6, seed=5)
    F, anchor = add_spring(F1, a1, F2, a2)
    _, want = reference.ewc(theta.tolist(), [a1.tolist(), a2.tolist()], [F1.tolist(), F2.tolist()], 2.0)
    torch.testing.assert_close(2.0 * F * (theta - anchor), torch.tensor(want))
    both = [a1.tolist(), a2.tolist()], [F1.tolist(), F2.tolist()]
    values = [reference.ewc(t.tolist(), *both, 2.0)[0] for t in (theta, 2 * theta)]
    ours = [reference.ewc(t.tolist(), [anchor.tolist()], [F.tolist()], 2.0)[0] for t in (theta, 2 * theta)]
    assert values[1] - values[0] == pytest.approx(ours[1] - ours[0], rel=1e-4)  # equal up to a constant


def fitted(part: EWC, n: int = 5) -> tuple[FakeModel, EWC]:
    model = FakeModel()
    fit(model, Stack(build("lora"), part), context(model), Optim(lr=5e-2, steps=n, batch_size=4))
    return model, part


@pytest.mark.parametrize(("per_sample", "size"), [(True, 1), (False, 4)])
def test_fisher_is_the_mean_of_squared_gradients(per_sample: bool, size: int) -> None:
    model, part = fitted(EWC(n_samples=24, per_sample=per_sample))
    live, examples = model.adapters.trainable(), list(stream()[0].train)
    if not per_sample:  # the batches are random ones: draw them as the method does
        rows = torch.randperm(24, generator=context(model).rng("ewc")).tolist()
        examples = [examples[r] for r in rows]
    want = {k: torch.zeros_like(p) for k, p in live.items()}
    for i in range(0, 24, size):
        model.zero_grad()
        model(model.collate(examples[i : i + size], answers=True)).loss.backward()
        for k, p in live.items():
            want[k] += p.grad**2 / (24 / size)
    for k, p in live.items():
        torch.testing.assert_close(part.fisher[k], want[k], rtol=1e-4, atol=1e-9)
        assert torch.equal(part.anchor[k], p.detach())
    assert max(float(F.max()) for F in part.fisher.values()) > 0
    again, ctx = EWC(n_samples=24, per_sample=per_sample), context(model)
    ctx.micro_size = 3  # batches of four are three and one
    again.end_task(ctx)
    for k in live:
        torch.testing.assert_close(again.fisher[k], part.fisher[k], rtol=1e-4, atol=1e-9)


def test_an_adapter_that_no_sample_uses_has_no_stiffness() -> None:
    model, part = FakeModel(), EWC(n_samples=3)
    for i, name in enumerate(("lora", "aside")):
        model.adapters.add(name, torch.Generator().manual_seed(i))
    model.adapters.train_only("lora", "aside")
    model.adapters.mix = Mix({"lora": 1.0})
    part.end_task(context(model))
    assert any(F.any() for k, F in part.fisher.items() if k.startswith("lora/"))
    aside = [F for k, F in part.fisher.items() if k.startswith("aside/")]
    assert aside and not any(F.any() for F in aside)


def test_what_was_kept_follows_the_model_to_its_device() -> None:
    model, part = fitted(EWC(n_samples=2), 1)
    model.device = torch.device("meta")
    part.begin_task(context(model))
    kept = [*part.fisher.values(), *part.anchor.values()]
    assert kept and all(t.device.type == "meta" for t in kept)


def test_ewc_holds_important_weights() -> None:
    drift = []
    for lam in (0.0, 1e5):
        model, part = FakeModel(), EWC(lam=lam)
        stack = Stack(build("lora"), part)
        for i, task in enumerate(stream()[:2]):
            before = model.adapters.state("lora") if i else {}
            fit(
                model,
                stack,
                context(model, task.name, ["colour"][:i]),
                Optim(lr=2e-2, steps=15, batch_size=4),
            )
        after = model.adapters.state("lora")
        drift.append(sum((after[k] - before[k]).abs().sum().item() for k in after))
    assert drift[1] < 0.7 * drift[0]


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_distillation_equals_the_formula(T: float) -> None:
    z, z_old = 3 * noise(5, 7, seed=0), 3 * noise(5, 7, seed=1)
    assert distillation(z, z_old, T).item() == pytest.approx(
        reference.lwf(z.tolist(), z_old.tolist(), T), rel=1e-5
    )
    assert distillation(z, z, T).item() == pytest.approx(0, abs=1e-6)


def test_distillation_is_fp32_whatever_the_logits_are() -> None:
    z, z_old = (3 * noise(5, 7, seed=s).bfloat16() for s in (0, 1))
    got = distillation(z, z_old, 3.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(reference.lwf(z.tolist(), z_old.tolist(), 3.0), rel=1e-5)


def test_the_teacher_is_the_model_before_the_task() -> None:
    model, part = FakeModel(), LwF(weight=0.5)
    ctx = context(model, "letter", ["colour"])
    lora = build("lora")
    model.adapters.mix = lora.adapt(ctx)
    part.begin_task(ctx)
    batch = model.collate(list(ctx.task.train[:6]), answers=True)
    with torch.no_grad():
        old = model(batch).logits_NV
        for p in model.adapters.parameters("lora").values():
            p += 0.3
    out = model(batch)
    want = 0.5 * reference.lwf(out.logits_NV.tolist(), old.tolist(), 2.0)
    term = part.loss(ctx, batch, out)
    assert isinstance(term, torch.Tensor) and term.item() == pytest.approx(want, rel=1e-4) and want > 1e-3
    assert model.training and model.adapters.mix.names == ["lora"]
    part.end_task(ctx)
    assert model.adapters.names == ["lora"] and part.teacher == {}


def test_lwf_of_no_weight_keeps_no_copy() -> None:
    model, ctx = FakeModel(), context(None, "letter", ["colour"])
    ctx.model = model
    model.adapters.mix = build("lora").adapt(ctx)
    names = list(model.adapters.names)
    for weight in (0.0, 0.5):
        part = LwF(weight=weight)
        part.begin_task(ctx)
        assert bool(part.teacher) == (model.adapters.names != names) == (weight > 0)
    assert LwF.asks_before  # or a route that moves would be distilled from other weights than answered before


def test_lwf_has_no_teacher_in_the_first_task() -> None:
    model, part = FakeModel(), LwF()
    ctx = context(model)
    model.adapters.mix = build("lora").adapt(ctx)
    part.begin_task(ctx)
    assert model.adapters.names == ["lora"]


def test_the_fixed_average_equals_the_formula() -> None:
    met: list[dict[str, torch.Tensor]] = []

    class Recorder(Ema):
        def begin_task(self, ctx) -> None:  # type: ignore[no-untyped-def]
            super().begin_task(ctx)
            met.append({k: p.detach().clone() for k, p in ctx.model.adapters.trainable().items()})

        def after_step(self, ctx) -> None:  # type: ignore[no-untyped-def]
            super().after_step(ctx)
            met.append({k: p.detach().clone() for k, p in ctx.model.adapters.trainable().items()})

    model = FakeModel()
    fit(model, Stack(build("lora"), Recorder(0.9)), context(model), Optim(lr=5e-2, steps=10, batch_size=4))
    for key, p in model.adapters.trainable().items():
        flat = [w[key].flatten().tolist() for w in met]
        want = torch.tensor(reference.ema(flat[0], flat[1:], 0.9)).view_as(p)
        torch.testing.assert_close(p.detach(), want, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p.detach(), met[-1][key])
