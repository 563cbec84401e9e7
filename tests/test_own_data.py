"""`retain run` on a user's own folder: LLaVA JSON, HF messages JSONL; then every command on what it left."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import own_data
from retain.cli import app
from retain.commands import export
from retain.run.store import read_jsonl


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_data.model_dir(tmp_path_factory.mktemp("base"))


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def good(*args: object) -> str:
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result.output


def contents(folder: Path) -> dict[str, str]:
    """Hashes of what a run must not change when it is called again."""
    kept = [
        p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in {"run.lock", "events.jsonl"}
    ]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Path, str]:
    """A finished run on LLaVA JSON: its recipe, and what was printed."""
    recipe = own_data.shop(tmp_path_factory.mktemp("shop"), model)
    return recipe, good("run", recipe)


def test_llava_json(finished: tuple[Path, str]) -> None:
    recipe, printed = finished
    run = recipe.parent / "run"
    for word in ("colour", "paint", "zero-shot", "Last", "BWT", "mean_j A[T,j]", "retain report"):
        assert word in printed
    assert (run / "DONE").is_file()
    answers = read_jsonl(run / "rows" / "02-paint" / "predictions" / "colour.jsonl")
    assert [a["id"] for a in answers] == [f"colour-test-{i}" for i in range(3)]
    assert answers[0]["references"] == ["red"] and (run / answers[0]["image"]).is_file()


def test_hf_messages_train_the_same(finished: tuple[Path, str], tmp_path: Path, model: Path) -> None:
    """The same data in the other format gives the same adapters, bit for bit."""
    recipe = own_data.shop(tmp_path, model, jsonl=True)
    good("run", recipe, "--quiet")
    name = Path("rows/02-paint/adapters")
    ours = sorted((recipe.parent / "run" / name).glob("*.safetensors"))
    assert ours
    for path in ours:
        assert path.read_bytes() == (finished[0].parent / "run" / name / path.name).read_bytes()


def test_running_again_changes_nothing(finished: tuple[Path, str]) -> None:
    before = contents(finished[0].parent / "run")
    again = good("run", finished[0], "-q")
    assert contents(finished[0].parent / "run") == before
    title = f"{finished[0].parent / 'run'}: score"
    assert again[again.index(title) :] == finished[1][finished[1].index(title) :]


def test_every_other_command(finished: tuple[Path, str], tmp_path: Path) -> None:
    recipe, _ = finished
    run = recipe.parent / "run"
    page = tmp_path / "r.html"
    assert str(page) in good("report", run, "--out", page) and "<svg" in page.read_text(encoding="utf-8")
    assert "Last" in good("compare", run)
    table = good("evaluate", run, "--task", "paint", "--after", 2, "--score", "contains")
    assert "contains" in table and "paint" in table and "zero" not in table
    assert "0 errors" in good("doctor", recipe)
    plan = good("plan", recipe)
    assert "trainable parameters" in plan and "time (estimate)" in plan and "colour" in plan
    assert "lora" in good("explain", recipe) and "replay" in good("methods")


def test_export_peft_and_merged(finished: tuple[Path, str], tmp_path: Path) -> None:
    run = finished[0].parent / "run"
    assert "logits checked" in good("export", run, "--to", tmp_path / "peft")
    head = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert head["peft_type"] == "LORA" and head["r"] == 4
    saved = load_file(next((run / "rows/02-paint/adapters").glob("*.safetensors")))
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for key, tensor in saved.items():
        if "lora_" in key:
            assert torch.equal(tensor, written[f"base_model.model.{key}.weight"])
    said = good("export", run, "--after", 1, "--merged", "--to", tmp_path / "merged")
    assert "after colour" in said and (tmp_path / "merged" / "model.safetensors").is_file()


def test_an_export_with_other_logits_is_refused(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(bank: Any, mix: Any, folder: Path, base: str) -> Path:
        name = next(iter(mix.names))
        bank.load(name, {key: 1.5 * tensor + 0.05 for key, tensor in bank.state(name).items()})
        return save_peft(bank, mix, folder, base)

    save_peft = export.save_peft
    monkeypatch.setattr(export, "save_peft", wrong)
    result = call("export", finished[0].parent / "run", "--to", tmp_path / "peft")
    assert result.exit_code == 2 and "nothing was written: loaded by stock PEFT" in result.output
    assert not (tmp_path / "peft").exists()


def test_a_merged_checkpoint_is_a_base_of_its_own(finished: tuple[Path, str], tmp_path: Path) -> None:
    good("export", finished[0].parent / "run", "--merged", "--to", tmp_path / "merged")
    recipe = own_data.shop(tmp_path, tmp_path / "merged", n_train=4, n_test=2)
    assert "paint" in good("run", recipe, "-q", "optim.steps=1", "method=[lora, {replay: {size: 2}}]")
    refused = call("evaluate", tmp_path / "run", "--task", "nothing")
    assert refused.exit_code == 2 and "colour" in refused.output


def test_plan_counts_what_the_run_then_does(finished: tuple[Path, str]) -> None:
    from retain import config
    from retain.commands.plan import make_plan

    plan = make_plan(config.load(finished[0]), Path("nowhere"))
    fit = json.loads((finished[0].parent / "run/rows/01-colour/fit.json").read_text())
    stage = plan.stages[0]
    assert (stage.steps, stage.samples) == (fit["steps"], fit["samples"])
    assert plan.shape.trainable == fit["trainable_parameters"]
    assert stage.tokens * stage.samples == pytest.approx(fit["tokens"], rel=0.1)
    assert stage.train_flops == pytest.approx(fit["flops"], rel=0.1)


# -- rows that no later file could hold ----------------------------------------------------------------------

GOOD = {"id": "a", "text": "What?", "answer": "red", "meta": {"n": 1}}
HALF = "a\\ud800b"
UNFIT: dict[str, tuple[str, list[str]]] = {
    "half a pair in an id": (f'{{"id": "{HALF}", "text": "x", "answer": "y"}}', ["'id'", "character 2", r"'\ud800'"]),
    "in an option": (f'{{"text": "x", "answer": "y", "options": ["a", "{HALF}"]}}', ["'options[1]'", r"'\ud800'"]),
    "in a turn": (
        f'{{"conversations": [{{"from": "human", "value": "{HALF}"}}, {{"from": "gpt", "value": "y"}}]}}',
        ["'conversations[0].value'", r"'\ud800'"],
    ),
    "in a field nobody reads": (f'{{"text": "x", "answer": "y", "notes": {{"by": "{HALF}"}}}}', ["'notes.by'", r"'\ud800'"]),
    "in a key": (f'{{"text": "x", "answer": "y", "meta": {{"{HALF}": 1}}}}', ["'meta'", r"'\ud800'"]),
    "NUL": ('{"text": "x", "answer": "y", "source": "a\\u0000"}', ["'source'", r"'\x00'"]),
    "NaN": ('{"text": "x", "answer": "y", "meta": {"w": [1, NaN]}}', ["'meta.w[1]'", "nan"]),
    "1e999": ('{"text": "x", "answer": "y", "tolerance": 1e999}', ["'tolerance'", "infinity"]),
    "400 digits in a box": (f'{{"text": "x", "answer": "y", "answer_bbox": [0, 0, {"9" * 400}, 1]}}',
        ["'answer_bbox[2]'", "digits"]),
    "400 digits in a box as text": (f'{{"text": "x", "answer": "y", "answer_bbox": "[0,0,{"9" * 400},1]"}}',
        ["'answer_bbox'"]),
    "5000 digits": (f'{{"id": {"9" * 5000}, "text": "x", "answer": "y"}}', ["broken JSON"]),
    "meta 900 deep": ('{"text": "x", "answer": "y", "meta": {"a": ' + "[" * 900 + "]" * 900 + "}}",
        ["'meta.a[0]", "too deep"]),
    "100,000 deep": ('{"text": "x", "answer": "y", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}", ["broken JSON"]),
    "meta as text": ('{"text": "x", "answer": "y", "meta": "none"}', ["'meta'", "'none'"]),
    "references as text": ('{"text": "x", "answer": "y", "references": "y"}', ["'references'", "list"]),
    "an id of 1 MB": (f'{{"id": "{"x" * 10**6}", "text": "x", "answer": "y"}}', ["'id'", "1,000,000 characters"]),
    "a path of 200 kB": (f'{{"text": "x", "answer": "y", "image": "{"x" * 200_000}"}}', ["'image'", "200,000 characters"]),
    "a million options": ('{"text": "x", "answer": "y", "options": [' + "1," * 999_999 + "1]}", ["'options'", "1,000,000"]),
    "options of yes": ('{"text": "x", "answer": "y", "options": [true, false]}', ["'options'"]),
    "a tolerance as text": ('{"text": "x", "answer": "1", "tolerance": "0.1"}', ["'tolerance'", "'0.1'"]),
    "a tolerance as text inside meta": ('{"text": "x", "answer": "1", "meta": {"tolerance": "0.1"}}', ["'tolerance'"]),
}  # fmt: skip


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("name", UNFIT)
def test_a_row_that_no_later_file_could_hold(name: str, lines: bool, tmp_path: Path) -> None:
    """Found when it is read, by file, row and field, as a line and in a list."""
    from retain.data import read
    from retain.types import RetainError

    text, words = UNFIT[name]
    good = json.dumps(GOOD)
    file = tmp_path / "rows.json"
    file.write_text(f"{good}\n{text}\n" if lines else f"[{good}, {text}]")
    with pytest.raises(RetainError) as raised:
        read.examples(file)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 500 and said.isprintable()
    row = ["row 2"] if lines or "broken" not in words[0] else []
    for word in (str(file), *row, *words):
        assert word in said, said


def test_what_is_fit_stays(tmp_path: Path) -> None:
    """Characters beyond the first plane, written as pairs or plainly, nested meta and long numbers are data."""
    from retain.data import read

    row = {
        **GOOD,
        "text": "\U0001f600 \u4f60",
        "id": 10**38,
        "meta": {"a": [[[1.5, None, True]]], "b": "\x1b"},
    }
    for ascii_ in (True, False):
        (tmp_path / "rows.json").write_text(json.dumps([row], ensure_ascii=ascii_), encoding="utf-8")
        (example,) = read.examples(tmp_path / "rows.json")
        assert example.question == row["text"] and example.id == str(10**38)
        assert example.meta == row["meta"]
        assert example.told == f"example {example.id!r} ({tmp_path / 'rows.json'}, row 1)"


LONG = [
    "a",
    "(",
    "1",
    " ",
    "'",
    "\n",
    "a, ",
    "a or ",
    ": a, ",
    "not ",
    "A. ",
    "from ",
    "a of ",
    "*",
    "- ",
    "x [",
    "\\boxed{",
]


@pytest.mark.parametrize("unit", [*LONG[:6], *(pytest.param(u, marks=pytest.mark.slow) for u in LONG[6:])])
def test_long_texts_take_a_bounded_time(unit: str) -> None:
    """A question of 350 kB for the doctor, an answer of as much for every scorer, in computing time of this process."""
    import time

    import limits
    from retain.data.doctor import diagnose
    from retain.metrics.scores import SCORES
    from retain.stream import Task
    from retain.types import Example, Message

    text = (unit * 350_000)[:350_000] + "!"
    example = Example(
        "a",
        (Message("user", text), Message("assistant", "red")),
        references=("red",) * 10,
        meta={"options": ["red", "a"]},
    )
    began = time.process_time()
    diagnose([Task("t", [example], [example], SCORES["exact"], 4)])
    for name in (
        "exact",
        "vqa",
        "contains",
        "choice",
        "number",
        "iou",
        "anls",
        "rouge_l",
        "compat_textvqa",
        "compat_scienceqa",
    ):
        SCORES[name]([text], [example])
    assert time.process_time() - began < limits.CPU
