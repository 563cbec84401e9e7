"""Joint training on all tasks at once: what a method could reach if no task ever became old.

CoIN concatenates all train files and shuffles them. This part only owns `stages`; which adapter trains is
another part's choice: `method: [multitask, lora]`. The order is shuffled by the loop, over all tasks
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from retain.method import Method, register
from retain.stream import Stream, Task
from retain.types import joined


@register
@dataclass
class Multitask(Method):
    """One stage: the examples of every task joined. `optim.steps` should be that of all tasks together."""

    name: ClassVar[str] = "multitask"
    about: ClassVar[str] = "all tasks at once: the upper reference"
    source: ClassVar[str] = "arXiv:2403.08350"

    def stages(self, stream: Stream) -> Sequence[Task]:
        first = stream[0]
        return (
            Task(
                name="multitask",
                train=joined(*(t.train for t in stream)),
                test=(),
                score=first.score,  # never used: a stage is trained on, the stream's own tasks are scored
                max_new_tokens=max(t.max_new_tokens for t in stream),
                valid=tuple(e for t in stream for e in t.valid),
                about=f"all {len(stream)} tasks of {stream.name}",
            ),
        )
