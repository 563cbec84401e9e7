"""LLaCA against the formulas, first by hand, then along a trajectory, then through the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_model import FakeModel, context, stream
from reference import llaca as reference
from retain.method import Context, build
from retain.methods import llaca
from retain.methods.llaca import Five, Llaca, bounded_rates, official_rates, paper_rates, sums
from retain.run.train import Optim, fit
from retain.types import RetainError


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_worked_checks_of_the_official_rate() -> None:
    # theta - E = (3, -2), g = (.5, -.5), g_prev = (.1, .1): 2 (1 + 1) / (5 * 1)
    alpha, fell = official_rates(column(5.0, 1.0, 1.0), 2.0, 0.01)
    assert alpha.tolist() == pytest.approx([0.8]) and fell.tolist() == [False]
    # theta - E = (.2, -.2): the rate would be 10
    alpha, fell = official_rates(column(0.4, 1.0, 1.0), 2.0, 0.01)
    assert alpha.tolist() == pytest.approx([0.01]) and fell.tolist() == [True]


@pytest.mark.parametrize(
    "sums_S", [(0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (float("nan"), 1.0, 1.0), (1.0, float("inf"), 1.0)]
)
def test_what_is_no_number_falls_back(sums_S: tuple[float, ...]) -> None:
    alpha, fell = official_rates(column(*sums_S), 2.0, 0.01)
    assert alpha.tolist() == pytest.approx([0.01]) and fell.all()


def test_worked_checks_of_the_paper_rate() -> None:
    alpha, _ = paper_rates(column(5.0, 1.0, 1.0, 0.2), 1.0, 0.01)
    assert 1 - alpha.item() == pytest.approx(0.08)
    # L = (theta - 0.8)^2 at 1 with E = 0: g = .4, L'' = 2, d = 1, so beta = .7, minimum of b^2 - 1.4 b + 1
    alpha, fell = paper_rates(column(1.0, 0.4, 2 * 0.3, 0.3), 1.0, 0.01)
    assert 1 - alpha.item() == pytest.approx(0.7) and not fell.any()
    betas = torch.linspace(0, 1, 1001)
    assert betas[(betas**2 - 1.4 * betas + 1).argmin()].item() == pytest.approx(0.7)
    # the centre at 3: g = -4, outside (0, 1)
    alpha, fell = paper_rates(column(1.0, 4.0, 2 * 0.3, 0.3), 1.0, 0.01)
    assert alpha.item() == pytest.approx(0.01) and fell.all()


def test_worked_checks_of_the_bounded_rate() -> None:
    # the same parabola: beta = (.4 + 1) / (2 + 1), the minimum of L(1 - b) + (1 - b)^2 / 2 over b
    alpha, fell = bounded_rates(column(1.0, 0.4, 0.09 * 2, 0.09), 1.0, 0.01)
    assert 1 - alpha.item() == pytest.approx(1.4 / 3) and not fell.any()
    betas = torch.linspace(0, 1, 3001, dtype=torch.float64)
    objective = (1 - betas - 0.8) ** 2 + (1 - betas) ** 2 / 2
    assert betas[objective.argmin()].item() == pytest.approx(1.4 / 3, abs=4e-4)
    # the average may stand still (beta = 1); a concave secant falls back
    alpha, fell = bounded_rates(column(1.0, 2.0, 0.09 * 2, 0.09), 1.0, 0.01)
    assert alpha.item() == pytest.approx(0, abs=1e-6)
    # here the ratio itself would be inside: -0.5 / -1, a maximum
    alpha, fell = bounded_rates(column(1.0, -1.5, -0.09 * 2, 0.09), 1.0, 0.01)
    assert alpha.item() == pytest.approx(0.01) and fell.all()


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("moves", [False, True])
def test_fused_sums_equal_plain_ones(inner: bool, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if inner and not moves:
        pytest.skip("inner products always have a move")
    monkeypatch.setattr(llaca, "CHUNK", 7)
    monkeypatch.setattr(llaca, "GROUP", 20)
    monkeypatch.setattr(llaca, "SERIAL", 4)  # chunks of 7 are long ones, what remains is short
    rng = torch.Generator().manual_seed(0)
    shapes, none = ((5, 5), (3, 5), (9,), (4, 4), (1, 2)), [None] * (1 - moves)
    fives = [Five(*(torch.randn(s, generator=rng) for _ in range(4 + moves)), *none) for s in shapes]
    want = []
    for theta, E, g, g0, theta0 in fives:
        d, dg = theta - E, g - g0
        dt = theta - theta0 if theta0 is not None else None
        if inner:
            want.append([(d * d).sum(), (g * d).sum(), (dg * dt).sum(), (dt * dt).sum()])
        else:
            want.append([x.abs().sum() for x in (d, g, dg, dt) if x is not None])
    want_SK = torch.tensor(want).t()
    torch.testing.assert_close(sums(fives, inner), want_SK)
    # bf16 gradients take the path of accelerators
    assert not fives[0]._replace(grad=fives[0].grad.bfloat16()).on_cpu()
    torch.testing.assert_close(
        torch.cat([llaca._foreach_sums(g, inner) for g in llaca._grouped(fives)], 1), want_SK
    )


def test_the_rows_that_are_summed_begin_where_gradients_do() -> None:
    """The last bits of BLAS's sums depend on the address: with any other, two runs would not be equal."""
    for n in (1, 33, 1000, 70_001, llaca.CHUNK):
        kept = [np.empty(n + i, np.float32) for i in range(3)]  # the heap is not fresh in a long run either
        rows = llaca._scratch(n)
        assert [r.ctypes.data % 64 for r in rows] == [0, 0] and all(len(r) == n for r in rows)
        del kept


@dataclass
class Recorder(Llaca):
    """LLaCA that also writes down what it could see."""

    seen_before: list[Any] = field(init=False, default_factory=list)
    seen_grads: list[Any] = field(init=False, default_factory=list)
    seen_after: list[Any] = field(init=False, default_factory=list)

    def grads(self, ctx: Context) -> None:
        self.seen_before.append({k: p.detach().clone() for k, p in ctx.model.adapters.trainable().items()})
        super().grads(ctx)

    def after_step(self, ctx: Context) -> None:
        live = ctx.model.adapters.trainable()
        self.seen_grads.append({k: p.grad.clone() for k, p in live.items()})
        self.seen_after.append({k: p.detach().clone() for k, p in live.items()})
        super().after_step(ctx)


def trajectory(variant: str, **options: Any) -> tuple[Recorder, FakeModel, list[dict[str, Any]]]:
    part = Recorder(variant, first_task=True, **options)
    events: list[dict[str, Any]] = []
    model, ctx = FakeModel(), context()
    ctx.model, ctx.log = model, lambda **e: events.append(e)
    from retain.method import Stack

    fit(model, Stack(build("lora"), part), ctx, Optim(lr=5e-2, steps=25, batch_size=4))
    return part, model, events


def series(of: list[dict[str, Tensor]], key: str) -> list[list[float]]:
    return [w[key].flatten().double().tolist() for w in of]


def test_official_equals_the_formula_along_a_task() -> None:
    part, model, events = trajectory("official")
    for key, p in model.adapters.trainable().items():
        want = reference.official_run(series(part.seen_after, key), series(part.seen_grads, key))
        # fp32 against fp64 over 25 steps
        torch.testing.assert_close(
            p.detach().flatten().double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-6
        )
        assert not torch.equal(p.detach(), part.seen_after[-1][key])
    shares = [g["fallback"] for e in events if e["kind"] == "rates_of_task" for g in e["groups"].values()]
    assert shares and min(shares) < 1, (
        "some rate must have been inside (0, 1), or the test compares a constant"
    )


def test_paper_equals_the_formula_along_a_task() -> None:
    part, model, events = trajectory("paper")
    for key, p in model.adapters.trainable().items():
        weights = [*series(part.seen_before, key), series(part.seen_after, key)[-1]]
        want = reference.paper_run(weights, series(part.seen_grads, key))
        torch.testing.assert_close(
            p.detach().flatten().double(), torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=1e-6
        )
    shares = [g["fallback"] for e in events if e["kind"] == "rates_of_task" for g in e["groups"].values()]
    assert shares and min(shares) < 1


def test_bounded_equals_the_formula_on_random_tensors() -> None:
    rng = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(50):
        five = Five(*(torch.randn(6, generator=rng) for _ in range(5)))
        alpha, fell = bounded_rates(sums([five], inner=True), 1.0, 0.01)
        beta = reference.bounded_beta(*(t.tolist() for t in five))
        ok = 0 < beta <= 1
        inside += ok
        assert alpha.item() == pytest.approx(
            1 - beta if ok else 0.01, rel=1e-3, abs=1e-5
        ) and fell.item() == (not ok)
    assert 5 < inside < 45


def test_the_first_task_of_an_adapter_has_no_average_officially() -> None:
    model, part = FakeModel(), Llaca()
    lora = build("lora")
    for i, task in enumerate(stream()):
        ctx = context(model, task.name)
        model.adapters.mix = lora.adapt(ctx)
        part.begin_task(ctx)
        assert bool(part._averaged(ctx)) == (i > 0)
        part.end_task(ctx)
    assert part.trained == ["lora"]


def test_rates_are_logged_by_kind_without_a_sync_per_tensor() -> None:
    _, _, events = trajectory("official", log_every=5)
    rates = [e for e in events if e["kind"] == "rates"]
    assert [e["step"] for e in rates] == [5, 10, 15, 20, 25]
    assert set(rates[0]["groups"]) == {"projector.weight", "projector.bias", "lora.lora_A", "lora.lora_B"}
    for group in rates[0]["groups"].values():
        assert 0 < group["min"] <= group["median"] <= group["max"] < 1 and 0 <= group["fallback"] <= 1


def stepped(missing: str) -> tuple[Llaca, FakeModel, Context]:
    """Three steps in which tensors whose key contains `missing` have no gradient."""
    model, part = FakeModel(), Llaca(first_task=True)
    ctx = context(model)
    model.adapters.mix = build("lora").adapt(ctx)
    part.begin_task(ctx)
    for _ in range(3):
        for k, p in model.adapters.trainable().items():
            p.grad = None if missing in k else torch.randn(p.shape)
            p.data += 0 if missing in k else 0.1
        part.after_step(ctx)
    return part, model, ctx


def test_a_tensor_without_gradient_is_skipped_and_counted() -> None:
    part, model, ctx = stepped("projector")
    before = {k: p.detach().clone() for k, p in model.adapters.trainable().items()}
    events: list[dict[str, Any]] = []
    ctx.log = lambda **e: events.append(e)
    part.end_task(ctx)
    assert events[-1]["skipped"] == {k: 3 for k in before if "projector" in k}
    for k, p in model.adapters.trainable().items():
        assert torch.equal(p, before[k]) == ("projector" in k)


def test_no_gradient_at_all_is_an_error() -> None:
    with pytest.raises(RetainError, match="no tensor has a gradient"):
        stepped("")


def test_the_average_stays_between_the_weights_it_met() -> None:
    part, model, _ = trajectory("official")
    for key, p in model.adapters.trainable().items():
        met = torch.stack([w[key] for w in part.seen_after])
        assert (p >= met.amin(0) - 1e-6).all() and (p <= met.amax(0) + 1e-6).all()


def test_wrong_fields_are_named() -> None:
    for options, word in (
        ({"variant": "oficial"}, "variant"),
        ({"fallback": 0.0}, "fallback"),
        ({"kappa": -1.0}, "kappa"),
    ):
        with pytest.raises(RetainError, match=word):
            Llaca(**options)
