"""STUB"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from retain.types import digest
from retain.values import Count, Positive, ranged


@dataclass(frozen=True)
class Unit:
    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    name: str
    units: tuple[str, ...]


@ranged("federated")
@dataclass(frozen=True)
class SplitSpec:
    setting: Literal["task_hom", "task_het", "capability_hom", "capability_het"] = "task_hom"
    clients: Count = 50
    per_round: Count = 5
    rounds: Count = 10
    skew: Literal["dirichlet", "label", "task", "even"] = "dirichlet"
    beta: Positive = 1.0
    partitions: str | None = None


@dataclass(frozen=True)
class Split:
    units: tuple[Unit, ...]
    stages: tuple[Stage, ...]
    clients: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Any]]

    def counts(self, unit):
        return {c: len(r) for c, r in self.rows[unit].items()}

    def taught(self, stage):
        return tuple(
            dict.fromkeys(t for u in stage.units for x in self.units if x.name == u for t in x.tasks)
        )

    def examples(self, unit, client, stream):
        return [stream.named(t).train[i] for t, i in self.rows[unit].get(client, ())]

    def digest(self):
        return digest([[u, [[c, [list(p) for p in r]] for c, r in v.items()]] for u, v in self.rows.items()])


def make(spec, stream, seed):
    clients = tuple(f"client-{i:02d}" for i in range(spec.clients))
    rows = {}
    for t in stream:
        rng = np.random.RandomState(seed)
        order = rng.permutation(len(t.train)) if spec.clients > 1 else np.arange(len(t.train))
        rows[t.name] = {
            c: tuple((t.name, int(i)) for i in p)
            for c, p in zip(clients, np.array_split(order, spec.clients))
        }
    if spec.setting == "task_het":
        names = [t.name for t in stream]
        stages = tuple(
            Stage(f"stage-{s + 1}", tuple(names[(s + i) % len(names)] for i in range(spec.per_round)))
            for s in range(len(names))
        )
    else:
        stages = tuple(Stage(t.name, (t.name,) * spec.per_round) for t in stream)
    return Split(tuple(Unit(t.name, (t.name,)) for t in stream), stages, clients, rows)


def sample(spec, stage, r, eligible, seed):
    rng = np.random.RandomState(10 * stage + r + seed)
    return [eligible[i] for i in rng.choice(len(eligible), min(spec.per_round, len(eligible)), replace=False)]
