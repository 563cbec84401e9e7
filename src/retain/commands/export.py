"""A run's model for others: a stock PEFT adapter, or a plain HF checkpoint with the adapter merged in.

What was written is loaded again by the other side, stock Hugging Face and stock PEFT with the checkpoint's own processor,
and its logits are compared with the run's own before the command says that it is done.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retain import config
from retain.adapters.bank import Mix
from retain.adapters.peft_format import merge_into_base, save_peft
from retain.assemble import build_method, build_model, model_source
from retain.config import Recipe
from retain.files import aside
from retain.models import guard
from retain.models.hf import HFModel
from retain.models.load import load_pretrained
from retain.models.stock import Stock
from retain.run.store import Row, RunDir
from retain.types import Example, RetainError

Wanted = Mapping[str, tuple[Example, Tensor]]
"""The guard's conversations, and our logits behind every answer token of each: (N, V)."""


def export(
    folder: Path, to: Path, *, after: int | None = None, adapter: str | None = None, merged: bool = False
) -> str:
    """Write the model after a row (default: the last) to `to`; returns what to tell the user."""
    run = RunDir.read(folder)
    recipe = config.parse(run.config, run.path / "config.yaml")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RetainError(f"{to} exists and is not empty; choose another folder with --to")
    row = _row(run, after)
    model = build_model(recipe)  # refused where it is not what Hugging Face's own call says
    row.load_model(model.adapters, None)
    mix = _mix(model, adapter)
    wanted = _ours(model, mix)
    base = model_source(recipe.model.name)
    encode, dtype, device = model.encode, model.hf.dtype, model.device
    with aside(to) as part:  # it appears under its name when it is whole and the other side has agreed
        if merged:
            merge_into_base(model, mix, part)
        else:
            save_peft(model.adapters, mix, part, base)
        del model
        gc.collect()  # the other side needs the memory
        hf, processor = load_pretrained(part if merged else base, dtype, device)
        if not merged:
            hf = _with_peft(hf, part)
        told = _compared(Stock(hf.eval(), processor, encode), wanted, "Hugging Face" if merged else "PEFT")
    kind = "a plain Hugging Face checkpoint" if merged else "a PEFT adapter"
    return f"{to}: {kind} of {', '.join(mix.names)} after {row.name}; {told}{_router_note(recipe)}"


def _compared(stock: Stock, wanted: Wanted, other: str) -> str:
    """What to tell of the largest difference between our logits and the other side's; one that is too large is an error."""
    exact, worst = guard.is_exact(stock.hf.dtype), (0.0, 0.0)
    for name, (example, mine) in wanted.items():
        difference, allowed = guard.distance(mine, stock.ask(example).answer_NV, exact)
        if not difference <= allowed:  # NaN too
            raise RetainError(
                f"nothing was written: loaded by stock {other}, the logits of {name!r} differ by {difference:.2e} from "
                f"the run's own ({allowed:.0e} is allowed)"
            )
        worst = max(worst, (difference, allowed))
    how = f"largest difference {worst[0]:.1e}" if exact else f"root mean square difference {worst[0]:.1%}"
    processor = type(stock.processor).__name__
    return f"logits checked against stock {other} with {processor} on {len(wanted)} conversations, {how}"


def _row(run: RunDir, after: int | None) -> Row:
    rows = {row.index: row for row in run.rows() if row.trained}
    if not rows:
        raise RetainError(f"{run.path}: no trained row yet, nothing to export")
    wanted = max(rows) if after is None else after
    if wanted not in rows:
        raise RetainError(f"{run.path}: no model after {wanted} tasks; choose --after from {sorted(rows)}")
    return rows[wanted]


def _mix(model: HFModel, adapter: str | None) -> Mix:
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


def _ours(model: HFModel, mix: Mix) -> Wanted:
    model.train(False)
    out = {}
    with torch.no_grad(), guard.unlimited(model), model.adapters.using(mix):
        for name, example in guard.probe(model).items():
            logits = model(model.collate([example], answers=True)).logits_NV
            out[name] = example, logits.float().cpu()
    return out


def _with_peft(hf: Any, folder: Path) -> Any:
    """Stock PEFT's own loading of the written adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(hf, str(folder))
