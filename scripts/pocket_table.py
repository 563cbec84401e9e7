"""The results table: every pocket recipe with five seeds, two processes of one thread each, resumable.

    python scripts/pocket_table.py                      # run what is missing, then write docs/results.md
    python scripts/pocket_table.py --only llaca ewc --seeds 0 1
    python scripts/pocket_table.py --all --orders default reversed    # every recipe, two orders of the tasks
    python scripts/pocket_table.py --write-only         # only write the tables from the runs that are there

Every run is `retain run recipes/pocket/NAME.yaml seed=S out=runs/table/NAME-S` (NAME.ORDER-S for another order); a
killed script goes on where it was. Runs share what they tuned alike (`reuse`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "pocket"
FIRST = [
    "zero_shot", "lora", "multitask", "replay", "ewc", "lwf", "ema", "llaca_official", "llaca_paper", "llaca_bounded",
    "llaca", "llaca_groups_paper", "llaca_groups_bounded", "groups", "lora_oracle", "lora_per_task",
]  # fmt: skip


ORDERS = {
    "default": "",
    "reversed": "distortion digits counting garments icons charts boxes captions",
    "shuffled": "counting captions distortion icons boxes digits charts garments",
}
"""Orders of the tasks by name; empty: the stream's own. `shuffled` was drawn once."""


def recipes() -> list[str]:
    """Every recipe of the pocket: those of FIRST, then the others by name."""
    return [*FIRST, *sorted({p.stem for p in RECIPES.glob("*.yaml")} - set(FIRST))]


def one(name: str, seed: int, order: str, folder: Path, extra: list[str]) -> tuple[str, int, float]:
    """One run in its own process; returns its name, exit code and seconds. A finished run is not started again."""
    out = folder / (f"{name}.{order}-{seed}" if ORDERS[order] else f"{name}-{seed}")
    if (out / "DONE").is_file():
        return out.name, 0, 0.0
    command = [
        sys.executable,
        "-m",
        "retain.cli",
        "run",
        str(RECIPES / f"{name}.yaml"),
        f"seed={seed}",
        f"out={out}",
        f"reuse={folder / 'tuned'}",
        *([f"stream.pocket.order=[{', '.join(ORDERS[order].split())}]"] if ORDERS[order] else []),
        *extra,
    ]
    started = time.monotonic()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{out.name}.log").open("w") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=False).returncode
    return out.name, code, time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=FIRST)
    parser.add_argument("--all", action="store_true", help="every recipe, whatever --only says")
    parser.add_argument("--orders", nargs="*", choices=ORDERS, default=["default"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key=value, as for retain run")
    args = parser.parse_args()
    failed = 0
    if not args.write_only:
        names = recipes() if args.all else args.only
        todo = [(name, seed, order) for seed in args.seeds for order in args.orders for name in names]
        with ThreadPoolExecutor(args.jobs) as pool:
            for name, code, seconds in pool.map(lambda job: one(*job, args.folder, args.overrides), todo):
                if seconds:
                    print(f"{name:32s} {'ok' if not code else f'exit {code}'} {seconds:6.0f} s", flush=True)
                failed += bool(code)
    from retain.report.results import write_results

    print(f"wrote {write_results(args.folder, args.out)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
