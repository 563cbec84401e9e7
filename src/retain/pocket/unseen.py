"""pocket-merge: the pocket's tasks split into six to tune on and two that no adapter has seen.

The small sibling of MM-MergeBench (`mm_mergebench.py`): what merging keeps of the seen tasks, and whether the
merge answers unseen ones better than the base model. Order matters to nothing but the rows of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from retain.pocket.stream import Pictures, task
from retain.stream import Stream
from retain.values import Seed

SEEN = ("captions", "boxes", "charts", "garments", "counting", "distortion")
UNSEEN = ("icons", "digits")


def pocket_merge(
    seed: Seed = 0,
    n_train: Pictures = 1280,
    n_test: Pictures = 64,
    seen: Annotated[Sequence[str], Field(min_length=1)] = SEEN,
    unseen: Sequence[str] = UNSEEN,
    n_valid: Pictures = 100,
) -> Stream:
    """Tasks to tune on, each alone, and tasks that are only evaluated; the same examples as the pocket stream."""
    tasks, others = (
        tuple(task(n, seed, n_train, n_valid, n_test) for n in names) for names in (seen, unseen)
    )
    return Stream("pocket_merge", tasks, others)
