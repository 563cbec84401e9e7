"""Bad input, one case per line: exit code 2, one message that names the thing, and nothing saved is lost."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import own_data
from retain import files
from retain.cli import app
from retain.run import records

Case = tuple[Callable[[Path], list[str]], list[str]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_data.model_dir(tmp_path_factory.mktemp("base"))


@pytest.fixture
def shop(tmp_path: Path, model: Path) -> Path:
    """A healthy recipe, made worse by the case."""
    return own_data.shop(tmp_path, model)


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def refused(result: Result, words: list[str]) -> None:
    """Exit code 2, one message on stderr with these words, no traceback."""
    assert result.exit_code == 2, f"exit code {result.exit_code}: {result.output} {result.exception!r}"
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.count("error:") == 1, result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr, f"{word!r} is missing in: {result.stderr}"


def rows(folder: Path, name: str = "colour_train.json") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / name).read_text())
    return found


def edit(folder: Path, change: Callable[[list[Any]], Any], name: str = "colour_train.json") -> list[str]:
    """Change rows of a file of the shop."""
    data = rows(folder, name)
    change(data)
    (folder / name).write_text(json.dumps(data))
    return []


def image(folder: Path, write: Callable[[Path], Any]) -> list[str]:
    """Replace the third row's image."""
    path = folder / "images" / rows(folder)[2]["image"]
    path.unlink()
    write(path)
    return []


def text(folder: Path, name: str, content: str) -> list[str]:
    (folder / name).write_text(content)
    return []


THIRD = ["colour_train.json", "row 3"]
DATA: dict[str, Case] = {
    "missing image": (lambda d: image(d, lambda p: None), [*THIRD, "'image'", "colour_train_2.png", "no such image"]),
    "corrupt image": (lambda d: image(d, lambda p: p.write_bytes(b"\x89PNG no")), [*THIRD, "'image'", "not an image"]),
    "empty image": (lambda d: image(d, lambda p: p.touch()), [*THIRD, "colour_train_2.png", "not an image"]),
    "huge image": (
        lambda d: [*image(d, lambda p: Image.new("1", (300, 300)).save(p)), "stream.max_pixels=80000"],
        [*THIRD, "300 x 300", "80,000"],
    ),
    "image escapes": (
        lambda d: edit(d, lambda r: r[2].update(image="../mine.yaml")), [*THIRD, "'../mine.yaml'", "leaves the image root"],
    ),
    "wrong row": (lambda d: edit(d, lambda r: r.__setitem__(2, 5)), [*THIRD, "an object", "5"]),
    "wrong field": (
        lambda d: edit(d, lambda r: r[2].update(conversations=[{"from": "robot"}])),
        [*THIRD, "conversations[0]", "'robot'", "human"],
    ),
    "broken JSON": (lambda d: text(d, "colour_train.json", '[{"id": 1'), ["colour_train.json", "broken JSON", "column"]),
    "broken JSONL": (
        lambda d: text(d, "colour_train.json", '{"text": "x", "answer": "y"}\n{"te'),
        ["colour_train.json", "row 2 (line 2)", "broken JSON"],
    ),
    "not text": (lambda d: (d / "colour_train.json").write_bytes(b"\xff\xfe\xff") and [], ["colour_train.json", "UTF-8"]),
    "empty train set": (lambda d: text(d, "colour_train.json", "[]"), ["tasks[0] (colour)", "train", "no row"]),
    "same id twice": (
        lambda d: edit(d, lambda r: r[2].update(id=r[0]["id"])), ["'colour'", "train", "colour-train-0", "more than once"],
    ),
    "same id twice in test": (
        lambda d: edit(d, lambda r: r[2].update(id=r[0]["id"]), "paint_test.json"), ["'paint'", "test", "paint-test-0"],
    ),
    "no such data file": (lambda d: ["stream.tasks.paint.test=nope.json"], ["nope.json", "no such file"]),
    "no image root": (lambda d: ["stream.image_root=pics"], ["pics", "no folder"]),
    "two tasks of one name": (lambda d: ["stream.tasks.paint.name=colour"], ["stream", "colour", "twice"]),
    "no test file": (lambda d: ["stream.tasks.paint.test=''"], ["tasks[1] (paint)", "'test' is missing"]),
}  # fmt: skip

RECIPE: dict[str, Case] = {
    "unknown key": (lambda d: ["optimm.lr=1"], ["mine.yaml", "'optimm'", "did you mean 'optim'", "Choose from"]),
    "unknown field": (lambda d: ["optim.learning_rate=1"], ["optim", "'learning_rate'", "Choose from", "projector_lr"]),
    "wrong type": (lambda d: ["optim.steps=many"], ["optim.steps", "'many'", "integer"]),
    "bad override": (lambda d: ["optim.lr"], ["'optim.lr'", "key=value"]),
    "rank 0": (lambda d: ["adapter.rank=0"], ["adapter", "rank", "at least 1", "0"]),
    "negative lr": (lambda d: ["optim.lr=-0.1"], ["optim.lr", "-0.1"]),
    "no steps": (lambda d: ["optim.steps=0"], ["steps"]),
    "unknown score": (lambda d: ["stream.tasks.colour.score=exakt"], ["tasks[0] (colour)", "'exakt'", "'exact'"]),
    "unknown method": (lambda d: ["method=lorra"], ["method", "'lorra'", "did you mean 'lora'", "Choose from"]),
    "unknown method field": (
        lambda d: ["method=[lora, {replay: {sise: 3}}]"], ["method[1].replay", "'sise'", "did you mean 'size'"],
    ),
    "wrong method field": (lambda d: ["method=[lora, {replay: {size: big}}]"], ["method[1].replay.size", "'big'", "int"]),
    "two owners of adapt": (
        lambda d: ["method=[lora, lora_per_task]"], ["adapt", "one part may define it", "'lora'", "'lora_per_task'"],
    ),
    "nobody owns adapt": (lambda d: ["method=[ewc]"], ["adapt", "'ewc'", "`lora`"]),
    "prompts without a prompt adapter": (
        lambda d: ["method=modal_prompt"], ["adapter.kind", "'lora'", "'modal_prompt'", "kind: prompt"],
    ),
    "prompt adapter without a prompt method": (
        lambda d: ["adapter={kind: prompt}"], ["adapter.kind", "'prompt'", "'lora'", "choose another method"],
    ),
    "experts for prompts": (
        lambda d: ["method=modal_prompt", "adapter={kind: moe}"], ["adapter.kind", "'moe'", "kind: prompt"],
    ),
    "experts without an expert adapter": (lambda d: ["method=moe_lora"], ["adapter.kind", "'moe_lora'", "kind: moe"]),
    "experts that do not divide": (
        lambda d: ["method=moe_lora", "adapter={kind: moe, rank: 4, experts: 3}"], ["adapter", "rank 4", "3 experts"],
    ),
    "unknown adapter kind": (lambda d: ["adapter={kind: promt}"], ["adapter.kind", "'promt'", "did you mean 'prompt'"]),
    "a key of another kind": (lambda d: ["adapter={kind: prompt, rank: 4}"], ["adapter", "'rank'", "at_once"]),
    "prompts beyond the context": (
        lambda d: ["method=modal_prompt", "adapter={kind: prompt, tokens: 200}"],
        ["adapter", "3 prompts of 200 tokens", "512 positions"],
    ),
    "prompts and example beyond the context": (
        lambda d: ["method=modal_prompt", "adapter={kind: prompt, tokens: 166}"], ["colour", "498 more are kept", "prompts"],
    ),
    "more top layers than layers": (lambda d: ["method={hide: {top_k: 9}}"], ["hide.top_k", "9", "2 layers"]),
    "routed without features": (
        lambda d: ["method=hide", "adapter.targets=all"], ["hide", "frozen features", "model.guide"],
    ),
    "targets match nothing": (lambda d: ["adapter.targets=nothing_here"], ["adapter", "targets", "nothing_here"]),
    "targets no expression": (lambda d: ["adapter.targets='('"], ["adapter", "targets", "'('", "regular expression"]),
    "no such model": (lambda d: ["model=./nowhere"], ["model", "./nowhere"]),
    "model folder without model": (lambda d: ["model=images"], ["model", "images", "config.json"]),
    "unknown family": (lambda d: ["model.family=llama"], ["family", "llama", "llava"]),
    "too long": (lambda d: ["model.max_length=8"], ["8", "colour_train.json, row 1)"]),
    "eval batch": (lambda d: ["eval.batch_size=0"], ["eval.batch_size", "0"]),
    "recipe broken": (lambda d: text(d, "mine.yaml", "model: ["), ["mine.yaml", "line 1", "YAML"]),
    "recipe of a number": (lambda d: text(d, "mine.yaml", "3"), ["mine.yaml", "a mapping"]),
}  # fmt: skip


@pytest.mark.parametrize("case", [*DATA, *RECIPE])
def test_refused_before_anything_is_written(shop: Path, case: str) -> None:
    make, words = (DATA | RECIPE)[case]
    refused(call("run", str(shop), *make(shop.parent)), words)
    assert not (shop.parent / "run").exists(), "a refused run may leave no folder behind"


def test_no_such_recipe(tmp_path: Path) -> None:
    refused(call("run", str(tmp_path / "mine.yaml")), ["mine.yaml", "no such recipe"])
    refused(call("doctor", str(tmp_path)), ["folder"])


# -- run folders ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished run of the shop; cases copy it."""
    recipe = own_data.shop(tmp_path_factory.mktemp("done"), model, n_train=4, n_test=2)
    result = call("run", str(recipe), "-q", "optim.steps=2")
    assert result.exit_code == 0, result.output
    return recipe


@pytest.fixture
def run(done: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """The command that made a run, and a fresh copy of its folder."""
    import shutil

    target = tmp_path / "copy"
    shutil.copytree(done.parent / "run", target)
    return ["run", str(done), "-q", "optim.steps=2", f"out={target}"], target


def state(folder: Path) -> dict[str, str]:
    skipped = {"run.lock", "events.jsonl"}
    kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skipped]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def unfinish(folder: Path) -> None:
    """As if the run had been killed before the last row was evaluated."""
    for path in (folder / "DONE", folder / "matrix.json", folder / "rows/02-paint/DONE"):
        path.unlink()


def overwrite(folder: Path, name: str, content: str) -> None:
    unfinish(folder)
    path = next(folder.glob(name))
    path.write_text(content)


FOLDERS: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "another recipe": (lambda d: None, ["optim.lr=0.5"], ["another recipe", "optim.lr", "0.5", "out=DIR"]),
    "another seed": (lambda d: None, ["seed=4"], ["another recipe", "seed", "4"]),
    "not a run": (lambda d: (d / "run.json").unlink(), [], ["copy", "not a run folder", "out=DIR"]),
    "broken run.json": (lambda d: (d / "run.json").write_text("{"), [], ["run.json", "JSON"]),
    "broken bank.json": (lambda d: overwrite(d, "rows/02-*/bank.json", "[]"), [], ["bank.json"]),
    "broken adapter": (
        lambda d: overwrite(d, "rows/02-*/adapters/*.safetensors", "junk"), [], ["02-paint", ".safetensors"],
    ),
    "adapter of another model": (
        lambda d: (unfinish(d), rewrite(d / "rows/02-paint/bank.json")), [], ["adapters of another model", "base"],
    ),
    "changed data": (
        lambda d: (unfinish(d), redigest(d / "data.json")), [], ["data", "changed"],
    ),
}  # fmt: skip


def rewrite(path: Path) -> None:
    head = json.loads(path.read_text())
    head["signature"]["base"] = "0123456789abcdef"
    path.write_text(json.dumps(records.sealed(path.name, head)))


def redigest(path: Path) -> None:
    data = json.loads(path.read_text())
    for entry in data.values():
        if isinstance(entry, dict) and "digest" in entry:
            entry["digest"] = "0123456789abcdef"
    path.write_text(json.dumps({name: records.sealed(name, entry) for name, entry in data.items()}))


@pytest.mark.parametrize("case", FOLDERS)
def test_a_wrong_run_folder_is_refused_and_kept(run: tuple[list[str], Path], case: str) -> None:
    spoil, overrides, words = FOLDERS[case]
    command, folder = run
    spoil(folder)
    before = state(folder)
    refused(call(*command, *overrides), words)
    assert state(folder) == before, "a refused run may change nothing"


def test_adapter_of_another_model_is_refused(run: tuple[list[str], Path], tmp_path: Path) -> None:
    """Not a forged file: another base under the same path."""
    _, folder = run
    import tiny

    other, processor = tiny.llava(seed=5)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    head = json.loads((folder / "run.json").read_text())
    head["config"]["model"]["name"] = str(tmp_path / "other")
    (folder / "run.json").write_text(json.dumps(records.sealed("run.json", head)))
    result = call("export", str(folder), "--to", str(tmp_path / "out"))
    refused(result, ["adapters of another model", "base"])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["No space left on device", "what was saved before is kept"]),
        (errno.EROFS, ["Read-only file system", "what was saved before is kept"]),
        (errno.EACCES, ["Permission denied"]),
    ],
)
@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_disk_that_takes_no_more(
    run: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch, number: int, words: list[str], after: int
) -> None:
    """The disk fills at some write of the last row: the message names the file, and the same command continues."""
    import os
    import shutil

    command, folder = run
    whole = state(folder)
    unfinish(folder)
    shutil.rmtree(folder / "rows" / "02-paint")
    saved, writes = state(folder), []
    real = files._flush

    def full(path: Path) -> None:
        writes.append(path)
        if len(writes) > after:
            raise OSError(number, os.strerror(number), str(path))
        real(path)

    monkeypatch.setattr(files, "_flush", full)
    result = call(*command)
    refused(result, [*words, "cannot write", "02-paint"])
    assert {k: v for k, v in state(folder).items() if k in saved} == saved
    monkeypatch.setattr(files, "_flush", real)
    again = call(*command)
    assert again.exit_code == 0, again.output
    same = {k for k in whole if not k.endswith(("budget.json", "fit.json", "cells.json", "config.yaml"))}
    after_all = state(folder)
    assert {k: after_all.get(k) for k in same} == {k: whole[k] for k in same}


@pytest.mark.parametrize("command", ["report", "compare", "evaluate", "export"])
def test_commands_on_something_else(tmp_path: Path, command: str) -> None:
    more = ["--to", str(tmp_path / "out")] if command == "export" else []
    refused(call(command, str(tmp_path / "nothing"), *more), ["nothing"])
    (tmp_path / "empty").mkdir()
    refused(call(command, str(tmp_path / "empty"), *more), ["run.json"])


def test_wrong_choices_on_a_run(run: tuple[list[str], Path], tmp_path: Path) -> None:
    folder = str(run[1])
    refused(call("evaluate", folder, "--task", "paints"), ["'paints'", "'paint'"])
    refused(call("evaluate", folder, "--score", "exakt"), ["'exakt'", "'exact'"])
    refused(call("evaluate", folder, "--after", "7"), ["7", "[0, 1, 2]"])
    refused(call("export", folder, "--to", str(tmp_path / "o"), "--after", "7"), ["7", "[1, 2]"])
    refused(call("export", folder, "--to", str(tmp_path / "o"), "--adapter", "x"), ["'x'", "--adapter"])
    refused(call("export", folder, "--to", folder), ["not empty"])
