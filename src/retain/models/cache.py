"""A least-recently-used store of tensors with a budget in bytes: what is frozen is computed once.

Holds vision-tower features, preprocessed pixels and guide features, keyed by a digest of their content. A
miss after an eviction computes the same bits again (the computation never depends on the batch), so a budget
changes the time and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Generic, TypeVar

from torch import Tensor

Value = Tensor | Mapping[str, Tensor]
V = TypeVar("V", bound=Value)


def n_bytes(value: Value) -> int:
    """Bytes that a tensor, or a mapping of tensors, holds."""
    tensors = [value] if isinstance(value, Tensor) else value.values()
    return sum(t.numel() * t.element_size() for t in tensors)


class ByteLRU(Generic[V]):
    """Digest to tensor(s); the least recently used entries beyond `budget` bytes are forgotten."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.hits = self.misses = 0
        self._items: OrderedDict[str, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def get(self, key: str) -> V | None:
        """The value, now the most recently used one, or None."""
        value = self._items.get(key)
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        self._items.move_to_end(key)
        return value

    def put(self, key: str, value: V) -> None:
        """Keep a value; one that is larger than the whole budget is not kept."""
        self.pop(key)
        size = n_bytes(value)
        if size > self.budget:
            return
        self._items[key] = value
        self.used += size
        while self.used > self.budget:
            _, old = self._items.popitem(last=False)
            self.used -= n_bytes(old)

    def pop(self, key: str) -> None:
        """Forget one entry, if it is there."""
        old = self._items.pop(key, None)
        if old is not None:
            self.used -= n_bytes(old)

    def clear(self) -> None:
        """Forget everything."""
        self._items.clear()
        self.used = 0
