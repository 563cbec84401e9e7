"""Mergers: laws over all of them, equality with the papers' formulas, and with PEFT where PEFT is right."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import merge as reference
from retain.merge import MERGERS, chunks, copa, lorahub, merger, ties
from retain.merge.axes import borders_of, by_rank, largest, random, shared_basis
from retain.merge.mergers import mass_ratio
from retain.merge.parts import Low, full, inner, split, svd, truncated
from retain.types import RetainError

State = dict[str, Tensor]
# Parameters with which nothing is pruned and nothing scaled: then one adapter is itself.
NEUTRAL: dict[str, dict[str, Any]] = {
    "average": {}, "coma": {}, "task_arithmetic": {}, "svd": {}, "fisher": {},
    "task_arithmetic factors": {"space": "factors"},
    "magnitude_prune": {"density": 1.0}, "ties": {"density": 1.0}, "ties frequency": {"density": 1.0, "signs": "frequency"},
    "ties factors": {"density": 1.0, "space": "factors"}, "ties knots": {"density": 1.0, "space": "knots"},
    "ties model": {"density": 1.0, "trim": "model"},
    "dare": {"density": 1.0}, "dare_ties": {"density": 1.0}, "della": {"density": 1.0, "lam": 1.0},
    "knots_ties": {"density": 1.0, "lam": 1.0}, "knots_dare_ties": {"density": 1.0, "lam": 1.0},
    "copa": {"density": 1.0, "lam": 1.0}, "copa product": {"density": 1.0, "lam": 1.0, "form": "product"},
}  # fmt: skip
# The methods as they are used, with what they prune and draw.
USED: dict[str, dict[str, Any]] = {
    **{n: {} for n in MERGERS if n not in ("slerp", "fisher")},
    "ties factors": {"space": "factors"}, "dare knots": {"space": "knots"},
    "copa product": {"form": "product", "floor": 0.8},
    "copa plain": {"scale": False, "normalise": False}, "della sum": {"signs": "sum"},
    "pcb factors": {"space": "factors"}, "ties frequency": {"signs": "frequency"},
    "ties model": {"trim": "model"}, "magnitude_prune model": {"trim": "model"}, "knots_ties model": {"trim": "model"},
}  # fmt: skip


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int, rank: int = 4) -> State:
    """Two LoRA modules and a projector with a bias."""
    return {
        "layers.0.q.lora_A": noise(rank, 10, seed=10 * seed), "layers.0.q.lora_B": noise(12, rank, seed=10 * seed + 1),
        "layers.1.q.lora_A": noise(rank, 10, seed=10 * seed + 2), "layers.1.q.lora_B": noise(12, rank, seed=10 * seed + 3),
        "projector.weight": noise(6, 7, seed=10 * seed + 4), "projector.bias": noise(6, seed=10 * seed + 5),
    }  # fmt: skip


def changes(s: State) -> State:
    """What a state does, whatever its factors are."""
    return {path: p.dense() if isinstance(p, Low) else p for path, p in split(s).items()}


def same(a: State, b: State, tolerance: float = 1e-5) -> None:
    left, right = changes(a), changes(b)
    assert left.keys() == right.keys()
    for path in left:
        torch.testing.assert_close(left[path], right[path], atol=tolerance, rtol=tolerance, msg=path)


def scaled(s: State, c: float) -> State:
    return {k: v if k.endswith("lora_A") else c * v for k, v in s.items()}


def call(name: str, states: list[State], weights: Any = None, **params: Any) -> State:
    of = merger(name.split(maxsplit=1)[0])
    if of.per_module:
        params["fishers"] = [{k: torch.ones_like(v) for k, v in s.items()} for s in states]
    return of(states, weights, **params)


# -- laws ------------------------------------------------------------------------------------------------


def test_every_merger_is_in_the_battery() -> None:
    assert {n.split()[0] for n in NEUTRAL} | {"slerp", "pcb"} == set(MERGERS)


@pytest.mark.parametrize("name", NEUTRAL)
def test_one_adapter_with_weight_one_is_the_identity(name: str) -> None:
    same(call(name, [state(1)], keep="cat", **NEUTRAL[name]), state(1))


@pytest.mark.parametrize("name", [n for n in USED if n != "coma"])
def test_the_order_of_adapters_does_not_matter(name: str) -> None:
    states, weights = [state(1), state(2), state(3)], [1.0, 0.5, 2.0]
    ours = call(name, states, weights, keep="cat", **USED[name])
    same(ours, call(name, states[::-1], weights[::-1], keep="cat", **USED[name]), 1e-4)


def test_slerp_turned_round_is_itself() -> None:
    a, b = call("slerp", [state(1), state(2)], [0.3, 0.7]), call("slerp", [state(2), state(1)], [0.7, 0.3])
    same(a, b)


@pytest.mark.parametrize(
    "name", [n for n in USED if not n.startswith("pcb") and not n.startswith(("dare", "della", "knots_dare"))]
)
def test_scaling_the_adapters_scales_the_result(name: str) -> None:
    """Except PCB, whose tanh has a scale, and what is drawn from the adapters' own numbers."""
    states = [state(1), state(2)]
    both = [call(name, s, keep="cat", **USED[name]) for s in (states, [scaled(s, 3.0) for s in states])]
    same(scaled(both[0], 3.0), both[1], 1e-4)


@pytest.mark.parametrize("name", ["magnitude_prune", "dare", "della"])
def test_density_one_is_task_arithmetic(name: str) -> None:
    more = {"signs": "sum", "lam": 1.0} if name == "della" else {}
    states = [state(1), state(2), state(3)]
    whole = call("task_arithmetic", states, [1.0, -0.5, 2.0])
    same(call(name, states, [1.0, -0.5, 2.0], keep="cat", density=1.0, **more), whole)
    same(call("svd", states, [1.0, -0.5, 2.0], rank=12), whole)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.37, 0.8, 1.0])
def test_trimming_over_the_model_is_trimming_of_one_long_vector(density: float) -> None:
    """As in TIES' paper: all modules of an adapter flattened into one tensor, modules of unlike scale."""
    states = [
        {k: v * (5.0 if "layers.1" in k else 1.0) for k, v in state(seed).items()} for seed in (1, 2, 3)
    ]
    want: State = {}
    taus = []
    for s in states:
        flat = torch.cat([t.flatten() for t in changes(s).values()])
        kept = largest(flat.clone(), density)
        pieces = kept.split([t.numel() for t in changes(s).values()])
        taus.append({k: p.view(t.shape) for (k, t), p in zip(changes(s).items(), pieces, strict=True)})
    for path in taus[0]:
        want[path] = sum(t[path] for t in taus)  # type: ignore[assignment]
    got = call("magnitude_prune", states, keep="dense", density=density, trim="model")
    for path, tensor in changes(got).items():
        torch.testing.assert_close(
            tensor, want[path.removesuffix(".weight")] if path not in want else want[path]
        )
    if 0 < density < 1:
        per_module = call("magnitude_prune", states, keep="dense", density=density)
        assert not torch.allclose(per_module["layers.0.q.weight"], got["layers.0.q.weight"])


def test_a_border_is_exact_beyond_what_fp32_can_count() -> None:
    """A 7B adapter has 10^8 entries; fp32 counts to 2^24."""
    most, few = torch.ones(1 << 24), torch.tensor([0.5, 0.5001, 0.5002])
    assert borders_of(lambda: [[most], [few]], 1.0) == [0.5]


def test_trimming_over_the_model_needs_the_whole_model_and_changes() -> None:
    parts = [split(state(seed))["layers.0.q"] for seed in (1, 2)]
    with pytest.raises(RetainError, match="call the merger with states"):
        merger("ties").part(parts, [1.0, 1.0], trim="model")
    with pytest.raises(RetainError, match=r"ties\.trim: 'model' ranks the entries of changes"):
        call("ties", [state(1), state(2)], trim="model", space="factors")
    with pytest.raises(RetainError, match=r"ties\.trim: 'all' is none of"):
        call("ties", [state(1), state(2)], trim="all")


@pytest.mark.parametrize("N", [2, 8])
def test_identical_adapters(N: int) -> None:
    one = state(1)
    alone = {f: call("copa", [one], density=0.4, lam=1.0, form=f) for f in ("sum", "product")}
    lora = [k for k in one if "layers" in k]
    B_A = changes({k: alone["sum"][k] for k in lora})
    for form, factor in (("sum", 2.0), ("product", 4.0 * N)):  # lam, and 4 N as the release gives
        got = changes(call("copa", [one] * N, density=0.4, form=form))
        for path, want in B_A.items():
            torch.testing.assert_close(got[path], factor * want, rtol=1e-4, atol=1e-4)
    same(call("average", [one] * N), one)
    same(call("ties", [one] * N, density=1.0, keep="cat"), one)
    same(call("slerp", [one, one]), one)
    same(call("coma", [one] * N), one)
    same(call("knots_ties", [one] * N, density=1.0, lam=1.0), one)
    same(call("task_arithmetic", [one] * N), scaled(one, N))
    same(call("task_arithmetic", [one] * N, space="factors"), _squared(one, N))


def _squared(s: State, N: int) -> State:
    """(sum B)(sum A) of N copies is N^2 B A: the cross terms."""
    return {
        k: v * (1 if k.endswith("lora_A") else N * N if k.endswith("lora_B") else N) for k, v in s.items()
    }


def test_an_adapter_of_weight_zero_has_no_vote() -> None:
    states = [state(1), state(2), state(3)]
    for name in ("ties", "ties frequency", "knots_ties", "copa plain", "task_arithmetic", "average"):
        if name == "knots_ties":  # the basis is that of all adapters
            continue
        same(
            call(name, states, [1, 1, 0], keep="cat", **USED.get(name, {})),
            call(name, states[:2], keep="cat", **USED.get(name, {})),
        )


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della", "knots_dare_ties"])
def test_the_seed_owns_the_draw(name: str) -> None:
    states = [state(1), state(2)]
    before = torch.get_rng_state()
    runs = [call(name, states, seed=s, density=0.5, keep="cat") for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    assert any(not torch.equal(a, b) for a, b in zip(changes(runs[0]).values(), changes(runs[2]).values()))
    twins = changes(call("dare", [states[0], states[0]], density=0.5, keep="cat"))["projector.weight"]
    alone = changes(call("dare", [states[0]], density=0.5, keep="cat"))["projector.weight"]
    assert not torch.allclose(twins, 2 * alone)  # equal adapters are drawn apart


def test_different_ranks_mix() -> None:
    states = [state(1, 2), state(2, 5)]
    for name, params in USED.items():
        if "factors" in name:
            with pytest.raises(RetainError, match=r"layers.0.q.*equal ranks, not \[2, 5\]"):
                call(name, states, **params)
        else:
            call(name, states, **params)


# -- formulas --------------------------------------------------------------------------------------------


def factors(states: list[State], path: str = "layers.0.q") -> list[tuple[Any, Any]]:
    return [(s[f"{path}.lora_B"].tolist(), s[f"{path}.lora_A"].tolist()) for s in states]


def got(s: State, path: str = "layers.0.q") -> Tensor:
    return changes(s)[path]


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_copa_equals_both_published_forms(density: float) -> None:
    states = [state(1), state(2), state(3)]
    assert all(
        (mass_ratio(s["layers.0.q.lora_A"], largest(s["layers.0.q.lora_A"], density)) > 0).all()
        for s in states
    )
    want = torch.tensor(reference.copa_sum(factors(states), density, 2.0))
    torch.testing.assert_close(got(copa(states, density=density)), want, atol=1e-4, rtol=1e-4)
    for floor in (0.0, 0.8):
        want = torch.tensor(reference.copa_product(factors(states), density, 2.0, floor))
        ours = got(copa(states, density=density, form="product", floor=floor))
        torch.testing.assert_close(ours, want, atol=1e-4, rtol=1e-4)
    mean = sum(s["projector.weight"] for s in states) / 3
    torch.testing.assert_close(copa(states)["projector.weight"], mean)


def test_copa_survives_rows_that_are_pruned_whole() -> None:
    """Row norms from 1.0 to 0.3, as the specification counts: rows vanish, and the formula would be 0/0."""
    size = torch.linspace(1, 0.3, 16)[:, None]
    states = [
        {"m.lora_A": noise(16, 64, seed=i).sign() * size, "m.lora_B": noise(20, 16, seed=9 + i)}
        for i in (1, 2)
    ]
    kept = largest(states[0]["m.lora_A"], 0.2)
    assert (kept.abs().sum(1) == 0).sum() >= 5
    for form in ("sum", "product"):
        for floor in (0.0, 0.8):
            out = copa(states, form=form, floor=floor)
            assert torch.isfinite(changes(out)["m"]).all() and changes(out)["m"].abs().max() > 0
    S = mass_ratio(states[0]["m.lora_A"], kept, floor=0.8)
    assert (S[kept.abs().sum(1) == 0] == 0).all()


def test_the_released_product_is_cross_terms() -> None:
    """Independent adapters: cosine about 1/sqrt(N) with the exact sum, norm about sqrt(N) times (spec 1.4)."""
    N = 8
    states = [{"m.lora_A": noise(16, 200, seed=i), "m.lora_B": noise(220, 16, seed=50 + i)} for i in range(N)]
    exact, released = (changes(copa(states, form=f, lam=1.0))["m"] for f in ("sum", "product"))
    cosine = inner(exact, released) / math.sqrt(inner(exact, exact) * inner(released, released))
    assert cosine == pytest.approx(1 / math.sqrt(N), abs=0.03)
    assert released.norm() / exact.norm() == pytest.approx(math.sqrt(N), rel=0.05)


@pytest.mark.parametrize("how", ["total", "frequency"])
def test_ties_equals_the_formula(how: Any) -> None:
    states = [state(1), state(2), state(3)]
    taus = [changes(s)["layers.1.q"].tolist() for s in states]
    want = torch.tensor(reference.ties(taus, 0.3, 0.7, how))
    torch.testing.assert_close(
        got(ties(states, density=0.3, lam=0.7, signs=how, keep="cat"), "layers.1.q"),
        want,
        atol=1e-5,
        rtol=1e-4,
    )


def test_pcb_slerp_and_fisher_equal_their_formulas() -> None:
    states = [state(1), state(2)]
    flat = [s["projector.weight"].flatten().tolist() for s in states]
    want = torch.tensor(reference.pcb(flat, 0.3, 1.2, 0.02)).view(6, 7)
    torch.testing.assert_close(
        call("pcb", states, ratio=0.3, clip=0.02)["projector.weight"], want, atol=1e-5, rtol=1e-4
    )
    for ratio, clip in ((0.1, 1e-4), (0.5, 0.2)):  # the release's upper quantile cuts off the largest entry
        want = torch.tensor(reference.pcb(flat, ratio, 1.2, clip)).view(6, 7)
        got_ = call("pcb", states, ratio=ratio, clip=clip)["projector.weight"]
        torch.testing.assert_close(got_, want, atol=1e-5, rtol=1e-4)
    want = torch.tensor(reference.slerp(*flat, 0.3)).view(6, 7)
    torch.testing.assert_close(call("slerp", states, [0.7, 0.3])["projector.weight"], want)
    low = [changes(s)["layers.0.q"].flatten().tolist() for s in states]
    torch.testing.assert_close(
        got(call("slerp", states, [2, 2])).flatten(),
        torch.tensor(reference.slerp(*low, 0.5)),
        atol=1e-5,
        rtol=1e-4,
    )
    F = [{k: noise(*v.shape, seed=70 + i).square() for k, v in s.items()} for i, s in enumerate(states)]
    for f in F:
        f["projector.weight"][0] = 0.0  # frozen rows: the mean by weights, not 0/0
    merged = merger("fisher")(states, [0.6, 0.4], fishers=F)
    for key in ("projector.weight", "layers.0.q.lora_A", "layers.0.q.lora_B"):
        old, new, f, g = (t[key].flatten().tolist() for t in (*states, *F))
        want = torch.tensor(reference.cofima(old, new, f, g, 0.4)).view(merged[key].shape)
        torch.testing.assert_close(merged[key], want)


def test_equal_fishers_give_coma_and_two_quadratics_their_joint_minimum() -> None:
    states = [state(1), state(2)]
    ours, want = (
        changes(s)["projector.weight"] for s in (call("fisher", states, [0.6, 0.4]), call("coma", states))
    )
    torch.testing.assert_close(ours, want)
    merged = merger("fisher")(
        [{"w.x": torch.tensor([0.0, 0.0])}, {"w.x": torch.tensor([1.0, 1.0])}], [0.6, 0.4],
        fishers=[{"w.x": torch.tensor([10.0, 0.1])}, {"w.x": torch.tensor([0.1, 10.0])}],
    )["w.x"]  # fmt: skip

    def joint(x: Tensor) -> float:
        return float((torch.tensor([10, 0.1]) * x**2 + torch.tensor([0.1, 10]) * (x - 1) ** 2).sum())

    coma = joint(torch.full((2,), 0.4))
    assert joint(merged) == pytest.approx(0.198, abs=5e-3) and coma == pytest.approx(5.25, abs=0.01)


PUBLISHED: dict[str, dict[str, Any]] = {
    "average": {}, "task_arithmetic": {"lam": 1.0, "space": "deltas"}, "svd": {"lam": 1.0}, "slerp": {"parallel": 0.9995},
    "coma": {"new": 0.4}, "fisher": {"lam": 1.0},
    "magnitude_prune": {"density": 0.2, "lam": 1.0, "space": "deltas", "trim": "module"},
    "ties": {"density": 0.2, "lam": 1.0, "signs": "total", "space": "deltas", "trim": "module"},
    "dare": {"density": 0.2, "lam": 1.0, "seed": 0, "space": "deltas"},
    "dare_ties": {"density": 0.2, "lam": 1.0, "signs": "total", "seed": 0, "space": "deltas"},
    "della": {"density": 1 - 0.3, "window": 0.14, "lam": 1.1, "signs": "total", "seed": 0, "space": "deltas"},
    "knots_ties": {"density": 0.2, "lam": 0.6, "signs": "total", "trim": "module"},
    "knots_dare_ties": {"density": 1 - 0.1, "lam": 0.7, "signs": "total", "seed": 0},
    "pcb": {"ratio": 0.1, "lam": 1.2, "clip": 1e-4, "space": "deltas"},
    "copa": {"density": 0.2, "lam": 2.0, "form": "sum", "floor": 0.0, "scale": True, "normalise": True},
}  # fmt: skip


def test_defaults_are_the_published_ones() -> None:
    """Of the papers, releases and READMEs that each merger's docstring names; mergekit's border of `slerp`."""
    assert {name: of.params for name, of in MERGERS.items()} == PUBLISHED


@pytest.mark.parametrize("cosine", [0.9996, 0.9994, -0.9996, -0.9994, 0.3])
def test_slerp_is_the_straight_line_where_two_are_nearly_parallel(cosine: float) -> None:
    a, b = [3.0, 0.0], [2 * cosine, 2 * math.sqrt(1 - cosine**2)]
    line = [0.3 * x + 0.7 * y for x, y in zip(a, b)]
    want = line if abs(cosine) > 0.9995 else reference.slerp(a, b, 0.7)
    made = merger("slerp")([{"w.x": torch.tensor(a)}, {"w.x": torch.tensor(b)}], [0.3, 0.7])["w.x"]
    assert made.tolist() == pytest.approx(want, rel=1e-5, abs=1e-6)
    if abs(cosine) < 0.9999:
        circle = reference.slerp(a, b, 0.7)
        assert max(abs(x - y) for x, y in zip(line, circle)) > 1e-4  # the two can be told apart


def test_slerp_without_weights_or_with_a_zero_change() -> None:
    a, b = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0])
    half = torch.tensor(reference.slerp(a.tolist(), b.tolist(), 0.5))
    for weights in ([0.0, 0.0], [1.0, 1.0], None, [5.0, 5.0]):
        torch.testing.assert_close(merger("slerp")([{"w.x": a}, {"w.x": b}], weights)["w.x"], half)
    for pair, want in (((a, 0 * b), 0.75 * a), ((0 * a, b), 0.25 * b)):
        made = merger("slerp")([{"w.x": t} for t in pair], [3.0, 1.0])["w.x"]
        torch.testing.assert_close(made, want)


def test_coma_is_its_recursion() -> None:
    a, b, c = (noise(5, seed=i) for i in range(3))
    for new, weights in ((0.3, [1.0, 1.0, 1.0]), (0.4, [2.0, 0.5, -1.0])):
        x, y, z = (w * t for w, t in zip(weights, (a, b, c)))
        want = (1 - new) * ((1 - new) * x + new * y) + new * z
        torch.testing.assert_close(
            merger("coma")([{"w.x": t} for t in (a, b, c)], weights, new=new)["w.x"], want
        )


def test_the_mass_ratio_by_hand() -> None:
    A = torch.tensor([[1.0, -2.0, 1.0], [3.0, 4.0, 0.0], [-1.0, 5.0, 0.5], [2.0, 2.0, 2.0], [0.1, 0.1, 0.1]])
    kept = torch.tensor(
        [[0.0, -2.0, 0.0], [3.0, 4.0, 0.0], [0.0, 5.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    )
    S = [2.0, 1.0, 1.3, 3.0, 0.0]
    assert mass_ratio(A, kept).tolist() == pytest.approx(S)
    assert mass_ratio(A, kept, scale=False).tolist() == [1, 1, 1, 1, 0]
    assert mass_ratio(A, kept, floor=0.5).tolist() == pytest.approx(
        [2, 2, 2, 3, 0]
    )  # S of four rows, sorted: [2]
    assert mass_ratio(A, kept, floor=0.25).tolist() == pytest.approx([2, 1.3, 1.3, 3, 0])
    assert mass_ratio(A, kept, floor=1.0).tolist() == pytest.approx([3, 3, 3, 3, 0])


@pytest.mark.parametrize("form", ["sum", "product"])
@pytest.mark.parametrize(("scale", "normalise"), [(False, True), (True, False), (False, False), (True, True)])
def test_copas_ablations_and_weights(form: Any, scale: bool, normalise: bool) -> None:
    """Without `scale` S is 1, without `normalise` S~ is S; weights are those of B."""
    states, weights = [state(1), state(2), state(3)], [0.5, -2.0, 2.5]
    A, B = (
        [torch.tensor(reference.top(s[f"layers.0.q.lora_{x}"].tolist(), 0.6)) for s in states] for x in "AB"
    )
    S = [
        s["layers.0.q.lora_A"].abs().sum(1) / a.abs().sum(1) if scale else torch.ones(4)
        for s, a in zip(states, A)
    ]
    S = [s / sum(S) for s in S] if normalise else S
    left = [w * b * s for w, b, s in zip(weights, B, S)]
    want = 2 * sum(b @ a for b, a in zip(left, A)) if form == "sum" else 2 * sum(left) @ (2 * sum(A))
    made = copa(states, weights, density=0.6, scale=scale, normalise=normalise, form=form)
    torch.testing.assert_close(got(made), want, rtol=1e-4, atol=1e-4)


def test_fishers_of_the_dense_change_weigh_its_entries() -> None:
    """Low-rank adapters with Fishers as path.weight: the formula on the products; never Fishers of both kinds."""
    states, w = [state(1), state(2)], [3.0, 1.0]
    deltas = [changes(s)["layers.0.q"] for s in states]
    F = [noise(12, 10, seed=80 + i).square() for i in range(2)]
    F[0][0], F[1][0] = 0.0, 0.0
    want = torch.tensor(
        reference.cofima(*(t.flatten().tolist() for t in (*deltas, *F)), lam=0.25)
    ).view(12, 10)  # fmt: skip
    parts = [split(s)["layers.0.q"] for s in states]
    weights = merger("fisher").weights(2, w)
    torch.testing.assert_close(merger("fisher").part(parts, weights, fishers=F, lam=0.5), 0.5 * want)
    of_factors = [split({k: v.square() for k, v in s.items()})["layers.0.q"] for s in states]
    for changed, fishers, n in (
        (parts, [of_factors[0], F[1]], 1), (parts, [F[0], of_factors[1]], 2), ([deltas[0], parts[1]], of_factors, 1),
    ):  # fmt: skip
        with pytest.raises(RetainError, match=f"Fisher of adapter {n} is of factors, but"):
            merger("fisher").part(changed, weights, fishers=fishers)


def test_what_cannot_be_merged_is_one_sentence() -> None:
    states = [state(1), state(2)]
    other = [{k: (v[:2] if k.endswith("lora_A") else v[:, :2] if k.endswith("lora_B") else v) for k, v in s.items()}
             for s in states]  # fmt: skip
    with pytest.raises(RetainError, match=r"layers\.0\.q: fisher: the Fisher of adapter 1 is \(2, 10\)"):
        merger("fisher")(states, fishers=other)
    with pytest.raises(RetainError, match=r"fisher: 1 Fishers for 2 adapters"):
        merger("fisher")(states, fishers=states[:1])
    huge = [{k: v * 1e30 for k, v in s.items()} for s in states]
    for name in MERGERS:
        if name != "fisher":
            with pytest.raises(RetainError, match=r"overflow fp32|too large for fp32"):
                merger(name)(huge, keep="cat" if name in ("average", "svd") else None)


def test_factors_whose_product_fits_are_no_overflow() -> None:
    """Their own squares do not fit fp32."""
    state_ = {"m.lora_A": noise(2, 5, seed=1) * 1e-25, "m.lora_B": noise(6, 2, seed=2) * 1e25}
    same(
        call("average", [state_, state_]), {"m.lora_A": noise(2, 5, seed=1), "m.lora_B": noise(6, 2, seed=2)}
    )


def test_the_elements_of_pruning() -> None:
    t = noise(30, 40, seed=3)
    assert int((largest(t, 0.25) != 0).sum()) == 300
    assert torch.equal(largest(t, 1.0), t) and not largest(t, 0.0).any()
    many = torch.stack([random(t.clone(), 0.3, torch.Generator().manual_seed(s)) for s in range(400)])
    torch.testing.assert_close(many.mean(0), t, atol=1.2, rtol=0)  # 4.5 sigma of the largest entry
    assert float((many != 0).float().mean()) == pytest.approx(0.3, abs=0.002)
    rows = torch.stack([by_rank(t, 0.7, 0.4, torch.Generator().manual_seed(s)) for s in range(800)])
    p = torch.tensor([reference.keep_probabilities(r, 0.7, 0.4) for r in t.tolist()])
    torch.testing.assert_close((rows != 0).float().mean(0), p, atol=0.09, rtol=0)  # 5 sigma
    stays = rows != 0
    torch.testing.assert_close(rows[stays], (t / p).expand_as(rows)[stays])


def test_knots_is_the_svd_of_the_concatenation() -> None:
    parts = [split(state(i))["layers.0.q"] for i in (1, 2)]
    whole = torch.cat([p.dense() for p in parts], 1).double()
    U, S, _ = np.linalg.svd(whole.numpy(), full_matrices=False)
    for given in (parts, [p.dense() for p in parts]):  # factors, and dense changes
        basis, coordinates = shared_basis(given)
        assert basis.shape[1] == 8 == int((S > 1e-5).sum())
        sizes = torch.cat(coordinates, 1).norm(dim=1)
        torch.testing.assert_close(sizes.double(), torch.from_numpy(S[:8]), rtol=1e-4, atol=1e-4)
        for p, C in zip(parts, coordinates):
            torch.testing.assert_close(basis @ C, p.dense(), atol=1e-4, rtol=1e-4)
        turned = (torch.from_numpy(U[:, :8]).T @ basis.double()).abs()
        torch.testing.assert_close(turned, torch.eye(8, dtype=torch.float64), atol=1e-4, rtol=0)


def test_knots_of_one_direction_and_of_none() -> None:
    """Parallel rank-one changes share one direction, which is theirs; zero changes stay zero."""
    b, a, c = noise(6, 1, seed=1), noise(1, 5, seed=2), noise(1, 5, seed=3)
    low = [Low(b, a), Low(2 * b, c)]
    for parts in (low, [p.dense() for p in low]):
        basis, coordinates = shared_basis(parts)
        assert basis.shape == (6, 1)
        torch.testing.assert_close((basis.T @ b).abs(), b.norm().view(1, 1))
        for p, C in zip(low, coordinates):
            torch.testing.assert_close(basis @ C, p.dense())
    for parts in ([Low(0 * b, a), Low(0 * b, c)], [torch.zeros(6, 5)] * 2):
        basis, coordinates = shared_basis(parts)
        assert basis.shape == (6, 1) and not any(C.any() for C in coordinates)


# -- what is kept ----------------------------------------------------------------------------------------


def test_truncation_is_the_best_and_its_error_is_true() -> None:
    low = Low(noise(40, 6, seed=1), noise(6, 30, seed=2))
    for part in (low, low.dense()):
        small, error = truncated(part, 3)
        U, S, Vh = torch.linalg.svd(low.dense(), full_matrices=False)
        torch.testing.assert_close(small.dense(), (U[:, :3] * S[:3]) @ Vh[:3], atol=1e-4, rtol=1e-4)
        assert error == pytest.approx(
            float((low.dense() - small.dense()).norm() / low.dense().norm()), rel=1e-4
        )
    assert truncated(low, 6) == (low, 0.0)


def test_the_inner_product_is_that_of_the_entries() -> None:
    a, b = (Low(noise(7, 3, seed=i), noise(3, 5, seed=i + 5)) for i in (1, 2))
    want = float(np.sum(a.dense().double().numpy() * b.dense().double().numpy()))
    for x, y in itertools.product((a, a.dense()), (b, b.dense())):
        assert inner(x, y) == pytest.approx(want, rel=1e-5) == inner(y, x)


def test_factors_without_loss_have_the_rank_of_the_matrix() -> None:
    for rank in (1, 3, 30):
        D = Low(noise(40, rank, seed=1), noise(rank, 30, seed=2)).dense()
        assert full(D).rank == rank == int(np.linalg.matrix_rank(D.numpy()))
        torch.testing.assert_close(full(D).dense(), D, rtol=1e-4, atol=1e-4)
        assert full(1e6 * D).rank == full(1e-6 * D).rank == rank
    nothing = full(torch.zeros(40, 30))
    assert nothing.rank == 1 and not nothing.dense().any()


def test_a_large_matrix_is_not_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from retain.merge import parts

    monkeypatch.setattr(parts, "EXACT", 10)
    sides, plain = list[int](), torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda t, **how: (sides.append(min(t.shape)), plain(t, **how))[1]
    )
    D = noise(120, 90, seed=5)
    svd(D, 5)
    assert sides and max(sides) < 90 / 2
    U, S, Vh = svd(D, 30)  # a third of what there is: whole, and exact
    assert sides[-1] == 90
    want = np.linalg.svd(D.double().numpy(), compute_uv=False)
    assert S.tolist() == pytest.approx(want[:30].tolist(), rel=1e-5)
    assert (U.shape, Vh.shape) == ((120, 30), (30, 90)) and len(svd(D)[1]) == 90


def test_the_large_decomposition_is_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat spectrum (noise) is the hardest: within 1 % of the optimum's error."""
    from retain.merge import parts

    D = noise(300, 260, seed=5) + 3 * Low(noise(300, 5, seed=6), noise(5, 260, seed=7)).dense()
    best = truncated(D, 20)[1]
    monkeypatch.setattr(parts, "EXACT", 10)
    small, error = truncated(D, 20)
    assert error <= 1.01 * best
    assert error == pytest.approx(float((D - small.dense()).norm() / D.norm()), rel=1e-4)
    assert torch.equal(svd(D, 20)[0], svd(D, 20)[0])


def test_results_are_kept_as_asked() -> None:
    states = [state(1), state(2)]
    run = merger("ties").run
    exact = run(states, keep="cat")
    assert exact.error == 0 == merger("average").run(states).error == run(states, keep="dense").error
    same(exact.state, {k.replace("q.weight", "q"): v for k, v in run(states, keep="dense").state.items()})
    assert run(states, keep="dense").state["layers.0.q.weight"].shape == (12, 10)
    small = run(states, keep="svd", rank=2)
    assert small.state["layers.0.q.lora_A"].shape == (2, 10) and small.errors["layers.0.q"] > 0.05
    assert run(states).state["layers.0.q.lora_A"].shape == (8, 10)  # auto: the sum of ranks
    assert call("svd", states)["layers.0.q.lora_A"].shape == (4, 10)
    pieces = chunks(exact.parts, 4)
    assert [any("projector" in k for k in p) for p in pieces] == [True, *[False] * (len(pieces) - 1)]
    assert {p["layers.0.q.lora_A"].shape for p in pieces} == {(4, 10)}
    summed = [changes(p) for p in pieces]
    for path, want in changes(exact.state).items():
        torch.testing.assert_close(sum(s[path] for s in summed if path in s), want, atol=1e-4, rtol=1e-4)


def test_lorahub_finds_the_weights() -> None:
    states = [state(1), state(2)]
    goal = changes(call("task_arithmetic", states, [0.5, -0.25], space="deltas"))

    def loss(s: State) -> float:
        return sum(float((changes(s)[k] - v).square().mean()) for k, v in goal.items())

    merged, w = lorahub(states, loss=loss, steps=200, l1=0.0, space="deltas")
    assert w == pytest.approx([0.5, -0.25], abs=0.05)
    same(merged, call("task_arithmetic", states, w))
    assert lorahub(states, loss=loss, steps=5, seed=1)[1] == lorahub(states, loss=loss, steps=5, seed=1)[1]
    assert lorahub(states, [0.5, -0.25], loss=loss, steps=1, space="deltas")[1] == [0.5, -0.25]
    with pytest.raises(RetainError, match="not finite"):
        lorahub(states, loss=lambda s: math.nan, steps=3)


def test_lorahub_asks_as_often_as_it_says_and_stays_in_its_box() -> None:
    """40 evaluations from the base model on (arXiv 2307.13269); what is merged is (sum w B)(sum w A) at every point."""
    states = [state(1), state(2), state(3)]
    states[0]["layers.0.q.lora_B"][0] = 0.0
    asked: list[State] = []
    weights = lorahub(states, loss=lambda s: asked.append(s) or -float(s["projector.bias"].sum()), l1=0.0)[1]
    assert len(asked) == 40 and not asked[0]["projector.bias"].any() and max(map(abs, weights)) <= 1.5
    flat = torch.stack([s["projector.bias"] for s in states], 1)
    for found in asked:
        w = torch.linalg.lstsq(flat, found["projector.bias"][:, None]).solution[:, 0]
        assert w.abs().max() < 1.5 + 1e-4
        for leaf in ("lora_A", "lora_B"):
            want = sum(c * s[f"layers.0.q.{leaf}"] for c, s in zip(w, states))
            torch.testing.assert_close(found[f"layers.0.q.{leaf}"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"box": 0.0}, {"l1": -0.1}, {"keep": "half"}])
def test_lorahubs_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(RetainError, match="lorahub: steps >= 1, box > 0, l1 >= 0 and keep in"):
        lorahub([state(1)], loss=lambda s: 0.0, **bad)


def test_lorahub_names_the_module_whose_ranks_differ() -> None:
    with pytest.raises(RetainError, match=r"layers\.0\.q: lorahub in space 'factors' needs .* equal rank"):
        lorahub([state(1), state(2, rank=3)], loss=lambda s: 0.0)


# -- errors ----------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    good = state(1)
    nan = {**good, "layers.1.q.lora_B": good["layers.1.q.lora_B"].clone()}
    nan["layers.1.q.lora_B"][0, 0] = math.nan
    small = {**good, "layers.0.q.lora_A": noise(4, 9, seed=1)}
    gone = {k: v for k, v in good.items() if "layers.1" not in k}
    cases: list[tuple[str, list[State], dict[str, Any]]] = [
        (r"adapter 2: layers\.1\.q\.lora_B holds nan \(1 of 48", [good, nan], {}),
        (r"adapter 2: layers\.0\.q is \(12, 9\), but adapter 1 has \(12, 10\)", [good, small], {}),
        (r"adapter 2: layers\.1\.q is missing", [good, gone], {}),
        (r"adapter 2: layers\.1\.q .* is not in adapter 1", [gone, good], {}),
        (r"weights: 1 numbers for 2 adapters", [good, good], {"weights": [1.0]}),
        (r"not all finite", [good, good], {"weights": [1.0, math.inf]}),
        (r"keep: 'half' is none of", [good, good], {"keep": "half"}),
        (r"no adapter to merge", [], {}),
    ]
    for told, states, more in cases:
        with pytest.raises(RetainError, match=told):
            merger("ties").run(states, **more)
    with pytest.raises(RetainError, match=r"without lora_B"):
        merger("ties")([{"a.lora_A": noise(2, 3, seed=1)}])
    for bad, told in (
        ({"densty": 1}, "did you mean 'density'"),
        ({"density": 2.0}, "at least 0 and at most 1, not 2"),
        ({"density": "a"}, "'a': Input should be a valid number"),
        ({"signs": "x"}, "none of"),
        ({"lam": True}, "True: Input should be a valid number"),
    ):
        with pytest.raises(RetainError, match=told):
            merger("ties").check(bad)
    with pytest.raises(RetainError, match="slerp takes 2 adapters, not 3"):
        merger("slerp")([good] * 3)
    with pytest.raises(RetainError, match="did you mean 'ties'"):
        merger("tise")
    with pytest.raises(RetainError, match="positive sum"):
        merger("average")([good, good], [1.0, -1.0])
    with pytest.raises(RetainError, match="fisher needs fishers"):
        merger("fisher").check({})
