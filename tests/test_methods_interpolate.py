"""Interpolation between before and after a task: against numpy, against losses worked out outside, and what it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fake_model import FakeModel, context, stream
from retain.method import Context, Method, Stack, build
from retain.methods import interpolate
from retain.methods.interpolate import Interpolate, between
from retain.run.train import Optim, fit
from retain.types import RetainError

OPTIM = Optim(lr=3e-2, steps=6, batch_size=4, warmup=0.0)


def contexts(model: FakeModel, log: Any = None) -> list[Context]:
    """One per task of the stream, in order."""
    names, out = [t.name for t in stream()], []
    for i, name in enumerate(names):
        ctx = context(model, name)
        ctx.seen = names[:i]
        if log is not None:
            ctx.log = log
        out.append(ctx)
    return out


def learned(
    spec: Any, n: int = 2, owner: Any = "lora"
) -> tuple[FakeModel, Method, list[dict[str, Any]], list[dict[str, Tensor]]]:
    """A model after `n` tasks, what was logged, and the raw weights at the end of each, before any part acted."""
    events: list[dict[str, Any]] = []
    raws: list[dict[str, Tensor]] = []

    class Raw(Method):
        name = "raw"

        def end_task(self, ctx: Context) -> None:
            raws.append(snapshot(ctx.model))

    model, method = FakeModel(), Stack(build(owner), Raw(), build(spec))
    for ctx in contexts(model, lambda **e: events.append(e))[:n]:
        fit(model, method, ctx, OPTIM)
    return model, method, [e for e in events if e.get("kind") == "interpolated"], raws


def snapshot(model: FakeModel) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.adapters.trainable().items()}


def test_the_point_between_is_numpys() -> None:
    a, b = (torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    for ratio in (0.0, 0.3, 0.8, 1.0):
        want = (1 - ratio) * a.double().numpy() + ratio * b.double().numpy()
        np.testing.assert_allclose(between(a, b, ratio).numpy(), want, rtol=1e-6, atol=1e-7)
        short = between(a.bfloat16(), b.bfloat16(), ratio)  # in fp32, whatever the two are
        want = (1 - ratio) * a.bfloat16().double().numpy() + ratio * b.bfloat16().double().numpy()
        np.testing.assert_allclose(short.numpy(), want, rtol=1e-6, atol=1e-7)


def test_each_task_goes_back_a_part_of_its_way() -> None:
    """The first task of an adapter keeps its weights; the second starts from them and ends between."""
    model, _, events, (first, second) = learned({"interpolate": {"ratio": 0.3}})
    for key, p in model.adapters.trainable().items():
        want = 0.7 * first[key].double() + 0.3 * second[key].double()
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-7)
        assert not torch.equal(first[key], second[key])
    assert events[0]["new"] == ["lora"] and "ratio" not in events[0]
    assert events[1]["ratio"] == 0.3 and "new" not in events[1]


def test_the_next_task_starts_from_the_point() -> None:
    whole = learned({"interpolate": {"ratio": 0.3}}, n=3)[3]
    model, method = FakeModel(), build("lora")
    point = {k: 0.7 * a + 0.3 * b for (k, a), b in zip(whole[0].items(), whole[1].values(), strict=True)}
    for i, ctx in enumerate(contexts(model)):
        if i == 2:
            model.adapters.load("lora", {k.split("/", 1)[1]: t for k, t in point.items()})
        if i != 1:
            fit(model, method, ctx, OPTIM)
    for key, t in snapshot(model).items():
        torch.testing.assert_close(t, whole[2][key], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def losses_of(model: FakeModel, kept: list[Any]) -> float:
    """Mean answer loss over answer tokens, one example at a time."""
    batches = [model.collate([e], answers=True) for e in kept]
    total = sum(float(model(b).loss) * b.n_answer for b in batches)
    return total / sum(b.n_answer for b in batches)


def test_the_ratio_of_least_loss_on_the_kept_examples_is_chosen() -> None:
    """Losses worked out anew from both ends, one example at a time, each task counting the same."""
    choices = [0.2, 0.5, 0.8, 1.0]
    model, method, events, (first, second) = learned({"interpolate": {"choose": choices, "keep": 6}})
    part = method.parts[-1]
    assert isinstance(part, Interpolate)
    a, b = stream().tasks[:2]
    train = [{e.id for e in t.train} for t in (a, b)]
    assert [{e.id for e in part.kept[t.name]} <= ids for t, ids in zip((a, b), train, strict=True)] == [
        True
    ] * 2
    assert [len(part.kept[t.name]) for t in (a, b)] == [6, 6]
    want = {}
    for ratio in choices:
        state = {k.split("/", 1)[1]: (1 - ratio) * first[k] + ratio * second[k] for k in first}
        model.adapters.load("lora", state)
        means = [losses_of(model, kept) for kept in part.kept.values()]
        want[ratio] = sum(means) / len(means)
    told = {float(k): v for k, v in events[-1]["losses"].items()}
    assert told == pytest.approx(want, rel=1e-4)
    assert events[-1]["ratio"] == min(want, key=want.get)  # type: ignore[arg-type]


def test_neither_test_nor_validation_data_are_read() -> None:
    class Shut(list):  # type: ignore[type-arg]
        def __getitem__(self, i: Any) -> Any:
            raise AssertionError("the split was read")

        __iter__ = __getitem__  # type: ignore[assignment]

    model, method = FakeModel(), build(["lora", {"interpolate": {"choose": [0.5, 1.0], "keep": 2}}])
    for ctx in contexts(model)[:2]:
        ctx.task = replace(ctx.task, test=Shut(), valid=Shut())
        fit(model, method, ctx, OPTIM)


def test_only_tasks_that_trained_the_adapter_count() -> None:
    """With an adapter per task nothing has a before: every adapter keeps its weights, and the events say so."""
    model, _, events, raws = learned(
        {"interpolate": {"choose": [0.1, 0.2], "keep": 2}}, n=3, owner="lora_per_task"
    )
    assert all(e["new"] and "ratio" not in e for e in events)
    for raw in raws:
        for key, t in raw.items():
            name, rest = key.split("/", 1)
            assert torch.equal(model.adapters.parameters(name)[rest], t)


def test_ties_go_to_the_new_and_tasks_of_other_adapters_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(interpolate, "_loss", lambda ctx, examples: asked.append(examples) or 1.0)
    part = build({"interpolate": {"choose": [0.2, 0.7, 0.4], "keep": 2}})
    assert isinstance(part, Interpolate)
    model, method, events = FakeModel(), Stack(build("lora"), part), list[dict[str, Any]]()
    for i, ctx in enumerate(contexts(model, lambda **e: events.append(e))[:2]):
        fit(model, method, ctx, OPTIM)
        if i == 0:
            part.kept = {**part.kept, "elsewhere": list(ctx.task.train[:1])}
            part.trained = {**part.trained, "elsewhere": ["another"]}
    assert events[-1]["ratio"] == 0.7 and part.kept["elsewhere"] not in asked and len(asked) == 3 * 2


def test_a_loss_that_is_no_number_ends_the_task_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0])
    monkeypatch.setattr(interpolate, "_loss", lambda ctx, examples: next(values))
    model, method = FakeModel(), build(["lora", {"interpolate": {"choose": [0.7, 0.2, 0.4], "keep": 2}}])
    first, second, _ = contexts(model)
    fit(model, method, first, OPTIM)
    with pytest.raises(
        RetainError, match=rf"the loss of task '{second.task.name}' is not finite at ratio 0\.4"
    ):
        fit(model, method, second, OPTIM)


def test_who_trained_what_is_kept_in_one_order() -> None:
    """As lists, which a state on disk holds; a task that comes again adds its adapters."""
    part, model = Interpolate(), FakeModel()
    for i, name in enumerate("cab"):
        model.adapters.add(name, torch.Generator().manual_seed(i))
    for names in (("c", "a"), ("b",)):
        model.adapters.train_only(*names)
        ctx = context(model)
        part.begin_task(ctx)
        part.end_task(ctx)
    assert part.trained == {"colour": ["a", "b", "c"]}


def test_wrong_fields_are_named() -> None:
    for options, told in (
        ({"ratio": 1.5}, r"interpolate\.ratio: must be at least 0 and at most 1, not 1\.5"),
        ({"ratio": float("nan")}, r"interpolate\.ratio"),
        ({"ratio": "half"}, r"interpolate\.ratio.*'half'"),
        ({"ratio": True}, r"interpolate\.ratio"),
        ({"choose": [0.5, -1]}, r"interpolate\.choose.*-1"),
        ({"choose": [0.5, None]}, r"interpolate\.choose"),
        ({"ratio": 0.5, "choose": [0.5]}, "not both"),
        ({"choose": [0.5], "keep": 0}, r"interpolate\.keep: must be at least 1"),
    ):
        with pytest.raises(RetainError, match=told):
            build({"interpolate": options})
