"""The suite itself: nothing in it depends on a clock that is not named, and the script that repeats it counts right."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import limits

HERE = Path(__file__).parent
CLOCKS = {"sleep", "perf_counter", "monotonic", "time_ns"}
KNOWN = {
    "limits.py": "the limits",
    "crash.py": "waits before it kills",
    "endings.py": "waits to be killed",
    "fuzz.py": "tells how long a case took",
    "told.py": "waits for a word, limits.LAUNCH at most",
}


def test_every_time_limit_is_in_limits() -> None:
    """Another `timeout=` or a clock in a test would be a limit that nobody knows of."""
    for path in sorted(HERE.rglob("*.py")):
        if path.name in KNOWN or path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                own = [
                    k
                    for k in node.keywords
                    if k.arg == "timeout" and not ast.unparse(k.value).startswith("limits.")
                ]
                assert not own, f"{path.name}:{node.lineno}"
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                assert name not in CLOCKS, f"{path.name}:{node.lineno} reads a clock"


def test_a_limit_that_is_passed_is_named() -> None:
    with pytest.raises(AssertionError, match=r"limits\.LAUNCH: 0\.1 s are over, and .* still runs"):
        limits.finished([sys.executable, "-c", "while True: pass"], 0.1, "LAUNCH")  # type: ignore[arg-type]


def test_the_script_counts_what_failed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("steady", HERE.parent / "scripts" / "steady.py")
    assert spec and spec.loader
    steady: Any = importlib.util.module_from_spec(spec)
    sys.modules["steady"] = steady
    spec.loader.exec_module(steady)
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    with steady.busy(1):
        runs = [steady.suite(tmp_path, Path(sys.executable), ["-k", word]) for word in ("a", "b", "a or b")]
    assert [run.code for run in runs] == [0, 1, 1]
    assert steady.told(runs) == "1 of 3 passed\n2 times: test_it.py::test_b"
    assert steady.told([steady.Run(-6, (), "", 1.0)]) == "0 of 1 passed\n1 times: ended without naming a test"
    assert "test_b" in capfd.readouterr().out
