"""Broken files from a seed (`fuzz_files`): each is refused in one sentence, or is fine; nothing hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz
from fuzz_files import FILES


def _all_clear(kind: str, seed: int, n: int, root: Path) -> None:
    found = [fuzz.outcome(case) for case in FILES.cases(seed, n, root, only=[kind])]
    bugs = [str(o) for o in found if o.verdict == "bug"]
    assert not bugs, "\n".join(bugs)
    assert any(o.verdict == "fine" for o in found) and any(
        o.verdict == "clear" for o in found if kind != "long_texts"
    )


NUMBERS = {"rows": 16, "data_files": 8, "pictures": 16, "adapters": 40, "models": 8}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_few(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    _all_clear(kind, 0, NUMBERS[kind], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES.kinds)
def test_many(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    _all_clear(kind, 1, {"long_texts": 200}.get(kind, 400), tmp_path)
