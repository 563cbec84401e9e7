"""Inputs from a seed: each is refused in one sentence or is fine, and the runner that says so can say bug."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fuzz
import fuzz_recipes
import limits
from fuzz import Case
from retain import cli, config, values
from retain.adapters.lora import LoraSpec
from retain.adapters.moe import MoeSpec
from retain.adapters.prompt import PromptSpec
from retain.commands import plan
from retain.commands import run as commands_run
from retain.merge.base import merger
from retain.method import available
from retain.run.engine import out_of_memory
from retain.run.evaluate import EvalOptions
from retain.run.train import Optim
from retain.types import RetainError


def _ends(how: str) -> None:
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
    monkeypatch.setattr(cli, "call", lambda: _ends(how))
    found = fuzz.outcome(Case("made up", (), expect, words, home=tmp_path))
    assert why in found.why and (found.verdict == "bug") == bool(why), found


def _bugs(seed: int, n: int, root: Path) -> tuple[list[fuzz.Outcome], dict[str, set[str]]]:
    found, verdicts = [], dict[str, set[str]]()
    for case in fuzz_recipes.RECIPES.cases(seed, n, root):
        outcome = fuzz.outcome(case)
        verdicts.setdefault(case.kind, set()).add(outcome.verdict)
        found += [outcome] if outcome.verdict == "bug" else []
    return found, verdicts


def test_every_bad_recipe_and_command_line_is_one_sentence(tmp_path: Path) -> None:
    bugs, verdicts = _bugs(0, 280, tmp_path)
    assert not bugs, "\n".join(map(str, bugs))
    both = [k for k in fuzz_recipes.RECIPES.kinds if k not in ("places", "targets", "damaged")]
    assert all(verdicts[k] == {"clear", "fine"} for k in both), verdicts


@pytest.mark.slow
def test_ten_thousand_bad_recipes_and_command_lines(tmp_path: Path) -> None:
    bugs, _ = _bugs(1, 10_000, tmp_path)
    assert not bugs, "\n".join(map(str, bugs))


@pytest.mark.parametrize("of", fuzz_recipes.declared(), ids=lambda of: of.path)
def test_a_default_is_in_its_own_range_and_nothing_that_is_not(of: fuzz_recipes.Of) -> None:
    """The declaration as it is read here against what the library lets through, also when Python makes one."""
    if of.default is not MISSING:
        values.check(of.hint, of.default, of.path)
    for bad in fuzz_recipes.wrong_values(of):
        with pytest.raises(RetainError, match=of.path.rpartition(".")[2]):
            values.typed(of.hint, bad, of.path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Optim(lr=math.nan),
        lambda: Optim(beta1=1.0),
        lambda: replace(Optim(), epochs=math.inf),
        lambda: Optim(2e-4, -1.0),
        lambda: EvalOptions(thumbnails=-1),
        lambda: LoraSpec(alpha=math.inf),
        lambda: LoraSpec(0),
        lambda: MoeSpec(dropout=math.nan),
        lambda: PromptSpec(tokens=10**9),
        lambda: available()["ewc"](lam=math.nan),
        lambda: available()["ema"](math.inf),
        lambda: available()["lwf"](temperature="2"),
        lambda: available()["llaca"](kappa=math.nan),
        lambda: available()["replay"](size=True),
        lambda: available()["hide"](temperature=1e-30),
        lambda: available()["merge_tasks"](weights=[1.0, math.nan]),
        lambda: merger("ties").check({"lam": math.nan}),
        lambda: merger("dare").check({"seed": -1}),
        lambda: Optim(steps=10**6, batch_size=1000),
        lambda: Optim(epochs=1e5).n_steps(10**6),
    ],
)
def test_python_meets_the_same_ranges(make: Callable[[], Any]) -> None:
    with pytest.raises(RetainError, match=r"\S: .*(must be|needed|none of|Input should|neither|more than)"):
        make()


OOM = [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("error", OOM, ids=lambda e: type(e).__name__)
def test_memory_that_ends_is_said_as_such_with_what_plan_estimates(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    path = fuzz_recipes.recipe(tmp_path)
    estimate = next(
        r[1] for r in plan.total_rows(plan.make_plan(config.load(path))) if r[0].startswith("memory")
    )
    monkeypatch.setattr(commands_run.continual, "run", full)
    words = ("out of memory", "mine.yaml", estimate, "accumulate", str(error)[:20])
    case = Case(
        "full", ("run", str(path), "-q", f"out={tmp_path / 'r'}"), "bad", words, keep=("r*",), home=tmp_path
    )
    found = fuzz.outcome(case)
    assert found.verdict == "clear", found


def test_another_runtime_error_is_none_of_memory(tmp_path: Path) -> None:
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError("out of memory"))


def test_the_command_itself_refuses_bytes_that_are_no_text_and_shows_names_anywhere(tmp_path: Path) -> None:
    """A process of its own: argv as the system gives it, and a terminal that knows ASCII only."""
    path = fuzz_recipes.recipe(tmp_path)
    argv = [sys.executable.encode(), b"-m", b"retain.cli", b"explain", str(path).encode(), b"out=\xff"]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=limits.LAUNCH)
    assert (done.returncode, done.stderr) == (2, b"error: the argument 'out=\\udcff' is no UTF-8 text\n")
    other = path.rename(tmp_path / "läufe.yaml")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    shown = subprocess.run(
        [sys.executable, "-m", "retain.cli", "explain", str(other)], capture_output=True, check=False,
        timeout=limits.LAUNCH, env=ascii_only,
    )  # fmt: skip
    assert shown.returncode == 0 and b"l\\xe4ufe.yaml" in shown.stdout
