"""What an author of a method gets wrong: each is one message, before it costs anything or makes a wrong number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor
from typer.testing import CliRunner

from fake_runs import fake_run
from loop_helpers import model, stream
from retain import cli
from retain.assemble import load_plugin
from retain.method import REGISTRY, Context, Method, Stack, available, build, register
from retain.report import summary
from retain.report.html import write_report
from retain.report.load import group, load_runs
from retain.run.continual import Silent, run
from retain.run.store import RunDir
from retain.run.train import Optim
from retain.types import Batch, Output, RetainError

OPTIM = Optim(lr=1e-2, steps=2, batch_size=4)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    before = dict(available())
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def learn(path: Path, method: Method, optim: Optim = OPTIM, **more: Any) -> Any:
    return run(model(), stream(), method, optim, RunDir.open(path, {}), **more)


# -- the class -------------------------------------------------------------------------------------------


def no_name() -> None:
    @register
    @dataclass
    class Nameless(Method):
        weight: float = 1.0


def no_dataclass() -> None:
    @register
    class Plain(Method):
        name: ClassVar[str] = "plain"
        weight: float = 1.0


def misspelt() -> None:
    @register
    @dataclass
    class Late(Method):
        name: ClassVar[str] = "late"

        def end_tasks(self, ctx: Context) -> None: ...


def other_arguments() -> None:
    @register
    @dataclass
    class Short(Method):
        name: ClassVar[str] = "short"

        def loss(self, ctx: Context, out: Output) -> float:  # type: ignore[override]
            return 0.0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_name, "class Nameless has no name"),
        (no_dataclass, r"put @dataclass under @register, or its fields \['weight'\] are not read"),
        (misspelt, "no hook 'end_tasks', did you mean 'end_task'"),
        (
            other_arguments,
            r"loss\(self, ctx, out\) does not take what it is given: loss\(self, ctx, batch, out\)",
        ),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_class_that_would_be_misread_is_refused(make: Callable[[], None], said: str) -> None:
    with pytest.raises(RetainError, match=said):
        make()


# -- what hooks return -----------------------------------------------------------------------------------


@dataclass
class Wrong(Method):
    name: ClassVar[str] = "wrong"
    what: str = ""

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Tensor | float:
        values = {"loss none": None, "loss vector": out.logits_NV[:, 0]}
        return values.get(self.what, 0.0)  # type: ignore[return-value]

    def data(self, ctx: Context, examples: Any) -> Any:
        return None if self.what == "data none" else examples


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("loss none", "method 'wrong': loss returned NoneType None; a number or a tensor without dimensions"),
        ("loss vector", r"method 'wrong': loss returned a tensor \(\d+,\)"),
        ("data none", "method 'wrong': data returned NoneType None; a sequence of Examples is needed"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_hook_that_returns_something_else_is_named(
    tmp_path: Path, what: str, said: str, nested: bool
) -> None:
    part: Method = Stack(Wrong(what)) if nested else Wrong(what)
    with pytest.raises(RetainError, match=said):
        learn(tmp_path / "run", Stack(build("lora"), part))


def test_adapt_must_return_a_mix(tmp_path: Path) -> None:
    @dataclass
    class Owner(Method):
        name: ClassVar[str] = "owner"

        def adapt(self, ctx: Context) -> Any:
            return "lora"

    for method in (Owner(), Stack(Owner(), Wrong())):
        with pytest.raises(RetainError, match="method 'owner': adapt returned str 'lora'; a Mix is needed"):
            learn(tmp_path / "run", method)
    learn(
        tmp_path / "run", build("lora")
    )  # nothing was trained yet: who mends the method goes on in the folder


# -- state -----------------------------------------------------------------------------------------------


@dataclass
class Careless(Method):
    name: ClassVar[str] = "careless"
    what: str = ""
    count: int = 0  # is state, but not declared so
    kept: Any = field(init=False, default=None)

    def begin_task(self, ctx: Context) -> None:
        if self.what == "undeclared":
            self.previous = 1

    def end_task(self, ctx: Context) -> None:
        self.count += self.what == "count"
        self.kept = print if self.what == "function" else None


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("undeclared", r"method 'careless' sets self.previous, which is no field.*field\(init=False"),
        ("count", "a hyper-parameter changed while task 'second-hand' was learned"),
        (
            "function",
            "1.careless.kept holds a builtin_function_or_method, which cannot be saved without pickle",
        ),
    ],
)
def test_state_that_would_be_lost_is_refused(tmp_path: Path, what: str, said: str) -> None:
    with pytest.raises(RetainError, match=said):
        learn(tmp_path / "run", Stack(build("lora"), Careless(what)))


# -- the same folder, another run ------------------------------------------------------------------------


def test_a_folder_of_a_run_made_otherwise_is_refused_from_python_too(tmp_path: Path) -> None:
    done = learn(tmp_path / "run", build(["lora", {"ema": {"beta": 0.9}}]))
    again = learn(tmp_path / "run", build(["lora", {"ema": {"beta": 0.9}}]))
    assert (again.values == done.values).all()
    for how in (
        {"method": build(["lora", {"ema": {"beta": 0.5}}])},
        {"method": build("lora")},
        {"optim": Optim(lr=1e-2, steps=3, batch_size=4)},
        {"seed": 1},
    ):
        with pytest.raises(RetainError, match="holds a run that was made otherwise"):
            learn(tmp_path / "run", **{"method": build(["lora", {"ema": {"beta": 0.9}}]), **how})  # type: ignore[arg-type]


PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from retain import Method, register

@register
@dataclass
class Noted(Method):
    name: ClassVar[str] = "noted"
    weight: float = 1.0

    def end_task(self, ctx):
        ctx.log(kind="noted", weight={factor} * self.weight)
"""


def test_a_plugin_that_was_edited_does_not_continue_a_run(tmp_path: Path) -> None:
    file = tmp_path / "noted.py"
    file.write_text(PLUGIN.format(factor=1))
    load_plugin(file)
    learn(tmp_path / "run", build(["lora", "noted"]))
    file.write_text("# a remark\n" + PLUGIN.format(factor=1))
    learn(tmp_path / "run", build(["lora", "noted"]))
    file.write_text(PLUGIN.format(factor=2))
    with pytest.raises(RetainError, match=r"code.noted.*the file of the method was edited"):
        learn(tmp_path / "run", build(["lora", "noted"]))


def test_the_watcher_hears_that_a_task_continues(tmp_path: Path) -> None:
    class Stops(Silent):
        notes: ClassVar[list[str]] = []

        def step(self, i: int, loss: float) -> None:
            if i >= 3:
                raise KeyboardInterrupt

        def note(self, text: str) -> None:
            self.notes.append(text)

    optim = Optim(lr=1e-2, steps=4, batch_size=4, checkpoint_every=2, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "run", build("lora"), optim, watch=Stops())
    hears = Stops()
    hears.step = lambda i, loss: None  # type: ignore[method-assign]
    learn(tmp_path / "run", build("lora"), optim, watch=hears)
    assert Stops.notes == ["second-hand: continues after its last checkpoint"]


# -- plugins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n1 / 0\n", r"a.py:2: ZeroDivisionError"),
        (
            PLUGIN.replace("weight: float = 1.0", "weight: float = 1.0\n    other: int"),
            "TypeError: non-default",
        ),
        (PLUGIN.replace("@register\n", ""), "class Noted is not registered; put @register above it"),
        (PLUGIN.replace('"noted"', '"lora"'), "named 'lora' is registered already, in .*lora.py"),
    ],
    ids=["raises", "order", "unregistered", "taken"],
)
def test_a_plugin_that_cannot_be_read_is_one_message(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.py").write_text(text.replace("{factor}", "1"))
    for _ in range(2):  # the second try says the same
        with pytest.raises(RetainError, match=said):
            load_plugin(tmp_path / "a.py")


# -- comparing -------------------------------------------------------------------------------------------


def test_one_seed_given_twice_counts_once(tmp_path: Path) -> None:
    first = fake_run(tmp_path / "a", n=8, steps=4)
    shutil.copytree(first, tmp_path / "b")
    groups = group(load_runs([first, tmp_path / "b"]))
    assert len(groups) == 1 and [r.path.name for r in summary.counted(groups[0])] == ["a"]
    assert any("b repeats seed 0" in w for w in summary.warnings(groups, groups[0]))


def test_a_page_and_a_folder_of_reuse_among_runs_are_passed_over(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", n=8, steps=4)
    fake_run(tmp_path / "b", n=8, steps=4, method=("lora", "ema"))
    call = CliRunner().invoke
    assert call(cli.app, ["report", str(tmp_path / "a"), str(tmp_path / "b")]).exit_code == 0
    assert (tmp_path / "report.html").is_file()
    learn(tmp_path / "run", build("lora"), reuse=tmp_path / "tuned")
    everything = [str(p) for p in sorted(tmp_path.glob("*")) if p.name != "run"]
    assert len(everything) == 4
    said = call(cli.app, ["compare", *everything])
    assert said.exit_code == 0, said.output
    assert call(cli.app, ["compare", str(tmp_path / "report.html")]).exit_code == 2


def test_plan_says_what_run_would_find(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parent.parent / "recipes" / "pocket" / "lora.yaml"
    out = tmp_path / "run"
    RunDir.open(out, {"seed": 5})
    said = CliRunner().invoke(cli.app, ["plan", str(recipe), f"out={out}"]).output
    assert "in the way" in said and "another recipe" in said.replace("\n", " ")
    assert json.loads((out / "run.json").read_text())["config"] == {"seed": 5}


def test_a_draw_has_no_best_and_no_worst(tmp_path: Path) -> None:
    """Two runs of one score, of which the report once named one the highest and the other the lowest."""
    fake_run(tmp_path / "a", n=8, steps=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    head = json.loads((tmp_path / "b" / "run.json").read_text())
    head["config"]["method"] = ["lora", "ema"]
    (tmp_path / "b" / "run.json").write_text(json.dumps(head))
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text()
    assert "All end at <b>" in page and "ends highest" not in page
