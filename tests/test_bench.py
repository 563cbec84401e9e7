"""Every benchmark runs at a tiny size. No time is asserted; equal losses and texts are, in the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
BENCH = Path(__file__).resolve().parent.parent / "bench"


QUICK, SLOW = (
    ["train", "decoders", "evaluate", "method", "route", "prompts", "memory"],
    ["growth", "merge", "start"],
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_smoke(name: str) -> None:
    command = [sys.executable, str(BENCH / f"{name}.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    assert rows
    for row in rows:
        assert row["low"] <= row["median"] <= row["high"] and row["a"] > 0 and row["b"] > 0, row
