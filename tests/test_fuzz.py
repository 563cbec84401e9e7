"""Inputs from a seed: each is refused in one sentence or is fine, and the runner that says so can say bug."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz
import limits
from fuzz import Case
from retain import cli


def _ends(how: str) -> None:
    import sys

    if how == "hang":
        while True:
            pass
    if how == "raise":
        raise KeyError("lost")
    if how == "lines":
        print("error: a\nb", file=sys.stderr)
    elif how == "odd":
        print("error: \x1b[2J gone", file=sys.stderr)
    elif how == "new":
        Path("left").touch()
        print("error: no", file=sys.stderr)
    elif how == "memory":
        bytearray(1 << 40)
    else:
        print(how, file=sys.stderr)
    sys.exit(2)


@pytest.mark.parametrize(
    ("how", "expect", "words", "why"),
    [
        ("hang", "any", (), "hangs"),
        ("raise", "any", (), "KeyError"),
        ("memory", "any", (), "MemoryError"),
        ("lines", "bad", (), "2 lines"),
        ("odd", "bad", (), "characters"),
        ("new", "bad", (), "left behind"),
        ("error: fine", "good", (), "a good input"),
        ("error: fine", "bad", ("name",), "is not named"),
        ("warning: x", "bad", (), "does not begin"),
        ("error: the name", "bad", ("name",), ""),
    ],
)
def test_the_runner_sees_what_is_no_clear_refusal(
    how: str, expect: fuzz.Expected, words: tuple[str, ...], why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(limits, "CASE_CPU", 1)
    monkeypatch.setattr(cli, "main", lambda: _ends(how))
    found = fuzz.outcome(Case("made up", (), expect, words, home=tmp_path))
    assert why in found.why and (found.verdict == "bug") == bool(why), found
