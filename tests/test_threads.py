"""Several threads add up in one order: two runs on the pocket end with the same bytes.

The other tests have one thread. Here every kind of adapter and every pass over the data that a method makes runs
twice with four; an operation whose sum depends on which thread was first (indexing with repeated rows, say) differs
in its last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retain.adapters.kinds import Spec
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import MoeSpec
from retain.adapters.prompt import PromptSpec
from retain.method import build
from retain.models.hf import HFModel
from retain.pocket import pocket_path
from retain.pocket.stream import pocket
from retain.run.continual import run
from retain.run.store import RunDir
from retain.run.train import Optim

LORA = LoraSpec(rank=16)
SPECS: dict[str, tuple[Spec, Any]] = {
    "lora, replay, lwf": (LORA, ["lora", {"replay": {"size": 20}}, "lwf"]),
    "moe_lora, ewc": (MoeSpec(), ["moe_lora", {"ewc": {"n_samples": 8}}]),
    "modal_prompt": (PromptSpec(), "modal_prompt"),
    "hide": (LORA, "hide"),
    "disco": (LORA, "disco"),
    "gpm, llaca": (LORA, ["lora", {"gpm": {"n_samples": 8}}, "llaca"]),
    "o_lora": (LORA, "o_lora"),
    "cofima": (LORA, ["lora", {"cofima": {"n_samples": 8}}]),
    "merge_tasks": (LORA, {"merge_tasks": {"merger": "knots_ties"}}),
    "lorahub": (LORA, {"lorahub": {"steps": 3, "shots": 2}}),
    "model_tailor": (LORA, {"model_tailor": {"samples": 8}}),
}


@pytest.fixture
def _four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def files(folder: Path) -> dict[str, bytes]:
    """Adapters, state of the method and predictions, by place."""
    kept = (p for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors" or "predictions" in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_two_runs_on_four_threads_are_equal(name: str, tmp_path: Path, _four_threads: None) -> None:
    spec, method = SPECS[name]
    stream = pocket(n_train=48, n_test=4).ordered(["garments", "counting"])
    optim = Optim(lr=1e-2, steps=4, batch_size=16)
    for i in "ab":
        store = RunDir.open(tmp_path / i, {"what": "threads"})
        run(HFModel.load(pocket_path(), spec), stream, build(method), optim, store)
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first.keys() == second.keys() and len(first) > 8
    assert not [k for k in first if first[k] != second[k]]
