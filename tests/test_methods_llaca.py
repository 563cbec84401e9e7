"""LLaCA against the formulas, first by hand, then along a trajectory, then through the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_model import FakeModel, context, stream
from reference import llaca as reference
from retain.method import Context, build
from retain.methods import _llaca
from retain.methods._llaca import Five, as_released, entries, sums
from retain.methods.llaca import (
    SHADOWS,
    VARIANTS,
    Llaca,
    _group,
    bounded_rates,
    official_rates,
    paper_rates,
    verdict,
)
from retain.run.continual import Silent, run
from retain.run.store import RunDir
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
    monkeypatch.setattr(_llaca, "CHUNK", 7)
    monkeypatch.setattr(_llaca, "GROUP", 20)
    monkeypatch.setattr(_llaca, "SERIAL", 4)  # chunks of 7 are long ones, what remains is short
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
        torch.cat([_llaca._foreach_sums(g, inner) for g in _llaca._grouped(fives)], 1), want_SK
    )


def test_the_rows_that_are_summed_begin_where_gradients_do() -> None:
    """The last bits of BLAS's sums depend on the address: with any other, two runs would not be equal."""
    for n in (1, 33, 1000, 70_001, _llaca.CHUNK):
        kept = [np.empty(n + i, np.float32) for i in range(3)]  # the heap is not fresh in a long run either
        rows = _llaca._scratch(n)
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


# -- how far the average came --------------------------------------------------------------------------------


def told_of_task(events: list[dict[str, Any]]) -> dict[str, Any]:
    return next(e for e in events if e["kind"] == "rates_of_task")


def test_reach_and_the_way_gone_equal_the_formula() -> None:
    part, model, events = trajectory("official")
    told, live = told_of_task(events), model.adapters.trainable()
    kinds = {k: f"{model.adapters.group(k)}.{k.rsplit('.', 1)[-1]}" for k in live}
    gone, way = dict.fromkeys(kinds.values(), 0.0), dict.fromkeys(kinds.values(), 0.0)
    for key, p in live.items():
        start, end = part.seen_before[0][key], part.seen_after[-1][key]
        gone[kinds[key]] += float((p.detach() - start).abs().sum())
        way[kinds[key]] += float((end - start).abs().sum())
    for kind in way:
        keys = [k for k in live if kinds[k] == kind]
        tensors = [(series(part.seen_after, k), series(part.seen_grads, k)) for k in keys]
        starts = [part.seen_before[0][k].flatten().tolist() for k in keys]
        assert told["groups"][kind]["reach"] == pytest.approx(reference.reach(tensors, starts), rel=1e-4)
        assert told["groups"][kind]["gone"] == pytest.approx(gone[kind] / way[kind], rel=1e-4)
    assert told["gone"] == pytest.approx(sum(gone.values()) / sum(way.values()), rel=1e-4)
    weighed = sum(told["groups"][k]["reach"] * way[k] for k in way)
    assert told["reach"] == pytest.approx(weighed / sum(way.values()), rel=1e-4)
    assert f"{100 * told['gone']:.0f} % of the way" in told["verdict"] and "reach R" in told["verdict"]


def test_a_task_of_two_steps_tells_the_one_rate_it_had() -> None:
    events: list[dict[str, Any]] = []
    model, ctx = FakeModel(), context()
    ctx.model, ctx.log = model, lambda **e: events.append(e)
    stack = build(["lora", {"llaca": {"first_task": True, "log_every": 1, "kappa": 0.3}}])
    fit(model, stack, ctx, Optim(lr=1e-2, steps=2, batch_size=4, warmup=0.0))
    (rates,) = [e for e in events if e["kind"] == "rates"]
    told = told_of_task(events)
    for kind, group in rates["groups"].items():
        for word in ("min", "median", "max", "fallback"):
            assert told["groups"][kind][word] == pytest.approx(group[word], rel=1e-5), (kind, word)


def test_the_verdict_of_a_task_starts_from_the_kappa_that_was_set() -> None:
    for kappa in (None, 50.0):
        told = told_of_task(trajectory("official", kappa=kappa, fallback=1.0)[2])
        assert told["gone"] > 0.9 and told["reach"] > 1
        near = f"kappa near {(kappa or 2.0) * 0.5 / told['reach']:.2g} would give"
        assert near in told["verdict"]


def test_with_little_reach_the_average_ends_about_that_share_of_the_way() -> None:
    """The point of R: it foretells how far the average comes, whatever kappa is."""
    for kappa in (2e-4, 8e-4):
        told = told_of_task(trajectory("official", kappa=kappa, fallback=1e-6)[2])
        assert told["reach"] < 0.4 and 0.3 * told["reach"] < told["gone"] < 1.3 * told["reach"]
    assert told_of_task(trajectory("official", kappa=50.0, fallback=1.0)[2])["gone"] > 0.99


@pytest.mark.parametrize("variant", ["paper", "bounded"])
def test_a_variant_whose_ratio_weighs_the_old_tells_the_way_and_no_reach(variant: str) -> None:
    told = told_of_task(trajectory(variant)[2])
    assert "reach" not in told and 0 < told["gone"] < 1.5 and "reach" not in told["verdict"]


def test_the_verdict_says_what_follows() -> None:
    assert verdict(0.98, 20.0, 2.0).endswith("kappa near 0.05 would give R = 0.5")
    assert "it is the weights" in verdict(0.98, 20.0, 2.0)
    assert "little of the task" in verdict(0.04, 0.05, 2.0) and "kappa near 20 " in verdict(0.04, 0.05, 2.0)
    assert verdict(0.5, 0.6, 2.0).endswith("(reach R = 0.6)") and "kappa" not in verdict(1.0, None, 1.0)


def test_a_large_tensor_is_measured_by_a_sample() -> None:
    rng = torch.Generator().manual_seed(2)
    start, now = torch.randn(4096, 128, generator=rng), torch.randn(4096, 128, generator=rng)
    now *= torch.arange(128) / 64  # columns differ, as ranks do: a sample from one column would be far off
    kept = {"a": _llaca.sampled(start), "b": _llaca.sampled(start[:3])}
    assert kept["a"].numel() == _llaca.SAMPLE and kept["b"].numel() == 3 * 128
    far = _llaca.distances(kept, {"a": now, "b": now[:3]})
    assert far[0].item() == pytest.approx((now - start).abs().sum().item(), rel=0.05)  # 4,093 of 524,288
    assert far[1].item() == pytest.approx((now[:3] - start[:3]).abs().sum().item(), rel=1e-5)


def test_who_waits_is_told_how_far_the_average_came(tmp_path: Path) -> None:
    class Notes(Silent):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    store = RunDir.open(tmp_path / "run", {"method": "x"})
    run(FakeModel(), stream(), build(["lora", "llaca"]), Optim(steps=3, batch_size=4), store, watch=Notes())
    second = stream().tasks[1].name
    said = [n for n in Notes.notes if n.startswith(f"{second}, llaca: the average ended")]
    assert len(said) == 1 and "reach R" in said[0]


# -- rates that do not depend on size ---------------------------------------------------------------------------


def five(*shape: int, moves: bool = False, seed: int = 3) -> Five:
    rng = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=rng) * s for s in (1e-2, 1e-2, 1e-3, 1e-3, 1e-2)]
    return Five(*made[:4], made[4] if moves else None)


def tiled(f: Five, n: int) -> Five:
    return Five(*(None if t is None else t.repeat(n, 1) for t in f))


@pytest.mark.parametrize("variant", ["official", "paper", "bounded"])
def test_a_tensor_and_its_tiling_have_one_rate(variant: str) -> None:
    """By means a rate does not depend on size; by sums it does, except where it has none (bounded)."""
    spec = VARIANTS[variant]
    one = five(12, 4, moves=spec.moves, seed=6)
    both = [one, tiled(one, 50)]
    sums_SK = sums(both, spec.inner)
    means_SK = sums_SK if spec.inner else as_released(sums_SK, [f.theta.numel() for f in both])
    kappa = {"official": 3e3, "paper": 0.2, "bounded": 0.03}[variant]
    alpha_K, fell_K = spec.rates(means_SK, kappa, 0.01)
    assert not fell_K.any() and alpha_K[0].item() == pytest.approx(alpha_K[1].item(), rel=1e-4)
    if variant == "official":
        a = [x.flatten().double().tolist() for x in one[:4]]
        assert alpha_K[0].item() == pytest.approx(
            reference.official_alpha(*a, kappa, reference.RELEASED / 48), rel=1e-4
        )
        by_sums, _ = spec.rates(sums_SK, 1e-6, 0.5)
        assert by_sums[0] > 40 * by_sums[1]


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_means_are_the_released_rule_at_the_released_size(variant: str) -> None:
    """LoRA of rank 128 on a hidden size of 4,096: every factor is 1, so the arithmetic is that of the sums, bit for bit."""
    f = five(128, 4096, moves=variant == "paper")
    sums_SK = sums([f], False)
    assert torch.equal(as_released(sums_SK, entries([f.theta.numel()], None)), sums_SK)


@pytest.mark.parametrize("scale", ["sums", "means"])
@pytest.mark.parametrize("per", ["tensor", "layer", "adapter"])
def test_tensors_of_a_layer_or_an_adapter_share_a_rate(per: str, scale: str) -> None:
    kappa = 0.5 if scale == "sums" else 1e4
    part, model, events = trajectory("official", per=per, scale=scale, kappa=kappa, fallback=0.5)
    keys = list(model.adapters.trainable())
    bank = model.adapters
    groups: dict[Any, list[str]] = {}
    for key in keys:
        site = bank.sites[key.split("/", 1)[1].rpartition(".")[0]]
        group = {"tensor": key, "adapter": 0, "layer": site.group if site.layer is None else site.layer}[per]
        groups.setdefault(group, []).append(key)
    assert len(groups) == {"tensor": len(keys), "layer": 3, "adapter": 1}[per]
    tensors, inside = [], 0
    for together in groups.values():  # the formula on all their entries as one tensor
        weights = [[x for k in together for x in w[k].flatten().tolist()] for w in part.seen_after]
        grads = [[x for k in together for x in g[k].flatten().tolist()] for g in part.seen_grads]
        E = list(weights[0])
        for t in range(1, len(weights)):
            size = reference.RELEASED / len(E) if scale == "means" else 1.0
            kind = (weights[t], E, grads[t], grads[t - 1])
            alpha = reference.official_alpha(*kind, kappa=kappa, size=size)
            inside += 0 < alpha < 1
            E = reference.official_step(*kind, kappa=kappa, fallback=0.5, size=size)
        ours = torch.cat([bank.trainable()[k].detach().flatten() for k in together]).double()
        torch.testing.assert_close(ours, torch.tensor(E, dtype=torch.float64), rtol=1e-4, atol=1e-5)
        starts = [x for k in together for x in part.seen_before[0][k].flatten().tolist()]
        tensors.append((weights, grads, starts))
    assert inside > 10, "or only fallbacks were compared"
    if scale == "sums":  # the way that a group is asked to go is shared out among its tensors
        told = told_of_task(events)["reach"]
        assert told == pytest.approx(
            reference.reach([t[:2] for t in tensors], [t[2] for t in tensors], kappa), rel=1e-4
        )


def test_outside_the_layers_every_kind_of_site_is_a_group_of_its_own() -> None:
    sites = {
        "a": SimpleNamespace(layer=3, group="lora"),
        "b": SimpleNamespace(layer=None, group="projector"),
        "c": SimpleNamespace(layer=None, group="head"),
    }
    ctx = SimpleNamespace(model=SimpleNamespace(adapters=SimpleNamespace(sites=sites)))
    keys = ["x/a.lora_A", "x/a.lora_B", "x/b.weight", "x/c.weight", "y/a.lora_A"]
    groups = [_group(ctx, key, "layer") for key in keys]  # type: ignore[arg-type]
    assert groups[0] == groups[1] and len(set(groups)) == 4
    assert [_group(ctx, key, "adapter") for key in keys] == ["x"] * 4 + ["y"]  # type: ignore[arg-type]


def test_the_released_bf16_average_stands_still() -> None:
    """Weights go a way of a tenth of their size in 320 steps, as in tuning; both averages take 1 % a step."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=rng)
    end = start * (1 + 0.1 * torch.rand(1000, generator=rng))
    averages = {kind: start.to(dtype, copy=True) for kind, dtype in SHADOWS.items()}
    for t in range(320):
        theta = start + (end - start) * (t + 1) / 320
        for average in averages.values():
            _llaca.towards(average, theta, 0.01)
    way = (end - start).abs().sum()
    gone = {k: float((a.float() - start.to(a.dtype).float()).abs().sum() / way) for k, a in averages.items()}
    assert gone["fp32"] == pytest.approx(0.7, abs=0.05)  # it lags by 100 steps of 320
    assert gone["bf16"] < 0.1 and averages["bf16"].dtype == torch.bfloat16


def test_a_bf16_average_is_kept_and_rounds_as_released() -> None:
    model = trajectory("official", shadow="bf16", kappa=0.05)[1]
    full = trajectory("official", kappa=0.05)[1]
    for p in model.adapters.trainable().values():
        assert torch.equal(p, p.bfloat16().float())
    assert any(
        not torch.equal(p, q)
        for p, q in zip(model.adapters.trainable().values(), full.adapters.trainable().values(), strict=True)
    )

    def eight_bits(x: np.ndarray) -> np.ndarray:
        """To the nearest bfloat16, ties to even, by the bits."""
        bits = x.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    for alpha in (0.01, 0.3, 0.9):  # (1 - alpha) E and alpha p are rounded to eight bits, then their sum
        E, p = (eight_bits(np.random.default_rng(i).normal(size=200)) for i in (1, 2))
        average, a = torch.tensor(E).bfloat16(), np.float32(alpha)
        _llaca.towards(average, torch.tensor(p), torch.tensor(a))
        want = eight_bits(eight_bits((1 - a) * E) + eight_bits(p * a))
        assert average.tolist() == want.tolist() and (want != E).any()


def test_the_cpu_route_is_for_fp32_in_one_piece_on_the_cpu() -> None:
    five = Five(*(torch.randn(3, 4) for _ in range(4)), None)
    assert five.on_cpu() and five._replace(last_theta=torch.randn(3, 4)).on_cpu()
    for name in Five._fields:
        for other in (torch.randn(3, 4).bfloat16(), torch.randn(4, 3).t(), torch.randn(3, 4, device="meta")):
            assert not five._replace(**{name: other}).on_cpu(), name


def test_groups_are_bounded_and_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators work on at a time: as many tensors as fit, a larger one alone."""
    monkeypatch.setattr(_llaca, "GROUP", 10)
    fives = [Five(*[torch.zeros(n)] * 4, None) for n in (4, 4, 4, 12, 3, 7, 1, 10, 30)]
    found = [[f.theta.numel() for f in group] for group in _llaca._grouped(fives)]
    assert found == [[4, 4], [4], [12], [3, 7], [1], [10], [30]]


# -- what was there before ------------------------------------------------------------------------------------------


def test_settings_of_earlier_folders_are_those_of_the_defaults() -> None:
    """Fields that came later are written only where they say something: an old folder is that of the same recipe."""
    assert set(Llaca().config()) == {"variant", "kappa", "fallback", "first_task", "log_every"}
    assert Llaca(scale="means", per="layer").config()["scale"] == "means"


def test_a_checkpoint_of_an_earlier_version_goes_on() -> None:
    part, _, ctx = stepped("projector")
    new = part.state_dict()
    old = {k: v for k, v in new.items() if k not in ("average", "start")}
    old |= {"shadow": new["average"], "tally": new["tally"][:4]}
    again, events = Llaca(first_task=True), list[dict[str, Any]]()
    again.start = part.start  # as `fit` does: the task begins, then the state is put in place
    again.load_state_dict(old)
    assert again.average.keys() == part.average.keys()
    ctx.log = lambda **e: events.append(e)
    again.end_task(ctx)
    assert "reach" not in events[-1] and "gone" in events[-1]  # the steps before were not measured
    assert all("reach" not in g for g in events[-1]["groups"].values())


def test_means_of_a_variant_without_sums_are_refused() -> None:
    with pytest.raises(RetainError, match=r"llaca\.scale.*bounded"):
        Llaca(variant="bounded", scale="means")
    for option in ("scale", "per", "shadow"):
        with pytest.raises(RetainError, match=rf"llaca\.{option}: 'all' is none of"):
            Llaca(**{option: "all"})
