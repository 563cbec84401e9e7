"""Live progress of a run: rich bars on a terminal, plain lines (a log file, CI, a pipe) otherwise.

`continual.run` reports what happens; this file decides how it looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text


def _short(seconds: float) -> str:
    """Seconds as 7s, 3m12s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """What a run tells the person who waits for it.

    Call order: `stage`, `step`…, then per task `evaluating`, `advance`…, then `row`; `note` at any time.
    Use it as a context manager, or call `close`. `quiet=True` prints nothing at all. Calls out of order are
    ignored, not raised: a display must never end a run.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        quiet: bool = False,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_s` is the shortest time between two plain lines of one stage; `clock` is for tests."""
        self.console = Console(stderr=True) if console is None else console
        self._quiet, self._every_s, self._clock = quiet, every_s, clock
        self._bars: Bars | None = None
        self._open = False  # whether the current bar or stage is unfinished
        self._label, self._total, self._done = "", 0, 0
        self._loss: float | None = None
        self._began = self._spoke = clock()

    # -- what a run reports ------------------------------------------------------------------------------

    def stage(self, task: str, n_steps: int) -> None:
        """Training on `task` begins; `n_steps` optimizer steps follow."""
        self._loss = None
        self._start("train", task, n_steps, "steps")

    def step(self, i: int, loss: float, rate: float | None = None) -> None:
        """`i` steps are done; the last one's loss, and samples per second (None: the steps are timed)."""
        self._loss = loss
        seconds = max(self._clock() - self._began, 1e-9)
        speed = f"{i / seconds:.1f} steps/s" if rate is None else f"{rate:.0f} samples/s"
        self._move(i, f"loss {loss:.3f}  {speed}")

    def evaluating(self, task: str, n: int) -> None:
        """Evaluation on `task` begins; `n` samples follow."""
        self._start("eval", task, n, "samples")

    def advance(self, n: int) -> None:
        """`n` more samples are evaluated."""
        seconds = max(self._clock() - self._began, 1e-9)
        self._move(self._done + n, f"{(self._done + n) / seconds:.0f} samples/s")

    def row(self, name: str, scores: Mapping[str, float], *, learned: str | None = None) -> None:
        """A row of the matrix is complete and saved: the score on every task after stage `name`."""
        self._finish()
        if self._quiet:
            return
        if not self.console.is_terminal:
            cells = "  ".join(f"{task} {score:.1f}" for task, score in scores.items())
            self._say(f"row  {name}: {cells}")
            return
        grid = Table.grid(padding=(0, 2))
        grid.add_row(Text(name, style="bold"), *(Text(task, style="dim") for task in scores))
        style = {task: "bold cyan" if task == learned else "" for task in scores}
        grid.add_row("", *(Text(f"{score:.1f}", style=style[task]) for task, score in scores.items()))
        self.console.print(grid)

    def note(self, text: str) -> None:
        """A line for the person: a resume, a fallback, where the report lies."""
        if not self._quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """A line that is shown even where only the result is."""
        self._say(text)

    def close(self) -> None:
        """Give the terminal back. Safe to call twice."""
        self._stop_bars()
        self._open = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- how it looks ------------------------------------------------------------------------------------

    def _start(self, verb: str, name: str, total: int, unit: str) -> None:
        self._finish()
        self._label, self._total, self._done, self._open = f"{verb} {name}", total, 0, True
        self._began = self._spoke = self._clock()
        if self._quiet:
            return
        if not self.console.is_terminal:
            self._say(f"{self._label}: {total} {unit}")
            return
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
        )
        self._bars.start()
        self._bars.add_task(escape(self._label), total=total, detail="")

    def _move(self, done: int, detail: str) -> None:
        if not self._open:
            return
        self._done = done
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=done, detail=detail)
        now = self._clock()
        plain = not self._quiet and self._bars is None
        if plain and done < self._total and now - self._spoke >= self._every_s:
            self._spoke = now
            self._say(f"{self._label}: {done}/{self._total}  {detail}")

    def _finish(self) -> None:
        """Close the current bar with one lasting line: what it was, how far, how long."""
        self._stop_bars()
        if self._open and not self._quiet:
            seconds = _short(self._clock() - self._began)
            trained = self._loss is not None and self._label.startswith("train ")
            loss = f"  loss {self._loss:.3f}" if trained else ""
            self._say(f"{self._label}: {self._done}/{self._total}  {seconds}{loss}")
        self._open = False

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _say(self, text: str) -> None:
        """One line, never wrapped, coloured or read as markup."""
        out = self._bars.console if self._bars is not None else self.console
        out.print(text, markup=False, highlight=False, soft_wrap=True)
