"""Merging on disk against PEFT's `add_weighted_adapter` in the same run: time per merger, and peak memory.

Eight adapters of rank 16 over the seven linear layers of Llama blocks. Time: `in memory` both sides start from loaded
adapters; `on disk` ours reads the folders, merges and writes a folder, and PEFT's side is the same as before.
Memory: the growth of a process over what it has after imports, less the adapters' bytes, in units of one module's
eight dense changes.

Sizes: `llama7b` has 7B's shapes but one block of 32, for memory (a block's cost does not depend on the others);
`quarter` is a quarter as wide, for time, since PEFT's SVD of one 7B block takes minutes.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import common
import torch
from common import Ratio, Took, ratio, timed
from memory import peak
from safetensors.torch import save_file

from retain.merge.base import merger
from retain.merge.folders import merge_folders, open_all

SHAPES = {
    "llama7b": (4096, 11008, 1),
    "quarter": (1024, 2752, 1),
    "smoke": (64, 96, 1),
}  # width, inner, blocks
N, RANK, DENSITY = 8, 16, 0.2
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "cat": ("task_arithmetic", {}, {}),
    "linear": ("task_arithmetic", {"params": {"space": "factors"}}, {}),
    "svd": ("svd", {}, {}),
    "ties_svd": ("ties", {"params": {"density": DENSITY}, "keep": "svd"}, {"density": DENSITY}),
    "dare_linear_svd": ("dare", {"params": {"density": DENSITY}, "keep": "svd"}, {"density": DENSITY}),
}  # fmt: skip
"""PEFT's combination type, ours and both sides' options."""


def layers(size: str) -> dict[str, tuple[int, int]]:
    """Path to (out, in) of every adapted layer."""
    d, inner, blocks = SHAPES[size]
    names = {
        **{f"self_attn.{n}_proj": (d, d) for n in "qkvo"},
        **{f"mlp.{n}_proj": (inner, d) for n in ("gate", "up")},
        "mlp.down_proj": (d, inner),
    }
    return {f"model.layers.{i}.{n}": s for i in range(blocks) for n, s in names.items()}


def write(size: str, folder: Path) -> list[Path]:
    """Eight random adapters as PEFT folders."""
    out = []
    targets = sorted({p.rsplit(".", 1)[1] for p in layers(size)})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": targets,
        "task_type": None,
    }
    for n in range(N):
        rng, tensors = torch.Generator().manual_seed(n), {}
        for path, (o, i) in layers(size).items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(RANK, i, generator=rng) / i**0.5
            tensors[f"base_model.model.{path}.lora_B.weight"] = (
                torch.randn(o, RANK, generator=rng) / RANK**0.5
            )
        to = folder / f"a{n}"
        to.mkdir()
        save_file(tensors, to / "adapter_model.safetensors", {"format": "pt"})
        (to / "adapter_config.json").write_text(json.dumps(config))
        out.append(to)
    return out


def peft_model(size: str, folders: list[Path]) -> Any:
    """A bare tree of linear layers with all adapters loaded."""
    from peft import PeftModel
    from torch import nn

    root = nn.Module()
    for path, (o, i) in layers(size).items():
        here = root
        *parents, leaf = path.split(".")
        for name in parents:
            if not hasattr(here, name):
                here.add_module(name, nn.Module())
            here = getattr(here, name)
        here.add_module(leaf, nn.Linear(i, o, bias=False))
    model = PeftModel.from_pretrained(root, folders[0], adapter_name="0")
    for n, f in enumerate(folders[1:], 1):
        model.load_adapter(f, str(n))
    return model


def times(size: str, reps: int, tmp: Path) -> list[Ratio]:
    """PEFT and ours in turn, each kind."""
    folders = write(size, tmp)
    model = peft_model(size, folders)
    names, rows = [str(n) for n in range(N)], []
    states = [loaded(f) for f in folders]
    for kind, (name, how, options) in KINDS.items():
        a, b, c = list[Took](), list[Took](), list[Took]()
        for rep in range(reps if not kind.endswith("svd") else 1):
            took, _ = timed(lambda: model.add_weighted_adapter(names, [1 / N] * N, "m", kind, **options))  # noqa: B023
            a.append(took)
            theirs = _delta(model, size) if kind != "dare_linear_svd" else None  # another draw
            model.delete_adapter("m")
            to = tmp / f"{kind}-{rep}"
            took, _ = timed(lambda: merge_folders(folders, name, to, weights=[1 / N] * N, **how))  # noqa: B023
            b.append(took)
            params = {**how.get("params", {}), "keep": how.get("keep")}
            took, _ = timed(lambda: merger(name)(states, [1 / N] * N, **params))  # noqa: B023
            c.append(took)
            if theirs is not None:
                _equal(kind, theirs, to, size)
        goal, n = ">= 3" if kind.endswith("svd") else ">= 1", len(layers(size))
        title = f"merge {kind}, {N} adapters, {size}, over PEFT"
        note = "ours from folders to a folder"
        rows.append(ratio(f"{title}, in memory", goal, a, c, n, unit="modules/s"))
        rows.append(ratio(f"{title}, on disk", goal, a, b, n, unit="modules/s", note=note))
    return rows


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """A folder as an adapter state: the scale in B."""
    a = open_all([folder])[0]
    state: dict[str, torch.Tensor] = {}
    for path, leaves in a.modules.items():
        state[f"{path}.lora_A"] = a.tensor(leaves["lora_A"])
        state[f"{path}.lora_B"] = a.tensor(leaves["lora_B"]) * a.scale(path)
    return state


def _delta(model: Any, size: str) -> torch.Tensor:
    path = next(iter(layers(size)))
    return model.base_model.model.get_submodule(path).get_delta_weight("m").detach().clone()


def _equal(kind: str, theirs: torch.Tensor, to: Path, size: str) -> None:
    """The first module of both results. A truncation of a flat spectrum is compared by its energy."""
    opened, path = open_all([to])[0], next(iter(layers(size)))
    ours = opened.tensor(opened.modules[path]["lora_B"]) @ opened.tensor(opened.modules[path]["lora_A"])
    if kind == "ties_svd":
        assert float(ours.norm()) >= 0.99 * float(theirs.norm()), "the truncation lost more than PEFT's"
    else:
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


def one(size: str, name: str) -> float:
    """Merge once; peak growth less the adapters' bytes (MiB)."""
    with tempfile.TemporaryDirectory() as tmp:
        folders = [Path(f) for f in sys.argv[4:]]
        gc.collect()
        before = peak()
        merge_folders(folders, name, Path(tmp) / "out")
        return (
            peak() - before - sum((f / "adapter_model.safetensors").stat().st_size for f in folders) / 2**20
        )


def memory(size: str, name: str, folders: list[Path]) -> Ratio:
    """Peak over eight dense changes of the largest module; goal: three times."""
    command = [sys.executable, __file__, "--one", size, name, *map(str, folders)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown = max(1.0, float(out.strip().splitlines()[-1]))
    deltas = N * max(o * i for o, i in layers(size).values()) * 4 / 2**20
    r = grown / deltas
    return Ratio(
        f"merge {name}, peak memory over {N} deltas, {size}", "<= 3", r, r, r, r, deltas, grown, unit="MiB"
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if "--one" in sys.argv:
        torch.set_num_threads(1)
        print(one(sys.argv[2], sys.argv[3]))
    else:
        args = common.options(__doc__)
        quick = args.sizes == "smoke"
        with tempfile.TemporaryDirectory() as tmp:
            common.report(times("smoke" if quick else "quarter", min(args.reps, 3), Path(tmp)))
        with tempfile.TemporaryDirectory() as tmp:
            size = "smoke" if quick else "llama7b"
            folders = write(size, Path(tmp))
            common.report([memory(size, name, folders) for name in ("copa", "knots_ties", "ties")])
