"""Choose the scale of a merge on validation data: the adapters of a finished run, one merge per value, no training.

    retain run recipes/pocket/merge_average.yaml out=runs/merged
    python scripts/merge_lam.py runs/merged --mergers task_arithmetic ties copa --lams 0.3 0.5 1 2

Prints the mean score over the learned tasks' validation examples, and over the unseen ones' (for reading only:
choosing by them would make them seen). `--params` go to every merger that has them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import retain.methods._merging as merging
from retain.adapters.bank import Mix
from retain.assemble import build_method, build_model, build_stream
from retain.config import parse
from retain.merge.base import MERGERS, merger
from retain.method import Context, Method
from retain.models.base import Model
from retain.run.evaluate import evaluate, plan
from retain.run.store import RunDir
from retain.stream import Stream


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run of merge_tasks")
    parser.add_argument(
        "--mergers", nargs="*", default=sorted(m for m in MERGERS if "lam" in MERGERS[m].params)
    )
    parser.add_argument("--lams", nargs="*", type=float, default=[0.3, 0.5, 0.7, 1.0, 1.5, 2.0])
    parser.add_argument("--params", type=json.loads, default={}, help="JSON, for mergers that have them")
    args = parser.parse_args()

    store = RunDir.read(args.run)
    recipe = parse(store.config, args.run / "run.json", ["eval.split=valid"])
    stream, model, method = build_stream(recipe), build_model(recipe), build_method(recipe)
    store.rows()[-1].load_model(model.adapters, method)
    names = list(method.state_dict()["adapter_of"].values())
    states = [merging.changes(model.adapters, n) for n in names]
    print("| merger | " + " | ".join(f"{lam:g}" for lam in args.lams) + " |")
    print("|---|" + "---:|" * len(args.lams))
    for name in args.mergers:
        cells = []
        for lam in args.lams:
            known = {k: v for k, v in args.params.items() if k in merger(name).params}
            merged = merger(name).run(states, None, keep="cat", names=names, **{**known, "lam": lam})
            model.adapters.mix = Mix()
            stored = merging.store(model.adapters, "merged", merged.parts, torch.Generator().manual_seed(0))
            model.adapters.mix = Mix(dict.fromkeys(stored, 1.0))
            seen, unseen = scores(model, stream, recipe.eval, recipe.seed)
            cells.append(f"{seen:.1f} / {unseen:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def scores(model: Model, stream: Stream, options: Any, seed: int) -> tuple[float, float]:
    """Means over the learned and over the unseen tasks."""
    found: dict[str, float] = {}
    for task in stream.all:
        batches = plan(model, task, Method(), Context(model, task, stream, [], seed), options)
        made = evaluate(model, task, batches, options)
        found[task.name] = sum(p.score for p in made) / len(made)
    seen, unseen = ([found[t.name] for t in tasks] for tasks in (stream.tasks, stream.unseen))
    return sum(seen) / len(seen), sum(unseen) / max(1, len(unseen))


if __name__ == "__main__":
    main()
