"""Broken files from a seed (`fuzz_files`): each is refused in one sentence, or is fine; nothing hangs."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

import fuzz
from fuzz_files import FILES, files_of_pictures, flipped
from retain.data import picture, read
from retain.types import RetainError


def _all_clear(kind: str, seed: int, n: int, root: Path) -> None:
    found = [fuzz.outcome(case) for case in FILES.cases(seed, n, root, only=[kind])]
    bugs = [str(o) for o in found if o.verdict == "bug"]
    assert not bugs, "\n".join(bugs)
    assert any(o.verdict == "fine" for o in found) and any(
        o.verdict == "clear" for o in found if kind != "long_texts"
    )


NUMBERS = {"rows": 8, "data_files": 6, "pictures": 8, "adapters": 60, "models": 6}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_few(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    _all_clear(kind, 0, NUMBERS[kind], tmp_path)


def test_rows_without_a_command(tmp_path: Path) -> None:
    """The same cases as `rows`, read by the library alone: fast enough for many."""
    seen: Counter[str] = Counter()
    for case in FILES.cases(2, 150, tmp_path, only=["rows"]):
        file = case.home / "colour_train.json"
        try:
            assert case.expect != "bad" or not list(read.examples(file, case.home / "images")), case
            seen["fine"] += 1
        except RetainError as error:
            said = str(error)
            assert case.expect != "good" and said.startswith(str(file)) and len(said.splitlines()) == 1, (
                case,
                said,
            )
            seen["clear"] += 1
    assert min(seen["fine"], seen["clear"]) > 20, seen


def test_pictures_without_a_command() -> None:
    """Bytes changed in every format: a picture as a viewer shows it, or half a sentence; never an exception."""
    rng, seen = random.Random(0), Counter[bool]()
    for name, raw in sorted(files_of_pictures().items()):
        for _ in range(60):
            broken = flipped(rng, raw)
            image, wrong = picture.looked_at(broken)
            if image is not None:
                image, wrong = picture.tried(image)
            assert (image is None) == bool(wrong) and len(wrong.splitlines()) <= 1 and len(wrong) < 500, (
                name,
                wrong,
            )
            seen[image is None] += 1
    assert min(seen.values()) > 100, seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES.kinds)
def test_many(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETAIN_CACHE", str(tmp_path / "cache"))
    _all_clear(kind, 1, {"long_texts": 200}.get(kind, 400), tmp_path)
