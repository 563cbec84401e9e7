"""Told to end at any moment: one sentence, the exit code of the signal, nothing lost. Real processes, really signalled."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import limits
import own_data
import retain.run.continual
from crash import METHOD, OPTIM, SPEC
from fake_model import FakeModel, stream
from loop_helpers import kept, remains
from retain import signals
from retain.method import build
from retain.metrics import AccuracyMatrix
from retain.run.continual import run
from retain.run.evaluate import EvalOptions
from retain.run.states import load_state
from retain.run.store import RunDir
from told import CODES, ENV, Ended, told

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


# -- the loop: asked to stop --------------------------------------------------------------------------------------


class After:
    """Asks once so many steps are made; it hears only while it is entered."""

    def __init__(self, steps: int) -> None:
        self.left, self.inside = steps, False

    def __call__(self) -> bool:
        assert self.inside
        self.left -= 1
        return self.left == 0

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *error: object) -> None:
        self.inside = False


def learn(folder: Path, stop: After | None = None) -> AccuracyMatrix:
    store = RunDir.open(folder, {"method": METHOD})
    options = EvalOptions(batch_size=2)
    return run(FakeModel(SPEC), stream(), build(METHOD), OPTIM, store, options=options, stop=stop)


def test_a_run_that_is_stopped_after_any_step_ends_the_same(tmp_path: Path) -> None:
    """Also after a step with a checkpoint of its own, and after a task's last."""
    learn(tmp_path / "whole")
    want, stops = kept(tmp_path / "whole"), 0
    for gap in (1, OPTIM.steps):
        folder = tmp_path / f"every{gap}"
        while True:
            try:
                learn(folder, After(gap))
                break
            except signals.Stopped as stopped:
                stops += 1
                assert stops < 60
                said = str(stopped)
                row = max(p for p in (folder / "rows").iterdir())
                made = json.loads((row / "checkpoint" / "newest.json").read_text())["stem"]
                steps = load_state(row / "checkpoint" / made)["stats"]["steps"]
                assert f"after step {steps} of {OPTIM.steps}" in said
                assert "a checkpoint of task " in said
        assert kept(folder) == want and not remains(folder)
    assert stops >= 3 * OPTIM.steps


def test_without_checkpoints_nobody_is_asked(tmp_path: Path) -> None:
    """`After` would fail: it is never entered."""
    from dataclasses import replace

    store = RunDir.open(tmp_path / "run", {})
    optim = replace(OPTIM, checkpoint_every=0)
    run(
        FakeModel(SPEC),
        stream(),
        build(METHOD),
        optim,
        store,
        options=EvalOptions(batch_size=2),
        stop=After(1),
    )


def test_the_library_sets_no_handler() -> None:
    code = (
        "import signal; before = [signal.getsignal(n) for n in (2, 15, 1, 14)]\n"
        "import retain.cli, retain.signals, retain.files\n"
        "assert before == [signal.getsignal(n) for n in (2, 15, 1, 14)]"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV, check=False).returncode == 0
    assert retain.run.continual and signal.getsignal(TERM) == signal.SIG_DFL


# -- handlers alone: small programs -------------------------------------------------------------------------------

START = """
import atexit, hashlib, pathlib, sys, time
from retain import signals
signals.watch()
def here(): pathlib.Path(sys.argv[-1]).touch()
"""
PROGRAMS = {
    "sleeps": "here(); time.sleep(600)",
    "works": "here()\nwhile True: pass",
    "swallows": "try:\n here(); time.sleep(600)\nexcept BaseException: pass\ntime.sleep(600)",
    "makes another error": "try:\n here(); time.sleep(600)\nexcept BaseException: raise ValueError('shape') from None",
    "is in a destructor": "class D:\n def __del__(self): here(); time.sleep(600)\nd = D()\ndel d\ntime.sleep(600)",
    "is over": "atexit.register(lambda: (here(), time.sleep(600)))\nsignals.leave(0)",
    "waits for a thread": (
        "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()\nhere()\nsignals.leave(0)"
    ),
}  # fmt: skip


def program(tmp_path: Path, body: str, *numbers: int, apart: float = 0.0) -> Ended:
    marker = tmp_path / "here"
    return told([marker], numbers, marker.exists, apart, ("-c", START + body))


@pytest.mark.parametrize(
    ("name", "number"), zip(PROGRAMS, [INT, TERM, HUP, INT, TERM, HUP, INT], strict=True)
)
def test_one_sentence_wherever_the_program_is(name: str, number: int, tmp_path: Path) -> None:
    ended = program(tmp_path, PROGRAMS[name], number)
    said = ended.in_one_sentence(number)
    over = name in ("is over", "waits for a thread")
    assert ("had finished, and its result is kept" if over else "starts again from the beginning") in said


def test_a_cleanup_is_not_disturbed_by_the_reminder(tmp_path: Path) -> None:
    body = "try:\n here(); time.sleep(600)\nfinally:\n time.sleep(1.8); print('clean', flush=True)"
    ended = program(tmp_path, body, TERM)
    ended.in_one_sentence(TERM)
    assert ended.out == "clean\n"


@pytest.mark.parametrize(
    "body",
    [
        "try:\n here(); time.sleep(600)\nfinally:\n time.sleep(600)",  # while it saves
        "here(); hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2 * 10**9)",  # inside compiled code: deaf
        "while True:\n try: here(); time.sleep(600)\n except BaseException: pass",
    ],
)
def test_the_second_signal_ends_at_once(body: str, tmp_path: Path) -> None:
    program(tmp_path, body, TERM, INT, apart=0.3).in_one_sentence(TERM)


def test_patience_waits_for_the_step_and_not_for_ctrl_c(tmp_path: Path) -> None:
    loop = (
        "step = 0\nwith signals.patience as stop:\n while True:\n  step += 1; time.sleep(0.6); here()\n"
        "  if stop(): raise signals.Stopped(f'step {step} is saved')"
    )
    ended = program(tmp_path, loop, TERM)
    assert ended.in_one_sentence(TERM) == "ended by SIGTERM: step 2 is saved, and the same command continues"
    (tmp_path / "here").unlink()
    assert "step" not in program(tmp_path, loop, INT).in_one_sentence(INT)


def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    """nohup: SIGHUP passes by, and the program finishes."""
    code = (
        "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        + START
        + "here(); time.sleep(0.5)\nsignals.leave(0)"
    )
    marker = tmp_path / "here"
    ended = told([marker], [HUP], marker.exists, 0.0, ("-c", code))
    assert (ended.code, ended.error) == (0, "")


# -- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "number"), [(0.0, INT), (0.02, TERM), (0.1, HUP), (0.5, INT)])
def test_while_it_imports(seconds: float, number: int) -> None:
    """From the first line of ours; before it there is only Python."""
    ended = told(["methods"], [number], seconds)
    assert "starts again from the beginning" in ended.in_one_sentence(number)


@pytest.mark.parametrize("number", [INT, TERM])
def test_nothing_is_thrown_into_a_module_that_is_imported(number: int, tmp_path: Path) -> None:
    """A module may call C++ while it is imported (torch does), and what is raised there aborts the process."""
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        f"open({str(tmp_path / 'here')!r}, 'w').close()\n"
        "try:\n    time.sleep(100)\n"
        "except BaseException:\n    os.abort()  # as pybind11 does\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + START + "import slow"
    ended = told(["methods"], [number], (tmp_path / "here").exists, 0.0, ("-c", code))
    assert "starts again from the beginning" in ended.in_one_sentence(number)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    return own_data.shop(folder, own_data.model_dir(folder / "model"))


def training(folder: Path, events: int = 1) -> bool:
    """Whether a run's first task is under way."""
    file = folder / "events.jsonl"
    return file.is_file() and file.read_text().count('"kind": "step"') >= events


def test_sigterm_in_training_saves_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    how = [
        "optim.steps=100000",
        "optim.checkpoint_every=50000",
        "optim.log_every=2",
        "optim.schedule=constant",
    ]
    ended = told(["run", recipe, f"out={folder}", "-q", *how], [TERM], lambda: training(folder, 2))
    said = ended.in_one_sentence(TERM)
    assert "a checkpoint of task 'colour' is saved after step " in said and said.endswith(
        "the same command continues"
    )
    assert (folder / "rows" / "01-colour" / "checkpoint" / "newest.json").is_file()
    assert not list(folder.rglob("*.part"))


@pytest.mark.slow
def test_sixty_signals_in_runs_that_end_the_same(recipe: Path, tmp_path: Path) -> None:
    """At any moment of a run, one signal or two; the same command goes on until it is through."""
    whole, rng, ends = tmp_path / "whole", random.Random(12), 0
    how = ["-q", "optim.steps=12", "optim.checkpoint_every=4", "optim.log_every=4"]
    assert told(["run", recipe, f"out={whole}", *how], []).code == 0
    want, rounds = kept(whole), 0
    while ends < 60:
        rounds += 1
        folder = tmp_path / f"run{rounds}"
        for tries in range(40):
            numbers = rng.choices([INT, TERM, HUP], k=rng.choice([1, 1, 2])) if tries < 30 else []
            ended = told(
                ["run", recipe, f"out={folder}", *how], numbers, rng.uniform(0, 9), rng.uniform(0, 0.4)
            )
            if ended.code == 0:
                break
            heard = [n for n in numbers if CODES[n] == ended.code]  # of two at once either may come first
            ended.in_one_sentence((heard or numbers)[0])
            ends += 1
        made = kept(folder)
        assert {k: v for k, v in made.items() if "config.yaml" not in k} == {
            k: v for k, v in want.items() if "config.yaml" not in k
        }
        assert not remains(folder)


@pytest.mark.slow
def test_every_other_command(recipe: Path, tmp_path: Path) -> None:
    """Told at random moments, each leaves nothing half done and starts again."""
    run_folder = tmp_path / "run"
    assert told(["run", recipe, f"out={run_folder}", "-q"], []).code == 0
    adapter = tmp_path / "adapter"
    assert told(["export", run_folder, "--to", adapter], []).code == 0
    rng = random.Random(3)
    commands = {
        "export": ["export", run_folder, "--to", tmp_path / "e"],
        "merged": ["export", run_folder, "--to", tmp_path / "m", "--merged"],
        "merge": ["merge", adapter, adapter, "--to", tmp_path / "both"],
        "doctor": ["doctor", recipe],
        "plan": ["plan", recipe],
        "report": ["report", run_folder, "--out", tmp_path / "report.html"],
        "evaluate": ["evaluate", run_folder],
    }
    before = sorted(tmp_path.iterdir())
    for words in commands.values():
        for _ in range(4):
            number = rng.choice(list(CODES))
            ended = told(words, [number], rng.uniform(0, 6))
            if ended.code != 0:
                ended.in_one_sentence(number)
                made = [p for p in tmp_path.iterdir() if p not in before]
                assert not made or "had finished" in ended.error, made
            for left in set(tmp_path.iterdir()) - set(before):
                subprocess.run(["rm", "-r", str(left)], check=True, timeout=limits.LAUNCH)
