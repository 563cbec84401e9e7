"""The federated table: three methods, FCIT's four settings, three skews, three seeds on the pocket; resumable.

    python scripts/pocket_fed.py                    # run what is missing, then write docs/results_fed.md
    python scripts/pocket_fed.py --seeds 0 --betas 1.0 --only disco_task_hom --jobs 1
    python scripts/pocket_fed.py --write-only

Every run is `retain run recipes/pocket_fed/NAME.yaml seed=S federated.beta=B out=runs/table_fed/NAME.betaB-S`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pocket_table import RECIPES, ROOT, run_all

SETTINGS = ("task_hom", "task_het", "capability_hom", "capability_het")
METHODS = ("fedavg", "o_lora", "disco")
BETAS = ("0.5", "1.0", "5.0")


def activations(path: Path) -> None:
    """A finished run's mean score at its end with each way to weigh subspaces, into its folder."""
    from retain.assemble import build_method, build_model, build_stream
    from retain.config import parse
    from retain.files import write_json
    from retain.method import Context
    from retain.report.federated import ACTIVATIONS
    from retain.run.engine import Engine
    from retain.run.evaluate import evaluate, plan
    from retain.run.store import RunDir

    if (path / ACTIVATIONS).is_file():
        return
    run, told = RunDir.read(path), {}
    for way in ("softmax", "argmax", "cosine", "concatenation"):
        recipe = parse(run.config, path / "config.yaml", [f"method.0.disco.activation={way}"])
        stream, method, model = build_stream(recipe), build_method(recipe), build_model(recipe)
        run.rows()[-1].load_model(model.adapters, method)
        scores = []
        for task in stream:
            ctx = Context(model, task, stream, [t.name for t in stream], recipe.seed)
            batches = plan(model, task, method, ctx, recipe.eval)
            found = evaluate(model, task, batches, recipe.eval, Engine(), None, lambda n: None)
            scores.append(sum(p.score for p in found) / len(found))
        told[way] = sum(scores) / len(scores)
    write_json(path / ACTIVATIONS, told)


def main() -> int:
    names = [f"{m}_{s}" for s in SETTINGS for m in METHODS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--betas", nargs="*", default=["1.0", "0.5", "5.0"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "table_fed")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results_fed.md")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument(
        "--activations", action="store_true", help="answer again with DISCO's other ways to weigh subspaces"
    )
    args = parser.parse_args()
    failed = 0
    if not args.write_only:
        os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        folder, todo = args.folder.resolve(), []
        for seed in args.seeds:
            for beta in args.betas:
                for name in args.only:
                    out = folder / f"{name}.beta{beta}-{seed}"
                    recipe = str(RECIPES / "pocket_fed" / f"{name}.yaml")
                    todo.append(
                        (out, ["run", recipe, f"seed={seed}", f"federated.beta={beta}", f"out={out}"])
                    )
        failed = run_all(todo, args.jobs)
    if args.activations:
        for done in sorted(args.folder.glob("disco_*/DONE")):
            activations(done.parent)
    from retain.report.federated import write_table

    print(f"wrote {write_table(args.folder, args.out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
