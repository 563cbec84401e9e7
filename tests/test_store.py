"""Files: what is written is what is read, half a file is never seen, and foreign files are named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

import retain.files
import retain.run.records
import retain.run.states
import retain.run.store
from fake_model import FakeModel
from retain.adapters.bank import Mix
from retain.adapters.lora import LoraSpec
from retain.files import append_lines, mend, read_jsonl, write_atomic, write_json, write_text
from retain.method import build
from retain.run.store import CheckpointDir, RunDir, differences, load_state, save_state, save_tensors
from retain.types import Example, Message, RetainError, digest

SPEC = LoraSpec(rank=2, alpha=4.0)


def there_and_back(value: Any, folder: Path) -> Any:
    save_state(folder / "state", value)
    return load_state(folder / "state")


@pytest.mark.parametrize(
    "t",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.zeros(0, 4),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
)
def test_tensors_come_back_bit_for_bit(t: torch.Tensor, tmp_path: Path) -> None:
    back = there_and_back({"a": [t, t]}, tmp_path)["a"]
    assert [digest(b[None]) for b in back] == [digest(t[None])] * 2  # shape, type and bits
    assert (
        back[0].data_ptr() % 64 == 0 or not back[0].numel()
    )  # aligned as fresh tensors are: sums stay the same


def test_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    value = {
        "b": 1, "a": [True, None, 0.1, "ä\n", float("inf")], 3: ("t", ("u", [])), "empty": {}, ("k", 1): {2},
        "path": Path("a/b"), "$tensor": "not one", "np": np.float64(0.25),
    }  # fmt: skip
    back = there_and_back(value, tmp_path)
    assert back == value and list(back) == list(value)
    assert isinstance(back[3][1], tuple) and back["a"][0] is True


def test_examples_come_back_with_their_pixels(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    meta = {"box": (1, 2.5), "table": np.arange(3)}
    sources = (rgb, rgb[..., 0], tmp_path / "p.png", Image.fromarray(rgb))
    e = Example("é/1", (Message("user", "q", 4), Message("assistant", "a")), sources, ("a", "b"), meta)
    (back,) = there_and_back([e], tmp_path)
    assert (back.id, back.messages, back.references) == (e.id, e.messages, e.references)
    assert np.array_equal(back.images[0], rgb) and np.array_equal(back.images[1], rgb[..., 0])
    assert back.images[2] == tmp_path / "p.png" and np.array_equal(back.images[3], rgb)
    assert back.meta["box"] == (1, 2.5) and back.meta["table"].tolist() == [0, 1, 2]
    assert digest(back.images[0]) == digest(rgb)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    with pytest.raises(RetainError, match="holds a Generator, which cannot be saved without pickle"):
        save_state(tmp_path / "state", {"rng": torch.Generator()})
    assert not list(tmp_path.iterdir())
    modules = (retain.run.store, retain.run.states, retain.run.records, retain.files)
    source = "".join(Path(module.__file__).read_text() for module in modules)
    assert "import pickle" not in source and "torch.load" not in source and "torch.save" not in source


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(RetainError, match=r"cannot write .*a\.json: No space left.*kept"):
        write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_under_safetensors_is_told_as_one(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with pytest.raises(RetainError, match="No space left"):
        write_atomic(tmp_path / "a", write)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(RetainError, match="cannot write"):
        write_json(tmp_path / "run" / "rows" / "a.json", {})
    with pytest.raises(RetainError, match="cannot write"):
        append_lines(tmp_path / "run" / "events.jsonl", [{}])


def test_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    mend(path)
    path.write_bytes('{"a": 1}\n{"a": "ü'.encode()[:-1])
    assert read_jsonl(path) == [{"a": 1}]
    mend(path)
    append_lines(path, [{"a": 2}, {"a": 3}])
    assert [r["a"] for r in read_jsonl(path)] == [1, 2, 3]
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(RetainError, match="line 2"):
        read_jsonl(path)


def test_differences_are_told_key_by_key() -> None:
    there = {"a": {"b": 1, "c": {}}, "out": "x", "track": []}
    assert differences(there, {"a": {"b": 1, "c": {}}, "out": "y", "track": ["wandb"]}) == []
    assert differences(there, {"a": {"b": 2, "c": {}}}) == ["a.b: 1 there, 2 here"]
    assert differences({"s": {"pocket": {}}}, {"s": {"coin": {}}})[0] == "s.coin: nothing there, {} here"
    assert len(differences({"a": "x" * 500}, {})[0]) < 150


# -- rows ----------------------------------------------------------------------------------------------------


def bank_of(*names: str, spec: LoraSpec = SPEC) -> FakeModel:
    model = FakeModel(spec)
    for i, name in enumerate(names):
        model.adapters.add(name, torch.Generator().manual_seed(i))
    return model


def opened(tmp_path: Path) -> RunDir:
    return RunDir.open(tmp_path / "run", {"a": 1})


def test_a_row_gives_back_adapters_in_their_order(tmp_path: Path) -> None:
    """The order is part of the result: it is the order of sums."""
    saved, other = bank_of("z", "a", "m"), bank_of("a", "stray")
    saved.adapters.mix = Mix({"z": 0.5, "a": 1.0}, {1: {"m": 2.0}})
    row = opened(tmp_path).row(1, "t")
    row.save_model(saved.adapters, build("lora"), {}, None)
    row.load_model(other.adapters, build("lora"))
    assert other.adapters.names == ["z", "a", "m"]
    assert other.adapters.mix.to_json() == saved.adapters.mix.to_json()
    assert list(other.adapters.mix.weights) == ["z", "a"]
    for name in saved.adapters.names:
        assert digest(other.adapters.state(name)) == digest(saved.adapters.state(name))


def test_loading_draws_nothing_from_the_global_generator(tmp_path: Path) -> None:
    row = opened(tmp_path).row(1, "t")
    row.save_model(bank_of("a").adapters, build("lora"), {}, None)
    fresh, state = FakeModel(SPEC), torch.get_rng_state()
    row.load_model(fresh.adapters, None)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_models_adapters_are_refused_by_name(tmp_path: Path) -> None:
    row = opened(tmp_path).row(1, "t")
    row.save_model(bank_of("a").adapters, build("lora"), {}, None)
    mine = bank_of("mine", spec=LoraSpec(rank=3, alpha=4.0))
    with pytest.raises(RetainError, match=r"another model \(lora\.rank: 2 there, 3 here\)"):
        row.load_model(mine.adapters, None)
    assert mine.adapters.names == ["mine"]  # nothing of it is lost


def test_rows_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = opened(tmp_path)
    for i in (100, 2, 11):
        run.row(i, "t").mark("DONE")
    (run.path / "rows" / "notes.txt").write_text("mine")
    assert [row.index for row in run.rows()] == [2, 11, 100]


def test_checkpoints_keep_the_newest_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = CheckpointDir(tmp_path / "checkpoint")
    assert slots.load() is None
    slots.save({"n": 1})
    slots.save({"n": 2})
    torn = tmp_path / "checkpoint" / "a.safetensors"  # the slot that the next one would use
    torn.write_bytes(b"torn")
    assert slots.load() == {"n": 2}
    slots.save({"n": 3})
    assert slots.load() == {"n": 3}
    torn.write_bytes(b"torn")
    with pytest.raises(RetainError, match=r"a\.safetensors.*remove .*checkpoint"):
        slots.load()
    CheckpointDir(tmp_path / "checkpoint", main=False).clear()
    assert torn.is_file()
    slots.clear()
    assert slots.load() is None


def test_save_tensors_is_safetensors(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2, 3).t()})
    assert (tmp_path / "a.safetensors").read_bytes()[8:9] == b"{"
