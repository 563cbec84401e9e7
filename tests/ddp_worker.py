"""One run of the tiny stream, in as many processes as the launcher starts: `ddp_worker.py FOLDER DEVICE`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from loop_helpers import model, stream
from retain.method import build
from retain.run.continual import run
from retain.run.engine import Engine
from retain.run.evaluate import EvalOptions
from retain.run.store import RunDir
from retain.run.train import Optim
from retain.types import RetainError, digest

METHOD = [{"lora_per_task": {"init": "previous"}}, {"ema": {"beta": 0.5}}, {"replay": {"size": 4}}]
OPTIM = Optim(lr=1e-3, steps=3, batch_size=6, warmup=0.0, max_grad_norm=1.0, checkpoint_every=2, log_every=2)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    engine, method = Engine.start("cpu"), build(METHOD)
    store = RunDir.open(folder, {"method": METHOD}, main=engine.main)
    engine.wait()
    m = model()
    run(m, stream(12, 5), method, OPTIM, store, engine=engine, options=EvalOptions(batch_size=2))
    told = {name: digest(m.adapters.state(name)) for name in m.adapters.names}
    everyone = engine.gather([told, digest(method.state_dict())])
    if engine.main and any(other != everyone[0] for other in everyone):
        raise RetainError(f"the processes hold different weights: {everyone}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
