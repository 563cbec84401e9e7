"""Who trains in a round, and what: clients are drawn, and each takes a place of the stage.

The draw is FCIT's (Guo et al., ICCV 2025, arXiv 2503.12897; Ghy0501/FCIT): numpy's legacy generator, seeded with ten times
the stage plus the round, takes clients without replacement. Their order is that of the set in which the release keeps
them, and the i-th learns the stage's i-th unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from retain.federated.cut import of_round
from retain.federated.split import Split, SplitSpec
from retain.types import RetainError


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
    rng = of_round(seed, stage_index, round_index)
    drawn = rng.choice(np.arange(len(there)), min(spec.per_round, len(there)), replace=False)
    places = set(drawn.tolist())  # the release walks a set: its order is CPython's for small whole numbers
    return [there[i] for i in places]


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
