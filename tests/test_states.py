"""No broken state is saved or loaded: not finite, changed on disk, of another shape, or outside of its folder."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import limits
import own_data
import retain.commands.evaluate
from crash import METHOD
from fake_model import FakeModel, example, stream
from loop_helpers import kept
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.cli import app
from retain.commands.evaluate import rescore
from retain.files import append_lines, parse_json, read_json, read_jsonl, write_json, write_jsonl
from retain.method import UNBOUNDED, Context, Method, Stack, build
from retain.models.hf import HFModel
from retain.report.html import write_report
from retain.run import records
from retain.run.continual import Silent, run
from retain.run.evaluate import EvalOptions
from retain.run.sound import broken, wrong_kinds
from retain.run.store import CheckpointDir, Row, RunDir, TunedDir, load_state, safe, save_state, save_tensors
from retain.run.train import Optim
from retain.stream import Stream
from retain.types import RetainError

SPEC = LoraSpec(rank=2, alpha=4.0)
GO = Optim(lr=2e-2, steps=3, batch_size=4, warmup=0.0, schedule="constant", log_every=9)
INF, NAN = math.inf, math.nan


def learn(folder: Path, method: Method, optim: Optim = GO, data: Stream | None = None, **more: Any) -> Any:
    store = RunDir.open(folder, more.pop("config", {}))
    how = {"options": EvalOptions(batch_size=2), **more}
    return run(FakeModel(SPEC), data or stream(), method, optim, store, **how)


# -- not finite: not saved ----------------------------------------------------------------------------------------


@dataclass
class Poison(Method):
    """Spoils one thing at one hook of one task."""

    name: ClassVar[str] = "poison"
    what: str = ""
    task: str = "letter"
    at: int = 0

    tensor: dict[str, Tensor] = field(init=False, default_factory=lambda: {"f": torch.ones(2)})
    array: list[np.ndarray] = field(init=False, default_factory=lambda: [np.ones(2)])
    number: float = field(init=False, default=0.0)
    best: float = field(init=False, default=INF, metadata=UNBOUNDED)

    def after_step(self, ctx: Context) -> None:
        if self.what == "step" and ctx.task.name == self.task and ctx.step == self.at:
            next(iter(ctx.model.adapters.parameters("lora").values())).data[0] = NAN

    def end_task(self, ctx: Context) -> None:
        if ctx.task.name == self.task:
            if self.what == "adapter":
                next(iter(ctx.model.adapters.parameters("lora").values())).data[0] = -INF
            self.tensor["f"][1] = INF if self.what == "tensor" else 1
            self.array[0][1] = NAN if self.what == "array" else 1
            self.number = NAN if self.what == "number" else 1


def poisoned(what: str, **more: Any) -> Method:
    return Stack(build("lora"), Poison(what, **more))


ENDS = [
    ("step", r"task 'letter': after its last step \(3\), adapter lora\.\S+ is not finite"),
    ("adapter", r"task 'letter': in end_task of poison, adapter lora\.\S+ is not finite"),
    ("tensor", r"in end_task of poison, method 1\.poison\.tensor\.f is not finite"),
    ("array", r"in end_task of poison, method 1\.poison\.array\[0\] is not finite"),
    ("number", r"in end_task of poison, method 1\.poison\.number is not finite"),
]


@pytest.mark.parametrize(("what", "said"), ENDS, ids=[e[0] for e in ENDS])
def test_what_is_not_finite_at_the_end_of_a_task_is_not_saved(tmp_path: Path, what: str, said: str) -> None:
    """The task before it is kept, to the byte; and what to try is told."""
    whole = (
        said
        + r".*nothing of it was saved, the state after 'colour' is kept; lower optim\.lr \(0\.02\).*out=DIR"
    )
    with pytest.raises(RetainError, match=whole):
        learn(tmp_path / "run", poisoned(what, at=2), reuse=tmp_path / "reuse" if what == "step" else None)
    row = RunDir.read(tmp_path / "run").rows()[-1]
    assert row.name == "colour" and row.done
    learn(tmp_path / "good", poisoned(""), data=stream())
    there = kept(tmp_path / "good")
    for name, content in kept(tmp_path / "run").items():
        assert name == "losses" or content == there[name], name
    assert not list((tmp_path / "run").rglob("02-*"))


@pytest.mark.parametrize("lr", [3e39, INF])
def test_a_last_step_that_is_too_long_is_an_error(tmp_path: Path, lr: float) -> None:
    """The loss before it is finite; the first task then has nothing, so a lower rate goes on in the same folder."""
    with pytest.raises(
        RetainError, match=r"after its last step \(1\).*what was saved before is kept.*optim\.lr"
    ):
        learn(tmp_path / "run", build("lora"), replace(GO, lr=lr, steps=1))
    learn(tmp_path / "run", build("lora"), replace(GO, steps=1))
    learn(tmp_path / "fresh", build("lora"), replace(GO, steps=1))
    found, fresh = kept(tmp_path / "run"), kept(tmp_path / "fresh")
    assert [n for n in fresh if n != "losses" and found[n] != fresh[n]] == []


def test_a_checkpoint_that_is_not_finite_is_not_written_and_the_last_one_stays(tmp_path: Path) -> None:
    optim = replace(GO, steps=6, checkpoint_every=2)
    said = r"task 'letter': after step 4 of 6.*its checkpoint after step 2 is kept"
    with pytest.raises(RetainError, match=said):
        learn(tmp_path / "run", poisoned("step", at=3), optim)
    saved = RunDir.read(tmp_path / "run").row(2, "letter").checkpoints().load()
    assert saved is not None and saved["stats"]["steps"] == 2 and not broken(saved["adapters"])


def test_an_optimizer_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squared gradients overflow before the weights do: these then stand still, and are finite."""

    @dataclass
    class Loud(Method):
        name: ClassVar[str] = "loud"

        def grads(self, ctx: Context) -> None:
            for p in ctx.model.adapters.trainable().values():
                if p.grad is not None:
                    p.grad += 1e25

    with pytest.raises(RetainError, match=r"after step 2 of 3, optimizer\.lora/\S+\.exp_avg_sq"):
        learn(tmp_path / "run", Stack(build("lora"), Loud()), replace(GO, checkpoint_every=2))
    assert not RunDir.read(tmp_path / "run").row(1, "colour").checkpoints().newest()


def test_a_folder_of_reuse_gets_nothing_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(RetainError, match="after its last step"):
        learn(tmp_path / "run", build("lora"), replace(GO, lr=INF, steps=1), reuse=tmp_path / "reuse")
    assert not list((tmp_path / "reuse").glob("*.json"))


def test_a_state_may_say_that_it_holds_infinity() -> None:
    method = poisoned("")
    assert broken(method.state_dict(), method) == [] and broken(method.state_dict()) == ["1.poison.best"]
    assert broken(Poison().state_dict(), Poison()) == []


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_every_kind_of_tensor_is_looked_at(kind: torch.dtype, value: float) -> None:
    good = torch.linspace(-1, 1, 7, dtype=kind)
    bad = good.clone()
    bad[3] = value
    state = {
        "good": good,
        "bad": bad,
        "empty": torch.zeros(0),
        "ints": torch.tensor([2**31]),
        "b": torch.tensor(True),
    }
    assert broken(state) == ["bad"] and broken([state["good"], (bad[3],)]) == ["[1][0]"]
    assert broken({"huge": torch.tensor([3e38, -3e38])}) == []  # a sum of squares would overflow


def test_looking_costs_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors there are: on an accelerator each transfer waits for all that was queued."""
    calls: list[str] = []
    for name in ("tolist", "item", "__bool__", "cpu"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda t, *a, n=name, r=real: (calls.append(n), r(t, *a))[1])
    assert broken({str(i): torch.ones(i + 1) for i in range(300)}) == []
    assert calls == ["tolist"]


def test_an_answer_that_is_not_finite_is_no_score(llava: HFModel) -> None:
    """Weights may be finite and their products not: nan as a largest logit is a token like any other."""
    import tiny

    bank = llava.adapters
    bank.add("a", torch.Generator().manual_seed(0))
    bank.mix = Mix({"a": 1.0})
    batch = llava.collate(tiny.examples(), answers=False)
    llava.generate(batch, 2)
    for p in bank.parameters("a").values():
        p.data.fill_(1e30)
    with pytest.raises(
        RetainError, match=r"example '\S+': the model's answer is not finite.*lower optim\.lr"
    ):
        llava.generate(batch, 2)


# -- not finite: not loaded ---------------------------------------------------------------------------------------


def test_what_an_earlier_version_saved_is_refused_by_its_file(tmp_path: Path) -> None:
    row, model = RunDir.open(tmp_path / "run", {}).row(1, "t"), FakeModel(SPEC)
    model.adapters.add("a", torch.Generator().manual_seed(0))
    method = Poison()
    method.number = NAN
    row.save_model(model.adapters, method, {}, None)
    with pytest.raises(RetainError, match=r"method\.json: 1 values are not finite \(first \['number'\]\)"):
        row.load_model(FakeModel(SPEC).adapters, Poison())
    next(iter(model.adapters.parameters("a").values())).data[0] = NAN
    row.save_model(model.adapters, Poison(), {}, None)
    with pytest.raises(RetainError, match=r"a\.safetensors: 1 tensors are not finite"):
        row.load_model(FakeModel(SPEC).adapters, None)


# -- changed on disk ----------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@dataclass
class Dies(Silent):
    """Ends a run in the middle: in an evaluation, after so many samples of its n-th cell."""

    cell: int
    n: int
    done: int = 0

    def evaluating(self, task: str, n: int) -> None:
        self.cell, self.done = self.cell - 1, 0

    def advance(self, n: int) -> None:
        self.done += n
        if self.cell == 0 and self.done >= self.n:
            raise KilledError


@dataclass
class Stops(Method):
    """Ends a run in the middle of a task's steps."""

    name: ClassVar[str] = "stops"
    armed: ClassVar[bool] = False

    def grads(self, ctx: Context) -> None:
        if Stops.armed and ctx.task.name == "letter" and ctx.step == 5:
            raise KilledError


OPTIM = replace(GO, steps=7, checkpoint_every=2)
CONFIG = {"method": "x", "seed": 0, "stream": {"mine": {}}}


def again(folder: Path, watch: Any = None) -> Any:
    """The run that the cases below spoil, or what is left of it."""
    method = Stack(build(METHOD), Stops())
    return learn(folder, method, OPTIM, config=CONFIG, watch=watch, reuse=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, one that stopped between two checkpoints, one that stopped in an evaluation."""
    base = tmp_path_factory.mktemp("runs")
    again(base / "whole")
    Stops.armed = True
    with pytest.raises(KilledError):
        again(base / "training")
    Stops.armed = False
    with pytest.raises(KilledError):
        again(base / "evaluation", Dies(8, 4))
    assert list((base / "training").rglob("newest.json")) and list((base / "evaluation").rglob("*.part0"))
    return {p.name: p for p in base.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def _fake_stream() -> Iterator[None]:
    """`retain evaluate` on the runs above, whose recipe says nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retain.commands.evaluate, "build_stream", lambda recipe: stream())
        patch.setattr(retain.commands.evaluate.config, "parse", lambda *a: None)
        patch.setattr(os, "fsync", lambda handle: None)  # against power cuts, of which there are none here
        yield


def page(folder: Path) -> str:
    write_report([folder], folder / "report.html")
    return (folder / "report.html").read_text()


def rescored(folder: Path) -> Any:
    return rescore(folder)


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "run": lambda folder: (again(folder), kept(folder))[1],
    "report": lambda folder: page(folder).replace(str(folder), "COPY"),
    "evaluate": lambda folder: [str(c) for c in rescored(folder)],
}


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One byte changed: mostly a digit or a letter for another, which breaks no syntax, else any bit."""
    plain = [i for i, b in enumerate(content) if chr(b).isalnum() and b < 128]
    if plain and rng.random() < 0.7:
        i = rng.choice(plain)
        kin = "0123456789" if chr(content[i]).isdigit() else "abcdefghijklmnopqrstuvwxyz"
        new = ord(rng.choice([c for c in kin if ord(c) != content[i]]))
    else:
        i = rng.randrange(len(content))
        new = content[i] ^ (1 << rng.randrange(8))
    return content[:i] + bytes([new]) + content[i + 1 :]


def kind(path: Path) -> str:
    """Files of one kind are spoiled alike."""
    name = "TASK" if path.suffix in (".jsonl", ".png") and path.name != "events.jsonl" else path.name
    return f"{path.parent.name if path.parent.name in ('adapters', 'checkpoint', 'predictions') else ''}/{name}{path.suffix}"


def outcome(call: Callable[[], Any], truth: Any, folder: Path, spoilt: str) -> str:
    """clear: refused, with a file of the run named; fine: as if nothing had been; else what went wrong."""
    try:
        found = call()
    except RetainError as error:
        text = str(error)
        return "clear" if str(folder) in text and "\n" not in text else f"unclear: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if spoilt == "events.jsonl":  # a log
        return "fine"
    if isinstance(found, dict):
        other = [name for name in truth if name != spoilt and found.get(name) != truth[name]]
        return f"other results in {other}" if other else "fine"
    return "fine" if found == truth else "other results"


def spoil(
    source: Path, commands: list[str], truths: dict[str, Any], tmp: Path, rng: random.Random, times: int
) -> dict[str, int]:
    """Change one byte of a file of each kind at a time, and give the folder to every command."""
    count, files = {"clear": 0, "fine": 0}, dict[str, list[Path]]()
    for p in sorted(p for p in source.rglob("*") if p.is_file() and p.stat().st_size):
        files.setdefault(kind(p), []).append(p.relative_to(source))
    for of_kind in files.values():
        for name in commands * times:
            spoilt, copy = rng.choice(of_kind), tmp / "copy"
            shutil.copytree(source, copy)
            before = (copy / spoilt).read_bytes()
            (copy / spoilt).write_bytes(after := flipped(before, rng))
            if name == "run" and (copy / "DONE").is_file():  # as if killed before the last row was done
                for done in ("DONE", "matrix.json", "rows/03-again/DONE"):
                    (copy / done).unlink()
            said = outcome(partial(COMMANDS[name], copy), truths[name], copy, str(spoilt))
            assert said in count, f"{spoilt}, {name}: {said} (was {before!r:.500}, is {after!r:.500})"
            count[said] += 1
            shutil.rmtree(copy)
    return count


@pytest.fixture(scope="module")
def truths(
    folders: dict[str, Path], _fake_stream: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each command says of the finished run."""
    copy = tmp_path_factory.mktemp("truth") / "copy"
    shutil.copytree(folders["whole"], copy)
    said = {"evaluate": [str(c) for c in rescored(copy)], "report": page(copy), "run": kept(copy)}
    return said | {"report": said["report"].replace(str(copy), "COPY")}


@pytest.mark.parametrize("state", ["whole", "training", "evaluation"])
@pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_changed_byte_is_refused_or_changes_nothing(
    folders: dict[str, Path], truths: dict[str, Any], tmp_path: Path, state: str, times: int
) -> None:
    commands = ["run", "report", "evaluate"] if state == "whole" else ["run"]
    count = spoil(folders[state], commands, truths, tmp_path, random.Random(state), times)
    assert count["clear"] > 3 and count["fine"]  # or nothing was found out


# -- of another shape ---------------------------------------------------------------------------------------------

NONSENSE: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, "", "x", "..", "\0", "\ud800", [], [[]], {}, {"a": 1}, [None], NAN, INF,
    "DEEP", ["DEEP"], {"$tensor": ["t9", False]}, {"$list": 3}, 10**25,
]  # fmt: skip
"""What a field may hold instead; DEEP becomes lists inside each other."""


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a nest, the whole of it first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, v in inner for place in places(v, (*at, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value[place[0]] = put(value[place[0]], place[1:], new)
    return value


def unsealed(value: Any) -> Any:
    """As an earlier version wrote it: without seals, digests of answers, and heads of states."""
    if isinstance(value, dict):
        if "$state" in value:
            return value["$state"]
        return {k: unsealed(v) for k, v in value.items() if k not in ("seal", "answers")}
    return [unsealed(v) for v in value] if isinstance(value, list) else value


def misshapen(content: str, lines: bool, rng: random.Random) -> str:
    """One value in a JSON file, or in one line of a JSONL file, replaced by something else."""
    texts = content.splitlines() if lines else [content]
    i = rng.randrange(len(texts))
    value = unsealed(json.loads(texts[i]))
    found = places(value)
    place = rng.choice(found[:1] if rng.random() < 0.2 else found)
    text = json.dumps(put(value, place, rng.choice(NONSENSE)))
    texts[i] = text.replace('"DEEP"', "[" * 900 + "]" * 900)
    return "\n".join(texts) + "\n"


def everything(folder: Path) -> None:
    """Every command in process that reads a run's files."""
    rescored(folder)
    page(folder)
    again(folder)


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_valid_json_of_another_shape_is_one_sentence(
    folders: dict[str, Path], tmp_path: Path, times: int
) -> None:
    rng, clear, copy = random.Random(times), 0, tmp_path / "copy"
    files = [
        p for s in folders.values() for p in sorted(s.rglob("*")) if ".json" in p.suffix or ".part0" in p.name
    ]
    by_kind: dict[str, list[Path]] = {}
    for p in files:
        by_kind.setdefault(kind(p), []).append(p)
    for of_kind in by_kind.values():
        for _ in range(times):
            file = rng.choice(of_kind)
            source = next(s for s in folders.values() if file.is_relative_to(s))
            shutil.copytree(source, copy)
            for done in ("DONE", "matrix.json") if file.name != "matrix.json" else ():
                (copy / done).unlink(missing_ok=True)
            target = copy / file.relative_to(source)
            target.write_text(misshapen(target.read_text(), file.suffix != ".json", rng))
            try:
                everything(copy)
            except RetainError as error:
                clear += 1
                assert str(copy) in str(error) and "\n" not in str(error), f"{file}: {error}"
            except Exception as error:
                raise AssertionError(f"{file}: {target.read_text()[:2000]}") from error
            shutil.rmtree(copy)
    assert clear > len(by_kind)
