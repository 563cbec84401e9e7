"""A recipe becomes a run: build the parts, refuse what cannot work before anything is written, run, show."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from retain.assemble import build_method, build_model, build_stream, build_trainer
from retain.commands import plan
from retain.config import Recipe
from retain.method import Method
from retain.metrics import AccuracyMatrix, render
from retain.metrics.stages import last_and_avg
from retain.models.base import Model, Turns
from retain.report.federated import SO_FAR, stage_rows, staged, stages_of
from retain.report.load import load_run
from retain.run import continual
from retain.run.engine import Engine, out_of_memory
from retain.run.progress import Progress
from retain.run.store import RunDir
from retain.run.track import Tracker, open_tracker
from retain.run.trainer import Central, Trainer
from retain.signals import Stop
from retain.stream import Stream
from retain.types import RetainError

Federate = Callable[[Recipe, Stream, Method, Model], Trainer]
"""Makes the trainer of a federated recipe: clients in this process, or on other machines."""


def in_process(recipe: Recipe, stream: Stream, method: Method, model: Model) -> Trainer:
    """Clients in this process; what stays with each is kept in the run's folder."""
    return build_trainer(recipe, stream, method)


def start(
    recipe: Recipe, *, quiet: bool = False, stop: Stop | None = None, federate: Federate = in_process
) -> tuple[AccuracyMatrix, bool]:
    """Run a recipe, or continue it; returns the matrix, and whether this process should print it.

    `federate` makes the trainer of a federated recipe, `stop` as in `continual.run`. RetainError where memory ends, with
    what `retain plan` estimates.
    """
    try:
        with Engine.start(recipe.model.device) as engine:
            return _started(recipe, engine, quiet, stop, federate), engine.main
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:300]
        raise RetainError(
            f"{recipe.path}: out of memory{said and f' ({said})'}; {estimated(recipe)}"
        ) from error


def tables(recipe: Recipe, matrix: AccuracyMatrix) -> list[tuple[list[list[str]], str]]:
    """What a finished run shows in a terminal: rows and a title each.

    Where stages are not the stream's tasks one by one, the rows are stages, and the last column is their mean.
    """
    about = f"{recipe.out}: score on each task (columns) after each stage (rows)"
    first = render.matrix_rows(matrix)
    if recipe.federated and staged(run := load_run(recipe.out)):
        last, avg = last_and_avg(stages_of(run))
        first, about = stage_rows(run), f"{about}; over the tasks seen so far Last {last:.2f}, Avg {avg:.2f}"
    known = (
        [m for m in matrix.metrics() if m.value is not None] if first[0][-1] == SO_FAR else matrix.metrics()
    )
    return [(first, about), (render.metric_rows(known), "")]


def estimated(recipe: Recipe) -> str:
    """What `retain plan` says of memory, and what makes it less."""
    less = (
        "less: a larger optim.accumulate, optim.grad_checkpointing: true, a smaller eval.batch_size, model.dtype: bf16; "
        "what was saved before is kept"
    )
    try:
        rows = plan.total_rows(plan.make_plan(recipe))
    except (RetainError, MemoryError, RuntimeError):  # no memory for a plan either
        return less
    return f"`retain plan` estimates {next(r[1] for r in rows if r[0].startswith('memory'))}; {less}"


def _started(
    recipe: Recipe, engine: Engine, quiet: bool, stop: Stop | None, federate: Federate
) -> AccuracyMatrix:
    resolved = recipe.resolved()
    method = build_method(recipe)
    old = RunDir.open(recipe.out, resolved, main=False)  # refuses a folder of another recipe, creates nothing
    stream = build_stream(recipe)
    model = build_model(recipe, engine.device)
    parts = (recipe.optim, recipe.eval, old, engine, continual.Silent(), recipe.seed)
    trainer = federate(recipe, stream, method, model) if recipe.federated else Central()
    continual.check(continual.Running(model, stream, method, *parts, trainer=trainer))
    if not old.done:
        check_examples(model, stream, recipe.optim.turns)
    engine.wait()  # the other processes must have looked before the first one writes
    store = RunDir.open(recipe.out, resolved, main=engine.main)
    engine.wait()  # and the first one must have made the folder before others write into it
    tracker = open_tracker(recipe.track if engine.main else (), recipe.out, recipe.out.name, resolved)
    try:
        with Progress(quiet=quiet or not engine.main) as progress:
            matrix = continual.run(
                model,
                stream,
                method,
                recipe.optim,
                store,
                seed=recipe.seed,
                options=recipe.eval,
                engine=engine,
                watch=Watch(progress, tracker, recipe.optim.batch_size),
                reuse=recipe.reuse,
                stop=stop,
                trainer=trainer,
            )
    finally:
        tracker.close()
    return matrix


def check_examples(model: Model, stream: Stream, turns: Turns) -> None:
    """Find an example that does not fit the model, or cannot be learned whole, now and not in the middle of training.

    A model that can tell of most rows without encoding them that they fit (`suspects`) is asked for the others.
    """
    asked = getattr(model, "suspects", lambda examples: range(len(examples)))
    for task in stream.all:
        for split, examples in (("train", task.train), ("test", task.test)):
            for row in asked(examples):
                example = examples[row]
                try:
                    model.length(example)
                    if split == "train" and sum(m.role == "assistant" for m in example.messages) > 1:
                        model.collate([example], answers=True, turns=turns)
                except RetainError as error:
                    raise RetainError(f"task {task.name!r}, {split}, row {row + 1}: {error}") from error


class Watch:
    """What `continual.run` reports, for the terminal and for the trackers that the recipe names."""

    def __init__(self, progress: Progress, tracker: Tracker, batch_size: int) -> None:
        self.progress, self.tracker, self.batch_size = progress, tracker, batch_size
        self.base = self.last = 0  # steps of earlier stages, and of this one
        self.first, self.began = -1, time.monotonic()

    def stage(self, task: str, n_steps: int) -> None:
        """Training on a task begins."""
        self.base, self.last, self.first = self.base + self.last, 0, -1
        self.progress.stage(task, n_steps)

    def step(self, i: int, loss: float) -> None:
        """`i` steps are done. A resumed task starts above 0, and the rate counts from there."""
        if self.first < 0:
            self.first, self.began = i, time.monotonic()
        seconds = time.monotonic() - self.began
        rate = (i - self.first) * self.batch_size / seconds if i > self.first else None
        self.last = i
        self.progress.step(i, loss, rate)
        self.tracker.log(self.base + i, loss=loss)

    def evaluating(self, task: str, n: int) -> None:
        """Evaluation on a task begins."""
        self.progress.evaluating(task, n)

    def advance(self, n: int) -> None:
        """`n` more samples are evaluated."""
        self.progress.advance(n)

    def row(self, name: str, scores: Mapping[str, float]) -> None:
        """A row of the matrix is complete."""
        self.progress.row(name, scores, learned=name)
        self.tracker.log(self.base + self.last, **{f"score/{task}": value for task, value in scores.items()})

    def note(self, text: str) -> None:
        """A line for the person who waits."""
        self.progress.note(text)

    def warn(self, text: str) -> None:
        """A line that is shown even where only the result is."""
        self.progress.warn(text)
