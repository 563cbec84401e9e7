"""Merging: several adapters in, one out, without training. Pure functions on adapter states.

    from retain.merge import ties, copa, merger
    state = copa([state_a, state_b, state_c], density=0.2)
    state = merger("knots_ties")([state_a, state_b], weights=[1.0, 0.5], keep="svd", rank=16)

`retain merge` applies them to PEFT folders (`retain.merge.folders`), methods call them when a task ends,
federated averaging calls `average`.
"""

from retain.merge.base import MERGERS, Merged, Merger, available_mergers, merger, register_merger
from retain.merge.mergers import (
    average,
    coma,
    copa,
    dare,
    dare_ties,
    della,
    fisher,
    knots_dare_ties,
    knots_ties,
    magnitude_prune,
    pcb,
    slerp,
    svd,
    task_arithmetic,
    ties,
)
from retain.merge.parts import chunks
from retain.merge.search import lorahub

__all__ = [
    "MERGERS", "Merged", "Merger", "available_mergers", "average", "chunks", "coma", "copa", "dare", "dare_ties",
    "della", "fisher", "knots_dare_ties", "knots_ties", "lorahub", "magnitude_prune", "merger", "pcb",
    "register_merger", "slerp", "svd", "task_arithmetic", "ties",
]  # fmt: skip
