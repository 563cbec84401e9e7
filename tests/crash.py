"""Runs that are really killed: a small server that imports once, then forks a process for every run it is
asked for.

One JSON object per line in (`folder`, and when to die), one out (`signal` it died of, `replaces` it had made,
`error`). A process kills itself with SIGKILL at the n-th rename, before or after it, or in the middle of the
n-th appended line; or its parent kills it after so many seconds. Or it lives, and has no room on its disk from the n-th
write on (`full`), for files above so many bytes (`fsize`), or only so many file descriptors (`files`).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import retain.files
import retain.run.evaluate
import retain.run.store
from fake_model import FakeModel, stream
from retain.adapters.lora import LoraSpec
from retain.method import build
from retain.run.continual import run
from retain.run.evaluate import EvalOptions
from retain.run.store import RunDir
from retain.run.train import Optim
from retain.types import RetainError

METHOD: list[Any] = [{"lora_per_task": {"init": "previous"}}, {"replay": {"size": 5}}, {"ema": {"beta": 0.8}}]
OPTIM = Optim(lr=2e-2, steps=7, batch_size=4, warmup=0.0, checkpoint_every=2, log_every=3)
SPEC = LoraSpec(rank=2, alpha=4.0, dropout=0.1)


def whole(folder: Path) -> None:
    """The run that is killed, and that the same call continues."""
    method = build(METHOD)
    store = RunDir.open(folder, {"method": METHOD, "optim": vars(OPTIM)})
    run(FakeModel(SPEC), stream(), method, OPTIM, store, options=EvalOptions(batch_size=2))


def armed(order: dict[str, Any]) -> list[int]:
    """Put the kill where the order wants it; the list holds the number of renames so far."""
    count, lines = [0], [0]
    replace, append = os.replace, retain.files.append_lines

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def replaced(source: Any, target: Any) -> None:
        count[0] += 1
        if count[0] == order.get("before"):
            die()
        replace(source, target)
        if count[0] == order.get("after"):
            die()

    def appended(path: Path, rows: Any) -> None:
        lines[0] += 1
        if lines[0] == order.get("torn"):
            whole_line = json.dumps(rows[-1])
            with path.open("a") as f:
                f.write(whole_line[: len(whole_line) // 2])
            die()
        append(path, rows)

    written, usual = [0], retain.files.usual_mode

    def no_room() -> None:
        written[0] += 1
        if written[0] >= order.get("full", 1 << 40):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def begun(path: Path) -> int:
        no_room()
        return usual(path)

    def opened(path: Path, mode: str = "r", *args: Any, **how: Any) -> Any:
        if mode == "a":
            no_room()
        return open_file(path, mode, *args, **how)

    open_file = Path.open
    if "full" in order:
        retain.files.usual_mode, Path.open = begun, opened  # type: ignore[assignment,method-assign]
    if "fsize" in order:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["fsize"],) * 2)
    if "files" in order:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["files"],) * 2)
    os.replace = replaced  # type: ignore[assignment]
    os.fsync = lambda handle: None  # type: ignore[assignment]  # against power cuts; a kill does not need it
    retain.run.evaluate.append_lines = retain.run.store.append_lines = appended
    return count


def child(order: dict[str, Any], out: int) -> None:
    count, error, clear = armed(order), "", True
    try:
        whole(Path(order["folder"]))
    except RetainError as e:
        error = str(e)
    except BaseException as e:
        error, clear = f"{type(e).__name__}: {e}", False
    os.write(out, json.dumps({"replaces": count[0], "error": error, "clear": clear}).encode())
    os._exit(0)


def serve() -> None:
    torch.set_num_threads(1)  # a forked pool of threads would hang
    build(METHOD)
    for line in sys.stdin:
        order = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            child(order, write)
        os.close(write)
        if "seconds" in order:
            time.sleep(order["seconds"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as f:
            said = json.loads(f.read() or "{}")
        died = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        sys.stdout.write(json.dumps({"signal": died, "error": "", **said}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
