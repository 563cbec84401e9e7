"""What `continual.run` trains a stage with: the central loop, or another one in its place (federated rounds)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from retain.method import Context, Method
from retain.models.base import Model
from retain.run.engine import Engine
from retain.run.train import Checkpoints, FitStats, Optim, Tuned, fit
from retain.signals import Stop
from retain.stream import Stream, Task
from retain.types import RetainError


class Trainer(Protocol):
    """Stages in, a trained bank and method out."""

    def stages(self, method: Method, stream: Stream) -> Sequence[Task]: ...
    def n_steps(self, task: Task, optim: Optim) -> int: ...
    def check(self, model: Model, method: Method, stream: Stream, engine: Engine) -> None: ...
    def setting(self) -> dict[str, Any]: ...
    def fit(
        self,
        model: Model,
        method: Method,
        ctx: Context,
        optim: Optim,
        engine: Engine | None = None,
        checkpoints: Checkpoints | None = None,
        on_step: Callable[[int, float], None] = ...,
        tuned: Tuned | None = None,
        stop: Stop | None = None,
    ) -> FitStats: ...


class Central:
    """All data are here: `retain.run.train.fit` on the method's own stages."""

    fit = staticmethod(fit)

    def stages(self, method: Method, stream: Stream) -> Sequence[Task]:
        """Those of the method: the stream's tasks, or one for joint training."""
        return method.stages(stream)

    def n_steps(self, task: Task, optim: Optim) -> int:
        """Optimizer steps of a stage, for who waits."""
        return optim.n_steps(len(task.train))

    def check(self, model: Model, method: Method, stream: Stream, engine: Engine) -> None:
        """Every stage has something to learn."""
        for task in self.stages(method, stream):
            if not len(task.train):
                raise RetainError(f"task {task.name!r}: the train split is empty")

    def setting(self) -> dict[str, Any]:
        """Nothing beside method, optimizer and data."""
        return {}
