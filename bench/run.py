"""Every speed figure by one command, `python bench/run.py`: prints a table, writes bench/results.json.

Parts may be named (`python bench/run.py evaluate memory`): their rows replace those in the file, and the rest stays.
Results are written after each part, so what was measured is not lost.

Each figure is a ratio of runs that follow each other in one process with one thread (A B A B …), so that a
busy neighbour meets both. Ratios are of CPU seconds of the process; the ratio on the clock stands beside it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

PARTS = (
    "evaluate",
    "update",
    "method",
    "memory",
    "train",
    "decoders",
    "route",
    "prompts",
    "growth",
    "merge",
    "federated",
    "start",
)
HERE = Path(__file__).resolve().parent


def part(name: str, arguments: list[str]) -> list[dict[str, object]]:
    """The rows that one benchmark prints. A failure is shown and ends the run."""
    path = HERE / f"{name}.py"
    if not path.is_file():
        return []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(path), *arguments], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]


def update(smoke: bool) -> list[dict[str, object]]:
    """LLaCA's update alone, which is a benchmark of its own form, as a row of ours."""
    path = HERE / "llaca_update.py"
    if smoke or not path.is_file():
        return []
    done = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    ratio, a, b = found["ratio"], found["released_ms"]["median"], found["ours_ms"]["median"]
    name = f"LLaCA update over the released arithmetic, {found['tensors']} tensors"
    mid = ratio["median"]
    values = {"median": mid, "low": ratio["q1"], "high": ratio["q3"], "wall": mid, "a": a, "b": b}
    return [{"name": name, "goal": ">= 1.5", **values, "unit": "ms", "note": "quartiles", "met": mid >= 1.5}]


def table(rows: list[dict[str, object]]) -> str:
    """Plain text, one row per figure."""
    lines = [f"{'figure':66} {'goal':8} {'ratio':>6} {'range':>13} {'clock':>6} {'A':>8} {'B':>8}  unit"]
    for r in rows:
        spread = f"{r['low']:.2f}-{r['high']:.2f}"
        mark = " " if r["met"] else "*"
        lines.append(
            f"{r['name']:66} {r['goal']:8} {r['median']:6.2f}{mark}{spread:>13} {r['wall']:6.2f} "
            f"{r['a']:8.1f} {r['b']:8.1f}  {r['unit']}"
        )
    return "\n".join([*lines, "", "* goal missed. A: the other side, B: ours, per CPU second."])


def machine() -> dict[str, object]:
    """Where and beside what it was measured."""
    import torch
    import transformers

    return {
        "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(),
        "torch": torch.__version__, "transformers": transformers.__version__,
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = [name for name in PARTS if name in arguments] or list(PARTS)
    options, smoke = [a for a in arguments if a not in PARTS], "--smoke" in arguments
    file = HERE / "results.json"
    result = json.loads(file.read_text()) if file.is_file() and not smoke else {}
    for name in chosen:
        at = machine()
        rows = update(smoke) if name == "update" else part(name, options)
        result[name] = {"machine": at, "load_after": os.getloadavg(), "rows": rows}
        if not smoke:
            file.write_text(json.dumps(result, indent=1) + "\n")
    print(table([row for name in PARTS for row in result.get(name, {}).get("rows", ())]))
