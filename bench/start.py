"""From `retain run` to the first training step over many rows of a user's pictures: seconds, and memory.

Real processes on real files: LLaVA rows as JSONL that show 4,000 small PNG and JPEG pictures, the pocket model, 64 test
rows that are evaluated before. The figure is seconds of computing; A is the peak resident size beyond that of a
thousand rows, in MiB, B the rows.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
from common import Ratio
from PIL import Image

WORDS = ("what colour is the square left of a small red circle", "near that big blue house and how many")
FEW = 1_000

CHILD = """\
import resource, sys, time
began = time.perf_counter()
import retain.run.train as train
def first(*args, **kwargs):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("START", time.process_time(), time.perf_counter() - began, peak, flush=True)
    raise SystemExit(0)
train._backward = first
from retain.cli import main
sys.argv = ["retain", "run", sys.argv[1], "-q"]
main()
"""


def pictures(folder: Path, n: int) -> list[str]:
    """Small pictures of six sizes; their names."""
    rng, names = np.random.default_rng(0), []
    (folder / "pics").mkdir()
    for i in range(n):
        squares = rng.integers(0, 256, (6 + i % 2, 6 + i % 3, 3), dtype=np.uint8)
        names.append(f"pics/{i:06d}.{('jpg', 'png')[i % 2]}")
        Image.fromarray(squares.repeat(8, 0).repeat(8, 1)).save(folder / names[-1])
    return names


def recipe(folder: Path, names: list[str], n: int) -> Path:
    """A recipe over n rows."""
    rng = random.Random(0)
    lines = []
    for i in range(n):
        asked = " ".join(rng.choices(" ".join(WORDS).split(), k=rng.randint(5, 18)))
        turns = [
            {"from": "human", "value": f"<image>\n{asked}?"},
            {"from": "gpt", "value": rng.choice(["red", "blue"])},
        ]
        lines.append(
            json.dumps({"id": f"r{i:07d}", "image": names[i % len(names)], "conversations": turns}) + "\n"
        )
    (folder / f"train{n}.jsonl").write_text("".join(lines))
    (folder / f"test{n}.jsonl").write_text("".join(lines[:64]))
    file = folder / f"{n}.yaml"
    file.write_text(
        "model: pocket\nmethod: lora\noptim: {steps: 1, batch_size: 4}\n"
        f"stream: {{tasks: [{{name: mine, train: train{n}.jsonl, test: test{n}.jsonl}}]}}\nout: {folder}/run{n}\n"
    )
    return file


def started(file: Path) -> tuple[float, float, float]:
    """CPU seconds, seconds on the clock and peak MiB up to the first step, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CHILD, file], capture_output=True, text=True, check=False)
    found = re.search(r"START (\S+) (\S+) (\S+)", done.stdout)
    if not found:
        raise SystemExit(done.stderr[-2000:])
    return float(found[1]), float(found[2]), float(found[3])


def measured(file: Path, few: Path, n: int, reps: int) -> Ratio:
    """The figure of n rows, and what they take more memory than few."""
    base = started(few)[2]
    runs = [started(file) for _ in range(reps)]
    cpu, wall = [r[0] for r in runs], statistics.median(r[1] for r in runs)
    more = max(0.1, statistics.median(r[2] for r in runs) - base)
    name = f"seconds to the first step, {n:,} rows"
    return Ratio(name, "<= 10.0", statistics.median(cpu), min(cpu), max(cpu), wall, more, n, unit="MiB, rows")


if __name__ == "__main__":
    args = common.options(__doc__)
    smoke = args.sizes == "smoke"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        names = pictures(folder, 20 if smoke else 4_000)
        few = recipe(folder, names, 80 if smoke else FEW)
        for n in (100,) if smoke else (10_000, 100_000, 200_000):
            common.report([measured(recipe(folder, names, n), few, n, args.reps)])
