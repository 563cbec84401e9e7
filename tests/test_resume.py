"""A run that is killed with SIGKILL, at any moment, ends with the same bytes as one that is not."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crash import METHOD, OPTIM, SPEC, whole
from fake_model import FakeModel, stream
from loop_helpers import kept, losses, remains
from retain.method import build
from retain.metrics import score
from retain.metrics.scorer import Scorer
from retain.run.continual import Silent, run
from retain.run.evaluate import EvalOptions
from retain.run.store import RunDir, read_jsonl
from retain.run.train import Optim
from retain.stream import Stream, Task
from retain.types import Batch, RetainError

KILLED = 9


class Server:
    """The process that forks the runs (see crash.py)."""

    def __init__(self) -> None:
        here = Path(__file__).parent
        self.process = subprocess.Popen(
            [sys.executable, str(here / "crash.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=here,
        )

    def __call__(self, folder: Path, **order: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"folder": str(folder), **order}) + "\n")
        self.process.stdin.flush()
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture(scope="module")
def truth(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The files of an uninterrupted run, and how many renames it makes."""
    folder = tmp_path_factory.mktemp("truth") / "run"
    said = server(folder)
    assert said["signal"] == 0 and said["error"] == ""
    assert not remains(folder)
    return kept(folder), int(said["replaces"])


def same(folder: Path, truth: tuple[dict[str, bytes], int]) -> None:
    made = kept(folder)
    assert sorted(made) == sorted(truth[0])
    assert [name for name in made if made[name] != truth[0][name]] == []
    assert not remains(folder)


def test_the_truth_holds_what_it_should(truth: tuple[dict[str, bytes], int]) -> None:
    """Or the comparisons below would be empty."""
    names = " ".join(truth[0])
    assert truth[1] > 60 and len(json.loads(truth[0]["losses"])) == 3 * OPTIM.steps  # type: ignore[operator]
    for word in ("matrix.json", "03-again/adapters/", "method.safetensors", "predictions/colour.jsonl"):
        assert word in names


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(
    server: Server, truth: tuple[dict[str, bytes], int], tmp_path: Path, moment: str, seed: int
) -> None:
    """Every process dies a few renames after it started, until one of them comes through."""
    rng, deaths = random.Random(f"{moment}{seed}"), 0
    while server(tmp_path / "run", **{moment: rng.randint(4, 30)})["signal"] == KILLED:
        deaths += 1
        assert deaths < 100
    assert deaths > 1
    same(tmp_path / "run", truth)


@pytest.mark.parametrize("nth", [4, 5, 15])
def test_killed_in_the_middle_of_a_line(
    server: Server, truth: tuple[dict[str, bytes], int], tmp_path: Path, nth: int
) -> None:
    """The torn last line of events.jsonl, or of an evaluation's answers, does not spoil the line after it."""
    assert server(tmp_path / "run", torn=nth)["signal"] == KILLED
    assert server(tmp_path / "run")["signal"] == 0
    same(tmp_path / "run", truth)
    events = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in events)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_a_random_time(
    server: Server, truth: tuple[dict[str, bytes], int], tmp_path: Path, seed: int
) -> None:
    rng, wait = random.Random(seed), 0.05
    while server(tmp_path / "run", seconds=wait * rng.random())["signal"] == KILLED:
        wait *= 1.3
    same(tmp_path / "run", truth)


@pytest.mark.slow
def test_killed_at_every_rename(server: Server, truth: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    for n in range(1, truth[1] + 1):
        for moment in ("before", "after"):
            folder = tmp_path / f"{moment}{n}"
            assert server(folder, **{moment: n})["signal"] == KILLED
            assert server(folder)["signal"] == 0
            same(folder, truth)
            shutil.rmtree(folder)


def test_a_killed_process_frees_its_lock(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert server(folder, after=12)["signal"] == KILLED
    with RunDir(folder).locked():
        said = server(folder)
    assert "another process is writing" in said["error"] and "out=DIR" in said["error"]
    assert server(folder)["error"] == ""


# -- in one process: what is done again, what is refused -----------------------------------------------------


class Counting(FakeModel):
    """Remembers which batches it answered."""

    def __init__(self) -> None:
        super().__init__(SPEC)
        self.answered: list[str] = []

    def generate(self, batch: Batch, max_new_tokens: int) -> list[str]:
        self.answered += [e.id for e in batch.examples]
        return super().generate(batch, max_new_tokens)


class KilledError(Exception):
    pass


class Stop(Silent):
    """Raises in the evaluation after `n` samples of its last cell."""

    def __init__(self, cell: int, n: int) -> None:
        self.cell, self.n = cell, n

    def evaluating(self, task: str, n: int) -> None:
        self.cell, self.done = self.cell - 1, 0

    def advance(self, n: int) -> None:
        self.done += n
        if self.cell == 0 and self.done >= self.n:
            raise KilledError


GO = Optim(lr=2e-2, steps=3, batch_size=4, checkpoint_every=2, warmup=0.0)


def go(
    folder: Path, model: FakeModel | None = None, spec: Any = "lora", watch: Any = None, **changed: Any
) -> Any:
    store = RunDir.open(folder, {"method": spec, **changed.pop("config", {})})
    optim = changed.pop("optim", GO)
    data = changed.pop("data", None) or stream()
    options = EvalOptions(batch_size=2)
    return run(
        model or FakeModel(SPEC), data, build(spec), optim, store, options=options, watch=watch, **changed
    )


def test_an_interrupted_evaluation_continues(tmp_path: Path) -> None:
    """No sample is answered twice: neither in the cell where it stopped, nor in the finished cells of that
    row.
    """
    go(tmp_path / "whole", first := Counting())
    stopped, rest = Counting(), Counting()
    with pytest.raises(KilledError):
        go(tmp_path / "run", stopped, watch=Stop(5, 4))  # second row, second cell, two of three batches
    go(tmp_path / "run", rest)
    assert stopped.answered + rest.answered == first.answered
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")


def test_cells_of_unchanged_models_are_copied(tmp_path: Path) -> None:
    """One adapter per task, chosen by an oracle: after a task is learned, its cell never changes again."""
    spec = {"lora_per_task": {"router": "oracle"}}
    go(tmp_path / "run", counted := Counting(), spec)
    cells = [
        (row, name, cell)
        for row in RunDir.read(tmp_path / "run").rows()
        for name, cell in row.cells().items()
    ]
    copied = {(row.index, name) for row, name, cell in cells if cell["copied"]}
    assert {(2, "colour"), (3, "colour"), (3, "letter")} <= copied
    assert len(counted.answered) == 5 * (len(cells) - len(copied))
    for row, name, cell in cells:
        told = read_jsonl(row.predictions(name))
        assert len(told) == cell["n"] and sum(p["score"] for p in told) / len(told) == cell["score"]


def test_adapters_that_did_not_change_are_stored_once(tmp_path: Path) -> None:
    go(tmp_path / "run", spec="lora_per_task")
    rows = RunDir.read(tmp_path / "run").rows()
    assert [len(row.adapters()) for row in rows] == [0, 1, 2, 3]
    assert [len(list((row.path / "adapters").glob("*"))) for row in rows] == [0, 1, 1, 1]


def test_joint_training_fills_the_last_row(tmp_path: Path) -> None:
    matrix = go(tmp_path / "run", spec=["multitask", "lora"])
    filled = [i for i, row in enumerate(matrix.values) if row[0] == row[0]]
    assert filled == [0, 3]


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    first = go(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    how: Any = {"optim": GO, "store": RunDir.read(tmp_path / "run"), "options": EvalOptions(batch_size=2)}
    again = run(None, stream(), build("lora"), **how)  # type: ignore[arg-type]  # the model is not looked at
    assert again.to_json() == first.to_json()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_another_recipe_is_refused_by_its_keys(tmp_path: Path) -> None:
    go(tmp_path / "run", config={"optim": {"lr": 1e-3, "steps": 3}, "stream": {"pocket": {}}, "out": "a"})
    with pytest.raises(RetainError, match=r"optim.lr: 0.001 there, 0.002 here.*out=DIR"):
        go(tmp_path / "run", config={"optim": {"lr": 2e-3, "steps": 3}, "stream": {"pocket": {}}, "out": "a"})
    with pytest.raises(
        RetainError, match=r"stream.coin: nothing there, {} here; stream.pocket: {} there, nothing here"
    ):
        go(tmp_path / "run", config={"optim": {"lr": 1e-3, "steps": 3}, "stream": {"coin": {}}, "out": "a"})
    go(tmp_path / "run", config={"optim": {"lr": 1e-3, "steps": 3}, "stream": {"pocket": {}}, "out": "b"})


def interrupted(folder: Path) -> None:
    with pytest.raises(KilledError):
        go(folder, watch=Stop(5, 1))


def test_changed_data_are_refused_by_the_task(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    a, b, c = stream()
    other = Task(b.name, b.train[1:], b.test, b.score, b.max_new_tokens)
    with pytest.raises(RetainError, match=r"the data of \['letter'\] changed"):
        go(tmp_path / "run", data=Stream("fake", (a, other, c)))
    with pytest.raises(RetainError, match="the data of the stream changed"):
        go(tmp_path / "run", data=Stream("fake", (b, a, c)))


def keyed(meta: dict[str, Any], scorer: Any = None, compat: Any = None) -> Stream:
    """The stream with something that a scorer reads in every test example of its second task."""
    a, b, c = stream()
    test = [replace(e, meta=meta) for e in b.test]
    return Stream("fake", (a, replace(b, test=test, score=scorer or b.score, compat=compat), c))


def test_a_changed_answer_key_is_refused_by_the_task(tmp_path: Path) -> None:
    options = {"options": ["x", "y"]}
    with pytest.raises(KilledError):
        go(tmp_path / "run", data=keyed(options), watch=Stop(5, 1))
    strict = Scorer("exact", "my own rule", lambda texts, examples: [0.0] * len(texts))
    for other in (
        keyed({"options": ["y", "x"]}),
        keyed(options, strict),
        keyed(options, compat=score("compat_gqa")),
    ):
        with pytest.raises(
            RetainError, match=r"the answer key in the data of \['letter'\] \(options, boxes.*changed"
        ):
            go(tmp_path / "run", data=other)
    go(tmp_path / "run", data=keyed(options))


class Hears(Silent):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warn(self, text: str) -> None:
        self.heard.append(text)


def test_a_finished_run_says_that_the_answer_key_changed(tmp_path: Path) -> None:
    made = go(tmp_path / "run", data=keyed({"tolerance": 1}))
    same, other, data = Hears(), Hears(), Hears()
    go(tmp_path / "run", data=keyed({"tolerance": 1}), watch=same)
    again = go(tmp_path / "run", data=keyed({"tolerance": 2}), watch=other)
    assert same.heard == [] and again.to_json() == made.to_json()
    assert len(other.heard) == 1 and "'letter'" in other.heard[0] and "answer key" in other.heard[0]
    a, b, c = stream()
    references = [replace(e, references=("else",)) for e in a.test]
    go(tmp_path / "run", data=Stream("fake", (replace(a, test=references), b, c)), watch=data)
    assert "the data of ['colour']" in data.heard[0]


def former(folder: Path) -> None:
    """data.json as it was before answer keys were hashed."""
    path = folder / "data.json"
    old = json.loads(path.read_text())
    path.write_text(
        json.dumps({n: {"train": 9, "score": "exact", "digest": e["data"]} for n, e in old.items()})
    )


def test_a_folder_of_an_earlier_version_continues_and_keeps_its_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(Task, "digest", lambda task, data=None: task.data_digest())  # what cells were known by
        made = go(tmp_path / "run")
    former(tmp_path / "run")
    assert go(tmp_path / "run").to_json() == made.to_json()
    for name in ("DONE", "matrix.json", "rows/03-again/DONE"):
        (tmp_path / "run" / name).unlink()
    rest = Counting()
    assert go(tmp_path / "run", rest).to_json() == made.to_json() and rest.answered == []


def test_a_folder_of_an_earlier_version_with_other_scores_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    former(tmp_path / "run")
    cells = tmp_path / "run" / "rows/00-zero_shot/cells.json"
    told = json.loads(cells.read_text())
    told["letter"]["score"] += 12.5
    del told["letter"]["seal"]  # an earlier version knew of none
    cells.write_text(json.dumps(told))
    with pytest.raises(RetainError, match=r"task 'letter': the answers saved in 00-zero_shot now have score"):
        go(tmp_path / "run")


def test_everything_that_decides_a_score_is_in_the_digest() -> None:
    base = stream()[1]

    def told(**changed: Any) -> str:
        return replace(base, **changed).digest()

    metas = [
        {},
        {"box": [1, 2, 3, 4]},
        {"box": [1, 2, 3, 5]},
        {"options": ["a"]},
        {"tolerance": 0.1},
        {"source": "AI2D"},
    ]
    keys = [told(test=[replace(e, meta=m) for e in base.test]) for m in metas]
    more = [
        told(test=[replace(e, references=("else",)) for e in base.test]), told(score=score("contains")),
        told(compat=score("compat_gqa")), told(max_new_tokens=1), told(test=base.test[:-1]), told(train=base.train[:-1]),
        told(score=Scorer("exact", "the rule", lambda t, e: [], strict=False)),
        told(score=Scorer("exact", "the rule", lambda t, e: [])),
    ]  # fmt: skip
    assert len({*keys, *more}) == len(metas) + len(more) and keys[0] == base.digest()
    sets = [
        replace(base, test=[replace(e, meta={"s": {"a", "b", "c"}}) for e in base.test]).digest()
        for _ in range(2)
    ]
    assert sets[0] == sets[1]


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "run")
    other = FakeModel(SPEC)
    other.net.projector.base.weight.data += 1
    with pytest.raises(RetainError, match="began with base model"):
        go(tmp_path / "run", other)


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("run.json", "{}", "not a run of this version"),
        ("run.json", "not json", r"run\.json is not valid JSON"),
        ("data.json", "[1]", r"data\.json was not written by retain"),
        ("rows/01-colour/bank.json", "{}", r"01-colour/bank\.json was not written.*adapters"),
        ("rows/01-colour/method.json", "{", r"method\.json is not valid JSON"),
        ("rows/01-colour/adapters/lora.safetensors", "torn", r"cannot read .*lora\.safetensors"),
        ("rows/00-zero_shot/cells.json", '"x"', r"cells\.json was not written by retain"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, file: str, text: str, said: str) -> None:
    interrupted(tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    with pytest.raises(RetainError, match=said):
        go(tmp_path / "run")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RetainError, match="is not a run folder"):
        go(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RetainError, match="is not a run folder"):
        go(tmp_path / "thesis.tex")


def test_a_folder_killed_at_its_first_breath_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.part").write_text("{")
    go(tmp_path / "run")


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    a, b, c = stream()
    twice = Task(a.name, a.train, [*a.test, a.test[0]], a.score)
    hollow = Task(b.name, b.train, [], b.score)
    clash = Task("A b", a.train, a.test, a.score), Task("a_b", b.train, b.test, b.score)
    wrong = [
        ((twice, b, c), "id 'colour-100' appears more than once"),
        ((a, hollow, c), "test split is empty"),
        (clash, "rename one"),
    ]
    for data, said in wrong:
        with pytest.raises(RetainError, match=said):
            go(tmp_path / "run", data=Stream("fake", data))
    with pytest.raises(RetainError, match="adapt: no part of"):
        go(tmp_path / "run", spec="ema", config={"method": "lora"})
    assert not (tmp_path / "run" / "rows").exists() and not (tmp_path / "run" / "data.json").exists()


def test_the_same_call_in_this_process_gives_the_same_losses(
    tmp_path: Path, truth: tuple[dict[str, bytes], int]
) -> None:
    whole(tmp_path / "run")
    assert sorted(losses(tmp_path / "run").items()) == [tuple(x) for x in json.loads(truth[0]["losses"])]
    assert METHOD
