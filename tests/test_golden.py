"""Golden losses: a refactoring that changes the loss curve of 20 steps is no refactoring.

The curves are in tests/golden/. When a change is meant, say why in its commit and write them anew:

    .venv/bin/python tests/test_golden.py

Each file carries the fingerprints of its base model and data: with others the curve is another one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from loop_helpers import example
from retain.adapters.lora import LoraSpec
from retain.method import Context, build
from retain.metrics.scores import score
from retain.models.hf import HFModel
from retain.pocket import POCKET_DIR
from retain.run.train import Optim, fit
from retain.stream import Stream, Task

GOLDEN = Path(__file__).parent / "golden"
SPEC = LoraSpec(rank=8, alpha=16.0)
OPTIM = Optim(lr=5e-3, projector_lr=2e-3, steps=20, batch_size=8, max_grad_norm=1.0, log_every=7)
TOLERANCE = 2e-3
"""Relative. Kernels and threads of another machine reorder fp32 sums (1e-6 a step); Adam divides by gradients
near
zero and lets that grow over 20 steps to some 1e-4. A wrong schedule, batch order or scale is off by
percents."""


def curve(model: HFModel, task: Task) -> dict[str, Any]:
    """Losses of 20 steps of plain LoRA on one task."""
    losses: list[float] = []
    stream = Stream("golden", (task,))
    ctx = Context(model, task, stream, [], seed=0, log=lambda **e: losses.extend(e.get("losses", ())))
    fit(model, build("lora"), ctx, OPTIM)
    return {"base": model.fingerprint(), "data": task.data_digest(), "losses": losses}


def tiny_losses() -> dict[str, Any]:
    """Of the tiny random LLaVA of the tests."""
    examples = [example("golden", i) for i in range(64)]
    return curve(tiny.model("llava", SPEC), Task("golden", examples, examples[:1], score("exact")))


def pocket_losses() -> dict[str, Any]:
    """Of the shipped pocket model on its first task."""
    from retain.pocket.stream import ORDER, task

    return curve(HFModel.load(POCKET_DIR, SPEC), task(ORDER[0], n_train=160, n_valid=8, n_test=8))


CURVES = {"tiny": tiny_losses, "pocket": pocket_losses}


@pytest.mark.parametrize("name", CURVES)
def test_losses_are_the_golden_ones(name: str) -> None:
    if name == "pocket" and not (POCKET_DIR / "model.safetensors").is_file():
        pytest.skip("the pocket weights are not in this tree yet")
    file = GOLDEN / f"{name}_losses.json"
    assert file.is_file(), f"no {file}; write it with: python tests/test_golden.py"
    golden, made = json.loads(file.read_text()), CURVES[name]()
    for what in ("base", "data"):
        assert made[what] == golden[what], f"another {what}; if that is meant: python tests/test_golden.py"
    assert len(golden["losses"]) == OPTIM.steps
    assert made["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for title, make in CURVES.items():
        if title != "pocket" or (POCKET_DIR / "model.safetensors").is_file():
            (GOLDEN / f"{title}_losses.json").write_text(json.dumps(make(), indent=1) + "\n")
