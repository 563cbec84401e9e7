"""Runs that share a folder tune a task once: the same bytes as alone, and never where a method acts between steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loop_helpers import kept, model, stream
from retain.method import Method, build
from retain.run.continual import Silent, run
from retain.run.store import RunDir, read_jsonl, read_record
from retain.run.train import Optim
from retain.types import RetainError

OPTIM = Optim(lr=1e-2, steps=4, batch_size=4, log_every=2)
ALONE = {"merge_tasks": {"merger": "average"}}


def made(path: Path, method: Method, reuse: Path | None, optim: Optim = OPTIM, seed: int = 0) -> RunDir:
    store = RunDir.open(path, {})
    run(model(), stream(), method, optim, store, seed=seed, reuse=reuse)
    return store


def reused(store: RunDir) -> list[bool]:
    """Of every trained row."""
    return [read_record(row.path / "fit.json")["reused"] for row in store.rows() if row.trained]


def told(store: RunDir) -> list[tuple[str, int, list[float]]]:
    """The losses of every step as the events tell them."""
    events = read_jsonl(store.path / "events.jsonl")
    return [(e["task"], e["step"], e["losses"]) for e in events if e["kind"] == "step"]


def test_a_second_run_takes_the_steps_of_the_first_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    alone = made(tmp_path / "alone", build(ALONE), None)
    first = made(tmp_path / "first", build(ALONE), tuned)
    second = made(tmp_path / "second", build(ALONE), tuned)
    assert reused(alone) == reused(first) == [False, False] and reused(second) == [True, True]
    truth = kept(alone.path)
    for other in (first, second):
        found = kept(other.path)
        assert [k for k, v in truth.items() if found[k] != v] == []
    assert told(second) == told(alone)
    costs = [[read_record(r.path / "fit.json") for r in s.rows() if r.trained] for s in (first, second)]
    for mine, theirs in zip(*costs, strict=True):
        for key in ("steps", "samples", "tokens", "trainable_parameters", "trained", "last_loss"):
            assert mine[key] == theirs[key]
        assert mine["seconds"] > 0 and theirs["seconds"] > 0 and mine["peak_memory_bytes"] > 0


def test_another_merger_of_the_same_adapters_trains_nothing(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    made(tmp_path / "average", build(ALONE), tuned)
    other = made(tmp_path / "ties", build({"merge_tasks": {"merger": "ties"}}), tuned)
    assert reused(other) == [True, True]


@pytest.mark.parametrize(
    "change", [{"lr": 2e-2}, {"steps": 5}, {"batch_size": 8}, {"weight_decay": 0.1}, {"seed": 1}], ids=str
)
def test_what_changes_the_steps_is_tuned_again(tmp_path: Path, change: dict[str, float]) -> None:
    tuned = tmp_path / "tuned"
    made(tmp_path / "a", build(ALONE), tuned)
    optim = replace(OPTIM, **{k: v for k, v in change.items() if k != "seed"})  # type: ignore[arg-type]
    other = made(tmp_path / "b", build(ALONE), tuned, optim, int(change.get("seed", 0)))
    assert reused(other) == [False, False]


def test_what_is_only_written_differently_is_not(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    made(tmp_path / "a", build(ALONE), tuned)
    other = made(tmp_path / "b", build(ALONE), tuned, replace(OPTIM, log_every=1, checkpoint_every=2))
    assert reused(other) == [True, True]


@pytest.mark.parametrize("name", ["ema", "llaca", "ewc", "gpm"])
def test_a_method_that_acts_between_the_steps_shares_nothing(tmp_path: Path, name: str) -> None:
    tuned = tmp_path / "tuned"
    for folder in ("a", "b"):
        store = made(tmp_path / folder, build(["lora", name]), tuned)
        assert reused(store) == [False, False]
    assert not tuned.exists()


def test_a_replay_buffer_counts_as_examples(tmp_path: Path) -> None:
    """The first task has nothing to replay, so it is shared with plain LoRA; the second is not."""
    tuned = tmp_path / "tuned"
    made(tmp_path / "a", build("lora"), tuned)
    store = made(tmp_path / "b", build(["lora", {"replay": {"size": 4}}]), tuned)
    assert reused(store) == [True, False]


def test_a_corrupt_file_is_named_and_nothing_else_is_lost(tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    made(tmp_path / "a", build(ALONE), tuned)
    for file in tuned.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(RetainError, match=r"tuned/.*safetensors.*remove .* to tune this task again"):
        made(tmp_path / "b", build(ALONE), tuned)


def test_the_watcher_is_told(tmp_path: Path) -> None:
    notes: list[str] = []

    class Hears(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    made(tmp_path / "a", build(ALONE), tmp_path / "tuned")
    store = RunDir.open(tmp_path / "b", {})
    run(model(), stream(), build(ALONE), OPTIM, store, reuse=tmp_path / "tuned", watch=Hears())
    assert len(notes) == 2 and "earlier run" in notes[0]
