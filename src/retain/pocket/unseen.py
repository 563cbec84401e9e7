"""pocket-merge: the pocket's tasks split into six to tune on and two that no adapter has seen.

The small sibling of MM-MergeBench (`mm_mergebench.py`): what merging keeps of the seen tasks, and whether the
merge answers unseen ones better than the base model. Order matters to nothing but the rows of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

from retain.pocket.stream import task
from retain.stream import Stream

SEEN = ("captions", "boxes", "charts", "garments", "counting", "distortion")
UNSEEN = ("icons", "digits")


def pocket_merge(
    seed: int = 0,
    n_train: int = 1280,
    n_test: int = 64,
    seen: Sequence[str] = SEEN,
    unseen: Sequence[str] = UNSEEN,
    n_valid: int = 100,
) -> Stream:
    """Tasks to tune on, each alone, and tasks that are only evaluated; the same examples as the pocket stream."""
    tasks, others = (
        tuple(task(n, seed, n_train, n_valid, n_test) for n in names) for names in (seen, unseen)
    )
    return Stream("pocket_merge", tasks, others)
