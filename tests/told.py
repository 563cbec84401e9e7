"""Real processes of the command line that get signals: when a process can hear one, where it is, how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import limits

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    error: str

    def in_one_sentence(self, number: int) -> str:
        """What it said, which is one line without a traceback, with the exit code of that signal."""
        assert self.code == CODES[signal.Signals(number)], (self.code, self.error)
        lines = [line for line in self.error.splitlines() if line.strip()]
        assert len(lines) == 1 and "Traceback" not in self.error, self.error
        assert ("interrupted: " if number == signal.SIGINT else "ended by SIG") in lines[0], self.error
        return lines[0]


def _as_in_a_terminal() -> None:
    """A job in the background is started with SIGINT ignored, and passes that on."""
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)


def hears(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM by now (its first line has run)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in text.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def told(
    arguments: Sequence[object],
    numbers: Sequence[int],
    when: float | Callable[[], bool] = 0.0,
    apart: float = 0.0,
    program: Sequence[str] = ("-m", "retain.cli"),
) -> Ended:
    """`retain ARGUMENTS`, signalled when it hears and after so many seconds, or when `when()`; `apart`: between signals."""
    command = [sys.executable, *program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env=ENV, preexec_fn=_as_in_a_terminal, **pipes)  # noqa: PLW1509
    end = time.monotonic() + limits.LAUNCH
    while process.poll() is None and not hears(process.pid):
        time.sleep(0.002)
    if isinstance(when, float | int):
        time.sleep(when)
    else:
        while process.poll() is None and not when():
            assert time.monotonic() < end, "limits.LAUNCH is over"
            time.sleep(0.005)
    for i, number in enumerate(numbers):
        time.sleep(apart if i else 0)
        if process.poll() is None:
            process.send_signal(number)
    out, error = process.communicate(timeout=limits.LAUNCH)
    return Ended(process.returncode, out, error)
