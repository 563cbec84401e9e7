"""The command line: what it prints, its exit codes, and that it is quick where nothing is loaded."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

import retain
from retain import cli, config
from retain.commands import run as start
from retain.method import available
from retain.run.progress import Progress
from retain.types import RetainError

COMMANDS = ["run", "methods", "explain", "doctor", "plan", "compare", "report", "evaluate", "export"]
RECIPE = "model: pocket\nstream: pocket\nmethod: [lora, {replay: {size: 30}}]\n"


def call(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_version_and_help() -> None:
    assert call("--version").output == f"retain {retain.__version__}\n"
    text = call("--help").output
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)
        assert call(command, "--help").exit_code == 0


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, retain.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_usage_errors_end_with_2() -> None:
    for args in (["runn"], ["run"], ["run", "--nope", "x"], ["evaluate", "x", "--after", "many"]):
        result = call(*args)
        assert result.exit_code == 2 and "Traceback" not in result.output


def test_methods_lists_all_with_their_hooks() -> None:
    text = call("methods").output
    for name, cls in available().items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert cls.about in line
    assert "\x1b" not in text, "no colour codes where the output is not a terminal"
    assert re.search(r"^lora .*adapt", text, re.MULTILINE) and re.search(
        r"^replay .*data", text, re.MULTILINE
    )


def test_explain_says_who_acts_where(recipe: Path) -> None:
    lines = call("explain", recipe, "method=[lora, {replay: {size: 30}}, ewc]").output.splitlines()
    acts = {line.split()[0]: line for line in lines if line.strip()}
    assert "lora" in acts["adapt"] and "replay(size=30)" in acts["data"] and "ewc" in acts["loss"]
    assert "nobody" in acts["grads"] and "the stream's tasks" in acts["stages"]
    order = [line.split()[0] for line in lines[2:]]
    assert order == list(cli_hooks())


def cli_hooks() -> list[str]:
    from retain.commands.explain import HOOKS

    return list(HOOKS)


def test_explain_says_that_nobody_owns_adapt(recipe: Path) -> None:
    assert "cannot run alone" in call("explain", recipe, "method=ewc").output


def test_doctor_ends_with_1_where_it_finds_errors(tmp_path: Path) -> None:
    import own_data

    recipe = own_data.shop(tmp_path, tmp_path / "no-model-needed")
    healthy = call("doctor", recipe)
    assert (
        healthy.exit_code == 0
        and "no model to ask, so nothing is said of tokens: model: no directory" in healthy.output
    )
    assert "8 / 0 / 3" in healthy.output and "33.3 (always 'red')" in healthy.output
    import shutil

    shutil.copy(tmp_path / "colour_train.json", tmp_path / "colour_test.json")
    result = call("doctor", recipe)
    assert (
        result.exit_code == 1
        and "leak" in result.output
        and "8 errors" in result.output
        and "3 rows more" in result.output
    )


def test_doctor_asks_the_model_of_the_recipe_without_its_weights(tmp_path: Path) -> None:
    import json

    import own_data

    model = own_data.model_dir(tmp_path / "base")
    (model / "model.safetensors").unlink()
    recipe = own_data.shop(tmp_path, model)
    rows = json.loads((tmp_path / "paint_test.json").read_text())
    rows[1]["conversations"][1]["value"] = "red " * 9
    (tmp_path / "paint_test.json").write_text(json.dumps(rows))
    result = call("doctor", recipe)
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert result.exit_code == 1, result.output
    assert any(
        "paint" in line and "max_new_tokens the reference has more than 4 tokens: cut to 'red" in line
        for line in lines
    )
    assert any(
        line.startswith("colour") and line.endswith(" 4 11") for line in lines
    )  # max_new_tokens, rows measured


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (RetainError("row 3 is wrong"), 2, "error: row 3 is wrong"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (OSError(errno.ENOSPC, "No space left", "runs/x"), 2, "runs/x: No space left; what was saved"),
        (SafetensorError("No space left on device"), 2, "what was saved before is kept"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2, "error: runs: Permission denied"),
    ],
)  # fmt: skip
def test_errors_become_messages(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(config, "load", fail)
    result = call("run", recipe)
    assert result.exit_code == code and words in result.stderr and "Traceback" not in result.output


def test_a_bug_keeps_its_traceback(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "load", lambda *_: 1 / 0)
    assert isinstance(call("run", recipe).exception, ZeroDivisionError)


def test_a_closed_pipe_is_quiet() -> None:
    """`retain methods | true`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "retain.cli", "methods"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 1)  # 1: rich noticed first


class Seen:
    """A tracker and a progress that remember."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.rates: list[float | None] = []

    def log(self, step: int, **numbers: float) -> None:
        self.logged.append((step, numbers))

    def close(self) -> None: ...


def test_trackers_count_steps_over_the_stream() -> None:
    seen = Seen()
    watch = start.Watch(Progress(quiet=True), seen, batch_size=4)
    watch.row("zero_shot", {"a": 1.0})
    for task, steps in (("a", (10, 20)), ("b", (15, 20))):  # the second was resumed at step 10
        watch.stage(task, 20)
        for i in steps:
            watch.step(i, 0.5)
        watch.row(task, {"a": 2.0})
    assert [step for step, _ in seen.logged] == [0, 10, 20, 20, 35, 40, 40]
    assert seen.logged[3][1] == {"score/a": 2.0}


def test_a_resumed_task_counts_its_rate_from_the_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now, rates = [0.0], []
    monkeypatch.setattr(start.time, "monotonic", lambda: now[0])
    progress = Progress(quiet=True)
    monkeypatch.setattr(progress, "step", lambda i, loss, rate: rates.append(rate))
    watch = start.Watch(progress, Seen(), batch_size=4)
    watch.stage("a", 100)
    for i, at in ((90, 5.0), (95, 6.0)):
        now[0] = at
        watch.step(i, 0.1)
    assert rates == [None, 20.0]
