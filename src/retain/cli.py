"""The command line: it parses, calls the library and prints. Nothing is decided here.

An error that a user can mend is one message on stderr and exit code 2; Ctrl-C ends with 130 and the same
command continues; a reader that closes the pipe (`| head`) ends it quietly.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from safetensors import SafetensorError
from typer.core import TyperGroup

from retain import __version__

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, such as seed=3 or optim.lr=1e-3", show_default=False)
]
RecipeFile = Annotated[Path, typer.Argument(help="a recipe (YAML)", metavar="RECIPE", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="a run folder", metavar="RUN", show_default=False)]
RunFolders = Annotated[list[Path], typer.Argument(help="run folders", metavar="RUN…", show_default=False)]


class _Commands(TyperGroup):
    """All commands, with one place where errors become messages."""

    def invoke(self, ctx: Any) -> Any:
        from retain.types import RetainError  # here, not above: it imports torch, and --help need not wait

        try:
            return super().invoke(ctx)
        except RetainError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print("\ninterrupted: what was saved is kept, and the same command continues", file=sys.stderr)  # noqa: T201
            raise typer.Exit(130) from None
        except (OSError, SafetensorError) as error:
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at exit
                raise typer.Exit(0) from None
            _fail(_told(error))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(2)


def _told(error: OSError | SafetensorError) -> str:
    """A system error in one sentence, with the file where there is one."""
    if isinstance(error, SafetensorError):
        return f"a safetensors file could not be read or written: {error}; what was saved before is kept"
    about = f"{error.filename}: " if error.filename else ""
    saved = (
        "; what was saved before is kept" if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) else ""
    )
    return f"{about}{error.strerror or error}{saved}"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a multimodal language model on one task after another and keep what it already knew.",
)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="print the version and end")] = False,
) -> None:
    if version:
        typer.echo(f"retain {__version__}")
        raise typer.Exit


class _Watch:
    """What `continual.run` reports, to the terminal and to the trackers that the recipe names."""

    def __init__(self, progress: Any, tracker: Any, batch_size: int) -> None:
        self.progress, self.tracker, self.batch_size = progress, tracker, batch_size
        self.steps, self.began, self.first = 0, time.monotonic(), 0

    def stage(self, task: str, n_steps: int) -> None:
        self.began, self.first = time.monotonic(), -1
        self.progress.stage(task, n_steps)

    def step(self, i: int, loss: float) -> None:
        """`i` steps are done. A resumed task starts above 0, and the rate counts from there."""
        if self.first < 0:
            self.first, self.began = i, time.monotonic()
        rate = (i - self.first) * self.batch_size / max(time.monotonic() - self.began, 1e-9)
        self.progress.step(i - 1, loss, rate)
        self.steps += 1
        self.tracker.log(self.steps, loss=loss)

    def evaluating(self, task: str, n: int) -> None:
        self.progress.evaluating(task, n)

    def advance(self, n: int) -> None:
        self.progress.advance(n)

    def row(self, name: str, scores: Mapping[str, float]) -> None:
        self.progress.row(name, scores, learned=name)
        self.tracker.log(self.steps, **{f"score/{task}": value for task, value in scores.items()})

    def note(self, text: str) -> None:
        self.progress.note(text)


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print the result only")] = False,
) -> None:
    """Learn a stream with a method. After a crash the same command continues."""
    from retain import config, continual
    from retain.engine import Engine
    from retain.metrics import render
    from retain.progress import Progress
    from retain.store import RunDir
    from retain.track import open_tracker

    r = config.load(recipe, overrides or [])
    engine = Engine.start(r.model.device)
    method, resolved = r.build_method(), r.resolved()
    RunDir.open(
        r.out, resolved, main=False
    )  # a folder of another recipe is refused before anything is loaded
    stream = r.build_stream()
    model = r.build_model(engine.device)
    checked = RunDir(r.out, main=False)
    watch = continual.Silent()
    continual.check(
        continual.Running(model, stream, method, r.optim, r.eval, checked, engine, watch, r.seed, {})
    )
    engine.wait()
    store = RunDir.open(r.out, resolved, main=engine.main)
    tracker = open_tracker(r.track if engine.main else (), r.out, r.out.name, resolved)
    with Progress(quiet=quiet or not engine.main) as progress:
        shown = _Watch(progress, tracker, r.optim.batch_size)
        try:
            matrix = continual.run(
                model, stream, method, r.optim, store, seed=r.seed, options=r.eval, engine=engine, watch=shown
            )
        finally:
            tracker.close()
    if engine.main:
        render.show(
            render.matrix_rows(matrix), f"{r.out}: score on each task (columns) after each stage (rows)"
        )
        render.show(render.metric_rows(matrix.metrics()))
        typer.echo(f"next: retain report {r.out} --open")


@app.command()
def methods() -> None:
    """Which methods there are, where they come from, which hooks they use."""
    from retain.explain import method_rows
    from retain.metrics import render

    render.show(method_rows())


@app.command()
def explain(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Which part of a recipe's method acts at which hook of the loop."""
    from retain import config
    from retain.explain import hook_rows
    from retain.metrics import render

    method = config.load(recipe, overrides or []).build_method()
    render.show(hook_rows(method), f"{recipe}: the loop, and who acts where")


@app.command()
def doctor(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Check a stream's data: images, ids, empty answers, duplicates, leakage, answers given away."""
    from retain import config
    from retain.data.doctor import diagnose, finding_rows
    from retain.metrics import render

    stream = config.load(recipe, overrides or []).build_stream()
    findings = diagnose(stream)
    if findings:
        render.show(finding_rows(findings))
    errors = sum(f.level == "error" for f in findings)
    tasks, rows = len(stream.all), sum(len(t.train) + len(t.valid) + len(t.test) for t in stream.all)
    typer.echo(f"{rows} rows of {tasks} tasks: {errors} errors, {len(findings) - errors} warnings")
    raise typer.Exit(1 if errors else 0)


@app.command()
def plan(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Dry run: stages, samples, steps, parameters, estimated memory and time, before anything is loaded."""
    from retain import config
    from retain.metrics import render
    from retain.plan import make_plan, stage_rows, total_rows

    made = make_plan(config.load(recipe, overrides or []))
    render.show(stage_rows(made), f"{recipe}: stages")
    render.show(total_rows(made))


@app.command()
def compare(runs: RunFolders) -> None:
    """One table over runs: metrics with intervals, budgets, paired tests."""
    from retain.report.tables import compare as tables

    Console().print(tables(runs))


@app.command()
def report(
    runs: RunFolders,
    out: Annotated[
        Path | None, typer.Option(help="where to write it; default: report.html in the first run")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="show it in a browser")] = False,
) -> None:
    """One HTML page: matrix, curves, forgetting, what was forgotten, budget, config."""
    from retain.report.html import write_report

    target = out or runs[0] / "report.html"
    write_report(runs, target)
    typer.echo(f"{target}")
    if open_it:
        webbrowser.open(target.resolve().as_uri())


@app.command()
def evaluate(
    run_folder: RunFolder,
    task: Annotated[list[str] | None, typer.Option(help="only these tasks")] = None,
    after: Annotated[
        int | None, typer.Option(help="only the row after this many tasks (0: zero-shot)")
    ] = None,
    score: Annotated[str | None, typer.Option(help="another scorer than the recipe's")] = None,
) -> None:
    """Score the saved answers again, without training or generating; nothing is written."""
    from retain.metrics import render
    from retain.rescore import cell_rows, rescore

    render.show(cell_rows(rescore(run_folder, tasks=task or (), after=after, scorer=score)))


@app.command()
def export(
    run_folder: RunFolder,
    to: Annotated[Path, typer.Option(help="folder to write")],
    after: Annotated[
        int | None, typer.Option(help="the model after this many tasks; default: the last")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="which adapter, where the run has several")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="a plain HF checkpoint with the adapter inside")
    ] = False,
) -> None:
    """A stock PEFT adapter, or with --merged a plain HF checkpoint; logits are checked before and after."""
    from retain.export import export as export_run

    typer.echo(export_run(run_folder, to, after=after, adapter=adapter, merged=merged))


def main() -> None:
    """Entry point of the `retain` command."""
    app()


if __name__ == "__main__":
    main()
