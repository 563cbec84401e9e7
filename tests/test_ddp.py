"""Two processes are one process with the same global batch; sharded engines are refused by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddp_worker import METHOD, OPTIM, main
from fake_model import FakeModel, stream
from loop_helpers import losses, remains
from retain.method import FULL_GRADS, Method, build
from retain.run.continual import run
from retain.run.engine import Engine
from retain.run.store import RunDir, read_jsonl
from retain.types import RetainError

HERE = Path(__file__).parent


def launched(folder: Path, *launcher: str) -> None:
    command = [sys.executable, "-m", *launcher, str(HERE / "ddp_worker.py"), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=HERE, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run of one process, and that of two."""
    base = tmp_path_factory.mktemp("ddp")
    launched(base / "two", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
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
    flags = "--cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    launched(
        tmp_path / "run", "accelerate.commands.launch", *flags.split(), "--num_cpu_threads_per_process", "1"
    )
    assert (tmp_path / "run" / "matrix.json").read_bytes() == (folders[1] / "matrix.json").read_bytes()
    assert losses(tmp_path / "run") == losses(folders[1])


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
