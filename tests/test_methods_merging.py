"""merge_tasks, merge_after_task and CoFiMA: what they store is what their formulas say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import retain.methods._merging as merging
from fake_model import FakeModel, context, stream
from reference import merge as reference
from retain.adapters.bank import Mix
from retain.adapters.moe import MoeSpec
from retain.adapters.prompt import PromptSpec
from retain.merge import merger
from retain.merge.parts import Low, split, truncated
from retain.method import Method, Stack, build
from retain.methods.cofima import CoFiMA
from retain.methods.lorahub import LoraHub
from retain.methods.merge_after_task import MergeAfterTask
from retain.methods.merge_tasks import MergeTasks
from retain.pocket.unseen import pocket_merge
from retain.run.train import Optim, fit
from retain.types import RetainError


def learn(method: Any, tasks: int = 2, steps: int = 6) -> FakeModel:
    model, seen = FakeModel(), list[str]()
    for task in stream()[:tasks]:
        fit(model, method, context(model, task.name, seen), Optim(lr=5e-2, steps=steps, batch_size=4))
        seen.append(task.name)
    return model


def dense(state: Any) -> dict[str, torch.Tensor]:
    return {k: p.dense() if isinstance(p, Low) else p for k, p in split(state).items()}


@pytest.mark.parametrize(("name", "params"), [("copa", {}), ("ties", {"density": 0.5}), ("average", {})])
def test_what_answers_is_the_merge_of_adapters_tuned_alone(name: str, params: dict[str, Any]) -> None:
    method = MergeTasks(merger=name, params=params)
    model = learn(method, 3)
    bank, tasks = model.adapters, list(method.adapter_of.values())
    assert list(bank.mix.weights.values()) == [1.0] * len(bank.mix.names) and len(tasks) == 3
    want = dense(merger(name)([merging.changes(bank, n) for n in tasks], keep="cat", **params))
    stored = [dense(merging.changes(bank, n)) for n in bank.mix.names]
    for key, w in want.items():
        torch.testing.assert_close(sum(s[key] for s in stored if key in s), w, atol=1e-5, rtol=1e-4)
    held = [n for n in bank.mix.names if any("projector" in k for k in bank.state(n))]
    assert len(bank.mix.names) > 1 and len(held) == 1  # no zeros of the projector's size beside each piece
    alone = learn(build("lora"), 1).adapters.state("lora")  # the first task, tuned by plain LoRA
    moved = [float((alone[k] - t).abs().max()) for k, t in bank.state(tasks[0]).items() if "lora_B" in k]
    assert max(moved) < 1.0 and not bank.trainable()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_merge_may_be_truncated_to_any_rank(rank: int) -> None:
    """By numpy's singular values; rank 3 is kept as two adapters of the bank's rank 2."""
    method = MergeTasks(merger="average", keep="svd", rank=rank)
    model = learn(method)
    bank = model.adapters
    alone = [dense(merging.changes(bank, n)) for n in method.adapter_of.values()]
    told = [dense(merging.changes(bank, n)) for n in bank.mix.names]
    assert len(told) == (rank + 1) // 2
    for key in (k for k in alone[0] if "projector" not in k):
        u, s, v = np.linalg.svd(((alone[0][key] + alone[1][key]) / 2).double().numpy())
        want = (u[:, :rank] * s[:rank]) @ v[:rank]
        got = sum(t[key] for t in told if key in t).double().numpy()
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert s[rank] > 1e-3  # something was cut off


def test_a_later_task_does_not_start_from_the_merge() -> None:
    """Tuning is from the base model: while a task trains, only its own adapter is on."""
    method, model = MergeTasks(), learn(MergeTasks(), 1)
    method = MergeTasks()
    method.adapter_of = {"colour": "01-colour"}
    mix = method.adapt(context(model, "letter", ["colour"]))
    assert mix.weights == {"02-letter": 1.0}
    assert not any(t.any() for k, t in model.adapters.state("02-letter").items() if not k.endswith("lora_A"))


@pytest.mark.parametrize("space", ["factors", "deltas"])
def test_lorahub_stores_the_sum_at_the_weights_it_found(space: str) -> None:
    """By the formula, and no point of its budget of `steps` evaluations is better than what it keeps."""
    evaluated: list[float] = []

    class Watch(FakeModel):
        def forward(self, batch: Any) -> Any:
            out = super().forward(batch)
            if not torch.is_grad_enabled():
                evaluated.append(float(out.loss))
            return out

    method, model, seen = LoraHub(steps=12, shots=3, l1=0.01, space=space), Watch(), list[str]()
    for t, task in enumerate(stream()[:2]):
        evaluated.clear()
        fit(model, method, context(model, task.name, seen), Optim(lr=5e-2, steps=20, batch_size=4))
        seen.append(task.name)
        assert len(evaluated) == 12 * (t + 1)  # a batch per task so far
    bank, w = model.adapters, list(method.weights.values())
    assert [len(k) for k in method.kept.values()] == [3, 3] and any(w) and not bank.trainable()
    alone = [split(merging.changes(bank, n)) for n in method.weights]
    stored = [dense(merging.changes(bank, n)) for n in bank.mix.names]
    for key, parts in {k: [a[k] for a in alone] for k in alone[0]}.items():
        if space == "factors" and isinstance(parts[0], Low):
            want = sum(c * p.B for c, p in zip(w, parts)) @ sum(c * p.A for c, p in zip(w, parts))
        else:
            want = sum(c * (p.dense() if isinstance(p, Low) else p) for c, p in zip(w, parts))
        torch.testing.assert_close(sum(s[key] for s in stored if key in s), want, atol=1e-5, rtol=1e-4)
    per_point = [(a + b) / 2 for a, b in zip(evaluated[::2], evaluated[1::2])]
    with torch.no_grad():
        kept = [float(model(model.collate(k, answers=True)).loss) for k in method.kept.values()]
    assert sum(kept) / 2 + 0.01 * (abs(w[0]) + abs(w[1])) / 2 < per_point[0]  # the base model: w = 0
    assert any(abs(p - sum(kept) / 2) < 1e-6 for p in per_point)


def test_lorahub_counts_every_task_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is searched for is the mean over tasks of their loss: a sum would make the price of weights smaller."""
    pairs: list[tuple[float, float]] = []

    def watched(states: Any, *, loss: Any, **how: Any) -> Any:
        model, bank = model_of[0], model_of[0].adapters
        for name, state in zip(method.adapter_of.values(), states, strict=True):
            got = loss(state)
            with bank.using(Mix({name: 1.0})):
                each = [float(model(model.collate(k, answers=True)).loss) for k in method.kept.values()]
            pairs.append((got, sum(each) / len(each)))
        return states[0], [1.0, *[0.0] * (len(states) - 1)]

    monkeypatch.setattr("retain.methods.lorahub.lorahub", watched)
    method, model_of, seen = LoraHub(shots=3), [FakeModel()], list[str]()
    for task in stream()[:2]:
        fit(model_of[0], method, context(model_of[0], task.name, seen), Optim(lr=5e-2, steps=3, batch_size=4))
        seen.append(task.name)
    assert len(pairs) == 3
    for got, want in pairs:
        assert got == pytest.approx(want, rel=1e-4)


def test_lorahub_of_one_evaluation_is_the_base_model() -> None:
    model = learn(LoraHub(steps=1), 1)
    for state in (merging.changes(model.adapters, n) for n in model.adapters.mix.names):
        assert not any(d.any() for d in dense(state).values())


def test_coma_in_a_stream() -> None:
    part = MergeAfterTask(params={"new": 0.3})
    states: list[Any] = []

    class Watch(MergeAfterTask):
        def end_task(self, ctx: Any) -> None:
            states.append((self.before.get("lora"), merging.changes(ctx.model.adapters, "lora")))
            super().end_task(ctx)
            states.append(merging.changes(ctx.model.adapters, "lora"))

    part = Watch(params={"new": 0.3})
    learn(Stack(build("lora"), part))
    (none, first), after_first, (old, new), merged = states
    assert none is None and all(torch.equal(first[k], after_first[k]) for k in first)
    assert all(torch.equal(after_first[k], old[k]) for k in old)  # the next task starts from the merge
    for key, d in dense(merged).items():
        want = 0.7 * dense(old)[key] + 0.3 * dense(new)[key]
        want = want if "projector" in key else truncated(want, 2)[0].dense()
        torch.testing.assert_close(d, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("space", ["deltas", "factors"])
def test_cofima_equals_the_formula(space: str) -> None:
    states: list[Any] = []

    class Watch(CoFiMA):
        def end_task(self, ctx: Any) -> None:
            states.append((dict(self.before), dict(self.fisher), merging.changes(ctx.model.adapters, "lora")))
            super().end_task(ctx)
            states.append((merging.changes(ctx.model.adapters, "lora"), dict(self.fisher)))

    learn(Stack(build("lora"), Watch(lam=0.4, n_samples=8, space=space)))
    (_, _, _), _, (old, F_old, new), (merged, F_new) = states
    if space == "deltas":
        old, new, merged = (
            {k if "projector" in k else f"{k}.weight": v for k, v in dense(s).items()}
            for s in (old, new, merged)
        )
    for key, got in merged.items():
        parts = [t[key].flatten().tolist() for t in (old, new, F_old, F_new)]
        want = torch.tensor(reference.cofima(*parts, 0.4)).view(got.shape)
        if space == "deltas" and "projector" not in key:
            want = truncated(want, 2)[0].dense()
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_a_clip_is_a_quantile_of_each_tensor() -> None:
    found = []
    for clip in (1.0, 0.9):
        part = CoFiMA(n_samples=8, clip=clip)
        learn(Stack(build("lora"), part), 1)
        found.append(part.fisher)
    for key, whole in found[0].items():
        F = whole.double().numpy()
        want = np.minimum(F, np.quantile(F, 0.9, method="higher"))
        np.testing.assert_allclose(found[1][key].double().numpy(), want, rtol=1e-6)
        assert want.max() < F.max()


def test_the_fisher_of_a_change_is_that_of_the_weight() -> None:
    """dL/dW by hooks equals autograd on the frozen weight itself, batch by batch, squared and averaged."""
    part = CoFiMA(n_samples=8)
    model = learn(build("lora"), 1)
    model.train(False)
    model.adapters.train_only("lora")
    ctx = context(model)
    got = part._fisher(ctx, "lora")
    layers = {p: s for p, s in model.adapters.sites.items() if s.group == "lora"}
    rows = torch.randperm(24, generator=ctx.rng("cofima"))[:8].tolist()
    want = {p: torch.zeros_like(s.base.weight) for p, s in layers.items()}
    for i in (0, 4):
        batch = model.collate([ctx.task.train[r] for r in rows[i : i + 4]], answers=True)
        weights = [s.base.weight.requires_grad_() for s in layers.values()]
        model.adapters.mix = Mix(
            {"lora": torch.ones(4)}
        )  # per sample: no fused node, which treats W as frozen
        for (p, _), g in zip(layers.items(), torch.autograd.grad(model(batch).loss, weights)):
            want[p] += g.square() / 2
    for p, w in want.items():
        torch.testing.assert_close(got[f"{p}.weight"], w, atol=1e-9, rtol=1e-4)
        assert w.max() > 0


def test_coma_forgets_less_than_plain_lora() -> None:
    """The old task's loss after two tasks: averaged < sequential; the new task's is below the untuned one."""
    losses = {}
    for name, method in (
        ("lora", build("lora")),
        ("coma", build(["lora", "merge_after_task"])),
        ("cofima", build(["lora", "cofima"])),
    ):
        model = learn(method, steps=20)
        model.train(False)
        with torch.no_grad():
            losses[name] = [
                float(model(model.collate(list(t.test), answers=True)).loss) for t in stream()[:2]
            ]
    with torch.no_grad():
        plain = FakeModel()
        untuned = float(plain(plain.collate(list(stream()[1].test), answers=True)).loss)
    for name in ("coma", "cofima"):
        assert losses[name][0] < losses["lora"][0] and losses[name][1] < untuned


@pytest.mark.parametrize("name", ["merge_after_task", "merge_tasks"])
def test_the_weights_of_a_recipe_weigh(name: str) -> None:
    """(1 a + 3 b) / 4, in the order [before, after] or that of the tasks; the projector shows it without truncation."""
    seen: dict[str, list[Any]] = {"lora": []}

    class Watch(Method):
        name = "watch"

        def end_task(self, ctx: Any) -> None:  # before the merge
            last = next(n for n in reversed(ctx.model.adapters.names) if not n.startswith("merged"))
            seen["lora"].append(dense(merging.changes(ctx.model.adapters, last)))

    weights = [1.0, 3.0] if name == "merge_after_task" else [1.0, 3.0, 5.0]
    part = build({name: {"merger": "average", "weights": weights}})
    stack = [build("lora"), Watch(), part] if name == "merge_after_task" else [Watch(), part]
    model = learn(Stack(*stack))
    bank, (a, b) = model.adapters, seen["lora"]
    told = [dense(merging.changes(bank, n)) for n in bank.mix.names]
    for key in ("projector.weight", "projector.bias"):
        got = sum(t[key] for t in told if key in t)
        torch.testing.assert_close(got, (a[key] + 3 * b[key]) / 4, atol=1e-5, rtol=1e-4)
        assert (a[key] - b[key]).abs().max() > 0.01


def test_what_a_truncation_loses_is_told() -> None:
    """Relative to each module's average, by its singular values; the projector, which is not truncated, counts 0."""
    events: list[dict[str, Any]] = []
    states: list[Any] = []

    class Watch(MergeAfterTask):
        def end_task(self, ctx: Any) -> None:
            states.append((self.before.get("lora"), merging.changes(ctx.model.adapters, "lora")))
            ctx.log = lambda **e: events.append(e)
            super().end_task(ctx)

    learn(Stack(build("lora"), Watch(params={"new": 0.3})))
    (told,) = (e for e in events if e["kind"] == "merge")
    old, new = map(dense, states[1])
    lost = []
    for key in old:
        s = (
            torch.linalg.svdvals(0.7 * old[key] + 0.3 * new[key])
            if "projector" not in key
            else torch.zeros(3)
        )
        lost.append(float(s[2:].norm() / s.norm()) if s.any() else 0.0)
    assert sum(x > 0.01 for x in lost) == 2 and told["modules"] == len(lost)
    assert told["max_error"] == pytest.approx(max(lost), rel=1e-3)
    assert told["mean_error"] == pytest.approx(sum(lost) / len(lost), rel=1e-3)


@pytest.mark.parametrize(
    "name", ["merge_tasks", "merge_after_task", "cofima", "lorahub", "model_tailor", "gpm"]
)
def test_adapters_of_other_kinds_are_refused_by_name(name: str) -> None:
    for spec in (MoeSpec(rank=2, experts=2), PromptSpec(tokens=2, at_once=2)):
        with pytest.raises(RetainError, match=f"{name}: .*{spec.kind}"):
            build(name).check(FakeModel(spec), stream())
    build(name).check(FakeModel(), stream())


def test_bad_fields_are_named_before_training() -> None:
    for spec, told in (
        ({"merge_tasks": {"merger": "tise"}}, "merge_tasks.merger: no merger 'tise'; did you mean 'ties'"),
        ({"merge_tasks": {"params": {"densty": 1}}}, "merge_tasks.params: copa: no parameter 'densty'"),
        ({"merge_tasks": {"keep": "half"}}, "merge_tasks.keep"),
        ({"merge_tasks": {"weights": ["a"]}}, "merge_tasks.weights"),
        ({"merge_tasks": {"merger": "fisher"}}, "fisher needs fishers"),
        ({"merge_after_task": {"weights": [1.0]}}, "two"),
        ({"lorahub": {"steps": 0}}, r"lorahub\.steps: must be at least 1"),
        ({"lorahub": {"space": "x"}}, "lorahub.space"),
        ({"cofima": {"lam": 2.0}}, "must be at least 0 and at most 1"),
        ({"cofima": {"space": "x"}}, "cofima.space"),
    ):
        with pytest.raises(RetainError, match=told):
            build(spec)
    with pytest.raises(RetainError, match="2 numbers for 3 tasks"):
        MergeTasks(weights=[1.0, 1.0]).check(FakeModel(), stream())
    with pytest.raises(RetainError, match="slerp takes 2 adapters, the stream has 3"):
        MergeTasks(merger="slerp").check(FakeModel(), stream())
    with pytest.raises(RetainError, match="one adapter must train"):
        model = FakeModel()
        ctx = context(model)
        model.adapters.mix = Mix()
        CoFiMA().begin_task(ctx)


def test_pocket_merge_has_seen_and_unseen_tasks() -> None:
    s = pocket_merge(n_train=4, n_test=3, n_valid=2)
    assert len(s) == 6 and [t.name for t in s.unseen] == ["icons", "digits"]
