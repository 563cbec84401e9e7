"""The results table: every pocket recipe with five seeds, two processes of one thread each, resumable.

    python scripts/pocket_table.py                      # run what is missing, then write docs/results.md
    python scripts/pocket_table.py --only llaca ewc --seeds 0 1
    python scripts/pocket_table.py eval.split=valid --only llaca --folder runs/valid    # overrides come first
    python scripts/pocket_table.py --all --orders default reversed    # every recipe, two orders of the tasks
    python scripts/pocket_table.py --setting pocket_long    # recipes/pocket_long; runs/table_long, docs/results_long.md
    python scripts/pocket_table.py --write-only         # only write the tables from the runs that are there

Every run is `retain run recipes/SETTING/NAME.yaml seed=S out=runs/table/NAME-S` (NAME.ORDER-S for another order); a
killed script goes on where it was. Runs share what they tuned alike (`reuse`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
FIRST = [
    "zero_shot", "lora", "multitask", "replay", "ewc", "lwf", "ema", "llaca_official", "llaca_paper", "llaca_bounded",
    "llaca", "llaca_groups_paper", "llaca_groups_bounded", "groups", "lora_oracle", "lora_per_task",
]  # fmt: skip
LONG = [
    "lora", "ema_099", "ema_09965", "interpolate", "llaca_official", "llaca_kappa", "llaca_means",
    "llaca_paper", "llaca_bounded", "replay",
]  # fmt: skip

ORDERS = {
    "default": "",
    "reversed": "distortion digits counting garments icons charts boxes captions",
    "shuffled": "counting captions distortion icons boxes digits charts garments",
}
"""Orders of the tasks by name; empty: the stream's own. `shuffled` was drawn once."""


class Setting(NamedTuple):
    """A folder of recipes: the names that come first, orders of the tasks, where its runs and its page go."""

    recipes: str
    first: list[str]
    orders: dict[str, str]
    folder: str
    page: str


POCKET = Setting("pocket", FIRST, ORDERS, "table", "results.md")
SETTINGS = {
    "pocket": POCKET,
    "pocket_long": Setting(
        "pocket_long",
        LONG,
        {"default": "", "reversed": "digits counting garments charts"},
        "table_long",
        "results_long.md",
    ),
}


def recipes(setting: Setting = POCKET) -> list[str]:
    """Every recipe of a setting: those that come first, then the others by name."""
    others = {p.stem for p in (RECIPES / setting.recipes).glob("*.yaml")} - set(setting.first)
    return [*setting.first, *sorted(others)]


def arguments(
    name: str, seed: int, order: str, folder: Path, extra: list[str], setting: Setting = POCKET
) -> tuple[Path, list[str]]:
    """A run's folder and what `retain` is called with."""
    tasks_of = setting.orders[order]
    out = folder / (f"{name}.{order}-{seed}" if tasks_of else f"{name}-{seed}")
    tasks = [f"stream.pocket.order=[{', '.join(tasks_of.split())}]"] if tasks_of else []
    recipe = str(RECIPES / setting.recipes / f"{name}.yaml")
    return out, ["run", recipe, f"seed={seed}", f"out={out}", f"reuse={folder / 'tuned'}", *tasks, *extra]


def child(log: Path, args: list[str]) -> None:
    """One run in a process of its own, whose output goes to a file."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from retain.cli import app

    app(args)


def run_all(todo: list[tuple[Path, list[str]]], jobs: int) -> int:
    """Up to `jobs` runs at a time, each forked from this process, so that imports and data are paid for once.

    Finished runs are passed over; the number of failures is returned.
    """
    fork, failed = multiprocessing.get_context("fork"), 0
    left = [(out, args) for out, args in todo if not (out / "DONE").is_file()]
    if left:
        _warm()
    going: dict[Any, tuple[str, float, Any]] = {}
    while left or going:
        while left and len(going) < jobs:
            out, args = left.pop(0)
            out.parent.mkdir(parents=True, exist_ok=True)
            process = fork.Process(target=child, args=(out.parent / f"{out.name}.log", args))
            process.start()
            going[process.sentinel] = (out.name, time.monotonic(), process)
        for sentinel in multiprocessing.connection.wait(list(going)):
            name, started, process = going.pop(sentinel)
            process.join()
            told = "ok" if not process.exitcode else f"exit {process.exitcode}"
            print(f"{name:32s} {told} {time.monotonic() - started:6.0f} s", flush=True)
            failed += bool(process.exitcode)
    return failed


def _warm() -> None:
    """Import what a run needs and make the pocket's pictures, without starting a thread."""
    import torch

    torch.set_num_threads(1)
    from retain.commands import run  # noqa: F401
    from retain.models import hf  # noqa: F401
    from retain.pocket.stream import pocket

    pocket()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setting", choices=SETTINGS, default="pocket", help="which recipes: a folder of recipes/"
    )
    parser.add_argument("--only", nargs="*", help="recipes by name; default: those that come first")
    parser.add_argument("--all", action="store_true", help="every recipe, whatever --only says")
    parser.add_argument("--orders", nargs="*", choices=ORDERS, default=["default"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, help="of the runs; default: runs/table or runs/table_long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="the page; default: docs/results.md or results_long.md")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("overrides", nargs="*", help="key=value, as for retain run")
    args = parser.parse_args()
    setting = SETTINGS[args.setting]
    only = setting.first if args.only is None else args.only
    if wrong := sorted(set(only) - set(recipes(setting))):
        parser.error(
            f"--only: no recipe {wrong}; choose from {recipes(setting)}, and write key=value before --only"
        )
    if wrong := sorted(set(args.orders) - set(setting.orders)):
        parser.error(f"--orders: {args.setting} has no order {wrong}; choose from {list(setting.orders)}")
    folder, out = args.folder or ROOT / "runs" / setting.folder, args.out or ROOT / "docs" / setting.page
    failed = 0
    if not args.write_only:
        names = recipes(setting) if args.all else only
        todo = [(name, seed, order) for seed in args.seeds for order in args.orders for name in names]
        os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
        runs = [arguments(*job, folder.resolve(), args.overrides, setting) for job in todo]
        failed = run_all(runs, args.jobs)
    from retain.report.results import write_results

    command = (
        "make pocket-table" if setting is POCKET else f"scripts/pocket_table.py --setting {args.setting}"
    )
    print(f"wrote {write_results(folder, out, command)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
