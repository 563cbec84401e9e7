"""How often do the intervals of metrics contain the true value? By simulation, beside other kinds of interval.

    python scripts/coverage.py            # both tables of docs/metrics.md, on one core: half an hour
    python scripts/coverage.py --quick    # a fifth of the trials
    python scripts/coverage.py metrics    # the second table only

A world fixes the true score of every task after every task, and so the true value of every metric (its formula, taken
of the true scores). A trial draws N test samples per task; all rows answer the same ones, and how hard a sample is
counts in every row (correlation 0.6). Scores are right or wrong (0 or 100), or continuous and skewed, without an upper
bound, as CIDEr's. Seeds are fixed: the tables repeat to the last digit.

Worlds: *steady*, every row after learning equally good, so that the best of them is best by chance alone; *decay*, a
task loses a little with each task that follows; *uneven*, the rows differ by what task was learned last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import stats

from retain.metrics.formulas import DEFINITIONS, Definition
from retain.metrics.intervals import Array, Shares, interval

# T learned tasks, U unseen tasks, N samples of one task, R resamples

LEVEL, UNSEEN, CORRELATION, SIGMA = 0.95, 2, 0.6, 0.8
WORLDS = ("steady", "decay", "uneven")
KINDS = ("binary", "continuous")
Interval = tuple[float, float]


def truth(world: str, t: int, rng: np.random.Generator) -> Array:
    """True scores (T + 1, T + U), 0..100."""
    learned = rng.uniform(55, 90, t + UNSEEN)
    values = np.tile(rng.uniform(10, 40, t + UNSEEN), (t + 1, 1))
    for j in range(t):
        since = np.arange(t - j)
        if world == "decay":
            values[j + 1 :, j] = 25 + (learned[j] - 25) * 0.8**since
        elif world == "uneven":
            values[j + 1 :, j] = learned[j] - np.where(since > 0, rng.uniform(0, 35, t - j), 0)
        else:
            values[j + 1 :, j] = learned[j]
    return values


def answered(true: Array, n: int, kind: str, rng: np.random.Generator) -> list[Array]:
    """Scores of n samples per task, (T + 1, N) each, whose expectation is `true`."""
    out = []
    for column in true.T:
        hard_N = rng.standard_normal(n)
        own = rng.standard_normal((len(column), n))
        x = np.sqrt(CORRELATION) * hard_N + np.sqrt(1 - CORRELATION) * own
        if kind == "binary":
            out.append(100.0 * (x < stats.norm.ppf(column / 100)[:, None]))
        else:
            out.append(column[:, None] * np.exp(SIGMA * x - SIGMA**2 / 2))
    return out


def means(scores: Sequence[Array]) -> Array:
    return np.stack([s.mean(axis=1) for s in scores], axis=1)


# -- kinds of interval ------------------------------------------------------------------------------------------


def ours(d: Definition, scores: Sequence[Array], t: int) -> Interval:
    """What the reports print."""
    shares = d.shares(scores, t, UNSEEN)
    found = interval(float(d.value(means(scores), t, UNSEEN)), shares, LEVEL)
    assert found is not None
    return found


def one_kind(d: Definition, scores: Sequence[Array], t: int, crossed: bool) -> Interval:
    """The t-interval of the held shares alone, or of the crossed ones alone."""
    parts = [s.low if crossed else s.held for s in d.shares(scores, t, UNSEEN)]
    centre = float(sum(z.mean() for z in parts))
    found = interval(centre, [Shares(z, z, z) for z in parts], LEVEL)
    assert found is not None
    return found


def drawn(
    d: Definition, scores: Sequence[Array], t: int, size: int, rng: np.random.Generator, r: int
) -> Array:
    """(R,) bootstrap values of a metric from `size` draws per task."""
    cells = np.empty((r, t + 1, t + UNSEEN))
    for j, s in enumerate(scores):
        n = s.shape[1]
        at = rng.integers(0, n, size=(r, size)) + n * np.arange(r)[:, None]
        counts = np.bincount(at.ravel(), minlength=r * n).reshape(r, n)
        cells[:, :, j] = counts @ s.T / size
    return d.value(cells, t, UNSEEN)


def bootstraps(
    d: Definition, scores: Sequence[Array], t: int, rng: np.random.Generator, r: int
) -> dict[str, Interval]:
    """Percentile, basic, bias-corrected and accelerated (BCa), and m out of n with m = n^(2/3)."""
    value, n = float(d.value(means(scores), t, UNSEEN)), scores[0].shape[1]
    low, high = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    draws = drawn(d, scores, t, n, rng, r)
    a, b = np.quantile(draws, [low, high])
    below = np.clip(((draws < value) + 0.5 * (draws == value)).mean(), 1 / r, 1 - 1 / r)
    z0, z = stats.norm.ppf(below), stats.norm.ppf([low, high])
    grow = acceleration(d, scores, t)
    bca = np.quantile(draws, stats.norm.cdf(z0 + (z0 + z) / (1 - grow * (z0 + z))))
    m = max(2, round(n ** (2 / 3)))
    few = np.quantile(drawn(d, scores, t, m, rng, r) - value, [low, high]) * np.sqrt(m / n)
    return {
        "percentile": (float(a), float(b)),
        "basic": (2 * value - float(b), 2 * value - float(a)),
        "BCa": (float(bca[0]), float(bca[1])),
        "m of n": (value - float(few[1]), value - float(few[0])),
    }


def acceleration(d: Definition, scores: Sequence[Array], t: int) -> float:
    """BCa's skewness term, from the metric without each sample in turn (first order: its crossed shares)."""
    parts = [s.low for s in d.shares(scores, t, UNSEEN)]
    apart = np.concatenate([(z - z.mean()) / len(z) for z in parts])
    scale = float((apart**2).sum()) ** 1.5
    return float((apart**3).sum()) / (6 * scale) if scale else 0.0


# -- tables -----------------------------------------------------------------------------------------------------


def trials(
    world: str, kind: str, n: int, t: int, count: int
) -> Iterator[tuple[Array, list[Array], np.random.Generator]]:
    """True scores and drawn answers, `count` times."""
    for k in range(count):
        rng = np.random.default_rng([WORLDS.index(world), KINDS.index(kind), n, t, k])
        true = truth(world, t, rng)
        yield true, answered(true, n, kind, rng), rng


def counts(n: int, t: int, quick: bool) -> int:
    """Trials of a size: fewer where one takes long. 95 of 100 is 95 -+ 2 in 400, -+ 4 in 150 and -+ 6 in 60."""
    many = 400 if n * t <= 1000 else 150 if n * t <= 10_000 else 60
    return many // 5 if quick else many


def share(hits: float, count: int) -> str:
    return f"{100 * hits / count:.0f}"


BY_NAME = {d.name: d for d in DEFINITIONS}
DIFFERENCES = ("Last", "Forgetting")


def covered(
    world: str, kind: str, n: int, t: int, count: int, names: Sequence[str] = tuple(BY_NAME)
) -> dict[str, float]:
    """How many of `count` trials have the true value inside what the reports print, per metric."""
    hits = dict.fromkeys(names, 0.0)
    for true, scores, _ in trials(world, kind, n, t, count):
        for name in names:
            low, high = ours(BY_NAME[name], scores, t)
            hits[name] += low <= float(BY_NAME[name].value(true, t, UNSEEN)) <= high
    return hits


def covered_differences(world: str, kind: str, n: int, t: int, count: int) -> dict[str, float]:
    """The same of a run less a run in the next world."""
    hits = {f"{name} A - B": 0.0 for name in DIFFERENCES}
    after = WORLDS[(WORLDS.index(world) + 1) % len(WORLDS)]
    for one, two in zip(trials(world, kind, n, t, count), trials(after, kind, n, t, count), strict=True):
        for name in DIFFERENCES:
            d = BY_NAME[name]
            want, seen = (
                float(d.value(x, t, UNSEEN)) - float(d.value(y, t, UNSEEN))
                for x, y in ((one[0], two[0]), (means(one[1]), means(two[1])))
            )
            pairs = zip(*(d.shares(run[1], t, UNSEEN) for run in (one, two)), strict=True)
            found = interval(seen, [p.minus(q) for p, q in pairs], LEVEL)
            assert found is not None
            hits[f"{name} A - B"] += found[0] <= want <= found[1]
    return hits


def table_of_metrics(quick: bool) -> None:
    """Coverage of what the reports print: every metric, every size, in the least favourable world."""
    for kind in KINDS:
        for n in (4, 64, 1000):
            for t in (3, 10, 60):
                count = counts(n, t, quick)
                found = [
                    covered(w, kind, n, t, count) | covered_differences(w, kind, n, t, count) for w in WORLDS
                ]
                if (kind, n, t) == ("binary", 4, 3):
                    print(f"| scores | samples | tasks | {' | '.join(found[0])} |")
                    print("|---" * (3 + len(found[0])) + "|")
                cells = [share(min(hits[name] for hits in found), count) for name in found[0]]
                print(f"| {kind} | {n} | {t} | {' | '.join(cells)} |", flush=True)


def table_of_kinds(quick: bool) -> None:
    """Forgetting: kinds of interval side by side, coverage and how often the estimate is inside."""
    columns = ("percentile", "basic", "BCa", "m of n", "held", "crossed", "ours")
    print(f"| world | samples | tasks | {' | '.join(columns)} |\n{'|---' * (3 + len(columns))}|")
    forgetting = BY_NAME["Forgetting"]
    kinds: dict[str, Callable[[Sequence[Array], int], Interval]] = {
        "held": lambda s, t: one_kind(forgetting, s, t, False),
        "crossed": lambda s, t: one_kind(forgetting, s, t, True),
        "ours": lambda s, t: ours(forgetting, s, t),
    }
    for world in WORLDS:
        for n in (4, 64, 1000):
            for t in (3, 10, 60):
                count = (40 if n * t > 10_000 else 200) // (5 if quick else 1)
                hits, holds, width = (dict.fromkeys(columns, 0.0) for _ in range(3))
                for true, scores, rng in trials(world, "binary", n, t, count):
                    want = float(forgetting.value(true, t, UNSEEN))
                    value = float(forgetting.value(means(scores), t, UNSEEN))
                    found = bootstraps(forgetting, scores, t, rng, 400) | {
                        k: f(scores, t) for k, f in kinds.items()
                    }
                    for name, (low, high) in found.items():
                        hits[name] += low <= want <= high
                        holds[name] += low - 1e-9 <= value <= high + 1e-9
                        width[name] += high - low
                cells = [
                    f"{share(hits[c], count)} ({share(holds[c], count)}) {width[c] / count:.1f}"
                    for c in columns
                ]
                print(f"| {world} | {n} | {t} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a fifth of the trials")
    parser.add_argument("table", nargs="?", choices=("kinds", "metrics", "both"), default="both")
    chosen = parser.parse_args()
    if chosen.table != "metrics":
        print("Forgetting, kinds of interval: coverage of the truth, (of the estimate), mean width\n")
        table_of_kinds(chosen.quick)
    if chosen.table != "kinds":
        print("\nWhat the reports print: coverage of the truth in the least favourable world\n")
        table_of_metrics(chosen.quick)


if __name__ == "__main__":
    main()
