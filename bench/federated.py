"""What federation costs: a round in one process beside its local fits, and a server's aggregation of many answers.

`round`: the coordinator with two clients (messages packed, spooled, admitted, averaged, a checkpoint saved) over `fit`
of the same clients' rows for the same steps and nothing else. `aggregate`: FedAvg of 100 answers with rank-16 adapters
on the seven linear layers of a 7B model's 32 blocks (fp32); four different files, each read 25 times. Memory is the
growth of anonymous resident memory (RssAnon, looked at every 5 ms), in units of one adapter; pages of files that the
kernel may drop at any time are not counted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import common
import torch
from common import Ratio, Took, ratio, timed
from merge import SHAPES
from safetensors.torch import save_file

from retain.adapters.bank import Mix
from retain.federated import server as servers
from retain.federated.local import federation
from retain.federated.message import KEY, Message, Spooled
from retain.federated.server import ServerState, Update
from retain.federated.spec import FederatedSpec
from retain.method import Context, build
from retain.run.engine import Engine
from retain.run.store import CheckpointDir, empty
from retain.run.train import fit
from retain.stream import Stream

CLIENTS, RANK, BLOCKS = 100, 16, 32


def rounds(size: common.Size, reps: int) -> Ratio:
    """CPU seconds of the fits alone over those of whole rounds: at least 1 / 1.1."""
    base, processor = common.base(size)
    model, how = common.ours(base, processor, size), common.optim(size, "fp32")
    stream = Stream("bench", (common.task(size),))
    spec = FederatedSpec(clients=2, per_round=2, rounds=1, skew="even")

    def whole() -> None:
        fresh(model)
        with tempfile.TemporaryDirectory() as tmp:
            fed = federation(spec, servers.build("fedavg"), stream, Path(tmp) / "clients")
            ctx = Context(model, fed.stages(build("lora"), stream)[0], stream, [], 0)
            fed.fit(model, build("lora"), ctx, how, Engine(), CheckpointDir(Path(tmp) / "row" / "checkpoint"))

    parts = federation(spec, servers.build("fedavg"), stream, Path("unused")).split

    def alone() -> None:
        for client in parts.clients:
            fresh(model)
            rows = parts.examples(stream[0].name, client, stream)
            task = type(stream[0])(stream[0].name, rows, (), stream[0].score)
            fit(model, build("lora"), Context(model, task, stream, [], 0), how)

    a, b = list[Took](), list[Took]()
    alone()  # image features are warm in both
    for _ in range(reps):
        a.append(timed(alone)[0])
        b.append(timed(whole)[0])
    units = 2.0
    return ratio(
        f"federated round of 2 clients over their fits, {size.name}", ">= 0.91", a, b, units, unit="fits/s"
    )


def fresh(model: object) -> None:
    """No adapter in the bank."""
    bank = model.adapters  # type: ignore[attr-defined]
    bank.mix = Mix()
    empty(bank)


# -- a server's aggregation ------------------------------------------------------------------------------------


def adapter(seed: int, blocks: int, width: int, inner: int) -> dict[str, torch.Tensor]:
    """A random rank-16 adapter, by `adapter/site.tensor`."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {**{f"self_attn.{n}_proj": (width, width) for n in "qkvo"}, "mlp.down_proj": (width, inner)}
    shapes |= {f"mlp.{n}_proj": (inner, width) for n in ("gate", "up")}
    out = {}
    for i in range(blocks):
        for name, (o, d) in shapes.items():
            out[f"lora/model.layers.{i}.{name}.lora_A"] = torch.randn(RANK, d, generator=draw)
            out[f"lora/model.layers.{i}.{name}.lora_B"] = torch.randn(o, RANK, generator=draw)
    return out


def anonymous() -> float:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return float(line.split()[1]) * 1024
    return 0.0


def aggregate(blocks: int, width: int, inner: int, clients: int) -> list[Ratio]:
    """Peak memory over one adapter, and seconds, in a process that has made nothing before."""
    with tempfile.TemporaryDirectory() as tmp:
        for k in range(min(5, clients)):  # the fifth is the server's own
            tensors = {f"w/{key}": t for key, t in adapter(k, blocks, width, inner).items()}
            save_file(tensors, Path(tmp) / f"{k}.safetensors", {KEY: "{}"})
        command = [sys.executable, __file__, "--one", tmp, str(clients)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    one, grown, seconds = map(float, out.split()[-3:])
    mib, r = 2.0**20, grown / one
    name = f"aggregate {clients} adapters of {one / mib:.0f} MiB, memory over one"
    note = f"{seconds:.1f} s on the clock, {clients * one / 2**30 / seconds:.2f} GiB/s"
    return [Ratio(name, "<= 2", r, r, r, r, one / mib, grown / mib, unit="MiB", note=note)]


def one(folder: Path, clients: int) -> str:
    """Bytes of an adapter, growth of memory, seconds."""
    files = [Spooled(p) for p in sorted(folder.glob("*.safetensors"))]
    weights = {k.removeprefix("w/"): files[-1].tensor(k) for k in files[-1].keys}
    updates = [Update(f"client-{k:03d}", 100 + k, files[k % (len(files) - 1)]) for k in range(clients)]
    state, rule = ServerState(weights), servers.build("fedavg")
    rule.aggregate(ServerState(dict(list(weights.items())[:1])), updates[:1])  # what is imported late
    peak, stop, before = [0.0], threading.Event(), anonymous()

    def look() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=look)
    watcher.start()
    began = time.perf_counter()
    rule.aggregate(state, updates)
    seconds = time.perf_counter() - began
    stop.set()
    watcher.join()
    size = sum(t.numel() * t.element_size() for t in weights.values())
    return f"{size} {peak[0] - before} {seconds}"


def message() -> Ratio:
    """Bytes of a message over those of its tensors."""
    weights = adapter(0, BLOCKS, *SHAPES["llama7b"][:2])
    data = len(Message({"kind": "train"}, {f"start/{k}": t for k, t in weights.items()}).to_bytes())
    own = sum(t.numel() * t.element_size() for t in weights.values())
    r = data / own
    return Ratio(
        "bytes of a message over its tensors, 7B rank 16",
        "<= 1.01",
        r,
        r,
        r,
        r,
        own / 2**20,
        data / 2**20,
        unit="MiB",
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "--one" in sys.argv:
        print(one(Path(sys.argv[2]), int(sys.argv[3])))
        sys.exit()
    args = common.options(__doc__)
    quick = args.sizes == "smoke"
    common.report([rounds(common.SMOKE if quick else common.POCKET, min(args.reps, 5))])
    width, inner, _ = SHAPES["smoke" if quick else "llama7b"]
    common.report(aggregate(2 if quick else BLOCKS, width, inner, 5 if quick else CLIENTS))
    if not quick:
        common.report([message()])
