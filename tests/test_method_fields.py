"""What a recipe that names no number gets, and what no recipe may say: a table of each, for every method."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from fake_model import FakeModel, context, stream
from retain.adapters.prompt import PromptSpec
from retain.merge.patch import patched
from retain.method import available, build
from retain.methods.llaca import VARIANTS
from retain.types import RetainError

# The papers' constants, and where none is known the one that our documentation names; not read from the code.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cofima": {"lam": 0.4, "n_samples": 256, "space": "deltas", "clip": 1.0},
    "disco": {"tau": 0.9, "eps": 0.05, "image_weight": 0.0, "token_samples": 0},
    "ema": {"beta": 0.99},
    "ewc": {"lam": 5000.0, "n_samples": 200, "per_sample": True, "anchors": "all"},
    "gpm": {"threshold": 0.95, "n_samples": 125, "n_tokens": 32, "factors": "both"},
    "hide": {"top_k": 1, "fusion": "factor_sum", "temperature": 0.1, "image_weight": 0.5, "text_weight": 0.5,
             "coefficient": 1.0, "anchor_samples": 0},
    "interpolate": {"ratio": None, "choose": [], "keep": 16},
    "instruction_groups": {"threshold": 0.9, "init": "fresh", "text": "last_line", "match": "mean", "limit": 32},
    "llaca": {"variant": "official", "kappa": None, "fallback": 0.01, "first_task": None, "log_every": 10},
    "lora_per_task": {"init": "fresh", "router": "guide", "temperature": 0.0, "image_weight": 0.5,
                      "anchor_samples": 1000},
    "lorahub": {"steps": 40, "shots": 5, "l1": 0.05, "box": 1.5, "space": "factors"},
    "lwf": {"weight": 1.0, "temperature": 2.0},
    "merge_after_task": {"merger": "coma"},
    "merge_tasks": {"merger": "copa", "keep": "cat", "rank": 0},
    "modal_prompt": {"image_weight": 0.5, "prototype_weight": 1.0},
    "model_tailor": {"sparsity": 0.9, "sensitivity": "obs", "decorate": True, "sign": -1, "samples": 128, "rank": 0,
                     "projector": "patch"},
    "o_lora": {"weight": 0.5, "l2_weight": 0.0, "forward": "all"},
    "replay": {"size": 200, "strategy": "reservoir", "ratio": 0.0},
}  # fmt: skip

# Values that are refused; beside each those at the edge that are allowed.
REFUSED: dict[str, dict[str, tuple[list[Any], list[Any]]]] = {
    "cofima": {"lam": ([-0.1, 1.1], [0.0, 1.0]), "n_samples": ([0], [1]), "clip": ([0.0, 1.1], [0.01, 1.0]),
               "space": (["x"], ["factors"])},
    "disco": {"eps": ([0.0, -1.0], [1e-6]), "image_weight": ([-0.1, 1.1], [0.0, 1.0]), "token_samples": ([-1], [0, 1]),
              "tau": ([], [-1.0, 2.0])},
    "ema": {"beta": ([-0.1, 1.0, 1.5], [0.0, 0.999])},
    "ewc": {"lam": ([-1.0], [0.0]), "n_samples": ([0], [1]), "anchors": (["both"], ["single"])},
    "gpm": {"threshold": ([-0.1, 1.1], [0.0, 1.0]), "n_samples": ([0], [1]), "n_tokens": ([0], [1]),
            "factors": (["B"], ["A"])},
    "hide": {"top_k": ([-1], [0]), "temperature": ([-0.1], [0.0]), "image_weight": ([-0.1], [0.0, 3.0]),
             "text_weight": ([-0.1], [0.0, 3.0]), "anchor_samples": ([-1], [0, 1]), "fusion": (["sum"], ["delta_sum"])},
    "instruction_groups": {"init": (["warm"], ["previous"]), "text": (["line"], ["question", "format"]),
                           "match": (["best"], ["max"]), "limit": ([0], [1])},
    "interpolate": {"ratio": ([-0.1, 1.1], [0.0, 1.0]), "keep": ([0], [1]), "choose": ([[2.0]], [[0.5, 1.0]])},
    "llaca": {"variant": (["x"], ["paper", "bounded"]), "kappa": ([-0.1, True], [0.0, 0.5]),
              "fallback": ([0.0, 1.1], [1.0]), "log_every": ([0], [1]), "first_task": (["yes"], [True, False])},
    "lora_per_task": {"init": (["warm"], ["previous"]), "router": (["x"], ["oracle", "last", "none"]),
                      "temperature": ([-0.1], [0.0]), "image_weight": ([-0.1, 1.1], [0.0, 1.0]),
                      "anchor_samples": ([0], [1])},
    "lorahub": {"steps": ([0], [1]), "shots": ([0], [1]), "l1": ([-0.1], [0.0]), "box": ([0.0, -1.0], [0.1]),
                "space": (["x"], ["deltas"])},
    "lwf": {"weight": ([-0.1], [0.0]), "temperature": ([0.0, -1.0], [0.1])},
    "merge_after_task": {"weights": ([[1.0], [1.0, 1.0, 1.0], ["a", 1.0], [True, 1.0]], [[1.0, 2.0], []])},
    "merge_tasks": {"keep": (["x"], ["svd"]), "rank": ([-1], [0, 1]), "weights": ([["a"], [True]], [[1.0], []])},
    "modal_prompt": {"image_weight": ([-0.1, 1.1], [0.0, 1.0]), "prototype_weight": ([-0.1], [0.0])},
    "model_tailor": {"sparsity": ([-0.1, 1.1], [0.0, 1.0]), "samples": ([0], [1]), "rank": ([-1], [0, 1]),
                     "sign": ([0, 2], [1]), "sensitivity": (["x"], ["code"]), "projector": (["x"], ["restore"])},
    "o_lora": {"weight": ([-0.1], [0.0]), "l2_weight": ([-0.1], [0.0]), "forward": (["old"], ["current"])},
    "replay": {"size": ([-1], [0]), "ratio": ([-0.1, 1.0], [0.0, 0.9]), "strategy": (["x"], ["per_task"])},
}  # fmt: skip
PAIRS = [(m, f) for m, of in REFUSED.items() for f in of if m in available()]


def test_every_method_with_fields_is_in_the_tables() -> None:
    ours = {n: c for n, c in available().items() if c.__module__.startswith("retain.methods.")}
    with_fields = {n for n, c in ours.items() if any(f.init for f in fields(c))}
    assert with_fields <= set(DEFAULTS) and with_fields <= set(REFUSED)


@pytest.mark.parametrize("name", [n for n in DEFAULTS if n in available()])
def test_defaults_are_those_of_the_papers(name: str) -> None:
    part = build(name)
    assert {f: getattr(part, f) for f in DEFAULTS[name]} == DEFAULTS[name]


def test_the_constants_of_llacas_variants_and_of_the_patch() -> None:
    assert {n: v.kappa for n, v in VARIANTS.items()} == {"official": 2.0, "paper": 1.0, "bounded": 1.0}
    assert {n: v.first_task for n, v in VARIANTS.items()} == {
        "official": False,
        "paper": True,
        "bounded": True,
    }
    found = patched.__kwdefaults__
    want = {
        "sparsity": 0.9,
        "sensitivity": "obs",
        "decorate": True,
        "sign": -1,
        "w": 0.5,
        "damp": 0.01,
        "block": 128,
    }
    assert {k: found[k] for k in want} == want


@pytest.mark.parametrize(("name", "field"), PAIRS)
def test_what_is_out_of_range_is_refused_and_the_edge_is_not(name: str, field: str) -> None:
    bad, good = REFUSED[name][field]
    for value in bad:
        with pytest.raises(RetainError, match=name):
            build({name: {field: value}})
    for value in good:
        assert getattr(build({name: {field: value}}), field) == value


@pytest.mark.parametrize("spec", [["lora", "ewc"], {"o_lora": {"l2_weight": 0.1}}, "modal_prompt"], ids=str)
def test_a_term_of_the_loss_is_fp32_whatever_the_forward_runs_in(spec: Any) -> None:
    """The training loop asks for it within autocast; its own arithmetic must not be the one of the forward."""
    prompts = PromptSpec(tokens=2, at_once=2) if spec == "modal_prompt" else None
    method, model = build(spec), FakeModel(prompts)
    for i, task in enumerate(stream()[:2]):
        ctx = context(model, task.name, [t.name for t in stream()[:i]])
        model.adapters.mix = method.adapt(ctx)
        method.begin_task(ctx)
        rng = torch.Generator().manual_seed(i)
        for p in model.adapters.trainable().values():
            p.data += 0.3 * torch.randn(p.shape, generator=rng)
        if i == 0:
            method.end_task(ctx)
    batch = model.collate(list(task.train[:4]), answers=True)
    out = model(batch)
    plain = torch.as_tensor(method.loss(ctx, batch, out))
    with torch.autocast("cpu", torch.bfloat16):
        term = torch.as_tensor(method.loss(ctx, batch, out))
    assert plain > 0 and term.dtype == torch.float32 and torch.equal(term, plain)


# Stacks with a part that needs tensors while a task trains; beside each, the state that it keeps for later tasks.
KEPT: dict[str, tuple[Any, set[str]]] = {
    "cofima": (["lora", {"cofima": {"n_samples": 2}}], {"fisher"}),
    "ema": (["lora", "ema"], set()),
    "gpm": (["lora", {"gpm": {"n_samples": 2}}], {"memory"}),
    "llaca": (["lora", {"llaca": {"variant": "paper"}}], set()),
    "lwf": (["lora", "lwf"], set()),
    "merge_after_task": (["lora", "merge_after_task"], set()),
    "model_tailor": ({"model_tailor": {"samples": 2}}, set()),
    "o_lora": ("o_lora", set()),
}


def holds(value: Any) -> bool:
    """Whether tensors with entries are somewhere in a state."""
    if isinstance(value, Tensor):
        return value.numel() > 0
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(map(holds, inside))


@pytest.mark.parametrize("name", KEPT)
def test_what_a_part_needs_during_a_task_is_gone_after_it(name: str) -> None:
    """It is as large as the adapters: neither memory nor the saved state of every row should hold it."""
    spec, kept = KEPT[name]
    method, model = build(spec), FakeModel()
    (part,) = (p for p in method.parts if p.name == name)

    def state() -> set[str]:
        return {f.name for f in fields(part) if not f.init and holds(getattr(part, f.name))}

    for i, task in enumerate(stream()[:2]):
        ctx = context(model, task.name, [t.name for t in stream()[:i]])
        model.adapters.mix = method.adapt(ctx)
        method.begin_task(ctx)
        batch = model.collate(list(task.train[:4]), answers=True)
        for step in range(3):
            ctx.step = step
            out = model(batch)
            (out.loss + method.loss(ctx, batch, out)).backward()
            method.grads(ctx)
            for p in model.adapters.trainable().values():
                p.data -= 0.1 * p.grad
            method.after_step(ctx)
        during, adapters = state(), set(model.adapters.names)
        method.end_task(ctx)
        assert state() <= kept
    gone = adapters - set(model.adapters.names)
    assert during - kept or gone == {"lwf-lora"}  # or this part has nothing to let go of
