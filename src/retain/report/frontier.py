"""docs/frontier.md: kept against learned for rules that average one trajectory, as tables and pictures.

Records are those of scripts/pocket_frontier.py: one per pair of tasks, number of steps and seed, with the scores of every
rule on the first task (kept) and on the second (learned), in percent. Intervals are t-intervals over seeds, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from scipy.stats import t as student

from retain.types import RetainError

Record = Mapping[str, Any]
Pair = tuple[str, str]
RAW = "lora"
FAMILIES = {
    "lora": ("raw weights", "#1b2430"), "ema": ("fixed average", "#2f6fb7"), "interpolate": ("interpolation", "#2b8a57"),
    "official": ("LLaCA official", "#d9730d"), "means": ("LLaCA by means", "#b5326e"),
    "layer": ("by means, a layer together", "#7b52ab"), "paper": ("LLaCA paper", "#8a7a10"),
    "bounded": ("LLaCA bounded", "#5f6b7a"),
}  # fmt: skip
"""Families of rules, by the first word of a rule's name: what the legend says, and a colour."""


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the length of its 95 % t-interval; None with one value."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2:
        return mean, None
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(student.ppf(0.975, n - 1) * sd / math.sqrt(n))


def write_frontier(records: Sequence[Record], out: Path) -> Path:
    """Fill the part between `<!-- begin:measured -->` and its end in `out`, and draw a picture per number of steps.

    Pictures go to `img/frontier_STEPS.svg` beside the page. RetainError: no records, or no markers in the page.
    """
    if not records:
        raise RetainError(f"{out}: no result to write; run scripts/pocket_frontier.py first")
    begin, end = "<!-- begin:measured -->", "<!-- end:measured -->"
    text = out.read_text(encoding="utf8") if out.is_file() else f"# Kept against learned\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise RetainError(f"{out}: the markers {begin} and {end} are missing")
    parts = [
        f"Made from {len(records)} trajectories by `scripts/pocket_frontier.py`; validation data, "
        f"{records[0]['n_eval']} samples a task; mean over seeds, and over pairs of tasks where none is named; "
        "95 % t-intervals over seeds.\n"
    ]
    (out.parent / "img").mkdir(parents=True, exist_ok=True)
    for steps in sorted({int(r["steps"]) for r in records}):
        those = [r for r in records if r["steps"] == steps]
        picture = out.parent / "img" / f"frontier_{steps}.svg"
        picture.write_text(str(drawn(those)) + "\n", encoding="utf8")
        parts += [
            f"## {steps} steps a task\n",
            f"![kept against learned](img/{picture.name})\n",
            table(those),
        ]
    out.write_text(
        f"{text.split(begin)[0]}{begin}\n" + "\n".join(parts) + f"\n{end}{text.split(end)[1]}",
        encoding="utf8",
    )
    return out


# -- the table ------------------------------------------------------------------------------------------------------


def by_seed(records: Sequence[Record], value: Callable[[Record], float]) -> list[float]:
    """A value averaged over the pairs of tasks, seed by seed; only seeds that have every pair."""
    pairs = pairs_of(records)
    seeds: dict[int, dict[Pair, float]] = {}
    for r in records:
        seeds.setdefault(int(r["seed"]), {})[_pair(r)] = value(r)
    whole = [list(found.values()) for _, found in sorted(seeds.items()) if len(found) == len(pairs)]
    return [sum(v) / len(v) for v in whole]


def pairs_of(records: Sequence[Record]) -> list[Pair]:
    """The pairs of tasks, in the order in which they come."""
    return list(dict.fromkeys(_pair(r) for r in records))


def _pair(record: Record) -> Pair:
    one, two = record["pair"]
    return str(one), str(two)


def rules_of(records: Sequence[Record]) -> list[str]:
    """The rules that every record has, in order."""
    return [name for name in records[0]["rules"] if all(name in r["rules"] for r in records)]


def table(records: Sequence[Record]) -> str:
    """One row per rule: reach, share of the way, kept, learned, the mean of both and its difference to the raw weights;
    then kept / learned of each pair."""
    pairs = pairs_of(records)
    heads = ["rule", "R", "way gone", "kept", "learned", "mean of both", "against the raw weights"]
    heads += [f"{a}, then {b}" for a, b in pairs]
    before = [
        sum(r["before"][0] for r in records if _pair(r) == p) / sum(_pair(r) == p for r in records)
        for p in pairs
    ]
    lines = [
        "First task right after it was learned: " + ", ".join(f"{p[0]} {v:.0f}" for p, v in zip(pairs, before, strict=True))
        + f"; seeds: {len(by_seed(records, lambda r: 0.0))}.\n",
        f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1),
    ]  # fmt: skip
    for name in rules_of(records):
        lines.append(f"| {' | '.join(_row(records, name, pairs))} |")
    return "\n".join(lines) + "\n"


def _row(records: Sequence[Record], name: str, pairs: Sequence[Pair]) -> list[str]:
    def one(key: str) -> Callable[[Record], float]:
        return lambda r: float(r["rules"][name][key])

    def both(r: Record) -> float:
        return (one("kept")(r) + one("learned")(r)) / 2

    def gain(r: Record) -> float:
        return both(r) - float(r["rules"][RAW]["kept"] + r["rules"][RAW]["learned"]) / 2

    cells = [name]
    for key, shown in (("reach", "{:.2g}"), ("gone", "{:.0%}")):
        found = [float(r["rules"][name][key]) for r in records if key in r["rules"][name]]
        cells.append(shown.format(sum(found) / len(found)) if found else "–")
    cells += [_told(by_seed(records, value)) for value in (one("kept"), one("learned"), both)]
    cells.append("–" if name == RAW else _told(by_seed(records, gain), sign=True))
    for p in pairs:
        those = [r for r in records if _pair(r) == p]
        kept, new = (sum(map(one(k), those)) / len(those) for k in ("kept", "learned"))
        cells.append(f"{kept:.0f} / {new:.0f}")
    return cells


def _told(values: Sequence[float], sign: bool = False) -> str:
    if not values:
        return "–"
    mean, half = mean_interval(values)
    return (f"{mean:+.1f}" if sign else f"{mean:.1f}") + ("" if half is None else f" ± {half:.1f}")


# -- the picture ------------------------------------------------------------------------------------------------------

SIDE, GAP, LEFT, TOP = 270, 46, 52, 64


def drawn(records: Sequence[Record]) -> Markup:
    """A picture of its own: a panel per pair of tasks, learned to the right, kept upwards; families as lines with bars."""
    pairs = pairs_of(records)
    families = list(dict.fromkeys(name.split()[0] for name in rules_of(records)))
    rows = math.ceil(len(families) / 4)
    width, height = LEFT + len(pairs) * (SIDE + GAP), TOP + SIDE + 50 + 20 * rows
    out = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" width="{0}" role="img" font-size="12" '
        'font-family="system-ui,-apple-system,Segoe UI,sans-serif"><rect width="100%" height="100%" rx="8" '
        'fill="#ffffff"/><title>kept against learned</title>'
    ).format(width, height)
    head = '<text x="12" y="24" font-size="14" font-weight="600" fill="#1b2430">{}</text>'
    out += Markup(head).format(f"Kept against learned, {records[0]['steps']} steps a task")
    for k, pair in enumerate(pairs):
        those = [r for r in records if _pair(r) == pair]
        out += _panel(those, pair, LEFT + k * (SIDE + GAP), TOP, families)
    for k, family in enumerate(families):
        x, y = LEFT + (k % 4) * (width - LEFT) / 4, TOP + SIDE + 54 + 20 * (k // 4)
        words, colour = FAMILIES.get(family, (family, "#5f6b7a"))
        key = '<circle cx="{}" cy="{}" r="4" fill="{}"/><text x="{}" y="{}" fill="#1b2430">{}</text>'
        out += Markup(key).format(round(x + 4), y, colour, round(x + 13), y + 4, words)
    return out + Markup("</svg>")


def _panel(records: Sequence[Record], pair: Pair, x0: float, y0: float, families: Sequence[str]) -> Markup:
    def at(name: str, key: str) -> tuple[float, float]:
        mean, half = mean_interval([float(r["rules"][name][key]) for r in records])
        return mean, half or 0.0

    points = {n: (at(n, "learned"), at(n, "kept")) for n in rules_of(records)}
    low = min(v - h for _, (v, h) in points.values())
    floor, ceiling = max(0, min(50, 10 * math.floor(low / 10))), 100  # a point looks alike in every panel

    def px(v: float) -> str:
        return f"{x0 + SIDE * min(1.0, max(0.0, v / 100)):.1f}"

    def py(v: float) -> str:
        return f"{y0 + SIDE - SIDE * min(1.0, max(0.0, (v - floor) / max(1e-9, ceiling - floor))):.1f}"

    text = '<text x="{}" y="{}" fill="#4b5563" text-anchor="{}">{}</text>'
    line = '<path d="M{} {}L{} {}" stroke="{}" stroke-width="{}" opacity="{}"/>'
    out = Markup(text).format(x0, y0 - 12, "start", f"{pair[0]}, then {pair[1]}")
    for tick in (0, 25, 50, 75, 100):
        out += Markup(text).format(px(tick), y0 + SIDE + 16, "middle", tick)
    for k in range((ceiling - floor) // 10 + 1):
        v = floor + 10 * k
        out += Markup(line).format(x0, py(v), x0 + SIDE, py(v), "#e3e6eb", 1, 1)
        out += Markup(text).format(x0 - 6, float(py(v)) + 4, "end", f"{v:.0f}")
    out += Markup(text).format(x0 + SIDE / 2, y0 + SIDE + 33, "middle", f"learned: {pair[1]}")
    for family in families:
        colour = FAMILIES.get(family, (family, "#5f6b7a"))[1]
        mine = [(n, *p) for n, p in points.items() if n.split()[0] == family]
        path = "M" + " L".join(f"{px(a)} {py(b)}" for n, (a, _), (b, _) in mine if not n.endswith("chosen"))
        out += Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.5" opacity="0.7"/>').format(
            path, colour
        )
        for name, (a, ha), (b, hb) in mine:
            out += Markup(line).format(px(a - ha), py(b), px(a + ha), py(b), colour, 1, 0.35)
            out += Markup(line).format(px(a), py(b - hb), px(a), py(b + hb), colour, 1, 0.35)
            dot = '<circle cx="{}" cy="{}" r="{}" fill="{}"><title>{}</title></circle>'
            size = 5 if family == RAW or name.endswith("chosen") else 3.2
            out += Markup(dot).format(px(a), py(b), size, colour, f"{name}: learned {a:.0f}, kept {b:.0f}")
    return out
