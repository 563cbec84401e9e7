"""A model in half precision, for a while in fp32: every half-precision weight is widened in place and narrowed again.

In bf16 a sum depends on the shapes it is computed in by more than an answer can bear: the same question in another
batch may get another greedy answer. In fp32 it does not. Widening and narrowing again gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from retain.models.cache import ByteLRU

HALF = (torch.bfloat16, torch.float16)
_features: WeakKeyDictionary[Any, ByteLRU[Tensor]] = WeakKeyDictionary()  # of the widened tower, by model


def half(model: Any) -> list[Tensor]:
    """The weights and buffers of a model's base that are in half precision; none where it is no Hugging Face model."""
    base = getattr(model, "hf", None)
    return [] if base is None else [t for t in (*base.parameters(), *base.buffers()) if t.dtype in HALF]


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Widen what is in half precision; takes as much memory again. Does nothing for a model in fp32.

    Tower features are kept apart from those of the model as it was loaded.
    """
    narrow = [(t, t.dtype) for t in half(model)]
    if not narrow:
        yield
        return
    features, sizes = model.features, model._sizes
    model.features, model._sizes = _features.setdefault(model, ByteLRU(features.budget)), None
    try:
        for t, _ in narrow:
            t.data = t.data.float()
        yield
    finally:
        for t, kind in narrow:
            t.data = t.data.to(kind)
        model.features, model._sizes = features, sizes
