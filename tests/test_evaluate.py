"""Evaluation: batches change nothing, for every method; keys tell cells apart; parts continue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import own_data
import tiny
from fake_model import FakeModel, context, stream
from loop_helpers import example, model, texts
from retain.adapters.bank import Mix
from retain.cli import app
from retain.commands.evaluate import rescore
from retain.files import append_lines, read_jsonl
from retain.method import Context, available, build
from retain.metrics.scores import score
from retain.run.evaluate import EvalOptions, Prediction, cell_key, evaluate, plan
from retain.run.store import empty
from retain.run.train import Optim, fit
from retain.stream import Stream, Task
from retain.types import Batch, RetainError
from test_laws import SPECS, adapters

ONE, MANY = EvalOptions(batch_size=1), EvalOptions(batch_size=16)


def spec_of(method: str) -> Any:
    """The first line of the laws that has a part of this name."""
    return next(s for s in SPECS.values() if method in {p.name for p in build(s).parts})


def small() -> Stream:
    tasks = [[example(t, i) for i in range(4)] for t in ("a", "b")]
    tests = [[example(t, 100 + i) for i in range(7)] for t in ("a", "b")]
    return Stream("s", tuple(Task(n, x, y, score("exact"), 5) for n, x, y in zip("ab", tasks, tests)))


@pytest.mark.parametrize("method", sorted(available()))
def test_a_batch_answers_as_its_samples_alone(method: str) -> None:
    """Learning rates are absurd on purpose: adapters must change answers, or wrong routes would not show."""
    s, made, seen = small(), build(spec_of(method)), list[str]()
    m = model(adapters(spec_of(method)))
    empty(m.adapters)
    for stage in made.stages(s):
        fit(m, made, Context(m, stage, s, list(seen), 0), Optim(lr=0.1, steps=2, batch_size=4, warmup=0.0))
        seen.append(stage.name)
    for task in s:
        alone, together = (
            evaluate(m, task, plan(m, task, made, Context(m, task, s, seen, 0), options), options)
            for options in (ONE, MANY)
        )
        assert texts(together) == texts(alone)
        assert [p.mix for p in together] == [p.mix for p in alone] and [p.id for p in alone] == [
            e.id for e in task.test
        ]
        assert len({p.prediction for p in alone}) > 1


def test_a_mix_per_sample_is_followed_inside_the_batch() -> None:
    """The same question under two adapters gives two answers, each the adapter's own."""
    m, task = model(), small()[0]
    empty(m.adapters)
    tiny.fill(m.adapters, "x", "y")
    rows = list(range(len(task.test)))
    half = torch.tensor([float(i % 2) for i in rows])
    own = [texts(evaluate(m, task, [(rows, Mix({name: 1.0}))], MANY)) for name in "xy"]
    mixed = texts(evaluate(m, task, [(rows, Mix({"x": 1 - half, "y": half}))], MANY))
    assert mixed == [own[i % 2][i] for i in rows] and own[0] != own[1]


# -- cells ---------------------------------------------------------------------------------------------------


def key(mix: Mix, *, options: EvalOptions = MANY, task: int = 0, x: str = "1") -> str:
    m = FakeModel()
    rows = list(range(5))
    return cell_key(m, stream()[task], [(rows, mix)], {"x": x, "y": "2"}, options)


def test_a_key_tells_all_that_answers_depend_on() -> None:
    base = key(Mix({"x": 1.0}))
    same = [Mix({"x": 1.0, "y": 0.0}), Mix({"x": torch.tensor(1.0)}), Mix({"x": 1})]
    assert [key(mix) for mix in same] == [base] * 3
    other = [
        key(Mix()), key(Mix({"y": 1.0})), key(Mix({"x": 0.5})), key(Mix({"x": 1.0}, {1: {"y": 1.0}})),
        key(Mix({"x": torch.ones(5)})), key(Mix({"x": 1.0}), x="3"), key(Mix({"x": 1.0}), task=1),
        key(Mix({"x": 1.0}), options=EvalOptions(precision="bf16")), key(Mix({"x": 1.0, "y": 1.0})),
    ]  # fmt: skip
    assert len({base, *other}) == 10


class Counting(FakeModel):
    calls = 0

    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        self.calls += 1
        return super().generate(batch, max_new_tokens)


@pytest.mark.parametrize("torn", [False, True])
def test_parts_of_any_process_continue(tmp_path: Path, torn: bool) -> None:
    """Two processes had begun; one goes on. Whole batches are kept, half a batch is answered again."""
    m, task, options = Counting(), stream()[0], EvalOptions(batch_size=2)
    batches = plan(m, task, None, context(m), options)
    whole = evaluate(m, task, batches, options)
    part, said = tmp_path / "p" / "colour.k.part", {p.id: p.prediction for p in whole}
    part.parent.mkdir()
    for rank, n in ((0, 2), (1, 1)):
        ids = [task.test[i].id for i in batches[rank][0]][:n]
        append_lines(part.with_name(f"{part.name}{rank}"), [{"id": i, "prediction": said[i]} for i in ids])
    if torn:
        with part.with_name(f"{part.name}0").open("a") as f:
            f.write('{"id": "col')
    m.calls = 0
    assert evaluate(m, task, batches, options, part=part) == whole
    assert m.calls == 2  # the half batch, and the third
    assert len(read_jsonl(part.with_name(f"{part.name}0"))) == 2 + 2 + 1


def test_route_is_asked_only_where_a_part_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    m = FakeModel()
    m.adapters.add("x", torch.Generator())
    m.adapters.mix = Mix({"x": 1.0})
    monkeypatch.setattr(m, "collate", None)
    batches = plan(m, stream()[0], build("lora"), context(m), MANY)
    assert [mix.weights for _, mix in batches] == [{"x": 1.0}]


def test_predictions_survive_their_file() -> None:
    p = Prediction("i", "q", "a", ("r",), 50.0, None, {"x": 0.3333})
    assert Prediction.from_json(p.to_json("samples/x.png")) == p


def test_options_are_checked() -> None:
    for wrong, said in (
        ({"batch_size": 0}, "batch_size"),
        ({"precision": "fp8"}, "precision"),
        ({"thumbnails": -1}, "thumb"),
        ({"split": "train"}, "split"),
    ):
        with pytest.raises(RetainError, match=f"eval.{said}"):
            EvalOptions(**wrong)  # type: ignore[arg-type]


# -- saved answers, scored again ------------------------------------------------------------------------------


def test_evaluate_says_where_the_answer_key_changed(tmp_path: Path) -> None:
    """And scores by the key as it is now."""
    recipe = own_data.shop(tmp_path, own_data.model_dir(tmp_path / "base"), n_train=4, n_test=2)
    made = call("run", recipe, "-q", "optim.steps=1")
    assert made.exit_code == 0, made.output
    run = tmp_path / "run"
    table = call("evaluate", run)
    assert (
        "since the run" not in table.output
        and "changed" not in call("run", recipe, "-q", "optim.steps=1").output
    )
    file = tmp_path / "paint_test.json"
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([{**row, "options": ["red", "green"]} for row in rows]))
    table, again = call("evaluate", run), call("run", recipe, "-q", "optim.steps=1")
    of_paint = [line for line in table.output.splitlines() if " paint " in f" {line} "]
    assert table.exit_code == 0 and "since the run" in table.output
    assert any("answer key in the data changed" in line for line in of_paint)
    assert "the answer key in the data of ['paint']" in again.output and again.exit_code == 0
    answers = {
        line["id"]: line["prediction"]
        for line in read_jsonl(next(run.glob("rows/02-*/predictions/paint.jsonl")))
    }
    file.write_text(json.dumps([{**row, "references": [answers[row["id"]] or "x"]} for row in rows]))
    cells = rescore(run, tasks=["paint"], after=2)
    assert [c.changed for c in cells] == ["data"]
    assert cells[0].now == 100 * sum(map(bool, answers.values())) / 2


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])
