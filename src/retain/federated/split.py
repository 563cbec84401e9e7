"""Who has what, and what is learned when: a stream cut into the files of clients, and its stages.

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retain.federated import partitions
from retain.federated.cut import Indices, blocks, by_pool, by_quantity, drawn, even, of_round, owned, shuffled
from retain.stream import Stream
from retain.types import Example, Examples, Lazy, Plain, RetainError, digest, plain
from retain.values import Count, CountOrOff, PathText, Positive, Seed, ranged

# K clients, n rows of a unit, T tasks

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
        of_round(spec.split_seed, s, 0).choice(np.arange(n_units), spec.per_round) for s in range(n_units)
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
    for group, members in groups.items():
        if not members:
            raise RetainError(f"federated.groups.{group}: must not be empty")
        for member in members:
            if member not in names:
                raise RetainError(f"federated.groups.{group}: no task {member!r}; choose from {names}")
            if member in home:
                raise RetainError(
                    f"federated.groups.{group}: task {member!r} is in group {home[member]!r} already"
                )
            home[member] = group
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
    if alone := [u for u in units if not rows[u.name]]:
        raise RetainError(f"federated: no client has rows of {list(alone[0].tasks)}")
    left = {u.name: sum(sizes[t] for t in u.tasks) - sum(map(len, rows[u.name].values())) for u in units}
    return Split(units, stages, clients, rows, left)


def _cut(spec: SplitSpec, units: Sequence[Unit], stream: Stream) -> list[list[Rows]]:
    """Every client's rows of every unit."""
    sizes = {t.name: len(t.train) for t in stream}
    shares = _task_shares(spec, sizes) if spec.skew == "task" else {}
    out = []
    for unit in units:
        rng = owned(spec.split_seed, "rows", unit.name)
        index = [(t, i) for t in unit.tasks for i in range(sizes[t])]
        if spec.skew == "dirichlet":
            files = _redrawn(spec, unit, lambda: by_quantity(len(index), spec.clients, spec.beta, rng))  # noqa: B023
        elif spec.skew == "even":
            files = blocks(shuffled(np.arange(len(index)), rng), even(len(index), spec.clients))
        else:
            pools = _pools(unit, stream, by_label=spec.skew == "label")
            fixed = [shares[t] for t in unit.tasks] if shares else None
            files = _redrawn(spec, unit, lambda: by_pool(pools, spec.clients, spec.beta, rng, fixed))  # noqa: B023
        out.append([tuple(index[i] for i in sorted(f.tolist())) for f in files])
    return out


def _redrawn(spec: SplitSpec, unit: Unit, draw: Callable[[], list[Indices]]) -> list[Indices]:
    """Draw until every client has enough."""
    for _ in range(DRAWS):
        files = draw()
        if spec.skew == "task" or min(map(len, files)) >= spec.min_rows:
            return files
    raise RetainError(
        f"federated.min_rows: in {DRAWS:,} draws with beta {spec.beta:g}, one of {spec.clients:,} clients always had "
        f"fewer than {spec.min_rows:,} rows of unit {unit.name!r}; take fewer clients, fewer min_rows, a larger beta, "
        "or skew: even"
    )


def _task_shares(spec: SplitSpec, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """Every client's share of each task: a draw over tasks per client. A share below `min_rows` rows is none."""
    rng = owned(spec.split_seed, "tasks")
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
