"""Whether the default suite passes every time: a fresh clone of what is committed, N runs, busy neighbours beside them.

    python scripts/steady.py                          # makes its own .venv in the clone; 20 times
    python scripts/steady.py --python .venv/bin/python --busy 2
    python scripts/steady.py --python .venv/bin/python --busy 2 tests/test_ddp.py tests/test_resume.py

Each run is `make test` in other words, in a clone without anything that an earlier run left. Prints a line per run and
at the end how many of them passed, with every test that failed and how often; the exit code is 1 if one did.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """One run of the suite: how it ended, which tests failed, pytest's closing line, and how long it took."""

    code: int
    failed: tuple[str, ...]
    closing: str
    seconds: float


@contextmanager
def busy(n: int) -> Iterator[None]:
    """So many processes beside the suite that do nothing but work."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def fresh(clone: Path) -> None:
    """The clone as git has it; its .venv stays."""
    subprocess.run(["git", "clean", "-xfdq", "-e", ".venv"], cwd=clone, check=True)


def suite(clone: Path, python: Path, tests: list[str]) -> Run:
    """`make test` with this interpreter and the clone's own sources."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(clone / "src")}
    began = time.monotonic()
    command = [str(python), "-m", "pytest", "-rfE", *tests]
    done = subprocess.run(
        command, cwd=clone, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        print("\n".join(lines[-60:]), flush=True)
    return Run(
        done.returncode,
        tuple(FAILED.findall(done.stdout)),
        lines[-1] if lines else "",
        time.monotonic() - began,
    )


def told(runs: list[Run]) -> str:
    """How many passed, and which tests failed how often."""
    failed = Counter(name for run in runs for name in run.failed)
    unnamed = sum(run.code != 0 and not run.failed for run in runs)
    lines = [f"{sum(run.code == 0 for run in runs)} of {len(runs)} passed"]
    lines += [f"{n} times: {name}" for name, n in failed.most_common()]
    if unnamed:
        lines.append(f"{unnamed} times: ended without naming a test")
    return "\n".join(lines)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the neighbours would go on for ever
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", help="files of tests; default: the default suite")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--busy", type=int, default=0, help="processes beside the suite that only work")
    parser.add_argument(
        "--python", type=Path, help="an interpreter with all that is needed; default: make venv in the clone"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="steady-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if options.python is None:
            subprocess.run(["make", "--quiet", "venv"], cwd=clone, check=True)
        python = options.python.absolute() if options.python else clone / ".venv" / "bin" / "python"
        runs: list[Run] = []
        with busy(options.busy):
            for i in range(1, options.times + 1):
                fresh(clone)
                runs.append(suite(clone, python, options.tests))
                state = "passed" if runs[-1].code == 0 else f"FAILED ({runs[-1].code})"
                print(
                    f"{i:3d} of {options.times}: {state}, {runs[-1].seconds:.0f} s, {runs[-1].closing}",
                    flush=True,
                )
    print(told(runs))
    return int(any(run.code for run in runs))


if __name__ == "__main__":
    sys.exit(main())
