"""Progress: plain lines in a pipe, bars on a terminal, silence when asked. Trackers: off unless asked for."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import pytest
from rich.console import Console

from retain.run.progress import Progress
from retain.run.track import Off, open_tracker
from retain.types import RetainError


class Clock:
    """A clock that moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def story(progress: Progress, clock: Clock) -> None:
    """One task, as a run tells it."""
    with progress:
        progress.note("continuing after [task 1]")
        progress.stage("boxes", 100)
        for step in range(10, 101, 10):
            clock.now += 4.0
            progress.step(step, 1 / step, 80.0)
        progress.evaluating("boxes", 64)
        progress.advance(32)
        progress.advance(32)
        progress.row("boxes", {"boxes": 71.25, "words": 3.0}, learned="boxes")


def told(*, terminal: bool, quiet: bool = False) -> str:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    story(Progress(console, quiet=quiet, clock=clock), clock)
    return out.getvalue()


def test_plain_lines_are_few_and_without_control_codes() -> None:
    text = told(terminal=False)
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "continuing after [task 1]"  # not read as markup
    assert lines[1] == "train boxes: 100 steps"
    assert sum(line.startswith("train boxes: ") for line in lines) == 5  # begin, three in 40 s, end
    assert "train boxes: 100/100  40s  loss 0.010" in lines
    assert lines[-1] == "row  boxes: boxes 71.2  words 3.0"


def test_a_terminal_gets_bars_and_a_lasting_line_per_stage() -> None:
    text = told(terminal=True)
    assert "\x1b[" in text
    assert "train boxes: 100/100" in text and "71.2" in text


def test_quiet_says_nothing() -> None:
    assert told(terminal=False, quiet=True) == "" and told(terminal=True, quiet=True) == ""


def test_calls_out_of_order_do_not_end_a_run() -> None:
    progress = Progress(Console(file=io.StringIO()))
    progress.step(3, 0.5)
    progress.advance(4)
    progress.close()
    progress.close()


def test_no_tracker_by_default(tmp_path: Path) -> None:
    tracker = open_tracker((), tmp_path, "run")
    assert isinstance(tracker, Off)
    tracker.log(1, loss=0.5)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_named_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(RetainError, match=r"'mlflow' is not a tracker.*tensorboard.*trackio.*wandb"):
        open_tracker("mlflow", tmp_path, "run")


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(RetainError, match=r"pip install 'retain\[track\]'"):
        open_tracker(name, tmp_path, "run")


def test_numbers_reach_a_tracker(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker = open_tracker("tensorboard", tmp_path, "run", {"seed": 1})
    tracker.log(3, loss=0.5)
    tracker.close()
    assert any((tmp_path / "tensorboard").iterdir())
