"""Each law here was written for a fault of one line that every other test let pass, and names it.

Expected values come from the formulas (in loops, numpy or `reference/`), from stock transformers, or from what the
documentation promises; never from our own output. More of the kind: `make mutants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from fake_model import FakeModel, example, stream
from reference import llaca as llaca_reference
from reference import merge as merge_reference
from reference import penalties
from reference import prompts as moe_reference
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import MoeSpec
from retain.merge.patch import model_tailor
from retain.method import Context, Method, Stack, build
from retain.methods.cofima import CoFiMA
from retain.methods.disco import Disco
from retain.methods.ewc import EWC
from retain.methods.gpm import GPM
from retain.methods.hide import Hide
from retain.methods.instruction_groups import InstructionGroups
from retain.methods.llaca import Llaca
from retain.methods.lora_per_task import LoraPerTask
from retain.methods.lwf import LwF
from retain.methods.replay import Replay, reservoir_slots
from retain.models.hf import HFModel
from retain.run.train import Optim, fit
from retain.stream import Stream, Task
from retain.types import Example, Message

STREAM = stream()


def at(model: FakeModel, task: str, seen: Sequence[str] = (), seed: int = 0) -> Context:
    return Context(model, STREAM.named(task), STREAM, list(seen), seed=seed, batch_size=4)


def shaken(model: FakeModel, seed: int, size: float = 0.3) -> None:
    """What a task does to the trainable tensors: noise of its own."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.adapters.trainable().values():
        p.data += size * torch.randn(p.shape, generator=rng)


# -- one adapter per task ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [Hide(), Hide(fusion="delta_sum"), Disco(tau=2.0), Disco(tau=0.8)],
    ids=["hide", "sum", "own", "shared"],
)
def test_the_projector_goes_on_where_the_last_task_left_it(part: Method) -> None:
    """Three tasks: with two, the first adapter is also the last. `shared`: the third goes back to the first's."""
    model, left = FakeModel(), dict[str, Tensor]()
    for i, task in enumerate(t.name for t in STREAM):
        ctx = at(model, task, [t.name for t in STREAM][:i])
        mix = model.adapters.mix = part.adapt(ctx)
        (name,) = mix.names
        state = {k: t for k, t in model.adapters.state(name).items() if k.startswith("projector")}
        assert set(state) == {"projector.weight", "projector.bias"}
        for key, tensor in left.items():
            assert torch.equal(state[key], tensor), f"{key} at the start of {task}"
        shaken(model, i)
        left = {k: t for k, t in model.adapters.state(name).items() if k.startswith("projector")}
        part.end_task(ctx)
    routed = part.route(ctx, model.collate([example("letter", 3)], answers=False))
    assert routed is not None
    site = model.adapters.sites["projector"]
    shares = {n: float(w) for n, w in routed.at(None).items()}
    told = sum(w * site.tensors(n)["weight"] for n, w in shares.items())
    torch.testing.assert_close(told, left["projector.weight"])


@pytest.mark.parametrize("image_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("make", [LoraPerTask, Disco])
def test_image_weight_is_the_weight_of_the_image(make: Any, image_weight: float) -> None:
    warm = {"temperature": 0.3} if make is LoraPerTask else {"eps": 0.3, "tau": 2.0}
    part, model, means = make(image_weight=image_weight, **warm), FakeModel(), []
    for i, task in enumerate(STREAM):
        ctx = at(model, task.name, [t.name for t in STREAM][:i])
        model.adapters.mix = part.adapt(ctx)
        part.end_task(ctx)
        guide = model.guide(model.collate(list(task.train), answers=False))
        means.append((guide.image_BF.double().mean(0).numpy(), guide.text_BD.double().mean(0).numpy()))
    batch = model.collate([example(t.name, 40 + i) for i, t in enumerate(STREAM)], answers=False)
    guide, mix = model.guide(batch), part.route(ctx, batch)
    weights = list((mix.at(0) if make is Disco else mix.weights).values())

    def cos(a: Tensor, b: np.ndarray) -> float:
        x = a.double().numpy()
        return float(x @ b / np.sqrt((x @ x) * (b @ b)))

    for b in range(3):
        s = [
            image_weight * cos(guide.image_BF[b], v) + (1 - image_weight) * cos(guide.text_BD[b], u)
            for v, u in means
        ]
        want = np.exp(np.array(s) / 0.3)
        assert [float(w[b]) for w in weights] == pytest.approx((want / want.sum()).tolist(), abs=1e-5)


# -- springs, teachers, replay -------------------------------------------------------------------------------


def squared_gradients(model: FakeModel, task: Task) -> dict[str, Tensor]:
    """The mean over a task's samples of each one's squared gradient of the answer loss."""
    live = model.adapters.trainable()
    total = {k: torch.zeros_like(p) for k, p in live.items()}
    for e in task.train:
        loss = model(model.collate([e], answers=True)).loss
        for k, g in zip(live, torch.autograd.grad(loss, list(live.values())), strict=True):
            total[k] += g**2 / len(task.train)
    return total


@pytest.mark.parametrize("anchors", ["all", "single"])
def test_all_anchors_are_a_spring_per_task_and_single_is_the_last_ones(anchors: str) -> None:
    model, part = FakeModel(), EWC(lam=3.0, n_samples=24, anchors=anchors)
    fishers, rests = list[dict[str, Tensor]](), list[dict[str, Tensor]]()
    for i, task in enumerate(STREAM):
        ctx = at(model, task.name, [t.name for t in STREAM][:i])
        model.adapters.mix = build("lora").adapt(ctx)
        part.begin_task(ctx)
        shaken(model, i)
        fishers.append(squared_gradients(model, task))
        rests.append({k: p.detach().clone() for k, p in model.adapters.trainable().items()})
        part.end_task(ctx)
    shaken(model, 9, size=0.1)
    live = model.adapters.trainable()
    batch = model.collate(list(STREAM[0].train[:2]), answers=True)
    term = part.loss(ctx, batch, model(batch))
    assert isinstance(term, Tensor)
    grads = torch.autograd.grad(term, list(live.values()))
    kept = slice(None) if anchors == "all" else slice(-1, None)
    for (key, p), grad in zip(live.items(), grads, strict=True):
        flat = [[d[key].flatten().tolist() for d in found[kept]] for found in (rests, fishers)]
        _, want = penalties.ewc(p.flatten().tolist(), *flat, 3.0)
        scale = max(map(abs, want))
        torch.testing.assert_close(grad.flatten(), torch.tensor(want), rtol=1e-3, atol=1e-4 * scale)
        assert scale > 0


def test_the_teacher_has_no_dropout_and_the_student_keeps_its_own() -> None:
    model, part = FakeModel(LoraSpec(rank=2, alpha=4.0, dropout=0.5)), LwF()
    ctx = at(model, "letter", ["colour"])
    model.adapters.mix = build("lora").adapt(ctx)
    shaken(model, 1)
    part.begin_task(ctx)
    batch = model.collate(list(ctx.task.train[:6]), answers=True)
    model.train(False)
    with torch.no_grad():
        old = model(batch).logits_NV
    model.train(True)
    shaken(model, 2)
    out = model(batch)
    terms = {float(part.loss(ctx, batch, out).detach()) for _ in range(3)}
    want = penalties.lwf(out.logits_NV.tolist(), old.tolist(), 2.0)
    assert len(terms) == 1 and terms.pop() == pytest.approx(want, rel=1e-4)
    assert model.training and not torch.equal(model(batch).logits_NV, model(batch).logits_NV)


def test_a_reservoir_of_one_keeps_the_nth_with_chance_one_in_n() -> None:
    """Vitter's algorithm R: after n examples each is the one that is kept with probability 1/n."""
    n, draws = 4, 3000
    last = np.zeros(n)
    for seed in range(draws):
        slots = reservoir_slots(n, 0, 1, torch.Generator().manual_seed(seed))
        last[max(i for i, s in enumerate(slots) if s == 0)] += 1
    assert abs(last / draws - 1 / n).max() < 0.04  # five standard deviations


@pytest.mark.parametrize("size", [1, 6])
def test_a_buffer_remembers_how_many_it_met(size: int) -> None:
    """Every task of the past has its share, not only the last one, nor the one that came first to a slot."""
    model, shares = FakeModel(), dict.fromkeys((t.name for t in STREAM), 0)
    for seed in range(240 // size):
        part = Replay(size=size)
        for n, task in enumerate(shares, start=1):
            part.end_task(at(model, task, seed=seed))
            assert part.n_met == 24 * n and len(part.buffer) == size
        for e in part.buffer:
            shares[e.id.split("-")[0]] += 1
    # 80 each of 240; 7.3 by chance (one standard deviation), samples of one task are not drawn twice
    assert all(abs(n - 80) < 37 for n in shares.values()), shares


# -- gradient projection -------------------------------------------------------------------------------------


def after_one_task() -> tuple[HFModel, Stack, Context, dict[str, Tensor]]:
    """A tiny LLaVA that learned one sample under GPM, the next task begun; and the rows that each layer read."""
    model = HFModel(
        *tiny.llava(text={"hidden_size": 64}), LoraSpec(rank=8, alpha=8.0)
    )  # wider than rows are many
    tasks = tuple(Task(f"t{i}", tiny.examples()[3 * i : 3 * i + 1], [], STREAM[0].score) for i in range(2))
    both, method = Stream("two", tasks), Stack(build("lora"), GPM(threshold=1.0, n_tokens=1000))
    how = Optim(lr=2e-2, steps=3, batch_size=1, warmup=0.0)
    fit(model, method, Context(model, tasks[0], both, [], seed=0, batch_size=1), how)
    rows: dict[str, Tensor] = {}
    with (
        torch.no_grad(),
        model.adapters.reading(lambda p, x: rows.update({p: x.reshape(-1, x.shape[-1]).clone()})),
    ):
        model(model.collate(tasks[0].train, answers=True))
    return model, method, Context(model, tasks[1], both, ["t0"], seed=0, batch_size=1), rows


def test_every_layer_is_protected_those_that_share_an_input_too() -> None:
    """q, k and v read one tensor: one memory, three layers that obey it; so do gate and up."""
    model, method, ctx, rows = after_one_task()
    before = model.adapters.state("lora")
    fit(model, method, ctx, Optim(lr=2e-2, steps=8, batch_size=1, warmup=0.0, weight_decay=0.1))
    after, met = model.adapters.state("lora"), set[str]()
    for path, x in rows.items():
        if f"{path}.lora_A" not in before or len(x) >= x.shape[1]:
            continue
        dA, dB = (after[f"{path}.{k}"] - before[f"{path}.{k}"] for k in ("lora_A", "lora_B"))
        seen = x @ before[f"{path}.lora_A"].T
        met.add(path.rpartition(".")[2])
        assert dA.norm() > 1e-3, f"{path} may not move at all"
        assert (x @ dA.T).norm() < 5e-3 * x.norm() * dA.norm(), f"{path}: A moved along what was seen"
        assert (seen @ dB.T).norm() < 5e-3 * seen.norm() * max(float(dB.norm()), 1e-3), f"{path}: B did"
    assert met >= {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_gradient_that_the_optimizer_sees_is_projected() -> None:
    """Or Adam's moments would belong to directions in which nothing may move."""
    model, method, ctx, rows = after_one_task()
    model.adapters.mix = method.adapt(ctx)
    method.begin_task(ctx)
    live, rng = model.adapters.trainable(), torch.Generator().manual_seed(0)
    for p in live.values():
        p.grad = torch.randn(p.shape, generator=rng)
    method.grads(ctx)
    for path, x in rows.items():
        grad = live[f"lora/{path}.lora_A"].grad if f"lora/{path}.lora_A" in live else None
        if grad is not None and len(x) < x.shape[1]:
            assert grad.norm() > 0.1
            assert (x @ grad.T).norm() < 5e-3 * x.norm() * grad.norm(), path


# -- experts -------------------------------------------------------------------------------------------------


def test_the_router_reads_the_input_and_the_experts_what_dropout_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llava", MoeSpec(rank=6, alpha=12.0, experts=3, dense="", dropout=0.5))
    tiny.fill(model.adapters, "a", size=2.0)
    site = next(s for p, s in model.adapters.sites.items() if p.endswith("q_proj") and s.group == "lora")
    kept = (torch.arange(32) % 3 > 0).float() * 2
    monkeypatch.setattr(model.adapters, "dropped", lambda x, p: x * kept)
    x, t = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), site.tensors("a")
    A, B, W = t["lora_A"].split(2), t["lora_B"].split(2, dim=1), site.base.weight
    site.train()
    with torch.no_grad(), model.adapters.using(Mix({"a": 1.0})):
        got = site(x[None])[0]
        for i, row in enumerate(x):
            gates = torch.softmax(t["lora_router"] @ row, 0)
            want = W @ row + 2.0 * sum(
                g * (b @ (a @ (row * kept))) for g, a, b in zip(gates, A, B, strict=True)
            )
            torch.testing.assert_close(got[i], want, atol=1e-4, rtol=1e-4)
        other = moe_reference.moe(x[0] * kept, W, A, B, t["lora_router"], alpha=12.0, r=6)
        assert (got[0] - other - W @ (x[0] - x[0] * kept)).abs().max() > 0.01  # a gate of x' would give this


# -- groups of instructions ----------------------------------------------------------------------------------


def asks(name: str, *questions: str) -> Task:
    made = [
        Example(f"{name}-{i}", (Message("user", q), Message("assistant", f"a{i}")))
        for i, q in enumerate(questions)
    ]
    return Task(name, made, [], STREAM[0].score)


def grouped(part: InstructionGroups, *tasks: Task) -> tuple[FakeModel, Context]:
    model, s = FakeModel(), Stream("asked", tasks)
    for i, task in enumerate(tasks):
        ctx = Context(model, task, s, [t.name for t in tasks[:i]], seed=0, batch_size=4)
        model.adapters.mix = part.adapt(ctx)
        shaken(model, i)
        part.end_task(ctx)
    return model, ctx


def test_a_group_learns_the_words_of_every_task_that_joins_it() -> None:
    part = InstructionGroups(threshold=0.2)
    model, ctx = grouped(
        part,
        asks("one", "name colour"),
        asks("two", "count shapes"),
        asks("three", "name colour quickly loudly"),
    )
    assert [part.group_of[t] for t in ("one", "two", "three")] == ["group1", "group2", "group1"]
    mix = part.route(ctx, model.collate(asks("new", "quickly loudly").train, answers=False))
    assert mix is not None and mix.names == ["group1"]  # words of the third task alone; else the newest group


@pytest.mark.parametrize(("init", "equal"), [("previous", True), ("fresh", False)])
def test_a_new_group_starts_from_the_previous_task_or_afresh(init: str, equal: bool) -> None:
    part, model = InstructionGroups(init=init), FakeModel()
    tasks = asks("one", "name colour"), asks("two", "count shapes")
    for i, task in enumerate(tasks):
        ctx = Context(model, task, Stream("asked", tasks), [], seed=0, batch_size=4)
        before = {n: model.adapters.state(n) for n in model.adapters.names}
        (name,) = part.adapt(ctx).names
        if i:
            state = model.adapters.state(name)
            assert all(torch.equal(state[k], before["group1"][k]) for k in state) == equal
            assert any(t.any() for k, t in state.items() if k.endswith("lora_B")) == equal
        shaken(model, i)


def test_previous_is_the_last_task_and_not_the_newest_group() -> None:
    """A, B, A, C: C starts from A, as the released scripts start from the previous checkpoint."""
    part, model = InstructionGroups(init="previous"), FakeModel()
    asked = ("name colour", "count shapes", "name colour", "read letters")
    tasks = tuple(asks(f"t{i}", q) for i, q in enumerate(asked))
    for i, task in enumerate(tasks):
        ctx = Context(model, task, Stream("asked", tasks), [], seed=0, batch_size=4)
        before = {n: model.adapters.state(n) for n in model.adapters.names}
        (name,) = part.adapt(ctx).names
        if i == 3:
            state = model.adapters.state(name)
            alike = [n for n, old in before.items() if all(torch.equal(state[k], old[k]) for k in state)]
            assert alike == ["group1"] and name == "group3"
        shaken(model, i)
        part.end_task(ctx)


# -- LLaCA ---------------------------------------------------------------------------------------------------


def test_an_adapter_of_a_task_long_ago_is_averaged_when_it_trains_again() -> None:
    """A, B, A: `official` averages what was trained before, and that is not only the last task's adapter."""
    model, part = FakeModel(), Llaca()
    model.adapters.add("A", torch.Generator().manual_seed(0))
    model.adapters.add("B", torch.Generator().manual_seed(1))
    averaged = []
    for i, name in enumerate(("A", "B", "A", "B")):
        ctx = at(model, "colour", [])
        model.adapters.train_only(name)
        model.adapters.mix = Mix({name: 1.0})
        part.begin_task(ctx)
        for step in range(4):
            shaken(model, 10 * i + step)
            for p in model.adapters.trainable().values():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(7 * i + step))
            part.after_step(ctx)
        raw = model.adapters.state(name)
        part.end_task(ctx)
        averaged.append(any(not torch.equal(t, raw[k]) for k, t in model.adapters.state(name).items()))
    assert averaged == [False, False, True, True]


def test_the_rates_and_fallbacks_that_are_told_are_those_of_the_formula() -> None:
    model, part = FakeModel(), Llaca(first_task=True, log_every=1)
    events: list[dict[str, Any]] = []
    ctx = at(model, "colour")
    ctx.log = lambda **e: events.append(e)
    model.adapters.mix = build("lora").adapt(ctx)
    part.begin_task(ctx)
    E: dict[str, list[float]] = {}
    last: dict[str, list[float]] = {}
    told: list[dict[str, list[tuple[float, float]]]] = []
    for step in range(6):
        ctx.step = step
        now: dict[str, list[tuple[float, float]]] = {}
        # the projector and the second layer move far and have rates inside (0, 1), the first falls back
        for key, p in model.adapters.trainable().items():
            rng = torch.Generator().manual_seed(100 * step + sum(map(ord, key)))
            size = 0.01 if ".0.up." in key else 3.0
            p.data += size * torch.randn(p.shape, generator=rng)
            p.grad = torch.randn(p.shape, generator=rng)
            theta, g = (t.detach().flatten().double().tolist() for t in (p, p.grad))
            if key in E:
                d = llaca_reference.l1([x - y for x, y in zip(theta, E[key], strict=True)])
                dg = llaca_reference.l1([x - y for x, y in zip(g, last[key], strict=True)])
                alpha = 2 * (1 + llaca_reference.l1(g)) / (d * dg)
                fell = not 0 < alpha < 1
                now.setdefault(
                    f"{'projector' if 'projector' in key else 'lora'}.{key.rsplit('.', 1)[1]}", []
                ).append((0.01 if fell else alpha, float(fell)))
                E[key] = llaca_reference.official_step(theta, E[key], g, last[key])
            else:
                E[key] = theta
            last[key] = g
        part.after_step(ctx)
        told += [now] if now else []
    rates = [e["groups"] for e in events if e["kind"] == "rates"]
    assert len(rates) == len(told) == 5
    for groups, want in zip(rates, told, strict=True):
        for name, pairs in want.items():
            alphas = sorted(a for a, _ in pairs)
            found = [groups[name][k] for k in ("min", "median", "max", "fallback")]
            share = sum(f for _, f in pairs) / len(pairs)
            assert found == pytest.approx([alphas[0], alphas[len(alphas) // 2], alphas[-1], share], rel=1e-4)
    part.end_task(ctx)
    (whole,) = [e["groups"] for e in events if e["kind"] == "rates_of_task"]
    for name in told[0]:
        share = np.mean([f for now in told for _, f in now[name]])
        assert whole[name]["fallback"] == pytest.approx(share)
    shares = [g["fallback"] for g in whole.values()]
    assert min(shares) < 0.2 and any(0.4 < s < 0.8 for s in shares)


# -- mergers -------------------------------------------------------------------------------------------------


class Twice(FakeModel):
    """The first layer runs two times, as a shared block does."""

    def hidden(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        layers = self.net.language.layers
        self.net.language.layers = torch.nn.ModuleList([layers[0], layers[0], layers[1]])
        try:
            return super().hidden(ids, mask, pixels)
        finally:
            self.net.language.layers = layers


def test_a_layer_that_runs_twice_has_the_sum_of_both_gradients() -> None:
    model, part = Twice(), CoFiMA(n_samples=24)
    ctx = replace(at(model, "colour"), batch_size=24)
    model.adapters.mix = build("lora").adapt(ctx)
    part.begin_task(ctx)
    shaken(model, 0)
    part.end_task(ctx)
    sites = {p: s for p, s in model.adapters.sites.items() if s.group == "lora"}
    weights = [s.base.weight.requires_grad_() for s in sites.values()]
    model.adapters.mix = Mix({"lora": torch.ones(24)})  # per sample: no fused node, which treats W as frozen
    loss = model(model.collate(list(ctx.task.train), answers=True)).loss
    for path, grad in zip(sites, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(part.fisher[f"{path}.weight"], grad**2, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("sensitivity", ["obs", "code"])
def test_a_column_that_never_fires_counts_as_one(sensitivity: str) -> None:
    """H_jj = 1 there (specification, Model Tailor, step 1): it is part of the mean that damps all columns."""
    rng = torch.Generator().manual_seed(0)
    W0, W1, x = (torch.randn(s, generator=rng) for s in ((5, 8), (5, 8), (30, 8)))
    x = 0.05 * x
    x[:, [2, 5, 6]] = 0.0
    got = model_tailor(W0, W1, x, sparsity=0.6, sensitivity=sensitivity)
    want = merge_reference.model_tailor(W0.tolist(), W1.tolist(), x.tolist(), 0.6, code=sensitivity == "code")
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-4, rtol=1e-3)
