"""Two processes are one process with the same global batch, end as one does, and sharded engines are refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from ddp_worker import METHOD, OPTIM, main
from fake_model import FakeModel, stream
from limits import ENDINGS, LAUNCH, finished
from loop_helpers import losses, remains
from retain.cli import app
from retain.method import FULL_GRADS, Method, build
from retain.run.continual import run
from retain.run.engine import Engine
from retain.run.store import RunDir, read_jsonl
from retain.types import RetainError

HERE = Path(__file__).parent


STANDALONE = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")  # a port that the system chooses
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def launched(folder: Path, *launcher: str) -> None:
    command = [sys.executable, "-m", *launcher, str(HERE / "ddp_worker.py"), str(folder)]
    done = finished(command, LAUNCH, "LAUNCH", env=ENV, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run of one process, and that of two."""
    base = tmp_path_factory.mktemp("ddp")
    launched(base / "two", *STANDALONE)
    main(base / "one")
    return base / "one", base / "two"


def test_losses_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    one, two = (losses(folder) for folder in folders)
    assert list(one) == list(two) and len(one) == 2 * OPTIM.steps
    # fp32 sums in another order: the first step to 1e-6; Adam's first steps are signs, so tiny gradients may
    # flip later
    assert two["second-hand/0000"] == pytest.approx(one["second-hand/0000"], rel=1e-6)
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-3)


def test_adapters_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    """Within a step of Adam (lr) for the odd flipped sign, and far closer on average."""
    files = sorted(p.relative_to(folders[0]) for p in folders[0].rglob("adapters/*.safetensors"))
    assert len(files) == 2
    for file in files:
        one, two = (load_file(folder / file) for folder in folders)
        assert list(one) == list(two)
        apart = torch.cat([(one[k] - two[k]).abs().flatten() for k in one])
        assert apart.max() <= 2 * OPTIM.lr * OPTIM.steps and apart.mean() < 0.01 * OPTIM.lr


def test_answers_are_gathered_in_order(folders: tuple[Path, Path]) -> None:
    """The zero-shot row has the same weights in both, so its answers are the same to the last byte."""
    for task in stream_names():
        one, two = (folder / "rows" / "00-zero_shot" / "predictions" / f"{task}.jsonl" for folder in folders)
        assert one.read_bytes() == two.read_bytes() and len(read_jsonl(one)) == 5
    one, two = (json.loads((folder / "matrix.json").read_text()) for folder in folders)
    assert one["ids"] == two["ids"]


def stream_names() -> list[str]:
    return ["second-hand", "first"]


def test_only_the_first_process_writes(folders: tuple[Path, Path]) -> None:
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in folders]
    assert files[0] == files[1] and not remains(folders[1])
    events = [json.loads(line) for line in (folders[1] / "events.jsonl").read_text().splitlines()]
    assert len([e for e in events if e["kind"] == "stage"]) == 2
    steps = [(e["task"], e["step"]) for e in events if e["kind"] == "step"]
    assert len(set(steps)) == len(steps)


@pytest.mark.slow
def test_accelerate_launches_it_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    flags = "--main_process_port 0 --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launched(
        tmp_path / "run", "accelerate.commands.launch", *flags.split(), "--num_cpu_threads_per_process", "1"
    )
    assert (tmp_path / "run" / "matrix.json").read_bytes() == (folders[1] / "matrix.json").read_bytes()
    assert losses(tmp_path / "run") == losses(folders[1])


# -- endings -------------------------------------------------------------------------------------------------

FIRST, SECOND = "rank 1 failed: ", "no word from rank 1"
ENDS: dict[str, tuple[list[int], str]] = {
    "plain": ([0, 0], ""),
    "closed": ([0, 0], ""),
    "again": ([0, 0], ""),
    "bare_plain": ([0, 0], ""),
    "command": ([0, 0], ""),
    "stopped": ([0, 0], ""),
    "refused_by_all": ([2, 2], "the recipe is wrong"),
    "refused_by_one": ([2, 2], f"{FIRST}RetainError: row 7 is wrong"),
    "raises": ([2, 1], f"{FIRST}ValueError: my own mistake"),
    "interrupted": ([2, -signal.SIGINT], f"{FIRST}KeyboardInterrupt"),
    "terminated": ([2, -signal.SIGTERM], SECOND),
    "killed": ([2, -signal.SIGKILL], SECOND),
    "bare_killed": ([-signal.SIGKILL, 2], "no word from rank 0"),
}
"""Exit codes of the two processes, and what the one that is left says."""


def ended(folder: Path, *endings: str) -> dict[str, list[int]]:
    """The exit codes of each ending; its processes' last words are in the folder."""
    done = finished(
        [sys.executable, str(HERE / "endings.py"), str(folder), *endings],
        ENDINGS,
        "ENDINGS",
        env=ENV,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "terminate called" not in done.stderr
    found: dict[str, list[int]] = json.loads((folder / "statuses.json").read_text())
    return found


@pytest.fixture(scope="module")
def statuses(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[int]], Path]:
    folder = tmp_path_factory.mktemp("endings")
    return ended(folder, *ENDS), folder


@pytest.mark.parametrize("ending", ENDS)
def test_every_ending_closes_the_group(ending: str, statuses: tuple[dict[str, list[int]], Path]) -> None:
    """None hangs, none is aborted (-6), and who is left names the rank that is gone."""
    want, said = ENDS[ending]
    codes, folder = statuses
    assert codes[ending] == want
    for rank, code in enumerate(want):
        file = folder / f"{ending}.{rank}"
        if code in {-signal.SIGKILL, -signal.SIGTERM}:
            assert not file.exists()  # Python did not end by itself: nothing was left to close
            continue
        told = json.loads(file.read_text())
        assert told["began"] and told["open"] is False
        if code == 2 and said not in {"", "the recipe is wrong"} and ending != "refused_by_one":
            assert said in told["error"] and "at most 0:30:00" in told["error"]
    if ending.startswith("refused"):
        words = [json.loads((folder / f"{ending}.{rank}").read_text())["error"] for rank in (0, 1)]
        assert said in words[0]
        assert words[1] == ("the recipe is wrong" if ending == "refused_by_all" else "row 7 is wrong")


@pytest.mark.slow
def test_a_process_that_does_not_come_is_waited_for_only_so_long(tmp_path: Path) -> None:
    assert ended(tmp_path, "hangs") == {"hangs": [2, -signal.SIGKILL]}
    told = json.loads((tmp_path / "hangs.0").read_text())
    assert "no word from rank 1" in told["error"] and "at most 0:00:15" in told["error"]


def test_processes_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RetainError, match=r"rank 1 of 2 did not find the other processes within 0:00:01.*MASTER_PORT='1'"
    ):
        Engine.start("cpu", timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(RetainError, match="the launcher's variable WORLD_SIZE is 'two'"):
        Engine.start("cpu")


def test_the_command_line_names_its_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    done = CliRunner().invoke(app, ["explain", str(tmp_path / "gone.yaml")])
    assert (
        done.exit_code == 2 and done.stderr.startswith("error: rank 3 of 4: ") and "gone.yaml" in done.stderr
    )


@contextmanager
def busy(n: int) -> Iterator[None]:
    """So many processes beside this one that do nothing but work."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_fifty_launches_beside_other_jobs(tmp_path: Path) -> None:
    """A group that nobody closed killed one in eight of them (exit code -6)."""
    failed = []
    with busy(2):
        for i in range(50):
            command = [sys.executable, "-m", *STANDALONE, str(HERE / "ddp_worker.py"), str(tmp_path / f"{i}")]
            done = finished(command, LAUNCH, "LAUNCH", env=ENV, cwd=HERE)
            if done.returncode:
                failed.append(f"launch {i}: {done.stderr[-1000:]}")
    assert not failed, f"{len(failed)} of 50: {failed[0]}"


# -- refused -------------------------------------------------------------------------------------------------


class Needs(Method):
    name = "needs"
    needs = frozenset({FULL_GRADS})


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_sharded_engines_are_refused_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    engine = Engine.start("cpu")
    store = RunDir.open(tmp_path / "run", {})
    with pytest.raises(RetainError, match=f"engine '{kind}' shards the base model"):
        run(FakeModel(), stream(), build("lora"), OPTIM, store, engine=engine)
    with pytest.raises(
        RetainError,
        match=rf"'needs' needs \['full_grads'\], which engine '{kind}' hides; use \['single', 'ddp'\]",
    ):
        engine.check(Needs())
    assert not (tmp_path / "run" / "rows").exists()


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    engine = Engine.start("cpu")
    assert (engine.name, engine.rank, engine.world, engine.main) == ("single", 0, 1, True)
    engine.check(build(METHOD))
    engine.wait()
    assert engine.total(1.0, 2.0) == [1.0, 2.0] and engine.gather("x") == ["x"]
