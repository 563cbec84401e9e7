"""A run's model for others: a stock PEFT adapter, or a plain HF checkpoint with the adapter merged in.

Either is loaded again and its logits are compared with the run's own before the command says that it is done.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from retain import config
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.adapters.peft_format import load_peft, merge_into_base, save_peft
from retain.assemble import build_method, build_model, model_source
from retain.config import Recipe
from retain.models.base import Model
from retain.run.store import Row, RunDir
from retain.types import Batch, Example, Message, RetainError

TOLERANCE = 1e-3
"""Largest relative difference of logits: the sums of a merge are rounded once to the weights' type."""


def export(
    folder: Path, to: Path, *, after: int | None = None, adapter: str | None = None, merged: bool = False
) -> str:
    """Write the model after a row (default: the last) to `to`; returns what to tell the user."""
    run = RunDir.read(folder)
    recipe = config.parse(run.config, run.path / "config.yaml")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RetainError(f"{to} exists and is not empty; choose another folder with --to")
    row = _row(run, after)
    model = build_model(recipe)
    row.load_model(model.adapters, None)
    mix = _mix(model, adapter)
    model.train(False)
    batch = _probe(model)
    with torch.no_grad(), model.adapters.using(mix):
        wanted = model(batch).logits_NV.float()
    scale = float(wanted.abs().max())
    if merged:
        worst = merge_into_base(model, mix, to, [batch])
    else:
        save_peft(model.adapters, mix, to, model_source(recipe.model.name))
        worst = _difference(recipe, to, batch, wanted)
    if not worst <= TOLERANCE * max(scale, 1.0):
        raise RetainError(
            f"{to}: logits differ by {worst:.2e} from the run's own (largest logit {scale:.1f}): not usable"
        )
    kind = "a plain Hugging Face checkpoint" if merged else "a PEFT adapter"
    note = _router_note(recipe)
    checked = f"logits checked, largest difference {worst:.1e}"
    return f"{to}: {kind} of {', '.join(mix.names)} after {row.name}; {checked}{note}"


def _row(run: RunDir, after: int | None) -> Row:
    rows = {row.index: row for row in run.rows() if row.trained}
    if not rows:
        raise RetainError(f"{run.path}: no trained row yet, nothing to export")
    wanted = max(rows) if after is None else after
    if wanted not in rows:
        raise RetainError(f"{run.path}: no model after {wanted} tasks; choose --after from {sorted(rows)}")
    return rows[wanted]


def _mix(model: Model, adapter: str | None) -> Mix:
    bank = model.adapters
    if adapter is not None and adapter not in bank.names:
        raise RetainError(f"no adapter {adapter!r} in this row; choose --adapter from {bank.names}")
    mix = Mix({adapter: 1.0}) if adapter else bank.mix
    if not mix.names:
        raise RetainError(f"this row has no adapter switched on; choose --adapter from {bank.names}")
    return mix


def _router_note(recipe: Recipe) -> str:
    """A routed method chooses per sample, which a stock adapter cannot carry: say so."""
    owners = build_method(recipe).owns("route")
    if not owners:
        return ""
    return f"\nnote: {owners[0]} routes per sample; this folder holds one fixed mix, not the router"


def _probe(model: Model) -> Batch:
    """Two drawn examples, one with and one without an image: enough to pass every adapted layer."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    def example(name: str, images: int) -> Example:
        turns = (Message("user", "What is shown here?", images), Message("assistant", "A small square."))
        return Example(name, turns, (pixels,) * images)

    return model.collate([example("with", 1), example("without", 0)], answers=True)


def _difference(recipe: Recipe, folder: Path, batch: Batch, wanted: torch.Tensor) -> float:
    """Load the written adapter into a fresh base and compare logits."""
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert isinstance(recipe.adapter, LoraSpec), "save_peft refuses other kinds"
    spec = replace(recipe.adapter, rank=int(written["r"]), alpha=float(written["lora_alpha"]))
    fresh = build_model(replace(recipe, adapter=spec))
    load_peft(fresh.adapters, "exported", folder)
    fresh.train(False)
    with torch.no_grad(), fresh.adapters.using(Mix({"exported": 1.0})):
        return float((fresh(batch).logits_NV.float() - wanted).abs().max())
