"""HiDe-LLaVA and DISCO: the papers' formulas, their limits, and the traps of the released code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from fake_model import REQUESTS, FakeModel, context, example, stream
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.method import Context, Method
from retain.methods import disco as disco_file
from retain.methods import hide as hide_file
from retain.methods._parts import mean_features
from retain.methods.disco import Disco, Token, activation, cosines, match, organise
from retain.methods.hide import Hide, expansion
from retain.methods.lora import Lora
from retain.methods.lora_per_task import LoraPerTask
from retain.run.evaluate import _weights
from retain.run.train import Optim, fit
from retain.stream import Stream, Task
from retain.types import Batch, Guide, RetainError


def _reference(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "reference" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ref = _reference("routes")
TASKS = list(REQUESTS)


def learned(part: Method, *names: str, spec: LoraSpec | None = None) -> FakeModel:
    """A model that has been through some tasks; what was trained is noise of its own."""
    model = FakeModel(spec)
    for i, name in enumerate(names):
        ctx = context(model, name, names[:i])
        model.adapters.mix = part.adapt(ctx)
        rng = torch.Generator().manual_seed(i)
        for p in model.adapters.trainable().values():
            p.data += 0.3 * torch.randn(p.shape, generator=rng)
        part.end_task(ctx)
    return model


def mixed(model: FakeModel) -> Batch:
    """A sample of each task, and one more."""
    return model.collate(
        [*(example(t, 50 + i) for i, t in enumerate(TASKS)), example("letter", 61)], answers=False
    )


def route(part: Method, model: FakeModel) -> Mix:
    mix = part.route(context(model, "again"), mixed(model))
    assert mix is not None
    return mix


def outputs(model: FakeModel, mix: Mix) -> Tensor:
    """Logits at every place, adapters on."""
    inputs = mixed(model).inputs
    with torch.no_grad(), model.adapters.using(mix):
        return model.hidden(inputs["input_ids"], inputs["attention_mask"].float(), inputs["pixels"])


def at_layer(model: FakeModel, mix: Mix, layer: int, x: Tensor) -> Tensor:
    with torch.no_grad(), model.adapters.using(mix):
        return model.net.language.layers[layer]["up"](x)


def factors(model: FakeModel, layer: int, names: list[str]) -> tuple[Any, ...]:
    """W, bias, and all A and B of a layer in float64."""
    site = model.net.language.layers[layer]["up"]
    a = [site.lora_A[n].detach().double().numpy() for n in names]
    b = [site.lora_B[n].detach().double().numpy() for n in names]
    return site.base.weight.double().numpy(), site.base.bias.double().numpy(), a, b


X = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(7))


def every_token(x: Tensor, function: Any) -> Tensor:
    """A function of (sample, token vector) at every place of (B, T, D)."""
    rows = [[function(b, h) for h in row.double().numpy()] for b, row in enumerate(x)]
    return torch.tensor(np.array(rows))


# -- HiDe: the formulas --------------------------------------------------------------------------------------


def hide_reference(part: Hide, model: FakeModel) -> list[list[float]]:
    guide = model.guide(mixed(model))
    image, text = guide.image_BF.double().numpy(), guide.text_BD.double().numpy()
    V, U = ([t.double().numpy() for t in a.values()] for a in (part.image_anchor, part.text_anchor))
    weigh = (part.image_weight, part.text_weight, part.temperature)
    return [ref.hide_weights(i, t, V, U, *weigh) for i, t in zip(image, text, strict=True)]


@pytest.mark.parametrize("fusion", ["factor_sum", "delta_sum"])
def test_hide_equals_the_papers_formulas_at_every_layer(fusion: str) -> None:
    part = Hide(fusion=fusion, image_weight=0.3, text_weight=0.9, temperature=0.2)
    model = learned(part, *TASKS)
    mix, names, d = route(part, model), list(part.adapter_of.values()), hide_reference(part, model)
    W, bias, A, B = factors(model, 1, names)
    want = every_token(X, lambda b, h: ref.blended(W, bias, h, A, B, d[b], 2.0))
    torch.testing.assert_close(at_layer(model, mix, 1, X).double(), want, atol=2e-6, rtol=2e-6)  # fp32
    W, bias, A, B = factors(model, 0, names)
    ones = [1.0] * len(names)
    if fusion == "factor_sum":
        want = every_token(X, lambda b, h: ref.factor_sum(W, bias, h, A, B, 2.0))
    else:
        want = every_token(X, lambda b, h: ref.blended(W, bias, h, A, B, ones, 2.0))
    torch.testing.assert_close(at_layer(model, mix, 0, X).double(), want, atol=4e-6, rtol=4e-6)


def test_only_the_top_layers_tell_samples_apart() -> None:
    part = Hide()
    mix = route(part, learned(part, *TASKS))
    assert dict(mix.at(0)) == {"fused": 1.0} == dict(mix.at(None))
    assert all(isinstance(w, Tensor) and w.shape == (4,) for w in mix.at(1).values())


@pytest.mark.parametrize("fusion", ["factor_sum", "delta_sum"])
def test_one_task_is_that_lora_in_every_layer(fusion: str) -> None:
    part = Hide(fusion=fusion)
    model = learned(part, "colour")
    assert torch.equal(outputs(model, route(part, model)), outputs(model, Mix({"01-colour": 1.0})))


@pytest.mark.parametrize("temperature", [0.0, 1e-5])
def test_a_cold_softmax_is_the_best_expert_alone(temperature: float) -> None:
    part = Hide(temperature=temperature)
    model = learned(part, *TASKS)
    mix, names = route(part, model), list(part.adapter_of.values())
    best = np.argmax(hide_reference(cooler(part, 0.1), model), axis=1)
    for b, c in enumerate(best):
        alone = at_layer(model, Mix({names[c]: 1.0}), 1, X[b : b + 1])
        torch.testing.assert_close(at_layer(model, mix, 1, X)[b : b + 1], alone)


def cooler(part: Hide, temperature: float) -> Hide:
    other = Hide(temperature=temperature)
    other.load_state_dict(part.state_dict())
    return other


def test_the_sum_that_is_carried_on_is_that_of_all_adapters() -> None:
    """A task adds its own factors to the sum; a task learned once more is not counted twice."""
    part = Hide(coefficient=0.5)
    model = learned(part, *TASKS)

    def check() -> None:
        states = [model.adapters.state(n) for n in part.adapter_of.values()]
        fused, want = model.adapters.state("fused"), hide_file.factor_sum(states, 0.5)
        assert fused.keys() == want.keys()
        for key, tensor in want.items():
            torch.testing.assert_close(fused[key], tensor, atol=1e-6, rtol=1e-6)

    check()
    ctx = context(model, TASKS[0], TASKS)
    part.adapt(ctx)
    for p in model.adapters.trainable().values():
        p.data += 1.0
    part.end_task(ctx)
    check()


def test_equal_anchors_give_equal_weights() -> None:
    guide = Guide(torch.nn.functional.normalize(torch.randn(3, 5), dim=-1), torch.eye(7)[:3])
    d_BK = expansion(guide, torch.ones(4, 5), torch.ones(4, 7), 0.5, 0.5, 0.1)
    torch.testing.assert_close(d_BK, torch.full((3, 4), 0.25))


def test_the_two_fusions_differ_by_the_cross_terms() -> None:
    parts = [Hide(fusion="factor_sum"), Hide(fusion="delta_sum")]
    (one, other), (m1, m2) = parts, [learned(p, *TASKS) for p in parts]
    names = list(one.adapter_of.values())
    _, _, A, B = factors(m1, 0, names)
    cross = sum(B[i] @ A[j] for i in range(3) for j in range(3) if i != j)
    want = every_token(X, lambda b, h: 2.0 * cross @ h)
    got = at_layer(m1, route(one, m1), 0, X) - at_layer(m2, route(other, m2), 0, X)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)  # a difference of fp32 values


@pytest.mark.parametrize("fusion", ["factor_sum", "delta_sum"])
def test_top_k_from_merge_all_to_expand_all(fusion: str) -> None:
    merge, expand = Hide(fusion=fusion, top_k=0), Hide(fusion=fusion, top_k=2)
    model = learned(merge, *TASKS)
    expand.load_state_dict(merge.state_dict())
    names, newest = list(merge.adapter_of.values()), "03-again"
    summed = {"fused": 1.0} if fusion == "factor_sum" else dict.fromkeys(names, 1.0)
    everywhere = Mix({newest: 1.0}, dict.fromkeys((0, 1), summed))
    assert torch.equal(outputs(model, route(merge, model)), outputs(model, everywhere))
    d = torch.tensor(hide_reference(expand, model)).float()
    blend = {n: d[:, k] for k, n in enumerate(names)}
    everywhere = Mix({newest: 1.0}, dict.fromkeys((0, 1), blend))
    torch.testing.assert_close(outputs(model, route(expand, model)), outputs(model, everywhere))


def test_the_coefficient_scales_the_fused_update_of_both_kinds() -> None:
    for fusion in ("factor_sum", "delta_sum"):
        parts = [Hide(fusion=fusion, coefficient=c) for c in (1.0, 0.25)]
        models = [learned(p, *TASKS) for p in parts]
        base = models[0].net.language.layers[0]["up"].base(X)
        full, quarter = (at_layer(m, route(p, m), 0, X) - base for p, m in zip(parts, models, strict=True))
        torch.testing.assert_close(quarter, full / 4, atol=1e-5, rtol=1e-5)


# -- HiDe: the traps of the released code --------------------------------------------------------------------


def fake_features(rows: Tensor) -> Any:
    """A context whose guide gives these rows, twice."""
    model = SimpleNamespace(collate=lambda e, answers: e, guide=lambda e: Guide(rows[list(e)], rows[list(e)]))
    return SimpleNamespace(
        model=model, task=SimpleNamespace(train=range(len(rows))), batch_size=32, micro_size=32
    )


def test_anchors_never_stop_moving() -> None:
    """There the counter is bf16 and ends at 8,192 for batches of 32: later samples count too much or not at all."""
    rows = torch.cat([torch.randn(9000, 5), torch.randn(9000, 5) + 3])
    image_F, text_D = mean_features(fake_features(rows), range(len(rows)))
    torch.testing.assert_close(image_F, rows.double().mean(0).float(), atol=1e-5, rtol=0)
    assert torch.equal(image_F, text_D) and image_F.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 4, 7, 24])
def test_anchors_streamed_over_shards_are_the_mean_of_all(size: int) -> None:
    """There a random vector is the first sample, and one process's share is all that is seen."""
    part, model = Hide(), FakeModel()
    ctx = context(model, "letter")
    ctx.batch_size = size
    part.adapt(ctx)
    part.end_task(ctx)
    guide = model.guide(model.collate(list(stream().named("letter").train), answers=False))
    torch.testing.assert_close(part.image_anchor["01-letter"], guide.image_BF.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(part.text_anchor["01-letter"], guide.text_BD.mean(0), atol=1e-6, rtol=0)


def test_tasks_to_come_get_no_weight_and_their_number_is_free() -> None:
    part = Hide()
    model = learned(part, "colour", "letter")
    d = route(part, model).at(1)
    assert list(d) == ["01-colour", "02-letter"]
    torch.testing.assert_close(sum(d.values()), torch.ones(4))
    many, other = Hide(), FakeModel()
    tasks = tuple(Task(f"t{k}", [example(TASKS[k % 3], k)], [], stream()[0].score) for k in range(9))
    for task in tasks:
        ctx = Context(other, task, Stream("nine", tasks), [], seed=0, batch_size=4)
        other.adapters.mix = many.adapt(ctx)
        many.end_task(ctx)
    assert len(route(many, other).at(1)) == 9


@pytest.mark.parametrize("make", [Hide, Disco])
def test_a_task_trains_its_own_lora_alone_and_the_projector_goes_on(make: type[Method]) -> None:
    """There tasks 2 to 8 of CoIN ran a plain trainer, all as task 1."""
    part, model = make(**({"tau": 2.0} if make is Disco else {})), FakeModel()
    optim, kept = Optim(lr=1e-2, steps=3, batch_size=4, warmup=0), dict[str, Any]()
    for i, task in enumerate(TASKS):
        fit(model, part, context(model, task, TASKS[:i]), optim)
        name = f"{i + 1:02d}-{task}"
        assert dict(model.adapters.mix.weights) == {name: 1.0} and not model.adapters.mix.by_layer
        for old, state in kept.items():
            assert all(torch.equal(t, state[k]) for k, t in model.adapters.state(old).items()), old
        kept[name] = model.adapters.state(name)
    projector = "projector.weight"
    start = learned(make(**({"tau": 2.0} if make is Disco else {})), "colour")
    second = context(start, "letter", ["colour"])
    other = make(**({"tau": 2.0} if make is Disco else {}))
    other.load_state_dict(learnt_state(start, make))
    other.adapt(second)
    first, new = start.adapters.state("01-colour"), start.adapters.state("02-letter")
    assert torch.equal(first[projector], new[projector]) and first[projector].abs().sum() > 0
    assert not any(t.any() for k, t in new.items() if k.endswith("lora_B"))
    mix = route(part, model)
    site = model.adapters.sites["projector"]
    assert sum(float(w) for w in mix.at(None).values()) == 1.0
    on = next(iter(mix.at(None)))
    assert torch.equal(site.tensors(on)["weight"], site.tensors("03-again")["weight"])


def learnt_state(model: FakeModel, make: type[Method]) -> dict[str, Any]:
    """The state of a method that made this model's first adapter."""
    part = make(**({"tau": 2.0} if make is Disco else {}))
    other = FakeModel()
    ctx = context(other, "colour")
    part.adapt(ctx)
    part.end_task(ctx)
    return part.state_dict()


def test_the_top_layer_is_the_models_last_one() -> None:
    """There it is number 31, whatever the model."""
    part, model = Hide(), tiny.HFModel(*tiny.llava(text={"num_hidden_layers": 5}), tiny.SPEC)
    two = (Task(f"t{k}", tiny.examples()[3 * k : 3 * k + 3], [], stream()[0].score) for k in range(2))
    both = Stream("two", tuple(two))
    for task in both:
        ctx = Context(model, task, both, [], seed=0, batch_size=2)
        model.adapters.mix = part.adapt(ctx)
        part.end_task(ctx)
    mix = part.route(ctx, model.collate(tiny.examples(), answers=False))
    assert mix is not None and sorted(mix.by_layer) == list(range(5))
    assert [list(mix.at(i)) for i in range(5)] == [["fused"]] * 4 + [["01-t0", "02-t1"]]


def test_weights_of_the_prompt_hold_for_every_token_and_sample() -> None:
    """There the batch's mean routes all samples."""
    model = tiny.model()
    part, examples = Hide(temperature=0.02), tiny.examples()
    two = Stream(
        "two", tuple(Task(f"t{k}", examples[3 * k : 3 * k + 3], [], stream()[0].score) for k in range(2))
    )
    for k, task in enumerate(two):
        ctx = Context(model, task, two, [], seed=0, batch_size=2)
        part.adapt(ctx)
        rng = torch.Generator().manual_seed(k)
        for p in model.adapters.trainable().values():
            p.data = 0.4 * torch.randn(p.shape, generator=rng)
        part.end_task(ctx)

    def answers(of: list[Any]) -> list[str]:
        batch = model.collate(of, answers=False)
        mix = part.route(ctx, batch)
        assert mix is not None
        with model.adapters.using(mix):
            return model.generate(batch, 6)

    assert answers(examples) == [a for e in examples for a in answers([e])]


def test_predictions_keep_the_weights_that_told_samples_apart() -> None:
    part = Hide()
    model = learned(part, *TASKS)
    kept = [_weights(route(part, model), b) for b in range(4)]
    want = hide_reference(part, model)
    for row, d in zip(kept, want, strict=True):
        assert row == pytest.approx(
            {n: w for n, w in zip(part.adapter_of.values(), d, strict=True) if w > 1e-4}, abs=1e-4
        )


# -- DISCO ---------------------------------------------------------------------------------------------------


def token(seed: int, n: int = 10) -> Token:
    rng = torch.Generator().manual_seed(seed)
    return Token(torch.randn(5, generator=rng), torch.randn(7, generator=rng), n)


def test_matching_equals_the_papers_rule() -> None:
    ours: list[Token] = []
    theirs: list[tuple[Any, int]] = []
    rng = torch.Generator().manual_seed(0)
    near = torch.randn(3, 7, generator=rng)
    slots = []
    for i in range(30):
        text = near[i % 3] + 0.35 * torch.randn(7, generator=rng)
        n = int(torch.randint(1, 50, (), generator=rng))
        ours, (slot,) = organise(ours, [Token(torch.zeros(5), text, n)], 0.9)
        slots.append(slot)
        assert slot == ref.dko(theirs, text.double().numpy(), n, 0.9)
    assert 3 <= len(ours) < 20 and len(set(slots)) == len(ours)
    for mine, (mu, n) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.text_D.double(), torch.tensor(mu), atol=1e-5, rtol=1e-5)
        assert mine.n == n


def test_two_new_and_similar_uploads_share_one_new_entry() -> None:
    """There both train the same first empty slot, and one of them is lost."""
    a, b, c = token(1), token(2, 99), token(1, 3)
    cache, slots = organise([], [a, b, c], 0.9)
    assert slots == [1, 0, 1] and [t.n for t in cache] == [99, 13]
    assert match(a, cache, 0.9) == 1 and match(token(5), cache, 0.9) is None and match(a, [], -1.0) is None


def test_activation_sums_to_one_and_knows_directions_only() -> None:
    guide = FakeModel().guide(mixed(FakeModel()))
    cache = [token(i) for i in range(4)]
    alpha = activation(cosines(guide, cache, 0.0), 0.05)
    torch.testing.assert_close(alpha.sum(1), torch.ones(4))
    longer = [Token(7 * t.image_F, 3 * t.text_D, t.n) for t in cache]
    torch.testing.assert_close(activation(cosines(guide, longer, 0.0), 0.05), alpha)
    turned = [cache[i] for i in (2, 0, 3, 1)]
    torch.testing.assert_close(activation(cosines(guide, turned, 0.0), 0.05), alpha[:, [2, 0, 3, 1]])
    torch.testing.assert_close(activation(cosines(guide, cache, 0.0), 1e9), torch.full((4, 4), 0.25))


def test_disco_equals_the_papers_formula_at_every_layer() -> None:
    part = Disco(tau=2.0)
    model = learned(part, *TASKS)
    mix, names = route(part, model), list(part.count)
    mu = [t.double().numpy() for t in part.text_mean.values()]
    texts = model.guide(mixed(model)).text_BD.double().numpy()
    alpha = [ref.softmax([ref.cos(x, m) / 0.05 for m in mu]) for x in texts]
    assert max(max(a) for a in alpha) < 0.9999  # a blend, not a choice
    for layer in (0, 1):
        W, bias, A, B = factors(model, layer, names)
        want = every_token(
            X, lambda b, h, W=W, bias=bias, A=A, B=B: ref.disco(W, bias, h, A, B, alpha[b], 2.0)
        )
        torch.testing.assert_close(at_layer(model, mix, layer, X).double(), want, atol=2e-6, rtol=2e-6)


def test_a_cold_activation_is_one_subspace_alone() -> None:
    part = Disco(tau=2.0, eps=1e-5)
    model = learned(part, "colour", "letter")
    mix = route(part, model)
    for b, task in enumerate(["01-colour", "02-letter"]):
        alone = at_layer(model, Mix({task: 1.0}), 0, X[b : b + 1])
        torch.testing.assert_close(at_layer(model, mix, 0, X)[b : b + 1], alone)


def test_a_like_task_trains_the_subspace_it_matched() -> None:
    part = Disco(tau=0.8)  # "colour" and "again" share their instruction
    model = learned(part, *TASKS)
    assert part.group_of == {"colour": "01-colour", "letter": "02-letter", "again": "01-colour"}
    assert part.count == {"01-colour": 48, "02-letter": 24} and model.adapters.names == [
        "01-colour",
        "02-letter",
    ]
    both = [example_of for t in ("colour", "again") for example_of in stream().named(t).train]
    text = model.guide(model.collate(both, answers=False)).text_BD.mean(0)
    torch.testing.assert_close(part.text_mean["01-colour"], text, atol=1e-6, rtol=0)


def test_one_subspace_is_sequential_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Context.rng
    monkeypatch.setattr(Context, "rng", lambda self, who: real(self, "lora" if who == "disco" else who))
    states = []
    for part in (Disco(tau=-1.0), Lora()):
        model = FakeModel()
        for i, task in enumerate(TASKS):
            fit(model, part, context(model, task, TASKS[:i]), Optim(lr=1e-2, steps=4, batch_size=4))
        states.append(model.adapters.state(model.adapters.names[0]))
        assert len(model.adapters.names) == 1
    assert all(torch.equal(states[0][k], t) for k, t in states[1].items())


@pytest.mark.parametrize("image_weight", [0.0, 0.5])
def test_lora_per_task_with_soft_routing_is_a_degenerate_disco(
    image_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tau above one (a subspace per task), no projector: the same training and the same answers."""
    real = Context.rng
    monkeypatch.setattr(Context, "rng", lambda self, who: real(self, who.replace("disco", "lora_per_task")))
    frozen = LoraSpec(rank=2, alpha=4.0, dense="")
    frame = LoraPerTask(temperature=0.05, image_weight=image_weight)
    parts = (Disco(tau=2.0, eps=0.05, image_weight=image_weight), frame)
    logits = []
    for part in parts:
        model = FakeModel(frozen)
        for i, task in enumerate(TASKS):
            fit(model, part, context(model, task, TASKS[:i]), Optim(lr=3e-2, steps=6, batch_size=4))
        logits.append(outputs(model, route(part, model)))
    torch.testing.assert_close(
        logits[0], logits[1], atol=1e-5, rtol=1e-5
    )  # anchors are summed in another order
    assert (logits[1] - outputs(model, Mix())).abs().max() > 0.05


# -- bad input -----------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused_before_training() -> None:
    model, tasks = FakeModel(), stream()
    with pytest.raises(RetainError, match=r"hide\.top_k: 3 is more than the model's 2 layers"):
        Hide(top_k=3).check(model, tasks)
    blind: Any = tiny.HFModel(*tiny.llava(), LoraSpec(rank=2, targets="all"))
    one = Stream("one", (Task("t", tiny.examples(), [], tasks[0].score),))
    for part in (Hide(), LoraPerTask()):
        with pytest.raises(
            RetainError, match=f"{part.name}: it routes by frozen features, and .*model.guide"
        ):
            part.check(blind, one)
    for part in (Hide(fusion="delta_sum"), Disco()):
        with pytest.raises(RetainError, match=r"adapter\.targets puts LoRA on 'model\.vision_tower"):
            part.check(blind, one)
    for part in (Hide(), Hide(top_k=2, fusion="delta_sum"), Hide(top_k=0), Disco(), LoraPerTask()):
        part.check(model, tasks)


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (Hide, {"fusion": "sum"}, "hide.fusion: 'sum' is none of"),
        (Hide, {"top_k": -1}, "hide.top_k"),
        (Hide, {"temperature": -0.1}, "hide.temperature"),
        (Disco, {"eps": 0.0}, "disco.eps: must be at least"),
        (Disco, {"image_weight": 1.5}, "image_weight"),
    ],
)
def test_bad_fields_are_named(make: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RetainError, match=words):
        make(**fields)


def test_a_second_adapter_of_another_rank_is_refused_by_its_rank() -> None:
    bank, other = FakeModel(LoraSpec(rank=2)).adapters, FakeModel(LoraSpec(rank=5)).adapters
    bank.add("mine", torch.Generator())
    other.add("theirs", torch.Generator())
    with pytest.raises(RetainError, match=r"'mine'.*rank 5, this model's adapters have rank 2"):
        bank.load("mine", other.state("theirs"))


def test_the_files_import_as_a_server_would() -> None:
    """The maths needs no model, no context and no class of ours."""
    assert hide_file.factor_sum([{"x.lora_A": torch.ones(1, 2)}])["x.lora_A"].tolist() == [[1, 1]]
    assert disco_file.organise([], [], 0.9) == ([], [])
