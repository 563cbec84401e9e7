"""model_tailor in a stream: what it leaves is the patch of the weights, layer by layer, and nothing else moves."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import retain.methods._merging as merging
from fake_model import FakeModel, context, stream
from reference import merge as reference
from retain.adapters.bank import Mix
from retain.merge.parts import split
from retain.methods._parts import take
from retain.methods.model_tailor import ModelTailor, _block, _change
from retain.run.train import Optim, fit
from retain.types import RetainError


def learn(method: ModelTailor, tasks: int) -> tuple[FakeModel, list[dict[str, Tensor]]]:
    """A model after some tasks, and every layer's weight (bias: one more column) after each task."""
    model, seen = FakeModel(), list[str]()
    weights = [whole(model)]
    for task in stream()[:tasks]:
        fit(model, method, context(model, task.name, seen), Optim(lr=5e-2, steps=6, batch_size=4))
        seen.append(task.name)
        weights.append(whole(model))
    return model, weights


def whole(model: FakeModel) -> dict[str, Tensor]:
    """The weights that the mix makes, as `_change` shapes them."""
    bank, out = model.adapters, {}
    states = [split(merging.changes(bank, n)) for n in bank.mix.names]
    for path, site in bank.sites.items():
        out[path] = site.base.weight.detach().clone()
        if site.group == "projector":
            out[path] = torch.cat([out[path], site.base.bias.detach()[:, None]], 1)
        for state in states:
            if path in state or f"{path}.weight" in state:
                out[path] += _change(state, path)
    return out


class Watch(ModelTailor):
    """Keeps the weights as they are after the last step."""

    tuned: ClassVar[list[dict[str, Tensor]]] = []

    def end_task(self, ctx: Any) -> None:
        type(self).tuned.append(whole(ctx.model))
        super().end_task(ctx)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sensitivity": "code", "sparsity": 0.6},
        {"sign": 1},
        {"decorate": False},
        {"projector": "restore"},
    ],
    ids=str,
)
def test_the_accepted_model_is_the_patch_of_the_formula(options: dict[str, Any]) -> None:
    """Two tasks. The check writes the patched weights into a plain model, block by block, and reads inputs there."""
    Watch.tuned = []
    method = Watch(samples=5, **options)
    _, accepted = learn(method, 2)
    for t, task in enumerate(stream()[:2]):
        old, tuned, got = accepted[t], Watch.tuned[t], accepted[t + 1]
        plain = FakeModel()
        layers = {path: site.base for path, site in plain.adapters.sites.items()}
        for path, layer in layers.items():
            write(layer, tuned[path])
        rows = take(24, 5, context(plain, task.name).rng("model_tailor"))
        for path, layer in layers.items():
            if path == "projector" and options.get("projector") == "restore":
                want = old[path]
            else:
                xs = inputs(plain, layer, [task.train[r] for r in rows], bias=path == "projector")
                want = torch.tensor(
                    reference.model_tailor(
                        old[path].tolist(),
                        tuned[path].tolist(),
                        xs.tolist(),
                        options.get("sparsity", 0.9),
                        code="sensitivity" in options,
                        decorate=options.get("decorate", True),
                        sign=options.get("sign", -1),
                    )
                )
            torch.testing.assert_close(got[path], want, atol=2e-5, rtol=1e-4)
            assert (got[path] - tuned[path]).abs().max() > 1e-3
            write(layer, got[path])


def write(layer: Any, weight: Tensor) -> None:
    n = layer.weight.shape[1]
    layer.weight.data = weight[:, :n].clone()
    if weight.shape[1] > n:
        layer.bias.data = weight[:, n].clone()


def inputs(model: FakeModel, layer: Any, examples: list[Any], *, bias: bool) -> Tensor:
    """Rows (N, I) that a layer reads, of single samples."""
    rows: list[Tensor] = []
    hook = layer.register_forward_pre_hook(
        lambda _, x: rows.append(x[0].detach().reshape(-1, x[0].shape[-1]))
    )
    with torch.no_grad():
        for e in examples:
            model(model.collate([e], answers=True))
    hook.remove()
    x = torch.cat(rows)
    return torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x


def test_nine_tenths_of_the_entries_are_those_of_the_accepted_model() -> None:
    _, (base, first, second) = learn(ModelTailor(samples=4), 2)
    for old, new in ((base, first), (first, second)):
        for path in old:
            moved = (old[path] - new[path]).abs() > 1e-6
            assert float(moved.float().mean()) == pytest.approx(0.1, abs=0.03)


def test_all_of_it_undone_is_the_base_model() -> None:
    """sparsity 1, after two tasks; the model's own forward says so too, not only sums of factors."""
    model, weights = learn(ModelTailor(sparsity=1.0, samples=2), 2)
    for path, w in weights[0].items():
        torch.testing.assert_close(weights[2][path], w, atol=1e-6, rtol=0)
    batch, model_ = model.collate(list(stream()[0].test), answers=True), model.train(False)
    with torch.no_grad():
        here = model_(batch).logits_NV
        with model.adapters.using(Mix()):
            torch.testing.assert_close(here, model_(batch).logits_NV, atol=1e-5, rtol=1e-5)


def test_a_truncated_correction_tells_its_error() -> None:
    events, corrections = list[dict[str, Any]](), list[dict[str, Tensor]]()
    for rank in (0, 3):
        method, model = ModelTailor(samples=4, rank=rank), FakeModel()
        ctx = context(model)
        ctx.log = lambda **event: events.append(event)
        fit(model, method, ctx, Optim(lr=5e-2, steps=4, batch_size=4))
        assert len(method.patch) == (6 if rank == 0 else 2)  # 12 inputs, or 3, at the bank's rank of 2
        assert not set(method.patch) & {k.split("/")[0] for k in model.adapters.trainable()}
        stored = {k for n in method.patch for k in model.adapters.state(n)}
        assert not any("projector" in k for k in stored)  # it is patched in place: nothing to store beside it
        states = [split(merging.changes(model.adapters, n)) for n in method.patch]
        paths = [p for p, s in model.adapters.sites.items() if s.group == "lora"]
        corrections.append({p: sum(_change(s, p) for s in states) for p in paths})
    exact, small = (e for e in events if e["kind"] == "model_tailor")
    first = paths[0]  # its inputs do not depend on how others are stored
    values = torch.linalg.svdvals(corrections[0][first])
    lost = float(values[3:].norm() / values.norm())
    gap = (corrections[1][first] - corrections[0][first]).norm() / corrections[0][first].norm()
    assert float(gap) == pytest.approx(lost, rel=1e-3) and lost > 0.01
    assert exact["max_error"] == 0 and small["max_error"] >= lost * 0.999


def test_a_patch_forgets_less_and_compensation_earns_its_place() -> None:
    """Shares of plain tuning's loss rise on the old task and of its gain on the new one, frozen from this fixture.

    Here .38 and .38; without compensation .51 and .28, with the released sign .61 and .24. The specification hoped
    for 1/3 and .7: a thousand weights have no tenth that carries a task.
    """

    def second_task(share: float, **options: Any) -> tuple[list[float], list[float]]:
        model, method, seen = FakeModel(), ModelTailor(samples=24, **options), list[str]()
        rows = []
        for task, s in zip(stream(), (0.0, share)):
            method.sparsity = s
            fit(model, method, context(model, task.name, seen), Optim(lr=5e-2, steps=20, batch_size=4))
            seen.append(task.name)
            rows.append([loss(model.train(False), t) for t in (0, 1)])
        return rows[0], rows[1]

    before, plain = second_task(0.0)

    def shares(**options: Any) -> tuple[float, float]:
        _, after = second_task(0.9, **options)
        return (after[0] - before[0]) / (plain[0] - before[0]), (before[1] - after[1]) / (
            before[1] - plain[1]
        )

    (rise, gain), (bare_rise, bare_gain), (added_rise, added_gain) = (
        shares(), shares(decorate=False), shares(sign=1)
    )  # fmt: skip
    assert rise < 0.45 and gain > 0.3
    assert rise < bare_rise < added_rise and gain > bare_gain > added_gain


@torch.no_grad()
def loss(model: FakeModel, task: int) -> float:
    return float(model(model.collate(list(stream()[task].test), answers=True)).loss)


def test_blocks() -> None:
    for path, block in (
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("tower.blocks.11.attn.qkv", "tower.blocks.11"),
        ("model.projector.linear_1", "model.projector.linear_1"),
        ("merger.mlp.0", "merger.mlp.0"),
    ):
        assert _block(path) == block


def test_bad_fields_are_named() -> None:
    for fields, told in (
        ({"sparsity": 1.5}, "must be at least 0 and at most 1"),
        ({"sign": 0}, "sign: 0 is none of"),
        ({"samples": 0}, "samples: must be at least 1"),
        ({"sensitivity": "x"}, "model_tailor.sensitivity"),
        ({"projector": "x"}, "model_tailor.projector"),
    ):
        with pytest.raises(RetainError, match=told):
            ModelTailor(**fields)  # type: ignore[arg-type]
    model = FakeModel()
    site: Any = next(iter(model.adapters.sites.values()))
    site.base.weight = torch.nn.Parameter(torch.zeros(7))  # as a quantised layer packs it
    ModelTailor().check(model, stream())
    with pytest.raises(RetainError, match="quantised; take 'obs'"):
        ModelTailor(sensitivity="code").check(model, stream())
