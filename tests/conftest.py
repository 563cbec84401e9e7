"""Fixtures shared by the tests: tiny models of three families (see `tiny`), one thread, and no network."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ["RETAIN_CACHE"] = tempfile.mkdtemp(
    prefix="retain-cache-"
)  # what the guard remembers: of this run alone
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # here, not in a fixture: huggingface_hub reads it when imported

import pytest
import torch

import tiny
from retain.adapters.bank import Mix
from retain.models.hf import HFModel

atexit.register(shutil.rmtree, os.environ["RETAIN_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


def _emptied(model: HFModel) -> Iterator[HFModel]:
    """The model, and an empty bank after the test."""
    yield model
    model.adapters.mix = Mix()
    for name in list(model.adapters.names):
        model.adapters.remove(name)
    model.train(False)


@pytest.fixture(scope="session", params=tiny.FAMILIES)
def _family(request: pytest.FixtureRequest) -> HFModel:
    return tiny.model(request.param)


@pytest.fixture
def any_model(_family: HFModel) -> Iterator[HFModel]:
    """A tiny model of each family in turn."""
    yield from _emptied(_family)


@pytest.fixture(scope="session")
def _llava() -> HFModel:
    return tiny.model()


@pytest.fixture
def llava(_llava: HFModel) -> Iterator[HFModel]:
    """A tiny LLaVA."""
    yield from _emptied(_llava)
