"""The frontier of kept against learned: what averaging rules make of one and the same trajectory.

    python scripts/pocket_frontier.py                    # what is missing, then docs/frontier.md and its pictures
    python scripts/pocket_frontier.py --seeds 0 1 --pairs garments,digits --steps 80
    python scripts/pocket_frontier.py --write-only       # only the page, from the results that are there

A pair of tasks is learned one after the other by one LoRA. No rule below touches the raw weights before a task ends,
so all of them watch the same second task; each is the library's own method, given the weights as they were and
asked for its end state. That state is scored on both tasks: kept (the first) and learned (the second), on validation
data, which no table of results uses. One file per seed, pair and number of steps; a killed script goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

from retain import config  # noqa: E402
from retain.adapters.bank import Mix  # noqa: E402
from retain.assemble import build_model  # noqa: E402
from retain.files import read_record, write_json  # noqa: E402
from retain.method import Context, Method, Stack, build  # noqa: E402
from retain.models.base import Model  # noqa: E402
from retain.pocket.stream import pocket  # noqa: E402
from retain.report.frontier import write_frontier  # noqa: E402
from retain.run.evaluate import EvalOptions, evaluate, plan  # noqa: E402
from retain.run.train import fit  # noqa: E402
from retain.stream import Stream, Task  # noqa: E402

PAIRS = ("garments,digits", "digits,garments", "charts,counting")
STEPS = (80, 320)
NUMBER = "{:g}".format


def rules() -> dict[str, dict[str, Any]]:
    """Every rule as a recipe would name it, by family and value: `ema 0.99`."""
    out: dict[str, dict[str, Any]] = {}
    out |= {f"ema {NUMBER(b)}": {"ema": {"beta": b}} for b in (0.9, 0.97, 0.99, 0.995, 0.9965, 0.998)}
    out |= {f"interpolate {NUMBER(r)}": {"interpolate": {"ratio": r}} for r in (0.25, 0.5, 0.75, 0.9)}
    out["interpolate chosen"] = {"interpolate": {"choose": [0.25, 0.5, 0.75, 0.9, 1.0], "keep": 16}}
    for variant, kappas in {
        "official": (2.0, 0.5, 0.2, 0.1, 0.07, 0.05, 0.03, 0.01),
        "paper": (0.3, 1.0, 5.0, 50.0),
        "bounded": (1.0, 100.0, 1e3, 1e4, 3e4, 1e5),
    }.items():
        out |= {f"{variant} {NUMBER(k)}": {"llaca": {"variant": variant, "kappa": k}} for k in kappas}
    for k in (2.0, 4.0, 8.0, 12.0, 16.0, 32.0, 128.0):
        out[f"means {NUMBER(k)}"] = {"llaca": {"scale": "means", "kappa": k}}
    for k in (8.0, 12.0, 32.0):
        out[f"layer {NUMBER(k)}"] = {"llaca": {"scale": "means", "per": "layer", "kappa": k}}
    return out


@dataclass
class Watched(Method):
    """Rules that watch one trajectory. The raw weights go on; `ends` has each rule's own end of the task.

    In a task before `seen` is not empty only beginnings and ends are told: an average starts with the second task.
    """

    name: ClassVar[str] = "watched"
    rules: dict[str, Method] = field(default_factory=dict)
    ends: dict[str, dict[str, torch.Tensor]] = field(init=False, default_factory=dict)
    events: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {name: rule.config() for name, rule in self.rules.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def begin_task(self, ctx: Context) -> None:
        for rule in self.rules.values():
            rule.begin_task(ctx)

    def grads(self, ctx: Context) -> None:
        for rule in self.rules.values() if ctx.seen else ():
            rule.grads(ctx)

    def after_step(self, ctx: Context) -> None:
        for rule in self.rules.values() if ctx.seen else ():
            rule.after_step(ctx)

    def end_task(self, ctx: Context) -> None:
        bank, log = ctx.model.adapters, ctx.log
        (name,) = bank.mix.names
        raw = bank.state(name)
        self.ends, self.events = {"lora": raw}, {}
        for label, rule in self.rules.items():
            told: list[dict[str, Any]] = []
            ctx.log = lambda told=told, **event: told.append(event)
            rule.end_task(ctx)
            self.ends[label], self.events[label] = bank.state(name), _short(told)
            bank.load(name, raw)
        ctx.log = log


def _short(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a rule told of its task: reach, the way that was gone, the ratio it chose, its share of fallbacks."""
    last = events[-1] if events else {}
    told = {k: last[k] for k in ("reach", "gone", "ratio", "losses") if k in last}
    shares = [g["fallback"] for g in last.get("groups", {}).values()]
    return told | ({"fallback": sum(shares) / len(shares)} if shares else {})


def trajectory(model: Model, pair: tuple[Task, Task], seed: int, steps: int, n_eval: int) -> dict[str, Any]:
    """One trajectory and every rule's scores on both tasks, in percent."""
    recipe = config.load(ROOT / "recipes" / "pocket_long" / "lora.yaml", [f"optim.steps={steps}"])
    bank = model.adapters
    bank.mix = Mix({})
    for name in list(bank.names):
        bank.remove(name)
    watched = Watched({label: build(spec) for label, spec in rules().items()})
    method, stream, began = Stack(build("lora"), watched), Stream("pair", pair), time.perf_counter()
    for i, task in enumerate(pair):
        fit(model, method, Context(model, task, stream, [t.name for t in pair[:i]], seed), recipe.optim)
        if i == 0:
            first = _scores(model, stream, seed, n_eval)
    train_s, out = time.perf_counter() - began, dict[str, Any]()
    (name,) = bank.mix.names
    for label, state in watched.ends.items():
        bank.load(name, state)
        scores = _scores(model, stream, seed, n_eval)
        out[label] = {**dict(zip(("kept", "learned"), scores, strict=True)), **watched.events.get(label, {})}
    wall = time.perf_counter() - began
    return {
        "pair": [t.name for t in pair], "seed": seed, "steps": steps, "n_eval": n_eval, "before": first,
        "rules": out, "train_s": round(train_s), "eval_s": round(wall - train_s),
    }  # fmt: skip


def _scores(model: Model, stream: Stream, seed: int, n_eval: int) -> list[float]:
    out = []
    for task in stream:
        ctx, options = Context(model, task, stream, [], seed), EvalOptions(split="valid")
        found = evaluate(model, task, plan(model, task, None, ctx, options), options)
        out.append(sum(p.score for p in found[:n_eval]) / n_eval)
    return out


def files(args: argparse.Namespace) -> Mapping[Path, tuple[str, int, int]]:
    """Result files of what was asked for, the first seeds of everything first."""
    todo = [(pair, seed, steps) for seed in args.seeds for steps in args.steps for pair in args.pairs]
    return {
        args.folder / f"{p.replace(',', '-')}-{steps}-{seed}.json": (p, seed, steps)
        for p, seed, steps in todo
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", nargs="*", type=int, default=list(STEPS))
    parser.add_argument("--n-eval", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "frontier")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "frontier.md")
    parser.add_argument("--write-only", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = None
    for path, (names, seed, steps) in files(args).items():
        if args.write_only or path.is_file():
            continue
        if model is None:
            model = build_model(config.load(ROOT / "recipes" / "pocket_long" / "lora.yaml"))
        data = pocket(n_test=1, n_valid=args.n_eval, order=names.split(","))
        one, two = data.on_valid().tasks
        found = trajectory(model, (one, two), seed, steps, args.n_eval)
        write_json(path, found)
        print(f"{path.stem:32s} trained in {found['train_s']} s, scored in {found['eval_s']} s", flush=True)
    records = [read_record(p, "rules", "pair") for p in sorted(args.folder.glob("*.json"))]
    print(f"wrote {write_frontier(records, args.out)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
