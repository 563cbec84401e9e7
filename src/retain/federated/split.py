"""Who has what, and who learns what when: a stream cut into the files of clients, its stages, and each round's clients.

Pure data and numpy. Guo et al., Federated Continual Instruction Tuning (FCIT), ICCV 2025 (arXiv 2503.12897), with the
arithmetic of its release (Ghy0501/FCIT):

    client k of K gets the next floor(p_k n) of n shuffled rows, p ~ Dir(beta 1_K): a skew of quantity, one draw per unit
    round r of stage s: numpy's legacy generator, seeded with 10 s + r, draws clients without replacement
    heterogeneous: the i-th of a round's clients learns unit schedule[s][i], from its own file of that unit

Here the cut is seeded, and for every unit on its own, so that another order or one task more moves no row; the release
draws it anew, and publishes the files (`partitions` reads them). Its floor of rows per client is beta by mistake, not
the 50 that was meant; here it is `min_rows`. `label`, `task` and `even` are ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

from retain.federated import partitions
from retain.stream import Stream
from retain.types import Example, Examples, Lazy, Plain, RetainError, digest, plain
from retain.values import Count, CountOrOff, PathText, Positive, Seed, ranged

# K clients, n rows of a unit, P pools of rows that are cut on their own, T tasks

DRAWS = 1000
"""How often shares are drawn before it is said that they cannot fit."""

MOST_LABELS = 200
"""A task with more answers than this has no labels: it asks for numbers, boxes or sentences."""

PUBLISHED: dict[tuple[str, int], tuple[tuple[int, ...], ...]] = {
    ("task_het", 8): (
        (1, 2, 4, 5, 6), (3, 4, 5, 7, 7), (0, 2, 3, 4, 5), (0, 0, 1, 3, 7),
        (1, 2, 4, 4, 5), (0, 3, 5, 7, 7), (2, 2, 5, 7, 7), (5, 5, 5, 6, 6),
    ),
    ("capability_het", 4): ((0, 1, 1, 3, 3), (0, 2, 2, 2, 3), (1, 2, 2, 3, 3), (0, 0, 0, 1, 1)),
}  # fmt: skip
"""FCIT's schedules, by setting and number of units: per stage, the unit of each of a round's five clients."""

Rows = tuple[tuple[str, int], ...]
"""(task, row) pairs, rows counted from 0."""
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """What is cut into files, one per client: a task, or a group of tasks mixed."""

    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A stretch of rounds: the unit of each place among a round's clients. Homogeneous: one unit, repeated."""

    name: str
    units: tuple[str, ...]


@ranged("federated")
@dataclass(frozen=True)
class SplitSpec:
    """Clients, their data and the stages.

    `setting`: tasks or groups of them (`capability`), one per stage (`hom`) or several at once (`het`).
    `skew`: what `beta` makes uneven. `dirichlet`: how many rows each client has of a unit, as in FCIT; `label`: which
    answers (a draw over clients per answer); `task`: how much of which task (a draw over tasks per client: with a
    small beta a client has few of them); `even` nothing. Every client has at least `min_rows` rows of every unit;
    under `task`, of those that it has at all. `split_seed` decides who has what, whatever the run's seed is.
    `groups`: tasks by capability, in the order of stages; a benchmark may know its own.
    `partitions`: the folder of published files, `<beta>/Task1/client_0.json`, read instead of cutting; under `task` a
    client may lack files. `schedule`: unit numbers from 0 per stage and place, instead of FCIT's.
    """

    setting: Literal["task_hom", "task_het", "capability_hom", "capability_het"] = "task_hom"
    clients: Count = 50
    per_round: Count = 5
    rounds: Count = 10
    skew: Literal["dirichlet", "label", "task", "even"] = "dirichlet"
    beta: Positive = 1.0
    min_rows: Count = 1
    split_seed: Seed = 0
    groups: dict[str, list[str]] = field(default_factory=dict)
    partitions: PathText | None = None
    schedule: list[list[CountOrOff]] | None = None

    def __post_init__(self) -> None:
        if self.per_round > self.clients:
            raise RetainError(
                f"federated.per_round: {self.per_round} clients a round, but federated.clients is {self.clients}"
            )
        if self.schedule is None:
            return
        if not self.setting.endswith("_het"):
            raise RetainError(
                f"federated.schedule: {self.setting!r} has one unit per stage; a schedule needs setting "
                "'task_het' or 'capability_het'"
            )
        if not self.schedule:
            raise RetainError("federated.schedule: must not be empty")
        for s, row in enumerate(self.schedule):
            if len(row) != self.per_round:
                raise RetainError(
                    f"federated.schedule[{s}]: {len(row)} units, but federated.per_round is {self.per_round}"
                )


@dataclass(frozen=True)
class Split:
    """Units, stages, clients, and the rows of each unit that each client has; a client without any is left out.

    A row belongs to one client at most. `left` counts, by unit, the rows that nobody has: what flooring drops.
    """

    units: tuple[Unit, ...]
    stages: tuple[Stage, ...]
    clients: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Rows]]
    left: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names in (("clients", self.clients), ("units", [u.name for u in self.units])):
            if twice := sorted({n for n in names if list(names).count(n) > 1} if _repeats(names) else ()):
                raise RetainError(f"federated: two {what} are called {twice[0]!r}")
        known = set(self.clients)
        for unit, files in self.rows.items():
            owner: dict[tuple[str, int], str] = {}
            for client, rows in files.items():
                if client not in known:
                    raise RetainError(f"federated: unit {unit!r} has rows of {client!r}, which is no client")
                for row in rows:
                    if row in owner:
                        raise RetainError(
                            f"federated: row {row[1]} of task {row[0]!r} belongs to {owner[row]!r} and to {client!r}"
                        )
                    owner[row] = client

    def unit(self, name: str) -> Unit:
        """The unit of that name."""
        return next(u for u in self.units if u.name == name)

    def taught(self, stage: Stage) -> tuple[str, ...]:
        """The tasks that a stage teaches, each once."""
        return tuple(dict.fromkeys(t for u in stage.units for t in self.unit(u).tasks))

    def counts(self, unit: str) -> dict[str, int]:
        """How many rows of a unit each client has; 0 for none."""
        return {c: len(self.rows[unit].get(c, ())) for c in self.clients}

    def examples(self, unit: str, client: str, stream: Stream) -> Examples:
        """A client's rows of a unit. They are read when they are asked for where the stream's are."""
        rows = self.rows[unit].get(client, ())
        trains = {t: stream.named(t).train for t, _ in rows}
        if any(isinstance(train, Lazy) for train in trains.values()):
            return _Chosen(rows, trains)
        return [trains[t][i] for t, i in rows]

    def to_data(self) -> dict[str, Any]:
        """Plain JSON data. A unit of one task lists row numbers, a group [task's number in the unit, row]."""
        rows = {}
        for unit in self.units:
            at = {t: i for i, t in enumerate(unit.tasks)}
            alone = len(unit.tasks) == 1
            rows[unit.name] = {
                c: [r for _, r in found] if alone else [[at[t], r] for t, r in found]
                for c, found in self.rows[unit.name].items()
            }
        return {
            "units": [{"name": u.name, "tasks": list(u.tasks)} for u in self.units],
            "stages": [{"name": s.name, "units": list(s.units)} for s in self.stages],
            "clients": list(self.clients),
            "rows": rows,
            "left": dict(self.left),
        }

    @classmethod
    def from_data(cls, data: Any, where: str = "split") -> Split:
        """What `to_data` gave. RetainError, which names `where`, for anything else."""
        try:
            units = tuple(Unit(u["name"], tuple(u["tasks"])) for u in data["units"])
            rows = {}
            for u in units:
                alone = len(u.tasks) == 1
                rows[u.name] = {
                    c: tuple((u.tasks[0], int(r)) if alone else (u.tasks[r[0]], int(r[1])) for r in found)
                    for c, found in data["rows"][u.name].items()
                }
            stages = tuple(Stage(s["name"], tuple(s["units"])) for s in data["stages"])
            return cls(units, stages, tuple(data["clients"]), rows, dict(data["left"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RetainError(f"{where}: no split: {type(error).__name__}: {error}") from None

    def digest(self) -> str:
        """A short hash of all of it."""
        return digest(self.to_data())


class _Chosen(Lazy):
    """Some rows of some tasks, in an order."""

    def __init__(self, rows: Rows, trains: Mapping[str, Examples]) -> None:
        self.rows, self.trains = rows, trains

    def __len__(self) -> int:
        return len(self.rows)

    def one(self, i: int) -> Example:
        """The example of row `i`."""
        task, row = self.rows[i]
        found: Example = self.trains[task][row]
        return found

    def plain(self) -> Iterator[Plain]:
        """All of them in order, as plain data."""
        return (row for i in range(len(self)) for row in plain([self.one(i)]))


def _repeats(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)


# -- units and stages ------------------------------------------------------------------------------------


def plan(spec: SplitSpec, stream: Stream) -> tuple[tuple[Unit, ...], tuple[Stage, ...]]:
    """Units and stages of a stream, whoever has its rows. RetainError where groups or schedule do not fit it."""
    if spec.setting.startswith("task_"):
        units = tuple(Unit(t.name, (t.name,)) for t in stream)
    else:
        units = tuple(Unit(name, tuple(tasks)) for name, tasks in _groups(spec, stream).items())
    names = [u.name for u in units]
    if spec.setting.endswith("_hom"):
        return units, tuple(Stage(n, (n,) * spec.per_round) for n in names)
    for s, row in enumerate(spec.schedule or ()):
        for i, u in enumerate(row):
            if u >= len(units):
                raise RetainError(
                    f"federated.schedule[{s}][{i}]: no unit {u}; there are {len(units)}, counted from 0: {names}"
                )
    rows = spec.schedule or _schedule(spec, len(units))
    return units, tuple(Stage(f"stage-{s + 1}", tuple(names[u] for u in row)) for s, row in enumerate(rows))


def _schedule(spec: SplitSpec, n_units: int) -> Sequence[Sequence[int]]:
    """FCIT's published one where it fits; else drawn as its release does: with replacement, sorted, per stage."""
    if spec.per_round == 5 and (spec.setting, n_units) in PUBLISHED:
        return PUBLISHED[spec.setting, n_units]
    draws = (
        _generator(spec.split_seed, s, 0).choice(np.arange(n_units), spec.per_round) for s in range(n_units)
    )
    return [sorted(int(u) for u in row) for row in draws]


def _groups(spec: SplitSpec, stream: Stream) -> dict[str, list[str]]:
    """The groups of the recipe, or else those that the benchmark's tasks name."""
    groups = spec.groups
    if not groups:
        groups = {}
        for task in stream:
            name = task.meta.get("capability")
            if not isinstance(name, str):
                raise RetainError(
                    f"federated.groups: setting {spec.setting!r} needs groups of tasks, and stream {stream.name!r} "
                    "has none of its own; give {group: [task, …]}"
                )
            groups.setdefault(name, []).append(task.name)
    names, home = [t.name for t in stream], dict[str, str]()
    for group, tasks in groups.items():
        if not tasks:
            raise RetainError(f"federated.groups.{group}: must not be empty")
        for task in tasks:
            if task not in names:
                raise RetainError(f"federated.groups.{group}: no task {task!r}; choose from {names}")
            if task in home:
                raise RetainError(
                    f"federated.groups.{group}: task {task!r} is in group {home[task]!r} already"
                )
            home[task] = group
    if missing := [n for n in names if n not in home]:
        raise RetainError(f"federated.groups: task {missing[0]!r} is in no group of {list(groups)}")
    return groups


# -- who has what ----------------------------------------------------------------------------------------


def make(spec: SplitSpec, stream: Stream) -> Split:
    """The split that a recipe says: cut here, or read from published files. The same for the same `split_seed`.

    A client's rows are in the stream's order (published ones in their file's), so that one client has the stream.
    """
    units, stages = plan(spec, stream)
    sizes = {t.name: len(t.train) for t in stream}
    for unit in units:
        if empty := [t for t in unit.tasks if not sizes[t]]:
            raise RetainError(f"federated: task {empty[0]!r} has no training row")
    own = {f"unit {u.name!r}": sum(sizes[t] for t in u.tasks) for u in units}
    for what, n in ({"the stream": sum(own.values())} if spec.skew == "task" else own).items():
        if n < spec.clients * spec.min_rows:
            raise RetainError(
                f"federated.clients: {spec.clients:,} clients with at least {spec.min_rows:,} rows each need "
                f"{spec.clients * spec.min_rows:,} rows, and {what} has {n:,}"
            )
    width = max(2, len(str(spec.clients - 1)))
    clients = tuple(f"client-{k:0{width}d}" for k in range(spec.clients))
    if spec.partitions is not None:
        where = partitions.Where(Path(spec.partitions).expanduser(), spec.beta, spec.setting.split("_")[0])
        given = [[stream.named(t) for t in u.tasks] for u in units]
        found = partitions.read(where, given, spec.clients, spec.min_rows, spec.skew == "task")
    else:
        found = _cut(spec, units, stream)
    rows = {u.name: {c: r for c, r in zip(clients, files) if r} for u, files in zip(units, found)}
    left = {u.name: sum(sizes[t] for t in u.tasks) - sum(map(len, rows[u.name].values())) for u in units}
    return Split(units, stages, clients, rows, left)


def _cut(spec: SplitSpec, units: Sequence[Unit], stream: Stream) -> list[list[Rows]]:
    """Every client's rows of every unit."""
    sizes = {t.name: len(t.train) for t in stream}
    shares = _task_shares(spec, sizes) if spec.skew == "task" else {}
    out = []
    for unit in units:
        rng = _owned(spec.split_seed, "rows", unit.name)
        index = [(t, i) for t in unit.tasks for i in range(sizes[t])]
        if spec.skew == "dirichlet":
            files = _redrawn(spec, unit, lambda: by_quantity(len(index), spec.clients, spec.beta, rng))  # noqa: B023
        elif spec.skew == "even":
            files = _blocks(_shuffled(np.arange(len(index)), rng), _even(len(index), spec.clients))
        else:
            pools = _pools(unit, stream, by_label=spec.skew == "label")
            fixed = [shares[t] for t in unit.tasks] if shares else None
            files = _redrawn(spec, unit, lambda: by_pool(pools, spec.clients, spec.beta, rng, fixed))  # noqa: B023
        out.append([tuple(index[i] for i in sorted(f.tolist())) for f in files])
    return out


def drawn(beta: float, k: int, rng: RandomState) -> NDArray[np.float64]:
    """Shares of k from a symmetric Dirichlet; its limits, one takes all or equal shares, where floats do not hold it."""
    with np.errstate(all="ignore"):
        share_K = rng.dirichlet([beta] * k)
    if abs(share_K.sum() - 1) < 1e-6:  # not NaN either
        return share_K
    return np.eye(k)[rng.randint(k)] if beta < 1 else np.full(k, 1 / k)


def by_quantity(n: int, clients: int, beta: float, rng: RandomState) -> list[Indices]:
    """FCIT: each client's share of n rows is drawn, floored, and taken in blocks off a shuffle. The rest is dropped."""
    share_K = drawn(beta, clients, rng)
    order = _shuffled(np.arange(n), rng)
    return _blocks(order, np.cumsum((share_K * n).astype(np.int64)))


def by_pool(
    pools: Sequence[Indices],
    clients: int,
    beta: float,
    rng: RandomState,
    fixed: Sequence[NDArray[np.float64]] | None = None,
) -> list[Indices]:
    """Every pool is shared among clients on its own, by a draw of its own or by `fixed` shares. Nothing is dropped."""
    files: list[list[Indices]] = [[] for _ in range(clients)]
    for k, pool in enumerate(pools):
        share_K = drawn(beta, clients, rng) if fixed is None else fixed[k]
        ends = np.floor(np.cumsum(share_K) * len(pool) + 1e-9).astype(np.int64)  # a sum of 1 - 1e-16 is 1
        ends[np.flatnonzero(share_K)[-1:]] = len(pool)
        for file, block in zip(files, _blocks(_shuffled(pool, rng), np.maximum.accumulate(ends))):
            file.append(block)
    return [np.concatenate(file) for file in files]


def _redrawn(spec: SplitSpec, unit: Unit, draw: Any) -> list[Indices]:
    """Draw until every client has enough."""
    for _ in range(DRAWS):
        files: list[Indices] = draw()
        if spec.skew == "task" or min(map(len, files)) >= spec.min_rows:
            return files
    raise RetainError(
        f"federated.min_rows: in {DRAWS:,} draws with beta {spec.beta:g}, one of {spec.clients:,} clients always had "
        f"fewer than {spec.min_rows:,} rows of unit {unit.name!r}; take fewer clients, fewer min_rows, a larger beta, "
        "or skew: even"
    )


def _task_shares(spec: SplitSpec, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """Every client's share of each task: a draw over tasks per client. A share below `min_rows` rows is none."""
    rng = _owned(spec.split_seed, "tasks")
    n_T = np.array(list(sizes.values()))
    for _ in range(DRAWS):
        share_KT = np.stack([drawn(spec.beta, len(sizes), rng) for _ in range(spec.clients)])
        with np.errstate(invalid="ignore"):
            share_KT = share_KT / share_KT.sum(0)
            share_KT[~(share_KT * n_T >= spec.min_rows)] = 0
            share_KT = share_KT / share_KT.sum(0)
        if np.isfinite(share_KT).all() and share_KT.any(1).all():
            return {t: share_KT[:, i] for i, t in enumerate(sizes)}
    raise RetainError(
        f"federated.min_rows: in {DRAWS:,} draws over tasks with beta {spec.beta:g}, one of {spec.clients:,} clients had "
        f"no task, or one of {len(sizes)} tasks no client, with at least {spec.min_rows:,} rows; take fewer clients, "
        "fewer min_rows, or a larger beta"
    )


def _pools(unit: Unit, stream: Stream, by_label: bool) -> list[Indices]:
    """A unit's rows by task, or by task and label, in a fixed order."""
    pools, first = list[Indices](), 0
    for name in unit.tasks:
        train = stream.named(name).train
        rows: dict[str, list[int]] = {}
        for i, row in enumerate(plain(train) if by_label else ()):
            rows.setdefault(_label(row), []).append(first + i)
        if len(rows) > MOST_LABELS:
            raise RetainError(
                f"federated.skew: 'label' needs at most {MOST_LABELS} different answers, and task {name!r} has "
                f"{len(rows):,}; choose from 'dirichlet', 'task', 'even'"
            )
        own = [rows[k] for k in sorted(rows)] or [list(range(first, first + len(train)))]
        pools += [np.array(r, np.int64) for r in own]
        first += len(train)
    return pools


def _label(row: Plain) -> str:
    """The first reference answer, or the last turn of the assistant."""
    said = (
        row.references[0]
        if row.references
        else next((t[1] for t in reversed(row.turns) if t[0] == "assistant"), "")
    )
    return said.strip().lower()


def _even(n: int, clients: int) -> Indices:
    return np.array([(k + 1) * n // clients for k in range(clients)], np.int64)


def _blocks(order: Indices, ends: Indices) -> list[Indices]:
    return np.split(order, ends)[:-1]


def _shuffled(rows: Indices, rng: RandomState) -> Indices:
    rows = rows.copy()
    rng.shuffle(rows)
    return rows


def _owned(*who: object) -> RandomState:
    """A generator of its own for whoever asks."""
    text = "/".join(map(str, who)).encode("utf8", "surrogatepass")
    return RandomState(np.frombuffer(hashlib.sha256(text).digest(), "<u4").astype(np.uint32))


# -- a round ---------------------------------------------------------------------------------------------


def sample(
    spec: SplitSpec, stage_index: int, round_index: int, eligible: Sequence[str], seed: int
) -> list[str]:
    """A round's clients, in their places. Their order in `eligible` does not matter, their names do.

    Seed 0 gives FCIT's draws, so the eleventh round of a stage has those of the next stage's first; another seed
    draws for itself. Fewer than `per_round` are all taken.
    """
    there = sorted(set(eligible))
    if not there:
        raise RetainError(
            f"federated: round {round_index + 1} of stage {stage_index + 1} has no client to ask"
        )
    rng = _generator(seed, stage_index, round_index)
    drawn = rng.choice(np.arange(len(there)), min(spec.per_round, len(there)), replace=False)
    return [
        there[i] for i in set(drawn.tolist())
    ]  # the release walks a set: its order is that of small integers


def seats(
    spec: SplitSpec,
    split: Split,
    stage_index: int,
    round_index: int,
    seed: int,
    there: Iterable[str] | None = None,
) -> list[tuple[str, str]]:
    """A round's clients, each with the unit that it learns: that of its place, where it has rows of it.

    Where everybody has everything it is FCIT's draw. Where the client of a place lacks its unit, another takes the
    place, so that as many places as can be are filled. `there`: the clients that can be asked (all).
    """
    stage = split.stages[stage_index]
    has = {u: {c for c, n in split.counts(u).items() if n} for u in set(stage.units)}
    asked = split.clients if there is None else tuple(there)
    able = sorted(c for c in set(asked) if any(c in clients for clients in has.values()))
    if not able:
        tasks = list(split.taught(stage))
        raise RetainError(f"federated: stage {stage.name!r}: no client has rows of {tasks}")
    drawn = sample(spec, stage_index, round_index, able, seed)
    order = drawn + [c for c in able if c not in set(drawn)]
    wishes = []
    for i, unit in enumerate(stage.units):
        own = order[i : i + 1] if i < len(drawn) else []
        wishes.append([c for c in [*own, *order] if c in has[unit]])
    return [(c, u) for c, u in zip(_matched(wishes), stage.units) if c is not None]


def _matched(wishes: Sequence[Sequence[str]]) -> list[str | None]:
    """One client for as many places as can be, earlier wishes first (augmenting paths)."""
    owner: dict[str, int] = {}
    holds: list[str | None] = [None] * len(wishes)
    for start in range(len(wishes)):
        queue, came = [start], dict[str, int]()
        while queue:
            place = queue.pop(0)
            free = None
            for client in wishes[place]:
                if client in came:
                    continue
                came[client] = place
                if client not in owner:
                    free = client
                    break
                queue.append(owner[client])
            if free is None:
                continue
            while free is not None:  # everyone on the way moves one place on
                place = came[free]
                owner[free], holds[place], free = place, free, holds[place]
            break
    return holds


def _generator(seed: int, stage: int, round_: int) -> RandomState:
    """The release's generator for seed 0; one of its own for any other."""
    if seed == 0:
        return RandomState((10 * stage + round_) % 2**32)
    return _owned("round", seed, stage, round_)


# -- files -----------------------------------------------------------------------------------------------


def write_partitions(
    split: Split, stream: Stream, out: Path, *, image_root: Path | None = None, copy: bool = False
) -> Path:
    """Every client's files as FCIT lays them out, `out/Task1/client_0.json`; returns the folder of their images.

    Images stay where they are, their paths relative to `image_root` (default: the folder that all share). With `copy`,
    or where an image is no file, each client has its own under `out/images/client_0`, and `out` is returned.
    """
    files = [
        {k: split.examples(u.name, c, stream) for k, c in enumerate(split.clients) if c in split.rows[u.name]}
        for u in split.units
    ]
    return partitions.write(files, out, image_root, copy)
