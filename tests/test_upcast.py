"""In half precision an answer depends on the batch that it is in; `eval.precision: fp32` is the cure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fake_model import FakeModel
from loop_helpers import stream
from retain import config
from retain.adapters.bank import Mix
from retain.models.hf import HFModel
from retain.models.upcast import half, in_fp32
from retain.run.continual import Running, Silent, setting
from retain.run.engine import Engine
from retain.run.evaluate import EvalOptions, cell_key, evaluate, plan
from retain.run.store import RunDir
from retain.run.train import Optim
from retain.types import RetainError

TASK = replace(stream(4, 32)[0], max_new_tokens=12)


def random_model(kind: torch.dtype) -> HFModel:
    """Weights that tell questions apart, so that answers are not all the same."""
    hf, processor = tiny.llava()
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=rng) * p.shape[-1] ** -0.5)
    model = HFModel(hf.to(kind), processor, tiny.SPEC)
    tiny.fill(model.adapters, "a", "b")
    return model


def answers(model: HFModel, size: int, routed: bool, precision: str) -> list[str]:
    """Of 32 questions in batches of `size`: all under one adapter, or each under its own mixture of two."""
    options = EvalOptions(batch_size=size, precision=precision)
    model.adapters.mix = Mix({"a": 1.0})
    batches = plan(model, TASK, None, None, options)  # type: ignore[arg-type]
    if routed:
        share = torch.linspace(0, 1, 32)
        batches = [(rows, Mix({"a": share[rows], "b": 1 - share[rows]})) for rows, _ in batches]
    return [p.prediction for p in evaluate(model, TASK, batches, options)]


def differ(model: HFModel, routed: bool, precision: str) -> int:
    sizes = (1, 5, 32)
    one, *others = (answers(model, size, routed, precision) for size in sizes)
    assert len(set(one)) > 10
    return sum(len({a, *more}) > 1 for a, *more in zip(one, *others, strict=True))


@pytest.mark.parametrize("routed", [False, True])
def test_the_cure_for_answers_that_depend_on_the_batch(routed: bool) -> None:
    model = random_model(torch.bfloat16)
    before = [t.clone() for t in half(model)]
    assert differ(model, routed, "model") > 0, "this model shows nothing: rounding did not matter"
    assert differ(model, routed, "fp32") == 0
    assert before and all(torch.equal(a, b) for a, b in zip(before, half(model), strict=True))
    assert answers(model, 5, routed, "fp32") != answers(model, 5, routed, "model")


def test_autocast_has_the_same_fault_and_the_same_cure() -> None:
    model = random_model(torch.float32)
    assert differ(model, True, "bf16") > 0 == differ(model, True, "fp32")
    with in_fp32(model):
        assert not half(model)
    assert answers(model, 5, False, "fp32") == answers(model, 5, False, "model")


def test_what_was_widened_is_narrowed_after_an_error() -> None:
    model = random_model(torch.bfloat16)
    features = model.features
    with pytest.raises(KeyError), in_fp32(model):
        assert not half(model) and model.hf.dtype == torch.float32 and model.features is not features
        raise KeyError
    assert model.hf.dtype == torch.bfloat16 and model.features is features


def test_cells_and_settings_know_the_precision_and_old_ones_stay(tmp_path: Path) -> None:
    """`model` is what folders from before it call fp32."""
    narrow, wide = random_model(torch.bfloat16), FakeModel()

    def key(model: Any, precision: str) -> str:
        options = EvalOptions(precision=precision)
        return cell_key(model, TASK, [([0], Mix())], {}, options)

    assert key(wide, "model") == key(wide, "fp32") != key(wide, "bf16")
    assert len({key(narrow, p) for p in ("model", "fp32", "bf16")}) == 3

    def made(precision: str) -> dict[str, Any]:
        run = RunDir(tmp_path / "none")
        options = EvalOptions(precision=precision)
        from retain.method import build

        return setting(
            Running(narrow, stream(), build("lora"), Optim(), options, run, Engine(), Silent(), 0)
        )["eval"]

    assert made("fp32") == made("model") | {"precision": "fp32", "widened": True}
    old = {"eval": {"precision": "fp32"}, "optim": {"lr": 1.0}}
    RunDir.open(tmp_path / "run", old)
    RunDir.open(tmp_path / "run", {"eval": {"precision": "model"}, "optim": {"lr": 1.0}})
    for other in ({"eval": {"precision": "bf16"}, "optim": {"lr": 1.0}}, {**old, "optim": {"lr": 2.0}}):
        with pytest.raises(RetainError, match="another recipe"):
            RunDir.open(tmp_path / "run", other)


def test_a_recipe_in_fp32_says_what_it_always_said(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: pocket}\nstream: pocket\nmethod: lora\n")
    assert config.load(path).resolved()["eval"]["precision"] == "fp32"
    made = config.load(path, ["model.dtype=bf16"]).resolved()
    assert made["eval"]["precision"] == "model"
    assert config.load(path, ["model.dtype=bf16", "eval.precision=fp32"]).eval.precision == "fp32"
