"""Processes that end in every way there is: `endings.py FOLDER ENDING…`, two of them per ending, without a launcher.

Imports once and forks (as crash.py does). Each process really finishes Python, so that what is left open at its end
shows: it writes whether the group was, and what the engine told it. What a launcher keeps for its processes (where
they find each other) is kept by a process of our own, on a port that the system chose; in an ending that begins with
"bare", as under mpirun, rank 0 keeps it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

import own_data
import retain.run.engine
from retain.run.engine import PATIENCE, Engine
from retain.types import RetainError

WORLD = 2


def plain(engine: Engine) -> None:
    """Nobody closes anything."""


def closed(engine: Engine) -> None:
    """As `retain run` does it."""
    with engine:
        engine.wait()


def again(engine: Engine) -> None:
    """Started twice, closed, started anew: each time both processes are there."""
    assert Engine.start("cpu") == engine
    for _ in range(3):
        engine.close()
        assert not dist.is_initialized()
        engine = Engine.start("cpu")
        assert engine.gather(engine.rank) == [0, 1] and engine.total(1.0) == [2.0]


def refused_by_all(engine: Engine) -> None:
    """The same RetainError in every process, before they meet again."""
    with engine:
        raise RetainError("the recipe is wrong")


def refused_by_one(engine: Engine) -> None:
    """Rank 1 finds a row that is wrong while rank 0 waits."""
    with engine:
        if engine.rank == 1:
            raise RetainError("row 7 is wrong")
        engine.wait()


def raises(engine: Engine) -> None:
    """An exception of the user's own code that nobody catches, in a script that closes nothing."""
    if engine.rank == 1:
        raise ValueError("my own mistake")
    engine.total(1.0)


def interrupted(engine: Engine) -> None:
    """Ctrl-C reaches one process first."""
    if engine.rank == 1:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    engine.gather("x")


def terminated(engine: Engine) -> None:
    """SIGTERM, as a launcher sends it."""
    if engine.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    engine.wait()


def killed(engine: Engine) -> None:
    """SIGKILL: no last word."""
    if engine.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    weight = torch.nn.Parameter(torch.ones(3))
    engine.sum_grads([weight])


def bare_killed(engine: Engine) -> None:
    """The process that keeps the board is the dead one."""
    if engine.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.wait()


def bare_plain(engine: Engine) -> None:
    """Rank 0 may leave first."""
    if engine.rank == 1:
        time.sleep(0.5)


def command(engine: Engine) -> None:
    """`retain run` in a fresh folder, whose first process is slow to make it."""
    from retain import config
    from retain.commands.run import start
    from retain.run.store import RunDir

    opened = RunDir.open

    def slow(path: Path, *arguments: Any, main: bool = True) -> RunDir:
        time.sleep(1.0 if main else 0.0)
        return opened(path, *arguments, main=main)

    RunDir.open = staticmethod(slow)  # type: ignore[method-assign, assignment]
    start(config.load(Path(os.environ["RECIPE"])), quiet=True)
    assert not dist.is_initialized()


def stopped(engine: Engine) -> None:
    """Rank 1 is asked to stop in the middle of a task: both save and stop, and the same call ends as if nothing was."""
    from dataclasses import replace

    from crash import METHOD, OPTIM, SPEC
    from fake_model import FakeModel, stream
    from loop_helpers import kept
    from retain.method import build
    from retain.run.continual import run
    from retain.run.evaluate import EvalOptions
    from retain.run.store import RunDir
    from retain.signals import Patience, Stopped

    class Third(Patience):
        left = 3

        def __call__(self) -> bool:
            self.left -= 1
            return self.left == 0 and engine.rank == 1

    def go(folder: Path, stop: Patience | None = None) -> None:
        if engine.main:
            RunDir.open(folder, {})
        engine.wait()  # the first one makes the folder, as `retain run` does
        store, options = RunDir.open(folder, {}, main=engine.main), EvalOptions(batch_size=2)
        optim = replace(OPTIM, checkpoint_every=5)
        run(FakeModel(SPEC), stream(), build(METHOD), optim, store, options=options, engine=engine, stop=stop)

    base = Path(os.environ["FOLDER"])
    go(base / "whole")
    try:
        go(base / "halved", Third())
        raise AssertionError("nobody stopped")
    except Stopped as error:
        assert "after step 3 of 7" in str(error)
        engine.wait()
        assert list((base / "halved").glob("rows/*/checkpoint/newest.json"))
    go(base / "halved")
    if engine.main:
        assert kept(base / "whole") == kept(base / "halved")


def hangs(engine: Engine) -> None:
    """Rank 1 does not come: the engine was started with little patience."""
    if engine.rank == 1:
        time.sleep(1000)
    engine.wait()


HURRY = {"hangs": timedelta(seconds=15)}


def host() -> tuple[int, int]:
    """A process that keeps the store until it is killed; its id and its port."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, f"{store.port}".encode())
        os.close(write)
        signal.pause()
    os.close(write)
    with os.fdopen(read) as f:
        return pid, int(f.read())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def child(folder: Path, ending: str, rank: int, port: int) -> None:
    """Set up what a launcher sets up, and end."""
    told: dict[str, object] = {}

    def last() -> None:  # registered first, so it runs after the engine's own
        told["open"] = dist.is_initialized()
        (folder / f"{ending}.{rank}").write_text(json.dumps(told))

    atexit.register(last)
    retain.run.engine.GRACE = 2.0
    os.environ.update(
        RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{WORLD}", LOCAL_WORLD_SIZE=f"{WORLD}",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", TORCHELASTIC_USE_AGENT_STORE=f"{not ending.startswith('bare')}",
    )  # fmt: skip
    engine = Engine.start("cpu", HURRY.get(ending, PATIENCE))
    assert engine.gather(rank) == [0, 1]
    told["began"] = True
    try:
        globals()[ending](engine)
    except RetainError as error:
        told["error"] = str(error)
        sys.exit(2)


def main(folder: Path, endings: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["FOLDER"] = str(folder)
    statuses: dict[str, list[int]] = {}
    if "command" in endings:
        os.environ["RECIPE"] = str(own_data.shop(folder, own_data.model_dir(folder / "model")))
    for ending in endings:
        keeper, port = (0, free_port()) if ending.startswith("bare") else host()
        children = []
        for rank in range(WORLD):
            children.append(os.fork())
            if not children[-1]:
                child(folder, ending, rank, port)
                return  # through the end of Python, as any script
        order = reversed(children) if ending == "bare_killed" else children
        ends = dict.fromkeys(children, 0)
        for pid in order:
            if ending == "hangs" and pid == children[1]:
                os.kill(pid, signal.SIGKILL)
            ends[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        statuses[ending] = [ends[pid] for pid in children]
        if keeper:
            os.kill(keeper, signal.SIGKILL)
            os.waitpid(keeper, 0)
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
