"""ModalPrompt against its transcription: which prompts, in which order, and both prototype losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_model import REQUESTS, Exact, FakeModel, example, stream
from reference import prompts as reference
from retain.adapters.prompt import PromptSpec
from retain.method import Context, build
from retain.methods.modal_prompt import ModalPrompt
from retain.run.train import Optim, fit
from retain.stream import Stream, Task
from retain.types import Batch, Output, RetainError

HOW = Optim(lr=2e-2, steps=4, batch_size=4, warmup=0)


def tasks(n: int) -> Stream:
    """Any number of tasks, over and over the three of the fake stream."""
    base = list(REQUESTS)
    return Stream("many", tuple(
        Task(f"{base[i % 3]}{i}", [replace(example(base[i % 3], k), id=f"{i}-{k}") for k in range(12)],
             [replace(example(base[i % 3], 50 + k), id=f"{i}-t{k}") for k in range(4)], Exact(), 2)
        for i in range(n)
    ))  # fmt: skip


def learn(n: int, part: ModalPrompt | None = None, at_once: int = 3) -> tuple[FakeModel, ModalPrompt, Stream]:
    """A model after `n` tasks."""
    model, s, part = FakeModel(PromptSpec(2, at_once)), tasks(n), part or ModalPrompt()
    for i, task in enumerate(s):
        fit(model, part, Context(model, task, s, [t.name for t in s][:i], seed=0), HOW)
    return model, part, s


def tensors(model: FakeModel, name: str) -> dict[str, Tensor]:
    return {k.removeprefix("prompt."): v for k, v in model.adapters.state(name).items()}


def scores(model: FakeModel, part: ModalPrompt, batch: Batch, names: Sequence[str]) -> list[list[float]]:
    guide = model.guide(batch)
    p = [reference.prototype(tensors(model, n)) for n in names]
    return [
        [reference.guidance(v, u, q, part.image_weight) for q in p]
        for v, u in zip(guide.image_BF, guide.text_BD, strict=True)
    ]


def order(mix: Any, row: int) -> list[str]:
    """Prompts from far to near, as the mix says it."""
    weight = {
        n: float(w[row]) if isinstance(w, Tensor) and w.ndim else float(w) for n, w in mix.weights.items()
    }
    return sorted((n for n in weight if weight[n]), key=lambda n: weight[n])


@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("lam", [0.5, 0.0, 1.0])
def test_prompts_and_their_order_equal_the_transcription(K: int, lam: float) -> None:
    """Every task of six: in training the transferred ones and the own, at inference the best of all."""
    part, model, s = ModalPrompt(image_weight=lam), FakeModel(PromptSpec(2, K)), tasks(6)
    batch = model.collate([e for t in s for e in t.test], answers=True)
    seen_orders = set()
    for i, task in enumerate(s):
        ctx = Context(model, task, s, [t.name for t in s][:i], seed=0)
        model.adapters.mix = part.adapt(ctx)
        names = list(part.prompt_of.values())
        old = scores(model, part, batch, names[:-1])
        mix = part.batch_mix(ctx, batch)
        part.end_task(ctx)
        routed = part.route(ctx, batch)
        every = scores(model, part, batch, names)
        for row in range(len(batch)):
            assert order(mix, row) == [names[k] for k in reference.training_order(old[row], K)]
            assert order(routed, row) == [names[k] for k in reference.inference_order(every[row], K)]
            seen_orders.add(tuple(order(routed, row)))
    assert len(seen_orders) > K, "samples must choose differently, or this could not fail"


def test_the_kept_prototypes_are_those_of_the_prompts() -> None:
    """They are computed once, when a prompt is frozen; a prompt tuned once more gets a new one."""
    model, part, s = learn(3)

    def kept_equals_now() -> bool:
        now = {n: reference.prototype(tensors(model, n)) for n in part.prompt_of.values()}
        assert list(part.prototypes) == list(now)
        return all(torch.allclose(part.prototypes[n], p, atol=1e-6) for n, p in now.items())

    assert kept_equals_now()
    before = part.prototypes["02-letter1"]
    fit(model, part, Context(model, s.tasks[1], s, [t.name for t in s], seed=0), HOW)
    assert kept_equals_now() and not torch.allclose(part.prototypes["02-letter1"], before, atol=1e-6)


def test_both_prototype_losses_are_in_the_loss() -> None:
    """The term equals the formula, its gradient reaches prompt and projection, and training pulls both cosines up."""
    for weight in (1.0, 0.25):
        model, s = FakeModel(PromptSpec(2, 3)), tasks(1)
        part = ModalPrompt(prototype_weight=weight)
        ctx = Context(model, s.tasks[0], s, [], seed=0)
        model.adapters.mix = part.adapt(ctx)
        batch = model.collate(list(s.tasks[0].train), answers=True)
        out: Output = model(batch)
        term = part.loss(ctx, batch, out)
        guide, p = model.guide(batch), reference.prototype(tensors(model, "01-colour0"))
        shown = guide.image_BF.abs().sum(1) > 0  # one drawn image is black: its feature is zero
        want = reference.losses(list(guide.image_BF[shown]), list(guide.text_BD), p) * weight
        assert isinstance(term, Tensor)
        torch.testing.assert_close(term, want, atol=1e-5, rtol=1e-5)
        term.backward()
        assert all(
            float(q.grad.abs().sum()) > 0 for q in model.adapters.trainable().values() if q.grad is not None
        )
        assert sum(q.grad is not None for q in model.adapters.trainable().values()) == 5


def test_training_minimises_both_terms() -> None:
    """Fails where the terms are computed and not added: the prototypes then stay random."""

    def cosines(part: ModalPrompt) -> tuple[float, float]:
        model, _, s = learn(1, part)
        guide = model.guide(model.collate(list(s.tasks[0].train), answers=True))
        p = reference.prototype(tensors(model, "01-colour0"))
        n = guide.image_BF.shape[1]
        image = torch.cosine_similarity(guide.image_BF, p[:n][None]).mean()
        return float(image), float(torch.cosine_similarity(guide.text_BD, p[n:][None]).mean())

    without, with_terms = cosines(ModalPrompt(prototype_weight=0.0)), cosines(ModalPrompt())
    assert with_terms[0] > without[0] + 0.1 and with_terms[1] > without[1] + 0.1


def test_every_prompt_trains_in_its_own_task_and_never_again() -> None:
    """The released code never trains the last one, and lets a step leak into old ones. Twelve tasks: two digits."""
    model, part, s = FakeModel(PromptSpec(2, 3)), ModalPrompt(), tasks(12)
    kept: dict[str, dict[str, Tensor]] = {}
    for i, task in enumerate(s):
        ctx = Context(model, task, s, [t.name for t in s][:i], seed=0)
        fresh = FakeModel(PromptSpec(2, 3))
        fresh.adapters.add("x", ctx.rng("modal_prompt"))
        fit(model, part, ctx, HOW)
        name = part.prompt_of[task.name]
        now = model.adapters.state(name)
        assert all(bool((now[k] != v).any()) for k, v in fresh.adapters.state("x").items()), name
        for old, was in kept.items():
            assert all(torch.equal(v, was[k]) for k, v in model.adapters.state(old).items()), old
        kept[name] = now
    assert list(part.prompt_of.values())[-1] == "12-again11" and len(kept) == 12


def test_text_only_samples_are_guided_by_their_text() -> None:
    model, part, s = learn(4)
    bare = [replace(e, images=()) for e in s.tasks[1].test]
    assert float(model.guide(model.collate(bare, answers=False)).image_BF.abs().sum()) == 0
    ctx = Context(model, s.tasks[3], s, [t.name for t in s][:3], seed=0)
    mixed = model.collate([*bare, *s.tasks[0].test], answers=True)
    routed = part.route(ctx, mixed)
    names = list(part.prompt_of.values())
    guide = model.guide(mixed)
    for row in range(len(bare)):
        p = [reference.prototype(tensors(model, n))[-7:] for n in names]
        text = [float(torch.cosine_similarity(guide.text_BD[row], q, dim=0)) for q in p]
        assert order(routed, row) == [names[k] for k in reference.inference_order(text, 3)]
    # the image term is that of the samples with images, and none where there are none
    p = reference.prototype(tensors(model, names[-1]))
    shown = guide.image_BF.abs().sum(1) > 0
    want = reference.losses(list(guide.image_BF[shown]), list(guide.text_BD), p)
    torch.testing.assert_close(part.loss(ctx, mixed, model(mixed)), want, atol=1e-5, rtol=1e-5)
    alone = model.collate(bare, answers=True)
    text_term = 1 - torch.cosine_similarity(model.guide(alone).text_BD, p[None, -7:]).mean()
    torch.testing.assert_close(part.loss(ctx, alone, model(alone)), text_term, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert len(model.generate(model.collate(bare, answers=False), 2)) == len(bare)


def test_samples_of_one_batch_train_behind_prompts_of_their_own() -> None:
    """Transfer is per sample: the model sees the mix that `batch_mix` gave, not the first sample's."""
    model, part, s = learn(5, at_once=2)
    mixed = replace(s.tasks[4], train=[e for t in s for e in t.train])  # as with replay
    ctx = Context(model, mixed, s, [t.name for t in s][:4], seed=0)
    batch = model.collate([t.test[0] for t in s], answers=True)
    mix = part.batch_mix(ctx, batch)
    assert mix is not None and len({tuple(order(mix, i)) for i in range(5)}) > 1
    seen = []
    real = model.forward

    def spy(b: Batch) -> Output:
        seen.append([tuple(order(model.adapters.mix, i)) for i in range(len(b))])
        return real(b)

    model.forward = spy  # type: ignore[method-assign]
    fit(model, part, ctx, HOW)
    assert any(len(set(rows)) > 1 for rows in seen)
    assert all(rows[-1] == "05-letter4" and len(rows) == 2 for batch_rows in seen for rows in batch_rows)


def test_it_runs_with_replay() -> None:
    model, s = FakeModel(PromptSpec(2, 2)), stream()
    method = build(["modal_prompt", {"replay": {"size": 4, "strategy": "per_task"}}])
    for i, task in enumerate(s):
        ctx = Context(model, task, s, [t.name for t in s][:i], seed=0)
        stats = fit(model, method, ctx, HOW)
        in_front = 2 * min(i + 1, 2)
        assert stats.tokens > stats.samples * in_front, "prompt tokens count"
        met = {e.id.split("-")[0] for e in method.parts[1].buffer}  # type: ignore[attr-defined]
        assert met == {t.name for t in s.tasks[: i + 1]}
    assert len(model.adapters.names) == 3


@pytest.mark.parametrize(
    "options", [{"image_weight": 1.5}, {"image_weight": -0.1}, {"prototype_weight": -1.0}]
)
def test_bad_fields_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RetainError, match=r"modal_prompt\.(image|prototype)_weight: must be at least 0"):
        build({"modal_prompt": options})
