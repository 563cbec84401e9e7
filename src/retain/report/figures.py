"""Small figures as SVG and HTML text: line plots that stretch to any width, and matrices as pictures.

A plot is an SVG that is stretched (`preserveAspectRatio="none"`, strokes that do not scale) under labels
that are HTML, so that text keeps its size on a phone. Colours are classes and variables of style.css; a
matrix that stands alone in a README carries its own.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from markupsafe import Markup, escape
from PIL import Image

Point = tuple[float, float]
T = TypeVar("T")
LABELS = 16
"""Labels that fit below a plot, on a phone too."""

SERIES = 8
"""Colours s1..s8 of the style sheet; more lines than that start again."""


@dataclass(frozen=True)
class Line:
    """One line of a plot. `colour` is a class (`s1`..`s8`, `faint`, `zero`); `dots` marks every point."""

    points: Sequence[Point]
    colour: str = "s1"
    name: str = ""
    dots: bool = False
    dash: bool = False


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`; `ticks` are (value, label). `log` scales by the logarithm."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0..100."""
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return 100 * min(1.0, max(0.0, (at - low) / (high - low))) if high > low else 50.0


def number(value: float) -> str:
    """A tick: few digits, no exponent between 0.0001 and 10,000."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def axis(values: Sequence[float], n: int = 4, log: bool = False) -> Axis:
    """An axis with round ticks that holds all values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if log and low > 0 and high / low > 30:
        ticks = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        return Axis(
            ticks[0], ticks[-1], [(t, number(t)) for t in ticks[:: max(1, len(ticks) // n)]], log=True
        )
    low = min(0.0, low)
    if high <= low:
        high = low + 1.0
    raw = (high - low) / n
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = [k * step for k in range(first, last + 1)]
    return Axis(marks[0], marks[-1], [(m, number(m)) for m in marks])


def some(values: Sequence[T], most: int) -> list[T]:
    """At most so many of a row, evenly spaced, the first and the last among them."""
    n = len(values)
    return list(values) if n <= most else [values[round(k * (n - 1) / (most - 1))] for k in range(most)]


SCORE = Axis(0, 100, [(0, "0"), (50, "50"), (100, "100")])
"""The axis of scores."""


def _f(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _path(line: Line, x: Axis, y: Axis) -> Markup:
    """One line, and its dots: strokes of no length with round ends, which stay round when stretched."""
    at = [(x.place(a), 100 - y.place(b)) for a, b in line.points]
    d = "M" + " L".join(f"{_f(a)} {_f(b)}" for a, b in at)
    dash = " dash" if line.dash else ""
    out = (
        Markup('<path class="line {}{}" d="{}"/>').format(line.colour, dash, d) if len(at) > 1 else Markup("")
    )
    if line.dots:
        for (a, b), (_, value) in zip(at, line.points):
            title = f"{line.name}: {value:.1f}" if line.name else f"{value:.1f}"
            dot = Markup('<path class="dot {}" d="M{} {}h0.01"><title>{}</title></path>')
            out += dot.format(line.colour, _f(a), _f(b), title)
    return out


def plot(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    label: str,
    *,
    bands: Sequence[tuple[str, float, float]] = (),
    marks: Sequence[float] = (),
) -> Markup:
    """A line plot. `bands` name stretches of x (tasks), `marks` are vertical lines, `label` is read aloud."""
    inner = Markup("")
    for k, (_, start, end) in enumerate(bands):
        left, width = x.place(start), x.place(end) - x.place(start)
        if k % 2:
            inner += Markup('<rect class="band" x="{}" y="0" width="{}" height="100"/>').format(
                _f(left), _f(width)
            )
    for value, _ in y.ticks:
        inner += Markup('<path class="grid" d="M0 {0}H100"/>').format(_f(100 - y.place(value)))
    for value in marks:
        inner += Markup('<path class="mark" d="M{} 0V100"/>').format(_f(x.place(value)))
    for line in lines:
        inner += _path(line, x, y) if line.points else Markup("")
    ys = Markup("").join(
        Markup('<span style="bottom:{}%">{}</span>').format(_f(y.place(value)), text)
        for value, text in y.ticks
    )
    xs = Markup("").join(
        Markup('<span style="left:{}%">{}</span>').format(_f(x.place(value)), text) for value, text in x.ticks
    )
    shown = set(some(range(1, len(bands) + 1), LABELS))
    for k, (name, start, end) in enumerate(bands, 1):
        if k not in shown:
            continue
        left, width = x.place(start), x.place(end) - x.place(start)
        if len(bands) > LABELS:  # no room for names: some of the numbers
            xs += Markup('<span style="left:{}%" title="{}">{}</span>').format(_f(left + width / 2), name, k)
            continue
        text = Markup('<span class="in" style="left:{}%;width:{}%" title="{}">{}<i> {}</i></span>')
        xs += text.format(_f(left), _f(width), name, k, name)
    wide = max([len(text) for _, text in y.ticks] or [1])  # characters of the widest label beside the plot
    svg = Markup('<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{}</svg>').format(
        inner
    )
    head = '<div class="plot" style="--yw:{}" role="img" aria-label="{}">'
    body = '<div class="ys">{}</div><div class="area">{}</div><div class="xs">{}</div></div>'
    return Markup(head + body).format(wide, label, ys, svg, xs)


# -- matrices as pictures -------------------------------------------------------------------------------

_STOPS = ((0.0, (244, 246, 250)), (0.35, (178, 203, 233)), (0.7, (77, 130, 196)), (1.0, (20, 60, 120)))


def shade(value: float) -> str:
    """The colour of a score, 0..100, light to dark blue: lightness alone carries it, for any eye."""
    at = min(1.0, max(0.0, value / 100))
    for (a, low), (b, high) in pairwise(_STOPS):
        if at <= b:
            mixed = (round(p + (q - p) * (at - a) / (b - a)) for p, q in zip(low, high))
            return "#" + "".join(f"{v:02x}" for v in mixed)
    return "#143c78"


def _square(value: float | None, x: float, y: float, side: float, learned: bool) -> Markup:
    if value is None:
        return Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="#e6e8ec"/>').format(x, y, side, side)
    ink = "#ffffff" if value > 55 else "#1b2430"
    edge = ' stroke="#d9730d" stroke-width="2"' if learned else ""
    box = Markup('<rect x="{}" y="{}" width="{}" height="{}" rx="3" fill="{}"{}/>')
    text = Markup('<text x="{}" y="{}" text-anchor="middle" font-size="13" fill="{}">{:.0f}</text>')
    inset = 1 if learned else 0
    drawn = box.format(x + inset, y + inset, side - 2 * inset, side - 2 * inset, shade(value), Markup(edge))
    return drawn + text.format(x + side / 2, y + side / 2 + 4.5, ink, value)


def matrix_svg(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str = ""
) -> Markup:
    """An accuracy matrix as a picture of its own, for a README; row 0 is zero-shot, new cells outlined."""
    side, gap = 40, 3
    left, top = 16 + 7.2 * max(map(len, rows)), (30 if title else 8) + 5.4 * max(map(len, columns))
    width, height = left + len(columns) * (side + gap) + 40, top + len(rows) * (side + gap) + 8
    font = "font-family='system-ui,-apple-system,Segoe UI,sans-serif'"
    out = Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'role="img" {font}><rect width="100%" height="100%" rx="8" fill="#ffffff"/>'
    )
    out += Markup("<title>{}</title>").format(title or "accuracy matrix")
    if title:
        out += Markup('<text x="12" y="22" font-size="14" font-weight="600" fill="#1b2430">{}</text>').format(
            title
        )
    for j, name in enumerate(columns):
        x, y = left + j * (side + gap) + side / 2, top - 8
        turn = f"rotate(-38 {x:.0f} {y:.0f})"
        text = Markup('<text x="{:.0f}" y="{:.0f}" font-size="12" fill="#4b5563" transform="{}">{}</text>')
        out += text.format(x, y, turn, name)
    for i, row in enumerate(values):
        y = top + i * (side + gap)
        text = Markup('<text x="{:.0f}" y="{:.0f}" text-anchor="end" font-size="12" fill="#4b5563">{}</text>')
        out += text.format(left - 8, y + side / 2 + 4, rows[i])
        for j, value in enumerate(row):
            out += _square(value, left + j * (side + gap), y, side, i == j + 1)
    return out + Markup("</svg>")


def matrix_png(values: Sequence[Sequence[float | None]]) -> str:
    """A matrix as a picture of one pixel a cell, inline; grey: not evaluated."""
    image = Image.new("RGB", (max(map(len, values), default=1) or 1, len(values) or 1), "#e6e8ec")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value is not None:
                image.putpixel((j, i), tuple(bytes.fromhex(shade(value)[1:])))
    out = io.BytesIO()
    image.save(out, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def legend(names: Sequence[str]) -> Markup:
    """Names with the colours s1, s2, … in order."""
    items = (
        Markup('<li><b class="key s{}"></b>{}</li>').format(k % SERIES + 1, escape(n))
        for k, n in enumerate(names)
    )
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
