"""Time limits of the tests, all in one place: a machine ten times slower meets them, and one that is passed is named.

Nothing else in the tests depends on a clock. A limit only ends what hangs; what it is compared with is said beside it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

LAUNCH = 600
"""Seconds for one launch of two processes with a tiny run: 12 alone on two cores, 25 beside two busy processes."""

ENDINGS = 900
"""Seconds for twelve pairs of processes that end in twelve ways: 25 alone, 50 on a machine with a load of 6."""

FEDERATION = 1800
"""Seconds for a SuperLink, three SuperNodes and a run of four rounds, one message of which takes 8 alone: 100 to 300."""

BROWSER = 600
"""Seconds for a headless browser to draw one page: 5 to 20."""

CPU = 60
"""Seconds of this process's own computing time (no neighbour counts) for what takes a tenth of a second."""

CASE = 120
"""Seconds for one case of `fuzz`, which takes 0.01 to 2 alone: what waits for a pipe that nobody writes is ended."""

CASE_CPU = 30
"""Seconds of computing for one case of `fuzz`: what grows without bound is ended."""


def until(there: Callable[[], bool], limit: int, name: str, said: Callable[[], object]) -> None:
    """Wait until something is there; a test that waited longer than `limits.<name>` fails with what `said` tells."""
    end = time.monotonic() + limit
    while not there():
        if time.monotonic() > end:
            raise AssertionError(f"limits.{name}: {limit} s are over: {said()!r}")
        time.sleep(0.2)


def finished(
    command: list[str], limit: int, name: str, check: bool = False, **how: Any
) -> subprocess.CompletedProcess[str]:
    """The process, ended; a test that waited longer than `limits.<name>` fails and says so."""
    try:
        return subprocess.run(command, timeout=limit, check=check, capture_output=True, text=True, **how)
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or b"")[-2000:]
        text = (
            f"limits.{name}: {limit} s are over, and {' '.join(command)[:300]} still runs; it said: {said!r}"
        )
        raise AssertionError(text) from late
