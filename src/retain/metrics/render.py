"""Matrices, metrics and comparisons as rich tables, or as plain text where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from retain.metrics.compare import Comparison
from retain.metrics.formulas import Metric
from retain.metrics.matrix import AccuracyMatrix, Aggregate

Rows = list[list[str]]
"""A table as text: the first row is the header."""


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; an empty string for nan and None."""
    return "" if value is None or value != value else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    """ "[low, high]", or an empty string."""
    return "" if low is None or high is None else f"[{low:.2f}, {high:.2f}]"


def matrix_rows(m: AccuracyMatrix) -> Rows:
    """One row per task learned, one column per task; unseen tasks carry a star."""
    head = ["after", *m.tasks, *(f"{u}*" for u in m.unseen)]
    return [head, *([name, *map(number, row)] for name, row in zip(m.rows, m.values, strict=True))]


def metric_rows(metrics: Sequence[Metric]) -> Rows:
    """Name, value, interval, and the formula; the reason in its place where there is no value."""
    body = [[m.name, number(m.value), interval(m.low, m.high), m.reason or m.formula] for m in metrics]
    return [["metric", "value", "95 %", "formula"], *body]


def aggregate_rows(a: Aggregate) -> Rows:
    """Mean, standard deviation and t-interval over runs."""
    body = [
        [s.name, number(s.mean), number(s.std), interval(s.low, s.high), s.reason or s.formula]
        for s in a.metrics
    ]
    return [["metric", f"mean of {a.n}", "sd", "95 %", "formula"], *body]


def comparison_rows(comparisons: Sequence[Comparison]) -> Rows:
    """Difference, interval, p and Holm's p."""
    body = [
        [
            c.name,
            number(c.difference),
            interval(c.low, c.high),
            number(c.p, 4),
            number(c.p_holm, 4),
            c.reason or c.test,
        ]
        for c in comparisons
    ]
    return [["A - B", "difference", "95 %", "p", "p (Holm)", "test"], *body]


def table(rows: Rows, title: str = "") -> Table:
    """A rich table; all columns but the first and a last one of words are right-aligned."""
    out = Table(title=title or None)
    words = [any(c.isalpha() for row in rows[1:] for c in row[i]) for i in range(len(rows[0]))]
    for name, is_text in zip(rows[0], words, strict=True):
        out.add_column(name, justify="left" if is_text else "right")
    for row in rows[1:]:
        out.add_row(*row)
    return out


def plain(rows: Rows, title: str = "") -> str:
    """The same table as aligned text without any markup, for pipes and logs."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = [any(c.isalpha() for row in rows[1:] for c in row[i]) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.ljust(w) if t else c.rjust(w) for c, w, t in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([title, *lines] if title else lines)


def show(rows: Rows, title: str = "", console: Console | None = None) -> None:
    """Print a rich table on a terminal, plain text otherwise."""
    console = console or Console()
    if console.is_terminal:
        console.print(table(rows, title))
    else:
        console.print(plain(rows, title), markup=False, highlight=False, soft_wrap=True)
