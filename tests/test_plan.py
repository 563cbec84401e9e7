"""What `retain plan` says about memory, beside the tensors that a step of the pocket really keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from retain.adapters.bank import Mix
from retain.assemble import model_source
from retain.commands import plan
from retain.config import load
from retain.models.hf import HFModel
from retain.pocket.stream import pocket

RECIPE = Path(__file__).parent.parent / "recipes" / "pocket" / "lora.yaml"


def peak(run: Callable[[], None]) -> int:
    """Most bytes of tensors at one time during a call, over those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as kept:
        run()
    now = most = 0
    events = [e for e in kept.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    "settings", [[], ["optim.precision=bf16"], ["adapter.dropout=0.05"], ["optim.grad_checkpointing=true"]], ids=str
)  # fmt: skip
def test_the_estimated_memory_of_a_step_is_within_a_quarter_of_what_it_keeps(settings: list[str]) -> None:
    recipe = load(RECIPE, settings)
    told = plan.make_plan(recipe)
    optim = recipe.optim
    model = HFModel.load(
        model_source("pocket"),
        recipe.adapter,
        precision=optim.precision,
        checkpointing=optim.grad_checkpointing,
    )
    model.adapters.add("a", torch.Generator().manual_seed(0))
    model.adapters.train_only("a")
    model.adapters.mix = Mix({"a": 1.0})
    model.train()
    task = pocket().named(max(told.stages, key=lambda s: s.tokens).name)
    batch = model.collate([task.train[i] for i in range(optim.batch_size)], answers=True)
    model.tower_features(batch)
    gradients = 4 * told.shape.trainable

    def step() -> None:
        model(batch).loss.backward()

    measured = peak(step) - gradients
    estimate = told.memory - 4 * told.shape.parameters - 16 * told.shape.trainable
    assert 0.75 < estimate / measured < 1.25, (estimate, measured)
