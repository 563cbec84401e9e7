"""No broken state is saved or loaded: not finite, changed on disk, of another shape, or outside of its folder."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
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
from fake_model import FakeModel, stream
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
from retain.run.store import Row, RunDir, load_state, safe, save_state
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


@pytest.fixture(autouse=True, scope="module")
def _no_power_cut() -> Iterator[None]:
    """Flushing to the disk is against power cuts, and half of the time of the runs below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


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


@pytest.mark.parametrize("lr", [3e39, 1e300])
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
        learn(tmp_path / "run", build("lora"), replace(GO, lr=3e39, steps=1), reuse=tmp_path / "reuse")
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


def counted(name: str, real: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(t: Tensor, *a: Any) -> Any:
        calls.append(name)
        return real(t, *a)

    return call


def test_looking_costs_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tensors there are: on an accelerator each transfer waits for all that was queued."""
    calls: list[str] = []
    for name in ("tolist", "item", "__bool__", "cpu"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, counted(name, real, calls))
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


def page(folder: Path) -> str:
    write_report([folder], folder / "report.html")
    return (folder / "report.html").read_text()


def undated(text: str) -> str:
    """A page without the minute in which it was made."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "NOW", text)


def rescored(folder: Path) -> Any:
    """`retain evaluate` on the runs above, whose recipe says nothing of their stream."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retain.commands.evaluate, "build_stream", lambda recipe: stream())
        patch.setattr("retain.config.parse", lambda *a: None)
        return rescore(folder)


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "run": lambda folder: (again(folder), kept(folder))[1],
    "report": lambda folder: undated(page(folder).replace(str(folder), "COPY")),
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
            log = name == "run" and str(spoilt) == "events.jsonl"  # whose losses `kept` reads
            call = partial(again if log else COMMANDS[name], copy)
            said = outcome(call, truths[name], copy, str(spoilt))
            assert said in count, f"{spoilt}, {name}: {said} (was {before!r:.500}, is {after!r:.500})"
            count[said] += 1
            shutil.rmtree(copy)
    return count


@pytest.fixture(scope="module")
def truths(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command says of the finished run."""
    copy = tmp_path_factory.mktemp("truth") / "copy"
    shutil.copytree(folders["whole"], copy)
    said: dict[str, Any] = {
        "evaluate": [str(c) for c in rescored(copy)],
        "report": page(copy),
        "run": kept(copy),
    }
    return said | {"report": undated(said["report"].replace(str(copy), "COPY"))}


@pytest.mark.parametrize("state", ["whole", "training", "evaluation"])
@pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_changed_byte_is_refused_or_changes_nothing(
    folders: dict[str, Path], truths: dict[str, Any], tmp_path: Path, state: str, times: int
) -> None:
    commands = ["run", "report", "evaluate"] if state == "whole" else ["run"]
    count = spoil(folders[state], commands, truths, tmp_path, random.Random(state), times)
    assert count["clear"] > 3 and count["fine"]  # or nothing was found out


@pytest.mark.parametrize("command", ["run", "report", "evaluate"])
@pytest.mark.parametrize("field", ["score", "prediction", "references"])
def test_changed_predictions_are_refused_by_their_file(
    folders: dict[str, Path], tmp_path: Path, command: str, field: str
) -> None:
    """Valid JSON of the right shape, and another matrix: only a digest can tell."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["whole"], copy)
    for done in ("DONE", "matrix.json") if command != "evaluate" else ():
        (copy / done).unlink()
    file = copy / "rows/01-colour/predictions/letter.jsonl"
    first, *rest = file.read_text().splitlines()
    line = {
        **json.loads(first),
        field: {"score": 73.0, "prediction": "other", "references": ["other"]}[field],
    }
    file.write_text("\n".join([json.dumps(line), *rest]) + "\n")
    with pytest.raises(
        RetainError, match=r"rows/01-colour/predictions/letter\.jsonl was changed after retain wrote it"
    ):
        COMMANDS[command](copy)


def test_changed_answers_of_an_evaluation_under_way_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders["evaluation"], copy)
    file = next(copy.rglob("*.part0"))
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), "prediction": "other"}), *rest]) + "\n")
    with pytest.raises(RetainError, match=r"part0, line 1 was changed after retain wrote it"):
        again(copy)


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


@pytest.mark.parametrize("times", [2, pytest.param(100, marks=pytest.mark.slow)])
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


def test_an_earlier_versions_folder_goes_on_without_seals(
    folders: dict[str, Path], truths: Any, tmp_path: Path
) -> None:
    """All seals and digests out, as it was: the same results in the end."""
    for state in ("training", "evaluation"):
        copy = tmp_path / state
        shutil.copytree(folders[state], copy)
        for p in [p for p in copy.rglob("*") if ".json" in p.suffix or ".part0" in p.name]:
            lines = p.read_text().splitlines() if p.suffix != ".json" else [p.read_text()]
            p.write_text("".join(json.dumps(unsealed(json.loads(line))) + "\n" for line in lines))
        again(copy)
        found = kept(copy)
        same = [n for n in found if Path(n).suffix in (".safetensors", ".jsonl", ".png")] + ["losses"]
        assert len(same) > 20 and [n for n in same if found[n] != truths["run"][n]] == []


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_changed_entry_of_a_folder_of_reuse_is_refused(tmp_path: Path, suffix: str) -> None:
    learn(tmp_path / "a", build("lora"), reuse=tmp_path / "reuse")
    rng = random.Random(suffix)
    for file in (tmp_path / "reuse").glob(f"*{suffix}"):
        content = bytearray(file.read_bytes())
        content[-3 if suffix == ".safetensors" else content.index(b"samples") + 10] ^= rng.choice([1, 2, 4])
        file.write_bytes(content)
    with pytest.raises(RetainError, match=rf"reuse/\w+{suffix[:5]}.*remove .* to tune this task again"):
        learn(tmp_path / "b", build("lora"), reuse=tmp_path / "reuse")


def test_a_state_of_another_kind_than_declared_is_named() -> None:
    method = Stack(build("lora"), Poison())
    good = method.state_dict()
    assert wrong_kinds(method, good) == ""
    wrong: dict[str, Any] = {"tensor": {"f": 1.0}, "array": "x", "number": [], "best": None}
    for key, value in wrong.items():
        said = wrong_kinds(method, {**good, "1.poison": {**good["1.poison"], key: value}})
        assert said.startswith(f"poison.{key} is no ")
    assert wrong_kinds(method, {"0.lora": {}, "1.poison": 3}) == "no state of 'poison'"


def test_an_earlier_versions_state_of_another_kind_is_named_by_its_file(tmp_path: Path) -> None:
    row, _ = spread(tmp_path)
    write_json(row.path / "method.json", {"$dict": [["buffer", 3], ["n_met", 4]]})
    for spec, said in {
        "replay": r"replay\.buffer is no list\[Example\]",
        "ema": r"state of 'ema': has .*needs",
    }.items():
        with pytest.raises(RetainError, match=rf"method\.json was not written by retain.*{said}"):
            row.load_model(FakeModel(SPEC).adapters, build(spec))


def test_a_log_may_hold_anything(folders: dict[str, Path], tmp_path: Path) -> None:
    """events.jsonl is a log: what cannot be sorted in is left out, and the page is drawn."""
    copy = tmp_path / "copy"
    shutil.copytree(folders["whole"], copy)
    lines = (copy / "events.jsonl").read_text().splitlines()
    odd = [
        '{"kind": [], "task": 3}', '{"step": "x"}', '{"kind": "step", "step": 1e999}', "[" * 900, "[" * 80 + "]" * 80,
        '{"kind": "step", "task": "colour", "step": 1, "losses": [-1, null, "x", 1' + "0" * 400 + '], "first": 0, "lr": 3}',
        '{"kind": "log", "who": {"a": 1}, "step": 2, "x": {"y": {"z": []}}}', "\0", '"\\ud800"', "1" * 5000,
    ]  # fmt: skip
    (copy / "events.jsonl").write_text("\n".join([*odd, *lines, *odd, '{"torn": ']))
    assert "colour" in page(copy)
    again(copy)


# -- names and paths ----------------------------------------------------------------------------------------------

NAMES = [
    "..", ".", "", "...", "a/b", "a\\b", "/etc/passwd", "../../up", "nul\0byte", "x" * 300, "x" * 301, "é" * 150, "日" * 90,
    "seal", "$state", "line\nbreak", "~root", "CON", "-rf", " ", "%s{}",
]  # fmt: skip


def test_a_name_is_one_file_name() -> None:
    files = [safe(name) for name in NAMES]
    for file in files:
        assert file == Path(file).name and not set(file) & set("/\\\0\n") and 0 < len(file.encode()) <= 200
    assert safe("x" * 300) != safe("x" * 301)
    assert [safe(n) for n in ("garments", "a.b-c_d", ".hidden", "x" * 200)] == [
        "garments",
        "a.b-c_d",
        ".hidden",
        "x" * 200,
    ]


def test_tasks_of_any_name_write_into_their_run_only(tmp_path: Path) -> None:
    names = ["..", "a/../../b", "nul\0byte", "x" * 300, "seal", "/abs"]
    base = stream()
    tasks = tuple(replace(base[i % 3], name=name) for i, name in enumerate(names))
    folder, data = tmp_path / "deep" / "down" / "run", Stream("fake", tasks)
    matrix = learn(folder, build({"lora_per_task": {"router": "oracle"}}), replace(GO, steps=1), data)
    assert (
        learn(folder, build({"lora_per_task": {"router": "oracle"}}), replace(GO, steps=1), data).tasks
        == matrix.tasks
    )
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(folder)]
    assert outside == [] and {p.name for p in folder.iterdir() if p.suffix == ".png"} == set()
    rows = RunDir.read(folder).rows()
    assert all(
        row.predictions(n).parent == row.path / "predictions" and row.answers(n)
        for row in rows
        for n in names
    )
    assert len(rows[-1].adapters()) == len(names) and "seal" in page(folder)
    with pytest.raises(RetainError, match="is no text that UTF-8 can hold"):
        learn(tmp_path / "half", build("lora"), data=Stream("fake", (replace(base[0], name="\ud800"),)))


def spread(tmp_path: Path) -> tuple[Row, Path]:
    row, model = RunDir.open(tmp_path / "run", {}).row(1, "t"), FakeModel(SPEC)
    model.adapters.add("a", torch.Generator().manual_seed(0))
    row.save_model(model.adapters, build("lora"), {}, None)
    return row, row.path / "adapters" / "a.safetensors"


@pytest.mark.parametrize("how", ["absolute", "up", "link", "linked folder", "nul"])
def test_an_adapter_outside_of_its_run_is_refused(tmp_path: Path, how: str) -> None:
    """The very file, with its digest: only its place is wrong."""
    row, file = spread(tmp_path)
    shutil.move(file, tmp_path / "a.safetensors")
    names = {
        "absolute": f"{tmp_path}/a.safetensors",
        "up": "rows/../../a.safetensors",
        "nul": "rows\0/a.safetensors",
    }
    if how == "link":
        file.symlink_to(tmp_path / "a.safetensors")
    if how == "linked folder":
        file.parent.rmdir()
        file.parent.symlink_to(tmp_path)
    bank = row.path / "bank.json"
    head = read_json(bank)
    head["adapters"]["a"]["file"] = names.get(how, head["adapters"]["a"]["file"])
    records.write(bank, head)
    with pytest.raises(RetainError, match=r"bank\.json: .*leads out of the run's folder"):
        row.load_model(FakeModel(SPEC).adapters, None)


def test_a_mix_of_adapters_that_are_not_there_is_refused(tmp_path: Path) -> None:
    row, _ = spread(tmp_path)
    records.write(
        row.path / "bank.json", {**read_json(row.path / "bank.json"), "mix": {"weights": {"b": 1.0}}}
    )
    with pytest.raises(RetainError, match=r"bank\.json .*mix: no adapter 'b'"):
        row.load_model(FakeModel(SPEC).adapters, None)


# -- text that UTF-8 cannot hold ----------------------------------------------------------------------------------

HALF = "half \udc80 a \ud83d pair, and a whole one 😀"


def test_half_a_surrogate_pair_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {HALF: [HALF]})
    write_jsonl(tmp_path / "a.jsonl", [{"a": HALF}, {"a": "é"}])
    append_lines(tmp_path / "a.jsonl", [{"a": HALF}])
    save_state(tmp_path / "state", {HALF: (HALF, Path(HALF))})
    assert read_json(tmp_path / "a.json") == {HALF: [HALF]}
    assert [r["a"] for r in read_jsonl(tmp_path / "a.jsonl")] == [HALF, "é", HALF]
    assert load_state(tmp_path / "state") == {HALF: (HALF, Path(HALF))}
    assert "é" in (tmp_path / "a.jsonl").read_text(encoding="utf8")  # what UTF-8 can hold stays legible


def test_a_run_whose_rows_hold_half_a_pair_is_saved(tmp_path: Path) -> None:
    """Replay's buffer is written after hours of training: it is no time to find out."""
    base = stream()
    odd = [replace(e, references=(HALF,), meta={HALF: HALF}) for e in base[0].train]
    data = Stream(
        "fake",
        (replace(base[0], train=odd, test=[replace(e, references=(HALF,)) for e in base[0].test]), base[1]),
    )
    learn(tmp_path / "run", Stack(build("lora"), build({"replay": {"size": 4}})), data=data)
    row = RunDir.read(tmp_path / "run").rows()[1]
    state = load_state(row.path / "method")["1.replay"]
    assert all(e.references == (HALF,) for e in state["buffer"])
    assert row.answers("colour")[0]["references"] == [HALF] and "colour" in page(tmp_path / "run")


def test_json_has_bounds() -> None:
    assert parse_json("[" * 500 + "]" * 500)
    for text in ("[" * 501 + "]" * 501, "[" * 100_000, "1" * 5000):
        with pytest.raises(ValueError):
            parse_json(text)
    with pytest.raises(RetainError, match="nested too deep to be saved"):
        nest: Any = 0
        for _ in range(2000):
            nest = [nest]
        save_state(Path("state"), nest)


# -- export -------------------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
import retain.adapters.peft_format as peft
import retain.commands.export as export

def die(*a, **k):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "written":
    export.load_pretrained = die
else:
    peft.write_text = die
sys.argv[1:] = sys.argv[2:]
from retain.cli import main
main()
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a tiny model of Hugging Face's."""
    base = tmp_path_factory.mktemp("shop")
    recipe = own_data.shop(base, own_data.model_dir(base / "model"), n_train=4, n_test=2)
    done = CliRunner().invoke(app, ["run", str(recipe), "-q", "optim.steps=1"])
    assert done.exit_code == 0, done.output
    return base / "run"


@pytest.mark.parametrize("moment", ["half", pytest.param("written", marks=pytest.mark.slow)])
def test_a_killed_export_is_made_by_the_same_command(shop: Path, tmp_path: Path, moment: str) -> None:
    words = ["export", str(shop), "--to", str(tmp_path / "out")]
    died = limits.finished([sys.executable, "-c", DIES, moment, *words], limits.LAUNCH, "LAUNCH")
    assert died.returncode == -9 and not (tmp_path / "out").exists()
    left = list(tmp_path.iterdir())
    assert left and all(".part-" in p.name for p in left)
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out" / "adapter_config.json"
    ).is_file()


@pytest.mark.parametrize(
    "file", ["rows/02-paint/adapters/lora.safetensors", "rows/02-paint/bank.json", "run.json"]
)
def test_export_refuses_what_was_changed(shop: Path, tmp_path: Path, file: str) -> None:
    copy = tmp_path / "run"
    shutil.copytree(shop, copy)
    content = bytearray((copy / file).read_bytes())
    at = -5 if file.endswith(".safetensors") else content.index(b'"seal": "') + 10
    content[at] = content[at] ^ 1
    (copy / file).write_bytes(content)
    done = CliRunner().invoke(app, ["export", str(copy), "--to", str(tmp_path / "out")])
    assert done.exit_code == 2 and file in done.stderr and "does not fit" in done.stderr, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
