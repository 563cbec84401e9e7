"""The laws: one battery that every method joins with one line in SPECS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_model import FakeModel, context, stream
from retain.adapters.kinds import Spec
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import MoeSpec
from retain.adapters.prompt import PromptSpec
from retain.method import Method, Stack, available, build
from retain.run import continual
from retain.run.continual import Silent, run
from retain.run.store import RunDir, load_state, save_state
from retain.run.train import Optim
from retain.types import Conflict, RetainError, digest

# One line per method, and stacks. Everything here must hold every law.
SPECS: dict[str, Any] = {
    "zero_shot": "zero_shot",
    "lora": "lora",
    "lora_per_task": "lora_per_task",
    "lora_per_task warm, blended": {"lora_per_task": {"init": "previous", "temperature": 0.1}},
    "lora_per_task oracle": {"lora_per_task": {"router": "oracle"}},
    "lora_per_task last": {"lora_per_task": {"router": "last"}},
    "multitask": ["multitask", "lora"],
    "replay": ["lora", {"replay": {"size": 7}}],
    "replay per task": ["lora", {"replay": {"size": 4, "strategy": "per_task", "ratio": 0.3}}],
    "ewc": ["lora", {"ewc": {"n_samples": 5}}],
    "ewc single, by batch": ["lora", {"ewc": {"n_samples": 8, "anchors": "single", "per_sample": False}}],
    "lwf": ["lora", "lwf"],
    "ema": ["lora", {"ema": {"beta": 0.8}}],
    "llaca": ["lora", "llaca"],
    "llaca always": ["lora", {"llaca": {"first_task": True, "log_every": 2}}],
    "llaca paper": ["lora", {"llaca": {"variant": "paper"}}],
    "llaca bounded": ["lora", {"llaca": {"variant": "bounded"}}],
    "llaca means by layer": ["lora", {"llaca": {"scale": "means", "per": "layer", "first_task": True}}],
    "llaca paper in bf16": ["lora", {"llaca": {"variant": "paper", "shadow": "bf16", "per": "adapter"}}],
    "interpolate": ["lora", "interpolate"],
    "interpolate chosen": ["lora", {"interpolate": {"choose": [0.3, 0.6], "keep": 3}}],
    "groups + interpolate": ["instruction_groups", {"interpolate": {"choose": [0.5, 0.9], "keep": 2}}],
    "hide": {"hide": {"temperature": 0.5}},
    "hide delta_sum, merge all": {"hide": {"fusion": "delta_sum", "top_k": 0, "anchor_samples": 5}},
    "hide expand all, cold": {"hide": {"top_k": 2, "temperature": 0.0}},
    "disco": {"disco": {"tau": 2.0}},
    "disco shared": {"disco": {"tau": 0.8, "image_weight": 0.5, "eps": 0.3, "token_samples": 7}},
    "hide + replay": ["hide", {"replay": {"size": 5}}],
    "instruction_groups": "instruction_groups",
    "instruction_groups warm": {
        "instruction_groups": {"init": "previous", "text": "question", "match": "max"}
    },
    "modal_prompt": "modal_prompt",
    "modal_prompt + replay": ["modal_prompt", {"replay": {"size": 7}}],
    "moe_lora": "moe_lora",
    "moe_lora, ewc, replay": ["moe_lora", {"ewc": {"n_samples": 3}}, {"replay": {"size": 5}}],
    "o_lora": {"o_lora": {"weight": 0.1}},
    "o_lora trained alone, decayed": {"o_lora": {"forward": "current", "l2_weight": 0.1}},
    "gpm": ["lora", {"gpm": {"threshold": 0.6, "n_samples": 4}}],
    "gpm on A": ["lora", {"gpm": {"n_samples": 3, "n_tokens": 2, "factors": "A"}}],
    "merge_tasks": "merge_tasks",
    "merge_tasks dare_ties": {"merge_tasks": {"merger": "dare_ties", "params": {"density": 0.5}}},
    "merge_tasks svd": {"merge_tasks": {"merger": "ties", "keep": "svd", "rank": 3, "weights": [1, 0.5, 2]}},
    "merge_after_task": ["lora", "merge_after_task"],
    "merge_after_task ties": ["lora", {"merge_after_task": {"merger": "ties", "weights": [1, 2]}}],
    "cofima": ["lora", {"cofima": {"n_samples": 9}}],
    "cofima factors": ["lora", {"cofima": {"n_samples": 9, "space": "factors", "clip": 0.9}}],
    "lorahub": {"lorahub": {"steps": 5, "shots": 2}},
    "lorahub deltas, replay": [
        {"lorahub": {"steps": 4, "shots": 2, "space": "deltas"}},
        {"replay": {"size": 5}},
    ],
    "model_tailor": {"model_tailor": {"samples": 3}},
    "model_tailor truncated, replay": [
        {"model_tailor": {"samples": 3, "rank": 3, "sensitivity": "code", "projector": "restore"}},
        {"replay": {"size": 5}},
    ],
    "groups + llaca": ["instruction_groups", "llaca"],
    "groups, llaca, replay": ["instruction_groups", {"llaca": {"variant": "paper"}}, {"replay": {"size": 4}}],
    "replay, llaca, o_lora": [{"replay": {"size": 5}}, {"llaca": {"first_task": True}}, "o_lora"],
    "nested replay, gpm": ["lora", [{"replay": {"size": 5}}, {"gpm": {"threshold": 0.5, "n_samples": 4}}]],
    "nested disco, lwf, ema": ["disco", ["lwf", [{"ema": {"beta": 0.5}}]]],
    "nested": [
        ["lora", {"replay": {"size": 5}}],
        [{"ewc": {"n_samples": 3}}, ["lwf", {"llaca": {"variant": "paper"}}]],
    ],
    "many": [
        {"lora_per_task": {"init": "previous"}},
        "lwf",
        {"ewc": {"n_samples": 3}},
        {"replay": {"size": 5}},
        "ema",
    ],
}
# A part that is off, and what must then come out bit for bit.
OFF: dict[str, tuple[Any, Any]] = {
    "replay": (["lora", {"replay": {"size": 0}}], "lora"),
    "ewc": (["lora", {"ewc": {"lam": 0.0}}], "lora"),
    "lwf": (["lora", {"lwf": {"weight": 0.0}}], "lora"),
    "ema": (["lora", {"ema": {"beta": 0.0}}], "lora"),
    "llaca": (["lora", {"llaca": {"kappa": 0.0, "fallback": 1.0, "first_task": True}}], "lora"),
    "llaca paper": (["lora", {"llaca": {"variant": "paper", "kappa": 0.0, "fallback": 1.0}}], "lora"),
    "replay of prompts": (["modal_prompt", {"replay": {"size": 0}}], "modal_prompt"),
    "gpm": (["lora", {"gpm": {"threshold": 0.0}}], "lora"),
    "o_lora's averages": (["o_lora", "llaca"], "o_lora"),
    "merge_after_task": (["lora", {"merge_after_task": {"params": {"new": 1.0}}}], "lora"),
    "merge_after_task, all adapters new": (["lora_per_task", "merge_after_task"], "lora_per_task"),
    "cofima": (["lora", {"cofima": {"lam": 1.0}}], "lora"),
    "model_tailor": ({"model_tailor": {"sparsity": 0.0}}, "lora"),
    "interpolate": (["lora", {"interpolate": {"ratio": 1.0}}], "lora"),
    "interpolate, all adapters new": (["lora_per_task", "interpolate"], "lora_per_task"),
    "llaca, all adapters new": (["lora_per_task", "llaca"], "lora_per_task"),
}
OPTIM = Optim(lr=2e-2, steps=4, batch_size=4, warmup=0.0, checkpoint_every=2, log_every=1)
SPEC = LoraSpec(rank=2, alpha=4.0, dropout=0.1)
ADAPTERS: dict[str, Spec] = {
    "lora": SPEC,
    "moe": MoeSpec(rank=2, alpha=4.0, dropout=0.1, experts=2),
    "prompt": PromptSpec(tokens=2, at_once=2),
}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """The laws are about values: nothing is flushed to the disk, and no run asks for versions and git."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        patch.setattr(continual, "environment", dict)
        yield


def adapters(spec: Any) -> Spec:
    """A shape for the kind of adapters that a stack grows."""
    kinds = [p.kinds[0] for p in build(spec).parts if p.owns("adapt")]
    return ADAPTERS[kinds[0] if kinds else "lora"]


class Done:
    """What a run left: its folder, its model and method in memory, and a digest of each."""

    def __init__(self, spec: Any, path: Path | None = None, watch: Any = None) -> None:
        self.path = path or Path(mkdtemp()) / "run"
        self.model, self.method = FakeModel(adapters(spec)), build(spec)
        store = RunDir.open(self.path, {"method": spec})
        self.matrix = run(self.model, stream(), self.method, OPTIM, store, watch=watch or Silent())
        self.adapters = {n: self.model.adapters.state(n) for n in self.model.adapters.names}
        self.rows = RunDir.read(self.path).rows()

    @property
    def answers(self) -> str:
        return digest(
            [p.read_text() for row in self.rows for p in sorted((row.path / "predictions").glob("*.jsonl"))]
        )


@cache
def _cached(spec: str) -> Done:
    return Done(json.loads(spec))


def done(spec: Any) -> Done:
    return _cached(json.dumps(spec))


def logits(model: FakeModel) -> Tensor:
    model.train(False)
    return model(model.collate([e for t in stream() for e in t.test], answers=True)).logits_NV


every = pytest.mark.parametrize("name", SPECS)


def test_every_method_of_the_package_joins() -> None:
    ours = {n for n, cls in available().items() if cls.__module__.startswith("retain.methods.")}
    named = {p.name for spec in SPECS.values() for p in build(spec).parts}
    assert ours <= named, f"give {sorted(ours - named)} a line in SPECS"


@pytest.mark.parametrize("name", OFF)
def test_off_means_off(name: str) -> None:
    off, plain = OFF[name]
    assert digest(done(off).adapters) == digest(done(plain).adapters)
    assert done(off).answers == done(plain).answers


@every
def test_on_means_on(name: str) -> None:
    """A part that changes nothing anywhere would pass the battery: each stack must differ from plain LoRA."""
    if name not in ("lora", "zero_shot"):
        assert digest(list(done(SPECS[name]).adapters.values())) != digest(
            list(done("lora").adapters.values())
        )


@every
def test_state_is_declared(name: str) -> None:
    for part in done(SPECS[name]).method.parts:
        assert set(vars(part)) <= {f.name for f in fields(part)}, part.name


@every
def test_state_survives_the_disk(name: str, tmp_path: Path) -> None:
    method = done(SPECS[name]).method
    save_state(tmp_path / "state", method.state_dict())
    other = build(SPECS[name])
    other.load_state_dict(load_state(tmp_path / "state"))
    assert digest(other.state_dict()) == digest(method.state_dict())
    other.reset()
    assert digest(other.state_dict()) == digest(build(SPECS[name]).state_dict())


class KilledError(Exception):
    pass


class Killer(Silent):
    """Stops a run in the second stage (or the only one), between two checkpoints."""

    stages = 0

    def stage(self, task: str, n_steps: int) -> None:
        self.stages += 1
        self.last = self.stages == 2 or task == "multitask"

    def step(self, i: int, loss: float) -> None:
        if self.last and i == 3:
            raise KilledError


@pytest.mark.parametrize("name", [n for n in SPECS if n != "zero_shot"])
def test_resume_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        Done(SPECS[name], tmp_path / "run", Killer())
    resumed, whole = Done(SPECS[name], tmp_path / "run"), done(SPECS[name])
    assert digest(resumed.adapters) == digest(whole.adapters)
    assert digest(resumed.method.state_dict()) == digest(whole.method.state_dict())
    assert resumed.answers == whole.answers


@pytest.mark.parametrize("name", [n for n in SPECS if isinstance(SPECS[n], list)])
def test_stacks_nest(name: str) -> None:
    parts = build(SPECS[name]).parts
    flat = [{p.name: p.config()} for p in parts]
    assert digest(done([flat]).adapters) == digest(done(SPECS[name]).adapters)


def test_conflicts_are_named() -> None:
    with pytest.raises(Conflict, match=r"adapt.*'lora', 'lora_per_task'"):
        build(["lora", ["replay", "lora_per_task"]])
    with pytest.raises(Conflict, match=r"adapt.*'o_lora', 'hide'"):
        build([["replay", "o_lora"], "llaca", ["hide"]])
    with pytest.raises(Conflict, match=r"adapt.*'modal_prompt', 'moe_lora'"):
        build(["modal_prompt", "moe_lora"])
    with pytest.raises(Conflict, match="stages"):
        build(["multitask", "zero_shot"])
    with pytest.raises(Conflict, match="route"):
        Stack(build("lora_per_task"), Owner())
    Stack(build({"lora_per_task": {"router": "none"}}), Owner())


class Owner(Method):
    name = "owner"

    def route(self, ctx: Any, batch: Any) -> None:
        return None


def test_a_stack_without_an_owner_is_refused() -> None:
    with pytest.raises(RetainError, match="adapt"):
        Done(["multitask", "ema"])


@every
def test_routes_do_not_depend_on_the_batch(name: str) -> None:
    whole = done(SPECS[name])
    examples = [e for t in stream() for e in t.test[:2]]
    for task in stream():
        ctx = context(whole.model, task.name)
        together = whole.method.route(ctx, whole.model.collate(examples, answers=False))
        for i, e in enumerate(examples):
            alone = whole.method.route(ctx, whole.model.collate([e], answers=False))
            assert _weights(together, i) == _weights(alone, 0)


def _weights(mix: Any, i: int) -> dict[tuple[int | None, str], float] | None:
    """The weights of sample i at every layer that has its own, and elsewhere (None)."""
    if mix is None:
        return None
    layers = {None: mix.weights, **mix.by_layer}
    plain = {
        (layer, n): float(w[i]) if isinstance(w, Tensor) and w.ndim else float(w)
        for layer, weights in layers.items()
        for n, w in weights.items()
    }
    return {n: w for n, w in plain.items() if w}


@every
def test_saving_and_loading_changes_no_logit(name: str) -> None:
    whole, fresh = done(SPECS[name]), FakeModel(adapters(SPECS[name]))
    if whole.rows[-1].trained:
        whole.rows[-1].load_model(fresh.adapters, build(SPECS[name]))
    assert torch.equal(logits(fresh), logits(whole.model))


@every
def test_no_hook_draws_from_the_global_generator(name: str) -> None:
    method, model, seen = build(SPECS[name]), FakeModel(adapters(SPECS[name])), list[str]()
    model.train(False)  # as the loop leaves it for end_task
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for task in stream():
        ctx = context(model, task.name, seen)
        model.adapters.mix = method.adapt(ctx)
        method.begin_task(ctx)
        method.data(ctx, task.train)
        method.end_task(ctx)
        method.route(ctx, model.collate(task.test, answers=False))
        seen.append(task.name)
    assert torch.equal(torch.get_rng_state(), before)


class Asked(FakeModel):
    """Keeps which answers of a conversation it was asked for."""

    def collate(self, examples: Any, *, answers: bool, turns: str = "all") -> Any:
        if answers:
            self.__dict__.setdefault("turns", set()).add(turns)
        return super().collate(examples, answers=answers, turns=turns)


@every
def test_a_method_reads_the_answers_that_training_learns(name: str) -> None:
    """Gradients, Fishers, inputs and losses of a method's own passes are of `optim.turns`."""
    method, model, seen = build(SPECS[name]), Asked(adapters(SPECS[name])), list[str]()
    model.train(False)
    for task in stream():
        ctx = context(model, task.name, seen)
        ctx.turns = "last"
        model.adapters.mix = method.adapt(ctx)
        method.begin_task(ctx)
        method.end_task(ctx)
        seen.append(task.name)
    assert vars(model).get("turns", {"last"}) == {"last"}
